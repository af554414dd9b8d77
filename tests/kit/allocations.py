"""The most memory that torch's allocator had given out at one time, by its own count."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_of_allocations(function: Callable[[], object]) -> int:
    """Bytes above what was allocated before; an operation's scratch memory counts, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
