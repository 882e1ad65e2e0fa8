"""kill -9 at any moment, also inside writes, and a full disk: what was complete stays, and the run ends as undisturbed.

A life is a process that goes on from the newest checkpoint it finds. It is killed at its n-th operation on files of a
checkpoint (a file is then half written), or after some seconds, wherever it is.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import threading
from contextlib import contextmanager

import pytest
import torch

from dist_fair.collectives import Communicator
from dist_fair.engine import checkpoint, checkpoint_writing
from dist_fair.engine.saving import SHARD, Saver
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Sam
from tests.engine.checkpoints import Whole, parts_of, same, saver
from tests.engine.sharpness_worlds import Run, trainer
from tests.ranks import run_ranks

RUN = Run(Sam(), precision="fp32", steps=12)
EVERY = 2  # steps between checkpoints
DEALT = 512  # bytes a rank: both of two ranks write
OPERATIONS = 20  # on files, more than a checkpoint needs


def life(comm, folder, shard=SHARD, operation=None, seconds=None, victim=0):
    """Trains to the end unless killed; the losses by step. operation, seconds: when rank `victim` is killed."""
    made, stream = trainer(RUN, comm, folder)
    made.rhythm.save_every = EVERY
    made.saver = Saver(folder, {}, comm, keep=2, best=("min", "loss"), shard=shard)
    found, faults = checkpoint.newest_undamaged(folder)
    checkpoint.agree(found, comm)
    if faults or checkpoint.complete(folder) != [one for one in checkpoint.complete(folder) if checkpoint.read(one)]:
        raise AssertionError(faults)
    if found:
        made.resume(found)
    losses = {}
    if seconds is not None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with killed_at(operation if comm.rank == victim else None):
        made.run(stream, None, [lambda step, values: losses.update({step: values["loss"]})])
    return losses


@contextmanager
def killed_at(operation):
    """Whoever comes to the operation of this number, from 1, on files of checkpoints, is killed with kill -9."""
    left = [operation or 10**9]

    def counted(call, last):
        def act(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                last(call, *arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return act

    with pytest.MonkeyPatch.context() as patch:
        for module, name, last in (
            (checkpoint_writing, "save_file", half_a_file),
            (os, "fsync", nothing),
            (os, "replace", nothing),
            (checkpoint_writing.shutil, "rmtree", half_a_folder),
        ):
            patch.setattr(module, name, counted(getattr(module, name), last))
        yield left


def nothing(*_):
    pass


def half_a_file(save_file, tensors, path):
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)


def half_a_folder(rmtree, folder, *_):
    if folder.is_dir():
        min(folder.iterdir()).unlink()


def at_once(*_):
    """Instead of os.fsync: kill -9 does not lose what the system holds, and a disk takes 20 ms each time."""


def writes(comm, folder, backend, operation=None):
    """Two checkpoints over older ones, or as much as can be done; the number of operations on files."""
    chosen = saver(folder, comm, keep=1, best=("min", "loss"))
    with killed_at(operation) as left:
        for step in (3, 3):  # once more as after a fall back to an older one
            chosen.save(step, backend, {"loss": 1.0 / step})
            chosen.finish()
    return 10**9 - left[0]


def crashes_inside_every_operation(comm, root):
    """As many forks of this process as there are operations, each killed at its own; how many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", at_once)
        return _crashes(comm, root)


def _crashes(comm, root):
    chosen, backend = saver(root / "before", comm, keep=2), Whole()
    parts = parts_of(backend.module, backend.optimizer)
    for step in (1, 2):
        chosen.save(step, backend, {"loss": 0.9})
        chosen.finish()
    count = writes(comm, shutil.copytree(root / "before", root / "whole"), backend)
    for operation in range(1, count + 1):
        folder = shutil.copytree(root / "before", root / str(operation))
        child = os.fork()
        if child == 0:
            writes(comm, folder, backend, operation)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found = checkpoint.complete(folder)
        assert found
        for one in found:
            for part, tensors in parts.items():
                same(checkpoint.read(one).tensors(part), tensors)
        after = saver(folder, comm, keep=1)
        after.save(5, backend)
        after.finish()
        assert checkpoint.complete(folder)[-1] == folder / checkpoint.name_of(5)
        assert not [*folder.glob(".step-*")]
    return count


