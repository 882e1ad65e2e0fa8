"""One data set for all tests, and the processes that begin with them."""

import os
import subprocess
import sys
from inspect import signature

import pytest

# A process that has asked the driver how many GPUs there are cannot fork ranks that use them; NVML may be asked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Several processes share the cores: threads that wait for each other would be many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS reads it once a process, and train.deterministic=true comes late in that of pytest.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NOTES: list[str] = []


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The demo faces, few of them: 150 training images; DIST_FAIR_DATA names their folder from here on."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "dist_fair.shards", "demo", "--scale", "0.05", "--out", str(folder / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    os.environ["DIST_FAIR_DATA"] = str(folder)
    return folder / "demo"


@pytest.fixture(scope="session", autouse=True)
def apart(request, tmp_path_factory):
    """See tests.gpu.runs. What begins is that of the modules of which tests were chosen."""
    from tests.gpu.runs import Apart

    chosen = [item for item in request.session.items if "gpu" in item.keywords and not item.get_closest_marker("skip")]
    tasks = {}
    for module in dict.fromkeys(item.module for item in chosen):
        tasks |= getattr(module, "APART", {})
    if tasks:
        request.getfixturevalue("drawn")
    begun = Apart(tasks, tmp_path_factory.mktemp("apart"))
    yield begun
    begun.close()


def pytest_collection_modifyitems(items):
    """Who looks at what is made apart comes last: until then there is work here."""
    items.sort(key=lambda item: "gpu" in item.keywords and "apart" in signature(item.function).parameters)


@pytest.fixture
def note():
    """note(text): a line at the end of the tests, for a number worth knowing."""
    return NOTES.append


def pytest_terminal_summary(terminalreporter):
    for text in NOTES:
        terminalreporter.write_line(text)
