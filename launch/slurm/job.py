"""What the job scripts of this folder ask about a run: whether to start it, and whether to submit it again.

    python launch/slurm/job.py begin SCRIPT CONFIG [key=value ...]      before the ranks start
    python launch/slurm/job.py end CODE SCRIPT CONFIG [key=value ...]   after they ended, with srun's exit code
    python launch/slurm/job.py line FILE NUMBER                         the words of a sweep's line, each ended by NUL

`end` goes by RUN/status, since launchers lose exit codes. RUN/slurm.json remembers, for this job, what was saved when
it last started: a start behind which nothing new is saved is an idle one, and MAX_IDLE_STARTS of them in a row end it.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pivot.config_load import load_config  # noqa: E402
from pivot.system.files import read_object, write_json  # noqa: E402
from pivot.system.redact import tell  # noqa: E402

# Done; over and not to be submitted again; for the user to mend; submit again.
OK, FAILED, USAGE_ERROR, AGAIN = 0, 1, 2, 75
MAX_IDLE_STARTS = 3
TO_MEND = ("ConfigError:", "ValueError:")  # how the reason in RUN/status begins that the same command meets again


@dataclass(frozen=True)
class Start:
    """What RUN/slurm.json holds: how things stood when the job's last start began."""

    job: str
    saved: int  # the step of the newest checkpoint
    idle: int  # starts in a row, before this one, that saved nothing new
    status_at: int  # when RUN/status was written, in ns; 0: not yet


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as job scripts read it."""

    folder: Path

    @property
    def saved(self) -> int:
        step = read_object(self.folder / "run.json").get("saved")
        return step if isinstance(step, int) else 0

    @property
    def status(self) -> dict[str, Any]:
        return read_object(self.folder / "status")

    @property
    def status_at(self) -> int:
        path = self.folder / "status"
        return path.stat().st_mtime_ns if path.is_file() else 0

    def last_start(self, job: str) -> Start:
        """That of this job; a fresh one where another job wrote there."""
        seen = read_object(self.folder / "slurm.json")
        if seen.keys() == Start.__dataclass_fields__.keys() and seen["job"] == job:
            return Start(**seen)
        return Start(job, saved=-1, idle=0, status_at=0)

    def write_start(self, start: Start) -> None:
        write_json(self.folder / "slurm.json", asdict(start))


def open_run(script: str, words: list[str]) -> Run:
    """The run that `SCRIPT CONFIG [key=value ...]` trains. ValueError as the script itself would raise it."""
    objective = Path(script).stem.removeprefix("train_")
    words = [word for word in words if not word.startswith("-")]
    if not words or objective not in ("dpo", "sft", "kto"):
        raise ValueError(f"found {shlex.join([script, *words])}, expected launch/train_dpo.py CONFIG [key=value ...]")
    return Run(Path(load_config(words[0], words[1:], objective).output_dir))


def begin(run: Run, job: str, limit: int) -> int:
    """Note this start. OK, or FAILED when the starts before it came to nothing too often."""
    idle = count_idle(run.last_start(job), run.saved)
    if idle >= limit:
        tell(f"error: {_give_up(run, idle)}", to=sys.stderr)
        return FAILED
    run.write_start(Start(job, run.saved, idle, run.status_at))
    tell(f"starting {run.folder} behind step {run.saved}" + (f"; {idle} starts in a row saved nothing" if idle else ""))
    return OK


def count_idle(last: Start, saved: int) -> int:
    """Starts in a row that saved nothing new, the last one among them."""
    return 0 if saved > last.saved else last.idle + 1


def end(run: Run, job: str, limit: int, code: int) -> int:
    """OK, FAILED or AGAIN, and a sentence that says why."""
    last = run.last_start(job)
    idle = count_idle(last, run.saved)
    verdict, sentence = judge(run.status, unchanged=run.status_at == last.status_at, code=code)
    if verdict == AGAIN and idle >= limit:
        verdict, sentence = FAILED, f"{sentence}; {_give_up(run, idle)}"
    tell(sentence, to=sys.stdout if verdict in (OK, AGAIN) else sys.stderr)
    return verdict


def judge(status: dict[str, Any], *, unchanged: bool, code: int) -> tuple[int, str]:
    """(OK, FAILED or AGAIN, why) for a run that left `status`, which a start that got nowhere left `unchanged`."""
    name, reason = status.get("status"), str(status.get("reason", ""))
    if name == "done" and (code == OK or not unchanged):
        return OK, "done"
    if unchanged and code == USAGE_ERROR:
        return FAILED, "error: the start was refused; mend what its sentence above says and submit it again"
    if name == "failed" and not unchanged and reason.startswith(TO_MEND):
        return FAILED, f"error: {reason}; mend it and submit it again"
    if name == "preempted" and not unchanged and reason.startswith("stopped by the file"):
        return FAILED, f"{reason} and saved at step {status.get('step')}; submit the same command again to go on"
    if name == "preempted" and not unchanged:
        return AGAIN, f"preempted and saved at step {status.get('step')}; the same command goes on"
    if name == "failed" and not unchanged:
        return AGAIN, f"failed ({reason}); the same command goes on"
    left = f"RUN/status: {name or 'none'}"
    return AGAIN, f"ended with exit code {code} and left no reason ({left}); the same command goes on"


def _give_up(run: Run, idle: int) -> str:
    return (
        f"{idle} starts in a row saved nothing behind step {run.saved}, so it is not started again; look into the log, "
        f"then submit it anew (MAX_IDLE_STARTS in the environment allows more than {MAX_IDLE_STARTS})"
    )


def read_line(file: str, number: int) -> list[str]:
    """The words of the line with this number, counted from 1 without comments and empty lines, quoted as in a shell."""
    lines = [line for line in Path(file).read_text("utf-8").splitlines() if shlex.split(line, comments=True)]
    if not 1 <= number <= len(lines):
        raise ValueError(f"{file} has {len(lines)} line(s), but the array a task {number}; give --array=1-{len(lines)}")
    words = shlex.split(lines[number - 1], comments=True)
    for word in words:
        if "=" not in word:
            raise ValueError(f"{file}: line {number} holds {word!r}, expected key=value words")
    if not any(word.startswith("output_dir=") for word in words):
        raise ValueError(f"{file}: line {number} has no output_dir=, so that its run would write into another's folder")
    return words


def main(arguments: list[str]) -> int:
    try:
        return _run(*arguments)
    except (ValueError, OSError) as error:
        tell(f"error: {error}", to=sys.stderr)
        return USAGE_ERROR


def _run(command: str, *words: str) -> int:
    if command == "line":
        sys.stdout.write("".join(f"{word}\0" for word in read_line(words[0], int(words[1]))))
        return OK
    code, words = (int(words[0]), words[1:]) if command == "end" else (OK, words)
    if "--check" in words:  # leaves no status
        return OK if code == OK else FAILED
    run, limit = open_run(words[0], list(words[1:])), int(os.environ.get("MAX_IDLE_STARTS", MAX_IDLE_STARTS))
    job = os.environ["SLURM_JOB_ID"]
    return end(run, job, limit, code) if command == "end" else begin(run, job, limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
