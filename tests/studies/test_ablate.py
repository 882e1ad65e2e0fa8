"""`dist-fair ablate`: rows become runs, runs become a table; what is wrong with a row is said before any is trained."""

import csv
from statistics import mean
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml

from dist_fair import ablate, cli
from dist_fair.cli import guarded
from dist_fair.errors import DistFairError
from dist_fair.recipe import cards
from dist_fair.recipe.composition import load
from dist_fair.recipes import interventions
from dist_fair.studies import runs
from dist_fair.studies.ablation import leave_one_out, read_table, rows_of, tables
from dist_fair.studies.runs import Run, results

PRESENT = ("cross_entropy", "channel_decoupling", "distribution_alignment")
DAID = ("cross_entropy", "inverse_propensity", "subgroup_norm", "low_rank_projection", "pair_alignment")
RECIPE = """
defaults: [sfd_gda]
train: {steps: 2, batch_size: 32}
data: {window: 8, image_size: 32, eval: [far]}
wandb: {mode: disabled}
detector: {arguments: {layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}}
"""
TABLE = """
rows:
  ERM: []
  GDA, weak:
    keep: [distribution_alignment]
    overrides: [interventions.distribution_alignment.weight=0.01]
  whole: all
"""


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(runs, "_start", lambda *_: pytest.fail("started"))


