"""The demo's model before it has any weights: two configuration files and a tokenizer that knows the world's words.

    model/vision.json  model/language/{config,tokenizer,tokenizer_config}.json

A run that names the two configurations draws the weights from its seed. 1.4 million parameters; wide enough to learn
to see in minutes on two cores, small enough to be trained there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data_tools.architectures import END_OF_TEXT, END_OF_TURN, TURN, siglip
from data_tools.demo.questions import CAPTION_REQUEST, NOTHING, OPPOSITES
from data_tools.demo.scenes import ALL_POSITIONS, COLOURS, SHAPES, SIZES, TEXTURES
from pivot.system.files import write_json

IMAGE_SIZE, PATCH_SIZE = 72, 12  # two by two patches in each cell of the grid
WIDTH, NUM_LAYERS, NUM_HEADS = 128, 3, 4
VOCAB_SIZE = 256 + 64
UNKNOWN = "<|unknown|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SENTENCES = (
    "user assistant system",
    CAPTION_REQUEST,
    "What colour shape size is at the object? What texture has the object? What digit is on the object?",
    "Where is the object? Where is the object, seen from the object? What is at the top?",
    "How many objects are there? Is there a object? yes no a circle with a",
)


def write_architecture(folder: Path) -> None:
    """The same bytes whatever data set they are for. Files are written whole or not at all."""
    language = folder / "language"
    language.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    write_json(folder / "vision.json", siglip(WIDTH, 4 * WIDTH, NUM_LAYERS, NUM_HEADS, PATCH_SIZE, IMAGE_SIZE))
    write_json(language / "config.json", text_config(tokenizer))
    write_json(language / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(language / "tokenizer_config.json", tokenizer_config())


def build_tokenizer() -> Tokenizer:
    """One token a word of the world, wherever it stands; other ASCII words are spelt, letter by letter.

    A word must be one and the same token in a caption, in a question and as an answer: with byte-level BPE, where a
    word behind a space and one behind a line break are two tokens, what the captions taught did not help to answer.
    White space is only ever a separator.
    """
    letters = [chr(code) for code in range(0x21, 0x7F)]
    entries = [UNKNOWN, *letters, *(f"##{letter}" for letter in letters), *_words()]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(" :", ":")])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (END_OF_TEXT, TURN, END_OF_TURN)])
    assert tokenizer.get_vocab_size() < VOCAB_SIZE
    return tokenizer


def _words() -> list[str]:
    lists = (ALL_POSITIONS, COLOURS, SHAPES, SIZES, TEXTURES, OPPOSITES, [NOTHING], SENTENCES)
    return sorted({word for texts in lists for text in texts for word in re.findall(r"[A-Za-z]{2,}", text)})


def text_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "model_type": "llama",  # for qwen2 transformers insists on Qwen2's own tokenizer
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,  # gated: three matrices of that size do the work of a plain 4 x
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,  # at this width the usual 0.02 learns at half the speed
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END_OF_TURN),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
