"""Ranks, devices and the few collectives that the trainer itself makes; nothing here knows DeepSpeed."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pivot.system import preemption, watchdog
from pivot.system.launcher import complete_environment
from pivot.system.preemption import Preempted
from pivot.system.process import time_limit
from pivot.system.quiet import silence_known_output
from pivot.system.redact import tell
from pivot.system.watchdog import Watchdog

Value = TypeVar("Value")
MOST_NAMED = 8  # ranks, in a message

MEET_S = 1.0  # between two meetings of the ranks while rank 0 works alone


@dataclass(frozen=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Tell the reader `text`, once: rank 0 does."""
        if self.is_main:
            tell(text)


def start(timeout_s: float) -> World:
    """Join the ranks that the launcher's environment names; a lone process without a launcher is a world of one.

    Raises RuntimeError when a GPU is present that torch cannot use (unless DS_ACCELERATOR says what to do), and
    ValueError when the environment does not say who is who (see launcher.py).
    """
    silence_known_output()
    _prepare_environment()
    use_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    device = torch.device("cuda", _own_gpu()) if use_gpu else torch.device("cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if use_gpu:
        torch.cuda.set_device(device)
    with preemption.meeting():
        if not dist.is_initialized():
            timeout = datetime.timedelta(seconds=timeout_s + watchdog.GRACE_S)  # the watchdog's words come first
            dist.init_process_group("nccl" if use_gpu else "gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _own_gpu() -> int:
    """The number of this rank's GPU among those that it sees. ValueError when it is not told, or sees no such one."""
    told, num_gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if told is None and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError("LOCAL_RANK is absent, so all ranks of a machine would share its first GPU; export it")
    if told is not None and (not told.isdecimal() or int(told) >= num_gpus):
        raise ValueError(
            f"LOCAL_RANK is {told}, but this process sees {num_gpus} GPU(s); start as many ranks on a machine as it "
            "has GPUs, or export LOCAL_RANK=0 where each process is given a GPU of its own"
        )
    return int(told or 0)


def _prepare_environment() -> None:
    if not torch.cuda.is_available() and "DS_ACCELERATOR" not in os.environ:
        if Path("/dev/nvidia0").exists():
            raise RuntimeError(
                f"an NVIDIA device is present but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it; "
                "check the driver with nvidia-smi, or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
    if shutil.which("ninja") is None:  # an environment that is used without being activated
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    complete_environment(os.environ)


def num_local_ranks(world: World) -> int:
    """The ranks of this machine, as the launcher tells; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)


def stop(code: int = 1) -> None:
    """Leave the group: without it, rank 0 can abort at exit while others still hold connections.

    The process ends with `code` where that takes too long, as it may when another rank is dead.
    """
    if dist.is_initialized():
        with time_limit(code):
            dist.destroy_process_group()


@contextlib.contextmanager
def watched(world: World, timeout_s: float) -> Iterator[Watchdog]:
    """Inside, a rank that waits for another longer than `timeout_s` names it and ends. Collective.

    On GPUs somewhat sooner: DeepSpeed makes groups of its own, which have torch's default time-outs whatever the first
    group has: for NCCL 600 s, behind which it aborts the process; for gloo 1,800 s.
    """
    limit_s = timeout_s - min(watchdog.GRACE_S, timeout_s / 4) * (dist.get_backend() == "nccl")
    dog = Watchdog(world.rank, gather(f"{socket.gethostname()}, process {os.getpid()}"), limit_s)
    with dog.watching():
        yield dog


def broadcast(value: Value) -> Value:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    watchdog.met()
    return box[0]


def gather(value: Value) -> list[Value]:
    """Every rank's value, on every rank, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    watchdog.met()
    return values


def require_equal(name: str, value: object) -> None:
    """RuntimeError on every rank unless all ranks hold the same `value`: a stale file must not become a hang."""
    values = gather(value)
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:  # some of them: thousands of ranks would each print thousands of values
        listed = ", ".join(f"rank {rank}: {values[rank]}" for rank in [0, *others[:MOST_NAMED]])
        more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        raise RuntimeError(f"{name} differs between ranks ({listed}{more}); do all nodes see the same files?")


# What gloo and NCCL say of a rank that is dead, and of one that does not answer within train.timeout_s.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
SILENT = ("Timed out waiting", "Application timeout caused pair closure", "Watchdog caught collective operation time")


class FailedElsewhere(RuntimeError):
    """Another rank's error, which that rank tells the reader about."""


def is_echo(error: BaseException) -> bool:
    """Whether `error` only tells that another rank failed, is gone, or does not answer."""
    return isinstance(error, FailedElsewhere) or any(text in str(error) for text in (*GONE, *SILENT))


@contextlib.contextmanager
def shared_failure(what: str) -> Iterator[None]:
    """Run something that may fail on some ranks only; then all raise, the others FailedElsewhere, and none waits.

    A rank that stops its work with Preempted takes the others along.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    told = gather(None if problem is None else (isinstance(problem, Preempted), type(problem).__name__, str(problem)))
    if problem is not None and not isinstance(problem, Preempted):
        raise problem
    ended = [(rank, *end) for rank, end in enumerate(told) if end is not None]
    for rank, preempted, kind, text in sorted(ended, key=lambda end: end[1]):  # failures first
        if not preempted:
            raise FailedElsewhere(f"{what} failed on rank {rank}: {kind}: {text}")
        raise Preempted(text)


def on_main(what: str, work: Callable[[], object]) -> None:
    """Run `work` on rank 0, which calls preemption.check() and watchdog.move() as it comes on. Collective.

    The others wait, and all meet every second: however long it takes no collective times out, and a request to stop
    reaches rank 0 from any of them. Where `work` fails or is stopped, all raise, as in `shared_failure`.
    """
    main = dist.get_rank() == 0
    with shared_failure(what), watchdog.working_alone(main):
        task: Future[object] = Future()
        if main:
            pool = ThreadPoolExecutor(1)
            task = pool.submit(work)
            pool.shutdown(wait=False)
        done = told = False
        while not done:
            moves = watchdog.num_moves()
            if main:
                wait([task], MEET_S)
            done, moved, asked = _any_of(main and task.done(), main and watchdog.num_moves() > moves, _is_asked())
            if moved and not main:
                watchdog.move()
            if asked and not told:
                told, reason = True, _who_asked()
                if main and preemption.reason() is None:
                    preemption.ask(reason)
        if main:
            task.result()


def _any_of(*flags: bool) -> list[bool]:
    """Each true as soon as one rank says so. Collective, and no sign that a rank comes on."""
    votes = torch.tensor(flags, dtype=torch.int32, device=_collective_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank as soon as one rank says so."""
    vote = torch.tensor(int(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    found = bool(vote.item())
    watchdog.met()
    return found


def check_preemption() -> None:
    """Preempted on all ranks as soon as one of them was asked to stop. Collective: all must come by equally often."""
    if not dist.is_initialized():
        preemption.check()
    elif any_asked():
        raise Preempted(_who_asked())


def begin(phase: str) -> None:
    """Say that all ranks begin with `phase` ("the export"), where a request to stop is obeyed first. Collective."""
    check_preemption()
    watchdog.enter(f"in {phase}")


def _who_asked() -> str:
    """Why one of the ranks was asked to stop, and which. Collective."""
    reasons = gather(preemption.reason())
    rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
    return str(reasons[rank]) if len(set(reasons)) == 1 else f"{reasons[rank]} on rank {rank}"


def until_asked(items: Iterable[Value]) -> Iterator[Value]:
    """`items`, equally many on every rank. Preempted on all ranks ahead of one, also out of the wait for it, as soon as
    one rank was asked to stop. Collective."""
    waited = iter(items)
    nothing = object()
    while True:
        item = preemption.unless_asked(partial(next, waited, nothing))
        check_preemption()  # raises where the wait was broken off
        if item is nothing:
            return
        yield item  # type: ignore[misc]  # neither None nor `nothing`


def any_asked() -> bool:
    """Whether a rank was asked to stop, the same on all of them. Collective."""
    return any_rank(_is_asked(), _collective_device())


def _is_asked() -> bool:
    return preemption.reason() is not None


def _collective_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's torch random states. pivot draws from nothing else: the data's order is a function of the seed."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # else there may be a GPU, but this run does not use it
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` gave; a state of a device that is not here is left out."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; from the host through page-locked memory, since a plain copy would wait for the GPU."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
