"""Train a multimodal LLM with KTO: `deepspeed launch/train_kto.py CONFIG [key=value ...]`."""

import sys

from command import main  # first: it makes pivot importable

from pivot.system.process import leave

if __name__ == "__main__":
    leave(main("kto", sys.argv[1:]))
