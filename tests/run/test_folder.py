"""Which folder a run may take, what it goes on from, and that nothing in it is lost or taken for something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pivot.config import Config, ConfigError
from pivot.config_load import load_config, to_yaml
from pivot.run.folder import RunFolder, require_own_checkpoint, settings_digests
from tests.kit.runs import SETTINGS


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


def make_config(tmp_path: Path, *overrides: str) -> Config:
    source = tmp_path / "run.yaml"
    source.write_text(
        SETTINGS.format(folder=tmp_path / "run", init_from="null", train="sets/train", held_out="null", steps=4)
    )
    return load_config(source, list(overrides), "dpo")


@pytest.fixture
def folder(config: Config) -> RunFolder:
    return RunFolder(config.output_dir)


def claim(folder: RunFolder, config: Config, total_steps: int = 4) -> int | None:
    """In a second RunFolder, as a second start does: the first one's lock is gone with its process."""
    if folder._lock is not None:
        folder.release()
    return folder.claim(config, total_steps, print)


def add_checkpoint(folder: RunFolder, step: int, **facts: object) -> Path:
    path = folder.checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"step": step, "run": folder.id} | facts))
    (folder.checkpoints / "latest").write_text(path.name + "\n")
    return path


def add_export(folder: RunFolder) -> None:
    folder.export.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder.export / name).write_text("{}")


@pytest.mark.parametrize(
    "names",
    [
        ["slurm-12.out", "slurm-12.err"],
        [".nfs000000a1", ".DS_Store", "lost+found"],
        ["core.123", "nohup.out", "launcher.log", "logs"],
        ["lock", "run.json", "config.yaml.77.part"],
    ],
)
@pytest.mark.parametrize("resume", ["auto", "none"])
def test_litter_does_not_make_a_folder_unusable(
    tmp_path: Path, folder: RunFolder, names: list[str], resume: str
) -> None:
    folder.path.mkdir()
    for name in names:
        (folder.path / name).write_text("x")
    assert claim(folder, make_config(tmp_path, f"checkpoint.resume={resume}")) is None
    assert (folder.path / "config.yaml").is_file()
    left = {path.name for path in folder.path.iterdir()}
    assert left == (set(names) | {"config.yaml", "lock", "run.json", "status"}) - {"config.yaml.77.part"}


def test_somebodys_work_is_named_and_left_alone(config: Config, folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files but no config.yaml, so it is no run \(thesis.tex\)"):
        claim(folder, config)
    assert os.listdir(folder.path) == ["thesis.tex"]


def test_a_run_is_not_begun_over_another(tmp_path: Path, config: Config, folder: RunFolder) -> None:
    """Its files stay as they are, to the byte."""
    claim(folder, config)
    add_checkpoint(folder, 2)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"run is not empty \(.*\) and checkpoint.resume is none; choose another"):
        claim(folder, make_config(tmp_path, "checkpoint.resume=none"))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        claim(folder, make_config(tmp_path, "optim.projector.lr=0.5"))
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_what_cannot_be_a_folder_is_one_sentence(tmp_path: Path, config: Config) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for name in ("file", "file/below", "dangling", "n" * 300, "nul\0"):
        with pytest.raises(ConfigError, match=r"^output_dir: .* cannot be used \(.*\); give a folder"):
            claim(RunFolder(tmp_path / name), config)
    with pytest.raises(ConfigError, match=r"^output_dir: /proc/run cannot be used"):
        claim(RunFolder("/proc/run"), config)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(folder: RunFolder, config: Config) -> None:
    folder.path.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"cannot be used \(Permission denied\)"):
        folder.check(config)


