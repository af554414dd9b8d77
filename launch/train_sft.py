"""Train a multimodal LLM with SFT: `deepspeed launch/train_sft.py CONFIG [key=value ...]`."""

import sys

from command import main  # first: it makes pivot importable

from pivot.system.process import leave

if __name__ == "__main__":
    leave(main("sft", sys.argv[1:]))
