"""The row, worked out by hand: trees, the shift by one, shared images, dummies."""

import numpy as np
import pytest
import torch

from pivot.batch import (
    ANSWER,
    CHOSEN_ANSWER,
    CHOSEN_TOKEN,
    DUMMY_SAMPLE,
    REJECTED_ANSWER,
    SAMPLE,
    TARGET_TOKEN,
    StepCounts,
)
from pivot.data.collate import Completion, Example, collate, masked_example
from tests.kit.sets import GEOMETRY, IMAGE_TOKEN_ID

ROLES = ("chosen", "rejected")
I = IMAGE_TOKEN_ID  # noqa: E741
RED, BLUE = torch.full((3, 8, 8), 1, dtype=torch.uint8), torch.full((3, 8, 8), 2, dtype=torch.uint8)


def sample(row, prompt, completions, pixels=(), image_ids=()):
    return Example(
        row, np.array(prompt), [Completion(role, np.array(ids)) for role, ids in completions], pixels, image_ids
    )


def pair(row, prompt, chosen, rejected, pixels=(), image_ids=()):
    return sample(row, prompt, [("chosen", chosen), ("rejected", rejected)], pixels, image_ids)


def make(examples):
    return collate(examples, GEOMETRY, IMAGE_TOKEN_ID)


def test_one_pair():
    """Prompt 1 2 3, chosen 4 5 9, rejected 6 9: the prompt's last position, 2, predicts both first tokens."""
    batch = make([pair(7, [1, 2, 3], [4, 5, 9], [6, 9])])
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 9, 6, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert batch.segments.start.tolist() == [0, 3, 6]
    assert batch.segments.end.tolist() == [3, 6, 8]
    assert batch.segments.parent.tolist() == [-1, 0, 0]
    assert batch.target_positions.tolist() == [2, 3, 4, 2, 6]
    assert batch.target_ids.tolist() == [4, 5, 9, 6, 9]
    assert batch.target_completion.tolist() == [0, 0, 0, 1, 1]
    assert batch.completion_tokens.tolist() == [3, 2]
    assert batch.completion_weight.tolist() == [1, 1]
    assert batch.role.tolist() == [0, 1] and batch.group.tolist() == [0, 0]
    assert [index.tolist() for index in batch.pairs] == [[0], [1]]
    assert batch.sample_index.tolist() == [7]
    assert batch.pixel_values.shape == (1, 3, 8, 8) and not batch.pixel_values.any()
    assert batch.image_positions.tolist() == batch.feature_index.tolist() == []


def test_the_chosen_alone():
    batch = make([sample(0, [1, 2], [("chosen", [4, 9])]), sample(1, [3], [("chosen", [5])])])
    assert batch.token_ids.tolist() == [1, 2, 4, 9, 3, 5]
    assert batch.target_positions.tolist() == [1, 2, 4]
    assert batch.segments.parent.tolist() == [-1, 0, -1, 2]
    assert batch.completions_of["chosen"].tolist() == [0, 1] and batch.num_groups == 2
    assert [index.tolist() for index in batch.pairs] == [[], []]


def test_unpaired_samples():
    """As KTO has them: prompts 1 2 and 3 with one completion each, a good and a bad one, beside a pair."""
    batch = make([sample(4, [1, 2], [("chosen", [5, 9])]), sample(6, [3], [("rejected", [7])]), pair(5, [1], [2], [3])])
    assert batch.token_ids.tolist() == [1, 2, 5, 9, 3, 7, 1, 2, 3]
    assert batch.segments.parent.tolist() == [-1, 0, -1, 2, -1, 4, 4]
    assert batch.target_positions.tolist() == [1, 2, 4, 6, 6]
    assert batch.group.tolist() == [0, 1, 2, 2] and batch.completion_rows.tolist() == [4, 6, 5, 5]
    assert batch.completions_of["chosen"].tolist() == [0, 2] and batch.completions_of["rejected"].tolist() == [1, 3]
    assert [index.tolist() for index in batch.pairs] == [[2], [3]]
    assert batch.counts() == StepCounts(
        {SAMPLE: 3, CHOSEN_TOKEN: 3, TARGET_TOKEN: 5, CHOSEN_ANSWER: 2, REJECTED_ANSWER: 2, ANSWER: 4}
    )


def test_many_completions_of_one_prompt():
    """Prompt 1 2 once, then 4 9, 5 and 6 7 9, each predicted from position 1 on and none seen by another."""
    batch = make([sample(8, [1, 2], [("completion", ids) for ids in ([4, 9], [5], [6, 7, 9])]), pair(9, [3], [4], [5])])
    assert batch.token_ids.tolist() == [1, 2, 4, 9, 5, 6, 7, 9, 3, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 2, 3, 4, 0, 1, 1]
    assert batch.segments.parent.tolist() == [-1, 0, 0, 0, -1, 4, 4]
    assert batch.target_positions.tolist() == [1, 2, 1, 1, 5, 6, 8, 8]
    assert batch.target_completion.tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert batch.group.tolist() == [0, 0, 0, 1, 1] and batch.sample_index.tolist() == [8, 9]
    assert batch.completions_of["completion"].tolist() == [0, 1, 2]
    assert [index.tolist() for index in batch.pairs] == [[3], [4]]


def test_an_image_that_two_pairs_share_is_encoded_once():
    """Four features an image: blue is image 1, so its features are 4 to 7, wherever it is shown."""
    examples = [
        pair(0, [I] * 4 + [1], [2], [3], [RED], ["red"]),
        pair(1, [1, *[I] * 4, *[I] * 4], [2], [3], [BLUE, RED], ["blue", "red"]),
    ]
    batch = make(examples)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.image_positions.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]
    assert batch.feature_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert (batch.token_ids[batch.image_positions] == I).all()


def test_a_rank_with_nothing_to_do_has_one_dummy():
    batch = make([masked_example(DUMMY_SAMPLE, ROLES, IMAGE_TOKEN_ID)])
    assert batch.sample_index.tolist() == [DUMMY_SAMPLE]
    assert batch.completion_weight.tolist() == [0, 0]
    assert set(batch.counts().values()) == {0}
    assert batch.pixel_values.shape == (1, 3, 8, 8)
    assert batch.num_tokens == 3 and IMAGE_TOKEN_ID not in batch.token_ids


def test_a_masked_sample_keeps_its_slot():
    good = pair(3, [1], [2], [3])
    batch = make([good, masked_example(5, ROLES, IMAGE_TOKEN_ID), good])
    assert batch.sample_index.tolist() == [3, 5, 3]
    assert batch.completion_weight[batch.pairs.chosen].tolist() == [1, 0, 1]


def test_types():
    batch = make([pair(0, [1], [2], [3])])
    integers = (
        batch.token_ids,
        batch.position_ids,
        batch.image_positions,
        batch.feature_index,
        batch.target_positions,
        batch.target_ids,
        batch.target_completion,
        batch.completion_tokens,
        batch.sample_index,
        batch.role,
        batch.group,
        *batch.pairs,
        *batch.completions_of.values(),
    )
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.completion_weight.dtype == torch.float32 and batch.pixel_values.dtype == torch.uint8


def test_image_tokens_that_do_not_match_the_images_are_an_error():
    with pytest.raises(ValueError, match="row 4: the prompt holds 3 image tokens, expected 4 for each of 1"):
        make([pair(4, [I] * 3 + [1], [2], [3], [RED], ["red"])])
