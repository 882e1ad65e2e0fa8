"""One data set for all tests, and the processes that begin with them."""

import os
import subprocess
import sys

import pytest

# A process that has asked the driver how many GPUs there are cannot fork ranks that use them; NVML may be asked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

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
def apart(request, tmp_path_factory, drawn):
    """See tests.gpu.runs."""
    from tests.gpu.runs import Apart

    modules = {item.module for item in request.session.items if item.module.__name__.startswith(__package__)}
    tasks = {name: task for module in modules for name, task in getattr(module, "APART", {}).items()}
    begun = Apart(tasks, tmp_path_factory.mktemp("apart"))
    yield begun
    begun.close()


@pytest.fixture
def note():
    """note(text): a line at the end of the tests, for a number worth knowing."""
    return NOTES.append


def pytest_terminal_summary(terminalreporter):
    for text in NOTES:
        terminalreporter.write_line(text)
