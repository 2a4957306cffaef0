import csv
import json
import os
import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from models import MobileNetV2
from models.folding import fold_batch_norms
from utils.checkpoints.weights import Weights, save_weights
from utils.deployment.torchscript import save_torchscript, to_torchscript
from utils.deployment.torchscript_reader import read_torchscript
from utils.open_model import open_model
from utils.open_weights import open_weights

NUMBERS = [
    "size_mb",
    "median_latency_ms",
    "p90_latency_ms",
    "p99_latency_ms",
    "median_latency_ms_per_image",
    "images_per_s",
    "speedup",
]


@pytest.fixture(scope="module")
def scripted(tiny_weights, tmp_path_factory):
    """The float model of `tiny_weights` as a TorchScript file."""
    file = open_model(tiny_weights)
    path = tmp_path_factory.mktemp("scripted") / "tiny.pt"
    folded = fold_batch_norms(file.model)
    parameters = sum(parameter.numel() for parameter in folded.parameters())
    nonzeros = sum(int(parameter.count_nonzero()) for parameter in folded.parameters())
    metadata = replace(file.metadata, parameters=parameters, nonzeros=nonzeros)
    save_torchscript(path, to_torchscript(folded, 32), metadata)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Weights of a model that takes far longer than `tiny_weights`."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("large") / "large.pth"
    save_weights(path, Weights(MobileNetV2(3, width_mult=1.0, output_stride=8)), Namespace())
    return path


@pytest.fixture(scope="module")
def benchmark(run_script):
    def run(*argv, **kwargs):
        argv = ("scripts/benchmarks.py", "--threads", 1, "--model_file", *argv)
        return run_script(*argv, **kwargs)

    return run


def test_the_numbers_agree_with_each_other_and_with_the_files(
    benchmark, tiny_weights, scripted, large, tmp_path
):
    table, record = tmp_path / "b.csv", tmp_path / "b.json"
    files = [large, tiny_weights, scripted]
    done = benchmark(
        *files,
        *("--batch_size", 4, "--rounds", 9, "--warm_up", 2, "--csv", table, "--record", record),
    )
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(path) for path in files]
    assert list(rows[0]) == ["file", "variant", *NUMBERS]
    assert [row["variant"] for row in rows] == ["float", "float", "float"]
    for row, path in zip(rows, files, strict=True):
        value = {name: float(row[name]) for name in NUMBERS}
        assert value["size_mb"] == round(path.stat().st_size / 2**20, 2)
        assert 0 < value["median_latency_ms"] <= value["p90_latency_ms"] <= value["p99_latency_ms"]
        assert value["median_latency_ms_per_image"] == pytest.approx(value["median_latency_ms"] / 4, abs=2e-4)
        assert value["images_per_s"] == pytest.approx(4000 / value["median_latency_ms"], rel=0.01, abs=0.1)
        assert row["file"] in done.stdout
        assert f"{value['median_latency_ms']:.3f}" in done.stdout
    # The large model has 32 times the multiply-adds of the tiny one.
    assert float(rows[0]["speedup"]) == 1.0
    assert float(rows[1]["speedup"]) > 2

    recorded = json.loads(record.read_text())
    assert recorded["threads"] == 1
    assert recorded["results"]["batch_size"] == 4
    assert [{k: str(v) for k, v in row.items()} for row in recorded["results"]["files"]] == rows
    assert f"torch {torch.__version__}" in done.stdout
    assert "1 threads, batch size 4, images of 32x32, 9 rounds" in done.stdout
    assert recorded["cpu"] in done.stdout


def test_int8_files_run_on_their_engine(benchmark, tiny_weights, tiny_scripted):
    names = ["mobilenetv2_ptq_per_tensor.pt", "mobilenetv2_ptq_per_channel.pt"]
    done = benchmark(tiny_weights, *(tiny_scripted / name for name in names), "--rounds", 3, "--warm_up", 1)
    for name in names:
        variant = name.removeprefix("mobilenetv2_").removesuffix(".pt")
        assert f"{tiny_scripted / name}: {variant}, TorchScript, engine fbgemm" in done.stdout
    assert done.stderr == ""


def test_an_engine_is_set_for_a_file_and_left_alone_by_a_float_one(tiny_weights, tiny_scripted, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    file = open_model(tiny_scripted / "mobilenetv2_ptq_per_channel.pt")
    assert torch.backends.quantized.engine == "x86"
    open_model(tiny_weights).use_engine()
    assert torch.backends.quantized.engine == "x86"
    file.use_engine()
    assert torch.backends.quantized.engine == "fbgemm"


def test_opening_tells_what_the_file_says(tiny_weights, scripted):
    weights, script = open_model(tiny_weights), open_model(scripted)
    assert (script.metadata.variant, script.metadata.engine) == ("float", None)
    for name in (
        "architecture",
        "class_names",
        "normalization",
        "image_size",
        "macs",
    ):
        assert getattr(script.metadata, name) == getattr(weights.metadata, name), name
    folded = list(fold_batch_norms(weights.model).parameters())
    assert script.metadata.parameters == sum(parameter.numel() for parameter in folded)
    assert script.metadata.nonzeros == sum(int(parameter.count_nonzero()) for parameter in folded)
    assert script.metadata.density == script.metadata.nonzeros / script.metadata.parameters
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(script.model(images), weights.model(images), rtol=1e-4, atol=1e-4)


def test_an_output_stride_changes_weights_and_is_refused_for_torchscript(tiny_weights, scripted, benchmark):
    finer, plain = (open_model(tiny_weights, output_stride=stride) for stride in (8, None))
    assert finer.metadata.macs > 4 * plain.metadata.macs
    message = benchmark(scripted, "--output_stride", 8, expect=2).stderr
    assert "its output stride is fixed: leave --output_stride out" in message


def test_bad_input(benchmark, tiny_weights, scripted, tmp_path):
    def refused(*argv):
        return benchmark(*argv, expect=2).stderr

    assert "none.pt does not exist" in refused(tiny_weights, tmp_path / "none.pt")
    assert "expected at least one argument" in refused()
    for flag in ("--batch_size", "--rounds", "--warm_up"):
        assert "a whole number from 1 to" in refused(tiny_weights, flag, 0)
    (tmp_path / "there.csv").write_text("old")
    assert "there.csv exists: give --force" in refused(tiny_weights, "--csv", tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "old"
    whole = scripted.read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert "half.pt is truncated" in refused(tmp_path / "half.pt")
    other = open_weights(tiny_weights)
    other.image_size = 64
    save_weights(tmp_path / "64.pth", other, Namespace())
    assert "takes images of 64 pixels" in refused(tiny_weights, tmp_path / "64.pth")


def test_a_file_for_an_engine_that_does_not_run_here(benchmark, tiny_scripted, tmp_path):
    model, metadata = read_torchscript(tiny_scripted / "mobilenetv2_ptq_per_channel.pt")
    path = tmp_path / "another.pt"
    save_torchscript(path, to_torchscript(model, 32), replace(metadata, engine="another"))
    message = benchmark(path, expect=2).stderr
    assert "engine another, which this machine does not support" in message


def test_a_name_that_is_not_utf8(benchmark, run_script, scripted, tmp_path):
    path = os.path.join(tmp_path, os.fsdecode(b"\xff.pt"))
    shutil.copy(scripted, path)
    benchmark(path, "--csv", tmp_path / "out.csv")
    assert r"\udcff.pt" in (tmp_path / "out.csv").read_text()
    run_script("scripts/plot_model.py", "--weights", path, "--o", tmp_path / "out.png")
