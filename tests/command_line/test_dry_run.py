"""`dist-fair train --dry-run` takes a real step: what crashes in it is one clear error, before a run is begun."""

import os

import pytest
import torch

from dist_fair import cli, train
from dist_fair.detectors import registry
from dist_fair.errors import DistFairError
from tests.command_line import crashing
from tests.ranks import run_ranks

SMALL = "detector.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}"
DRY = ["train", "train.batch_size=16", "data.image_size=64", "wandb.mode=disabled", "--dry-run"]


@pytest.fixture
def dry_run(data, tmp_path, capsys, monkeypatch):
    """A dry run with overrides: exit code, stdout, stderr. Nothing may be left of it."""
    crashing.known(monkeypatch)

    def go(*overrides, recipe="erm"):
        code = cli.main([*DRY, f"recipe={recipe}", f"data={data}", f"out={tmp_path / 'run'}", *overrides])
        assert not (tmp_path / "run").exists()
        return code, *capsys.readouterr()

    return go


def refused(answer):
    """The one error of a dry run."""
    code, out, error = answer
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("recipe", ["erm", "daid", "sfd_gda", "pg_fdd"])
def test_it_says_what_a_step_takes(dry_run, recipe):
    scored = ["interventions.channel_decoupling.batch_size=50"] if recipe == "sfd_gda" else []
    code, out, error = dry_run(*scored, recipe=recipe)
    assert code == 0, error
    found = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert " s on the CPU, " in found["one step"]
    assert "GFLOP a sample, forward and backward; " in found["arithmetic"]
    assert " GB at most, of " in found["memory"]
    assert out.endswith("nothing was trained, nothing written (--dry-run)\n")


def test_it_can_be_left_out(dry_run):
    code, out, _ = dry_run("detector.name=crashing", SMALL, "--no-step")
    assert code == 0
    assert "one step" not in out


def test_a_crash_in_the_backward_pass_is_found(dry_run):
    error = refused(dry_run("detector.name=crashing", SMALL))
    assert "recipe=erm, detector.name=crashing, train.batch_size=16 (16 at a time on each of 1 ranks): " in error
    assert f"the backward pass of a real step fails on the CPU: RuntimeError: {crashing.ASSERTION}" in error
    assert "(crashing.py:" in error
    assert "CapturedTraceback" not in error


def test_so_it_is_in_loading_processes_and_in_parts(dry_run):
    assert "the backward pass" in refused(
        dry_run("detector.name=crashing", SMALL, "data.workers=1", "train.accumulate=2")
    )


def test_a_batch_that_does_not_fit_is_told_what_would(dry_run):
    error = refused(dry_run("detector.name=full", SMALL))
    assert f"the forward pass of a real step fails on the CPU: OutOfMemoryError: {crashing.MEMORY}" in error
    assert "a smaller train.batch_size; or train.accumulate=2, the same batch in two parts; " in error


def test_images_that_a_transformer_does_not_take(dry_run):
    vit = "detector.arguments={img_size: 96, embed_dim: 12, depth: 1, num_heads: 2}"  # there are 64 pixels
    error = refused(dry_run("detector.name=vit_tiny_patch16_224", vit))
    assert "the forward pass" in error
    assert "data.image_size=96, or +detector.arguments.img_size=64" in error


def _rank(comm, arguments, name):
    rank, world = str(comm.rank), str(comm.world)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, OMP_NUM_THREADS="1")
    torch.cuda.device_count = lambda: 0
    registry.register("crashing")(crashing.crashing)
    return train.main([*arguments, f"detector.name={name}"])


def test_ranks_take_it_together(data, tmp_path):
    arguments = [*DRY[1:], SMALL, "recipe=erm", f"data={data}", f"out={tmp_path / 'run'}"]
    assert run_ranks(2, _rank, arguments, "resnet18") == [0, 0]
    with pytest.raises(
        DistFairError, match=r"8 at a time on each of 2 ranks\): the backward pass of a real step fails"
    ):
        run_ranks(2, _rank, arguments, "crashing")
    assert not (tmp_path / "run").exists()
