"""Recipes against each other on the demo faces, over several seeds: `python benchmarks/demo_results.py`.

Runs what is not yet there into OUT/RECIPE-SEED (a finished run is kept), then prints the table and writes it to
benchmarks/results/demo.md. Numbers do not depend on --ranks, only time does.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dist_fair.reporting.comparison import comparison_table

HERE = Path(__file__).parent


def main() -> int:
    """Exit code 0, or 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["erm", "gda", "sfd_gda"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_results"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one rank of one thread each")
    parser.add_argument("--attributes", nargs="+", default=["gender", "race", "gender x race"])
    parser.add_argument("overrides", nargs="*", default=[], help="further key=value for every run")
    options = parser.parse_args()
    work = [(recipe, seed) for seed in options.seeds for recipe in options.recipes]
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda one: train(*one, options.out, options.overrides), work))
    if any(codes):
        return 1
    runs = {
        recipe: [
            json.loads((options.out / f"{recipe}-{seed}" / "evaluation.json").read_text()) for seed in options.seeds
        ]
        for recipe in options.recipes
    }
    text = report(runs, options.seeds, options.attributes)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "demo.md").write_text(text)
    print(text)
    return 0


def train(recipe: str, seed: int, out: Path, overrides: list[str]) -> int:
    """One run in a process of its own; its output goes to OUT/RECIPE-SEED.log. The exit code."""
    run = out / f"{recipe}-{seed}"
    if (run / "evaluation.json").is_file():
        return 0
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    command = [sys.executable, "-m", "dist_fair.train", f"recipe={recipe}", f"seed={seed}", f"out={run}",
               "evaluation.bootstrap=0", "wandb.mode=disabled", *overrides]  # fmt: skip
    with (out / f"{recipe}-{seed}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{run}: exit code {code} after {time.perf_counter() - began:.0f} s", flush=True)
    return code


def report(runs: dict, seeds: list[int], attributes: list[str]) -> str:
    """The tables of all attribute sets, with what was run."""
    command = f"python benchmarks/demo_results.py --recipes {' '.join(runs)} --seeds {' '.join(map(str, seeds))}"
    parts = [f"# Demo faces, seeds {', '.join(map(str, seeds))}\n\n`{command}` (torch {torch.__version__}, CPU)\n"]
    parts += [f"## Fairness over {name}\n\n{comparison_table(runs, name)}" for name in attributes]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
