"""Defaults < YAML < `key=value`, merged, resolved and checked before any weight loads.

    config = load_config("run.yaml", ["optim.lr=1e-6"], objective="dpo")

An unknown key, a wrong type, an absent learning rate or a contradiction raises ConfigError, a ValueError whose text
names the full key, what was found, what was expected and what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pivot.config import OBJECTIVES, CompareConfig, Config, ConfigError, DPOConfig, SFTConfig
from pivot.config_check import check_config
from pivot.system.redact import MARK, is_redacted, is_secret_name, redact_setting, redact_values, remember

_VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}]+?)\s*\}")  # one without a default
_ANY_VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}]+?)\s*[,}]")
Place = tuple[str | int, ...]  # a key and its sections, and indices into lists


def load_config(path: str | Path, overrides: list[str] | None = None, objective: str | None = None) -> Config:
    """Merge defaults, the YAML at `path` and `key=value` overrides; `objective` is the one the launch script fixes."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected the run's YAML")
    layers = [_load_yaml(path), *(_parse_override(text) for text in overrides or [])]
    sources = [str(path), *(f"command line '{redact_setting(text)}'" for text in overrides or [])]
    for layer, source in zip(layers, sources, strict=True):
        _require_unredacted(layer, source)
    return _build(layers, sources, objective)


def load_saved(path: str | Path) -> Config:
    """The config.yaml of a run that goes on, resolved as its YAML is; a variable that is not set stays as written."""
    layer, kept = _load_yaml(path), {}
    for place, text in _walk_layer(layer):
        literal = _VARIABLE.sub(lambda found: found[0] if found[1] in os.environ else f"\\{found[0]}", text)
        if literal != text:
            kept[place] = text
            _put(layer, place, literal)
    config = _build([layer], [str(path)], None)
    for place, text in kept.items():
        if place in config.texts:
            config.texts[place] = text, config.texts[place][1]
    return config


def _build(layers: list[Any], sources: list[str], objective: str | None) -> Config:
    merged = OmegaConf.structured(Config)
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
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "  # not the line: it may be
        raise ConfigError(f"{path}: not valid YAML: {where}{problem or error}") from error  # one with a password


def _require_unredacted(layer: Any, source: str) -> None:
    """ConfigError where a saved config.yaml is started from whose passwords were left out."""
    for place, text in _walk_layer(layer):
        if is_redacted(text):
            raise ConfigError(
                f"{source}: {_dotted(place)}: found {MARK} where a password or token was left out when it was saved; "
                "write it again, best as ${oc.env:NAME} with the variable in the environment"
            )


def _walk_layer(layer: Any) -> Iterator[tuple[Place, str]]:
    return _texts(OmegaConf.to_container(layer, resolve=False)) if OmegaConf.is_config(layer) else iter(())


def _texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every text of nested lists and mappings, with where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, (*place, key))


def _put(tree: Any, place: Place, value: str) -> None:
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _parse_override(text: str) -> DictConfig:
    if "=" not in text or text.startswith("-"):
        raise ConfigError(
            f"command line: found '{redact_setting(text)}', expected key=value (for example optim.lr=1e-6)"
        )
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # see _load_yaml
        shown, problem = redact_setting(text), getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"command line '{shown}': the value is not valid YAML: {problem}; quote it") from error


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
        references = [(place, text) for place, text in _walk_layer(config) if "${" in text]
        _remember_environment(references)
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'config'}: {text}") from error
    assert isinstance(typed, Config)
    values = dict(_texts(dataclasses.asdict(typed)))  # of a number the value is saved, of a text what refers to it
    vars(typed)["texts"] = {place: (text, values[place]) for place, text in references if place in values}
    return typed


def _remember_environment(references: list[tuple[Place, str]]) -> None:
    """Have the values of variables shown by name. What names the run's folder can be read there by everybody."""
    named = {name for place, text in references if place == ("output_dir",) for name in _ANY_VARIABLE.findall(text)}
    for place, text in references:
        for name in _ANY_VARIABLE.findall(text):
            if name in os.environ and (name not in named or is_secret_name(name)):
                remember(name, os.environ[name], key=_dotted(place))


def _missing_text(keys: list[str]) -> str:
    rates = [key for key in keys if key.startswith("optim.") and key.endswith(".lr")]
    if rates:
        return f"{rates[0]}: absent; expected a learning rate, or null to freeze the component (none is a default)"
    return f"{keys[0]}: absent; it has no default, set it in the YAML or as {keys[0]}=VALUE"


def to_yaml(config: Config) -> str:
    """The config as YAML, without secrets: what a YAML takes from the environment is written as it stands there, and
    passwords of URLs are left out. Else `load_config` reads it back equal."""
    settings = dataclasses.asdict(config)
    values = dict(_texts(settings))
    for place, (text, value) in config.texts.items():
        if values.get(place) == value:
            _put(settings, place, text)
    return OmegaConf.to_yaml(OmegaConf.create(redact_values(settings)))
