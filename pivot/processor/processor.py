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
from transformers import PreTrainedTokenizerBase

from pivot.encoders.facts import EncoderFacts
from pivot.encoders.transformers import build_image_processor
from pivot.processor.chat_template import PROBE, QUESTION, ChatTemplate, answer, ask
from pivot.processor.conversation import ChangedAnswer, check_completion, check_prompt, escape_text
from pivot.processor.stock import require_same
from pivot.processor.tokenizer import IMAGE_TOKEN, add_special_tokens

LENGTH_CODE_VERSION = 2  # raise it when the same sample would get other token ids: side-cars are keyed by it


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one sample."""

    prompt: np.ndarray  # int64; each image is geometry.num_tokens copies of the image-token id
    completions: dict[str, np.ndarray]  # role -> int64, the last one the end of the turn
    num_images: int


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
        registers: str = "drop",
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.cls = cls
        self.notes: tuple[str, ...] = ()  # for the first screen: what was taken from where
        self.geometry = encoder.geometry(cls, fit, resample, registers)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = add_special_tokens(tokenizer, IMAGE_TOKEN)
        self._template = ChatTemplate(tokenizer, chat_template)
        self._special_tokens = tuple(sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special))
        self.lead_ids = self._find_lead()
        self.end_of_turn_id, self._adds_end_of_turn = self._find_end_of_turn()
        self._before_answer, self._after_answer = self._find_wrapping()

    @property
    def chat_template(self) -> str:
        """The template as it is exported."""
        return self._template.text

    def _find_lead(self) -> list[int]:
        """What the tokenizer puts before a text by itself, and so before each prompt that does not begin with it."""
        probe = self.tokenizer(PROBE, return_special_tokens_mask=True)
        ids, added = probe["input_ids"], probe["special_tokens_mask"]
        lead, end = added.index(0), len(ids) - added[::-1].index(0)
        if ids[end:] and not self._begins_itself(self._template.render([ask(QUESTION)])):
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
        conversation = [ask(QUESTION), answer(PROBE)]
        text = self._template.render(conversation)
        prepared = [self._template.prepare(message) for message in conversation]
        assert self._template.render_prepared(prepared) == text, "the prefix of the template does otherwise"
        if [text.count(part) for part in (self.image_token, QUESTION, PROBE)] != [1, 1, 1]:
            raise ValueError(
                "chat template: a question with one image and its answer should be rendered with one "
                f"{self.image_token} and both texts; found {text!r}; give another one in data.chat_template"
            )
        for token in self._encode_text(text.rpartition(PROBE)[2], {}):
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
        prompt = self._template.render([ask(QUESTION)], add_generation_prompt=True)
        full = self._template.render([ask(QUESTION), answer(PROBE)])
        if not full.startswith(prompt):
            return [], ""  # of no use: `encode` refuses every sample, and says why
        before, _, after = full[len(prompt) :].partition(PROBE)
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
        messages = [self._template.prepare(escape_text(message, escapes)) for message in prompt]
        text = self._template.render_prepared(messages, add_generation_prompt=True)
        ids = self._encode_prompt(text, escapes)
        if ids.count(self.image_token_id) != num_images:
            raise ValueError(
                f"the chat template rendered {ids.count(self.image_token_id)} {self.image_token} for a prompt with "
                f"{num_images} images: {text!r}"
            )
        encoded = {}
        for role, given in answers.items():
            prepared = self._template.prepare(escape_text(given, escapes))
            full = self._template.render_prepared([*messages, prepared])
            encoded[role] = np.asarray(self._completion_ids(text, ids, full, escapes), dtype=np.int64)
            self._require_answer(role, prepared, full.removeprefix(text))
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

    def _require_answer(self, role: str, given: dict[str, Any], rendered: str) -> None:
        """ChangedAnswer unless the template leaves the words of an answer as they are."""
        content = given["content"]
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
        # Its count drops one of them where the strategy is "default".
        num_additional = self.geometry.num_tokens - self.encoder.num_patches + int(not keeps_all)
        LlavaProcessor(
            image_processor=build_image_processor(self.geometry),
            tokenizer=self.tokenizer,
            patch_size=self.encoder.patch_size,
            vision_feature_select_strategy="full" if keeps_all else "default",
            num_additional_image_tokens=num_additional,
            image_token=self.image_token,
            chat_template=self.chat_template,
        ).save_pretrained(folder)
        require_same(self, str(folder))
