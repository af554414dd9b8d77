"""How a process that ran torch's threads ends."""

import atexit
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with `code`, what is registered with atexit done, but without the interpreter's own end.

    During that end a thread that comes back from torch's or gloo's C++ and asks for the interpreter's lock is unwound
    through code that must not throw, and the process aborts ("terminate called without an active exception"): a
    finished run would count as failed. Gloo's threads let go of the last tensors of a collective at any time.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
