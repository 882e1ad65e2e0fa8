import errno
import json
import os
import threading

import pytest
import torch

from dist_fair.collectives import Communicator
from dist_fair.engine import checkpoint, checkpoint_writing, saving
from dist_fair.engine.saving import deal, sizes, written_by
from dist_fair.errors import DistFairError
from tests.engine.checkpoints import Whole, names, parts_of, same, saver
from tests.ranks import run_ranks

DEALT = 64  # bytes a rank: all ranks write the small module


@pytest.fixture
def held(monkeypatch):
    """Writers wait until the event is set; what they did is listed."""
    free, done, write_file = threading.Event(), [], checkpoint_writing.write_file

    def waiting(path, tensors):
        done.append(("begin", path.parent.name))
        assert free.wait(60)
        entry = write_file(path, tensors)
        done.append(("end", path.parent.name))
        return entry

    monkeypatch.setattr(checkpoint_writing, "write_file", waiting)
    yield free, done
    free.set()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


def test_training_goes_on_while_the_state_of_that_step_is_written(tmp_path, held):
    free, _ = held
    backend, chosen = Whole(), saver(tmp_path, Communicator())
    before = {name: tensor.clone() for name, tensor in backend.module.state_dict().items()}
    told = chosen.save(3, backend, {"loss": 0.5, "term": None, "name": "x"})
    with torch.no_grad():
        backend.module[0].weight.zero_()
    assert {*told} == {"checkpoint_seconds", "checkpoint_wait_seconds"}
    assert checkpoint.newest(tmp_path) is None
    free.set()
    chosen.finish()
    found = checkpoint.read(tmp_path / checkpoint.name_of(3))
    same(found.tensors("model"), before)
    assert (found.step, found.values) == (3, {"loss": 0.5})
    assert {"backend": "whole", "ranks": 1}.items() <= found.writer.items()


def test_one_write_at_a_time_and_the_newest_stay(tmp_path, held):
    free, done = held
    free.set()
    backend, chosen = Whole(), saver(tmp_path, Communicator())
    for step in (1, 2, 3):
        chosen.save(step, backend)
    chosen.finish()
    partial = [f".{checkpoint.name_of(step)}.partial" for step in (1, 2, 3)]
    assert done == [(what, folder) for folder in partial for _ in checkpoint.PARTS for what in ("begin", "end")]
    assert names(tmp_path) == [checkpoint.name_of(2), checkpoint.name_of(3)]


def test_the_time_for_the_write_before_is_told(tmp_path, monkeypatch):
    clock, backend, chosen = [0.0], Whole(), saver(tmp_path, Communicator())

    def taking(seconds, call):
        def act(*arguments):
            clock[0] += seconds
            return call(*arguments)

        return act

    monkeypatch.setattr(saving.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(backend, "state", taking(1, backend.state))
    monkeypatch.setattr(chosen, "finish", taking(10, chosen.finish))
    assert chosen.save(1, backend) == {"checkpoint_seconds": 11, "checkpoint_wait_seconds": 10}
    chosen.finish()


def test_what_fails_in_the_background_is_raised_by_the_next_save(tmp_path, monkeypatch):
    backend, chosen = Whole(), saver(tmp_path, Communicator())
    chosen.save(1, backend)
    chosen.finish()
    monkeypatch.setattr(checkpoint_writing, "write_file", full)
    chosen.save(2, backend)
    with pytest.raises(
        DistFairError, match=r"step-00000002 could not be written \(rank 0: No space left on "
    ) as caught:
        chosen.save(3, backend)
    assert str(caught.value).endswith(": make room or mend that; the same command goes on from step-00000001")
    assert caught.value.everywhere
    assert names(tmp_path) == [checkpoint.name_of(1)]
    monkeypatch.undo()
    chosen.save(3, backend)
    chosen.finish()
    assert checkpoint.read(checkpoint.newest(tmp_path)).step == 3


def test_finish_raises_too_once(tmp_path, monkeypatch):
    chosen = saver(tmp_path / "file" / "checkpoints", Communicator())
    (tmp_path / "file").write_text("")
    chosen.save(1, Whole())
    with pytest.raises(DistFairError, match=r"rank 0: Not a directory: .*; there is none before it"):
        chosen.finish()
    chosen.finish()


def test_an_error_of_the_program_keeps_its_type(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writing, "write_file", lambda *_: 1 / 0)
    chosen = saver(tmp_path, Communicator())
    chosen.save(1, Whole())
    with pytest.raises(ZeroDivisionError):
        chosen.finish()
    assert names(tmp_path) == []


def test_the_best_survives_a_resume(tmp_path):
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75), (4, 0.5)):
        chosen = saver(tmp_path, Communicator(), keep=1, best=("min", "loss"))
        chosen.save(step, Whole(), {"loss": loss})
        chosen.finish()
    assert names(tmp_path) == ["best.json", checkpoint.name_of(2), checkpoint.name_of(4)]


