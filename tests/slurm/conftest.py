"""One cluster for the tests of a process; it takes a second to start."""

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def running():
    """A running cluster."""
    if reason := missing():
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running):
    """The running cluster, with all nodes up."""
    running.restore()
    return running
