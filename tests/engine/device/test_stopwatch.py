"""Time is told where it was taken, and collectives are part of it."""

import time

import torch

from dist_fair.engine.device.stopwatch import STRETCHES, Stopwatch, shares


def test_a_lap_has_all_stretches_and_adds_repeated_ones_up():
    watch = Stopwatch(torch.device("cpu"))
    watch.mark("data")
    for _ in range(2):  # SAM, or several micro-batches
        watch.mark("forward")
        with watch.collective():
            time.sleep(0.01)
        watch.mark("backward")
    seconds = watch.lap().seconds()
    assert set(seconds) == {*STRETCHES, "collectives"}
    assert seconds["forward"] >= seconds["collectives"] >= 0.02
    assert seconds["optimizer"] == 0
    assert seconds["backward"] < seconds["forward"]


def test_the_next_lap_starts_anew():
    watch = Stopwatch(torch.device("cpu"))
    watch.mark("data")
    time.sleep(0.01)
    watch.lap()
    watch.mark("data")
    assert watch.lap().seconds()["data"] < 0.01


def test_shares_are_parts_of_the_step():
    values = {f"seconds/{name}": taken for name, taken in zip(STRETCHES, (0.1, 0.3, 0.5, 0.1), strict=True)}
    assert shares(values | {"seconds": 1.0}) == "data 10%, forward 30%, backward 50%, optimizer 10%"
