"""Runs in this process are compared with runs of several ranks, which are on the CPU."""

from unittest import mock

import pytest
import torch

from tests.command_line.runs import card

pytest.register_assert_rewrite("tests.command_line.trajectory")


@pytest.fixture(scope="package", autouse=True)
def no_gpu():
    with mock.patch.object(torch.cuda, "device_count", return_value=0):
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The card of a small data set; tests only read it."""
    return card(tmp_path_factory.mktemp("drawn"))


def pytest_generate_tests(metafunc):
    """The tests of a `Trajectory` go over the bugs and variants of its class."""
    for argument, table in (("bug", "bugs"), ("variant", "exact")):
        if metafunc.cls and argument in metafunc.fixturenames:
            metafunc.parametrize(argument, [*getattr(metafunc.cls, table)])
