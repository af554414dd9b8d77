"""The fact sheet that data and model share, built without weights: tokenizer, chat template, image geometry.

`Processor.encode` gives the token ids of one sample, exactly those that the exported HF processor gives at inference.
A conversation is rendered by the tokenizer's chat template and by nothing else. What users wrote never becomes a
special token: `<image>` or `<|im_end|>` in their text stays text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import SecurityError, TemplateError
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from pivot.config import DataConfig, ModelConfig
from pivot.encoders.facts import Encoder, EncoderFacts
from pivot.encoders.library import resolve_encoder
from pivot.encoders.transformers import build_image_processor, read_image_settings
from pivot.processor.conversation import ChangedAnswer, check_completion, check_prompt, escape_text
from pivot.processor.stock import choose_image_fit, describe_other_ids, find_chat_template, require_same, same_features
from pivot.processor.template_limit import render_bounded, require_bounded

__all__ = ["EncodedPair", "Processor", "build_processor"]

LENGTH_CODE_VERSION = 2  # raise it when the same sample would get other token ids: side-cars are keyed by it
IMAGE_TOKEN = "<image>"

# Most templates take a string as content. This prefix turns a content list into one, an image into "<image>\n", and
# travels with the template into the export, so that stock transformers renders the same text. Its last line ends in
# `%}` and a newline, which transformers' trim_blocks takes away: the template then starts as it did at line one.
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = namespace(value='') -%}
{%- if message['content'] is string -%}
{%- set text.value = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set text.value = text.value + ('<image>\n' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""
# Templates made for HF LLaVA walk over a list and render nothing for a string. They place the image themselves.
_UNFLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.messages = flat.messages + [dict(message, content=[{'type': 'text', 'text': message['content']}])] -%}
{%- else -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""
_CHATML = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
_QUESTION, _PROBE = "which-shape", "pentagram"  # texts no template holds, to find out what one does with ours
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one sample."""

    prompt: np.ndarray  # int64; each image is geometry.num_tokens copies of the image-token id
    completions: dict[str, np.ndarray]  # role -> int64, the last one the end of the turn
    num_images: int


def build_processor(model: ModelConfig, data: DataConfig, encoder: Encoder | None = None) -> Processor:
    """The processor of a run; the tokenizer lies with the language model (beside it, for a bare CONFIG.json).

    `encoder`: what `model.vision_tower` names, where that was resolved before.
    """
    path = model.language_model.path
    if path is None:
        raise ValueError("model.language_model.path: absent; give a folder or a hub id that holds the tokenizer")
    place = str(Path(path).parent) if Path(path).is_file() else path
    tokenizer = load_tokenizer(place)
    own, source = find_chat_template(place, tokenizer)
    given = read_chat_template(data.chat_template)
    encoder = encoder or resolve_encoder(model.vision_tower)
    image_fit = choose_image_fit(encoder, data.image.fit)
    processor = Processor(
        tokenizer,
        encoder.facts,
        cls=model.vision_tower.cls,
        fit=image_fit.fit,
        resample=image_fit.resample,
        chat_template=own if given is None else given,
    )
    processor.notes = (
        _describe_template(processor, own, source, given),
        f"pixels     {image_fit.fit}, {image_fit.resample}: {image_fit.source}",
        *_compare_to_stock(processor, place, encoder, own_template=given is None and own is not None),
    )
    return processor


def _describe_template(processor: Processor, own: str | None, source: str, given: str | None) -> str:
    """For the first screen: whose prompts the run trains on."""
    whose = f"the template of {source}"
    if given is not None:
        same = own is not None and given == own
        whose = "data.chat_template" + ("" if same or own is None else f", which is not the template of {source}")
    elif own is None:
        whose = f"ChatML: {source}, and data.chat_template is absent"
    added = "".join(processor.tokenizer.convert_ids_to_tokens(processor.lead_ids))
    return f"prompts    {whose}" + (f"; the tokenizer begins each with {added}" if added else "")


