"""One rank of `run_ranks`."""

import importlib
import sys
from pathlib import Path

from pivot.system import distributed
from pivot.system.process import leave
from tests.kit.ranks import COLLECTIVE_TIMEOUT_S

if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    distributed.start(COLLECTIVE_TIMEOUT_S)
    getattr(importlib.import_module(module), function)(Path(sys.argv[2]))
    distributed.stop()
    leave(0)
