"""Nothing of a test's cluster stays behind, however the test ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, processes

ROOT = Path(__file__).parents[2]


def hold(folder: str) -> None:
    """A cluster at work, until somebody ends this process."""
    with Cluster() as cluster:
        cluster.run("sbatch", "--wrap=srun sleep 100", cwd=folder)
        cluster.until(lambda: any("SLURM_PROCID" in one for _, one in processes(cluster.folder)), "a job")
        print(cluster.folder, flush=True)
        time.sleep(100)


@pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed(tmp_path, number):
    program = f"from tests.slurm.test_cluster import hold; hold({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, cwd=ROOT)  # fmt: skip
    folder = Path(process.stdout.readline().strip())
    assert len(processes(folder)) >= 8  # six daemons, a script, a task
    process.send_signal(number)
    process.communicate()
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists()
    assert not processes(folder)
