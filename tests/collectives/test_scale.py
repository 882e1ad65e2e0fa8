"""What a step puts on the wire is what benchmarks/scale.py says, for every shipped recipe: as many bytes on any number
of ranks. The ranks are those of a fake process group; what torch is asked to move is looked at, not only our own count.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_fair.collectives import Communicator
from dist_fair.detectors import registry
from dist_fair.detectors.norm import convert_norms
from dist_fair.interventions import base
from dist_fair.interventions.base import Intervention, Sum
from dist_fair.recipe import cards

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS, FEATURES, PIXELS = 4, 300, 4
WORLDS, MANY = (1, 2, 8), 1024
SMALL = {"daid_release": ("interventions.low_rank_projection.rank=300",)}  # of 1792 features, which are not there


class Wire(TorchDispatchMode):
    """Within it: what torch is asked to move, by the name of the collective: bytes put in, bytes that come back."""

    def __init__(self, comm):
        super().__init__()
        self.comm, self.moved = comm, {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            gathers = "gather" in function.name()
            back, put = (
                sum(one.numel() * one.element_size() for one in tree_leaves(arguments[place])) for place in (0, gathers)
            )
            before = self.moved.get(self.comm.last, (0, 0))
            self.moved[self.comm.last] = before[0] + put, before[1] + back - (put if gathers else 0)
        return function(*arguments, **(keywords or {}))


@pytest.fixture(scope="module")
def scale():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        known = dict(registry._registry)
        import scale

        patch.setattr(scale, "FEATURES", FEATURES)
        patch.setitem(scale.PIXELS, "cpu", PIXELS)
        yield scale
        registry._registry.clear()
        registry._registry.update(known)
        for name in ("scale", "timing", "pg_fdd_cost"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def groups(scale):
    with scale.fake_worlds((*WORLDS, MANY)) as found:
        yield found


def formulas(scale, rank):
    """What the table of interventions says that a rank puts into each collective in a step."""
    index, passes = scale.plan(ROWS).index, 1 if rank.recipe.optimizer.sam.rho is None else 2
    *_, last = rank.module.interventions.values()
    found = {}
    for name, settings in rank.recipe.interventions.items():
        variants = [f"{name} {key}={getattr(settings, key)}" for key in ("pairs", "support") if hasattr(settings, key)]
        formula = next((scale.FORMULAS[one] for one in (*variants, name) if one in scale.FORMULAS), None)
        if formula is None:
            assert type(rank.module.interventions[name]).summarise is Intervention.summarise
            continue
        groups = [len(index.attributes[one].values) for one in getattr(settings, "attributes", [])]
        matches = 1 + len(index.manipulations.values) if getattr(settings, "match", "") == "manipulation" else 2
        letters = {"b": ROWS, "d": FEATURES, "r": last.width, "p": scale.POOLED, "G": int(np.prod(groups)),
                   "M": matches, "m": getattr(settings, "grid", 0)}  # fmt: skip
        word, numbers = formula.split(" * ", 1)
        kind = "summaries/gather" if "b" in formula else "summaries/sum"
        for collective in [name, f"{name}/backward"] if name == "subgroup_norm" else [kind]:
            found.setdefault(collective, []).append((int(word), eval(numbers, letters)))
    return {
        collective: passes * max(word for word, _ in parts) * sum(number for _, number in parts)
        for collective, parts in found.items()
    }


def differences(scale, rank, comm):
    """Where the bytes of a step, by our own count or by what torch is asked to move, are not what the table says."""
    expected = formulas(scale, rank)
    comm.drain()
    with Wire(comm) as wire:
        rank.step(comm)()
    counted = {name: count.bytes for name, count in comm.drain().items()}
    wrong = [] if counted == expected else [(counted, expected)]
    for name, put in counted.items() if comm.world > 1 else []:
        back = put * (comm.world - 1) if name == "summaries/gather" else put
        wrong += [] if wire.moved[name] == (put, back) else [(name, wire.moved[name], (put, back))]
    return wrong


def made(scale, case):
    return scale.Rank.of(case, "cpu", rows=ROWS, pixels=PIXELS)


@pytest.mark.parametrize("name", cards.names("recipe"))
def test_bytes_of_every_recipe_are_those_of_the_table(scale, groups, name):
    rank = made(scale, scale.Case(name, SMALL.get(name, ())))
    assert [differences(scale, rank, Communicator(groups[world])) for world in (*WORLDS, MANY)] == [[]] * 4


def test_bytes_of_every_measured_case_are_those_of_the_table(scale, groups):
    for case in scale.CASES:
        rank = made(scale, case)
        assert [differences(scale, rank, Communicator(groups[world])) for world in WORLDS] == [[]] * 3, str(case)


# Bugs that the test must see ------------------------------------------------------------------------------------------


def gather_what_adds(monkeypatch):
    """Sums as SyncBatchNorm makes them: everybody's numbers are gathered, then added."""

    def gathered(self, tensor, name):
        return self.replicated_gather(tensor[None], name).sum(0)

    monkeypatch.setattr(Communicator, "replicated_sum", gathered)


