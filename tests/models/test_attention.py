"""Law: a prefix tree computes what its separate sequences compute, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pivot.batch import Segments
from pivot.models.attention import TREE_ATTENTION, tree_attention
from tests.tiny import tiny_text_config
from tests.trees import TREES, build_batch, random_segments, unroll


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

    model.set_attn_implementation(TREE_ATTENTION)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
    model.set_attn_implementation(TREE_ATTENTION)
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
