"""What can happen to a job that trains: event(cluster, job)."""

import os
import signal

from tests.slurm.cluster import Cluster


def to_one_rank(cluster: Cluster, job: int) -> None:
    """SIGUSR1 to rank 1, and to no other."""
    os.kill(cluster.ranks(job)[1], signal.SIGUSR1)


def to_all_ranks(cluster: Cluster, job: int) -> None:
    """SIGUSR1 to all of them, as before the time limit."""
    cluster.run("scancel", "--signal=USR1", str(job))


def to_the_script(cluster: Cluster, job: int) -> None:
    """SIGUSR1 to the batch script alone."""
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))


def requeue(cluster: Cluster, job: int) -> None:
    """As an administrator or the user may do it."""
    cluster.run("scontrol", "requeue", str(job))


def pre_empt(cluster: Cluster, job: int) -> None:
    """A job of the higher partition takes all nodes, and is done at once."""
    flags = ["--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.wait(int(cluster.run("sbatch", "--parsable", *flags)), "COMPLETED")


def kill_rank(cluster: Cluster, job: int) -> None:
    """As the kernel does when memory is short."""
    os.kill(cluster.ranks(job)[1], signal.SIGKILL)


def lose_node(cluster: Cluster, job: int) -> None:
    """Of two nodes, the one that the script does not run on. Slurm notices within 26 s."""
    assert (cluster.job(job)["NodeList"], cluster.job(job)["BatchHost"]) == ("n[1-2]", "n1")
    cluster.kill_node("n2")


def lose_node_at_once(cluster: Cluster, job: int) -> None:
    """The same, and Slurm is told."""
    lose_node(cluster, job)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")


EVENTS = (to_one_rank, to_all_ranks, to_the_script, requeue, pre_empt, kill_rank, lose_node_at_once)