def exchange_one_by_one(monkeypatch):
    """Each intervention's summary travels with a number that says whose it is."""
    whole = base.exchange

    def exchange(summaries, comm, sizes):
        tagged = {owner: {**parts, "owner": Sum(torch.zeros(1))} for owner, parts in summaries.items()}
        return whole(tagged, comm, sizes)

    monkeypatch.setattr("dist_fair.engine.module.exchange", exchange)


def count_half(monkeypatch):
    """Our own count takes numbers for bytes."""

    def enter(self, name, tensor):
        self.last = name
        self.counts[name].calls += 1
        self.counts[name].bytes += tensor.numel()

    monkeypatch.setattr(Communicator, "_enter", enter)


@pytest.mark.parametrize("plant", [gather_what_adds, exchange_one_by_one, count_half])
def test_a_wire_that_differs_from_the_table_is_seen(scale, groups, plant, monkeypatch):
    rank = made(scale, scale.Case("daid"))
    plant(monkeypatch)
    assert differences(scale, rank, Communicator(groups[8]))


# Norms, scoring, and the table itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 8, MANY])
def test_bytes_of_a_synced_norm_are_those_of_its_channels(groups, world):
    comm, channels = Communicator(groups[world]), 5
    layer = convert_norms(nn.BatchNorm2d(channels), "synced", comm)
    with Wire(comm) as wire:
        layer(torch.randn(3, channels, 2, 2, requires_grad=True)).sum().backward()
    sizes = {"norm/forward": 8 * (2 * channels + 1), "norm/backward": 8 * 2 * channels}
    assert wire.moved == {name: (size, size) for name, size in sizes.items()}
    assert {name: count.bytes for name, count in comm.drain().items()} == sizes


def rows_of(text, title):
    """The cells of the lines of a Markdown text that begin with this cell."""
    cells = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    return [row for row in cells if row[0] == title]


def test_maps_that_are_scored_go_once_whatever_the_number_of_ranks(scale, groups, monkeypatch):
    monkeypatch.setattr(scale, "SCORED", 16)
    monkeypatch.setattr(scale, "FEATURES", 24)
    bench = scale.Bench("cpu", {world: Communicator(groups[world]) for world in WORLDS}, rounds=1)
    text = scale.scoring(bench)
    for world in WORLDS:
        *_, maps, of_groups, scores = rows_of(text, str(world))[0]
        assert maps == f"{4 * 24 * scale.SIDE**2 * 16 // world:,}"
        assert (of_groups, scores) == (str(8 * 16 // world), str(8 * 24 // world))


def test_the_table_shows_what_grows(scale, groups, monkeypatch):
    monkeypatch.setattr(scale, "CASES", (scale.Case("erm"), scale.Case("dag_fdd_xception")))
    comms = {world: scale.FakeCommunicator(groups[world]) for world in WORLDS}
    text = scale.step(scale.Bench("cpu", comms, rounds=1))
    (_, *times), (_, *moved) = rows_of(text, "erm")
    assert len(times) == 6
    assert moved == ["summaries/sum", "24", "24", "24"]
    own = 12 * scale.ROWS
    assert rows_of(text, "dag_fdd_xception")[1][1:] == ["summaries/gather", str(own), str(own), f"{7 * own:,}"]


def test_what_is_too_slow_is_extrapolated_and_bytes_that_grow_are_refused(scale, groups, monkeypatch):
    assert scale.extrapolated({1: 1.0, 8: 3.0}, 64, growth=2) == 1 + 2 * 64
    monkeypatch.setitem(scale.LIMIT, "cpu", 0.0)
    bench = scale.Bench("cpu", {world: Communicator(groups[world]) for world in WORLDS}, rounds=1)
    rank = made(scale, scale.Case("erm"))
    ways = {world: rank.step(comm) for world, comm in bench.comms.items()}
    assert [*scale.affordable(scale.Case("erm"), ways, bench)] == [1, 2]

    def growing():
        bench.comms[2].sum(torch.zeros(1), "more")

    with pytest.raises(scale.DistFairError, match="erm: a rank of 2 puts in"):
        scale.affordable(scale.Case("erm"), ways | {2: growing}, bench)
