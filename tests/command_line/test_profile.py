"""`dist-fair profile`: a trace that viewers open, a table whose parts make the whole, and no run."""

import gzip
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from dist_fair import cli, training
from dist_fair.engine.device import profiling
from dist_fair.engine.device.memory import Use
from dist_fair.engine.device.profiling import TRACED, Operator, Profile
from dist_fair.recipe.composition import load
from dist_fair.recipes import interventions
from dist_fair.reporting.profile_table import Setting, advice, profile_markdown, tables
from dist_fair.training import Training
from tests.command_line import crashing
from tests.command_line.runs import metrics

SMALL = ["recipe=daid", "train.batch_size=8", "train.accumulate=2", "optimizer.sam.rho=0.05",
         "detector.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}"]  # fmt: skip
GIGABYTE = 10**9


def test_it_leaves_a_trace_and_a_table(data, tmp_path, capsys):
    folder, run = tmp_path / "profile", tmp_path / "run"
    arguments = [*SMALL, f"data={data}", "data.workers=1", f"out={run}", "--steps", "2", "--out", str(folder)]
    folder.mkdir()
    (folder / "profile.md").write_text("of an earlier one")
    assert cli.main(["profile", *arguments]) == 0
    out = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["profile.md", "trace.json.gz"]
    assert not run.exists()
    told = [line for line in out.splitlines() if not line.endswith((".", "perfetto.dev"))]  # sentences wrap
    assert max(map(len, told)) <= 100
    for text in (out, (folder / "profile.md").read_text()):
        assert "daid: resnet18, 32 px, 8 samples a step, fp32, 1 rank(s), the CPU" in text
        assert "headspace " in text
        assert "GFLOP a sample" in text
        assert "aten::convolution_backward" in text
    assert (folder / "trace.json.gz").stat().st_size < 20e6
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == TRACED
    layers = names.count("aten::convolution_backward") / (TRACED * 2 * 2)  # micro-batches, passes of SAM
    assert layers == 13  # of this ResNet, in each of whole steps
    assert {"ts", "dur", "tid"} <= {key for event in events if event.get("ph") == "X" for key in event}


def test_a_run_logs_its_arithmetic_as_well(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "peak_tflops", lambda device, precision, tf32: 0.5)
    quick = ["recipe=erm", *SMALL[1:], "train.steps=2", "evaluation.at_end=false", "wandb.mode=disabled"]
    assert cli.main(["train", *quick, f"data={data}", f"out={tmp_path / 'run'}"]) == 0
    made = Training(load([*quick, f"data={data}", f"out={tmp_path / 'none'}"], interventions()))
    for line in metrics(tmp_path / "run", range(2)):
        speed = made.flops * 8 / line["seconds"] / 1e12
        assert line["tflops_per_second"] == pytest.approx(speed)
        assert line["mfu"] == pytest.approx(speed / 0.5)
    plain = Training(
        load([*quick, "optimizer.sam.rho=null", f"data={data}", f"out={tmp_path / 'none'}"], interventions())
    )
    assert made.flops == 2 * plain.flops  # SAM's two passes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["detector.name=crashing"], "the backward pass of a real step fails on the CPU: RuntimeError: save_mean"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--out", "{data}"], "--out={data} cannot be made"),
    ],
)
def test_what_cannot_be_profiled(data, tmp_path, capsys, monkeypatch, arguments, words):
    crashing.known(monkeypatch)
    given = [one.format(data=data) for one in arguments]
    assert cli.main(["profile", *SMALL, f"data={data}", "--out", str(tmp_path / "profile"), *given]) == 2
    assert words.format(data=data) in capsys.readouterr().err


def profile(**changes):
    """Of a step of 100 ms on a GPU that is busy."""
    made = Profile(
        rows=64, steps=10, seconds=0.1, cached=0.1,
        stretches={"data": 0.001, "forward": 0.03, "backward": 0.06, "optimizer": 0.009, "collectives": 0.002},
        operators=[Operator("aten::" + "x" * 80, 0.05, 10.0), Operator("aten::mul", 0.04, 2 / 3)], busy=0.095,
        launches=970.0, waits={"cudaEventSynchronize": 1}, reads=0.0, use=Use(GIGABYTE, 30 * GIGABYTE, 70 * GIGABYTE,
                                                                             80 * GIGABYTE), largest=96, flops=1e10,
    )  # fmt: skip
    return replace(made, **changes)


def setting(*overrides, device="cuda", cores=8):
    recipe = load(["recipe=erm", "data=demo", "train.precision=bf16", *overrides], interventions()).recipe
    return Setting(recipe, world=2, device=torch.device(device), peak=989.0, cores=cores)


