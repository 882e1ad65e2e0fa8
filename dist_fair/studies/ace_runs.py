"""Which runs an ACE study compares: named on the command line, or planned to be trained; and what they predicted."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_fair.engine.assembly import dataset_names
from dist_fair.engine.run_folder import RunFolder
from dist_fair.errors import DistFairError, nearest
from dist_fair.metrics.predictions import Predictions
from dist_fair.studies.ace import REGIMES, Model, average_causal_effect, capacities, check_replicates
from dist_fair.studies.runs import Run

NAME = r"[A-Za-z0-9_-]+"
CHOSEN = ("recipe", "detector", "out")  # the keys that the study sets for each of its runs


def named_runs(entries: Sequence[str]) -> dict[Model, Path]:
    """The run folder of every model from entries CAPACITY/REGIME=RUN, such as "low/0=runs/a".

    Raises DistFairError for another form, a model named twice, and a capacity without both regimes.
    """
    runs: dict[Model, Path] = {}
    for entry in entries:
        found = re.fullmatch(rf"({NAME})/([01])=(.+)", entry)
        if not found:
            raise DistFairError(f"--runs {entry}: must be CAPACITY/REGIME=RUN with REGIME 0 (plain) or 1 (fair), as in "
                                "low/0=runs/a")  # fmt: skip
        model = found[1], int(found[2])
        if model in runs:
            raise DistFairError(f"--runs {entry}: {found[1]}/{found[2]} is {runs[model]} already: name each model once")
        runs[model] = Path(found[3])
    capacities([*runs])
    return runs


def named_capacities(entries: Sequence[str]) -> dict[str, str]:
    """Detector card by capacity, from entries NAME=CARD, such as "low=small"; raises DistFairError as `named_runs`."""
    cards: dict[str, str] = {}
    for entry in entries:
        found = re.fullmatch(rf"({NAME})=(.+)", entry)
        if not found:
            raise DistFairError(f"--capacities {entry}: must be NAME=DETECTOR, as in low=small; settings of the runs "
                                "(key=value) stand before --capacities")  # fmt: skip
        if found[1] in cards:
            raise DistFairError(f"--capacities {entry}: '{found[1]}' is {cards[found[1]]} already: name each once")
        cards[found[1]] = found[2]
    return cards


def planned_runs(
    out: Path, recipes: Sequence[str], cards: Mapping[str, str], overrides: Sequence[str]
) -> dict[Model, Run]:
    """The runs to be trained, in OUT/runs/CAPACITY-REGIME.

    recipes: of the regimes 0 and 1; cards: detector card by capacity; overrides: further key=value of every run.
    Raises DistFairError for an override of what the study sets.
    """
    for override in overrides:
        if override.partition("=")[0] in CHOSEN:
            raise DistFairError(f"{override}: the study sets it for each run: use --plain, --fair, --capacities and "
                                "--out")  # fmt: skip
    return {
        (mc, f): Run(out / "runs" / f"{mc}-{f}", (f"recipe={recipes[f]}", f"detector={card}", *overrides))
        for mc, card in cards.items()
        for f in REGIMES
    }


def check_planned(
    runs: Sequence[Run], datasets: Sequence[str] | None, attributes: Sequence[str] | None, replicates: int
) -> None:
    """Raises DistFairError for what training could only lead to: data sets and attributes that no run will have."""
    check_replicates(replicates)
    for run in runs:
        data = run.resolved.recipe.data
        for option, wanted, known in (
            ("--datasets", datasets, [*dataset_names(data.eval).values()]),
            ("--attributes", attributes, [*data.attributes]),
        ):
            if odd := [name for name in wanted or [] if name not in known]:
                raise DistFairError(f"{option} {odd[0]}: {run.folder} will not have it: {nearest(odd[0], known)}")


def shared_datasets(runs: Mapping[Model, Path], wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The datasets to be judged: those wanted, or all that every run has predicted; and those only some have.

    Raises DistFairError, with the command that mends it, where a run has no predictions, or not those wanted, or
    where all runs share none.
    """
    there = {model: {file.stem for file in (run / "predictions").glob("*.parquet")} for model, run in runs.items()}
    for model, run in runs.items():
        lacking = sorted({*wanted} - there[model]) if wanted else []
        if lacking or not there[model]:
            what = f"predictions of {', '.join(lacking)}" if lacking else "predictions"
            beside = f"; there are {', '.join(sorted(there[model]))}" if lacking and there[model] else ""
            setting = " data.eval=[...]" if lacking else ""
            raise DistFairError(f"{run} ({model[0]}/{model[1]}) has no {what}{beside}: `dist-fair evaluate {run}"
                                f"{setting}` writes them")  # fmt: skip
    if wanted:
        return [*dict.fromkeys(wanted)], []
    shared = set.intersection(*there.values())
    if not shared:
        found = "; ".join(f"{run}: {', '.join(sorted(there[model]))}" for model, run in runs.items())
        raise DistFairError(f"the runs share no data set ({found}): `dist-fair evaluate RUN data.eval=[...]` on the "
                            "same ones")  # fmt: skip
    return sorted(shared), sorted(set.union(*there.values()) - shared)


def judge(runs: Mapping[Model, Path], dataset: str, attributes: Sequence[str] | None, *settings) -> dict:
    """`average_causal_effect` on what every run predicted on a dataset; attributes: all of the predictions if None."""
    predictions = {model: Predictions.read(RunFolder(run).predictions(dataset)) for model, run in runs.items()}
    attributes = attributes or [*next(iter(predictions.values())).attributes]
    try:
        return average_causal_effect(predictions, attributes, *settings)
    except DistFairError as error:
        raise DistFairError(f"{dataset}: {error}") from error
