"""What a step costs one rank of W, without the others: `python benchmarks/scale.py [--device cuda] [--quick]`.

A fake process group of torch stands in for the others. Its collectives return at once: an all-reduce leaves a rank its
own numbers, an all-gather gives it its own rows W times, of which other rows are then made, lest it sorts copies (an
all-to-all gives it what was in memory, under torch 2.11). So what comes out means nothing. How long it takes, and what
goes on the wire, are those of one rank of W: 64 rows a rank, a global batch of 64 W.

    step        Every recipe, with the outputs of a network given: from there on all is as in training, down to the
                gradients of the outputs. Not in it: network, optimizer, and the wire's own time; making room for what
                arrives is. Then the bytes that the rank puts into each collective, and those that come back.
    network     The 53 synced batch norms of a ResNet-50, forward and backward. For comparison, what its gradients
                weigh, and SAM's way up and back with as many weights.
    scoring     A batch of SFD's scoring of channels, which are split over the ranks.

On a CPU by the process's CPU time; medians over rounds that take each W once, in random order. Steps of more than LIMIT
seconds are extrapolated, by the growth that their case names. Three minutes on one thread. Prints Markdown, writes it
to benchmarks/results/scale.md; --quick (W = 1 and 8, one round, 45 seconds) only prints.
"""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
import torch.distributed as dist
from pg_fdd_cost import Setting, made_batch, plan
from timing import Way, measured, ratio_cells
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_fair.cli import guarded
from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.window import Window
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.detectors.norm import convert_norms
from dist_fair.detectors.registry import register
from dist_fair.engine.assembly import build_module
from dist_fair.engine.module import Losses, TrainingModule
from dist_fair.engine.run_folder import write_text
from dist_fair.engine.sharpness import gradients, perturbed
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts
from dist_fair.interventions.channel_decoupling import ChannelDecoupling
from dist_fair.recipe.composition import load
from dist_fair.recipe.schema import Recipe, Sam
from dist_fair.recipes import interventions
from dist_fair.reporting.progress import say
from dist_fair.reporting.tables import markdown

WORLDS = (1, 8, 64, 512, 1024)
ROWS, FEATURES = 64, 2048
POOLED, SIDE, SCORED = 256, 8, 128  # width of PG-FDD's blocks; height of the last map; rows of a scoring batch
PROGRESS, PIXELS = 0.99, {"cpu": 64, "cuda": 256}  # all delays and ramps are over; of images
LIMIT, BUDGET = {"cpu": 2.5, "cuda": 10.0}, 3.0  # seconds: of one step, of the rounds of one row


@dataclass(frozen=True)
class Case:
    """A recipe with arguments, or without SAM and with `only` one intervention. In the end its time is W ** growth."""

    recipe: str
    arguments: tuple[str, ...] = ()
    only: str = ""
    growth: int = 1

    def __str__(self) -> str:
        only = [f"({self.only} alone)"] if self.only else []
        return " ".join([self.recipe, *(argument.rpartition(".")[2] for argument in self.arguments), *only])


MINED = ("interventions.pair_alignment.pairs=hardest", "interventions.pair_alignment.hardest=1")
CASES = (
    *map(Case, ("erm", "ipw", "daid", "daid_xception", "sfd_gda", "dag_fdd", "dag_fdd_xception")),
    *map(Case, ("daw_fdd", "daw_fdd_xception", "pg_fdd")),
    *(Case("pg_fdd", only=name) for name in ("contrastive_loss", "reconstruction_loss", "margin_loss")),
    Case("daid_xception", MINED, growth=2),
    Case("sfd_gda", ("interventions.distribution_alignment.support=samples",), growth=3),
)


# A rank without the others --------------------------------------------------------------------------------------------


@contextmanager
def fake_worlds(worlds: Sequence[int]) -> Iterator[dict[int, dist.ProcessGroup]]:
    """Of each number of ranks a group in which this process is rank 0 and no other rank exists."""
    dist.init_process_group("fake", rank=0, world_size=max(worlds), store=FakeStore())
    try:
        yield {world: dist.new_group(list(range(world))) for world in worlds}
    finally:
        dist.destroy_process_group()


