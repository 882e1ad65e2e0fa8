"""What sharing a module costs, per backend and number of ranks, in ratios: `python benchmarks/backends.py`.

A training step of recipe=erm with as many samples on each rank, whatever their number (weak scaling): forward,
backward, clipping, optimizer. On a CPU by the CPU time of a rank, so that more ranks than cores do not matter and
waiting costs nothing: what is left is the work of sharing. On GPUs by the clock, up to one rank for each.

Backends are measured side by side, in rounds that take each once in random order; ratios are medians over rounds with
the spread of the middle 60 per cent. One thread a rank; 80 s with --rounds 4. Prints Markdown and writes it
to benchmarks/results/backends.md.
"""

import argparse
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
from pg_fdd_cost import Setting, made_batch, plan
from timing import Way, measured, peak_memory, ratio_cells

from dist_fair.cli import guarded
from dist_fair.collectives import Communicator
from dist_fair.data.window import Window
from dist_fair.engine.assembly import build_module
from dist_fair.engine.backends import make_backend
from dist_fair.engine.launch import accelerator
from dist_fair.engine.optimization import build_optimizer
from dist_fair.engine.run_folder import write_text
from dist_fair.errors import DistFairError
from dist_fair.recipe.composition import load
from dist_fair.recipes import interventions
from dist_fair.reporting.progress import say
from dist_fair.reporting.tables import markdown

RESULTS = Path(__file__).parent / "results" / "backends.md"
BACKENDS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
SETTINGS = {
    "cpu": Setting("cpu", ("recipe=erm", "detector.norm=local"), 64, 16, 10),
    "cuda": Setting("cuda", ("recipe=erm", "detector=resnet50", "detector.pretrained=false", "train.precision=bf16",
                             "detector.norm=local"), 224, 64, 30),
}  # fmt: skip
Result = dict[str, tuple[np.ndarray, str]]  # backend -> seconds of each round, peak MiB


def measure(world: int, setting: Setting) -> Result:
    """Each backend on `world` ranks; the numbers are rank 0's."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        ranks = [context.Process(target=one_rank, args=(rank, world, folder, setting, sender if rank == 0 else None))
                 for rank in range(world)]  # fmt: skip
        for rank in ranks:
            rank.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            raise DistFairError(f"{world} ranks on {setting.device}: one of them failed; its error is above") from None
        finally:
            for rank in ranks:
                rank.kill() if rank.exitcode else rank.join()


def one_rank(rank: int, world: int, folder: str, setting: Setting, answer: object) -> None:
    """What a rank does, in the environment that a launcher gives it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    kind = {"cpu": "gloo", "cuda": "nccl"}[setting.device]
    dist.init_process_group(kind, store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    ways = {backend: way(setting, backend) for backend in BACKENDS}
    seconds = measured(ways, setting.rounds, setting.device)
    memory = {backend: peak_memory(one, setting.device) for backend, one in ways.items()}
    if answer:
        answer.send({backend: (seconds[backend], memory[backend]) for backend in BACKENDS})
    dist.barrier()
    dist.destroy_process_group()


def way(setting: Setting, backend: str) -> Way:
    """A training step."""
    recipe = load([*setting.arguments, f"train.backend={backend}"], interventions()).recipe
    found, comm = accelerator(), Communicator()
    batch = made_batch(setting).to(found.device)
    batch = replace(batch, sizes=(len(batch),) * comm.world)
    module = build_module(recipe, plan(len(batch)), steps=100, comm=comm).train().to(found.device)
    shared = make_backend(recipe.train, module, lambda plain: build_optimizer(plain, recipe.optimizer), found)

    def run() -> None:
        shared.differentiate(Window([batch]), 0.5, 1.0, last=True)
        shared.clip(1.0)
        shared.step()

    return run


def rows(results: dict[int, Result], setting: Setting) -> list[list[str]]:
    """A row for each number of ranks and backend."""
    return [
        [setting.device, str(world), backend, f"{np.median(seconds) * 1e3:,.1f}",
         *ratio_cells(seconds / result["ddp"][0], 2), *ratio_cells(seconds / results[1][backend][0], 2), memory]
        for world, result in results.items() for backend, (seconds, memory) in result.items()
    ]  # fmt: skip


def main(arguments: list[str]) -> int:
    """Exit code 0; a DistFairError is left to the caller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks, 1 among them")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: as suit each device)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and torch.cuda.device_count() < max(options.ranks):
        raise DistFairError(f"--device cuda --ranks {max(options.ranks)}: there are {torch.cuda.device_count()} GPUs")
    if 1 not in options.ranks:
        raise DistFairError(f"--ranks {options.ranks}: without 1 there is nothing to compare with")
    setting = SETTINGS[options.device]
    setting = replace(setting, rounds=options.rounds or setting.rounds)
    results = {}
    for world in sorted({*options.ranks}):
        say(f"{world} rank(s) on {setting.device}")
        results[world] = measure(world, setting)
    header = ("device", "ranks", "backend", "ms", "over ddp", "20 to 80 %", "over 1 rank", "20 to 80 %", "peak MiB")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    command = shlex.join(["python", "benchmarks/backends.py", *arguments])
    text = (f"# What sharing a module costs\n\n`{command}` ({machine}, Python {platform.python_version()}); "
            f"`{' '.join(setting.arguments)}`, {setting.pixels} pixels, {setting.batch} samples a rank\n\n"
            + markdown(header, rows(results, setting), header[:3]))  # fmt: skip
    write_text(RESULTS, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
