"""What a check says, and how the words of many ranks become one line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

OK, WARNING, PROBLEM = STATES = ("ok", "warning", "problem")
TOLD = 2  # what ranks say of a problem: one may have it, and the other wait for that one


@dataclass(frozen=True)
class Verdict:
    """One line of a diagnosis.

    name: what was looked at. state: one of STATES. found: what is there, without secrets. fix: what to do, "" if
    nothing or if found says it.
    alike: all ranks should have found the same.
    """

    name: str
    state: str
    found: str
    fix: str = ""
    alike: bool = False


def ok(name: str, found: str, alike: bool = False) -> Verdict:
    """Nothing to do."""
    return Verdict(name, OK, found, "", alike)


def warning(name: str, found: str, fix: str, alike: bool = False) -> Verdict:
    """Runs will work, slower or with a risk."""
    return Verdict(name, WARNING, found, fix, alike)


def problem(name: str, found: str, fix: str = "", alike: bool = False) -> Verdict:
    """Runs will fail, or go wrong."""
    return Verdict(name, PROBLEM, found, fix, alike)


def merged(reports: Mapping[int, Sequence[Verdict]], hosts: Mapping[int, str]) -> list[Verdict]:
    """One verdict a name over all ranks, in the order of the checks; where ranks differ, who found what.

    reports: rank -> its verdicts. hosts: rank -> its node.
    """
    by_name: dict[str, dict[int, Verdict]] = {}
    for rank, verdicts in sorted(reports.items()):
        for verdict in verdicts:
            by_name.setdefault(verdict.name, {})[rank] = verdict
    return [_merged(verdicts, hosts) for verdicts in by_name.values()]


def _merged(verdicts: Mapping[int, Verdict], hosts: Mapping[int, str]) -> Verdict:
    worst = max(verdicts.values(), key=lambda verdict: STATES.index(verdict.state))  # the first rank's of equal ones
    groups: dict[str, list[int]] = {}
    for rank, verdict in verdicts.items():
        if worst.alike or verdict.state == worst.state:
            groups.setdefault(verdict.found, []).append(rank)
    if len(groups) == 1 and len(groups[worst.found]) == len(verdicts):
        return worst
    if worst.alike and len(groups) > 1:
        told = "; ".join(f"{found} on {names(ranks, hosts)}" for found, ranks in groups.items())
        if worst.state == OK:
            return replace(worst, state=WARNING, found=told, fix="give all ranks the same: they make one run")
        return replace(worst, found=told)
    if worst.state == OK:
        return replace(worst, found=f"{worst.found} ({names([*groups[worst.found]], hosts)})")
    told = [f"{names(ranks, hosts)}: {found}" for found, ranks in [*groups.items()][:TOLD]]
    if others := [rank for ranks in [*groups.values()][TOLD:] for rank in ranks]:
        told.append(f"and {names(others, hosts)} likewise")
    return replace(worst, found="; ".join(told))


def names(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """ "rank 3 on node7", "ranks 0-3, 8 on node1, node2 and 3 more"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    listed = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    nodes = [hosts.get(rank, "an unknown node") for rank in sorted(ranks)]
    return f"rank{'s' if len(ranks) > 1 else ''} {listed} on {few(nodes)}"


def few(nodes: Sequence[str]) -> str:
    """The first three names, each once, and how many more there are."""
    nodes = [*dict.fromkeys(nodes)]
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")