class FakeCommunicator(Communicator):
    """Makes other rows of the copies that a fake group gathers; columns of whole numbers stay as they are."""

    def replicated_gather(self, rows: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> torch.Tensor:
        everyone, known = super().replicated_gather(rows, name, sizes), getattr(self, "differences", None)
        if known is None or known.shape != everyone.shape:
            self.differences = 0.05 * torch.rand_like(everyone.detach()).masked_fill((rows == rows.round()).all(0), 0)
        return everyone + self.differences


@register("given_outputs")
class GivenOutputs(Detector):
    """No network. What one would make of this rank's rows are its parameters: backward ends there."""

    offers = ("shared_logits", "specific_logits", "demographic_logits", "shared", "specific", "reconstruction")

    def __init__(self, pretrained: bool | str, arguments: Mapping[str, int], needs: Mapping[str, int]):
        super().__init__(FEATURES, FEATURES)
        self.classifier = nn.Linear(FEATURES, 2)
        shapes = {"features": (FEATURES,), **{name: (classes or POOLED,) for name, classes in needs.items()}}
        if shapes.pop("reconstruction", None):
            shapes |= {"code": (3, arguments["pixels"], arguments["pixels"]), "condition": (1,)}
        self.made = nn.ParameterDict({name: torch.randn(arguments["rows"], *shape) for name, shape in shapes.items()})

    def extract(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> Outputs:
        features, extras = self.made["features"], {name: one for name, one in self.made.items() if name != "features"}
        return Outputs(features[:, :0], features, features[:, :, None, None], extras, lambda code, *_: code)

    def resize_classifier(self, features: int) -> None:
        self.classifier = nn.Linear(features, 2)

    def classify(self, features: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        return self.classifier(features)


@dataclass(frozen=True)
class Rank:
    """What rank 0 of any W has of a recipe: its module and its rows."""

    recipe: Recipe
    module: TrainingModule
    batch: Batch

    @classmethod
    def of(cls, case: Case, device: str, rows: int = ROWS, pixels: int | None = None) -> "Rank":
        pixels = pixels or PIXELS[device]
        arguments = [f"recipe={case.recipe}", *case.arguments, "detector.name=given_outputs"]
        arguments += [f"+detector.arguments.rows={rows}", f"+detector.arguments.pixels={pixels}"]
        if case.only:
            others = [name for name in load(arguments, interventions()).recipe.interventions if name != case.only]
            arguments += ["optimizer.sam.rho=null", *(f"~interventions.{name}" for name in others)]
        recipe = load(arguments, interventions()).recipe
        module = build_module(recipe, plan(rows), steps=100, comm=Communicator().alone()).train().to(device)
        return cls(recipe, module, made_batch(Setting(device, (), pixels, rows, 0)))

    def step(self, comm: Communicator) -> Way:
        """Summaries, exchange, objectives, gradients of the outputs; with SAM twice, and the way up and back."""

        def backward(batches: Sequence[Batch]) -> list[Losses]:
            history = [self.module(Window([batch]), PROGRESS) for batch in batches]
            for losses in history:
                losses.loss.backward()
            return history

        def run() -> None:
            self.module.comm = comm
            self.module.zero_grad(set_to_none=True)
            batch = replace(self.batch, sizes=(len(self.batch),) * comm.world)
            gradients(self.recipe.optimizer.sam, self.module, [batch], PROGRESS, backward)

        return run


# Tables ---------------------------------------------------------------------------------------------------------------

FORMULAS = {  # intervention -> bytes that a rank puts in; what is gathered has a factor b
    "cross_entropy": "4 * 6",
    "subgroup_norm": "8 * (G + 1) * (2 * d + 1)",
    "pair_alignment": "8 * G * M * (r + 1)",
    "pair_alignment pairs=hardest": "4 * b * (r + 2)",
    "distribution_alignment": "8 * 2 * (G + 1) * (m + 1)",
    "distribution_alignment support=samples": "8 * b * 3",
    "conditional_value_at_risk": "4 * b * 3",
    "contrastive_loss": "4 * b * 2 * (p + 4)",
    "reconstruction_loss": "4 * 6",
    "shared_forgery": "4 * 2",
    "specific_forgery": "4 * 2",
    "margin_loss": "4 * 2",
}
LETTERS = """b: rows of the rank. d: features, and r: those of them that the classifier sees. p: features of each of
PG-FDD's blocks. G: groups. M: labels or manipulations in which pairs agree. m: bins of a grid. What goes together goes
in the widest type: 8 bytes for 4. subgroup_norm puts in as much again in backward; SAM does everything twice."""


@dataclass(frozen=True)
class Bench:
    """Where to measure, as rank 0 of which worlds, in how many rounds at most."""

    device: str
    comms: Mapping[int, Communicator]
    rounds: int

    def once(self, way: Way) -> float:
        """Seconds, after it has run."""
        return float(measured({"": way}, 1, self.device)[""][0])

    def seconds(self, ways: Mapping[int, Way], about: float) -> dict[int, np.ndarray]:
        """Of the way of each W, in each round, which takes `about` seconds."""
        rounds = min(self.rounds, max(3, int(BUDGET / about)))
        found = measured({str(world): way for world, way in ways.items()}, rounds, self.device)
        return {int(world): taken for world, taken in found.items()}

    def bytes(self, world: int, way: Way) -> dict[str, int]:
        """What a rank puts into each collective."""
        self.comms[world].drain()
        way()
        return {name: count.bytes for name, count in self.comms[world].drain().items()}

    def table(self, ways: Mapping[int, Way], collectives: Sequence[str]) -> str:
        """Time, over that of one rank, and bytes put in, a row for each W."""
        rows, seconds = [], self.seconds(ways, len(ways) * self.once(ways[1]))
        for world, taken in seconds.items():
            counted = self.bytes(world, ways[world])
            put = [f"{counted.get(name, 0):,}" for name in collectives]
            rows.append([f"{world:,}", f"{np.median(taken) * 1e3:,.1f}", *ratio_cells(taken / seconds[1], 3), *put])
        return markdown(("ranks", "ms", "over 1", "20 to 80 %", *(f"in, {name}" for name in collectives)), rows, ())


def extrapolated(took: Mapping[int, float], world: int, growth: int) -> float:
    """Seconds of a step at W, from those at one rank and at the most ranks that were measured."""
    last = max(took)
    return took[1] + max(0.0, took[last] - took[1]) * (world / last) ** growth


def affordable(case: Case, ways: Mapping[int, Way], bench: Bench) -> dict[int, float]:
    """Those W whose steps can be run here, and the seconds that they took in a first try.

    Raises DistFairError where a rank puts in other numbers of bytes than if it were alone.
    """
    took, alone = {}, bench.bytes(1, ways[1])
    for world, way in ways.items():
        if len(took) > 1 and extrapolated(took, world, case.growth) > LIMIT[bench.device]:
            break
        try:
            counted, took[world] = bench.bytes(world, way), bench.once(way)
        except torch.OutOfMemoryError:
            break
        if counted != alone:
            raise DistFairError(f"{case}: a rank of {world} puts in {counted}, one rank {alone}")
    return took


def mostly(way: Way, device: str) -> str:
    """The three operations that take most of its time, each by itself, with their parts of it."""
    with profile(activities=[getattr(ProfilerActivity, kind) for kind in {"CPU", device.upper()}]) as found:
        way()
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, kind) for event in found.key_averages() if event.key.startswith("aten::")}
    most = sorted(times, key=times.get)[:-4:-1]
    return ", ".join(f"{name.removeprefix('aten::')} {times[name] / sum(times.values()):.0%}" for name in most)


def step(bench: Bench) -> str:
    """Time and bytes of every case."""
    times, sentences, wires, most = [], [], [], max(bench.comms)
    for case in CASES:
        say(f"step: {case}")
        step_as = Rank.of(case, bench.device).step
        ways = {world: step_as(comm) for world, comm in bench.comms.items()}
        took = affordable(case, ways, bench)
        seconds, last = bench.seconds({world: ways[world] for world in took}, sum(took.values())), max(took)
        median = {world: float(np.median(taken)) for world, taken in seconds.items()}
        beyond = {world: extrapolated(median, world, case.growth) for world in bench.comms}
        guesses = {world: f"({s * 1e3:,.0f})" if s < 86400 else f"({s / 86400:,.0f} d)" for world, s in beyond.items()}
        cells = [*(guesses | {world: f"{one * 1e3:,.1f}" for world, one in median.items()}).values()]
        times.append([str(case), *cells, f"{last:,}", *ratio_cells(seconds[last] / seconds[1], 2)])
        if median[last] > 1.3 * median[1]:
            how = "" if last == most else ", extrapolated"
            why = f"At W = {last:,} mostly {mostly(ways[last], bench.device)}."
            sentences.append(f"- At W = {most:,} a step of `{case}` takes {beyond[most]:,.2f} s{how}. {why}")
        for name, put in bench.bytes(1, ways[1]).items():
            back = [put * (world - 1) if name == "summaries/gather" else put for world in bench.comms if world > 1]
            wires.append([str(case), name, f"{put:,}", *(f"{one:,}" for one in back)])
    worlds = [f"W={world:,}" for world in bench.comms]
    time = ("recipe", *(f"{world}, ms" for world in worlds), "last", "last / W=1", "20 to 80 %")
    wire = ("recipe", "collective", "bytes in", *(f"back, {world}" for world in worlds[1:]))
    return f"""## step

A rank has {ROWS} rows. Last: the most ranks that were measured; in brackets: extrapolated. support=samples also needs
memory: its tensors have 2 * G * ({ROWS} * W) ** 2 numbers, of 8 bytes.

{markdown(time, times, time[:1])}
{chr(10).join(sentences)}

In a step a rank puts in as many bytes, whatever W is; of what is gathered more comes back, the more ranks there are.

{markdown(wire, wires, wire[:2])}
{LETTERS}

{markdown(("intervention", "bytes in"), [list(one) for one in FORMULAS.items()], ("intervention", "bytes in"))}"""


def network(bench: Bench) -> str:
    """What ranks add to a ResNet-50: its synced batch norms, forward and backward; its gradients; SAM."""
    say("network")
    pixels, shapes = PIXELS[bench.device], []
    with torch.device("meta"):
        backbone = timm.create_model("resnet50", num_classes=2)
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    backbone(torch.empty(ROWS, 3, pixels, pixels, device="meta"))
    kind = {"device": bench.device, "dtype": torch.bfloat16 if bench.device == "cuda" else torch.float32}
    maps = {shape: torch.randn(shape, **kind).to(memory_format=torch.channels_last) for shape in {*shapes}}

    def way(comm: Communicator) -> Way:
        layers = [convert_norms(nn.BatchNorm2d(shape[1]).to(bench.device), "synced", comm) for shape in shapes]

        def run() -> None:
            for layer, shape in zip(layers, shapes, strict=True):
                layer(maps[shape].detach().requires_grad_()).backward(maps[shape])

        return run

    weights = [nn.Parameter(torch.randn(one.shape, device=bench.device)) for one in backbone.parameters()]

    def climb() -> None:
        for weight in weights:
            weight.grad = weight.detach()
        with perturbed(weights, Sam(rho=0.05)):
            pass

    ways = {world: way(comm) for world, comm in bench.comms.items()}
    return f"""## network

{len(shapes)} norms, {ROWS} images of {pixels} px, {kind["dtype"]}, channels_last. C channels: 8 * (2 * C + 1) bytes
forward, 8 * 2 * C backward, and as many back. One rank has torch's own norm.

{bench.table(ways, ("norm/forward", "norm/backward"))}
Its gradients are {4 * sum(weight.numel() for weight in weights):,} bytes in a step, with SAM twice, and as many back.
SAM's way up and back takes {bench.once(climb) * 1e3:,.1f} ms. Neither depends on W.
"""


def scoring(bench: Bench) -> str:
    """Time and bytes of a scoring batch, of the rank that has most rows of it."""
    say("scoring")
    settings = ChannelDecoupling.Settings(batches=1, batch_size=SCORED)
    part = ChannelDecoupling(settings, Facts(plan(SCORED).index, np.zeros(0), 0, 100, FEATURES), FEATURES)
    detector = GivenOutputs(False, {"rows": 0}, {})
    detector.extract = lambda images: Outputs(images, images, feature_map=images)
    whole = made_batch(Setting(bench.device, (), 1, SCORED, 0))
    whole = replace(whole, images=torch.rand(SCORED, FEATURES, SIDE, SIDE, device=bench.device))

    def way(comm: Communicator) -> Way:
        sizes = tuple(np.diff(np.arange(comm.world + 1) * SCORED // comm.world).tolist()[::-1])
        data = SimpleNamespace(batches=lambda *_: [whole.rows(slice(sizes[0]), sizes)])
        return lambda: part.scores(0, detector, data, comm)

    ways = {world: way(comm) for world, comm in bench.comms.items()}
    names = [f"channel_decoupling/{what}" for what in ("maps", "groups", "scores")]
    return f"""## scoring

A batch of {SCORED} rows over all ranks, maps of {FEATURES:,} x {SIDE} x {SIDE}; a recipe takes 8 or 200, three times
a run. b rows put in 4 * C * H * W * b bytes of maps. As many come back, of fewer channels and all rows.

{bench.table(ways, names)}"""


def main(arguments: list[str]) -> int:
    """Exit code 0; a DistFairError is left to the caller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="W = 1 and 8, one round; only prints")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DistFairError("--device cuda: torch sees no GPU here; leave it out")
    torch.set_num_threads(1)
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, one CPU thread"
    place = f"{place}, torch {torch.__version__}, Python {platform.python_version()}"
    command = shlex.join(["python", "benchmarks/scale.py", *arguments])
    with fake_worlds(WORLDS[:2] if options.quick else WORLDS) as groups:
        comms = {world: FakeCommunicator(group) for world, group in groups.items()}
        bench = Bench(options.device, comms, 1 if options.quick else 30)
        sections = [section(bench) for section in (step, network, scoring)]
    text = "\n".join([f"# What a step costs one rank of W\n\n`{command}` ({place})\n", *sections])
    print(text)
    if not options.quick:
        write_text(Path(__file__).parent / "results" / "scale.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
