"""The row, worked out by hand: trees, the shift by one, shared images, dummies."""

import numpy as np
import pytest
import torch

from pivot.batch import DUMMY_SAMPLE
from pivot.data.collate import Example, collate
from pivot.processor import EncodedPair
from tests.kit.sets import GEOMETRY, IMAGE_TOKEN_ID

ROLES = ("chosen", "rejected")
I = IMAGE_TOKEN_ID  # noqa: E741
RED, BLUE = torch.full((3, 8, 8), 1, dtype=torch.uint8), torch.full((3, 8, 8), 2, dtype=torch.uint8)


def pair(prompt, chosen, rejected, num_images=0):
    ids = {"chosen": np.array(chosen), "rejected": np.array(rejected)}
    return EncodedPair(np.array(prompt), ids, num_images)


def make(examples, roles=ROLES):
    return collate(examples, roles, GEOMETRY, IMAGE_TOKEN_ID)


def test_one_pair():
    """Prompt 1 2 3, chosen 4 5 9, rejected 6 9: the prompt's last position, 2, predicts both first tokens."""
    batch = make([Example(7, pair([1, 2, 3], [4, 5, 9], [6, 9]))])
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
    assert {role: index.tolist() for role, index in batch.by_role.items()} == {"chosen": [0], "rejected": [1]}
    assert batch.sample_index.tolist() == [7]
    assert batch.pixel_values.shape == (1, 3, 8, 8) and not batch.pixel_values.any()
    assert batch.image_positions.tolist() == batch.feature_index.tolist() == []


def test_the_chosen_alone():
    batch = make([Example(0, pair([1, 2], [4, 9], [6, 9])), Example(1, pair([3], [5], [6]))], roles=("chosen",))
    assert batch.token_ids.tolist() == [1, 2, 4, 9, 3, 5]
    assert batch.target_positions.tolist() == [1, 2, 4]
    assert batch.segments.parent.tolist() == [-1, 0, -1, 2]
    assert {role: index.tolist() for role, index in batch.by_role.items()} == {"chosen": [0, 1]}


def test_an_image_that_two_pairs_share_is_encoded_once():
    """Four features an image: blue is image 1, so its features are 4 to 7, wherever it is shown."""
    examples = [
        Example(0, pair([I] * 4 + [1], [2], [3], 1), [RED], ["red"]),
        Example(1, pair([1, *[I] * 4, *[I] * 4], [2], [3], 2), [BLUE, RED], ["blue", "red"]),
    ]
    batch = make(examples)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.image_positions.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]
    assert batch.feature_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert (batch.token_ids[batch.image_positions] == I).all()


def test_an_empty_row_is_one_dummy():
    batch = make([])
    assert batch.sample_index.tolist() == [DUMMY_SAMPLE]
    assert batch.pair_weight().tolist() == [0]
    assert batch.completion_weight.tolist() == [0, 0]
    assert batch.pixel_values.shape == (1, 3, 8, 8)
    assert batch.num_tokens == 3 and IMAGE_TOKEN_ID not in batch.token_ids


def test_a_masked_sample_keeps_its_slot():
    good = Example(3, pair([1], [2], [3]))
    batch = make([good, Example(5, None), good])
    assert batch.sample_index.tolist() == [3, 5, 3]
    assert batch.pair_weight().tolist() == [1, 0, 1]


def test_types():
    batch = make([Example(0, pair([1], [2], [3]))])
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
    )
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.completion_weight.dtype == torch.float32 and batch.pixel_values.dtype == torch.uint8


def test_image_tokens_that_do_not_match_the_images_are_an_error():
    with pytest.raises(ValueError, match="row 4: the prompt holds 3 image tokens, expected 4 for each of 1"):
        make([Example(4, pair([I] * 3 + [1], [2], [3], 1), [RED], ["red"])])
