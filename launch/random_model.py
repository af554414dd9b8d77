"""Write a model's architecture for random weights: to try a machine, a data set or a recipe without any download.

    python launch/random_model.py --vision siglip-b16-384 --language qwen2-small --out models/b16-small

prints the keys that a run takes: model.vision_tower.path=..., model.language_model.path=...
The weights are drawn at the start of a run from train.seed. The tokenizer has one token a byte.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def siglip(width: int, mlp: int, layers: int, heads: int, patch: int, size: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": size,
    }


def qwen2(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
    }


# The published configurations, and small ones for a CPU.
VISION = {
    "siglip-tiny-64": siglip(64, 128, 3, 2, 8, 64),
    "siglip-b16-384": siglip(768, 3072, 12, 12, 16, 384),
    "siglip-l16-384": siglip(1024, 4096, 24, 16, 16, 384),
    "siglip-so400m14-384": siglip(1152, 4304, 27, 16, 14, 384),
}
LANGUAGE = {
    "qwen2-small": qwen2(128, 512, 4, 4, 2, 512, True),
    "qwen2.5-0.5b": qwen2(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": qwen2(3584, 18944, 28, 28, 4, 152064, False),
}


def write_byte_tokenizer(folder: Path) -> None:
    """A token for each byte, ChatML's special ones, and no chat template (ChatML is the default)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def write_model(out: Path, vision: str, language: str) -> list[str]:
    """Write out/vision.json and out/language/; the run keys that name them."""
    (out / "language").mkdir(parents=True, exist_ok=True)
    (out / "vision.json").write_text(json.dumps(VISION[vision], indent=1))
    (out / "language" / "config.json").write_text(json.dumps(LANGUAGE[language], indent=1))
    write_byte_tokenizer(out / "language")
    return [f"model.vision_tower.path={out}/vision.json", f"model.language_model.path={out}/language/config.json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", choices=VISION, default="siglip-b16-384")
    parser.add_argument("--language", choices=LANGUAGE, default="qwen2-small")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    print(" ".join(write_model(arguments.out, arguments.vision, arguments.language)))


if __name__ == "__main__":
    main()
