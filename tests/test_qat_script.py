import csv
import json
import signal
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from models import MobileNetV2
from models.statistics import prunable_layers
from quantization_aware_training import freezing, get_args_parser
from tests import script_process
from tests.test_ptq_script import int8_layers
from utils.checkpoints.weights import save_weights
from utils.common.files import file_size_mb
from utils.deployment.torchscript_reader import read_torchscript
from utils.open_weights import open_weights
from utils.pruning.pruner import FineGrainedPruner
from utils.quantization.eager import prepare_qat

FAST = ("--threads", 1, "--latency_rounds", 3, "--batch_size", 27, "--lr", 0.002)


@pytest.fixture(scope="module")
def train(run_script, tiny_folder):
    def run(weights, output, *argv, expect=0):
        data = ("--dataset", "folder", "--data_dir", tiny_folder)
        return run_script(
            *("quantization_aware_training.py", *data, *FAST, "--weights", weights, "--output", output),
            *argv,
            expect=expect,
        )

    return run


@pytest.fixture(scope="module")
def trained(train, tiny_qmodel, tmp_path_factory):
    """The file, what was recorded, and what was printed."""
    folder = tmp_path_factory.mktemp("qat")
    output, record = folder / "out" / "qat.pt", folder / "record.json"
    done = train(tiny_qmodel, output, "--epochs", 3, "--record", record)
    assert done.stderr == ""
    return output, json.loads(record.read_text()), done.stdout


def test_int8_is_as_good_as_float_and_what_is_recorded(trained, tiny_folder, run_script, tmp_path):
    """Margin: 3 points of accuracy on an easy set."""
    output, record, printed = trained
    results = record["results"]
    first, qat = results["rows"]
    assert (first["variant"], qat["variant"], qat["engine"]) == ("float", "qat", "fbgemm")
    assert first["test_accuracy_pct"] > 90
    assert qat["accuracy_change_points"] == qat["test_accuracy_pct"] - first["test_accuracy_pct"]
    assert qat["accuracy_change_points"] >= -3
    assert qat["size_mb"] == pytest.approx(file_size_mb(output))
    run_script(
        *("evaluate.py", "--weights", output, "--dataset", "folder", "--data_dir", tiny_folder),
        *("--record", tmp_path / "e.json", "--threads", 1),
    )
    evaluated = json.loads((tmp_path / "e.json").read_text())["results"]
    assert evaluated["accuracy_pct"] == pytest.approx(qat["test_accuracy_pct"])
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert lines["qat"][2] == f"{qat['test_accuracy_pct']:.2f}"
    assert lines["best"] == ["epoch", str(results["best_epoch"]), "of", "3"]