def _compare_to_stock(processor: Processor, place: str, encoder: Encoder, *, own_template: bool) -> list[str]:
    """What could not be compared; ValueError where the processor in the checkpoint's folder prompts otherwise."""
    if not read_image_settings(place):
        return []  # a tokenizer alone: the processor will be ours
    try:
        difference = describe_other_ids(
            processor, place, images=same_features(encoder, place), own_template=own_template
        )
    except Exception as error:  # whatever a processor of any kind may raise
        reason = str(error).strip().partition("\n")[0]
        return [f"processor  not compared to the one at {place}, which fails: {type(error).__name__}: {reason}"]
    if difference is not None:
        raise ValueError(
            f"model.language_model.path: the processor at {place} makes other prompts than its tokenizer, its chat "
            f"template and config.json ask for: {difference}; repair its processor_config.json or chat template"
            + (", or set data.chat_template" if own_template else "")
        )
    return []


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.language_model.path: no tokenizer that transformers knows at '{path}': {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"model.language_model.path: the tokenizer at '{path}' is a slow one ({type(tokenizer).__name__}); "
            "expected one with a tokenizer.json"
        )
    return tokenizer


def read_chat_template(value: str | None) -> str | None:
    """`data.chat_template`: the text of a file, or Jinja given inline."""
    if value is None or "{" in value:
        return value
    if not Path(value).is_file():
        raise ValueError(f"data.chat_template: '{value}' is neither a file nor Jinja text (which would hold a '{{')")
    return Path(value).read_text()


