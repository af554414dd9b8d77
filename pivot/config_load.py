"""Defaults < YAML < `key=value`, merged, resolved and checked before any weight loads.

    config = load_config("run.yaml", ["optim.lr=1e-6"], objective="dpo")

An unknown key, a wrong type, an absent learning rate or a contradiction raises ConfigError, a ValueError whose text
names the full key, what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pivot.config import OBJECTIVES, CompareConfig, Config, ConfigError, DPOConfig, SFTConfig
from pivot.config_check import check_config


def load_config(path: str | Path, overrides: list[str] | None = None, objective: str | None = None) -> Config:
    """Merge defaults, the YAML at `path` and `key=value` overrides; `objective` is the one the launch script fixes."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected the run's YAML")
    layers = [_load_yaml(path), *(_parse_override(text) for text in overrides or [])]
    merged = OmegaConf.structured(Config)
    sources = [str(path), *(f"command line '{text}'" for text in overrides or [])]
    for layer, source in zip(layers, sources, strict=True):
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{source}: expected a mapping of keys, found {type(layer).__name__}")
        merged = _merge(merged, layer, source)
    merged = _fix_objective(merged, objective)
    return resolve(merged)


def read_settings(path: str | Path) -> Config:
    """The settings of a finished run, which somebody else may have made: nothing but the file itself is looked at.

    What the file leaves to a resolver (`${oc.env:NAME}` is the reader's environment, not the run's) stays as it is
    written. What a value may be was checked when the run began.
    """
    layer = OmegaConf.create(_without_resolvers(OmegaConf.to_container(_load_yaml(path), resolve=False)))
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(layer).__name__}")
    merged = _fix_objective(_merge(OmegaConf.structured(Config), layer, str(path)), None)
    try:
        return _to_typed(merged)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


_RESOLVER = re.compile(r"\$\{[^}]*:")  # ${name:...}; ${optim.lr} points into the file
_OPENING = re.compile(r"(\\*)\$\{")


def _without_resolvers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_resolvers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_resolvers(part) for part in value]
    if isinstance(value, str) and _RESOLVER.search(value):
        # OmegaConf's way to write the letters themselves, in which a backslash before them counts for two.
        return _OPENING.sub(lambda match: 2 * match[1] + "\\${", value)
    return value


def _load_yaml(path: str | Path) -> Any:
    try:
        return OmegaConf.load(path)
    except Exception as error:  # yaml.YAMLError or OmegaConf's own; naming them would make yaml a dependency of ours
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _parse_override(text: str) -> DictConfig:
    if "=" not in text or text.startswith("-"):
        raise ConfigError(f"command line: found '{text}', expected key=value (for example optim.lr=1e-6)")
    return OmegaConf.from_dotlist([text])


def _merge(base: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    unknown = _first_unknown(OmegaConf.to_container(layer, resolve=False), base, "")
    if unknown:
        key, siblings = unknown
        near = difflib.get_close_matches(key.rpartition(".")[2], siblings, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else f"; keys there: {', '.join(sorted(siblings))}"
        raise ConfigError(f"{source}: unknown key '{key}'{hint}")
    try:
        return OmegaConf.merge(base, layer)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"{source}: {error.full_key + ': ' if error.full_key else ''}{text}") from error


_FREE_FORM = {"objective.dpo.loss", "data.train"}  # their keys are values, checked where they are used
_OPTIONAL_SECTIONS = {"objective.sft": SFTConfig, "objective.dpo": DPOConfig, "log.compare": CompareConfig}


def _first_unknown(found: Any, schema: DictConfig, prefix: str) -> tuple[str, list[str]] | None:
    """The first key of `found` that `schema` lacks, with the keys it could have been."""
    if not isinstance(found, dict):
        return None
    for key, value in found.items():
        full = f"{prefix}{key}"
        if key not in schema.keys():  # noqa: SIM118  (`in` alone is False for a key that is still missing)
            return full, [str(k) for k in schema]
        if full in _FREE_FORM or not isinstance(value, dict):
            continue
        if full in _OPTIONAL_SECTIONS:
            child = OmegaConf.structured(_OPTIONAL_SECTIONS[full])
        elif OmegaConf.is_missing(schema, key) or not isinstance(schema[key], DictConfig):
            continue  # a mapping where a value is expected: the merge says so
        else:
            child = schema[key]
        deeper = _first_unknown(value, child, f"{full}.")
        if deeper:
            return deeper
    return None


def _fix_objective(config: DictConfig, objective: str | None) -> DictConfig:
    """Make exactly one objective present; refuse a YAML written for the other script."""
    present = [name for name in OBJECTIVES if config.objective[name] is not None]
    if len(present) > 1:
        raise ConfigError("objective: both sft and dpo are given; expected one of them, remove the other")
    if objective is None:
        if not present:
            raise ConfigError("objective: none is given; expected objective.sft or objective.dpo")
    elif present and present != [objective]:
        raise ConfigError(
            f"objective.{present[0]} is given, but this script trains {objective}; "
            f"run launch/train_{present[0]}.py, or replace the section by objective.{objective}"
        )
    elif not present:
        section = {"sft": SFTConfig, "dpo": DPOConfig}[objective]
        config.objective[objective] = OmegaConf.structured(section)
    return config


def resolve(config: DictConfig) -> Config:
    """Resolve interpolations, demand every mandatory key, check the values, and give the typed object."""
    typed = _to_typed(config)
    check_config(typed)
    return typed


def _to_typed(config: DictConfig) -> Config:
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(_missing_text(missing))
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'config'}: {text}") from error
    assert isinstance(typed, Config)
    return typed


def _missing_text(keys: list[str]) -> str:
    rates = [key for key in keys if key.startswith("optim.") and key.endswith(".lr")]
    if rates:
        return f"{rates[0]}: absent; expected a learning rate, or null to freeze the component (none is a default)"
    return f"{keys[0]}: absent; it has no default, set it in the YAML or as {keys[0]}=VALUE"


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
