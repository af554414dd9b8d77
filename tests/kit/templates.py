"""Chat templates, and what they make of an answer."""

from __future__ import annotations

from typing import Any

# As LLaVA-1.5's: made for content lists, images first, and nothing that ends a turn.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


# As Qwen3's: a thought before each answer, an empty one where the answer has none.
THINKS = (
    "{% for m in messages %}{% set text = m['content'] %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in text else '' %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ text.split('</think>')[-1].lstrip() }}{% else %}{{ text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