def test_a_best_by_a_number_that_steps_do_not_tell_is_refused_and_nothing_is_lost(tmp_path):
    chosen = saver(tmp_path, Communicator(), best=("max", "los"))
    with pytest.raises(DistFairError, match=r"checkpoint.best=max:los: .* did you mean 'loss'\? \(step-00000007 is wr"):
        chosen.save(7, Whole(), {"loss": 0.5})
    assert checkpoint.newest(tmp_path).name == checkpoint.name_of(7)


def test_a_tensor_that_the_module_does_not_name_is_written_too(tmp_path):
    class Tied(Whole):
        def state(self, owned):
            parts = super().state(owned)
            return parts | {"model": parts["model"] | ({"tied": torch.ones(2)} if owned("tied") else {})}

    chosen = saver(tmp_path, Communicator())
    chosen.save(1, Tied())
    chosen.finish()
    assert "tied" in checkpoint.read(tmp_path / checkpoint.name_of(1)).tensors("model")


def test_dealing_is_even_and_the_same_in_any_order():
    found = sizes(Whole().module)
    assert found == {name: tensor.nbytes for name, tensor in Whole().module.state_dict().items()}
    made = {f"layer{number}": 100 - number for number in range(40)}
    dealt = deal(made, world=8, shard=1000)
    assert dealt == deal(dict(reversed(made.items())), world=8, shard=1000)
    held = [sum(made[name] for name in made if dealt[name] == number) for number in range(max(dealt.values()) + 1)]
    assert (len(held), max(held) - min(held) < 100) == (4, True)
    assert {*deal(made, world=8, shard=10**6).values()} == {0}
    assert {*deal(made, world=2, shard=1).values()} == {0, 1}
    assert deal({}, world=2, shard=1) == {}


def test_writers_are_spread_over_the_ranks():
    assert [written_by(rank, 8, 2) for rank in range(8)] == [0, None, None, None, 1, None, None, None]
    for world, count in ((1, 1), (3, 2), (7, 5), (512, 9)):
        assert [one for rank in range(world) if (one := written_by(rank, world, count)) is not None] == [*range(count)]


def saves(comm, root):
    """On each rank: what it meets with a good write, a full disk on the last rank, and a folder of its own."""
    backend, met, chosen = Whole(), [], saver(root / "shared", comm, keep=1, shard=DEALT)
    with pytest.MonkeyPatch.context() as patch:
        entered, enter = [], comm._enter
        patch.setattr(comm, "_enter", lambda *given: (entered.append(threading.current_thread()), enter(*given)))
        chosen.save(1, backend, {"loss": 0.5})
        for _ in range(1000):  # steps; the other ranks' threads may be slow
            chosen.poll()
            if chosen._state is None:
                break
            threading.Event().wait(0.05)
        met.append(chosen._state is None)
        chosen.finish()
        chosen.save(2, backend)
        chosen.finish()
        met.append({*entered} == {threading.main_thread()})
    if comm.rank == comm.world - 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_writing, "write_file", full)
            met.append(refused(chosen, backend))
    else:
        met.append(refused(chosen, backend))
    own = saver(root / str(comm.rank), comm, shard=DEALT)
    return [*met, refused(own, backend), names(root / str(comm.rank)) if comm.rank < comm.world - 1 else []]


def refused(chosen, backend):
    chosen.save(3, backend)
    try:
        chosen.finish()
    except DistFairError as error:
        return str(error) if error.everywhere else "not everywhere"
    return "written"


def test_several_ranks_write_one_checkpoint_and_fail_together(tmp_path):
    answers = run_ranks(3, saves, tmp_path)
    shared, backend = tmp_path / "shared", Whole()
    for completed, main, failure, apart, left in answers:
        assert completed
        assert main
        assert "step-00000003 could not be written (rank 2: No space left on device" in failure
        assert "goes on from step-00000002" in failure
        assert "rank 0: " in apart
        assert "out= must lie on a file system that all nodes share" in apart
        assert left == []
    assert names(shared) == [checkpoint.name_of(2)]
    found = checkpoint.read(shared / checkpoint.name_of(2))
    for part, tensors in parts_of(backend.module, backend.optimizer).items():
        same(found.tensors(part), tensors)
    files = json.loads((found.folder / "state.json").read_text())["files"]
    assert [*files] == [f"{part}-0000{n}-of-00003.safetensors" for n in (1, 2, 3) for part in checkpoint.PARTS]
    held = [{name.rpartition("/")[2] for name in files[file]["tensors"]} for file in files]
    assert held[1] <= held[0]  # a parameter's moments are written by the rank that writes it
    assert found.writer["ranks"] == 3
