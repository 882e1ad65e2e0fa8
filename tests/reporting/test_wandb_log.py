import sys
import types

import pytest

from dist_fair.errors import DistFairError
from dist_fair.reporting.wandb_log import WandbLog, automatic


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def start(folder, mode="auto"):
    return WandbLog(mode, "dist_fair", "a-run", {"seed": 1}, folder, tags=["demo"])


def use(log):
    log.log({"loss": 1.0}, step=0)
    log.log({"loss": 0.5}, step=1)
    log.summary({"AUC": 0.9})
    log.finish()
    log.finish()


def refuse(*arguments, **settings):
    raise ConnectionError("no route to host\nand a long story")


class Run:
    def __init__(self, broken=()):
        self.calls, self.broken = [], broken
        self.summary = types.SimpleNamespace(update=lambda numbers: self._call("summary", numbers))

    def _call(self, name, *what):
        self.calls.append((name, *what))
        if name in self.broken:
            refuse()

    def log(self, numbers, step):
        self._call("log", numbers, step)

    def finish(self, exit_code):
        self._call("finish", exit_code)


def fake(monkeypatch, init):
    class Settings(dict):
        model_fields = ("finish_timeout",)

    module = types.SimpleNamespace(init=init, Settings=Settings)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_key_makes_auto_online(monkeypatch, tmp_path):
    assert automatic() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert automatic() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert automatic() == "disabled"


def test_a_key_in_netrc_makes_auto_online(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert automatic() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert automatic() == "offline"
    (tmp_path / "netrc").write_text("machine torn")
    assert automatic() == "offline"


def test_everything_is_passed_on(monkeypatch, tmp_path):
    run, seen = Run(), {}
    fake(monkeypatch, lambda **settings: (seen.update(settings), run)[1])
    use(start(tmp_path / "run", "online"))
    assert (seen["mode"], seen["project"], seen["name"], seen["tags"]) == ("online", "dist_fair", "a-run", ["demo"])
    assert (seen["config"], seen["dir"]) == ({"seed": 1}, str(tmp_path / "run"))
    assert seen["settings"]["finish_timeout"] > 0
    expected = [("log", {"loss": 1.0}, 0), ("log", {"loss": 0.5}, 1), ("summary", {"AUC": 0.9}), ("finish", 0)]
    assert run.calls == expected


def test_a_missing_wandb_is_one_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = start(tmp_path)
    use(log)
    assert log.mode == "disabled"
    assert capsys.readouterr().out.count("warning: W&B did not start offline") == 1


def test_an_online_start_that_fails_becomes_offline(monkeypatch, tmp_path, capsys):
    run = Run()
    fake(monkeypatch, lambda mode, **settings: refuse() if mode == "online" else run)
    log = start(tmp_path, "online")
    use(log)
    assert log.mode == "offline"
    assert len(run.calls) == 4
    told = capsys.readouterr().out
    assert told == "warning: W&B did not start online (no route to host): logging offline\n"


@pytest.mark.parametrize("call", ["log", "summary", "finish"])
def test_a_call_that_fails_is_one_warning_and_the_last_call(monkeypatch, tmp_path, capsys, call):
    run = Run(broken=[call])
    fake(monkeypatch, lambda **settings: run)
    use(start(tmp_path, "offline"))
    assert [name for name, *_ in run.calls].count(call) == 1
    assert run.calls[-1][0] == call
    assert capsys.readouterr().out == "warning: W&B failed (no route to host): going on without it\n"


def test_a_wandb_that_raises_everywhere(monkeypatch, tmp_path, capsys):
    fake(monkeypatch, refuse)
    use(start(tmp_path, "online"))
    assert capsys.readouterr().out.count("warning") == 2


def test_disabled_does_not_import_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(start(tmp_path, "disabled"))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_not_swallowed(monkeypatch, tmp_path):
    def interrupt(**settings):
        raise KeyboardInterrupt

    fake(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, "online")


def test_an_unknown_mode_is_an_error(tmp_path):
    with pytest.raises(DistFairError, match=r"wandb.mode=onlin.*'online'"):
        start(tmp_path, "onlin")


def test_a_real_offline_run_writes_into_its_folder(tmp_path):
    log = start(tmp_path / "run")
    assert log.mode == "offline"
    use(log)
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"a-run" in record.read_bytes()
