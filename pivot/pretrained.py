"""What transformers saves: configurations, weights read strictly or drawn, never remote code; written and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

# Gives a context in which the full values of parameters can be read that ZeRO-3 has partitioned.
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def load_strictly(model_class: Any, path: str, where: str, *, accepted: Iterable[str] = (), **settings: Any) -> Any:
    """`model_class.from_pretrained(path)`; ValueError, starting with `where`, for a checkpoint that does not fit.

    Nothing may be missing or of another shape, and only keys that start with one of `accepted` may be extra. Under a
    live HfDeepSpeedConfig (ZeRO-3) transformers partitions what it loads.
    """
    try:
        model, info = model_class.from_pretrained(
            path,
            attn_implementation=attention_of(model_class),
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with the tensor's name
            **settings,
        )
    except OSError as error:
        raise ValueError(f"{where}: no weights that transformers can read: {error}") from error
    check_loading(info, where, accepted)
    return model


def check_loading(info: dict[str, Any], where: str, accepted: Iterable[str] = ()) -> None:
    """Refuse what transformers only warns of: tensors that were missing, unknown or of another shape."""
    other_shape = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    for problem, keys in (
        ("lacks", info["missing_keys"]),
        ("has another shape for", other_shape),
        ("holds, beside those,", [key for key in info["unexpected_keys"] if not key.startswith(tuple(accepted))]),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise ValueError(
                f"{where}: compared to what its configuration asks for, the checkpoint {problem} {len(keys)} tensors "
                f"({shown}); it is damaged, or was written for another architecture"
            )


def require_weights(folder: Path, where: str) -> None:
    """ValueError, starting with `where`, unless a folder holds weights: each file that an index names, none cut short.

    Only the files' headers are read.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    named = {name for index in indices for name in json.loads(index.read_text("utf-8")).get("weight_map", {}).values()}
    files = [folder / name for name in sorted(named)] or sorted(folder.glob("*.safetensors"))
    if not files and not any(file.suffix in (".bin", ".pth", ".pt") for file in folder.iterdir()):
        raise ValueError(f"{where}: no weights in {folder}; expected model.safetensors beside its config.json")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{where}: {file} is missing, which the index of weights names; copy the folder again")
        require_whole(file, where)


def require_whole(file: Path, where: str) -> None:
    """ValueError, starting with `where`, for a .safetensors file that is shorter than its header says."""
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{where}: {file} is damaged or was cut short ({error}); copy it again") from error


def holds_tensor(path: str, name: str) -> bool:
    """Whether the weights in a folder or of a hub id hold a tensor whose name ends so; False where they are pickled."""
    index = read_json(path, "model.safetensors.index.json")
    if index:
        return any(key.endswith(name) for key in index["weight_map"])
    file = find_file(path, "model.safetensors")
    if file is None:
        return False
    with safe_open(file, framework="pt") as tensors:
        return any(key.endswith(name) for key in list(tensors.keys()))


