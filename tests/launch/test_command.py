"""The command line as a user meets it: one process, real files, one sentence for what he can mend."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.pack import PackOptions, pack
from launch.command import main, tell_error
from pivot import train
from pivot.config import KEYS, MISSING, REPOSITORY
from pivot.data import remote
from pivot.run import checkpoint
from pivot.system.distributed import FailedElsewhere
from tests.kit.runs import write_dpo_run
from tests.kit.sets import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dpo_run(tmp_path_factory.mktemp("launch"))


def command(folder: Path, *overrides: str, objective: str = "dpo") -> int:
    return main(objective, [str(folder / "run.yaml"), *overrides])


def test_check_shows_what_would_run_and_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--check") == 0
    shown = capsys.readouterr().out
    assert "24 of 24 samples" in shown
    assert re.search(r"memory     about [\d.]+ of [\d.]+ GiB a rank: weights .*, activations", shown)
    assert re.search(r"work       [\d.]+ MFLOP a pair, [\d.]+ MFLOP in all", shown)
    assert "vision_tower 0.0001, projector 0.001, language_model 0.0001" in shown
    assert f"prompts    the template of {folder}/llava/chat_template.jinja\n" in shown
    assert f"pixels     squash, bicubic: the image processor at {folder}/llava\n" in shown
    assert not (folder / "run").exists()


def test_the_first_screen_counts_the_samples_with_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fourth of the 24 pairs has none."""
    assert command(folder, "--check") == 0
    assert "tokens each; in 18 of 24 samples" in capsys.readouterr().out


TEXT_ALONE = ["optim.vision_tower.lr=null", "optim.projector.lr=null"]


def test_what_images_go_through_is_not_trained_without_any(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By --check and by the run itself, before weights load; frozen, text alone may be trained on."""
    rows = [{"prompt": f"What is {i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    pack(PackOptions(source=write_rows(folder / "texts", rows), out=folder / "texts-set"))
    data = f"data.train={folder}/texts-set"
    for flags, name, rate in (([], "vision_tower", "0.0001"), (TEXT_ALONE[:1], "projector", "0.001")):
        for check in ([], ["--check"]):
            assert command(folder, *check, data, *flags) == 2
            shown = capsys.readouterr().err
            said = f"optim.{name}.lr is {rate}, but none of the 8 samples of data.train has an image; pack the data"
            assert shown.count("error:") == 1 and said in shown
    assert not (folder / "run").exists()
    assert command(folder, "--check", data, *TEXT_ALONE) == 0
    assert "in 0 of 8 samples" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stretched(folder: Path) -> Path:
    """The model with positions that follow the longest text of a row, trained on 256 of them; without weights."""
    llava = shutil.copytree(folder / "llava", folder / "stretched")
    (llava / "model.safetensors").unlink()
    config = json.loads((llava / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config["text_config"]["max_position_embeddings"] = 256
    (llava / "config.json").write_text(json.dumps(config))
    return llava


@pytest.mark.parametrize("key", ["init_from", "objective.dpo.reference"])
def test_rows_that_are_too_long_for_its_positions_are_refused_by_check(
    folder: Path, stretched: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, "--check", f"{key}={stretched}") == 2
    assert "data.max_tokens: 2048 tokens, but the positions of this qwen2" in capsys.readouterr().err
    assert command(folder, "--check", f"{key}={stretched}", "data.max_tokens=256") == 0
    assert "positions " not in capsys.readouterr().out


def test_pairs_longer_than_the_model_was_made_for_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--check", "data.max_tokens=2049") == 0
    said = "positions  2049 tokens are more than the 2048 that the language model was made for\n"
    assert said in capsys.readouterr().out


def test_print_config_resolves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--print-config", "train.seed=5", "--local_rank=0") == 0
    assert "seed: 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train={folder}/nothing"], "holds no manifest.json"),
        (["init_from={folder}/nothing"], "no folder"),
        (["init_from={folder}/set"], "no configuration that transformers knows"),
        (["train.max_tokens_per_micro_batch=20"], "train.max_tokens_per_micro_batch is 20, but the longest pair"),
        (["data.max_tokens=10"], "no sample is left to train on"),
        (["objective.dpo.loss=sigmod"], "objective.dpo.loss: found 'sigmod'"),
        (["objective.dpo.reference={folder}/nothing"], "no folder"),
        (["checkpoint.resume=required"], "holds no checkpoint"),
        (["train.precision=bf16", "deepspeed=ds_configs/zero0.json"], "no fp32 gradient accumulation for bf16"),
        (["model.vision_tower.layer=-9"], "model.vision_tower.layer: -9, but"),
        (["model.projector=linear"], "model.projector"),
        (["data.chat_template=nothing.jinja"], "data.chat_template"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    folder: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, *(text.format(folder=folder) for text in overrides)) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors


def test_longer_pairs_are_counted_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--check", "data.max_tokens=86") == 0
    assert "longer than data.max_tokens" in capsys.readouterr().out


def test_a_shard_cut_in_half_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "set", tmp_path / "set")
    shard = min((tmp_path / "set" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert command(folder, f"data.train={tmp_path}/set") == 2
    assert shard.name in capsys.readouterr().err


def test_someone_elses_folder_is_not_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert command(folder, f"output_dir={tmp_path}") == 2
    assert "holds files but no config.yaml" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_in_use_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(); time.sleep(60)"
    )
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", holder, tmp_path / "run/lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            assert command(folder, f"output_dir={tmp_path}/run") == 2
        finally:
            other.kill()
    assert "is being written by" in capsys.readouterr().err


def test_usage_names_the_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--verbose") == 2
    assert "unknown flag --verbose" in capsys.readouterr().err
    assert main("dpo", ["--help"]) == 0
    assert "usage: deepspeed launch/train_dpo.py CONFIG" in capsys.readouterr().out


def test_help_says_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """With its default, its values, and who may change it; a section's settings stand under its name."""
    assert main("dpo", ["--help"]) == 0
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for key in KEYS.values():
        head = key.name + ":" if key.section is not None or key.default == MISSING else key.name + "="
        assert sum(line.startswith(head) for line in lines) == 1, key.name
        assert " ".join(key.text.split()) in " ".join(lines), key.name
    assert "data.workers=2 0 to 256 resume, ranks" in lines
    assert "optim.schedule=cosine cosine | linear | constant" in lines
    assert "train.global_batch_size: must be given at least 1" in lines
    assert lines[lines.index("model: " + KEYS["model"].text) + 1].startswith("model.projector=mlp2x_gelu")
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("script", ["train_sft", "train_dpo", "train_kto"])
def test_scripts_start_from_anywhere(script: str, tmp_path: Path) -> None:
    """A checkout works without being installed, and --help needs no package."""
    path = REPOSITORY / "launch" / f"{script}.py"
    done = subprocess.run([sys.executable, "-S", path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "CONFIG" in done.stdout


def test_a_full_disk_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError) as found:
        checkpoint.require_space(tmp_path, 2**60)
    assert tell_error(found.value) == 1
    told = capsys.readouterr().err
    assert f"{tmp_path}: No space left on device (a checkpoint takes {2**30:.2f} GiB" in told
    assert "the same command goes on" in told and "Traceback" not in told


def test_a_set_out_of_reach_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)
    with pytest.raises(OSError) as found:
        remote.ShardCache(tmp_path).read("http://127.0.0.1:1/manifest.json")
    assert tell_error(found.value) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: http://127.0.0.1:1/manifest.json: ") and "(7 tries); see whether the server" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        FailedElsewhere("opening run failed on rank 0: ConfigError: data.train: ..."),
        RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:24739"),
    ],
)
def test_another_ranks_error_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """That rank tells the whole; a traceback from here would bury it."""
    assert tell_error(error) == 1
    assert capsys.readouterr().err == f"[rank 0] {error}\n"


