import json
from argparse import Namespace
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from models import MobileNetV2, MobileNetV2Quantization, ResNet18
from models.statistics import prunable_layers
from tests.conftest import TINY_CLASSES
from utils.checkpoints.weights import Weights, save_weights
from utils.common.files import file_size_mb
from utils.deployment.torchscript_reader import read_torchscript
from utils.open_weights import open_weights
from utils.pruning.pruner import FineGrainedPruner

VARIANTS = ("float", "ptq_per_tensor", "ptq_per_channel")


@pytest.fixture(scope="module")
def quantize(run_script, tiny_folder):
    def run(*argv, expect=0):
        data = ("--dataset", "folder", "--data_dir", tiny_folder)
        return run_script(
            *("post_training_quantization.py", *data, "--threads", 1, "--latency_rounds", 3, *argv),
            expect=expect,
        )

    return run


@pytest.fixture(scope="module")
def quantized(quantize, tiny_qmodel, tmp_path_factory):
    """Where the files are, what was recorded, and what was printed."""
    folder = tmp_path_factory.mktemp("ptq")
    record = folder / "record.json"
    done = quantize("--weights", tiny_qmodel, "--output_dir", folder / "out", "--record", record)
    assert done.stderr == ""
    return folder / "out", json.loads(record.read_text()), done.stdout


def files_of(folder) -> dict:
    return {variant: folder / f"mobilenetv2_{variant}.pt" for variant in VARIANTS}


def test_three_files_are_written_and_answer_as_recorded(quantized, tiny_folder, run_script, tmp_path):
    folder, record, _ = quantized
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in files_of(folder).values())
    rows = {row["variant"]: row for row in record["results"]["rows"]}
    assert list(rows) == list(VARIANTS)
    for variant, path in files_of(folder).items():
        row = rows[variant]
        assert row["size_mb"] == pytest.approx(file_size_mb(path))
        assert row["test_images"] == 90
        evaluation = tmp_path / f"{variant}.json"
        run_script(
            *("evaluate.py", "--weights", path, "--dataset", "folder", "--data_dir", tiny_folder),
            *("--record", evaluation, "--threads", 1),
        )
        results = json.loads(evaluation.read_text())["results"]
        assert results["accuracy_pct"] == pytest.approx(row["test_accuracy_pct"])


def test_int8_is_close_to_float_and_smaller(quantized):
    """Margin: 3 points of accuracy on an easy set. A narrow model's file is half overhead."""
    _, record, _ = quantized
    rows = {row["variant"]: row for row in record["results"]["rows"]}
    first = rows["float"]
    assert first["test_accuracy_pct"] > 90
    assert (first["accuracy_change_points"], first["speedup"]) == (0, 1)
    for variant in VARIANTS[1:]:
        row = rows[variant]
        change = row["test_accuracy_pct"] - first["test_accuracy_pct"]
        assert row["accuracy_change_points"] == pytest.approx(change)
        assert abs(change) <= 3
        assert row["size_mb"] < 0.6 * first["size_mb"]
        assert row["engine"] == record["arguments"]["backend"] == "fbgemm"
        assert row["median_latency_ms"] > 0


def test_the_table_holds_what_is_recorded(quantized):
    _, record, printed = quantized
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    for row in record["results"]["rows"]:
        size, density, accuracy, change, median, p90, speedup = lines[row["variant"]]
        assert size == f"{row['size_mb']:.2f}"
        assert density == f"{100 * row['density']:.2f}"
        assert accuracy == f"{row['test_accuracy_pct']:.2f}"
        assert change == f"{row['accuracy_change_points']:+.2f}"
        assert median == f"{row['median_latency_ms']:.3f}"
        assert p90 == f"{row['p90_latency_ms']:.3f}"
        assert speedup == f"{row['speedup']:.2f}"
    assert f"torch {torch.__version__}" in printed
    assert "1 threads, times of a batch of 1" in printed


