"""Defaults < YAML < `key=value`, merged, resolved and checked before any weight loads.

    config = load_config("run.yaml", ["optim.lr=1e-6"], objective="dpo")

An unknown key, a wrong type, an absent learning rate or a contradiction raises ConfigError, a ValueError whose text
names the full key, what was found, what was expected and what to do. Three functions read settings, by whose they are:

    load_config     a YAML that a run starts from: overrides win, every reference is resolved, every value is checked
    load_saved      the config.yaml of a run that goes on: a variable that is not set now stays as it is written
    read_settings   the config.yaml of a run that somebody else may have made: no variable is looked up at all
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pivot.config import KEYS, Config, ConfigError, ObjectiveConfig
from pivot.config_check import check_config
from pivot.system.redact import MARK, is_redacted, is_secret_name, redact_setting, redact_values, remember

_VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}]+?)\s*\}")  # one without a default
_ANY_VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}]+?)\s*[,}]")
_RESOLVER = re.compile(r"\$\{[^}]*:")  # ${name:...}; ${optim.lr} points into the file
_OPENING = re.compile(r"(\\*)\$\{")
# Keys of earlier versions -> what they were by default, and how it is without them. The config.yaml of a run that an
# earlier version began holds them all; at its default a key says nothing and is passed over, so that the run can go on.
REMOVED: dict[str, tuple[Any, str]] = {
    "data.allow_pipe": (False, "no command is run to fetch a set; give its address or a mounted folder"),
    "objective.dpo.reference_per_token": (False, "the reference's log-probs are kept as sums of a completion alone"),
    "train.products": ("auto", "matrix products are torch's own"),
}
Place = tuple[str | int, ...]  # a key and its sections, and indices into lists


def load_config(
    path: str | Path, overrides: list[str] | None = None, objective: str | None = None, *, others: tuple[str, ...] = ()
) -> Config:
    """Merge defaults, the YAML at `path` and `key=value` overrides; `objective` is the one the launch script fixes, and
    `others` those that its YAML may have instead."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected the run's YAML")
    layers = [(str(path), _load_yaml(path))]
    layers += [(f"command line '{redact_setting(text)}'", _parse_override(text)) for text in overrides or []]
    for source, layer in layers:
        _require_unredacted(layer, source)
    config = _to_typed(_merge_all(layers, objective, others=others))
    check_config(config)
    return config


def load_saved(path: str | Path) -> Config:
    """The config.yaml of a run that goes on, resolved as its YAML is; a variable that is not set stays as written."""
    return _read_as_written(path, lambda text: any(name not in os.environ for name in _VARIABLE.findall(text)))


def read_settings(path: str | Path) -> Config:
    """The settings of a run that somebody else may have made: nothing but the file itself is looked at.

    `${oc.env:NAME}` would be the reader's environment, not the run's, and stays as it is written, as does all else that
    OmegaConf would ask a resolver for. What a value may be was checked when the run began.
    """
    return _read_as_written(path, lambda text: _RESOLVER.search(text) is not None, refuse_removed=False)


def _read_as_written(path: str | Path, stays: Callable[[str], bool], *, refuse_removed: bool = True) -> Config:
    """A saved config.yaml over the defaults, with every text for which `stays` is true as it is written."""
    layer = _load_yaml(path)
    written: dict[Place, str] = {}
    for place, text in _walk_layer(layer):
        if stays(text):
            written[place] = text
            # OmegaConf's way to write the letters themselves, in which a backslash before them counts for two.
            _put(layer, place, _OPENING.sub(lambda match: 2 * match[1] + "\\${", text))
    merged = _merge_all([(str(path), layer)], None, refuse_removed=refuse_removed)
    try:
        config = _to_typed(merged)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for place, text in written.items():
        if place in config.texts:
            config.texts[place] = text, config.texts[place][1]
    return config


def _merge_all(
    layers: list[tuple[str, Any]], objective: str | None, *, others: tuple[str, ...] = (), refuse_removed: bool = True
) -> DictConfig:
    """The defaults, and (source, layer) after (source, layer) over them."""
    merged = OmegaConf.structured(Config)
    for source, layer in layers:
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{source}: expected a mapping of keys, found {type(layer).__name__}")
        merged = _merge(merged, _without_removed(layer, source, refuse=refuse_removed), source)
    return _fix_objective(merged, objective, others)


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
    unknown = _first_unknown(OmegaConf.to_container(layer, resolve=False))
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


def _first_unknown(layer: Any, prefix: str = "") -> tuple[str, list[str]] | None:
    """The first full key of `layer` that there is not, with the names that it could have had there."""
    if not isinstance(layer, dict):
        return None  # a value where a section is expected: the merge says so
    names = [name.removeprefix(prefix) for name in KEYS if name.rpartition(".")[0] == prefix[:-1]]
    for name, value in layer.items():
        full = f"{prefix}{name}"
        if name not in names:
            return full, names
        unknown = _first_unknown(value, f"{full}.") if KEYS[full].section is not None else None
        if unknown:
            return unknown
    return None


def _without_removed(layer: DictConfig, source: str, *, refuse: bool) -> Any:
    """`layer` without the keys of REMOVED. `refuse`: ConfigError for one that asks for anything but its default."""
    values: Any = OmegaConf.to_container(layer, resolve=False)
    for key, (default, reason) in REMOVED.items():
        *sections, name = key.split(".")
        holder = values
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and name in holder:
            if refuse and holder[name] != default:
                raise ConfigError(f"{source}: {key}: found {holder[name]}, but the key is gone: {reason}; remove it")
            del holder[name]
    return OmegaConf.create(values)


def _fix_objective(config: DictConfig, objective: str | None, others: tuple[str, ...]) -> DictConfig:
    """Make exactly one objective present; refuse a YAML written for another script."""
    names = [spec.name for spec in dataclasses.fields(ObjectiveConfig)]
    present = [name for name in names if config.objective[name] is not None]
    if len(present) > 1:
        given = " and ".join(present)
        raise ConfigError(f"objective: both {given} are given; expected one of them, remove the other")
    if objective is None:
        if not present:
            expected = " or ".join(f"objective.{name}" for name in names)
            raise ConfigError(f"objective: none is given; expected {expected}")
    elif present and present[0] not in (objective, *others):
        raise ConfigError(
            f"objective.{present[0]} is given, but this script trains {objective}; "
            f"run launch/train_{present[0]}.py, or replace the section by objective.{objective}"
        )
    elif not present:
        config.objective[objective] = OmegaConf.structured(KEYS[f"objective.{objective}"].section)
    return config


def _to_typed(config: DictConfig) -> Config:
    """Resolve interpolations, demand every mandatory key, and give the typed object."""
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
