"""The check that does what all others look at: one real step of the recipe, as training takes it."""

from contextlib import nullcontext

from dist_fair.diagnosis.experiment import undrawn
from dist_fair.diagnosis.network import connected
from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, ok, problem, warning

SLOW = (
    "a step that takes so long, or a rank that waits for another one: `dist-fair train --dry-run` with the same "
    "settings has no such limit"
)


def one_step(site: Site) -> Verdict | None:
    """Two steps on all ranks together, on the device, data and backend of the run; nothing is written."""
    if site.resolved is None:
        return None
    if site.apart is not None:
        return warning("one step", "not taken by rank 0 alone", "see `ranks`")
    stuck = [rank for rank, one in site.ranks.collect("trial/stuck", site.stuck).items() if one]
    if unfit := site.ranks.tell("trial/unfit", sorted({*stuck, *site.ranks.lost})):
        who = ", ".join(map(str, unfit))
        return problem("one step", f"not taken without ranks {who}", "see `ranks` and `all-reduce`", alike=True)
    if undrawn(site):
        return ok("one step", "not taken: the demo faces are not drawn yet, training draws them", alike=True)
    from dist_fair.engine.launch import EVERYWHERE
    from dist_fair.training import Training

    with connected(site, "trial", EVERYWHERE) if site.ranks.world > 1 else nullcontext():
        trial = Training(site.resolved).trial()
    return ok("one step", "; ".join(trial.lines().values()))
