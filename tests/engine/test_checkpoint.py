import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dist_fair.engine import checkpoint
from dist_fair.engine.run_folder import RunFolder
from dist_fair.errors import DistFairError
from tests.engine.checkpoints import RECIPE, damage, edit, parts_of, same, save, save_dealt, trained
from tests.ranks import run_ranks


@pytest.mark.parametrize("way", [save, save_dealt])
def test_what_is_read_is_what_was_written(tmp_path, way):
    folder, module, optimizer = way(tmp_path)
    found = checkpoint.read(folder)
    assert (found.step, found.recipe) == (3, RECIPE)
    other, other_optimizer = trained(steps=0)
    checkpoint.load_model(other, found.tensors("model"), folder)
    checkpoint.load_optimizer(other, other_optimizer, found.tensors("optimizer"))
    torch.manual_seed(7)
    images = torch.randn(8, 4)
    for net, chosen in ((module, optimizer), (other, other_optimizer)):
        net(images).square().sum().backward()
        chosen.step()
    for left, right in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_a_run_of_the_first_format_can_still_be_read(tmp_path):
    module, optimizer = trained()
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    hashes = {}
    for part, tensors in parts_of(module, optimizer).items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{part}.safetensors")
        hashes[f"{part}.safetensors"] = checkpoint.sha256(folder / f"{part}.safetensors")
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": 3, "recipe": RECIPE, "sha256": hashes}))
    found = checkpoint.read(folder)
    assert (found.step, found.recipe, found.values) == (3, RECIPE, {})
    for part, tensors in parts_of(module, optimizer).items():
        same(found.tensors(part), tensors)


def test_only_the_tensors_wanted_are_read(tmp_path):
    folder, module, _ = save_dealt(tmp_path)
    found = checkpoint.read(folder, ("model",)).tensors("model", lambda name: name.startswith("1."))
    same(found, {name: tensor for name, tensor in module.state_dict().items() if name.startswith("1.")})


def test_what_was_read_outlives_the_file(tmp_path):
    folder, module, _ = save(tmp_path)
    tensors = checkpoint.read(folder).tensors("model")
    with (folder / "model.safetensors").open("r+b") as file:  # as NFS takes a removed file away
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    same(tensors, module.state_dict())


def test_the_newest_that_is_whole_is_gone_on_from_and_what_was_passed_over_is_told(tmp_path):
    assert checkpoint.newest_undamaged(tmp_path) == (None, [])
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / checkpoint.name_of(3) / "optimizer.safetensors")
    (tmp_path / checkpoint.name_of(2) / "model.safetensors").unlink()
    found, faults = checkpoint.newest_undamaged(tmp_path)
    assert found.step == 1
    assert [fault.partition("/step-")[2][:29] for fault in faults] == [
        "00000003/optimizer.safetensor",
        "00000002/model.safetensors is",
    ]
    damage(tmp_path / checkpoint.name_of(1) / "model.safetensors")
    with pytest.raises(DistFairError, match=r"no checkpoint in .* is whole: .*step-00000003.* resume=PATH"):
        checkpoint.newest_undamaged(tmp_path)


def test_a_newer_format_is_not_taken_for_damage(tmp_path):
    save(tmp_path, 1)
    edit(save(tmp_path, 2)[0], lambda state: state | {"format": 3})
    with pytest.raises(DistFairError, match="format 3; this version reads 1 to 2"):
        checkpoint.newest_undamaged(tmp_path)


def agreed(comm, folder, cases):
    """Whether ranks that found checkpoints of these steps, a tuple of a step per rank each, may go on."""
    answers = []
    for steps in cases:
        step, answer = steps[comm.rank], "refused"
        with contextlib.suppress(DistFairError):
            checkpoint.agree(checkpoint.read(folder / checkpoint.name_of(step)) if step else None, comm)
            answer = "agreed"
        answers.append(answer)
    return answers


def test_ranks_that_found_different_checkpoints_stop(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    cases = {(2, 2): "agreed", (2, 1): "refused", (None, 1): "refused", (None, None): "agreed"}
    assert run_ranks(2, agreed, tmp_path, [*cases]) == [[*cases.values()]] * 2


def test_a_flipped_byte_is_found_and_the_file_named(tmp_path):
    folder, *_ = save(tmp_path)
    damage(folder / "model.safetensors")
    with pytest.raises(DistFairError, match=r"model\.safetensors is missing or damaged"):
        checkpoint.read(folder)


def test_no_checkpoint_says_so(tmp_path):
    with pytest.raises(DistFairError, match="neither a checkpoint nor a run folder"):
        checkpoint.find(tmp_path)
    with pytest.raises(DistFairError, match="is no checkpoint"):
        checkpoint.read(tmp_path)


def test_a_run_folder_or_a_checkpoint_may_be_named(tmp_path):
    folder, *_ = save(tmp_path / "checkpoints")
    assert checkpoint.find(tmp_path) == folder == checkpoint.find(folder)
    shutil.rmtree(folder)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_a_resumed_run_rewrites_its_metrics_from_the_step_it_resumes_at(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin("recipe: erm\n")
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)]
    folder.metrics.write_text("".join(lines) + '{"step": 5, "lo')
    folder.rewind(3)
    assert folder.metrics.read_text() == "".join(lines[:3])
    folder.metrics.write_text("".join(lines) + '{"step": 5, "lo')
    folder.rewind(9)
    assert folder.metrics.read_text() == "".join(lines)