def test_metadata_tells_what_a_user_needs(quantized, tiny_qmodel):
    folder, _, _ = quantized
    weights = open_weights(tiny_qmodel, "qmodel")
    for variant, path in files_of(folder).items():
        _, metadata = read_torchscript(path)
        assert metadata.variant == variant
        assert metadata.engine == (None if variant == "float" else "fbgemm")
        assert metadata.class_names == TINY_CLASSES
        assert metadata.normalization == weights.normalization
        assert metadata.architecture == weights.model.architecture
        # Folded: a bias instead of a scale and a shift for each channel.
        channels = sum(m.out_channels for m in weights.model.modules() if isinstance(m, nn.Conv2d))
        parameters = sum(p.numel() for p in weights.model.parameters())
        assert metadata.parameters == parameters - channels
        biases = channels + 3
        bytes_a_weight = 4 if variant == "float" else 1
        size = (metadata.parameters - biases) * bytes_a_weight + 4 * biases
        assert metadata.dense_size_mb == pytest.approx(size / 2**20)


def test_it_is_the_same_each_time(quantize, quantized, tiny_qmodel, tmp_path):
    folder, _, _ = quantized
    quantize("--weights", tiny_qmodel, "--output_dir", tmp_path)
    for variant, path in files_of(tmp_path).items():
        assert path.read_bytes() == files_of(folder)[variant].read_bytes()


def test_batches_of_both_kinds_can_be_limited(quantize, quantized, tiny_qmodel, tmp_path):
    folder, _, _ = quantized
    record = tmp_path / "record.json"
    quantize(
        *("--weights", tiny_qmodel, "--output_dir", tmp_path, "--record", record, "--seed", 1),
        *("--num_calibration_batches", 1, "--num_eval_batches", 3, "--batch_size", 10),
    )
    assert {row["test_images"] for row in json.loads(record.read_text())["results"]["rows"]} == {30}
    ranges = [
        [layer.scale for layer in int8_layers(files_of(f)["ptq_per_channel"])] for f in (folder, tmp_path)
    ]
    assert sum(one != other for one, other in zip(*ranges, strict=True)) > 40


class Int8Layer(NamedTuple):
    weight: torch.Tensor
    scale: float


def int8_layers(path) -> list[Int8Layer]:
    """The layers of a TorchScript file, in forward order."""
    model, _ = read_torchscript(path)
    return [Int8Layer(weight, model.activations[name].scale) for name, weight in model.weights.items()]


def test_zeros_of_a_pruned_model_are_zeros_of_its_files(quantize, run_script, tiny_weights, tmp_path):
    weights = open_weights(tiny_weights)
    FineGrainedPruner(weights.model, dict.fromkeys(prunable_layers(weights.model), 0.25)).apply()
    save_weights(tmp_path / "pruned.pth", weights, Namespace())
    run_script(
        *("scripts/to_qmodel_weights.py", "--weights", tmp_path / "pruned.pth"),
        *("--output", tmp_path / "qmodel.pth"),
    )
    quantize("--weights", tmp_path / "qmodel.pth", "--output_dir", tmp_path)
    for variant in VARIANTS[1:]:
        found = int8_layers(files_of(tmp_path)[variant])
        for (name, layer), (weight, _) in zip(prunable_layers(weights.model).items(), found, strict=True):
            assert weight.shape == layer.weight.shape
            assert not weight[layer.weight == 0].any(), name
            assert torch.count_nonzero(weight) > 0.7 * torch.count_nonzero(layer.weight), name
        _, metadata = read_torchscript(files_of(tmp_path)[variant])
        nonzeros = sum(int(torch.count_nonzero(weight)) for weight, _ in found)
        assert nonzeros < metadata.nonzeros < nonzeros + (metadata.parameters * 0.2)


def test_fewer_bits_use_fewer_codes(quantize, tiny_qmodel, tmp_path):
    quantize(
        *("--weights", tiny_qmodel, "--output_dir", tmp_path, "--weight_bits", 4, "--num_eval_batches", 1)
    )
    for variant in VARIANTS[1:]:
        largest = [int(weight.abs().max()) for weight, _ in int8_layers(files_of(tmp_path)[variant])]
        assert largest[0] > 60  # the first layer
        assert sum(value in (6, 7) for value in largest) == 53 - 18, variant


# qmodel files


def test_the_qmodel_answers_as_the_weights(run_script, tiny_weights, tmp_path):
    output = tmp_path / "new" / "qmodel.pth"
    argv = ("scripts/to_qmodel_weights.py", "--weights", tiny_weights, "--output", output)
    printed = run_script(*argv).stdout
    weights, qmodel = open_weights(tiny_weights), open_weights(output, "qmodel")
    assert type(weights.model) is MobileNetV2
    assert type(qmodel.model) is MobileNetV2Quantization
    assert (qmodel.class_names, qmodel.normalization) == (weights.class_names, weights.normalization)
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(qmodel.model(images), weights.model(images))
    parameters = sum(p.numel() for p in weights.model.parameters())
    assert f"{parameters} parameters, density" in printed
    run_script(*argv, expect=2)
    run_script(*argv, "--force", "--output_stride", 8)
    assert open_weights(output, "qmodel").model.architecture["output_stride"] == 8


