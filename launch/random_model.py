"""Write a model's architecture for random weights: to try a machine, a data set or a recipe without any download.

    python launch/random_model.py --vision siglip-b16-384 --language qwen2-small --out models/b16-small

prints the keys that a run takes: model.vision_tower.path=..., model.language_model.path=...
The weights are drawn at the start of a run from train.seed. The tokenizer has one token a byte.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from data_tools.architectures import END_OF_TEXT, END_OF_TURN, TURN, byte_tokenizer, qwen2, siglip

SPECIAL_TOKENS = (END_OF_TEXT, TURN, END_OF_TURN, "<image>")

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
    PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(SPECIAL_TOKENS),
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
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
