"""A SLURM cluster of two nodes on this one machine: munged, slurmctld and two slurmd of its own, in one folder.

Nothing is installed and nothing outside of the folder is written. The daemons run as this user, on free ports, and are
gone at the end; a SLURM that the machine itself may be part of is neither asked nor touched.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

Value = TypeVar("Value")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# Both nodes are this machine. Ranks meet at the name of the first, so that name must resolve ("localhost" is refused).
HOST = socket.gethostname().split(".")[0]
NODES = (HOST, f"{HOST}-2")
CPUS_PER_NODE = 4  # more than there may be: what a job asks for is counted, not bound
GPUS_PER_NODE = 2  # empty files: SLURM counts them and hands out their numbers
START_WITHIN_S = 60.0

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_min_interval=500000
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
InactiveLimit=0
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=2 PreemptMode=OFF
"""


def missing_program() -> str | None:
    """The first of the programs that is not on this machine; Debian has them in slurm-wlm and munge."""
    return next((name for name in PROGRAMS if _find(name) is None), None)


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")


class Cluster:
    """A running cluster; its commands are found by `run`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints; AssertionError with what it says where it fails."""
        environment = self.environment | variables
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, Reason, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_now(self, number: str) -> None:
        """Start a requeued job that SLURM would let wait for two minutes.

        The nodes must be done with it for a second or two: what is allocated in the second in which they were told to
        forget the job they refuse ("Job credential revoked"), and it counts as failed.
        """
        wait_until(lambda: not any("comp" in state for state in self._node_states()), 60.0)
        time.sleep(3.0)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def log(self, number: str) -> str:
        """What the controller wrote about a job."""
        lines = (self.folder / "slurmctld.log").read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if f"JobId={number}" in line)

    def _start(self, program: str, *arguments: str) -> None:
        path, log = _find(program), self.folder / f"{program}.out"
        assert path is not None
        with log.open("ab") as output:
            command = [path, *arguments]
            daemon = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        self._daemons.append(daemon)

    def start(self) -> None:
        """RuntimeError with what the daemons say where the cluster does not come up."""
        self._write_configuration()
        munge = self.folder / "munge.key"
        munge.write_bytes(os.urandom(128))
        munge.chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        names = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--force", *names)
        wait_until((self.folder / "munge.socket").exists, START_WITHIN_S)
        self._start("slurmctld", "-D")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        try:
            wait_until(self._is_up, START_WITHIN_S)
        except AssertionError as error:
            logs = "".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))
            raise RuntimeError(f"the cluster did not come up\n{logs}") from error

    def _is_up(self) -> bool:
        return self._node_states() == {f"{node} idle" for node in NODES}

    def _node_states(self) -> set[str]:
        path = _find("sinfo")
        assert path is not None
        command = [path, "--noheader", "--Node", "--format=%N %t"]  # a line for each node and partition
        return set(subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.splitlines())

    def _write_configuration(self) -> None:
        user, ports = getpass.getuser(), _free_ports(1 + len(NODES))
        size = f"CPUs={CPUS_PER_NODE} RealMemory=2000 Gres=gpu:{GPUS_PER_NODE}"
        nodes = [
            f"NodeName={name} NodeHostname={HOST} NodeAddr=127.0.0.1 Port={port} {size} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(user=user, folder=self.folder, controller=ports[0], nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        for number in range(GPUS_PER_NODE):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        (self.folder / "state").mkdir()

    def stop(self) -> None:
        """End what is running and the daemons, those that were started last first."""
        with contextlib.suppress(AssertionError):
            self.run("scancel", "--user", getpass.getuser())
            wait_until(lambda: not self.run("squeue", "--noheader").strip(), 60.0)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def wait_until(look: Callable[[], Value | None], within_s: float) -> Value:
    """The first true thing that `look` gives; AssertionError after `within_s`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if seen := look():
            return seen
        time.sleep(0.2)
    raise AssertionError(f"waited {within_s:g} s for {look}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """In /tmp, and not in pytest's folder: a socket's path may have 107 letters."""
    with TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