def test_one_file_is_left_with_the_history(trained):
    output, record, _ = trained
    assert sorted(p.name for p in output.parent.iterdir()) == ["qat.history.csv", "qat.pt"]
    with open(output.parent / "qat.history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(float(row["val_accuracy_pct"]) for row in rows)
    assert record["results"]["val_accuracy_pct"] == pytest.approx(best, abs=1e-5)
    assert float(rows[record["results"]["best_epoch"] - 1]["val_accuracy_pct"]) == pytest.approx(
        best, abs=1e-5
    )
    _, metadata = read_torchscript(output)
    assert metadata.variant == "qat"
    assert metadata.metrics["val_accuracy_pct"] == record["results"]["val_accuracy_pct"]
    assert metadata.metrics["test_accuracy_pct"] == record["results"]["rows"][1]["test_accuracy_pct"]


def test_weights_are_quantized_per_channel(trained):
    output, _, _ = trained
    model, _ = read_torchscript(output)
    assert len(model.weights) == 53
    assert model.per_channel
    assert all(len(model.scales[name]) == len(weight) for name, weight in model.weights.items())


def test_zeros_of_a_pruned_model_stay_zero(train, tiny_qmodel, tmp_path):
    weights = open_weights(tiny_qmodel, "qmodel")
    FineGrainedPruner(weights.model, dict.fromkeys(prunable_layers(weights.model), 0.5)).apply()
    save_weights(tmp_path / "qmodel.pth", weights, Namespace())
    # Momentum and decay both pull at them.
    train(tmp_path / "qmodel.pth", tmp_path / "qat.pt", "--epochs", 2, "--weight_decay", 0.01)
    found = int8_layers(tmp_path / "qat.pt")
    for (name, layer), (weight, _) in zip(prunable_layers(weights.model).items(), found, strict=True):
        assert weight.shape == layer.weight.shape
        assert not weight[layer.weight == 0].any(), name
        assert torch.count_nonzero(weight) > 0.7 * torch.count_nonzero(layer.weight), name


def test_a_resumed_run_ends_with_the_same_file(train, tiny_qmodel, tiny_folder, tmp_path):
    """Killed after ranges were frozen, before batch norms are; with few batches an epoch."""
    recipe = ("--epochs", 4, "--num_train_batches", 2, "--freeze_ranges", 0.25, "--freeze_batch_norms", 0.75)
    train(tiny_qmodel, tmp_path / "whole.pt", *recipe)
    output, history = tmp_path / "resumed.pt", tmp_path / "resumed.history.csv"
    argv = ("--dataset", "folder", "--data_dir", tiny_folder, *FAST, *recipe)
    argv += ("--weights", tiny_qmodel, "--output", output)
    script_process.run_until(
        ["quantization_aware_training.py", *map(str, argv)],
        lambda: history.is_file() and len(history.read_text().splitlines()) > 2,
        signal.SIGKILL,
    )
    assert not output.exists()
    train(tiny_qmodel, output, *recipe, expect=2)  # a checkpoint is not thrown away unasked
    train(tiny_qmodel, output, *recipe, "--resume")
    assert output.read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_limits_and_a_teacher(train, tiny_qmodel, tiny_weights, tmp_path):
    weights = open_weights(tiny_qmodel, "qmodel")
    teacher = MobileNetV2(**weights.model.architecture)
    teacher.load_state_dict(weights.model.state_dict())
    save_weights(tmp_path / "teacher.pth", replace(weights, model=teacher, kind="float"), Namespace())
    argv = ("--epochs", 1, "--num_train_batches", 2, "--num_eval_batches", 1)
    record = tmp_path / "record.json"
    train(tiny_qmodel, tmp_path / "alone.pt", *argv, "--record", record)
    assert {row["test_images"] for row in json.loads(record.read_text())["results"]["rows"]} == {27}
    train(tiny_qmodel, tmp_path / "taught.pt", *argv, "--teacher", tmp_path / "teacher.pth")
    alone, taught = (int8_layers(tmp_path / f"{name}.pt") for name in ("alone", "taught"))
    assert any(not torch.equal(one.weight, other.weight) for one, other in zip(alone, taught, strict=True))
    argv += ("--teacher", tiny_weights)
    assert "another normalization" in train(tiny_qmodel, tmp_path / "c.pt", *argv, expect=2).stderr


def test_fewer_bits_use_fewer_codes(train, tiny_qmodel, tmp_path):
    argv = ("--epochs", 1, "--num_train_batches", 2, "--num_eval_batches", 1, "--weight_bits", 5)
    train(tiny_qmodel, tmp_path / "qat.pt", *argv)
    largest = [int(weight.abs().max()) for weight, _ in int8_layers(tmp_path / "qat.pt")]
    assert largest[0] > 60  # the first layer
    assert sum(12 <= value <= 15 for value in largest) == 53 - 18


# When ranges and batch norms are held


def test_batch_norms_held_from_the_start_are_folded(train, tiny_qmodel, tiny_folder, tmp_path):
    """Margin: 3 points of accuracy on an easy set."""
    record = tmp_path / "record.json"
    held = ("--epochs", 2, "--freeze_batch_norms", 0, "--freeze_ranges", 0)
    train(tiny_qmodel, tmp_path / "qat.pt", *held, "--record", record)
    assert json.loads(record.read_text())["results"]["rows"][1]["accuracy_change_points"] >= -3
    # What a run leaves when it is interrupted is the model in training.
    output = tmp_path / "stopped.pt"
    argv = ("--dataset", "folder", "--data_dir", tiny_folder, *FAST, *held)
    script_process.run_until(
        [
            "quantization_aware_training.py",
            *map(str, argv),
            "--weights",
            str(tiny_qmodel),
            "--output",
            str(output),
        ],
        (tmp_path / "stopped.checkpoint.pth").is_file,
        signal.SIGKILL,
    )
    state = torch.load(tmp_path / "stopped.checkpoint.pth", weights_only=True)["state"]["model"]
    assert "features.0.0.bias" in state
    assert not any("running_mean" in name for name in state)


@pytest.mark.parametrize(
    ("epochs", "fractions", "ranges_from", "batch_norms_from"),
    [(8, (0.5, 0.75), 5, 7), (1, (0.5, 0.75), None, None), (3, (0.0, 1.0), 1, None), (5, (0.3, 0.6), 3, 4)],
)
def test_ranges_then_batch_norms_are_held_late(tiny_qmodel, epochs, fractions, ranges_from, batch_norms_from):
    args = get_args_parser().parse_args(["--epochs", str(epochs)])
    args.freeze_ranges, args.freeze_batch_norms = fractions
    model = prepare_qat(open_weights(tiny_qmodel, "qmodel").model)
    hook = freezing(model, args)
    held = {"ranges": None, "batch_norms": None}
    for epoch in range(1, epochs + 1):
        hook(epoch)
        model.train()
        if not model.features[0][2].activation_post_process.observer_enabled.item():
            held["ranges"] = held["ranges"] or epoch
        if not model.features[0][0].bn.training:
            held["batch_norms"] = held["batch_norms"] or epoch
    assert held == {"ranges": ranges_from, "batch_norms": batch_norms_from}


def test_float_weights_are_trained_as_their_qmodel(train, tiny_qmodel, run_script, tmp_path):
    weights = open_weights(tiny_qmodel, "qmodel")
    model = MobileNetV2(**weights.model.architecture)
    model.load_state_dict(weights.model.state_dict())
    save_weights(tmp_path / "float.pth", replace(weights, model=model, kind="float"), Namespace())
    argv = ("--weights", tmp_path / "float.pth", "--o", tmp_path / "packed.npz")
    run_script("scripts/pack_weights.py", *argv)
    for name, source in {
        "qmodel": tiny_qmodel,
        "float": tmp_path / "float.pth",
        "packed": tmp_path / "packed.npz",
    }.items():
        train(source, tmp_path / f"{name}.pt", "--epochs", 1, "--num_train_batches", 2)
    written = [(tmp_path / f"{name}.pt").read_bytes() for name in ("qmodel", "float", "packed")]
    assert written[0] == written[1] == written[2]


# Bad input


def test_bad_input_is_found_before_the_work_starts(train, trained, tiny_qmodel, tiny_weights, tmp_path):
    output, _, _ = trained
    new, data = tmp_path / "qat.pt", tmp_path.parent / "other"
    for (weights, file, *argv), message in {
        (tiny_qmodel, new, "--backend", "tpu"): "'tpu' is not supported here: use one of",
        (
            tiny_weights,
            new,
            "--dataset",
            "synthetic",
            "--data_dir",
            data,
        ): "has 3 classes, the images",
        (output, new): "is a TorchScript file",
        (tmp_path / "none.pth", new): "does not exist",
        (tiny_qmodel, output): "give --force",
        (tiny_qmodel, new, "--resume"): "finds no checkpoint",
        (tiny_qmodel, new, "--epochs", "0"): "--epochs",
        (tiny_qmodel, new, "--lr", "-1"): "--lr",
        (tiny_qmodel, new, "--num_train_batches", "0"): "--num_train_batches",
        (tiny_qmodel, new, "--freeze_ranges", "2"): "--freeze_ranges",
        (tiny_qmodel, new, "--weight_bits", "3"): "--weight_bits",
        (tiny_qmodel, new, "--weight_bits", "x"): "--weight_bits",
    }.items():
        assert message in train(weights, file, *argv, expect=2).stderr
    assert not list(tmp_path.iterdir())