@pytest.fixture
def table(tmp_path):
    """Writes a table and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "table.yaml"
        path.write_text(text)
        return str(path)

    return write


def rows(path: str) -> list:
    return read_table(path, "table.yaml", PRESENT)


# Rows


def test_a_row_leaves_out_what_it_does_not_keep(table):
    erm, weak, whole = rows(table(TABLE))
    assert (erm.name, erm.kept, erm.slug) == ("ERM", ("cross_entropy",), "erm")
    assert erm.arguments == ["~interventions.channel_decoupling", "~interventions.distribution_alignment"]
    assert (weak.name, weak.slug) == ("GDA, weak", "gda_weak")
    assert weak.arguments == [
        "~interventions.channel_decoupling", "interventions.distribution_alignment.weight=0.01",
    ]  # fmt: skip
    assert (whole.kept, whole.arguments) == (PRESENT, [])


def test_keep_is_of_every_row_and_cross_entropy_if_not_given(table):
    assert [row.kept for row in rows(table("rows: {a: [], b: [channel_decoupling]}"))] == [PRESENT[:1], PRESENT[:2]]
    kept = rows(table("keep: [channel_decoupling]\nrows: {a: [], b: [distribution_alignment]}"))
    assert [row.kept for row in kept] == [PRESENT[1:2], PRESENT[1:]]


def test_the_order_is_the_recipes_whatever_a_row_says(table):
    assert rows(table("rows: {a: [distribution_alignment, channel_decoupling, cross_entropy]}"))[0].kept == PRESENT


@pytest.mark.parametrize(("text", "message"), [
    ("rows: {a: [chanel_decoupling]}",
     "table.yaml: rows.a: the recipe has no intervention 'chanel_decoupling': did you mean 'channel_decoupling'?"),
    ("rows: {a: [pair_alignment]}", "rows.a: the recipe has no intervention 'pair_alignment'"),
    ("keep: [cros_entropy]\nrows: {a: []}", "table.yaml: keep: the recipe has no intervention 'cros_entropy'"),
    ("rows: {a: [channel_decoupling, channel_decoupling]}", "rows.a: 'channel_decoupling' is listed twice"),
    ("rows:\n  a: []\n  a: all", "table.yaml is not plain YAML"),
    ("rows: {A b: [], a-B: all}", "rows.a-B and rows.A b would share the folders a_b-SEED: rename one"),
    ("rows: {a: [], b: []}", "rows.b is the same as rows.a: remove one"),
    ("rows: {a: [cross_entropy], b: {keep: []}}", "rows.b is the same as rows.a"),
    ("rows: {+: []}", "rows.+: a name with letters or digits"),
    ("rows: {a: channel_decoupling}", "rows.a=channel_decoupling: expected [INTERVENTION, ...] or, for a row, all"),
    ("rows: {a: }", "rows.a=null: expected"),
    ("rows: {a: {overrides: []}}", "rows.a=null: expected"),
    ("rows: {a: {keep: [], override: [x=1]}}", "rows.a: unknown key override: did you mean 'overrides'?"),
    ("rows: {a: {keep: [], overrides: train.steps=4}}", "rows.a: overrides=train.steps=4: expected [key=value, ...]"),
    ("rows: {a: {keep: [], overrides: [seed=3]}}", "rows.a: overrides: seed=3: seed is the same for all rows"),
    ("rows: {a: {keep: [], overrides: [+out=x]}}", "out is the same for all rows"),
    ("rows: [a, b]", "table.yaml: rows=[a, b]: expected NAME: [INTERVENTION, ...]"),
    ("rows: {}", "rows={}: expected"),
    ("keep: [cross_entropy]", "rows=null: expected"),
    ("row: {a: []}", "table.yaml: unknown key row: did you mean 'rows'?"),
    ("- a", "a mapping of settings is expected"),
])  # fmt: skip
def test_errors_of_a_table(table, text, message):
    with pytest.raises(DistFairError) as error:
        rows(table(text))
    assert message in str(error.value)


def test_without_a_table_each_is_left_out_once():
    assert [(row.name, row.kept) for row in leave_one_out(PRESENT)] == [
        ("plain", PRESENT[:1]),
        ("without channel_decoupling", ("cross_entropy", "distribution_alignment")),
        ("without distribution_alignment", ("cross_entropy", "channel_decoupling")),
        ("whole", PRESENT),
    ]
    assert [row.name for row in leave_one_out(PRESENT[:2])] == ["plain", "whole"]


@pytest.mark.parametrize("present", [PRESENT[:1], PRESENT[1:]])
def test_nothing_to_leave_out(present):
    with pytest.raises(DistFairError, match="an ablation leaves out one beside cross_entropy"):
        leave_one_out(present)


def test_table_2_of_daid():
    """The seven rows, by the ticks of the paper: reweight, normalisation, L_attr, L_ortho."""
    ticks = [(one.kept, [name in one.kept for name in
                         ("inverse_propensity", "subgroup_norm", "pair_alignment", "low_rank_projection")])
             for one in rows_of(None, "daid", DAID)]  # fmt: skip
    assert all("cross_entropy" in kept for kept, _ in ticks)
    assert ["".join(".x"[tick] for tick in row) for _, row in ticks] == [
        "....", "x...", "xx..", "..x.", "..xx", "xxx.", "xxxx",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in tables() if name in cards.names("recipe")])
def test_shipped_tables_resolve(name):
    text = (cards.shipped("recipes/ablation") / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    present = [*load([f"recipe={name}"], interventions()).recipe.interventions]
    for row in rows_of(None, name, present):
        kept = load([f"recipe={name}", *row.arguments], interventions()).recipe.interventions
        assert tuple(kept) == row.kept


# The command


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(("arguments", "message"), [
    (["recipe=sfd_gdx"], "no such recipe: did you mean 'sfd_gda'?"),
    ([], "recipe=NAME is missing"),
    (["recipe=erm"], "an ablation leaves out one beside cross_entropy"),
    (["recipe=sfd_gda", "seed=3"], "seed=3: each run has its own; use --seeds 0 1 2"),
    (["recipe=sfd_gda", "out=x"], "out=x: each run has its own; use --out FOLDER"),
    (["recipe=sfd_gda", "--seeds", "1", "1"], "plain-1: two runs in one folder"),
    (["recipe=sfd_gda", "--rows", "hole"], "--rows 'hole': no such row: did you mean 'whole'?"),
    (["recipe=sfd_gda", "--table", "diad"], "--table diad: no such table: did you mean 'daid'?"),
    (["recipe=sfd_gda", "--table", "daid"], "rows.reweight: the recipe has no intervention 'inverse_propensity'"),
    (["recipe=sfd_gda", "--table", "no/such.yaml"], "no/such.yaml cannot be read"),
    (["recipe=sfd_gda", "--jobs", "0"], "jobs=0: at least 1"),
])  # fmt: skip
def test_errors_of_the_command(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert guarded(ablate.main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("nothing_starts")
def test_a_setting_that_fits_no_row_names_the_run(table, tmp_path, capsys):
    path = table("rows:\n  a: all\n  b: {keep: [], overrides: [interventions.channel_decoupling.part=0.1]}\n")
    assert guarded(ablate.main, ["recipe=sfd_gda", "--table", path, "--out", str(tmp_path / "out")]) == 2
    assert "b-0: interventions.channel_decoupling.part=0.1: this recipe has no" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seeds", "0", "train.steps=4"], ["--seeds", "-1"]])
def test_seeds_are_numbers(capsys, arguments):
    with pytest.raises(SystemExit):
        ablate.main(["recipe=sfd_gda", *arguments])
    assert "--seeds" in capsys.readouterr().err


def train_here(run: Run, ranks: int) -> SimpleNamespace:
    """A run in this process, which has imported all it needs; test_runs.py has real ones."""
    code = cli.main(["train", *run.overrides])
    return SimpleNamespace(poll=lambda: code)


def test_from_rows_to_a_table(data, tmp_path, table, monkeypatch, capsys):
    """Two rows, two seeds: a dry run, the runs, their table; again, and nothing is trained."""
    monkeypatch.setattr(runs, "_start", train_here)
    out = tmp_path / "out"
    (recipe := tmp_path / "tiny.yaml").write_text(RECIPE)
    arguments = [f"recipe={recipe}", f"data={data}", "--table", table(TABLE), "--rows", "GDA, weak", "ERM",
                 "--seeds", "0", "1", "--out", str(out)]  # fmt: skip
    capsys.readouterr()
    assert ablate.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == (
        "ERM: cross_entropy\n"
        "  ~interventions.channel_decoupling ~interventions.distribution_alignment\n"
        f"    {out}/erm-0: starts\n    {out}/erm-1: starts\n"
        "GDA, weak: cross_entropy, distribution_alignment\n"
        "  ~interventions.channel_decoupling interventions.distribution_alignment.weight=0.01\n"
        f"    {out}/gda_weak-0: starts\n    {out}/gda_weak-1: starts\n"
    )
    assert not out.exists()

    assert ablate.main(arguments) == 0
    printed = capsys.readouterr().out
    recipe = yaml.safe_load((out / "gda_weak-1" / "recipe.yaml").read_text())
    assert recipe["seed"] == 1
    assert [*recipe["interventions"]] == ["cross_entropy", "distribution_alignment"]
    assert recipe["interventions"]["distribution_alignment"]["weight"] == 0.01
    check_tables(out, printed)

    before = {path: path.stat().st_mtime_ns for path in out.glob("*-?/**/*")}
    (out / "ablation.md").unlink()
    drawn = mock.patch("dist_fair.reporting.side_by_side.side_by_side", return_value=[out / "one.png"])
    with mock.patch.object(runs, "_start", side_effect=AssertionError), drawn as side_by_side:
        assert ablate.main(arguments) == 0
    side_by_side.assert_called_with({"ERM": out / "erm-0", "GDA, weak": out / "gda_weak-0"}, out / "side_by_side")
    printed = capsys.readouterr().out
    assert (out / "ablation.md").read_text() in printed
    assert printed.endswith(f"{out}/ablation.md\n{out}/ablation.csv\n{out}/one.png\n")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-?/**/*")} == before
    assert ablate.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(": finished\n") == 4


def check_tables(out, printed: str) -> None:
    """ablation.md is what was printed; its means and the lines of ablation.csv are those of the evaluations."""
    text = (out / "ablation.md").read_text()
    assert text.startswith("# Ablation of tiny, seeds 0, 1\n\n`dist-fair ablate recipe=")
    assert f"(torch {torch.__version__}, CPU)" in text
    assert text in printed
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Fairness over gender", "## Fairness over race", "## Fairness over gender x race",
    ]  # fmt: skip
    with (out / "ablation.csv").open() as file:
        lines = [*csv.DictReader(file)]
    for row, slug in (("ERM", "erm"), ("GDA, weak", "gda_weak")):
        found = [results(Run(out / f"{slug}-{seed}", ("recipe=erm", "data.eval=[far]")))["far"] for seed in (0, 1)]
        values = [one["utility"]["frame"]["AUC"] for one in found]
        shown = next(line for line in text.splitlines() if line.startswith("| far ") and f"| {row} " in line)
        assert f"{100 * mean(values):.1f}" in shown
        chosen = {"row": row, "dataset": "far", "part": "frame", "metric": "AUC"}
        told = {line["seed"]: float(line["value"]) for line in lines if chosen.items() <= line.items()}
        assert told == {"0": values[0], "1": values[1]}
    assert any((out / "side_by_side").glob("figures/*.png"))
