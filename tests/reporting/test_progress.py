import io

import pytest
from rich.console import Console

from dist_fair.reporting import progress
from dist_fair.reporting.progress import Progress, say


@pytest.fixture
def terminal(monkeypatch):
    shared = Console(force_terminal=True, width=120, file=io.StringIO(), highlight=False)
    monkeypatch.setattr(progress, "console", lambda: shared)
    return shared


@pytest.fixture
def log(monkeypatch):
    shared = Console(force_terminal=False, width=120)
    monkeypatch.setattr(progress, "console", lambda: shared)


@pytest.mark.usefixtures("log")
def test_a_log_has_a_plain_line_every_so_many_steps_and_at_the_end(capsys):
    with Progress(total=7, label="train", every=3) as bar:
        for step in range(7):
            bar.step(loss=0.123456, lr=1e-5, step=step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["train 3/7", "train 6/7", "train 7/7"]
    assert lines[0].startswith("train 3/7  loss 0.1235  lr 1e-05  step 2  ETA 0:00:0")
    assert lines[-1].endswith("ETA 0:00:00")


@pytest.mark.usefixtures("log")
def test_a_resumed_run_counts_on_and_paces_by_its_own_steps(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress(total=200, label="evaluate", every=1, start=100, unit="samples") as bar:
        bar.step(50, data="demo")
    assert capsys.readouterr().out == "evaluate 150/200  data demo  5 samples/s  ETA 0:00:10\n"


@pytest.mark.usefixtures("log")
def test_other_ranks_are_silent(capsys):
    with Progress(total=2, label="train", enabled=False, every=1) as bar:
        bar.step()
        bar.say("nothing")
        say("nothing", enabled=False)
    assert bar.done == 1
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_live_bar_and_messages_above_it(terminal):
    with Progress(total=2, label="train", every=1) as bar:
        bar.step(loss=0.5)
        say("[not markup] a message")
        bar.step(loss=0.25)
    text = terminal.file.getvalue()
    assert "loss 0.25" in text
    assert "2/2" in text
    assert "[not markup] a message" in text
    assert text.endswith("\x1b[?25h"), "the cursor is shown again"


def test_an_error_inside_takes_the_bar_down(terminal):
    with pytest.raises(RuntimeError), Progress(total=2, label="train") as bar:
        raise RuntimeError
    assert bar._bar is None
    assert terminal.file.getvalue().endswith("\x1b[?25h")
