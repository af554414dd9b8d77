"""PIVOT from end to end: align, pre-train, post-train twins, and swap each encoder under a fresh language model.

    python launch/recipe.py [--size FILE] [--folder DIR] [--arms base,sft,dpo] [--check] [STAGE.key=value ...]

    1a_align -> 1b_pretrain -> 2_sft, 2_dpo -> for each arm 3a_swap_align -> 3b_swap_instruct

The stages are the YAMLs of launch/configs/pivot/, at the paper's size. `--size` lays settings over them, so that
launch/sizes/demo.yaml makes the same chain run on two CPU cores (`make recipe`). The arm base is the encoder of
1b without post-training. Each stage is an ordinary run in DIR; the same command goes on. In the end DIR/table.md has
what every arm gave before and after the swap. A frozen encoder is compared with the one that came, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import OK, ROOT, tell_error
from local import run_to_end, shown_command

CONFIGS = ROOT / "launch/configs/pivot"
ARMS = {"base": "1b_pretrain", "sft": "2_sft", "dpo": "2_dpo", "mpo": "2_mpo"}  # whose encoder each arm swaps


@dataclass(frozen=True)
class Stage:
    """One run of the chain."""

    name: str  # of its folder
    config: str  # its YAML
    before: str | None  # the stage whose export it starts from

    @property
    def script(self) -> str:
        return "train_dpo.py" if self.config in ("2_dpo", "2_mpo") else "train_sft.py"

    @property
    def freezes_encoder(self) -> bool:
        return self.config in ("3a_swap_align", "3b_swap_instruct")


def make_chain(arms: list[str]) -> list[Stage]:
    """All stages, each behind the one that it starts from."""
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not arms:
        raise ValueError(f"--arms: found {', '.join(unknown) or 'nothing'}, expected some of {', '.join(ARMS)}")
    chain = [Stage("1a_align", "1a_align", None), Stage("1b_pretrain", "1b_pretrain", "1a_align")]
    chain += [Stage(ARMS[arm], ARMS[arm], "1b_pretrain") for arm in arms if arm != "base"]
    for arm in arms:
        chain.append(Stage(f"3a_{arm}", "3a_swap_align", ARMS[arm]))
        chain.append(Stage(f"3b_{arm}", "3b_swap_instruct", f"3a_{arm}"))
    return chain


def stage_names() -> set[str]:
    """The YAMLs that there are."""
    return {path.stem for path in CONFIGS.glob("[123]*.yaml")}


def read_size(file: Path | None, folder: Path) -> dict[str, list[str]]:
    """Stage, or `all`, -> settings over its YAML."""
    if file is None:
        return {}
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(OmegaConf.load(file))
    configs = stage_names()
    for name, words in found.items():
        if name != "all" and name not in configs:
            raise ValueError(f"{file}: there is no stage {name}; expected all or one of {', '.join(sorted(configs))}")
        if not isinstance(words, list) or not all(isinstance(word, str) and "=" in word for word in words):
            raise ValueError(f"{file}: {name} holds {words!r}, expected a list of key=value")
    return {name: [word.replace("{data}", str(folder / "data")) for word in words] for name, words in found.items()}


def split_overrides(texts: list[str]) -> dict[str, list[str]]:
    """`2_dpo.optim.lr=1e-6` -> {"2_dpo": ["optim.lr=1e-6"]}; a setting without a stage is for all."""
    settings: dict[str, list[str]] = {}
    configs = stage_names()
    for text in texts:
        stage, _, setting = text.partition(".")
        if stage in configs:
            settings.setdefault(stage, []).append(setting)
        else:
            settings.setdefault("all", []).append(text)
    return settings


def words_of(stage: Stage, folder: Path, layers: list[dict[str, list[str]]]) -> list[str]:
    """What its script is called with: the YAML, its place in the chain, and the settings, the last ones win."""
    words = [str(CONFIGS / f"{stage.config}.yaml"), f"output_dir={folder / stage.name}"]
    if stage.before is not None:
        words.append(f"init_from={folder / stage.before / 'export'}")
    for layer in layers:
        words += layer.get("all", []) + layer.get(stage.config, [])
    return words


def run_stage(stage: Stage, folder: Path, words: list[str]) -> int:
    """OK when it is done, before or now, and its frozen encoder has not moved."""
    code = run_to_end(stage.name, stage.script, words, folder / stage.name)
    if code == OK and stage.freezes_encoder and stage.before is not None:
        require_same_encoder(folder / stage.before / "export", folder / stage.name / "export")
    return code


def require_same_encoder(before: Path, after: Path) -> None:
    """RuntimeError unless both exports hold the same encoder, tensor by tensor and bit by bit."""
    from pivot.models.parts import digest_encoder

    digests = [digest_encoder(folder) for folder in (before, after)]
    if digests[0] != digests[1]:
        raise RuntimeError(f"the encoder of {after} is not that of {before}, though it was frozen")
    print(f"encoder    sha256 {digests[0][:16]} in {before} and in {after}: it did not move", flush=True)


def check_all(chain: list[Stage], folder: Path, layers: list[dict[str, list[str]]]) -> None:
    """Each stage's settings, and that its sets are there, before the first weight loads. ValueError names the stage."""
    from pivot.config_load import load_config

    for stage in chain:
        words = words_of(stage, folder, layers)
        try:
            config = load_config(words[0], words[1:], stage.script.removeprefix("train_").removesuffix(".py"))
            for path in (config.data.train, config.data.eval):
                if isinstance(path, str) and "://" not in path and not (Path(path) / "manifest.json").is_file():
                    raise ValueError(f"{path} holds no packed set (manifest.json); set {stage.config}.data.train=SET")
        except ValueError as error:
            raise ValueError(f"{stage.name}: {error}") from error


