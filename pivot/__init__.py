"""Post-train a whole multimodal LLM with preference optimisation, and get a better vision encoder out."""

import contextlib
import os

__version__ = "0.1.0"


def _keep_compiled_code_at_home() -> None:
    """torch makes /tmp/torchinductor_USER when it is imported, a name that anybody may take first, and would run what
    was compiled there. Where TORCHINDUCTOR_CACHE_DIR says nothing, a folder of the home, for its user alone, is taken.
    """
    folder = os.path.expanduser("~/.cache/torchinductor")
    with contextlib.suppress(OSError):  # no home that can be written: as torch does it
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


_keep_compiled_code_at_home()
