"""A real three-node SLURM on this host, for tests and benchmarks of what clusters do to jobs.

Partition ``cpu``: n1, n2; partition ``gpu``: n3, whose GPU is only a number. Every node has two
CPUs. Ports, keys and folders are the cluster's own, so that several live side by side. No systemd,
no cgroups, no accounting. Needs root and Debian's packages slurm-wlm and munge.

    python -m tests.cluster.slurm_cluster up|down DIR
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
START_LIMIT_S = 60.0
END_LIMIT_S = 60.0
_PORTS = range(20000, 32000)

_CONF = """\
ClusterName=basin
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1500
MpiDefault=none
ReturnToService=1
KillWait=5
SlurmdTimeout=60
MinJobAge={min_job_age}
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 Port={ports[1]} {node}
NodeName=n2 Port={ports[2]} {node}
NodeName=n3 Port={ports[3]} Gres=gpu:1 {node}
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=4:00:00 State=UP
PartitionName=gpu Nodes=n3 MaxTime=4:00:00 State=UP
"""
# More than the host may have: `config_overrides` lets nodes declare it all the same.
_NODE = (
    "NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 "
    "ThreadsPerCore=1 RealMemory=6000 State=UNKNOWN"
)


def missing() -> str:
    """Return why no cluster can be started here; empty where one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"no program {lacking[0]!r}: install Debian's slurm-wlm and munge"
    return "" if os.geteuid() == 0 else "a SLURM cluster of our own needs root"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, outside the range that outgoing connections use."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _living(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _wait(condition: Callable[[], bool], limit: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit:g} s: {what()}")
        time.sleep(0.1)