def draw_demo(folder: Path) -> int:
    """The demo's sets in `folder`/data, where they are not there yet."""
    from data_tools.__main__ import main as data_tools

    if (folder / "data" / "demo.json").is_file():
        return OK
    return data_tools(["demo", "--out", str(folder / "data"), "--seed", os.environ.get("SEED") or "0"])


def show(arms: list[str], folder: Path) -> str:
    """The tables, also in `folder`/table.md: each arm before and behind the swap, less the first one."""
    from pivot.report.sweep import write_tables
    from pivot.system.files import write_atomically

    texts = []
    for title, name in (("as post-trained", lambda arm: ARMS[arm]), ("behind the swap", lambda arm: f"3b_{arm}")):
        rows = [({"arm": arm}, folder / name(arm)) for arm in arms]
        texts.append(f"{title}\n\n" + write_tables(rows, folder / title.replace(" ", "-")))
    text = "\n\n".join(texts)
    write_atomically(folder / "table.md", text + "\n")
    return text


def run_recipe(options: argparse.Namespace) -> int:
    arms = options.arms.split(",")
    chain, folder = make_chain(arms), options.folder
    layers = [read_size(options.size, folder), split_overrides(options.overrides)]
    if options.size is not None and "{data}" in options.size.read_text(encoding="utf-8"):
        code = draw_demo(folder)
        if code != OK:
            return code
    check_all(chain, folder, layers)
    if options.check:
        print(
            "\n".join(
                f"{stage.name:<16}{shown_command(stage.script, words_of(stage, folder, layers))}" for stage in chain
            )
        )
        return OK
    for stage in chain:
        code = run_stage(stage, folder, words_of(stage, folder, layers))
        if code != OK:
            return code
    print("\n" + show(arms, folder))
    return OK


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="recipe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="[STAGE.]key=value")
    parser.add_argument("--size", type=Path, metavar="FILE", help="settings over the stages' YAMLs")
    parser.add_argument("--folder", type=Path, default=Path("runs/pivot"), metavar="DIR", help="%(default)s")
    parser.add_argument("--arms", default="base,sft,dpo", metavar="ARM,ARM", help=f"of {', '.join(ARMS)} (%(default)s)")
    parser.add_argument("--check", action="store_true", help="check the settings of all stages and show their commands")
    options = parser.parse_intermixed_args(arguments)
    try:
        return run_recipe(options)
    except Exception as error:
        return tell_error(error)


if __name__ == "__main__":
    from pivot.system.process import leave

    leave(main(sys.argv[1:]))