def test_one_step_without_a_launcher(folder: Path) -> None:
    """The whole way on one process; a second start says that the run is finished and draws its report again, and a
    changed rate is refused."""
    script = [sys.executable, REPOSITORY / "launch" / "train_dpo.py", folder / "run.yaml"]
    script += ["deepspeed=ds_configs/zero0.json", f"output_dir={folder}/whole"]
    first = subprocess.run(script, capture_output=True, text=True, cwd=folder)
    assert first.returncode == 0, first.stderr
    status = json.loads((folder / "whole" / "status").read_text())
    assert (status["status"], status["step"]) == ("done", 1)
    assert (folder / "whole" / "export" / "model.safetensors").is_file()
    assert ">running<" not in (folder / "whole" / "report.html").read_text()
    assert first.stdout.count(f"report     {folder}/whole/report.html\n") == 1
    (folder / "whole" / "report.html").unlink()
    again = subprocess.run(script, capture_output=True, text=True, cwd=folder)
    assert again.returncode == 0 and "this run is finished: 1 steps done" in again.stdout
    assert "<svg" in (folder / "whole" / "report.html").read_text()
    other = subprocess.run([*script, "optim.projector.lr=2e-3"], capture_output=True, text=True, cwd=folder)
    assert other.returncode == 2 and "optim.projector.lr was 0.001, is 0.002" in other.stderr


def test_a_report_that_cannot_be_written_is_only_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is done, on rank 0; the others and --check say nothing of it."""
    monkeypatch.setattr(train, "train", lambda config, *, check_only: train.DONE)
    run = f"output_dir={tmp_path}/run"
    assert command(folder, run) == 0
    told = capsys.readouterr().out
    assert (
        told.startswith(f"no report (ValueError: {tmp_path}/run holds no config.yaml, ") and "launch/report.py" in told
    )
    assert command(folder, run, "--check") == 0
    monkeypatch.setenv("RANK", "1")
    assert command(folder, run) == 0
    assert capsys.readouterr().out == ""


def test_two_tasks_of_srun_without_ranks_are_refused(folder: Path, tmp_path: Path) -> None:
    """They would both train, each as the only one, and write one folder."""
    told = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    command = [sys.executable, REPOSITORY / "launch/train_dpo.py", folder / "run.yaml", f"output_dir={tmp_path}/run"]
    done = subprocess.run(command, env=told | step | {"SLURM_PROCID": "1"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: srun started 2 processes without RANK")
    assert "MASTER_PORT=29500 python" in done.stderr and not (tmp_path / "run").exists()
