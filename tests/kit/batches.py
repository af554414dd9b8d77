"""Batches as a loader gives them: taken, and compared."""

import numpy as np
import torch


def take(loader, num_steps):
    """[step][micro-batch] of a loader's first steps."""
    steps = []
    for _, micro_batches in loader:
        steps.append(list(micro_batches))
        if len(steps) == num_steps:
            return steps
    return steps


def assert_equal_batches(left, right):
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
    np.testing.assert_array_equal(left.segments.start, right.segments.start)
    assert all(torch.equal(index, right.completions_of[role]) for role, index in left.completions_of.items())
