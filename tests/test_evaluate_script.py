import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import MobileNetV2, MobileNetV2Quantization
from models.statistics import model_statistics
from utils.checkpoints.weights import Weights, save_weights
from utils.data.datasets import load_data, measure_normalization
from utils.data.loader import normalize
from utils.open_weights import open_weights

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def evaluate(run_script, tiny_folder):
    def run(*argv, **kwargs):
        return run_script(
            *("evaluate.py", "--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1, *argv),
            **kwargs,
        )

    return run


@pytest.fixture(scope="module")
def undecided_weights(tiny_weights, tiny_folder, tmp_path_factory) -> Path:
    """Weights that answer each class to some images, so that a slip anywhere changes the numbers."""
    weights = open_weights(tiny_weights)
    normalization = weights.normalization
    images = [Image.open(f) for name in CLASSES for f in sorted((tiny_folder / "train" / name).iterdir())]
    pixels = torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    inputs = normalize(pixels, normalization)
    for module in weights.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        weights.model.train()(inputs)
        logits = weights.model.eval()(inputs)
    classifier = weights.model.classifier[1]
    with torch.no_grad():
        for label in range(3):
            scale = 1 / logits[:, label].std()
            classifier.weight[label] *= scale
            classifier.bias[label] = (classifier.bias[label] - logits[:, label].mean()) * scale
    path = tmp_path_factory.mktemp("undecided") / "undecided.pth"
    save_weights(path, weights, Namespace())
    return path


def plain_evaluation(weights_path: Path, folder: Path) -> tuple[list[int], float]:
    """Right answers by class and mean loss, an image at a time and without the project's own loops."""
    weights = open_weights(weights_path)
    mean, std = np.array(weights.normalization.mean), np.array(weights.normalization.std)
    correct, losses = [0, 0, 0], []
    for label, name in enumerate(CLASSES):
        for file in sorted((folder / name).iterdir()):
            pixels = (np.asarray(Image.open(file)) / 255 - mean) / std
            image = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            with torch.inference_mode():
                logits = weights.model(image)
            correct[label] += int(logits.argmax()) == label
            losses.append(-torch.log_softmax(logits, 1)[0, label].item())
    return correct, float(np.mean(losses))


def test_the_numbers_are_those_of_a_plain_loop(evaluate, tiny_folder, undecided_weights, tmp_path):
    record_path = tmp_path / "record.json"
    done = evaluate("--weights", undecided_weights, "--batch_size", 7, "--record", record_path)
    correct, loss = plain_evaluation(undecided_weights, tiny_folder / "test")
    assert all(0 < hits < 30 for hits in correct)
    accuracy_pct = 100 * sum(correct) / 90
    assert f"test accuracy {accuracy_pct:.2f} % ({sum(correct)} / 90), loss {loss:.4f}" in done.stdout
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    for name, hits in zip(CLASSES, correct, strict=True):
        assert table[name] == [f"{100 * hits / 30:.2f}", str(hits), "30"]

    statistics = model_statistics(open_weights(undecided_weights).model, 32)
    record = json.loads(record_path.read_text())
    results = record["results"]
    assert results["loss"] == pytest.approx(loss, rel=1e-5)
    assert {key: value for key, value in results.items() if key != "loss"} == {
        "variant": "float",
        "split": "test",
        "accuracy_pct": accuracy_pct,
        "correct": sum(correct),
        "total": 90,
        "correct_by_class": dict(zip(CLASSES, correct, strict=True)),
        "total_by_class": dict.fromkeys(CLASSES, 30),
        "parameters": statistics.parameters,
        "nonzeros": statistics.nonzeros,
        "density": statistics.nonzeros / statistics.parameters,
        "dense_size_mb": statistics.parameters * 4 / 2**20,
        "nonzero_size_mb": statistics.nonzeros * 4 / 2**20,
        "file_size_mb": undecided_weights.stat().st_size / 2**20,
        "macs": statistics.macs,
        "image_size": 32,
    }
    assert record["threads"] == 1
    assert record["arguments"]["batch_size"] == 7
    assert f"{statistics.parameters:,}" in done.stdout
    assert f"{statistics.macs:,}" in done.stdout


@pytest.mark.parametrize(("split", "total"), [("val", 18), ("train", 162)])
def test_other_splits(evaluate, tiny_weights, split, total):
    done = evaluate("--weights", tiny_weights, "--split", split)
    assert f"{split} accuracy " in done.stdout
    assert f" / {total}), loss" in done.stdout


def test_a_pruned_file_shows_its_density(evaluate, tiny_weights, tmp_path):
    weights = open_weights(tiny_weights)
    with torch.no_grad():
        for parameter in weights.model.parameters():
            parameter.fill_(1)
        layer = weights.model.features[18][0].weight
        layer[:640] = 0
    parameters = sum(p.numel() for p in weights.model.parameters())
    zeros = layer[:640].numel()
    save_weights(tmp_path / "pruned.pth", weights, Namespace())
    shown = [line.split() for line in evaluate("--weights", tmp_path / "pruned.pth").stdout.splitlines()]
    assert ["parameters", f"{parameters:,}"] in shown
    assert ["nonzero", f"{parameters - zeros:,}"] in shown
    assert ["density", "%", f"{100 * (parameters - zeros) / parameters:.2f}"] in shown


def test_the_published_models_numbers(run_script, tiny_folder, tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "w.pth", Weights(MobileNetV2(num_classes=3)), Namespace())
    done = run_script(
        *("evaluate.py", "--weights", tmp_path / "w.pth", "--dataset", "folder"),
        *("--data_dir", tiny_folder, "--output_stride", 32, "--threads", 1),
    )
    shown = [line.split() for line in done.stdout.splitlines()]
    # 10 classes make 2,236,682 parameters and 6,124,928 multiply-adds; seven fewer outputs, these.
    assert ["parameters", f"{2_236_682 - 7 * 1281:,}"] in shown
    assert ["MACs", "per", "image", "of", "32x32", f"{6_124_928 - 7 * 1280:,}"] in shown
    assert ["size", "dense,", "MB", "8.50"] in shown


def test_a_bare_state_dict_takes_names_and_normalization_from_the_images(
    evaluate, tiny_folder, undecided_weights, tmp_path
):
    torch.save(open_weights(undecided_weights).model.state_dict(), tmp_path / "bare.pth")
    done = evaluate("--weights", tmp_path / "bare.pth", "--output_stride", 32)
    images = load_data(Namespace(dataset="folder", data_dir=tiny_folder, image_size=None, val_size=None))
    weights = open_weights(tmp_path / "bare.pth", output_stride=32)
    weights.normalization = measure_normalization(images)
    save_weights(tmp_path / "with.pth", weights, Namespace())
    correct, loss = plain_evaluation(tmp_path / "with.pth", tiny_folder / "test")
    assert f"({sum(correct)} / 90), loss {loss:.4f}" in done.stdout


def test_a_qmodel_has_the_accuracy_of_its_float_model(evaluate, undecided_weights, tmp_path):
    weights = open_weights(undecided_weights)
    model = MobileNetV2Quantization(**weights.model.architecture)
    model.load_state_dict(weights.model.state_dict())
    weights.model, weights.kind = model, "qmodel"
    save_weights(tmp_path / "qmodel.pth", weights, Namespace())
    expected = evaluate("--weights", undecided_weights).stdout
    shown = evaluate("--weights", tmp_path / "qmodel.pth").stdout
    assert shown.splitlines()[0] == expected.splitlines()[0]
    assert "qmodel" in shown


@pytest.mark.parametrize("variant", ["float", "ptq_per_tensor", "ptq_per_channel"])
def test_a_torchscript_file_has_the_numbers_of_the_script_that_wrote_it(
    evaluate, tiny_scripted, tiny_qmodel, tmp_path, variant
):
    path, record = tiny_scripted / f"mobilenetv2_{variant}.pt", tmp_path / "record.json"
    done = evaluate("--weights", path, "--batch_size", 32, "--record", record)
    rows = json.loads((tiny_scripted / "record.json").read_text())["results"]["rows"]
    expected = next(row for row in rows if row["variant"] == variant)
    results = json.loads(record.read_text())["results"]
    assert results["variant"] == variant
    assert (results["correct"], results["total"]) == (expected["test_correct"], 90)
    assert results["correct"] > 60
    assert results["density"] == expected["density"]
    assert results["file_size_mb"] == expected["size_mb"] == path.stat().st_size / 2**20
    model = open_weights(tiny_qmodel, "qmodel").model
    assert results["macs"] == model_statistics(model, 32).macs
    # Batch norms are folded: what is left are weights and a bias an output channel.
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    weights, biases = sum(m.weight.numel() for m in layers), sum(len(m.weight) for m in layers)
    assert results["parameters"] == weights + biases
    bytes_of_weights = 4 * weights if variant == "float" else weights
    assert results["dense_size_mb"] == (bytes_of_weights + 4 * biases) / 2**20
    assert done.stderr == ""


def test_an_output_stride_is_refused_where_it_is_fixed(evaluate, tiny_scripted):
    path = tiny_scripted / "mobilenetv2_float.pt"
    assert "its output stride is fixed" in evaluate("--weights", path, "--output_stride", 8, expect=2).stderr


def test_damaged_torchscript_files(evaluate, tiny_scripted, tmp_path):
    whole = (tiny_scripted / "mobilenetv2_ptq_per_channel.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    for kept in (0.1, 0.5, 0.99):
        bad.write_bytes(whole[: int(kept * len(whole))])
        assert "truncated" in evaluate("--weights", bad, expect=2).stderr
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    bad.write_bytes(flipped)
    assert "damaged" in evaluate("--weights", bad, expect=2).stderr
    torch.jit.script(torch.nn.Linear(2, 2)).save(bad)
    assert "another project" in evaluate("--weights", bad, expect=2).stderr


def test_bad_input(evaluate, tiny_weights, tiny_folder, tmp_path):
    def refused(*argv):
        return evaluate(*argv, expect=2).stderr

    assert "does not exist" in refused("--weights", tmp_path / "none.pth")
    assert "required: --weights" in refused()
    assert "'0' must be a whole number from 1 to" in refused("--weights", tiny_weights, "--batch_size", 0)
    save_weights(tmp_path / "four.pth", Weights(MobileNetV2(4, 0.1)), Namespace())
    assert "has 4 classes, the images have 3" in refused("--weights", tmp_path / "four.pth")
    other = open_weights(tiny_weights)
    other.class_names = ("blue", "red", "green")
    save_weights(tmp_path / "other.pth", other, Namespace())
    assert "has 'red' as class 1, the images have 'green'" in refused("--weights", tmp_path / "other.pth")
    (tmp_path / "there.json").write_text("old")
    assert "there.json exists: give --force" in refused(
        "--weights", tiny_weights, "--record", tmp_path / "there.json"
    )
    assert (tmp_path / "there.json").read_text() == "old"
    assert "the val split holds no images" in refused(
        "--weights", tiny_weights, "--split", "val", "--val_size", 0
    )


def test_answers_that_are_not_finite_are_not_recorded(evaluate, overflowing_weights, tmp_path):
    record = tmp_path / "record.json"
    done = evaluate("--weights", overflowing_weights, "--record", record, expect=2)
    assert "answers with NaN" in done.stderr
    assert not list(tmp_path.iterdir())
