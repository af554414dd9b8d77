"""Law: a prefix tree computes what its separate sequences compute, values and gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pivot.models.attention import choose_attention, registered_name, tree_attention, varlen
from pivot.models.attention.choice import compare_with_sdpa
from pivot.models.attention.sdpa import sdpa
from pivot.models.attention.varlen import over_chains
from pivot.renamed import recompute_blocks
from pivot.trees import Segments
from tests.kit.tiny import tiny_text_config
from tests.kit.trees import TREES, build_batch, random_segments, unroll


def oracle_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, segments: Segments) -> np.ndarray:
    """Float64, token by token: [H, T, D] each. A token sees itself and earlier ones of its segment, and ancestors."""
    owner = np.repeat(np.arange(len(segments)), segments.end - segments.start)
    output = np.zeros_like(query)
    for t in range(segments.num_tokens):
        lineage = {int(owner[t]), *segments.ancestors(int(owner[t]))}
        visible = [u for u in range(t + 1) if int(owner[u]) in lineage]
        scores = np.einsum("hd,hud->hu", query[:, t], key[:, visible]) / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        output[:, t] = np.einsum("hu,hud->hd", weights, value[:, visible])
    return output


@pytest.mark.parametrize("name", TREES)
def test_equals_a_float64_oracle(name: str) -> None:
    """Grouped queries (4 heads on 2); fp32 SDPA differs from float64 by rounding alone (seen: 4e-7)."""
    lengths, parents = TREES[name]
    ends = np.cumsum(lengths)
    segments = Segments(ends - lengths, ends, np.asarray(parents))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, segments.num_tokens, 8, generator=generator)
    key, value = (torch.randn(1, 2, segments.num_tokens, 8, generator=generator) for _ in range(2))
    found, _ = tree_attention(torch.nn.Identity(), query, key, value, None, segments=segments)
    whole_key, whole_value = (x[0].double().numpy().repeat(2, axis=0) for x in (key, value))
    expected = oracle_attention(query[0].double().numpy(), whole_key, whole_value, segments)
    np.testing.assert_allclose(found[0].transpose(0, 1).numpy(), expected, atol=2e-6)


def _tree_logps(model: torch.nn.Module, batch: object) -> torch.Tensor:
    hidden = model.model(
        inputs_embeds=model.get_input_embeddings()(batch.token_ids)[None],
        position_ids=batch.position_ids[None],
        segments=batch.segments,
        use_cache=False,
    ).last_hidden_state[0]
    logits = model.lm_head(hidden[batch.target_positions]).float()
    return logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("name", TREES)
def test_tree_equals_separate_sequences(name: str, kind: str, checkpointing: bool) -> None:
    """Log-probs to 1e-5 and every gradient to 1e-5 of its norm, against stock SDPA on the unrolled sequences."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_text_config(kind))
    lengths, parents = TREES[name]
    token_ids = random_segments(lengths)
    weights = torch.randn(len(unroll(token_ids, parents)))  # each leaf counts differently, so that none cancels

    model.set_attn_implementation("sdpa")
    expected, loss = [], torch.zeros(())
    for (sequence, num_scored), weight in zip(unroll(token_ids, parents), weights, strict=True):
        ids = torch.tensor(sequence)
        logps = model(ids[None]).logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0][-num_scored:]
        expected.append(logps.detach())
        loss = loss + weight * logps.sum()
    loss.backward()
    expected_grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    model.set_attn_implementation(registered_name("sdpa"))
    if checkpointing:
        recompute_blocks(model)
        model.train()
    batch = build_batch(token_ids, parents)
    found = _tree_logps(model, batch)
    (found * weights[batch.target_completion]).sum().backward()
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    for parameter_name, parameter in model.named_parameters():
        # k_proj biases have a mathematically zero gradient (softmax ignores a shift): compared with the whole's scale
        scale = max(float(expected_grads[parameter_name].norm()), 1e-2)
        difference = float((parameter.grad - expected_grads[parameter_name]).norm())
        assert difference <= 1e-5 * scale, f"{parameter_name}: {difference} of {scale}"


def test_attention_without_segments_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_text_config())
    model.set_attn_implementation(registered_name("sdpa"))
    with pytest.raises(ValueError, match="pass segments=batch.segments"):
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "s_aux", "dropout"])
def test_what_is_not_honoured_is_refused(name: str) -> None:
    states = torch.randn(1, 1, 4, 8)
    segments = Segments(np.array([0]), np.array([4]), np.array([-1]))
    with pytest.raises(ValueError, match=name):
        tree_attention(torch.nn.Identity(), states, states, states, None, segments=segments, **{name: 2})


def test_no_mask_is_as_large_as_the_row() -> None:
    """A pair with a 900-token prompt: the only mask is the second completion's, 5 x 905."""
    segments = Segments(np.array([0, 900, 905]), np.array([900, 905, 910]), np.array([-1, 0, 0]))
    states = torch.randn(1, 1, 910, 8)
    tree_attention(torch.nn.Identity(), states, states, states, None, segments=segments)
    assert [tuple(mask.shape) for mask in segments.cache.values()] == [(5, 905)]