def test_a_folder_that_may_not_be_written_is_seen_before_it_is_tried(
    folder: RunFolder, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As user root sees no permissions, the question itself is answered here."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"cannot be used \(Permission denied\)"):
        folder.check(config)
    assert not folder.path.exists()


def test_a_file_where_checkpoints_go_is_refused(folder: RunFolder, config: Config) -> None:
    claim(folder, config)
    folder.checkpoints.write_text("x")
    with pytest.raises(ConfigError, match="checkpoints is not a folder; move it away"):
        claim(folder, config)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", '"done"', '{"status": "done"}', '{"status": "done", "step": "x"}']
)
def test_a_damaged_status_is_unknown_and_said(
    folder: RunFolder, config: Config, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    claim(folder, config)
    (folder.path / "status").write_text(text)
    assert claim(folder, config) is None
    assert "status is damaged and is not used" in capsys.readouterr().out
    assert json.loads((folder.path / "status").read_text())["status"] == "running"


def test_a_finished_run_is_one_with_its_export(folder: RunFolder, config: Config) -> None:
    claim(folder, config)
    add_checkpoint(folder, 4)
    folder.status.write("done", step=4)
    assert claim(folder, config) is None  # the export is gone: it is made again
    add_export(folder)
    folder.status.write("done", step=4)
    assert claim(folder, config) == 4
    assert json.loads((folder.path / "status").read_text()) == {"status": "done", "step": 4}
    assert claim(folder, config, total_steps=5) is None


def test_an_export_without_one_of_its_shards_is_none(folder: RunFolder, config: Config) -> None:
    claim(folder, config)
    add_checkpoint(folder, 4)
    add_export(folder)
    (folder.export / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "two"}}'
    )
    folder.status.write("done", step=4)
    assert claim(folder, config) is None


def test_checkpoints_that_are_gone_are_missed(folder: RunFolder, config: Config) -> None:
    """By `latest`, by run.json and by the status, whichever is left."""
    claim(folder, config)
    checkpoint = add_checkpoint(folder, 2)
    folder.note_saved(2)
    (checkpoint / "manifest.json").unlink()
    checkpoint.rmdir()
    with pytest.raises(ConfigError, match="latest names one; put the checkpoints back to go on"):
        claim(folder, config)
    (folder.checkpoints / "latest").unlink()
    folder.checkpoints.rmdir()
    with pytest.raises(ConfigError, match="run.json tells of step 2"):
        claim(folder, config)
    (folder.path / "run.json").unlink()
    folder.status.write("preempted", step=2)
    with pytest.raises(ConfigError, match="status tells of step 2"):
        claim(folder, config)
    assert json.loads((folder.path / "status").read_text())["status"] == "preempted"


def test_a_finished_run_needs_no_checkpoints_but_its_settings(
    tmp_path: Path, folder: RunFolder, config: Config
) -> None:
    claim(folder, config)
    folder.note_saved(4)
    add_export(folder)
    folder.status.write("done", step=4)
    assert claim(folder, config) == 4
    with pytest.raises(ConfigError, match="optim.projector.lr was 0.0001, is 0.5"):
        claim(folder, make_config(tmp_path, "optim.projector.lr=0.5"))


def test_half_written_checkpoints_go_at_the_next_start(folder: RunFolder, config: Config) -> None:
    claim(folder, config)
    kept = add_checkpoint(folder, 2)
    for name in ("step-00000003.tmp", "step-00000004.tmp"):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "x").write_text("x")
    (folder.checkpoints / "latest.12.part").write_text("step")
    claim(folder, config)
    assert {path.name for path in folder.checkpoints.iterdir()} == {kept.name, "latest"}


def test_a_damaged_config_of_a_run_is_told(folder: RunFolder, config: Config) -> None:
    claim(folder, config)
    add_checkpoint(folder, 2)
    (folder.path / "config.yaml").write_text("output_dir: [")
    with pytest.raises(ConfigError, match="config.yaml cannot be read, so nothing tells whether this is the same run"):
        claim(folder, config)


