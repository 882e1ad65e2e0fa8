"""What holds of all tests: those marked `gpu` need one."""

import os

import pytest

STAND_IN = "DIST_FAIR_GPU_TESTS_ON"  # =cpu: tests/gpu on the CPU instead, to try the tests themselves


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or os.environ.get(STAND_IN) == "cpu":
        return
    import torch  # here, so that what needs no torch starts at once

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