def bottom_right(q, k, v, cu_q, cu_k, max_q, max_k, *, shift: int = 0, scale: float | None = None):
    """What variable-length FlashAttention is specified to compute, in plain torch; `shift` misaligns the mask."""
    outputs, groups = [], q.shape[1] // k.shape[1]
    for i in range(len(cu_q) - 1):
        one = q[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        keys, values = (x[cu_k[i] : cu_k[i + 1]].transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        assert one.shape[1] <= max_q and keys.shape[1] <= max_k
        mask = torch.ones(one.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - one.shape[1] + shift)
        outputs.append(torch.nn.functional.scaled_dot_product_attention(one, keys, values, mask, scale=scale))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def random_row(segments: Segments, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, n, segments.num_tokens, 8, generator=generator).to(dtype).requires_grad_() for n in (4, 2, 2)
    ]


@pytest.mark.parametrize("name", TREES)
def test_one_call_over_all_chains_equals_sdpa(name: str) -> None:
    """Gathered keys and cumulative lengths, values and gradients; the same sums in another order (seen 2e-7)."""
    lengths, parents = TREES[name]
    ends = np.cumsum(lengths)
    segments = Segments(ends - lengths, ends, np.asarray(parents))
    expected, found = random_row(segments), random_row(segments)
    weight = torch.randn(1, segments.num_tokens, 4, 8, generator=torch.Generator().manual_seed(1))
    wanted, got = sdpa(*expected, segments, None), over_chains(bottom_right, *found, segments)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
    for output in (wanted, got):
        (output * weight).sum().backward()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=5e-6, rtol=0)


def test_a_layout_travels_with_the_batch() -> None:
    batch = build_batch(random_segments([6, 4, 5]), [-1, 0, 0])
    moved = batch.to(torch.device("meta"))
    layout = moved.segments.layout
    assert {layout.cu_queries.device.type, layout.cu_keys.device.type, layout.key_index.device.type} == {"meta"}
    assert batch.segments.layout.cu_queries.tolist() == [0, 10, 15]
    assert batch.segments.layout.cu_keys.tolist() == [0, 10, 21]
    assert batch.segments.layout.key_index.tolist() == [*range(10), *range(6), *range(10, 15)]
    assert moved.segments == batch.segments or moved.segments.start is batch.segments.start
    assert build_batch(random_segments([6, 4]), [-1, -1]).segments.layout.key_index is None


def over(shift: int):
    def backend(query, key, value, segments, scaling):
        call = partial(bottom_right, shift=shift, scale=scaling)
        return over_chains(call, query, key, value, segments)

    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_back_end_that_equals_sdpa_may_run(dtype: torch.dtype) -> None:
    shape = {"device": torch.device("cpu"), "dtype": dtype, "heads": 4, "key_heads": 2, "head_size": 16}
    assert compare_with_sdpa(over(0), *shape.values()) is None
    for shift in (-1, 1):  # one key too few, one too many
        assert "differs from SDPA's" in compare_with_sdpa(over(shift), *shape.values())


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"device": torch.device("cpu"), "dtype": torch.float32, "heads": 4, "key_heads": 2, "head_size": 16}
    choice = choose_attention("auto", **shape)
    assert choice.name == "sdpa"
    assert str(choice) == "sdpa (torch_varlen: needs a GPU; flash_attn: needs a GPU)"
    with pytest.raises(ValueError, match=r"train.attention: flash_attn does not work here \(needs a GPU\); take auto"):
        choose_attention("flash_attn", **shape)
    with pytest.raises(ValueError, match="found 'flash', expected one of auto, sdpa"):
        choose_attention("flash", **shape)


@pytest.mark.parametrize("signature", ["torch 2.10", "torch 2.12", "torch 2.15"])
def test_adapts_to_the_signature_that_torch_has(signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `scale` queries are scaled beforehand, without `enable_gqa` the keys' heads are repeated."""

    def v210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert is_causal and key.shape[1] == query.shape[1]
        return bottom_right(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    def v212(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0) and key.shape[1] == query.shape[1]
        return bottom_right(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale)

    def v215(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert window_size == (-1, 0) and enable_gqa and key.shape[1] == 2
        return bottom_right(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale)

    function = {"torch 2.10": v210, "torch 2.12": v212, "torch 2.15": v215}[signature]
    varlen._torch_function.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    try:
        segments = build_batch(random_segments([6, 4, 5]), [-1, 0, 0]).segments
        states = random_row(segments)
        torch.testing.assert_close(
            varlen.torch_varlen(*states, segments, 0.7), sdpa(*states, segments, 0.7), atol=2e-6, rtol=0
        )
    finally:
        varlen._torch_function.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch_varlen", "flash_attn"])
def test_flash_attention_on_a_gpu(name: str) -> None:
    shape = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "heads": 8, "key_heads": 2, "head_size": 64}
    try:
        assert choose_attention(name, **shape).name == name
    except ValueError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