WAITING = {"seconds": 0.13, "stretches": {**profile().stretches, "data": 0.03}}


@pytest.mark.parametrize(
    ("changes", "chosen", "words"),
    [
        ({}, [], "Nothing stands out"),
        (WAITING, ["data.workers=2"], r"1.30 times this one; data.workers=4 \(now 2, of 8 cores"),
        (WAITING, ["data.workers=8"], "data.workers=8 have all 8 cores of this rank: store smaller"),
        ({"seconds": 0.13}, ["data.workers=2"], "Nothing stands out"),  # it does not wait: that is noise
        ({"busy": 0.06}, [], "busy 60% of a step and waits for launches otherwise: train.compile=all, or a larger"),
        ({"busy": 0.06}, ["train.compile=all"], "launches otherwise: a larger train.batch_size"),
        ({"busy": 0.0}, [], "Nothing stands out"),
        ({}, ["train.precision=fp32"], "train.precision=bf16 is several times as fast .*; train.tf32=true"),
        ({"stretches": {**profile().stretches, "collectives": 0.02}}, [], "Collectives take 20% of a step"),
        ({"largest": 128}, [], "room for train.batch_size=128"),
    ],
)
def test_what_to_change_follows_from_the_numbers(changes, chosen, words):
    (sentence,) = advice(profile(**changes), setting(*chosen))
    assert re.search(words, sentence)


def test_at_most_two_things_are_told():
    assert len(advice(profile(**WAITING, busy=0.06, largest=1000), setting("train.precision=fp32"))) == 2


def test_on_a_cpu_a_core_is_left_to_training():
    assert "data.workers=1 " in advice(profile(**WAITING), setting(device="cpu", cores=2))[0]
    assert "have all 1 cores" in advice(profile(**WAITING), setting(device="cpu", cores=1))[0]


def test_tables_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    facts, stretches, operators = ({row[0]: row[1:] for row in rows} for _, rows in tables(profile(), setting()))
    assert facts["arithmetic"] == ["10 GFLOP a sample, 3.2 TFLOP/s a rank, 0% of the 989 it could do"]
    assert facts["kernel launches a step"] == ["970; the GPU is busy 95.0 ms"]
    assert facts["waits of the host a step"] == ["cudaEventSynchronize 1; of these 0 for a number (aten::_local_scalar_"
                                                 "dense)"]  # fmt: skip
    assert facts["memory"] == ["30 GB at most, of 80 GB"]
    assert stretches["backward"] == ["60.0", "60%"]
    assert operators["aten::mul"] == ["40.0", "42%", "0.67"]
    assert "H100 80GB HBM3" in profile_markdown(profile(), setting()).splitlines()[0]


def row(key, count, cpu=0.0, device=0.0, kind=DeviceType.CPU, annotation=False):
    return SimpleNamespace(key=key, count=count, self_cpu_time_total=cpu, self_device_time_total=device,
                           device_type=kind, is_user_annotation=annotation)  # fmt: skip


def test_a_gpus_time_is_that_of_its_kernels_and_told_by_operator():
    rows = [
        row("ProfilerStep*", 3, cpu=9e6, device=9e6),
        row("Optimizer.step#AdamW.step", 3, device=5e5, kind=DeviceType.CUDA, annotation=True),
        row("aten::mul", 60, cpu=1e4, device=3e5),
        row("aten::convolution", 30, cpu=1e5, device=6e5),
        row("aten::view", 300, cpu=5e5),
        row("elementwise_kernel", 60, device=3e5, kind=DeviceType.CUDA),
        row("sm90_xmma_fprop", 30, device=6e5, kind=DeviceType.CUDA),
        row("cudaLaunchKernel", 90, cpu=1e5),
        row("cuLaunchKernelEx", 30, cpu=1e5),
        row("cudaEventSynchronize", 3, cpu=1e5),
        row("cudaStreamSynchronize", 7, cpu=1e5),
        row("cudaDeviceSynchronize", 1, cpu=1e5),  # the profiler's own
        row("aten::_local_scalar_dense", 3),
    ]
    found = profiling._counted(rows, DeviceType.CUDA)
    assert [one.name for one in found["operators"]] == ["aten::convolution", "aten::mul"]
    assert found["operators"][0] == Operator("aten::convolution", pytest.approx(0.2), 10)
    assert found["busy"] == pytest.approx(0.3)
    assert found["launches"] == 40
    assert found["waits"] == {"cudaEventSynchronize": 1, "cudaStreamSynchronize": 2}
    assert found["reads"] == 1
    assert profiling._counted(rows, DeviceType.CPU)["operators"][0].name == "aten::view"
