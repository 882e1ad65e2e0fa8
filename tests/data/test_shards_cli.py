"""`dist-fair shards` as people type it."""

from pathlib import Path

import pytest

from dist_fair import cli, shards
from dist_fair.data.index import read_index
from dist_fair.errors import DistFairError
from tests.data.shard_files import faces, members_of, write_table, write_tar


def build(tmp_path: Path) -> Path:
    images, rows = faces(tmp_path, manipulation="swap", note="n[1]")
    table = write_table(tmp_path / "t.csv", rows)
    arguments = ["--images", str(images), "--out", str(tmp_path / "out"), "--workers", "1", "--samples-per-shard", "5"]
    assert shards.main(["build", str(table), *arguments]) == 0
    return tmp_path / "out"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return build(tmp_path)


def test_build_reports_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    built = build(tmp_path)
    output = capsys.readouterr().out
    assert "building, then indexing: 3 of 3" in output
    assert f"out: 12 samples (6 real, 6 fake) in 3 shards of {built}; attributes: gender, note, race" in output


def test_inspect_shows_groups_and_verifies(built: Path, capsys: pytest.CaptureFixture) -> None:
    assert shards.main(["inspect", str(built), "--verify"]) == 0
    output = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    assert ["real / fake", "6 / 6"] in lines
    assert ["image sizes", "10 x 12 (12)"] in lines
    assert ["unreadable images", "none"] in lines
    assert ["gender", "male", "2", "2", "4", "33.3"] in lines
    assert ["gender", "unknown", "2", "2", "4", "33.3"] in lines
    assert ["note", "n[1]", "6", "6", "8", "100.0"] in lines
    assert ["gender x note x race", "male/n[1]/Asian", "1", "1", "2", "16.7"] in lines
    assert ["manipulation", "swap", "0", "6", "4", "50.0"] in lines
    assert "3 shards verified" in output


def test_verify_finds_a_changed_byte(built: Path) -> None:
    data = bytearray((built / "00001.tar").read_bytes())
    data[700] ^= 1
    (built / "00001.tar").write_bytes(data)
    with pytest.raises(DistFairError, match=r"1 of 3 shards in .* are not as they were indexed: 00001\.tar"):
        shards.main(["inspect", str(built), "--verify"])


def test_one_sample_can_be_looked_at(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "one.png"
    shards.main(["inspect", str(built), "--sample", "v000__01", "--save", str(file)])
    assert file.read_bytes() == (tmp_path / "images" / "v000" / "01.png").read_bytes()
    output = capsys.readouterr().out
    assert "label fake, video swap/000, manipulation swap, gender female" in output
    with pytest.raises(DistFairError, match="no sample 'v000__99'"):
        shards.main(["inspect", str(built), "--sample", "v000__99", "--save", str(file)])
    with pytest.raises(DistFairError, match="--sample KEY and --save FILE go together"):
        shards.main(["inspect", str(built), "--sample", "v000__01"])


def test_index_keeps_its_options_for_the_next_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(
        tmp_path / "00000.tar", [*members_of("a", target=1, sex="f"), ("b.jpg", b"none"), ("b.json", b'{"target":0}')]
    )
    options = ["--attributes", "sex", "--label-field", "target", "--name", "theirs"]
    assert shards.main(["index", str(tmp_path), *options, "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "theirs: 2 samples (1 real, 1 fake) in 1 shards" in captured.out
    assert f"warning: 1 images have no readable JPEG, PNG or WebP header, the first is b in {tmp_path}" in captured.err
    assert read_index(tmp_path).names == ("theirs",)
    write_tar(tmp_path / "00001.tar", members_of("c"))
    with pytest.raises(DistFairError, match=r"--label-field target --attributes sex --name theirs$"):
        read_index(tmp_path)
    with pytest.raises(DistFairError, match="--name x: it names one data set"):
        shards.main(["index", str(tmp_path), str(tmp_path), "--name", "x"])


def test_demo_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_fair.data import demo

    called = []
    monkeypatch.setattr(demo, "make", lambda *a, **k: called.append((a, k)))
    assert shards.main(["demo", "--out", str(tmp_path), "--seed", "3", "--scale", "0.1", "--workers", "1"]) == 0
    assert called == [((tmp_path,), {"seed": 3, "scale": 0.1, "workers": 1})]


def test_errors_go_to_stderr_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["shards", "inspect", str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path / 'nowhere'} is no folder")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["biuld"],
        ["build", "t.csv"],
        ["index", ".", "--workers", "two"],
        ["index", ".", "--attributes", "a,a"],
        ["build", "t.csv", "--images", ".", "--out", "x", "--rename", "a"],
    ],
)
def test_wrong_command_lines_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        shards.main(arguments)
    assert stopped.value.code == 2
    assert "usage: dist-fair shards" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["build", "index", "inspect", "demo"])
def test_help_explains_every_verb(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        shards.main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: dist-fair shards {verb}" in capsys.readouterr().out
