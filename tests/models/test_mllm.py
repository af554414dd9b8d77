"""Laws of the whole model: what stock LLaVA computes on separate sequences, computed once for a shared prompt."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from pivot.batch import PackedBatch
from pivot.data.collate import Completion, Example, collate
from pivot.encoders.facts import ImageGeometry
from pivot.models.mllm import MLLM
from tests.kit.ranks.scenarios import build_plain, merge, pair
from tests.kit.tiny import tiny_llava
from tests.kit.trees import build_batch, random_segments, unroll

CASES = {
    "siglip + qwen2": {"kind": "qwen2", "vision": "siglip"},
    "siglip + tied qwen2": {"kind": "qwen2", "vision": "siglip", "tie": True},
    "clip + llama": {"kind": "llama", "vision": "clip"},
}


def stock_logps(stock: torch.nn.Module, image_token_id: int, tower: torch.nn.Module, **tree: object) -> Tensor:
    """Each leaf's scored log-probs by HF's own forward, one sequence at a time, the image encoded for each."""
    found = []
    for sequence, num_scored in unroll(tree["token_ids"], tree["parents"]):
        ids = torch.tensor(sequence)
        pixels = tower.normalise(tree["pixel_values"]) if image_token_id in sequence else None
        logits = stock(input_ids=ids[None], pixel_values=pixels).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][-num_scored:])
    return torch.cat(found)


def image_tree(image_token_id: int) -> dict[str, object]:
    """Image and system text -> two questions -> chosen and rejected each: depth three, the image once."""
    token_ids = random_segments([5, 3, 4, 6, 2, 3, 5])
    token_ids[0] = token_ids[0][:2] + [image_token_id] * 16 + token_ids[0][2:]
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"token_ids": token_ids, "parents": [-1, 0, 1, 1, 0, 4, 4], "pixel_values": pixels}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("case", CASES)
def test_equals_stock_llava(case: str, recompute: str, tmp_path: Path) -> None:
    """Log-probs to 1e-5, and the gradient of every parameter to 1e-5 of its norm (see test_attention for the floor)."""
    tiny_llava(tmp_path, **CASES[case])
    model, image_token_id = build_plain(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).train()
    tree = image_tree(image_token_id)
    batch = build_batch(
        tree["token_ids"], tree["parents"], image_token_id=image_token_id, pixel_values=tree["pixel_values"]
    )
    model.enable_activation_checkpointing(recompute)

    expected = stock_logps(stock, image_token_id, model.vision_tower, **tree)
    found = model(batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    weights = torch.randn(batch.num_completions, generator=torch.Generator().manual_seed(2))[batch.target_completion]
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(stock.named_parameters())
    pairs = [
        (
            model.vision_tower.model.embeddings.patch_embedding.weight,
            "model.vision_tower.embeddings.patch_embedding.weight",
        ),
        (model.projector.linear_1.weight, "model.multi_modal_projector.linear_1.weight"),
        (model.language_model.model.embed_tokens.weight, "model.language_model.embed_tokens.weight"),
        *((p, f"model.language_model.{n}") for n, p in model.language_model.model.named_parameters()),
        *((p, f"model.vision_tower.{n}") for n, p in model.vision_tower.model.named_parameters()),
    ]
    whole = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for ours, name in pairs:
        scale = max(float(theirs[name].grad.norm()), 1e-3 * float(whole))
        assert float((ours.grad - theirs[name].grad).norm()) <= 1e-5 * scale, name


def test_image_is_encoded_once_whatever_the_row_holds(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    model, image = build_plain(tmp_path)
    calls: list[tuple[int, ...]] = []
    model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape)))
    rows = [pair(0, image, with_image=True), pair(1, image, with_image=False)]
    for row in [*rows, merge(rows, image)]:
        model(row)
    assert calls == [(1, 3, 32, 32)] * 3


def test_a_text_only_row_gives_the_encoder_a_gradient_of_zero(tmp_path: Path) -> None:
    """Zero, not absent: an absent one would let ZeRO-3 apply the last step's again."""
    tiny_llava(tmp_path)
    model, image = build_plain(tmp_path)
    model(pair(1, image, with_image=False)).sum().backward()
    for module in (model.vision_tower, model.projector):
        assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def _logps_and_gradients(model: MLLM, rows: list[PackedBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logps = torch.cat([model(row) for row in rows])
    logps.sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packing_changes_nothing(tmp_path: Path) -> None:
    """Four pairs in one row, and one by one: log-probs to 1e-5, gradients to 1e-5 of the norm of the whole."""
    tiny_llava(tmp_path)
    model, image = build_plain(tmp_path)
    rows = [pair(seed, image, with_image=seed != 2) for seed in range(4)]
    alone, expected = _logps_and_gradients(model, rows)
    packed, found = _logps_and_gradients(model, [merge(rows, image)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert all(float((found[name] - grad).norm() / whole) < 1e-5 for name, grad in expected.items())


def _four_pairs_about_one_image(image_token_id: int) -> list[Example]:
    """And a stranger among them, which ends the tree for those behind it."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    examples = []
    for number, image in enumerate((0, 0, 1, 0, 0)):
        question, chosen, rejected = random_segments([3 + number, 4, 6 - number], seed=number)
        prompt = np.array([5, *[image_token_id] * 16, *question])
        completions = [Completion("chosen", np.array(chosen)), Completion("rejected", np.array(rejected))]
        examples.append(Example(number, prompt, completions, [pixels[image]], [str(image)]))
    return examples


def test_image_trees_change_nothing_but_the_work(tmp_path: Path) -> None:
    """Image, questions, completions in one tree against a tree a pair: log-probs to 1e-5, gradients to 1e-5."""
    tiny_llava(tmp_path)
    model, image = build_plain(tmp_path)
    geometry = ImageGeometry(size=32, num_tokens=16, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    rows = {}
    for trees in (False, True):
        rows[trees] = collate(_four_pairs_about_one_image(image), geometry, image, image_trees=trees)
    assert rows[False].num_tokens - rows[True].num_tokens == 2 * 17  # the prefix of the second, and of the last pair
    alone, expected = _logps_and_gradients(model, [rows[False]])
    together, found = _logps_and_gradients(model, [rows[True]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert all(float((found[name] - grad).norm() / whole) < 1e-5 for name, grad in expected.items())


GROUP = {"seen": (2, [3, 1, 5, 4]), "text alone": (0, [2, 6, 3])}


@pytest.mark.parametrize("case", GROUP)
def test_completions_of_one_prompt_equal_rows_of_their_own(case: str, tmp_path: Path) -> None:
    """Some answers behind one prompt and its images, and a lone rejected one beside them, against a row for each.

    Log-probs to 1e-5, and the gradient of a weighted sum of them to 1e-5 of its norm, the encoder's among it.
    """
    tiny_llava(tmp_path)
    model, image = build_plain(tmp_path)
    geometry = ImageGeometry(size=32, num_tokens=16, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    num_images, lengths = GROUP[case]
    pixels = list(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)))
    prompt, *answers, other, wrong = map(np.array, random_segments([4, *lengths, 3, 5], seed=7))
    prompt = np.concatenate([[5], [image] * 16 * num_images, prompt]).astype(np.int64)
    shown = {"pixels": pixels[:num_images], "image_ids": ["a", "b"][:num_images]}
    group = [Completion("completion", ids) for ids in answers]
    lone = Example(1, other, [Completion("rejected", wrong)])
    together = collate([Example(0, prompt, group, **shown), lone], geometry, image)
    apart = [collate([Example(0, prompt, [answer], **shown)], geometry, image) for answer in group]
    apart.append(collate([lone], geometry, image))
    assert sum(row.num_tokens for row in apart) - together.num_tokens == (len(group) - 1) * len(prompt)

    values = torch.randn(len(lengths) + 1, generator=torch.Generator().manual_seed(2))
    results = []
    for rows, weights in (([together], [values]), (apart, list(values[:, None]))):
        model.zero_grad()
        logps = [row.completion_logps(model(row)) for row in rows]
        sum((own * weight).sum() for own, weight in zip(logps, weights, strict=True)).backward()
        results.append((torch.cat(logps).detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (found, gradients), (expected, wanted) = results
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    whole = torch.stack([grad.norm() for grad in wanted.values()]).norm()
    assert all(float((gradients[name] - grad).norm() / whole) < 1e-5 for name, grad in wanted.items())
    assert bool(wanted["projector.linear_1.weight"].any()) == bool(num_images)


def test_dropout_is_off(tmp_path: Path) -> None:
    """In training mode two passes agree bit for bit, though the checkpoint asks for attention dropout."""
    tiny_llava(tmp_path, vision_changes={"attention_dropout": 0.5}, text_changes={"attention_dropout": 0.5})
    model, image = build_plain(tmp_path)
    row = pair(0, image, with_image=True)
    assert model.training
    assert torch.equal(model(row), model(row))


def test_peak_memory_of_the_head_is_independent_of_image_tokens(tmp_path: Path) -> None:
    """The head sees the targets alone: twelve of them, whether the row holds one image or eight."""
    tiny_llava(tmp_path)
    model, image = build_plain(tmp_path)
    seen: list[tuple[int, ...]] = []
    model.language_model.lm_head.register_forward_hook(lambda m, args, output: seen.append(tuple(args[0].shape)))
    for num_images in (1, 8):
        prompt = [image] * 16 * num_images + [1, 2]
        pixels = torch.zeros(num_images, 3, 32, 32, dtype=torch.uint8)
        model(build_batch([prompt, [3] * 7, [4] * 5], [-1, 0, 0], image_token_id=image, pixel_values=pixels))
    assert seen == [(12, 32)] * 2
    with contextlib.suppress(ValueError):
        model.language_model(torch.tensor([[1, 2]]))
        raise AssertionError("tree attention must refuse a call without segments")