def test_the_id_stays_and_outlives_its_file(folder: RunFolder, config: Config) -> None:
    claim(folder, config)
    drawn = folder.id
    add_checkpoint(folder, 2)
    claim(folder, config)
    assert folder.id == drawn
    (folder.path / "run.json").write_text("{")
    claim(folder, config)
    assert folder.id == drawn and len(drawn) == 16


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, folder: RunFolder, config: Config) -> None:
    own = {"run": "a", "settings": settings_digests(config, "a")}
    require_own_checkpoint(Path("step"), own, config, "a")
    require_own_checkpoint(Path("step"), {}, config, "")  # of a run that began before there were ids
    for manifest in ({}, own | {"run": "b"}):
        with pytest.raises(ConfigError, match="step is a checkpoint of another run; take it out of"):
            require_own_checkpoint(Path("checkpoints/step"), manifest, config, "a")
    with pytest.raises(ConfigError, match="with another value of optim.projector.lr, train.seed"):
        require_own_checkpoint(Path("step"), own, make_config(tmp_path, "optim.projector.lr=0.5", "train.seed=2"), "a")
    require_own_checkpoint(Path("step"), own, make_config(tmp_path, "train.max_steps=9", "log.every_steps=2"), "a")


def test_digests_tell_no_value_and_leave_defaults_out(tmp_path: Path, config: Config) -> None:
    """A key that a later version adds with its default is in no older manifest and changes nothing."""
    digests = settings_digests(make_config(tmp_path, "optim.eps=1e-8", "train.seed=12345"), "a")
    assert "optim.eps" not in digests and "train.max_steps" not in digests
    assert "12345" not in json.dumps(digests)
    assert digests["train.seed"] != settings_digests(make_config(tmp_path, "train.seed=12345"), "b")["train.seed"]


EARLIER = {  # what the version before this law was written put into a manifest, for the run "a" of `make_config`
    "model.language_model.path": "fdccae5ad2648f4b",
    "model.vision_tower.path": "036c313b4c0573e8",
    "objective.sft": "275aa200143ec41c",
    "optim.language_model.lr": "832187cf980889b6",
    "optim.projector.lr": "88be58c294d040b1",
    "optim.vision_tower.lr": "bb6348eee9b4480c",
    "train.global_batch_size": "21c24146ad6272ad",
}


def test_digests_stay_those_of_earlier_versions(config: Config) -> None:
    assert EARLIER.items() <= settings_digests(config, "a").items()
    require_own_checkpoint(Path("step"), {"run": "a", "settings": EARLIER}, config, "a")


def test_an_objective_that_a_later_version_adds_changes_nothing(config: Config) -> None:
    """Its section is absent from the run, and from the manifest; one that the run has is another matter."""
    earlier = {key: digest for key, digest in EARLIER.items() if key != "objective.sft"}
    require_own_checkpoint(Path("step"), {"run": "a", "settings": earlier}, config, "a")
    of_sft = earlier | {"objective.dpo": "c18262aa04f7b01c"}
    with pytest.raises(ConfigError, match="with another value of objective.dpo "):
        require_own_checkpoint(Path("step"), {"run": "a", "settings": of_sft}, config, "a")


def test_a_run_that_an_earlier_version_began_goes_on(folder: RunFolder, config: Config) -> None:
    """Its config.yaml holds keys that are gone, and names a DeepSpeed JSON that is gone: a resume may take another."""
    claim(folder, config)
    add_checkpoint(folder, 2)
    earlier = to_yaml(config).replace("ds_configs/zero3.json", "gone.json")
    earlier = earlier.replace("data:\n", "data:\n  allow_pipe: false\n", 1)
    earlier = earlier.replace("  dpo:\n", "  dpo:\n    reference_per_token: false\n", 1)
    assert "gone.json" in earlier and "allow_pipe" in earlier and "reference_per_token" in earlier
    (folder.path / "config.yaml").write_text(earlier)
    claim(folder, config)
    assert (folder.path / "config.yaml").read_text() == to_yaml(config)
    (folder.path / "config.yaml").write_text(earlier.replace("allow_pipe: false", "allow_pipe: true"))
    with pytest.raises(
        ConfigError, match="cannot be read.*data.allow_pipe: found True, but the key is gone: no command"
    ):
        claim(folder, config)
