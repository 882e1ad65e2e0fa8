"""How fast it is on a GPU, in ratios measured in one run: `python benchmarks/gpu.py`, eight minutes at most.

    step                  a step of erm over the best bare timm loop, eager; peak memory of both
    objectives            daid, sfd_gda and daw_fdd over erm, eager; kernels that they add, host waits of a step
    pg_fdd                PG-FDD without SAM over its encoders and decoder alone
    loader                a whole training from shards over its step alone, and over timm's loader
    numerics              what train.tf32 and train.deterministic cost in fp32
    compiled              a step of erm over the bare loop, both compiled
    compiled_objectives   as objectives, with train.compile=objectives

Detectors are from scratch and images noise: nothing is downloaded. Each section is a process of its own, forked from
one that has imported everything, so that one that fails, hangs or runs out of time is told in the table and the others
go on. What was measured so far is on disk after each line. benchmarks/gpu_ways.py says what is compared with what.
"""

import argparse
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import platform
import shlex
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu.md"
# Section -> the most seconds it may take. Together they may take TOTAL, so that one that is slow costs the last ones.
SECTIONS = {"step": 150, "objectives": 90, "pg_fdd": 75, "loader": 90, "numerics": 60, "compiled": 180,
            "compiled_objectives": 150}  # fmt: skip
MODULES = {"loader": "gpu_loading"}  # the others are of gpu_sections
TOTAL = 450.0
ROW, WAY = (
    ("measure", "goal", "measured"),
    ("section", "setting", "way", "ms a step", "20 to 80 %", "peak GiB", "warm, s"),
)


@dataclass
class Report:
    """What was found so far. Written anew with each line."""

    path: Path
    head: str
    rows: list[list[str]] = field(default_factory=list)
    ways: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spent: dict[str, str] = field(default_factory=dict)

    def take(self, section: str, kind: str, *cells: str) -> None:
        """A row of the table, a way that was timed, or a note."""
        if kind == "row":
            self.rows.append([*cells])
        elif kind == "way":
            self.ways.append([section, *cells])
        else:
            self.notes.append(f"{section}: {cells[0]}")
        print(f"[{section}] {' | '.join(cells)}", flush=True)
        self.write()

    def write(self) -> None:
        from dist_fair.engine.run_folder import write_text
        from dist_fair.reporting.tables import markdown

        took = ", ".join(f"{section} {text}" for section, text in self.spent.items()) or "-"
        parts = [self.head, markdown(ROW, self.rows, ROW) if self.rows else "Nothing was measured.\n",
                 f"Seconds by section: {took}.\n"]  # fmt: skip
        if self.ways:
            parts.append("## What was timed\n\n" + markdown(WAY, self.ways, WAY[:3]))
        if self.notes:
            parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in self.notes))
        write_text(self.path, "\n".join(parts))


def measure(section: str, quick: bool, device: str, seconds: float, report: Report) -> None:
    """A section in a process of its own, for so many seconds at most; whatever becomes of it is in the report."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_section, args=(section, quick, device, sender))
    began = time.monotonic()
    process.start()
    sender.close()
    fault = None
    try:
        while True:
            if not receiver.poll(max(0.0, began + seconds - time.monotonic())):
                fault = f"not done after {seconds:.0f} s"
                break
            told = receiver.recv()
            if told is None:
                break
            report.take(section, *told)
    except EOFError:
        fault = "its process ended without a word"
    finally:
        process.kill()
        process.join()
    report.spent[section] = f"{time.monotonic() - began:.0f}"
    if fault:
        report.take(section, "row", f"section {section}", "-", fault)
    report.write()


def run_section(section: str, quick: bool, device: str, pipe: Connection) -> None:
    """What the process of a section does: it tells what it finds, then None."""
    from dataclasses import replace

    from gpu_ways import FULL, QUICK

    try:
        scale = replace(QUICK if quick else FULL, device=device)
        module = importlib.import_module(MODULES.get(section, "gpu_sections"))
        getattr(module, section)(scale, lambda *told: pipe.send(told))
    except Exception as error:
        traceback.print_exc()
        pipe.send(
            ("row", f"section {section}", "-", f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        )
    pipe.send(None)


def head(arguments: list[str], device: str) -> str:
    """What ran where."""
    import timm
    import torch

    machine = platform.machine()
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    command = shlex.join(["python", "benchmarks/gpu.py", *arguments])
    return (f"# On a GPU\n\n`{command}` ({machine}, {os.cpu_count()} cores, torch {torch.__version__}, timm "
            f"{timm.__version__}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}). Ratios are "
            "medians over rounds that time each way in turn, with the spread of the middle 60 per cent.\n")  # fmt: skip


def main(arguments: list[str]) -> int:
    """Exit code 0, and 3 where a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script itself")
    parser.add_argument("--quick", action="store_true", help="as little as shows that it runs")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all sections together ({TOTAL:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.md", help=f"by default {RESULTS.name}")
    options = parser.parse_args(arguments)
    chosen = options.sections.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--sections {options.sections}: no section '{unknown[0]}'; there are {', '.join(SECTIONS)}")
    # Before anything imports torch: a process that has asked the driver cannot fork others that use the device.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # which Python 3.11 does not hand on to what it preloads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "timm.data", "accelerate", "dist_fair.training", "gpu_sections", "gpu_loading"]
    )
    multiprocessing.forkserver.ensure_running()
    began = time.monotonic()
    report = Report(options.out, head(arguments, options.device))
    for section in chosen:
        left = began + options.seconds - time.monotonic()
        if left < 20:
            report.take(section, "row", f"section {section}", "-", "left out: no time left")
            continue
        print(f"[{section}] begins after {time.monotonic() - began:.0f} s", flush=True)
        seconds = left if options.quick else min(left, SECTIONS[section])
        measure(section, options.quick, options.device, seconds, report)
    print(f"\n{options.out.read_text()}\n{time.monotonic() - began:.0f} s in all")
    return 3 if any(row[0].startswith("section ") for row in report.rows) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # the program from this checkout, installed or not
    sys.exit(main(sys.argv[1:]))