class SlurmCluster:
    """A cluster in a folder of its own; ``env`` makes SLURM's commands speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.conf = self.folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": _path()}

    # -- life -------------------------------------------------------------------------------

    def up(self, min_job_age: int = 300) -> None:
        """Start the daemons and wait for the nodes; ended jobs are forgotten after so many s."""
        if reason := missing():
            raise RuntimeError(reason)
        self.folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(
            _CONF.format(
                host=host,
                folder=self.folder,
                ports=_free_ports(4),
                node=_NODE.format(host=host),
                min_job_age=min_job_age,
            )
        )
        (self.folder / "gres.conf").write_text("NodeName=n3 Name=gpu Count=1 File=/dev/null\n")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(exist_ok=True)
        try:
            self._start_munged()
            self.start_slurmctld(fresh=True)
            for node in NODES:
                self.power_on(node)
            self.wait_for_idle_nodes(START_LIMIT_S)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End all jobs, daemons and whatever else they left; safe to call twice."""
        for process in [*self.job_processes(), *self._daemons()]:
            self._kill(process)
        # Once more: what a step's daemon started in its last moment.
        for process in [*self.job_processes(), *self._daemons()]:
            self._kill(process)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        # --force: the folder may lie under /tmp, and everything belongs to root.
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._run("munged", "--force", "--num-threads=4", *options)

    def start_slurmctld(self, *, fresh: bool = False) -> None:
        """Start the scheduler, with the jobs it knew unless ``fresh``, and wait till it answers."""
        self._run("slurmctld", *(["-c"] if fresh else []))
        _wait(lambda: self._ask("scontrol", "ping").returncode == 0, START_LIMIT_S, self.words)

    def stop_slurmctld(self) -> None:
        """Stop the scheduler in good order; jobs run on."""
        self._end("slurmctld", signal.SIGTERM)

    def restart_slurmctld(self) -> None:
        """Stop the scheduler and start it again."""
        self.stop_slurmctld()
        self.start_slurmctld()

    def power_off(self, node: str) -> None:
        """Take everything on a node away at once, its slurmd too; the scheduler is not told."""
        self._end(f"slurmd-{node}", signal.SIGKILL)
        while processes := self.job_processes(node=node):
            # First those that could still tell the scheduler how the others ended.
            for process in sorted(processes, key=lambda p: "stepd" not in p.info["name"]):
                self._kill(process)

    def power_on(self, node: str) -> None:
        """Start a node's slurmd; a job it had is lost, as FAILED unless the node was down."""
        self._run("slurmd", "-c", "-N", node)

    # -- what users and administrators do ---------------------------------------------------

    def squeue(self, *arguments: str) -> list[dict[str, str]]:
        """Return the jobs of the queue: id, name, partition, state (PENDING, ...), node, reason."""
        fields = ("id", "name", "partition", "state", "node", "reason")
        out = self.run("squeue", "--noheader", "--format=%i|%j|%P|%T|%N|%r", *arguments)
        return [dict(zip(fields, line.split("|"), strict=True)) for line in out.splitlines()]

    def running(self, partition: str = "cpu") -> list[dict[str, str]]:
        """Return the running jobs of a partition."""
        return self.squeue(f"--partition={partition}", "--states=RUNNING")

    def job(self, job_id: str) -> dict[str, str]:
        """Return what the scheduler holds of a job; empty once it has forgotten it."""
        out = self._ask("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(word.split("=", 1) for word in out.split() if "=" in word)

    def scancel(self, *job_ids: str) -> None:
        """Cancel jobs; all of them where none is named."""
        self.run("scancel", *(job_ids or [f"--user={psutil.Process().username()}"]))

    def shorten(self, job_id: str) -> None:
        """Let a job's walltime end now; the scheduler looks every half a minute."""
        self.run("scontrol", "update", f"JobId={job_id}", "EndTime=now")

    def set_node(self, node: str, state: str) -> None:
        """Set a node's state as an administrator does: down, drain, resume ..."""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def node_states(self) -> dict[str, str]:
        """Return the nodes' states in sinfo's words."""
        out = self._ask("sinfo", "--noheader", "--Node", "--format=%N %T").stdout
        return dict(line.split() for line in out.splitlines())

    # -- looking ----------------------------------------------------------------------------

    def job_processes(self, pattern: str = "", *, node: str = "") -> list[psutil.Process]:
        """Return living processes of jobs, SLURM's own of them included.

        ``pattern``: words of the command line that must occur; ``node``: on which node.
        """
        found = []
        for process in psutil.process_iter(["name"]):
            try:
                environ = process.environ()
                words = " ".join(process.cmdline())
                if environ.get("SLURM_CONF") != str(self.conf) or not _living(process):
                    continue
                if words.startswith("slurmstepd"):
                    # It knows its node no more, but what it started does.
                    environ = next((c.environ() for c in process.children()), {"SLURM_JOB_ID": ""})
            except psutil.Error:
                continue
            if (
                "SLURM_JOB_ID" in environ
                and pattern in words
                and (not node or environ.get("SLURMD_NODENAME") == node)
            ):
                found.append(process)
        return found

    def pools(self, node: str = "") -> list[psutil.Process]:
        """Return the managers of Parsl's worker pools that run in jobs."""
        return [
            p
            for p in self.job_processes("process_worker_pool.py", node=node)
            if "python" in Path(p.cmdline()[0]).name
            and "orchestrator.worker_pool" not in p.cmdline()
        ]

    def words(self) -> str:
        """Return what can be said of the cluster when a test fails."""
        try:
            queue = self._ask("squeue", "--long").stdout
            nodes = self._ask("sinfo", "--Node", "--long").stdout
        except (OSError, subprocess.SubprocessError) as exc:
            queue, nodes = str(exc), ""
        logs = [
            f"-- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-12:])
            for path in sorted(self.folder.glob("*.log"))
        ]
        return "\n".join([queue, nodes, *logs])

    def assert_empty(self, limit: float = END_LIMIT_S) -> None:
        """Wait for the queue to empty and all processes of jobs to end; fail where one stays."""
        _wait(lambda: not self.squeue(), limit, self.words)
        _wait(lambda: not self.job_processes(), limit, lambda: f"processes: {self.job_processes()}")

    def wait_for_idle_nodes(self, limit: float = END_LIMIT_S) -> None:
        """Wait until every node is idle; fail where one is not."""

        def idle() -> bool:
            states = self.node_states()
            return set(states) == set(NODES) and set(states.values()) == {"idle"}

        _wait(idle, limit, self.words)

    def mend(self) -> None:
        """Bring everything back to where `up` left it, whatever a test did."""
        if not self._alive("slurmctld"):
            self.start_slurmctld()
        for node in NODES:
            if not self._alive(f"slurmd-{node}"):
                self.power_on(node)
        self.scancel()
        for node, state in self.node_states().items():
            if state.startswith(("down", "drain")):
                self._ask("scontrol", "update", f"NodeName={node}", "State=resume")
        _wait(lambda: not self.squeue(), END_LIMIT_S, self.words)
        for process in self.job_processes():
            self._kill(process)
        self.wait_for_idle_nodes()

    # -- processes --------------------------------------------------------------------------

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands; return what it printed; fail with its words."""
        done = self._ask(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=120, check=False
        )

    def _run(self, *command: str) -> None:
        """Start a daemon, which goes to the background by itself."""
        log = self.folder / "start.log"
        with open(log, "a") as file:
            # Not a pipe: what goes to the background would keep it open.
            done = subprocess.run(
                command,
                env={k: v for k, v in self.env.items() if not k.startswith("SLURM_JOB")},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.folder,
                timeout=START_LIMIT_S,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {log.read_text().strip()}")

    def _daemon(self, name: str) -> psutil.Process | None:
        try:
            process = psutil.Process(int((self.folder / f"{name}.pid").read_text()))
            # A number may have gone to another process since.
            mine = process.environ().get("SLURM_CONF") == str(self.conf)
        except (OSError, ValueError, psutil.Error):
            return None
        return process if mine and _living(process) else None

    def _daemons(self) -> list[psutil.Process]:
        names = (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged")
        return [daemon for name in names if (daemon := self._daemon(name)) is not None]

    def _alive(self, name: str) -> bool:
        return self._daemon(name) is not None

    def _end(self, name: str, number: int) -> None:
        if (daemon := self._daemon(name)) is not None:
            daemon.send_signal(number)
            _wait(lambda: not _living(daemon), END_LIMIT_S, lambda: f"{name} does not end")
        (self.folder / f"{name}.pid").unlink(missing_ok=True)

    @staticmethod
    def _kill(process: psutil.Process) -> None:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            return
        _wait(lambda: not _living(process), 10.0, lambda: f"{process} survives a kill")


def main() -> None:
    """Bring a cluster up in a folder, or take it down."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.slurm_cluster")
    parser.add_argument("verb", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    cluster = SlurmCluster(arguments.folder)
    if arguments.verb == "down":
        cluster.down()
        return
    if reason := missing():
        sys.exit(reason)
    cluster.up()
    print(cluster.run("sinfo", "--Node", "--format=%N %P %T %c %m %G"), end="")
    print(f"export SLURM_CONF={cluster.conf}")


if __name__ == "__main__":
    main()
