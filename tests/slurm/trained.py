"""Stands in for `python -m dist_fair.train` in a job of a sweep: leaves what a real run left, or ends as it is told to.

TRAINED: the folder of a real run. ENDS: JSON, run folder's name -> what each of its starts does: an exit code, or
"wait": for a signal, after which it exits with 75. What it saw is a line of FOLDER.jsonl beside the run folder.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    *overrides, out = sys.argv[1:]
    folder = Path(out.removeprefix("out=").strip("'"))
    calls = folder.with_name(f"{folder.name}.jsonl")
    start = len(calls.read_text().splitlines()) if calls.exists() else 0
    caught = []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(signal.Signals(number).name))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "SLURM_JOB_ID")
    if os.environ["RANK"] == "0":
        with calls.open("a") as file:
            file.write(json.dumps({"arguments": overrides} | {name: os.environ[name] for name in names}) + "\n")
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, start {start}", flush=True)
    ends = json.loads(os.environ["ENDS"]).get(folder.name, [])
    code = ends[start] if start < len(ends) else 0
    while code == "wait" and not caught:
        time.sleep(0.05)
    if code:
        print(f"error: told to end with {code} {caught}")
        sys.exit(75 if code == "wait" else code)
    if os.environ["RANK"] == "0":
        leave(folder, dict(text.split("=", 1) for text in overrides))


def leave(folder: Path, values: dict[str, str]) -> None:
    """The real run's recipe, of another seed and learning rate, and its results."""
    shutil.copytree(os.environ["TRAINED"], folder, dirs_exist_ok=True)
    recipe = (folder / "recipe.yaml").read_text()
    recipe = re.sub(r"^seed: \S+", f"seed: {values.get('seed', '0')}", recipe, flags=re.MULTILINE)
    recipe = re.sub(r"^  lr: \S+", f"  lr: {values['optimizer.lr']}", recipe, flags=re.MULTILINE)
    (folder / "recipe.yaml").write_text(recipe)


if __name__ == "__main__":
    main()
