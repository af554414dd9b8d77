"""Make a DPO or KTO run's reference log-probs without training: `deepspeed launch/reference.py CONFIG [key=value ...]`.

No ZeRO: each rank holds the whole reference model and scores its share of the pairs. Cut at any time, it goes on with
the first shard that is missing; training then finds everything there.
"""

import sys

from command import main, make_references  # first: it makes pivot importable

from pivot.system.process import leave

if __name__ == "__main__":
    leave(main("dpo", sys.argv[1:], task=make_references, script="reference", others=("kto",)))
