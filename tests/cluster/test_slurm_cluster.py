"""The test cluster does what a real one does to jobs, and nothing is left of it afterwards."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import until


def submit(cluster: SlurmCluster, *options: str, command: str = "exec sleep 300") -> str:
    """Submit a job that has its node when this returns; return its id."""
    words = cluster.run(
        *("sbatch", "--no-requeue", "--mem=100", f"--output={cluster.folder / 'job.txt'}"),
        *(*options, f"--wrap={command}"),
    )
    job_id = words.split()[-1]
    until(lambda: cluster.job(job_id).get("JobState") == "RUNNING", otherwise=cluster.words)
    return job_id


def test_jobs_end_as_they_do_on_a_cluster(slurm_cluster: SlurmCluster) -> None:
    def state_at_end(job_id: str) -> str:
        until(lambda: not slurm_cluster.squeue(f"--jobs={job_id}"), otherwise=slurm_cluster.words)
        slurm_cluster.assert_empty()
        return slurm_cluster.job(job_id)["JobState"]

    job_id = submit(slurm_cluster)
    slurm_cluster.restart_slurmctld()
    (job,) = slurm_cluster.running()
    assert job["id"] == job_id
    slurm_cluster.scancel(job_id)
    assert state_at_end(job_id) == "CANCELLED"

    job_id = submit(slurm_cluster, "--nodelist=n2")
    until(lambda: slurm_cluster.job_processes("sleep", node="n2"))
    slurm_cluster.set_node("n2", "down")
    assert state_at_end(job_id) == "NODE_FAIL"
    assert slurm_cluster.node_states() == {"n1": "idle", "n2": "down", "n3": "idle"}

    job_id = submit(slurm_cluster, "--partition=gpu", "--gpus=1")
    until(lambda: slurm_cluster.job_processes("sleep", node="n3"))
    slurm_cluster.power_off("n3")
    assert not slurm_cluster.job_processes()
    slurm_cluster.set_node("n3", "down")
    # Which of the two depends on whether the job's own daemon had a last word.
    assert state_at_end(job_id) in ("NODE_FAIL", "FAILED")


def test_two_clusters_live_side_by_side_and_leave_nothing(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    other = SlurmCluster(tmp_path / "other")
    other.up()
    try:
        submit(other)
        assert not slurm_cluster.squeue()
        assert len(other.running()) == 1
        until(lambda: other.job_processes("sleep"))
        assert not slurm_cluster.job_processes()
    finally:
        other.down()
    assert not other.job_processes()
    ports = [
        int(word.split("=")[1])
        for word in other.conf.read_text().split()
        if word.startswith(("SlurmctldPort=", "Port="))
    ]
    assert len(ports) == 4
    for port in ports:
        with socket.socket() as probe:
            # In use would be refused.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    slurm_cluster.wait_for_idle_nodes()
