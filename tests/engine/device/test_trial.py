"""A trial takes steps as the run will, at its end, writes nothing, and names the stretch in which one fails."""

import pytest
import torch

from dist_fair.collectives import Communicator
from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.engine.device.memory import Memory, Use
from dist_fair.engine.device.trial import Rehearsal, account, attempt, planned
from dist_fair.engine.loop import Rhythm
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Sam
from tests.data.making import bare_index
from tests.engine import sharpness_worlds
from tests.engine.sharpness_worlds import Run, trainer

CPU = torch.device("cpu")


def rehearsal(folder, flops=1e6, **run):
    """A rehearsal of steps as training makes it, and its micro-batches."""
    made, stream = trainer(Run(Sam(**run.pop("sam", {})), precision="fp32", **run), Communicator(), folder)
    rhythm = Rhythm(made.rhythm.steps, 0, made.rhythm.accumulate, 1.0, None)
    rehearsed = Rehearsal(made.backend, made.schedule, made.comm, rhythm, sam=made.sam, seed=5, saver=made.saver,
                          describe=str, flops=flops, subject="recipe=x")  # fmt: skip
    return rehearsed, stream(0, 12)


def test_two_steps_are_taken_and_told(tmp_path):
    made, stream = rehearsal(tmp_path, accumulate=2)
    trial = attempt(made, stream, sharpness_worlds.plan(2), peak=1.0)
    assert made.step == 2
    assert (trial.rows, trial.flops) == (32, 1e6)
    assert 0 < trial.seconds < 60
    lines = trial.lines()
    assert [*lines] == ["one step", "arithmetic", "memory"]
    assert "samples/s; data " in lines["one step"]
    assert "0.001 GFLOP a sample" in lines["arithmetic"]
    assert lines["arithmetic"].endswith("of the 1 it could do")
    assert [*tmp_path.rglob("*")] == []


def test_all_that_acts_in_a_run_acts_in_its_first_step(tmp_path):
    made, stream = rehearsal(tmp_path, sam={"rho": 0.05})
    alignment = made.module.interventions["pair_alignment"]
    alignment.settings.delay = 0.999
    (told,), _ = made.take(stream, 1)
    assert told["loss/pair_alignment"] is not None
    assert told["sam/ascent_norm"] > 0
    made, stream = trainer(Run(Sam(), precision="fp32"), Communicator(), tmp_path)
    made.module.interventions["pair_alignment"].settings.delay = 0.999
    made.rhythm.stop, told = 1, []
    made.run(stream, None, [lambda step, values: told.append(values)])
    assert told[0]["loss/pair_alignment"] is None  # a run itself begins without it


def failing(stretch, made, stream, error):
    """Plants an error in a stretch of the step; the stream to take."""

    def fail(*_):
        raise error

    if stretch == "reading a batch":
        return iter(fail, None)
    if stretch == "the forward pass":
        made.module.detector.extract = fail
    elif stretch == "the backward pass":
        made.module.detector.first.weight.register_hook(fail)
    else:
        made.backend.optimizer.step = fail
    return stream


@pytest.mark.parametrize(
    "stretch", ["reading a batch", "the forward pass", "the backward pass", "the optimizer's step"]
)
def test_the_stretch_that_fails_is_named(tmp_path, stretch):
    made, stream = rehearsal(tmp_path)
    stream = failing(stretch, made, stream, RuntimeError("save_mean->defined() INTERNAL ASSERT FAILED\nmore"))
    with pytest.raises(DistFairError) as raised:
        made.take(stream, 1)
    words = str(raised.value)
    assert words.startswith(f"recipe=x: {stretch} of a real step fails on the CPU: RuntimeError: save_mean->defined() ")
    assert "INTERNAL ASSERT FAILED (test_trial.py:" in words
    assert ", in fail): no setting is known to mend it; " in words
    assert "more" not in words.partition("(")[0]
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_error_that_says_what_to_do_is_left_as_it_is(tmp_path):
    made, stream = rehearsal(tmp_path)
    with pytest.raises(DistFairError, match=r"^sample 3 is bad: mend it$"):
        made.take(failing("reading a batch", made, stream, DistFairError("sample 3 is bad: mend it")), 1)


@pytest.mark.parametrize(("world", "kind"), [(1, DistFairError), (2, RuntimeError)])
def test_the_loss_of_another_rank_is_not_taken_for_an_error_of_this_one(tmp_path, world, kind):
    made, _ = rehearsal(tmp_path)

    def lost():
        made.comm.world = world
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5")

    with pytest.raises(kind, match="Connection closed by peer"):
        made.take(iter(lost, None), 1)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "a smaller train.batch_size; or"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "accumulate=2"),
        (AssertionError("Input height (32) doesn't match model (224)."), "data.image_size=224, or +detector.argum"),
        (RuntimeError("Calculated padded input size per channel: (1 x 1). Kernel size: (3 x 3). Kernel size can't be "
                      "greater than actual input size"), "a larger data.image_size"),
    ],
)  # fmt: skip
def test_what_mends_it_is_told_where_that_is_known(error, fix):
    assert fix in account(error, "forward", CPU)


def test_an_estimate_has_room_to_spare():
    use = Use(held=100, peak=200, room=1000, total=2000)
    assert use.rows(taken=10) == 80  # (0.9 * 1000 - 100) / 10
    assert Use(100, 100, 1000, 2000).rows(10) is None


def test_memory_on_the_cpu_is_that_of_the_process():
    memory = Memory(CPU)
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    memory.look()
    del kept
    memory.begin()
    use = memory.use()
    assert 60e6 < use.peak - use.held < 90e6
    assert use.peak < use.total
    assert use.peak < use.room


@pytest.mark.parametrize("tapes", [(TapeSpec("all"),), (TapeSpec("real", 0, 3), TapeSpec("fake", 1, 1))])
def test_the_batch_that_is_proposed_can_be_had(tapes):
    index = bare_index([100] * 3, [0, 0, 1] * 100)
    now = TrainingPlan(index, tapes, 16, lanes=2)
    found = planned(now, 75)
    assert 75 - 16 < found <= 75
    assert TrainingPlan(index, tapes, found, lanes=2).owned(0, 2).size == 1
    assert planned(now, 10**6) <= 300  # no more than there are samples
    assert planned(now, 1) == 0