class Processor:
    """Tokenizer, chat template and image geometry.

    `chat_template` replaces the tokenizer's own; a tokenizer without one gets ChatML. `<image>` (and ChatML's two
    tokens) are added to the tokenizer where they are missing, so `len(tokenizer)` may grow past the embedding rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: EncoderFacts,
        *,
        cls: str = "drop",
        fit: str = "squash",
        resample: str = "bicubic",
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.cls = cls
        self.notes: tuple[str, ...] = ()  # for the first screen: what was taken from where
        self.geometry = encoder.geometry(cls, fit, resample)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = _add_special_tokens(tokenizer, IMAGE_TOKEN)
        self.chat_template = self._resolve_template(chat_template)
        self.tokenizer.chat_template = self.chat_template
        self._special_tokens = tuple(sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special))
        self.lead_ids = self._find_lead()
        self.end_of_turn_id, self._adds_end_of_turn = self._find_end_of_turn()
        self._before_answer, self._after_answer = self._find_wrapping()

    def _resolve_template(self, given: str | None) -> str:
        if given is None and self.tokenizer.chat_template is None:
            _add_special_tokens(self.tokenizer, *_CHATML_TOKENS)
            given = _CHATML
        template = given or self.tokenizer.get_chat_template()
        if "strftime_now" in template:  # Llama 3.2's
            raise ValueError(
                "chat template: it writes today's date into the prompt, so token ids and reference log-probs would "
                "change over night; copy it to a file, write a fixed date there, and set data.chat_template to it"
            )
        require_bounded(template)
        if template.startswith((_FLATTEN, _UNFLATTEN)):  # our own export
            return template
        return (_UNFLATTEN if self._takes_lists(template) else _FLATTEN) + template

    @cached_property
    def _bare_template(self) -> str:
        """The template without its prefix, for messages that `_shape` prepared: half the time of a rendering."""
        return self.chat_template.removeprefix(_FLATTEN).removeprefix(_UNFLATTEN)

    def _shape(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the prefix of the chat template makes of a message, whose content is a list of parts."""
        if self.chat_template.startswith(_UNFLATTEN):
            return message
        texts = (f"{IMAGE_TOKEN}\n" if part["type"] == "image" else part["text"] for part in message["content"])
        return {**message, "content": "".join(texts)}

    def _takes_lists(self, template: str) -> bool:
        """Whether a template places images itself. Others take strings; one that takes both is asked for its own."""
        try:
            text = self._render([_question(_PROBE)], template=template)
        except (ValueError, TypeError):
            return False
        return [text.count(part) for part in (self.image_token, _PROBE)] == [1, 1]

    def _find_lead(self) -> list[int]:
        """What the tokenizer puts before a text by itself, and so before each prompt that does not begin with it."""
        probe = self.tokenizer(_PROBE, return_special_tokens_mask=True)
        ids, added = probe["input_ids"], probe["special_tokens_mask"]
        lead, end = added.index(0), len(ids) - added[::-1].index(0)
        if ids[end:] and not self._begins_itself(self._render([_question(_QUESTION)])):
            raise ValueError(
                f"model.language_model.path: its tokenizer puts {self.tokenizer.decode(ids[end:])} behind each text, "
                "so a prompt would end before its answer; set add_eos_token to false in its tokenizer_config.json"
            )
        return ids[:lead]

    def _begins_itself(self, text: str) -> bool:
        """Whether a rendered text begins with what LlavaProcessor would else let the tokenizer put there."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    def _find_end_of_turn(self) -> tuple[int, bool]:
        """The special token behind an assistant's text, and whether we must put it there (LLaVA-1.5's has none)."""
        question, answer = _question(_QUESTION), {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
        text = self._render([question, answer])
        shaped = [self._shape(message) for message in (question, answer)]
        assert self._render(shaped, template=self._bare_template) == text, "the prefix of the template does otherwise"
        if [text.count(part) for part in (self.image_token, _QUESTION, _PROBE)] != [1, 1, 1]:
            raise ValueError(
                "chat template: a question with one image and its answer should be rendered with one "
                f"{self.image_token} and both texts; found {text!r}; give another one in data.chat_template"
            )
        for token in self._encode_text(text.rpartition(_PROBE)[2], {}):
            if self.tokenizer.convert_ids_to_tokens(token) in self._special_tokens:
                return token, False
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"chat template: no special token ends an assistant's turn in {text!r} and the tokenizer has no end of "
                "text, so a model could not learn to stop; give another template in data.chat_template"
            )
        return self.tokenizer.eos_token_id, True

    def _find_wrapping(self) -> tuple[list[str], str]:
        """What the template puts around an answer: the words before it (Qwen3's: an empty thought), the text behind."""
        question, answer = _question(_QUESTION), {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
        prompt, full = self._render([question], add_generation_prompt=True), self._render([question, answer])
        if not full.startswith(prompt):
            return [], ""  # of no use: `encode` refuses every sample, and says why
        before, _, after = full[len(prompt) :].partition(_PROBE)
        after = after.partition(str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id)))[0]
        before, after = (self.read_answer(self._encode_text(text, {})) for text in (before, after))
        return before.split(), after

    def read_answer(self, ids: list[int]) -> str:
        """The text of generated token ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def cut_answer(self, text: str) -> str:
        """The answer in a generated text, without what the template has the model write around it.

        Of a thought that the template would leave empty, all that the model thought goes as well.
        """
        text = text.strip()
        if self._before_answer and text.startswith(self._before_answer[0]):
            _, closed, behind = text.partition(self._before_answer[-1])
            text = behind if closed else text
        return text.removesuffix(self._after_answer).strip()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that token ids and pixels depend on: tokenizer, template, image rule, version of this code."""
        core = json.loads(self.tokenizer.backend_tokenizer.to_str())
        facts = {
            "tokenizer": {k: v for k, v in core.items() if k not in ("truncation", "padding")},  # states, not facts
            "chat_template": self.chat_template,
            "image": asdict(self.geometry),
            "image_token": self.image_token,
            "version": LENGTH_CODE_VERSION,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def encode(self, prompt: list[dict[str, Any]], completions: dict[str, list[dict[str, Any]]]) -> EncodedPair:
        """Token ids of a prompt and of each completion (one assistant message); ValueError says what is wrong."""
        prompt, num_images = check_prompt(prompt)
        answers = {role: check_completion(role, messages) for role, messages in completions.items()}
        escapes = self._choose_escapes([*prompt, *answers.values()])
        messages = [self._shape(escape_text(message, escapes)) for message in prompt]
        text = self._render(messages, add_generation_prompt=True, template=self._bare_template)
        ids = self._encode_prompt(text, escapes)
        if ids.count(self.image_token_id) != num_images:
            raise ValueError(
                f"the chat template rendered {ids.count(self.image_token_id)} {self.image_token} for a prompt with "
                f"{num_images} images: {text!r}"
            )
        encoded = {}
        for role, answer in answers.items():
            shaped = self._shape(escape_text(answer, escapes))
            full = self._render([*messages, shaped], template=self._bare_template)
            encoded[role] = np.asarray(self._completion_ids(text, ids, full, escapes), dtype=np.int64)
            self._require_answer(role, shaped, full.removeprefix(text))
        return EncodedPair(self._expand_images(ids), encoded, num_images)

    def _completion_ids(self, prompt: str, prompt_ids: list[int], full: str, escapes: dict[str, str]) -> list[int]:
        """What `full` has behind the prompt, up to the end of the turn.

        The completion keeps the tokens it has in context (a SentencePiece tokenizer puts a space before a text of its
        own). Where its first letters would melt into the prompt's last token it is tokenised alone, as generation,
        which starts from the prompt's ids, would have it.
        """
        if not full.startswith(prompt):
            raise ValueError(
                "chat template: the rendered prompt is not the beginning of the rendered conversation, so the tokens "
                f"to train on are not defined; give another one in data.chat_template. Prompt: {prompt!r}; "
                f"conversation: {full!r}"
            )
        if self._adds_end_of_turn:
            full = full.rstrip()  # a blank before what would be the next turn
        ids = self._encode_prompt(full, escapes)
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids = self._encode_text(full[len(prompt) :], escapes)
        if self._adds_end_of_turn:
            return [*ids, self.end_of_turn_id]
        if self.end_of_turn_id not in ids:
            raise ValueError(f"chat template: no end of turn behind the completion {full[len(prompt) :]!r}")
        return ids[: ids.index(self.end_of_turn_id) + 1]

    def _require_answer(self, role: str, answer: dict[str, Any], rendered: str) -> None:
        """ChangedAnswer unless the template leaves the words of an answer as they are."""
        content = answer["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if text.strip() not in rendered:
            raise ChangedAnswer(
                f"{role}: the chat template changes the answer, so that a model would learn another one: it makes "
                f"{rendered!r} of {text!r}; give a template in data.chat_template that does not"
            )

    def _encode_prompt(self, text: str, escapes: dict[str, str]) -> list[int]:
        """Ids of a rendered text from its beginning on."""
        return [*([] if self._begins_itself(text) else self.lead_ids), *self._encode_text(text, escapes)]

    def _expand_images(self, ids: list[int]) -> np.ndarray:
        tokens = np.asarray(ids, dtype=np.int64)
        return np.repeat(tokens, np.where(tokens == self.image_token_id, self.geometry.num_tokens, 1))

    def _render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, template: str | None = None
    ) -> str:
        # transformers renders in a sandbox; rendering a template ourselves would run whatever it holds.
        try:
            return render_bounded(
                lambda: self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=template or self.chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except SecurityError:
            raise
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"chat template: refused the roles {roles}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            raise ValueError(
                f"chat template: it fails ({type(error).__name__}: {error}); correct it, or give another one in "
                "data.chat_template"
            ) from error

    def _choose_escapes(self, messages: Iterable[dict[str, Any]]) -> dict[str, str]:
        """Special tokens in what users wrote -> the private-use letter that stands for each while rendering."""
        text = "".join(part.get("text", "") for message in messages for part in message["content"])
        written = [token for token in self._special_tokens if token in text]
        if not written:
            return {}
        taken = text + self.chat_template
        letters = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in taken)
        # The longest first: of <a><b> and <a>, both special, the first must not be cut by the second.
        return dict(zip(sorted(written, key=len, reverse=True), letters, strict=False))

    def _encode_text(self, text: str, escapes: dict[str, str]) -> list[int]:
        """Ids of rendered text; an escape letter stands for a special token's letters, which are encoded as text."""
        plain = {letter: token for token, letter in escapes.items()}
        ids: list[int] = []
        start = 0
        for end in [i for i, letter in enumerate(text) if letter in plain] + [len(text)] if plain else [len(text)]:
            ids += self._encode_piece(text[start:end], as_text=False)
            if end < len(text):
                ids += self._encode_piece(plain[text[end]], as_text=True)
            start = end + 1
        return ids

    def _encode_piece(self, text: str, *, as_text: bool) -> list[int]:
        core = self.tokenizer.backend_tokenizer
        if not as_text and not core.encode_special_tokens and core.truncation is None and core.padding is None:
            # What the call below comes to, without the places in the text that it also finds: in half the time.
            return core.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)["input_ids"] if text else []

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and an HF LlavaProcessor, chat template included, for stock AutoProcessor.

        What that loads must then make of samples what we make of them, ids and pixels.
        """
        from transformers import LlavaProcessor

        keeps_all = self.cls == "keep" or not self.encoder.has_cls
        LlavaProcessor(
            image_processor=build_image_processor(self.geometry),
            tokenizer=self.tokenizer,
            patch_size=self.encoder.patch_size,
            vision_feature_select_strategy="full" if keeps_all else "default",
            num_additional_image_tokens=int(self.encoder.has_cls),
            image_token=self.image_token,
            chat_template=self.chat_template,
        ).save_pretrained(folder)
        require_same(self, str(folder))


def _question(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> int:
    """Make each of `tokens` one special token; the id of the first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in special]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer.added_tokens_encoder[tokens[0]]
