"""Checkpoints that ranks with sharded parameters write together."""

from unittest import mock

import pytest
import torch

from dist_fair.engine import checkpoint
from tests.engine import backends_worlds
from tests.engine.backends_worlds import Kept, Task
from tests.engine.checkpoints import saver
from tests.ranks import run_ranks

DEALT = 1024  # bytes a rank


def written(comm, folder, name):
    """Two steps, saved by all ranks; the state as every rank has it."""

    class Written(Kept):
        def save(self, step, backend, values=None):
            chosen = saver(folder, comm, shard=DEALT)
            chosen.save(step, backend, values)
            chosen.finish()
            return super().save(step, backend)

    with mock.patch.object(backends_worlds, "Kept", Written):
        result = backends_worlds.run(comm, [Task(name, stop=2)])[0]
    return {part: result[part] for part in checkpoint.PARTS}


ZERO = [pytest.param(f"zero{stage}", marks=pytest.mark.long) for stage in (1, 2, 3)]


@pytest.mark.parametrize("name", ["fsdp", *ZERO])
def test_they_are_the_state(tmp_path, name):
    for state in run_ranks(2, written, tmp_path, name):
        found = checkpoint.read(tmp_path / checkpoint.name_of(2))
        assert len(found.files) == 4
        assert found.writer["backend"] == name
        for part, expected in state.items():
            tensors = found.tensors(part)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[one], torch.from_numpy(expected[one])) for one in expected)
    for part in checkpoint.PARTS:  # dealt evenly, by sizes that no rank holds
        files = [name for name, file in found.files.items() if file.part == part]
        least, most = sorted((found.folder / name).stat().st_size for name in files)
        assert least > 0.8 * most
