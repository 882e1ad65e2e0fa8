"""Weights & Biases, which may watch a run and must never stop it."""

import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from dist_fair.errors import DistFairError, nearest
from dist_fair.reporting.progress import say

MODES = ("auto", "online", "offline", "disabled")
INIT_SECONDS, FINISH_SECONDS = 60, 300


class WandbLog:
    """One W&B run beside a training run; for rank 0 only.

    mode: online | offline | disabled, or auto: online where a key is configured (WANDB_API_KEY, or the netrc file that
    `wandb login` writes), else offline; WANDB_MODE, where set, decides for auto. Offline touches no network and can
    be uploaded later by `wandb sync`. Files go to FOLDER/wandb. config: the resolved recipe.

    Whatever goes wrong inside W&B (not installed, no answer, a failing call) is told in one line, once; an online run
    that cannot start becomes an offline one, and after a failing call nothing more is sent.
    Raises DistFairError for an unknown mode, and for nothing else.
    """

    def __init__(
        self,
        mode: str,
        project: str,
        name: str,
        config: Mapping,
        folder: str | Path,
        tags: Sequence[str] = (),
    ):
        if mode not in MODES:
            raise DistFairError(f"wandb.mode={mode}: {nearest(str(mode), [*MODES])}")
        self.mode = automatic() if mode == "auto" else mode
        self._run = None
        if self.mode == "disabled":
            return
        folder = Path(folder)
        run = {"project": project, "name": name, "config": dict(config), "dir": str(folder), "tags": list(tags)}
        for attempt in dict.fromkeys((self.mode, "offline")):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._run, self.mode = _start(attempt, run), attempt
                return
            except Exception as error:
                then = "logging offline" if attempt == "online" else "going on without it"
                say(f"warning: W&B did not start {attempt} ({_line(error)}): {then}")
        self.mode = "disabled"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """The numbers of a step; `step` must grow."""
        self._try(lambda run: run.log(dict(numbers), step=step))

    def summary(self, numbers: Mapping[str, float]) -> None:
        """Numbers of the run as a whole, such as those of its evaluation."""
        self._try(lambda run: run.summary.update(dict(numbers)))

    def finish(self, failed: bool = False) -> None:
        """Writes out and uploads what is left, within five minutes; may be called twice."""
        self._try(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _try(self, call: Callable) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            say(f"warning: W&B failed ({_line(error)}): going on without it")
            self._run = None


def _start(mode: str, run: Mapping):
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own crash reports would go out offline too
    import wandb

    settings = {"console": "off", "save_code": False, "silent": mode == "offline", "init_timeout": INIT_SECONDS}
    if "finish_timeout" in wandb.Settings.model_fields:  # from wandb 0.27 on; before, finish waits without end
        settings["finish_timeout"] = FINISH_SECONDS
    return wandb.init(mode=mode, settings=wandb.Settings(**settings), **run)


def automatic() -> str:
    """The mode that "auto" stands for: what WANDB_MODE says, else online with a key and offline without."""
    told = os.environ.get("WANDB_MODE", "")
    if told in ("online", "offline", "disabled"):
        return told
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B would find a key without asking: the places its login reads."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in map(os.path.expanduser, places):
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _line(error: Exception) -> str:
    """The first line of an error."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
