"""Where hidden states are read: the queries that a row's targets need, chain by chain."""

from __future__ import annotations

import numpy as np
import torch

from pivot.trees import Reading, Segments
from tests.kit.trees import TREES, build_batch, random_segments


def test_a_pair() -> None:
    """Prompt of 6, chosen of 4, rejected of 5: the prompt's last token predicts the first of both."""
    reading = build_batch(random_segments([6, 4, 5]), [-1, 0, 0]).reading
    assert reading.positions.tolist() == [5, 6, 7, 8, 5, 10, 11, 12, 13]
    assert reading.queries.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert reading.targets.tolist() == [0, 1, 2, 3, 0, 5, 6, 7, 8]
    assert [(c.start, c.first_query, c.end) for c in reading.segments.chains] == [(0, 5, 10), (10, 10, 15)]
    layout = reading.segments.layout
    assert layout.cu_queries.tolist() == [0, 5, 10]
    assert layout.cu_keys.tolist() == [0, 10, 21]


def test_every_target_is_among_the_queries() -> None:
    for lengths, parents in TREES.values():
        batch = build_batch(random_segments(lengths), parents)
        reading = batch.reading
        assert reading.queries[reading.targets].tolist() == batch.target_positions.tolist()
        assert reading.segments.num_queries == len(reading.queries)
        assert len(set(reading.queries.tolist())) == len(reading.queries)


def test_a_chain_without_a_target_asks_with_its_last_token() -> None:
    segments = Segments(np.array([0, 4]), np.array([4, 9]), np.array([-1, -1]))
    reading = Reading.at(torch.tensor([6, 7]), segments)
    assert reading.queries.tolist() == [3, 6, 7, 8]
    assert reading.targets.tolist() == [1, 2]
    nothing = Reading.at(torch.tensor([], dtype=torch.int64), segments)
    assert nothing.queries.tolist() == [3, 8] and nothing.targets.tolist() == []


def test_a_batch_moves_with_its_reading() -> None:
    batch = build_batch(random_segments([6, 4, 5]), [-1, 0, 0])
    batch.completion_values["reference"], batch.token_values["old"] = torch.zeros(2), torch.zeros(9)
    moved = batch.to(torch.device("meta"))
    on_device = (moved.reading.queries, moved.reading.targets, moved.reading.segments.layout.cu_keys, moved.token_ids)
    assert {tensor.device.type for tensor in on_device} == {"meta"}
    named = (moved.completion_values["reference"], moved.token_values["old"], moved.completions_of["chosen"])
    assert {tensor.device.type for tensor in (*named, *moved.pairs, moved.role, moved.group)} == {"meta"}
    assert batch.completion_values["reference"].device.type == batch.pairs.chosen.device.type == "cpu"
    assert moved.sample_index.device.type == "cpu" and batch.token_ids.device.type == "cpu"
