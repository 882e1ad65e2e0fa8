"""One thread: the tensors are tiny, and on a busy machine two threads wait for each other, up to 50 times longer."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)