def build_random(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model with random weights, the same on every rank and ZeRO stage that starts from the same seed.

    Called as a plain constructor, which no HfDeepSpeedConfig turns into a partitioned build: that would draw other
    numbers. DeepSpeed partitions it when the engine is built; what starts from scratch is small.
    """
    config.dtype = dtype
    config._attn_implementation = attention_of(model_class)
    return model_class(config).to(dtype=dtype)


def attention_of(model_class: Any) -> str:
    """torch's own, but for a network without attention, which refuses to hear of any."""
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def draws_weights(path: str) -> bool:
    """Whether `path` is a bare configuration, whose weights are drawn from torch's global seed."""
    return path.endswith(".json")


def digest_weights(path: str) -> str:
    """sha256 of a file, or of the weights and settings of a folder; a hub id with the commit that was resolved."""
    if Path(path).is_file():
        with Path(path).open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    if not Path(path).is_dir():
        return f"{path}@{getattr(read_config(path, 'init_from'), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json"):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def read_config(path: str, key: str) -> PretrainedConfig:
    """The transformers configuration of a folder, hub id or JSON file; `key` names the setting in errors.

    It says what the network is. Keys that would say how it is run are ours to choose, so they are put back to what
    we choose; a checkpoint whose weights are not plain numbers of this network is refused.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever the class of any configuration may raise
        told = str(error).partition("\n")[0]  # the rest of it may advise to run the code
        raise ValueError(
            f"{key}: no configuration that transformers knows at '{path}' (remote code is never run): {told}"
        ) from error
    if find_file(path, "adapter_config.json"):
        raise ValueError(
            f"{key}: '{path}' holds an adapter (adapter_config.json), not the weights of a whole model; merge it into "
            "its base model and give the folder of the result"
        )
    for part in (config, *(getattr(config, name) for name in config.sub_configs if hasattr(config, name))):
        _choose_how_it_runs(part, f"{key}: '{path}'")
    return config


def _choose_how_it_runs(config: Any, where: str) -> None:
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "an unknown method")
        raise ValueError(f"{where} has weights that were quantised ({method}); give the folder of the plain weights")
    if config.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        config.dtype = None
    # The name of a repository here would make transformers fetch a kernel and run it.
    config._attn_implementation = "sdpa"
    config._experts_implementation = None
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False
    if hasattr(config, "gradient_checkpointing"):  # transformers would switch it on whatever the run says
        del config.gradient_checkpointing


def read_text_config(path: str) -> PretrainedConfig:
    """The configuration of a language model, alone or in an HF LLaVA."""
    config = read_config(path, "model.language_model.path")
    return getattr(config, "text_config", config)


def find_file(path: str, name: str) -> Path | None:
    """A file of a folder or hub id, None where there is none (offline a hub cache may not know whether there is)."""
    if Path(path).is_file():  # a bare configuration: what lies beside it may be another model's
        return None
    cached = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(cached) if cached else None


def read_json(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a folder or hub id, {} where there is none."""
    file = find_file(path, name)
    try:
        return json.loads(file.read_text("utf-8")) if file else {}
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error


def build_shell(
    model_class: type[PreTrainedModel], config: Any, values: Mapping[str, Tensor], **settings: Any
) -> PreTrainedModel:
    """A model without memory that `values` fit: each parameter has one of its shape, and no other is given.

    `settings` go to its constructor.
    """
    dtypes = {value.dtype for value in values.values()}
    if len(dtypes) != 1:
        raise RuntimeError(f"expected all parameters of one dtype, found {sorted(map(str, dtypes))}; cast them first")
    config.dtype = dtypes.pop()
    config._attn_implementation = attention_of(model_class)  # ours (the prefix tree) means nothing to others
    with torch.device("meta"):
        shell = model_class(config, **settings)
    expected = {name: parameter.shape for name, parameter in shell.named_parameters()}  # a tied head has no entry
    given = {name: value.shape for name, value in values.items()}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} parameters do not fit a {model_class.__name__}, the first is '{wrong[0]}': found "
            f"{given.get(wrong[0], 'none')}, expected {expected.get(wrong[0], 'none')}"
        )
    return shell


def save_and_compare(folder: str | Path, shell: PreTrainedModel, values: Mapping[str, Tensor], **settings: Any) -> None:
    """Write `values` as a model of the shell's class; RuntimeError unless that class reads back what was written."""
    shell.save_pretrained(folder, state_dict={k: v.detach().cpu().contiguous() for k, v in values.items()})
    model = load_strictly(type(shell), str(folder), str(folder), dtype="auto", **settings)
    require_equal_values(dict(model.named_parameters()), values, folder)


def require_equal_values(loaded: Mapping[str, Tensor], values: Mapping[str, Tensor], folder: str | Path) -> None:
    """RuntimeError unless every value that was written is what the stock library reads (into float32: still exact)."""
    for name, value in values.items():
        read = loaded[name].detach()
        if read.shape != value.shape or not torch.equal(read, value.to("cpu", read.dtype)):
            raise RuntimeError(f"{folder}: '{name}' was not read back as it was written; do not use this folder")
