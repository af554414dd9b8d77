"""Train a multimodal LLM with SFT: `deepspeed launch/train_sft.py CONFIG [key=value ...]`."""

import sys

from command import main

if __name__ == "__main__":
    sys.exit(main("sft", sys.argv[1:]))
