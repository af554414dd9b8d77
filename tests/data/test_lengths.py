"""Token counts are those of the processor, built once, and keyed by all they depend on."""

import os

import numpy as np
import pytest

from pivot.data.lengths import build_lengths, load_lengths
from pivot.processor.conversation import ChangedAnswer
from tests.kit.sets import FakeProcessor, make_plan, make_set


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("lengths"))


def test_counts_are_those_of_the_processor(packed, tmp_path):
    seen = []
    assert build_lengths(packed, FakeProcessor(), tmp_path, lambda done, of: seen.append((done, of))) == 24
    assert seen == [(24, 24)]
    lengths = load_lengths(packed, FakeProcessor(), tmp_path)
    for row in range(len(packed)):
        sample, files = packed.read(row)
        text = sample["prompt"][0]["content"][-1]["text"]
        assert lengths.prompt[row] == 4 * len(files) + len(text)
        assert lengths.image[row] == 4 * len(files)
        assert lengths.chosen[row] == len(sample["chosen"][0]["content"]) + 1
        assert lengths.rejected[row] == len(sample["rejected"][0]["content"]) + 1
        assert lengths.image_prefix[row] == 4 * len(files)
        assert (lengths.image_prefix_hash[row] != 0) == bool(files)
    assert not lengths.same.any()
    np.testing.assert_array_equal(lengths.completion_tokens(("chosen", "rejected")), lengths.chosen + lengths.rejected)


def test_only_missing_files_are_built_and_another_processor_has_its_own(packed, tmp_path):
    build_lengths(packed, FakeProcessor(), tmp_path)
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 6 and not list(tmp_path.rglob("*.part"))
    before = os.stat(files[0]).st_mtime_ns
    files[1].unlink()
    assert build_lengths(packed, FakeProcessor(), tmp_path) == 5
    assert os.stat(files[0]).st_mtime_ns == before
    assert build_lengths(packed, FakeProcessor("e" * 64), tmp_path) == 24
    fingerprint = load_lengths(packed, FakeProcessor(), tmp_path).fingerprint
    assert fingerprint == load_lengths(packed, FakeProcessor("e" * 64), tmp_path).fingerprint


def test_missing_and_foreign_files_are_errors(packed, tmp_path):
    with pytest.raises(ValueError, match="token counts of tiny-000000 were not built"):
        load_lengths(packed, FakeProcessor(), tmp_path)
    build_lengths(packed, FakeProcessor(), tmp_path)
    np.save(next(tmp_path.rglob("tiny-000002*")), np.zeros(3))
    with pytest.raises(ValueError, match="not one record per sample; delete it"):
        load_lengths(packed, FakeProcessor(), tmp_path)


def test_samples_whose_answer_the_template_changes_are_left_out_and_counted(packed, tmp_path):
    class Forgetful(FakeProcessor):
        def encode(self, prompt, completions):
            if "yes" * 5 in completions["chosen"][0]["content"]:
                raise ChangedAnswer("chosen: the chat template changes the answer")
            return super().encode(prompt, completions)

    build_lengths(packed, Forgetful(), tmp_path)
    changed = sum("yes" * 5 in packed.read_text(row)["chosen"][0]["content"] for row in range(len(packed)))
    assert changed == 4
    plan = make_plan(packed, tmp_path, Forgetful())
    assert plan.exclusions == {"whose answer the chat template changes (see data.chat_template)": changed}
    assert plan.num_pairs == len(packed) - changed
