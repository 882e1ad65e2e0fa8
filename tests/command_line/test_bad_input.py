"""What a person can get wrong, through the command line.

Each ends with exit code 2 and an error that names the place and the fix, before anything starts where it can be known
then; and nothing is left behind that looks whole: no run folder, or no checkpoint and no evaluation in it.
"""

import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from dist_fair import cli
from dist_fair.data.writing import Sample, write_shards
from tests.command_line.runs import GENDERS, RACES, SIZE, launch, metrics
from tests.data.shard_files import write_tar

COUNT = 24  # three batches of eight are one epoch: every sample is read once
RECIPE = """
defaults: [erm]
train: {steps: 3, batch_size: 8}
data: {window: 8}
optimizer: {lr: 0.02}
checkpoint: {every: 1}
evaluation: {bootstrap: 0, batch_size: 10}
wandb: {mode: disabled}
detector: {arguments: {layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}}
"""
ODD = 7  # the sample that is spoilt: a fake Black man


def jpeg(number: int, side: int = SIZE) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(coarse, (side, side)))[1].tobytes()


def folder_of(
    folder: Path,
    image: bytes | None = None,
    extension: str = "jpg",
    label: object = 1,
    without: str | None = None,
    without_group: tuple[str, str] | None = None,
) -> Path:
    """24 samples of two labels, two genders and three races in two shards.

    image, extension, label: of sample ODD. without: an attribute that no sample has. without_group: a gender and a
    race that no sample has together.
    """
    samples = []
    for number in range(COUNT):
        attributes = {"gender": GENDERS[number // 2 % 2], "race": RACES[number // 4 % 3]}
        if (attributes["gender"], attributes["race"]) == without_group:
            attributes["race"] = "White"
        attributes = {name: value for name, value in attributes.items() if name != without}
        metadata = {"label": label if number == ODD else number % 2, "attributes": attributes}
        own = (image, extension) if image and number == ODD else (jpeg(number), "jpg")
        samples.append(Sample(f"s{number:02d}", *own, metadata))
    write_shards(samples, folder, 12)
    return folder


def index(folder: Path) -> int:
    return cli.main(["shards", "index", str(folder), "--workers", "1"])


def data_set(root: Path, train: dict | None = None, near: dict | None = None) -> Path:
    """Folders `train` and `near` of `folder_of`, indexed, their card and a recipe."""
    for name, changes in (("train", train), ("near", near)):
        assert index(folder_of(root / name, **(changes or {}))) == 0
    (root / "quick.yaml").write_text(RECIPE)
    (root / "card.yaml").write_text(
        f"name: made\nroot: {root}\ntrain: [train]\neval: [near]\nimage_size: {SIZE}\n"
        "attributes:\n  gender: [female, male]\n  race: [Asian, Black, White]\n"
    )
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A healthy data set; tests only read it."""
    return data_set(tmp_path_factory.mktemp("good"))


@pytest.fixture
def data(good, tmp_path):
    """A copy of it to be spoilt; pass it on as data.root."""
    return Path(shutil.copytree(good, tmp_path / "data"))


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["train", f"recipe={good}/quick.yaml", f"data={good}/card.yaml", f"out={out}"]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def train(good, tmp_path, capsys):
    """Trains on the healthy data set, with overrides: (exit code, stdout, stderr)."""

    def go(*overrides: str, data: Path = good):
        capsys.readouterr()
        files = [f"recipe={good}/quick.yaml", f"data={good}/card.yaml", f"data.root={data}"]
        code = cli.main(["train", *files, f"out={tmp_path / 'out'}", *overrides])
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def refused(train, tmp_path):
    """The error of a run that is refused before it starts; nothing may be left of it."""

    def go(*overrides: str, **data: Path) -> str:
        code, out, error = train(*overrides, **data)
        assert (code, out) == (2, "")
        assert error.startswith("error: ")
        assert error.count("error: ") == 1
        assert not (tmp_path / "out").exists()
        return error

    return go


# The index


def test_no_index(data, refused):
    (data / "train" / "index.parquet").unlink()
    error = refused(data=data)
    assert f"{data}/train has no index.parquet" in error
    assert f"dist-fair shards index {data}/train" in error


def test_no_folder(data, refused):
    shutil.rmtree(data / "near")
    assert f"{data}/near is no folder" in refused(data=data)


def test_a_damaged_index(data, refused):
    path = data / "near" / "index.parquet"
    path.write_bytes(path.read_bytes()[:100])
    error = refused(data=data)
    assert str(path) in error
    assert f"make it again: dist-fair shards index {data}/near" in error


def rewritten(shards: Path) -> str:
    write_tar(shards / "00001.tar", [("other.jpg", jpeg(0)), ("other.json", b'{"label": 0}')])
    return "00001.tar has"


def added(shards: Path) -> str:
    shutil.copy(shards / "00001.tar", shards / "00002.tar")
    return "00002.tar is new"


def removed(shards: Path) -> str:
    (shards / "00000.tar").unlink()
    return "00000.tar is gone"


def truncated(shards: Path) -> str:
    os.truncate(shards / "00001.tar", 9000)
    return "00001.tar has 9000 bytes"


@pytest.mark.parametrize(("change", "part"), [
    (rewritten, "train"), (added, "train"), (removed, "train"), (truncated, "train"), (added, "near"),
])  # fmt: skip
def test_a_stale_index(data, refused, change, part):
    said = change(data / part)
    error = refused(data=data)
    assert f"{data}/{part}/index.parquet is stale: {said}" in error
    assert f"dist-fair shards index {data}/{part}" in error


def test_bytes_changed_since_the_index_at_the_same_size(data, train, tmp_path):
    path = data / "train" / "00000.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xd8\xff")  # of the first image
    content[start + 200] ^= 0xFF
    path.write_bytes(content)
    for policy in ("fail", "substitute"):
        out = tmp_path / policy
        code, _, error = train(f"data.bad_samples={policy}", f"out={out}", data=data)
        assert code == 2
        assert not (out / "evaluation.json").exists()
        assert f"s00 in {path} at byte {start}: the bytes are not those that were indexed" in error
        assert "restore it, or if the change is meant: dist-fair shards index" in error


# Shards


@pytest.mark.parametrize("indexed", [False, True])
def test_a_truncated_tar_is_not_indexed(tmp_path, capsys, indexed):
    folder = folder_of(tmp_path / "shards")
    if indexed:
        assert index(folder) == 0
    before = {path: path.read_bytes() for path in folder.glob("*.parquet")}
    os.truncate(folder / "00001.tar", 9000)
    assert index(folder) == 2
    error = capsys.readouterr().err
    assert f"{folder}/00001.tar is truncated or damaged: at byte" in error
    assert "copy or write the shard again" in error
    assert {path: path.read_bytes() for path in folder.glob("*.parquet")} == before
    assert {path.name for path in folder.iterdir()} <= {"00000.tar", "00001.tar", "index.parquet"}


@pytest.mark.parametrize("label", [2, -1, 0.5, "real", None])
def test_a_label_outside_0_and_1(tmp_path, capsys, label):
    folder = folder_of(tmp_path / "shards", label=label)
    assert index(folder) == 2
    error = capsys.readouterr().err
    assert f"{folder}/00000.tar: sample 's07'" in error
    assert "label" in error
    assert not (folder / "index.parquet").exists()


class Bomb:
    """Unpickled, makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_a_shard_is_never_loaded(data, train, tmp_path):
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))
    members = []
    for number in range(COUNT):
        attributes = {"gender": GENDERS[number // 2 % 2], "race": RACES[number // 4 % 3]}
        about = {"label": number % 2, "attributes": attributes}
        members += [(f"k{number:02d}.{extension}", bomb) for extension in ("pkl", "pickle", "pyd", "pth")]
        members += [(f"k{number:02d}.jpg", jpeg(number)), (f"k{number:02d}.json", json.dumps(about).encode())]
    shutil.rmtree(data / "train")
    write_tar(data / "train" / "00000.tar", [("bomb.pkl", bomb), *members])
    assert index(data / "train") == 0
    code, _, error = train(data=data)
    assert (code, error) == (0, "")
    assert not mark.exists()


def test_a_pickle_as_weights_is_never_loaded(refused, tmp_path):
    mark, path = tmp_path / "exploded", tmp_path / "weights.pth"
    torch.save({"state_dict": Bomb(mark)}, path)
    assert f"{path}: cannot be read as weights without executing it" in refused(
        f"detector.pretrained={path}", "detector.name=resnet18"
    )
    assert f"{path} is no safetensors file" in refused(f"detector.init_from={path}")
    assert not mark.exists()


# Images


def damaged_jpeg() -> bytes:
    whole = jpeg(ODD)
    return whole[: len(whole) * 2 // 3]


def bomb_png() -> bytes:
    """A PNG of 66 bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# name -> (the image, its extension, what is said of them, settings, known before anything is read)
BAD = {
    "cut": (damaged_jpeg(), "jpg", "the image is damaged", [], False),
    "noise": (b"not an image at all", "jpg", "the image's header cannot be read", [], True),
    "large": (jpeg(ODD, 64), "jpg", "64 x 64 pixels are more than data.max_pixels=2000", ["data.max_pixels=2000"],
              True),
    "huge": (bomb_png(), "png", "60000 x 60000 pixels are more than data.max_pixels=50000000", [], True),
}  # fmt: skip


@pytest.fixture(params=BAD)
def bad(request, tmp_path):
    image, extension, *rest = BAD[request.param]
    changes = {"image": image, "extension": extension}
    return data_set(tmp_path / "bad", changes, changes), *rest


def test_a_bad_image_fails_where_the_policy_is_to_fail(bad, train, refused, tmp_path):
    data, said, settings, known = bad
    if known:
        error = refused(*settings, data=data)
    else:
        code, _, error = train(*settings, data=data)
        assert code == 2
        assert not (tmp_path / "out" / "evaluation.json").exists()
        assert len([*(tmp_path / "out" / "checkpoints").iterdir()]) < 3
    assert said in error
    assert f"s{ODD:02d} in {data}/train/00000.tar at byte" in error
    assert "set data.bad_samples=substitute" in error


def test_a_bad_image_is_replaced_in_training_and_left_out_of_evaluation_where_the_policy_is_to_substitute(
    bad, train, tmp_path
):
    data, _, settings, _ = bad
    code, out, error = train(*settings, "data.bad_samples=substitute", data=data)
    assert (code, error) == (0, "")
    counted = f"warning: 1 reads of bad samples in {data}/%s (fake, gender=male, race=Black: 1); "
    assert counted % "train" + "other samples of the same label and attributes took their place" in out
    assert counted % "near" + "they were left out of the evaluation" in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["near"]["unreadable"] == 1
    ids = parquet.read_table(tmp_path / "out" / "predictions" / "near.parquet")["sample_id"].to_pylist()
    assert ids == [f"s{number:02d}" for number in range(COUNT) if number != ODD]


def test_a_bad_image_in_evaluation_alone_ends_with_the_training_kept(tmp_path, train):
    data = data_set(tmp_path / "data", near={"image": damaged_jpeg()})
    code, _, error = train(data=data)
    assert code == 2
    assert f"bad sample s{ODD:02d} in {data}/near/00000.tar" in error
    assert (tmp_path / "out" / "checkpoints" / "step-00000003" / "state.json").is_file()
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert not (tmp_path / "out" / "predictions").exists()


# Attributes and groups


def test_an_attribute_that_training_data_lack(good, refused):
    error = refused("+data.attributes.rase=[Asian]")
    assert f"no sample of {good}/train has attribute 'rase': did you mean 'race'?" in error


def test_an_attribute_that_an_evaluation_set_lacks(tmp_path, refused):
    data = data_set(tmp_path / "data", near={"without": "race"})
    assert f"no sample of {data}/near has attribute 'race'" in refused(data=data)


def test_a_value_without_training_samples(good, refused):
    error = refused("data.attributes.race=[Asian,Black,White,Indian]")
    assert f"data.attributes=['race']: no training sample of group Indian in {good}/train" in error
    assert "leave the value out of data.attributes" in error


def test_a_group_of_an_intervention_without_training_samples(tmp_path, refused):
    data = data_set(tmp_path / "data", train={"without_group": ("female", "Asian")})
    chosen = "+interventions.distribution_alignment={attributes: [gender, race]}"
    error = refused(chosen, data=data)
    assert "interventions.distribution_alignment.attributes=['gender', 'race']: no training sample of group " in error
    assert f"female/Asian in {tmp_path}/data/train" in error


def test_an_attribute_of_an_intervention_that_is_not_declared(refused):
    error = refused("+interventions.distribution_alignment={attributes: [rase]}")
    assert "data.attributes has no 'rase': did you mean 'race'? (+data.attributes.rase=[] adds it)" in error


# Numbers that must divide


def test_ranks_that_do_not_divide_the_lanes_are_told_once(good, tmp_path):
    files = [f"recipe={good}/quick.yaml", f"data={good}/card.yaml", f"out={tmp_path / 'out'}"]
    done = launch(2, "dist_fair.train", *files, "data.lanes=3", "train.batch_size=9")
    assert done.returncode != 0
    assert done.stderr.count("2 ranks do not divide data.lanes=3: start one of [1, 3] ranks") == 1
    assert "dist_fair/training.py" not in done.stderr  # torchrun shows a traceback of its own, we show none of ours
    assert not (tmp_path / "out").exists()


TAPES = ["+data.tapes.real.label=0", "+data.tapes.fake.label=1"]


@pytest.mark.parametrize(("settings", "said"), [
    (["train.accumulate=3"], "train.accumulate=3 (command line) does not divide train.batch_size=8 ("),
    (["data.lanes=3"], "data.lanes=3 (command line) does not divide train.batch_size / train.accumulate = 8"),
    (["train.batch_size=9", *TAPES], "use a multiple of 2"),
    (["data.lanes=8", *TAPES], "set data.lanes to one of [1, 2, 4]"),
    (["train.batch_size=32", "data.lanes=32"], "every lane needs one"),
    (["train.batch_size=0"], "train.batch_size=0 (command line): at least 1"),
    (["train.ranks=2"], "train.ranks=2, but there are 1 ranks: launch with `dist-fair train --ranks N"),
])  # fmt: skip
def test_numbers_that_do_not_fit(refused, settings, said):
    assert said in refused(*settings)


def test_ranks_within_ranks(refused, monkeypatch):
    assert "--ranks 0: at least 1" in refused("--ranks=0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--ranks 2: this is one of 2 launched ranks; leave it out" in refused("--ranks=2")


# Names


@pytest.mark.parametrize(("setting", "said"), [
    ("detector=smal", "detector=smal: no such detector card: did you mean 'small'?"),
    ("detector.name=resnet19", "did you mean 'resnet1"),
    ("train.step=5", "did you mean 'train.steps'?"),
    ("+interventions.channel_decouplin={}", "did you mean 'channel_decoupling'?"),
    ("interventions.cross_entropy.reductoin=mean", "did you mean 'interventions.cross_entropy.reduction'?"),
    ("optimizer.name=adamx", "optimizer.name=adamx: no such optimizer: did you mean 'adam"),
    ("optimizer.arguments={betta: 1}", "does not take these settings"),
    ("train.precision=fp16", "train.precision=fp16"),
    ("train.steps=many", "train.steps"),
    ("schedule.every=0.5", "schedule.every=0.5 (command line) has no effect with schedule.name=cosine"),
    ("~interventions.cross_entropy", "add cross_entropy"),
    ("data.eval=[nowhere]", "nowhere is no folder"),
    ("detector.init_from=nowhere", "nowhere is neither a checkpoint nor a run folder"),
    ("nonsense", "key=value"),
])  # fmt: skip
def test_unknown_names_and_wrong_values(refused, setting, said):
    assert said in refused(setting)


@pytest.mark.parametrize(("choices", "said"), [
    (["recipe=sfd_gdaa"], "recipe=sfd_gdaa: no such recipe: did you mean 'sfd_gda'?"),
    (["recipe=erm", "data=deno"], "data=deno: no such data card: did you mean 'demo'?"),
    (["recipe=nowhere/my.yaml"], "nowhere/my.yaml cannot be read"),
    ([], "recipe=NAME is missing"),
])  # fmt: skip
def test_unknown_files(tmp_path, capsys, choices, said):
    assert cli.main(["train", *choices, f"out={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Run folders and checkpoints


def untouched(folder: Path, action) -> str:
    """What `action` returned; it must have left the folder as it was."""

    def contents():
        return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = contents()
    code, _, error = action()
    assert code == 2
    assert contents() == before
    return error


def test_a_folder_of_another_run(train, run):
    error = untouched(run, lambda: train("seed=5", f"out={run}"))
    assert f"out={run} holds another run (then, now): seed: 0, 5: choose another out=" in error


def test_a_folder_of_other_things(train, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    error = untouched(tmp_path / "thesis", lambda: train(f"out={tmp_path / 'thesis'}"))
    assert "is not empty and no run folder" in error
    assert "choose another out=" in error


def test_a_file_where_the_folder_should_be(train, tmp_path, run, capsys):
    (tmp_path / "file").write_text("x")
    code, _, error = train(f"out={tmp_path / 'file'}")
    assert code == 2
    assert f"{tmp_path}/file is a file" in error
    code, _, error = train(f"out={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert f"{tmp_path}/file/run" in error
    assert cli.main(["evaluate", str(run), f"--out={tmp_path / 'file'}"]) == 2
    assert (tmp_path / "file").read_text() == "x"


def test_never_resume_a_used_folder(train, run):
    error = untouched(run, lambda: train("resume=never", f"out={run}"))
    assert f"resume=never, but out={run} has step-00000003: choose another out=, or resume=auto" in error


def test_a_checkpoint_of_another_recipe(refused, run):
    step = run / "checkpoints" / "step-00000003"
    error = refused(f"resume={step}", "optimizer.lr=0.5", "train.steps=5")
    assert f"{step} is a checkpoint of another recipe (then, now): optimizer.lr: 0.02, 0.5; train.steps: 3, 5" in error
    assert "set detector.init_from" in error


@pytest.mark.parametrize("path", ["nowhere", "data", "data/card.yaml"])
def test_what_is_no_checkpoint(data, refused, path):
    error = refused(f"resume={data.parent / path}")
    assert f"{data.parent / path} is neither a checkpoint nor a run folder with one" in error


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flipped, Path.unlink, lambda path: os.truncate(path, 50)], ids=["bit", "gone", "cut"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint(train, run, name, harm, capsys):
    path = run / "checkpoints" / "step-00000003" / name
    harm(path)
    error = untouched(run, lambda: train(f"out={run}"))
    assert f"{path} is missing or damaged" in error
    assert "resume=PATH" in error
    if name == "model.safetensors":
        assert cli.main(["evaluate", str(run)]) == 2
        assert f"{path} is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1]", '{"step": 3}', '{"step": 3, "recipe": {}, "sha256": {}, "format": 99}'])
def test_a_damaged_state_of_a_checkpoint(train, run, text):
    path = run / "checkpoints" / "step-00000003" / "state.json"
    path.write_text(text)
    error = untouched(run, lambda: train(f"out={run}"))
    assert f"{path.parent}" in error
    assert "state.json" in error


def test_a_stored_recipe_that_was_damaged(train, run):
    (run / "recipe.yaml").write_text("train: [")
    assert f"{run}/recipe.yaml is not plain YAML" in untouched(run, lambda: train(f"out={run}"))


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere"], "nowhere is neither a checkpoint nor a run folder"),
    (["RUN", "recipe=erm"], "has its own"),
    (["RUN", "data.eval=[nowhere]"], "nowhere is no folder"),
    (["RUN", "data.eval=[near,./near]"], "two entries with one name"),
    (["RUN", "--out=OTHER"], "is the folder of another run"),
])  # fmt: skip
def test_evaluate_what_cannot_be(run, finished, capsys, arguments, said):
    capsys.readouterr()
    places = [one.replace("RUN", str(run)).replace("OTHER", str(finished)) for one in arguments]
    assert said in untouched(run, lambda: (cli.main(["evaluate", *places]), *capsys.readouterr()))


# Numbers that are no numbers


def test_a_loss_that_is_not_finite(train, tmp_path, good):
    """A learning rate of 1e30 takes one step; the next one meets weights whose activations overflow."""
    code, _, error = train("optimizer.lr=1e30", "schedule.warmup=0", "checkpoint.every=10")
    assert code == 2
    assert "step 1: loss nan" in error
    assert f"in {good}/train/0000" in error  # samples by name
    assert "Lower optimizer.lr" in error
    out = tmp_path / "out"
    assert [line["step"] for line in metrics(out)] == [0]
    assert not [*(out / "checkpoints").iterdir()]
    assert not (out / "evaluation.json").exists()
