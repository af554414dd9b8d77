"""Law: the streamlined decoder computes what transformers' own does, values and gradients, with fewer rows."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, PretrainedConfig, Qwen3Config

from pivot.batch import PackedBatch, Segments
from pivot.models.attention import registered_name
from pivot.models.decoder import FAMILIES, reads_at_targets, streamline
from tests.tiny import tiny_text_config
from tests.trees import TREES, build_batch, random_segments

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def config_of(family: str) -> PretrainedConfig:
    if family in ("mistral", "qwen3"):
        made = {"mistral": MistralConfig, "qwen3": Qwen3Config}[family]
        return made(**SIZES, sliding_window=None)
    return tiny_text_config(family)


def run(model: torch.nn.Module, batch: PackedBatch, **how: object) -> torch.Tensor:
    return model.model(
        inputs_embeds=model.get_input_embeddings()(batch.token_ids)[None],
        position_ids=batch.position_ids[None],
        segments=batch.segments,
        use_cache=False,
        **how,
    ).last_hidden_state[0]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, name: str, checkpointing: bool) -> None:
    """Hidden states at the targets to 1e-5, every gradient to 1e-5 of its norm (see test_attention for the floor)."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config_of(family)).train()
    plain.set_attn_implementation(registered_name("sdpa"))
    ours = copy.deepcopy(plain)
    assert reads_at_targets(ours.config)
    streamline(ours)
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lengths, parents = TREES[name]
    batch = build_batch(random_segments(lengths), parents)
    weight = torch.randn(len(batch.target_ids), ours.config.hidden_size)
    expected = run(plain, batch)[batch.target_positions]
    found = run(ours, batch, reading=batch.reading)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(ours, batch), run(plain, batch), atol=1e-5, rtol=0)
    for hidden in (expected, found):
        (hidden * weight).sum().backward()
    gradients = dict(plain.named_parameters())
    for key, parameter in ours.named_parameters():
        if (theirs := gradients[key].grad) is None:  # the head, which nobody ran
            assert parameter.grad is None
            continue
        difference = float((parameter.grad - theirs).norm())
        assert difference <= 1e-5 * max(float(theirs.norm()), 1e-2), f"{key}: {difference} of {theirs.norm()}"


def test_the_last_block_runs_where_it_is_read() -> None:
    """Rows of each matrix: keys and values of every token, queries of those that ask, all else of the targets."""
    model = AutoModelForCausalLM.from_config(tiny_text_config())
    model.set_attn_implementation(registered_name("sdpa"))
    streamline(model)
    rows: dict[str, int] = {}
    for key, module in model.model.layers[-1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, __, key=key: rows.update({key: given[0].shape[1]}))
    batch = build_batch(random_segments([30, 4, 5]), [-1, 0, 0])
    assert run(model, batch, reading=batch.reading).shape[0] == 9
    behind = dict.fromkeys(("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), 9)
    assert rows == {"self_attn.q_proj": 10, "self_attn.k_proj": 39, "self_attn.v_proj": 39} | behind


def test_other_families_run_as_they_come() -> None:
    assert not reads_at_targets(PretrainedConfig())


def test_segments_of_other_lengths_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny_text_config())
    model.set_attn_implementation(registered_name("sdpa"))
    streamline(model)
    batch = build_batch(random_segments([6, 4, 5]), [-1, 0, 0])
    batch.segments = Segments([0], [14], [-1])
    with pytest.raises(ValueError, match=r"the row holds \(15, 15\) queries and keys, its segments \(14, 14\)"):
        run(model, batch)
