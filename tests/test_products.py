"""Laws of oneDNN's matrix products: the same as torch's but for rounding, chosen by the machine, for few shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pivot import distributed, inputs, products
from pivot.products import LENGTHS_PER_OCTAVE, Linear, LinearOfRows, choose_products, linear, padded, use_products

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(products._compare_with_torch() is not None, reason="no oneDNN that multiplies right")


def _values(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (33, 64), (1, 50, 24), (3, 2, 5, 16)])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], bias: bool) -> None:
    values = _values(shape, (40, shape[-1]), *([(40,)] if bias else []))
    weight_of_output = _values((*shape[:-1], 40))[0]
    found, exact = ([x.clone().requires_grad_() for x in values], [x.double().requires_grad_() for x in values])
    for function, leaves in ((linear, found), (F.linear, exact)):
        (function(*leaves) * weight_of_output).sum().backward()
    torch.testing.assert_close(linear(*found).double(), F.linear(*exact), atol=1e-5, rtol=1e-6)
    for mine, leaf in zip(found, exact, strict=True):
        assert float((mine.grad.double() - leaf.grad).norm() / leaf.grad.norm()) < 1e-6


@needs_onednn
def test_views_and_frozen_weights() -> None:
    """A transposed input, a gradient that is one number everywhere, and no gradient for what is frozen."""
    rows, weight, bias = _values((24, 33), (40, 24), (40,))
    left, right = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    linear(left.T, weight, bias).sum().backward()
    F.linear(right.T, weight, bias).sum().backward()
    torch.testing.assert_close(left.grad, right.grad, atol=1e-5, rtol=1e-5)
    assert weight.grad is None and bias.grad is None


def test_padded_lengths_are_few_and_stay_as_they_are() -> None:
    for octave in (256, 1024, 16384):
        lengths = range(octave, 2 * octave)
        assert len({padded(length) for length in lengths}) <= LENGTHS_PER_OCTAVE + 1
        assert max(padded(length) / length for length in lengths) <= 1 + 1 / LENGTHS_PER_OCTAVE
    assert all(padded(padded(length)) == padded(length) >= length for length in range(1, 5000))


def test_layers_change_their_kind_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    parameters, seen = dict(model.named_parameters()), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    for name, of_rows, kind in (("onednn", False, Linear), ("onednn", True, LinearOfRows), ("torch", True, nn.Linear)):
        use_products(model, name, of_rows=of_rows)
        assert [type(layer) for layer in model] == [kind, nn.LayerNorm, kind]
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in model.named_parameters())
    model(torch.ones(1, 4))
    assert seen == [1]


@needs_onednn
def test_only_padded_lengths_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    met, right = [], products.times
    monkeypatch.setattr(products, "times", lambda rows, *rest: met.append(len(rows)) or right(rows, *rest))
    layer = nn.Linear(8, 8)
    use_products(layer, "onednn", of_rows=True)
    for length in (0, 1, 15, 16, 17, 100, 320, 321):
        layer(torch.ones(length, 8))
    assert met == [16, 320]
    use_products(layer, "onednn", of_rows=False)
    assert layer(torch.ones(1, 8)).grad_fn.name() == layer(torch.ones(0, 8)).grad_fn.name() == "_LinearBackward"
    assert met == [16, 320, 1]


def test_chosen_by_the_machine_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compare_with_torch", lambda: None)
    for slow, expected in ((True, "onednn"), (False, "torch")):
        monkeypatch.setattr(products, "_mkl_stays_below_the_processor", lambda slow=slow: slow)
        assert choose_products("auto", device=CPU, dtype=torch.float32) == expected
        assert choose_products("torch", device=CPU, dtype=torch.float32) == "torch"
        assert choose_products("onednn", device=CPU, dtype=torch.float32) == "onednn"
        assert choose_products("auto", device=CPU, dtype=torch.bfloat16) == "torch"
        assert choose_products("auto", device=torch.device("cuda"), dtype=torch.float32) == "torch"


@pytest.mark.parametrize(
    ("ranks", "expected"), [(["onednn"] * 2, "onednn"), (["onednn", "torch"], "torch"), (["torch"], "torch")]
)
def test_ranks_on_processors_of_two_kinds_take_what_both_have(
    ranks: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_mkl_stays_below_the_processor", lambda: ranks[0] == "onednn")
    monkeypatch.setattr(products, "_compare_with_torch", lambda: None)
    monkeypatch.setattr(distributed, "gather", lambda mine: ranks if mine is not None else [None] * len(ranks))
    assert inputs._settle_products("auto", CPU, torch.float32) == expected


def test_what_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, dtype, reason in (("cuda", torch.float32, "it is for CPUs"), ("cpu", torch.bfloat16, "is in bfloat16")):
        with pytest.raises(ValueError, match=f"train.products: onednn does not work here .*{reason}.*; take auto"):
            choose_products("onednn", device=torch.device(device), dtype=dtype)
    with pytest.raises(ValueError, match="train.products: found 'mkl', expected one of auto, torch, onednn"):
        choose_products("mkl", device=CPU, dtype=torch.float32)


def test_a_wrong_product_or_a_torch_without_it_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    find = products._compare_with_torch.__wrapped__
    right = products.times
    monkeypatch.setattr(products, "times", lambda *values: F.linear(*values) * (1 + 1e-4))
    assert "a product is off by" in find()

    def absent(*values: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(products, "times", absent)
    assert find().startswith("AttributeError: ")
    monkeypatch.setattr(products, "times", lambda *values: right(*values[:2], None))
    assert "a product is off by" in find()


def test_the_processor_is_read_where_linux_says_it() -> None:
    slow = products._mkl_stays_below_the_processor.__wrapped__()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    assert not slow or ("AuthenticAMD" in text and "avx512f" in text)
