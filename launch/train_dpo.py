"""Train a multimodal LLM with DPO: `deepspeed launch/train_dpo.py CONFIG [key=value ...]`."""

import sys

from command import main  # first: it makes pivot importable

from pivot.system.process import leave

if __name__ == "__main__":
    leave(main("dpo", sys.argv[1:]))
