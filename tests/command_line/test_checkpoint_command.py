import json

import pytest
import torch

from dist_fair import cli
from dist_fair.engine import checkpoint
from dist_fair.engine.checkpoint_writing import write
from tests.engine.checkpoints import damage, save_dealt

RECIPE = {"detector.name": "resnet18", "interventions": ["cross_entropy"], "optimizer.lr": 0.1, "seed": 0}


def saved(root, step=3, recipe=RECIPE, **changed):
    """A checkpoint of a run folder; `changed`: tensors by name, __ for a dot, None for one that is left out."""
    model = {"detector.weight": torch.arange(6.0).view(2, 3), "detector.bias": torch.tensor([1.0, -100.0]),
             "detector.channel_mask": torch.tensor([1.0, 0.0, 0.0]), "detector.count": torch.tensor(5)}  # fmt: skip
    model |= {name.replace("__", "."): value for name, value in changed.items()}
    model = {name: value for name, value in model.items() if value is not None}
    moments = {"exp_avg/detector.weight": torch.ones(2, 3), "exp_avg/detector.bias": torch.ones(2),
               "step/detector.weight": torch.tensor(3.0)}  # fmt: skip
    return write(root / "checkpoints", step, recipe, {"model": model, "optimizer": moments},
                 values={"loss": 0.25}, writer={"backend": "fsdp", "ranks": 4})  # fmt: skip


@pytest.fixture
def run(tmp_path):
    saved(tmp_path / "run", 3)
    return saved(tmp_path / "run", 5).parent.parent


def words(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_run_is_inspected(run, capsys):
    assert cli.main(["checkpoint", "inspect", str(run)]) == 0
    out = words(capsys)
    assert f"step-00000003 2 4 x fsdp, torch {torch.__version__} 2 0.0 ok step-00000005 2 4 x fsdp" in out
    assert "step 5 recipe 4 settings" in out
    assert "detector.name resnet18 interventions cross_entropy" in out
    assert "parameters and buffers 4 tensors of 12 numbers" in out
    assert "moments exp_avg of 2, step of 1" in out
    assert "masked 2 of 3 channels (detector.channel_mask)" in out
    assert "told with its step loss 0.25" in out


def test_tensors_are_listed(run, capsys):
    assert cli.main(["checkpoint", "inspect", str(run / "checkpoints" / "step-00000003"), "--tensors"]) == 0
    out = words(capsys)
    assert "step-00000005" not in out
    assert "detector.weight float32 2 x 3 7.4162" in out
    assert "detector.count int64 1 5" in out
    assert "exp_avg/detector.bias float32 2 1.41421" in out


def test_one_of_several_files_and_of_no_writer_is_inspected(tmp_path, capsys):
    folder, *_ = save_dealt(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(
        json.dumps({name: state[name] for name in ("format", "step", "recipe", "files")})
    )
    assert cli.main(["checkpoint", "inspect", str(folder)]) == 0
    assert "step-00000003 2 - 6 " in words(capsys)


def test_damage_is_told_and_the_rest_shown(run, capsys):
    damage(run / "checkpoints" / "step-00000003" / "model.safetensors")
    assert cli.main(["checkpoint", "inspect", str(run)]) == 1
    out = words(capsys)
    assert "step-00000003/model.safetensors is missing or damaged" in out
    assert "masked 2 of 3 channels" in out
    (run / "checkpoints" / "step-00000005" / "optimizer.safetensors").unlink()
    assert cli.main(["checkpoint", "inspect", str(run)]) == 1


def test_what_is_no_checkpoint_is_an_error(tmp_path, capsys):
    assert cli.main(["checkpoint", "inspect", str(tmp_path)]) == 2
    assert "neither a checkpoint nor a run folder" in capsys.readouterr().err
    assert cli.main(["checkpoint", "diff", str(tmp_path), str(tmp_path)]) == 2


def test_equal_checkpoints_are_equal(run, tmp_path, capsys):
    saved(tmp_path / "other", 5)
    assert cli.main(["checkpoint", "diff", str(run), str(tmp_path / "other")]) == 0
    assert words(capsys) == "7 of 7 tensors are equal"


def test_differences_are_sorted_and_what_lacks_is_listed(run, tmp_path, capsys):
    weight = torch.arange(6.0).view(2, 3)
    weight[0, 0] = 0.5  # a tenth of the largest element
    changed = {"detector__weight": weight, "detector__bias": torch.tensor([2.0, -100.0]),
               "detector__extra": torch.ones(1), "detector__count": torch.tensor(float("nan")),
               "detector__channel_mask": None}  # fmt: skip
    saved(tmp_path / "other", 6, RECIPE | {"optimizer.lr": 0.2}, **changed)
    assert cli.main(["checkpoint", "diff", str(run), str(tmp_path / "other")]) == 1
    out = words(capsys)
    assert out.startswith("step: 5, 6 optimizer.lr: 0.1, 0.2 tensor difference relative")
    rows = ("detector.channel_mask inf inf only in A", "detector.count inf inf int64, float32",
            "detector.extra inf inf only in B", "detector.weight 0.5 0.1", "detector.bias 1 0.01")  # fmt: skip
    places = [out.index(row) for row in rows]
    assert places == sorted(places)
    assert out.endswith("3 of 8 tensors are equal")


@pytest.mark.parametrize(("tolerance", "code"), [("0.009", 1), ("0.0101", 0), ("-1", 2), ("nan", 2)])
def test_the_tolerance_is_relative(tmp_path, tolerance, code):
    one, other = (saved(tmp_path / str(value), detector__bias=torch.tensor([value, -100.0])) for value in (1.0, 2.0))
    assert cli.main(["checkpoint", "diff", str(one), str(other), f"--tolerance={tolerance}"]) == code


def test_the_same_nan_is_no_difference_and_another_type_is_one(tmp_path):
    nan = torch.tensor([1.0, float("nan")])
    one, same = (saved(tmp_path / name, detector__bias=nan) for name in ("one", "same"))
    typed = saved(tmp_path / "typed", detector__bias=nan.double())
    shaped = saved(tmp_path / "shaped", detector__bias=nan[None])
    assert cli.main(["checkpoint", "diff", str(one), str(same)]) == 0
    assert cli.main(["checkpoint", "diff", str(one), str(typed)]) == 1
    assert cli.main(["checkpoint", "diff", str(one), str(typed), "--tolerance=1e-9"]) == 0
    assert cli.main(["checkpoint", "diff", str(one), str(shaped), "--tolerance=1"]) == 1


def test_a_damaged_one_is_not_compared(run, capsys):
    damage(checkpoint.newest(run / "checkpoints") / "model.safetensors")
    assert cli.main(["checkpoint", "diff", str(run), str(run)]) == 2
    assert "missing or damaged" in capsys.readouterr().err
