"""Law: the streamlined decoder computes what transformers' own does, values and gradients, with fewer rows."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, MistralConfig, PretrainedConfig, Qwen3Config

from pivot.batch import PackedBatch
from pivot.models.attention import registered_name
from pivot.models.decoder import FAMILIES, reads_at_targets, streamline
from pivot.renamed import recompute_blocks
from pivot.trees import Segments
from tests.kit.tiny import tiny_text_config
from tests.kit.trees import TREES, build_batch, random_segments

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


# (module of a block, arguments of its forward by name, attributes): all that `streamline` relies on.
RELIED_ON = (
    ("", ["hidden_states"], ["input_layernorm", "post_attention_layernorm", "self_attn", "mlp"]),
    (
        "self_attn",
        ["hidden_states", "position_embeddings", "attention_mask"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout"],
    ),
    ("mlp", ["x"], ["gate_proj", "up_proj", "down_proj"]),
    ("input_layernorm", ["hidden_states"], ["weight", "variance_epsilon"]),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_what_is_replaced(family: str) -> None:
    """The signatures, and that a model hands its blocks, and a block its attention, all but the states by name."""
    model = AutoModelForCausalLM.from_config(config_of(family))
    block, calls = model.model.layers[-1], []
    for name, arguments, attributes in RELIED_ON:
        module = block.get_submodule(name)
        taken = inspect.signature(module.forward).parameters
        gone = [a for a in arguments if a not in taken] + [a for a in attributes if not hasattr(module, a)]
        assert not gone, (
            f"transformers {transformers.__version__}: {type(module).__name__} has no {', '.join(gone)} any more; "
            "pivot/models/decoder.py replaces its forward and must follow"
        )
    for module in (block, block.self_attn):
        module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    for args, kwargs in calls:
        assert len(args) <= 1 and {"position_embeddings", "attention_mask"} <= set(kwargs), (
            f"transformers {transformers.__version__} hands {family}'s blocks their arguments in another way: "
            f"{len(args)} by place, {', '.join(kwargs)} by name; pivot/models/decoder.py must follow"
        )


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
        recompute_blocks(ours)
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
