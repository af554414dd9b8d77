"""The chat template of a run: the text that it makes of a conversation, whichever form of messages it expects."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from transformers import PreTrainedTokenizerBase

from pivot.processor.template_limit import render_bounded, require_bounded
from pivot.processor.tokenizer import IMAGE_TOKEN, add_special_tokens

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
CHATML = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


QUESTION, PROBE = "which-shape", "pentagram"  # texts no template holds, to find out what one does with ours


class ChatTemplate:
    """A chat template with the prefix that lets it take our messages, whose content is a list of parts.

    `given` replaces the tokenizer's own template; a tokenizer without one gets ChatML and its two special tokens.
    ValueError for a template whose text changes from day to day, or that takes too long or too much memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.text = self._resolve(given)  # with its prefix, as it is exported
        self._bare = self.text.removeprefix(_FLATTEN).removeprefix(_UNFLATTEN)
        tokenizer.chat_template = self.text

    def _resolve(self, given: str | None) -> str:
        if given is None and self._tokenizer.chat_template is None:
            add_special_tokens(self._tokenizer, *CHATML_TOKENS)
            given = CHATML
        template = given or self._tokenizer.get_chat_template()
        if "strftime_now" in template:  # Llama 3.2's
            raise ValueError(
                "chat template: it writes today's date into the prompt, so token ids and reference log-probs would "
                "change over night; copy it to a file, write a fixed date there, and set data.chat_template to it"
            )
        require_bounded(template)
        if template.startswith((_FLATTEN, _UNFLATTEN)):  # our own export
            return template
        return (_UNFLATTEN if self._takes_lists(template) else _FLATTEN) + template

    def _takes_lists(self, template: str) -> bool:
        """Whether a template places images itself. Others take strings; one that takes both is asked for its own."""
        try:
            text = self._render(template, [ask(PROBE)])
        except (ValueError, TypeError):
            return False
        return [text.count(part) for part in (IMAGE_TOKEN, PROBE)] == [1, 1]

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of messages whose content is a list of parts."""
        return self._render(self.text, messages, add_generation_prompt)

    def prepare(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the prefix makes of a message: done once a message, this halves the time of a rendering."""
        if self.text.startswith(_UNFLATTEN):
            return message
        texts = (f"{IMAGE_TOKEN}\n" if part["type"] == "image" else part["text"] for part in message["content"])
        return {**message, "content": "".join(texts)}

    def render_prepared(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of messages that `prepare` gave; the same as `render` makes of the messages before it."""
        return self._render(self._bare, messages, add_generation_prompt)

    def _render(self, template: str, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        # transformers renders in a sandbox; rendering a template ourselves would run whatever it holds.
        try:
            return render_bounded(
                lambda: self._tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
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


def ask(text: str) -> dict[str, Any]:
    """A user's message with one image and a text."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
