"""Train a multimodal LLM with DPO: `deepspeed launch/train_dpo.py CONFIG [key=value ...]`."""

import sys

from command import main

if __name__ == "__main__":
    sys.exit(main("dpo", sys.argv[1:]))
