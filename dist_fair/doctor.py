"""`dist-fair doctor [recipe=NAME key=value ...]`: looks at all that a run needs, on every rank; a verdict per line.

Alone, with --ranks N, under torchrun, or on a cluster: `sbatch ... slurm/doctor.sh ...`. Of a recipe it takes one real
step, on all ranks together, without writing anything. No secret is shown; what hangs is named and left behind.
"""

import argparse
import json
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError


def main(arguments: list[str]) -> int:
    """Prints the verdicts on rank 0. Exit code 0 without a problem, else 2 there."""
    parser = argparse.ArgumentParser(
        prog="dist-fair doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training: its recipe, data and ranks")
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON, for tickets")
    options = parser.parse_intermixed_args(arguments)
    from dist_fair.diagnosis.services import bare_srun

    if fault := bare_srun(os.environ):
        if os.environ.get("SLURM_PROCID", "0") == "0":
            raise DistFairError(fault)
        return 2
    if options.ranks is not None:
        from dist_fair.engine.launch import launch_ranks

        return launch_ranks("doctor", options.ranks, [*options.overrides, *["--json"][: options.json]])
    from dist_fair.diagnosis.examination import CHECKS, examine
    from dist_fair.reporting.progress import Progress

    site = _site(options.overrides)
    leader, before = site.ranks.rank == 0, {*threading.enumerate()}
    with Progress(len(CHECKS), "doctor", leader and not options.json, every=len(CHECKS)) as progress:
        verdicts = examine(site, progress=lambda name: progress.step(check=name))
    if leader:
        print(_document(verdicts, site.ranks.world)) if options.json else _show(verdicts)
    code = 2 * any(verdict.state == "problem" for verdict in verdicts)
    if any(thread.name.startswith("check ") for thread in {*threading.enumerate()} - before):
        sys.stdout.flush()
        os._exit(code)  # a check hangs in a driver or a collective, where Python's own end would wait for it
    return code


def _site(overrides: Sequence[str]):
    """This rank and, where they can be reached, the others."""
    from dist_fair.diagnosis.ranks import Ranks, meet
    from dist_fair.diagnosis.site import Site

    apart = None
    try:
        ranks = meet(os.environ)
    except DistFairError as error:
        if os.environ.get("RANK", "0") != "0":
            raise
        ranks, apart = Ranks(), str(error)
    site = Site(ranks, os.environ, apart=apart)
    site.hosts = ranks.collect("hello", socket.gethostname())
    if overrides:
        from dist_fair.recipe.composition import load
        from dist_fair.recipes import interventions

        try:
            site.resolved = load(overrides, interventions())
        except DistFairError as error:
            site.fault = str(error)
    return site


def _show(verdicts: Sequence) -> None:
    """The table, and how many of what."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dist_fair.reporting.progress import say

    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("", "what", "found, and what to do"):
        table.add_column(name, no_wrap=name != "found, and what to do", overflow="fold")
    for verdict in verdicts:
        told = Text(verdict.found)
        if verdict.fix:
            told.append(f"\n-> {verdict.fix}", "bold")
        table.add_row(Text(verdict.state, styles[verdict.state]), Text(verdict.name), told)
    say(table)
    counts = Counter(verdict.state for verdict in verdicts)
    say(f"\n{counts['problem']} problem(s), {counts['warning']} warning(s), {counts['ok']} ok")


def _document(verdicts: Sequence, world: int) -> str:
    return json.dumps({"world": world, "verdicts": [asdict(verdict) for verdict in verdicts]}, indent=2)


if __name__ == "__main__":
    sys.exit(guarded(main))
