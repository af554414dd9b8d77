"""Silence what other packages say to their developers, not to pivot's users: each by its exact text.

A message of another text, and so of another release, still shows.
"""

from __future__ import annotations

import re
import warnings

# DeepSpeed calls these collectives of torch by the names that torch 2.14 renamed; they do the same under both.
_RENAMED_COLLECTIVES = {
    "all_gather_into_tensor": "all_gather_single",
    "reduce_scatter_tensor": "reduce_scatter_single",
}
KNOWN = [
    f"`torch.distributed.{old}` is deprecated. Please use `torch.distributed.{new}` instead."
    for old, new in _RENAMED_COLLECTIVES.items()
]


def silence_known_output() -> None:
    """From here on this process shows neither the warnings in `KNOWN` nor transformers' progress bars.

    Every rank would draw a bar of its own, over our lines and each other's, and into a job's output file.
    """
    from transformers.utils import logging  # here: it takes a while, and only processes that train come by

    for message in KNOWN:
        warnings.filterwarnings("ignore", message=re.escape(message) + r"\Z")
    logging.disable_progress_bar()
