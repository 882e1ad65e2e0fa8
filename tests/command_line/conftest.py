"""Runs in this process are compared with runs of several ranks, which are on the CPU."""

from unittest import mock

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def no_gpu():
    with mock.patch.object(torch.cuda, "device_count", return_value=0):
        yield
