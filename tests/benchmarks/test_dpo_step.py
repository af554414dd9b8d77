"""The comparison with TRL is fair: what switches a saving off computes the same, and the two sides' losses agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pivot.batch import PackedBatch
from pivot.config import REPOSITORY
from tests.kit.ranks.scenarios import IMAGE_TOKENS, build_plain, merge, pair
from tests.kit.tiny import tiny_llava
from tests.kit.trees import build_batch, random_segments

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from unsave import encode_each_time, score_everything, unroll  # noqa: E402  # scripts, not a package

CHANGES: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "unroll": unroll,
    "encode each time": lambda batch: encode_each_time(unroll(batch), IMAGE_TOKENS),
    "score everything": score_everything,
    "all": lambda batch: score_everything(encode_each_time(unroll(batch), IMAGE_TOKENS)),
}


def deep_tree(image_token_id: int) -> PackedBatch:
    """An image, two questions, two completions each."""
    token_ids = random_segments([3, 2, 4, 5, 1, 3, 6])
    token_ids[0] = [image_token_id] * IMAGE_TOKENS + token_ids[0]
    return build_batch(token_ids, [-1, 0, 1, 1, 0, 4, 4], image_token_id=image_token_id, num_images=1)


@pytest.mark.parametrize("name", CHANGES)
def test_without_a_saving_the_losses_are_the_same(name: str, tmp_path: Path) -> None:
    """Summed log-probs of every completion to 1e-5, with images, without, and in trees of depth three; more work."""
    tiny_llava(tmp_path)
    model, image = build_plain(tmp_path)
    rows = [merge([pair(seed, image, with_image=seed != 1) for seed in range(3)], image), deep_tree(image)]
    for batch in rows:
        changed = CHANGES[name](batch)
        with torch.no_grad():
            expected, found = (row.completion_logps(model(row)) for row in (batch, changed))
        torch.testing.assert_close(found[: batch.num_completions], expected, atol=1e-5, rtol=0)
        work = (changed.num_tokens, len(changed.pixel_values), len(changed.target_ids))
        assert sum(work) > batch.num_tokens + len(batch.pixel_values) + len(batch.target_ids)


def test_a_copy_of_the_image_for_every_completion(tmp_path: Path) -> None:
    batch = deep_tree(299)
    repeated = encode_each_time(unroll(batch), IMAGE_TOKENS)
    assert len(batch.pixel_values) == 1 and len(repeated.pixel_values) == 4
    assert repeated.feature_index.tolist() == list(range(4 * IMAGE_TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("pairs_per_image", [1, 4])
def test_losses_equal_trls(pairs_per_image: int, tmp_path: Path) -> None:
    """Ten steps of both trainers from files to updated weights, in fp32: losses to 1e-3 (seen: 3e-6)."""
    out = tmp_path / "found.json"
    command = [sys.executable, BENCHMARKS / "dpo_step.py", "--shape", "tiny", "--steps", "10", "--rounds", "1"]
    command += ["--only-ratio", "--threads", "1", "--pairs-per-image", pairs_per_image, "--json", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["max_loss_difference"] < 1e-3 and found["max_margin_difference"] < 1e-3
    assert len(set(found["losses"]["pivot"])) > 5, "the weights move"
    assert set(found["pairs_per_s"]) == {"pivot", "trl"} == set(found["peak_memory_gib"])
