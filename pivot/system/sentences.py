"""Which errors are a sentence for the user, and which need a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
OURS = (PACKAGE, PACKAGE.parent / "launch")  # the commands of a checkout speak to the user, too


def in_our_words(error: Exception) -> bool:
    """Whether pivot raised the error for the user to read: a ValueError, or an OSError that is not the system's."""
    if not isinstance(error, ValueError) and not (isinstance(error, OSError) and error.errno is None):
        return False
    *_, innermost = traceback.walk_tb(error.__traceback__)
    file = Path(innermost[0].f_code.co_filename).resolve()
    return any(file.is_relative_to(folder) for folder in OURS)
