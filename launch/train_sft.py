"""Train a multimodal LLM with SFT: `deepspeed launch/train_sft.py CONFIG [key=value ...]`."""

import sys

from command import leave, main

if __name__ == "__main__":
    leave(main("sft", sys.argv[1:]))
