"""What a person can get wrong, through the command line.

Each ends with exit code 2 and an error that names the place and the fix, before anything starts where it can be known
then; and nothing is left behind that looks whole: no run folder, or no checkpoint and no evaluation in it.
"""

import shutil
from pathlib import Path

import pytest

from dist_fair import cli
from tests.bad_input.making import data_set


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A healthy data set; tests only read it."""
    return data_set(tmp_path_factory.mktemp("good"))


@pytest.fixture
def data(good, tmp_path):
    """A copy of it to be spoilt; pass it on as data.root."""
    return Path(shutil.copytree(good, tmp_path / "data"))


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["train", f"recipe={good}/quick.yaml", f"data={good}/card.yaml", f"out={out}"]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def train(good, tmp_path, capsys):
    """Trains on the healthy data set, with overrides: (exit code, stdout, stderr)."""

    def go(*overrides: str, data: Path = good):
        capsys.readouterr()
        files = [f"recipe={good}/quick.yaml", f"data={good}/card.yaml", f"data.root={data}"]
        code = cli.main(["train", *files, f"out={tmp_path / 'out'}", *overrides])
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def refused(train, tmp_path):
    """The error of a run that is refused before it starts; nothing may be left of it."""

    def go(*overrides: str, **data: Path) -> str:
        code, out, error = train(*overrides, **data)
        assert (code, out) == (2, "")
        assert error.startswith("error: ")
        assert error.count("error: ") == 1
        assert not (tmp_path / "out").exists()
        return error

    return go