def test_killed_at_each_operation_on_files_a_complete_checkpoint_is_left(tmp_path):
    assert run_ranks(1, crashes_inside_every_operation, tmp_path, timeout=300)[0] > OPERATIONS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, losses) of the run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_ranks(1, life, folder)[0]


def same_end(folder, undisturbed, tolerance=0.0):
    one, other = (checkpoint.read(checkpoint.newest(path)) for path in (folder, undisturbed[0]))
    assert one.step == other.step == RUN.steps
    for part in checkpoint.PARTS:
        left, right = one.tensors(part), other.tensors(part)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def killed_again_and_again(root, undisturbed, kills, world=1, shard=SHARD, tolerance=0.0):
    """Lives until so many were killed and the last run is at its end; where one ends, another run is begun."""
    draw, run, inside = random.Random(kills * world), 0, 0
    while kills:
        folder, run, losses = root / str(run), run + 1, {}
        folder.mkdir()
        while True:
            way = {"operation": draw.randint(1, OPERATIONS)} if draw.random() < 0.6 else {"seconds": draw.random() / 2}
            way = way if kills > 0 else {}
            newest = checkpoint.newest(folder)
            try:
                losses |= run_ranks(world, _life, folder, shard, way, draw.randrange(world))[0]
                break
            except RuntimeError as error:
                if "died without a word" not in str(error):
                    raise
            kills -= 1
            inside += bool([*folder.glob(".step-*.partial")])
            assert not newest or checkpoint.newest(folder).name >= newest.name
        assert all(losses[step] == pytest.approx(undisturbed[1][step], rel=tolerance, abs=0) for step in losses)
        same_end(folder, undisturbed, tolerance)
    return inside


def _life(comm, folder, shard, way, victim):
    return life(comm, folder, shard, victim=victim, **way)


def test_killed_at_random_moments_it_ends_as_undisturbed(tmp_path, undisturbed):
    assert killed_again_and_again(tmp_path, undisturbed, kills=5) > 0


def test_one_of_two_ranks_that_both_write_is_killed(tmp_path, undisturbed):
    assert killed_again_and_again(tmp_path, undisturbed, kills=2, world=2, shard=DEALT, tolerance=1e-5) > 0


@pytest.mark.long
@pytest.mark.parametrize(("world", "shard", "tolerance"), [(1, SHARD, 0.0), (2, DEALT, 1e-5)])
def test_killed_at_twenty_random_moments(tmp_path, undisturbed, world, shard, tolerance):
    assert killed_again_and_again(tmp_path, undisturbed, 20, world, shard, tolerance) > 5


def fills_up(comm, folder):
    """Trains until a disk is full; what it says."""
    with pytest.raises(DistFairError) as caught:
        life(comm, folder)
    assert caught.value.everywhere
    return str(caught.value)


def fails_at_the_third(comm, folder):
    """The same with a disk that only says it is full, in the middle of the third checkpoint's model."""
    save_file, calls = checkpoint_writing.save_file, [0]

    def failing(tensors, path):
        calls[0] += 1
        if calls[0] == 5:
            half_a_file(save_file, tensors, path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writing, "save_file", failing)
        return fills_up(comm, folder)


def test_a_disk_that_says_it_is_full(tmp_path, undisturbed):
    told = run_ranks(1, fails_at_the_third, tmp_path)[0]
    assert "step-00000006 could not be written (rank 0: No space left on device" in told
    assert "goes on from step-00000004" in told
    assert checkpoint.newest(tmp_path).name == "step-00000004"
    assert not [*tmp_path.glob(".step-*")]
    run_ranks(1, life, tmp_path)
    same_end(tmp_path, undisturbed)


def test_a_disk_that_is_full(tmp_path, undisturbed):
    one = checkpoint.newest(undisturbed[0])
    pages = sum(-(-file.stat().st_size // 4096) for file in one.iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={int(2.5 * pages) * 4096}"  # two are kept
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        told = run_ranks(1, fills_up, disk)[0]
        assert "No space left on device" in told
        assert checkpoint.read(checkpoint.newest(disk)).step > 0
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        run_ranks(1, life, disk)
        same_end(disk, undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_run_here_is_one_that_learns(undisturbed):
    """Else equal ends would mean little."""
    losses = [*undisturbed[1].values()]
    assert len(losses) == RUN.steps
    assert len({*losses}) == RUN.steps
    assert Communicator().world == 1
