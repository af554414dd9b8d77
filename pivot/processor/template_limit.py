"""A chat template is a program that came with a checkpoint: a process with limits runs it first, once.

What only certain conversations make slow is interrupted while they are rendered.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

MAX_SECONDS = 5  # of processor time; a template takes milliseconds
MAX_BYTES = 1 << 30  # of address space, of which Python and Jinja take 100 MB
MAX_LETTERS = 1_000_000  # that a conversation of four short messages may become
WAIT_S = 60.0  # at most, also on a machine that is busy otherwise
RENDER_S = 10.0  # of processor time for one conversation of the data
MAX_RENDERED = 20_000_000  # letters of it, above which tokenising would take gigabytes
_MEMORY, _LETTERS = 3, 4  # exit codes
_MEND = "correct it, or give another one in data.chat_template"

# Jinja alone, set up as transformers does, since importing transformers would take seconds. Other errors are told when
# the template is rendered in earnest.
_RENDER = """
import re, resource, sys
template, seconds, room, letters = sys.stdin.buffer.read().decode(), *map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (room, room))
import json
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(message):
    raise ValueError(message)
def messages(content):
    roles = ["system", "user", "assistant", "user"]
    return [{"role": role, "content": content} for role in roles]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: "")
template = re.sub(r"{%[-+]?\\s*(end)?generation\\s*[-+]?%}", "", template)
parts = [{"type": "image"}, {"type": "text", "text": "word"}]
for system in (True, False):
    for content in ("word", parts):
        for more in (False, True):
            try:
                text = environment.from_string(template).render(
                    messages=messages(content)[0 if system else 1:], add_generation_prompt=more,
                    bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
                )
            except MemoryError:
                sys.exit(3)
            except Exception:
                continue
            if len(text) > letters:
                sys.exit(4)
"""


@functools.cache
def require_bounded(template: str) -> None:
    """Raise ValueError for a chat template that loops or eats memory; costs 0.2 s, once for each template."""
    limits = [str(MAX_SECONDS), str(MAX_BYTES), str(MAX_LETTERS)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _RENDER, *limits],
            input=template.encode(errors="replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=WAIT_S,
            check=False,
        )
        code = done.returncode
        if code > 0 and code not in (_MEMORY, _LETTERS):
            told = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"the process that tries the chat template failed with exit code {code}: {told}")
    except subprocess.TimeoutExpired:
        code = -signal.SIGXCPU
    excess = {
        -signal.SIGXCPU: f"more than {MAX_SECONDS} s",
        -signal.SIGKILL: f"more than {MAX_SECONDS} s",
        _MEMORY: f"more than {MAX_BYTES / 1e9:.1f} GB of memory",
        _LETTERS: f"more than {MAX_LETTERS:,} letters",
    }
    if code in excess:
        raise ValueError(f"chat template: it takes {excess[code]} to render four short messages; {_MEND}")
    if code < 0:
        raise ValueError(f"chat template: the process that tried it ended by signal {-code}; {_MEND}")


def render_bounded(render: Callable[[], object]) -> str:
    """The text that `render` makes of one conversation. Raises ValueError above RENDER_S or MAX_RENDERED letters.

    It costs 3 microseconds. Signals reach the main thread only: in others the time has no limit.
    """
    global _rendering_since
    if threading.current_thread() is not threading.main_thread():
        return _require_length(render())
    _install_handler()
    _rendering_since = time.thread_time()
    # This timer counts the process's work and not the clock, so a job that is suspended meanwhile loses nothing. It
    # rings again after the first time, since a filter may swallow the error.
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_S, 1.0)
    try:
        return _require_length(render())
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


_rendering_since = 0.0  # in time of the main thread


@functools.cache
def _install_handler() -> None:
    signal.signal(signal.SIGVTALRM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if time.thread_time() - _rendering_since >= RENDER_S:  # else it was other threads of the process that worked
        raise ValueError(f"chat template: it takes more than {RENDER_S:g} s to render this sample; {_MEND}")


def _require_length(text: object) -> str:
    assert isinstance(text, str)
    if len(text) > MAX_RENDERED:
        raise ValueError(
            f"chat template: it makes {len(text):,} letters of this sample, more than {MAX_RENDERED:,}; {_MEND}"
        )
    return text