def test_a_qmodel_is_not_converted_again(run_script, tiny_qmodel, tmp_path):
    output = tmp_path / "qmodel.pth"
    done = run_script("scripts/to_qmodel_weights.py", "--weights", tiny_qmodel, "--output", output, expect=2)
    assert "is a qmodel" in done.stderr
    assert not output.exists()


@pytest.fixture
def float_files(tiny_qmodel, run_script, tmp_path):
    """The weights of `tiny_qmodel` as float weights, packed, and as a bare state_dict."""
    folder = tmp_path / "float"
    folder.mkdir()
    weights = open_weights(tiny_qmodel, "qmodel")
    model = MobileNetV2(**weights.model.architecture)
    model.load_state_dict(weights.model.state_dict())
    save_weights(folder / "float.pth", replace(weights, model=model, kind="float"), Namespace())
    argv = ("--weights", folder / "float.pth", "--o", folder / "packed.npz")
    run_script("scripts/pack_weights.py", *argv)
    return folder


@pytest.mark.parametrize("name", ["float.pth", "packed.npz"])
def test_float_weights_give_the_files_of_their_qmodel(quantize, quantized, float_files, tmp_path, name):
    folder, _, _ = quantized
    quantize("--weights", float_files / name, "--output_dir", tmp_path / "out")
    for variant, path in files_of(tmp_path / "out").items():
        assert path.read_bytes() == files_of(folder)[variant].read_bytes()


# Bad input


def refused(quantize, *argv) -> str:
    return quantize(*argv, expect=2).stderr


def test_an_unknown_engine(quantize, tiny_qmodel, tmp_path):
    message = refused(quantize, "--weights", tiny_qmodel, "--output_dir", tmp_path, "--backend", "tpu")
    assert "'tpu' is not supported here: use one of" in message
    assert not list(tmp_path.iterdir())


def test_the_engine_is_checked_before_anything_is_read(quantize, tmp_path):
    message = refused(quantize, "--weights", tmp_path / "none.pth", "--backend", "tpu")
    assert "'tpu' is not supported here" in message


def test_files_that_are_no_weights(quantize, quantized, tmp_path):
    folder, _, _ = quantized
    argv = ("--output_dir", tmp_path, "--weights")
    resnet18 = tmp_path / "resnet18.pth"
    save_weights(resnet18, Weights(ResNet18(3), kind="resnet18"), Namespace())
    assert "is wanted here" in refused(quantize, *argv, resnet18)
    resnet18.unlink()
    assert "is a TorchScript file" in refused(quantize, *argv, files_of(folder)["float"])
    assert "does not exist" in refused(quantize, *argv, tmp_path / "none.pth")
    assert not list(tmp_path.iterdir())


def test_outputs_that_exist_or_cannot_be_written(quantize, quantized, tiny_qmodel, tmp_path):
    folder, _, _ = quantized
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "give --force" in refused(quantize, "--weights", tiny_qmodel, "--output_dir", folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(
        quantize, "--weights", tiny_qmodel, "--output_dir", tmp_path / "file"
    )


def test_images_of_other_classes(run_script, tiny_qmodel, tmp_path):
    argv = ("--dataset", "synthetic", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out")
    done = run_script("post_training_quantization.py", "--weights", tiny_qmodel, *argv, expect=2)
    assert "has 3 classes, the images have 10" in done.stderr


@pytest.mark.parametrize("value", ["3", "9", "6.5", "x"])
def test_bits_that_there_are_not(quantize, value):
    message = refused(quantize, "--weight_bits", value)
    assert "--weight_bits" in message
    assert value in message


@pytest.mark.parametrize("flag", ["--batch_size", "--num_eval_batches", "--num_calibration_batches"])
def test_numbers_below_one(quantize, flag):
    assert flag in refused(quantize, flag, 0)


def test_answers_that_are_not_finite_are_refused(quantize, overflowing_weights, tmp_path):
    done = quantize("--weights", overflowing_weights, "--output_dir", tmp_path, expect=2)
    assert "answers with NaN" in done.stderr
    assert not list(tmp_path.iterdir())
