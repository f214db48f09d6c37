"""A real Slurm of two nodes on this machine, with a low and a high partition."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")

# Each node has its own configuration, with its own way to track the processes of a job.
PROCTRACK = {"node1": "linuxproc", "node2": "pgid"}
LINUXPROC_NODE, PGID_NODE = PROCTRACK

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdTimeout=10
ReturnToService=2
SlurmdParameters=config_overrides
DebugFlags=NO_CONF_HASH
MpiDefault=none
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeHostname={host} NodeAddr={address} Port={ports[1]} CPUs=4 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr={address} Port={ports[2]} CPUs=4 Gres=gpu:1
PartitionName=low Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime=5
PartitionName=high Nodes=node1,node2 PriorityTier=10
"""


class Cluster:
    """Submits jobs, shows them and signals them."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            # The batch scripts call `python`.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def command(self, *words: str, must_succeed: bool = True) -> str:
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not must_succeed, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, log: Path, *options: str, arguments: list[str]) -> str:
        """Submit a script, by default one of slurm/ as it stands; return the job number."""
        path = str(ROOT / "slurm" / script) if "/" not in script else script
        return self.command(
            "sbatch", "--parsable", f"--output={log}", *options, path, *arguments
        ).strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.command("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """Return the job once it is in one of the states."""
        job: dict[str, str] = {}

        def reached() -> bool:
            job.update(self.job(number))
            time.sleep(0.2)
            return job["JobState"] in states

        wait_for(reached, seconds=seconds)
        return job

    def resume(self, node: str) -> None:
        """Bring a node back, which Slurm refuses if it has registered again by itself."""
        resume = ("scontrol", "update", f"NodeName={node}", "State=RESUME")

        def is_back() -> bool:
            self.command(*resume, must_succeed=False)
            return "DOWN" not in self.command("scontrol", "show", "node", "--oneliner", node)

        wait_for(is_back)

    def leftovers(self, number: str) -> list[int]:
        """Return the processes that still belong to a job."""
        return [
            int(folder.name)
            for folder in Path("/proc").iterdir()
            if folder.name.isdecimal() and f"SLURM_JOB_ID={number}" in _environment(folder)
        ]


def _environment(process: Path) -> list[str]:
    try:
        return (process / "environ").read_text(errors="replace").split("\0")
    except OSError:
        return []  # it ended meanwhile


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """Start munge and Slurm, and stop them again; skip where they are not installed."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("Slurm's daemons start tasks as other users, which takes root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "state").mkdir()
    for name in ("node1", "node2"):
        (folder / f"spool-{name}").mkdir()
    ports = _free_ports(3)
    for name, proctrack in {"slurm": "linuxproc", **PROCTRACK}.items():
        configuration = CONFIGURATION.format(
            host=socket.gethostname(),
            address="127.0.0.1",
            ports=ports,
            folder=folder,
            proctrack=proctrack,
        )
        (folder / f"{name}.conf").write_text(configuration)
    (folder / "gres.conf").write_text(
        "NodeName=node1 Name=gpu File=/dev/zero\nNodeName=node2 Name=gpu File=/dev/full\n"
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster = Cluster(folder)
    try:
        _start(folder, "munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
               f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
               f"--seed-file={folder}/munged.seed")  # fmt: skip
        _start(folder, "slurmctld", "-c", "-f", str(folder / "slurm.conf"))
        for name in ("node1", "node2"):
            _start(folder, "slurmd", "-c", "-N", name, "-f", str(folder / f"{name}.conf"))
        wait_for(lambda: _idle(cluster) == 2, seconds=60)
        yield cluster
    finally:
        _stop(folder)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]


def _start(folder: Path, *command: str) -> None:
    with (folder / "daemons.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=30, check=False)
    assert done.returncode == 0, (folder / "daemons.log").read_text()


def _idle(cluster: Cluster) -> int:
    time.sleep(0.2)
    printed = cluster.command("sinfo", "--noheader", "--Node", "--format=%N %t", "-p", "low")
    return printed.count(" idle")


def _stop(folder: Path) -> None:
    for name in ("slurmd-node1", "slurmd-node2", "slurmctld", "munged"):
        path = folder / f"{name}.pid"
        if not path.exists():
            continue
        pid = int(path.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            for _ in range(50):
                time.sleep(0.1)
                os.kill(pid, 0)
            os.kill(pid, signal.SIGKILL)
    # What the tests themselves left behind, if they failed half way.
    markers = {f"SLURM_CONF={path}" for path in folder.glob("*.conf")}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and markers & {*_environment(process)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
