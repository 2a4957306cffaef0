import csv
import json
import re
import signal
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from models import MobileNetV2
from models.statistics import prunable_layers
from tests import script_process
from tests.conftest import TINY_CLASSES
from utils.checkpoints.weights import Weights, save_weights
from utils.data.datasets import Normalization
from utils.open_weights import open_weights
from utils.pruning.pruner import kept_count
from utils.pruning.sparsity_dict import read_sparsity_dict
from utils.training.distillation import distillation
from utils.training.loop import cross_entropy

FAST = ("--batch_size", 32, "--threads", 1)


@pytest.fixture(scope="module")
def csv_text(run_script, tiny_weights, tmp_path_factory) -> str:
    """The template of the tiny model."""
    path = tmp_path_factory.mktemp("csv") / "template.csv"
    run_script("scripts/generate_sparsity_dict_template.py", "--weights", tiny_weights, "--o", path)
    return path.read_text()


@pytest.fixture(scope="module")
def mixed(csv_text, tmp_path_factory):
    """A CSV with a fraction of its own for each layer, 0.0 and 1.0 among them."""
    path = tmp_path_factory.mktemp("csv") / "mixed.csv"
    lines = csv_text.splitlines()
    for i in range(1, len(lines)):
        fraction = {3: 1.0, 8: 0.0}.get(i, 0.2 + i / 100)
        lines[i] = lines[i].replace(",1.0,", f",{fraction},")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def prune(run_script, tiny_folder, tiny_weights):
    def run(sparsity_dict, output, *argv, weights=tiny_weights, expect=0):
        data = ("--dataset", "folder", "--data_dir", tiny_folder)
        files = ("--weights", weights, "--sparsity_dict", sparsity_dict, "--output", output)
        return run_script("prune.py", *data, *FAST, *files, *argv, expect=expect)

    return run


def asked_counts(model: nn.Module, sparsity_dict) -> dict[str, int]:
    layers = prunable_layers(model)
    ratios = read_sparsity_dict(sparsity_dict, layers)
    return {name: kept_count(layers[name].weight.numel(), ratio) for name, ratio in ratios.items()}


def nonzero_counts(model: nn.Module) -> dict[str, int]:
    return {name: int(torch.count_nonzero(layer.weight)) for name, layer in prunable_layers(model).items()}


def test_an_unedited_template_changes_nothing(prune, csv_text, tiny_weights, tmp_path):
    path, output = tmp_path / "s.csv", tmp_path / "p.pth"
    path.write_text(csv_text)
    printed = prune(path, output, "--epochs", 0).stdout
    before, after = open_weights(tiny_weights), open_weights(output)
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name]), name
    assert (after.class_names, after.normalization) == (before.class_names, before.normalization)
    rows = re.findall(r"^(dense|pruned) +(\S+) +(\S+)", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["dense", "pruned"]
    assert rows[0][1] == rows[1][1]
    assert rows[1][2] == "+0.00"


def test_pruning_alone(prune, mixed, tiny_weights, tmp_path):
    output, record = tmp_path / "p.pth", tmp_path / "r.json"
    printed = prune(mixed, output, "--epochs", 0, "--record", record).stdout
    dense, pruned = open_weights(tiny_weights).model, open_weights(output).model
    ratios = read_sparsity_dict(mixed, prunable_layers(dense))
    for name, layer in prunable_layers(dense).items():
        torch_prune.l1_unstructured(layer, "weight", amount=1 - ratios[name])
        assert torch.equal(layer.weight, pruned.get_submodule(name).weight), name
        kept, total = int(layer.weight_mask.sum()), layer.weight.numel()
        assert re.search(rf"^{re.escape(name)} +{kept} +{total} +{kept / total:.4f}$", printed, re.MULTILINE)
    parameters = list(pruned.parameters())
    nonzeros = sum(int(torch.count_nonzero(p)) for p in parameters)
    total = sum(p.numel() for p in parameters)
    line = (
        f"density {100 * nonzeros / total:.2f} % ({nonzeros} of {total} parameters are not zero): "
        f"{nonzeros * 4 / 2**20:.2f} MB of {total * 4 / 2**20:.2f} MB by nonzeros"
    )
    assert printed.count(line) == 2
    results = json.loads(record.read_text())["results"]
    assert (results["nonzeros"], results["parameters"]) == (nonzeros, total)
    assert results["density"] == nonzeros / total
    assert results.pop("history") == []
    assert results == torch.load(output, weights_only=True)["metrics"]
    assert not (tmp_path / "p.checkpoint.pth").exists()


def test_the_published_size_by_nonzeros():
    """27.10 % of 8.53 MB is 2.31 MB."""
    from models.statistics import ModelStatistics

    statistics = ModelStatistics(2_236_682, round(0.2710 * 2_236_682), 0, ())
    assert f"{100 * statistics.density:.2f} {statistics.nonzero_size_mb:.2f}" == "27.10 2.31"
    assert f"{statistics.dense_size_mb:.2f}" == "8.53"


def test_recovery_learns_and_keeps_the_zeros(prune, mixed, tiny_weights, tmp_path):
    output = tmp_path / "p.pth"
    # Momentum, decay and the average all pull at pruned weights.
    recipe = ("--epochs", 9, "--batch_size", 16, "--lr", 0.02, "--weight_decay", 0.01, "--ema", 0.8)
    printed = prune(mixed, output, *recipe, "--output_stride", 8).stdout
    dense, pruned = open_weights(tiny_weights).model, open_weights(output)
    ratios = read_sparsity_dict(mixed, prunable_layers(dense))
    for name, layer in prunable_layers(dense).items():
        torch_prune.l1_unstructured(layer, "weight", amount=1 - ratios[name])
        weight = pruned.model.get_submodule(name).weight
        assert torch.equal(weight != 0, layer.weight_mask.bool()), name
        assert not torch.signbit(weight[weight == 0]).any()
        if 0 < ratios[name] < 1:
            assert not torch.equal(weight, layer.weight), name
    accuracy = dict(re.findall(r"^(dense|pruned|recovered) +([\d.]+)", printed, re.MULTILINE))
    assert accuracy["recovered"] == f"{pruned.metrics['test_accuracy_pct']:.2f}"
    with open(tmp_path / "p.history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["train_accuracy_pct"]) < 50 < 60 < float(rows[-1]["train_accuracy_pct"])
    best = max(float(row["val_accuracy_pct"]) for row in rows)
    assert pruned.metrics["val_accuracy_pct"] == pytest.approx(best, abs=1e-5)


def test_gradual_pruning_with_a_teacher_ends_at_the_same_counts(prune, mixed, tiny_weights, tmp_path):
    output = tmp_path / "p.pth"
    recipe = ("--epochs", 3, "--schedule", "gradual", "--ramp_epochs", 2, "--prune_every", 3)
    prune(mixed, output, *recipe, "--teacher", tiny_weights, "--lr", 0.01)
    pruned = open_weights(output)
    assert nonzero_counts(pruned.model) == asked_counts(pruned.model, mixed)
    assert pruned.metrics["best_epoch"] >= 2
    # Weights moved before they were pruned, so it is not the dense model's mask everywhere.
    dense = open_weights(tiny_weights).model
    name = "features.18.0"
    layer = dense.get_submodule(name)
    torch_prune.l1_unstructured(
        layer, "weight", amount=1 - read_sparsity_dict(mixed, prunable_layers(dense))[name]
    )
    assert not torch.equal(pruned.model.get_submodule(name).weight != 0, layer.weight_mask.bool())


def test_a_resumed_run_ends_with_the_same_weights(prune, mixed, tiny_folder, tiny_weights, tmp_path):
    """Killed within the ramp, with an average and a teacher."""
    recipe = ("--epochs", 4, "--schedule", "gradual", "--ramp_epochs", 3, "--prune_every", 2)
    recipe += ("--ema", 0.9, "--teacher", tiny_weights, "--lr", 0.01)
    prune(mixed, tmp_path / "whole.pth", *recipe)
    output, history = tmp_path / "resumed.pth", tmp_path / "resumed.history.csv"
    argv = ("--dataset", "folder", "--data_dir", tiny_folder, *FAST, "--weights", tiny_weights)
    argv += ("--sparsity_dict", mixed, "--output", output, *recipe)
    script_process.run_until(
        ["prune.py", *map(str, argv)],
        lambda: history.is_file() and len(history.read_text().splitlines()) > 1,
        signal.SIGKILL,
    )
    assert not output.exists()
    prune(mixed, output, *recipe, expect=2)
    prune(mixed, output, *recipe, "--resume")
    whole, resumed = (torch.load(path, weights_only=True) for path in (tmp_path / "whole.pth", output))
    assert whole["metrics"] == resumed["metrics"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_a_csv_that_changed_before_resuming_is_noticed(prune, mixed, tiny_weights, tmp_path):
    path, output = tmp_path / "s.csv", tmp_path / "p.pth"
    path.write_text(mixed.read_text())
    prune(path, output, "--epochs", 2, "--lr", 1e-3)
    # As an interrupted run would leave it: the checkpoint of its start.
    from prune import get_args_parser, recover
    from utils.checkpoints.weights import complete
    from utils.data.datasets import load_data

    data = torch.load(output, weights_only=True)["arguments"]["data_dir"]
    argv = ["--dataset", "folder", "--data_dir", data, *map(str, FAST), "--weights", str(tiny_weights)]
    argv += ["--sparsity_dict", str(path), "--output", str(output), "--epochs", "1"]
    args = get_args_parser().parse_args(argv)
    images = load_data(args)
    weights = complete(tiny_weights, open_weights(tiny_weights), images)
    recover(weights, read_sparsity_dict(path, prunable_layers(weights.model)), None, images, args)
    path.write_text(mixed.read_text().replace(",0.25,", ",0.2,"))
    error = prune(path, output, "--epochs", 1, "--resume", expect=2).stderr
    assert "--sparsity_dict" in error


FAULTS = {
    "empty": (lambda text: "", "is empty"),
    "no_such_column": (lambda text: text.replace("sparsity", "keep", 1), "no column sparsity"),
    "unknown_layer": (
        lambda text: text.replace("features.2.conv.2,", "features.2.conv.9,"),
        "line 7, column layer",
    ),
    "layer_missing": (lambda text: text[: text.index("classifier.1")], "no row for layer classifier.1"),
    "duplicate_layer": (lambda text: text + text.splitlines()[-1] + "\n", "line 55, column layer"),
    "not_a_number": (lambda text: text.replace(",1.0,", ",many,", 1), "line 2, column sparsity: 'many'"),
    "nan": (lambda text: text.replace(",1.0,", ",nan,", 1), "line 2, column sparsity: 'nan'"),
    "above_one": (lambda text: text.replace(",1.0,", ",1.01,", 1), "line 2, column sparsity: '1.01'"),
    "below_zero": (lambda text: text.replace(",1.0,", ",-1e-9,", 1), "line 2, column sparsity: '-1e-9'"),
    "decimal_comma": (lambda text: text.replace(",1.0,", ",0,5,", 1), "line 2 has 6 cells"),
    "percent": (lambda text: text.replace(",1.0,", ",50%,", 1), "write a fraction"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_csv_ends_in_one_line(prune, csv_text, tmp_path, fault):
    spoil, says = FAULTS[fault]
    path, output = tmp_path / "s.csv", tmp_path / "p.pth"
    path.write_text(spoil(csv_text))
    error = prune(path, output, expect=2).stderr
    assert says in error
    assert str(path) in error
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_missing_csv_ends_in_one_line(prune, tmp_path):
    assert "none.csv does not exist" in prune(tmp_path / "none.csv", tmp_path / "p.pth", expect=2).stderr


def test_windows_line_ends_a_bom_and_spaces_are_accepted(prune, mixed, tmp_path):
    path = tmp_path / "windows.csv"
    text = mixed.read_text().replace(",", " , ").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    prune(path, tmp_path / "windows.pth", "--epochs", 0)
    prune(mixed, tmp_path / "plain.pth", "--epochs", 0)
    one, other = (open_weights(tmp_path / f"{name}.pth").model for name in ("windows", "plain"))
    assert nonzero_counts(one) == nonzero_counts(other) == asked_counts(one, mixed)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--epochs", -1), "--epochs"),
        (("--lr", 0), "--lr"),
        (("--batch_size", 0), "--batch_size"),
        (("--temperature", 0), "--temperature"),
        (("--distill_weight", 1.5), "--distill_weight"),
        (("--ramp_epochs", 2), "--schedule gradual"),
        (("--schedule", "gradual", "--epochs", 0), "--epochs"),
        (("--schedule", "gradual", "--epochs", 2, "--ramp_epochs", 3), "--ramp_epochs 3"),
        (("--teacher", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--resume",), "no checkpoint"),
        (("--output", "/proc/none/p.pth"), "cannot be written"),
    ],
)
def test_bad_arguments_are_refused(prune, mixed, tmp_path, argv, says):
    assert says in prune(mixed, tmp_path / "p.pth", *argv, expect=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_weights_are_kept(prune, mixed, tmp_path):
    output = tmp_path / "p.pth"
    output.write_text("precious")
    assert "--force" in prune(mixed, output, "--epochs", 0, expect=2).stderr
    assert output.read_text() == "precious"


def test_weights_of_other_classes_are_refused(prune, mixed, tmp_path):
    five = tmp_path / "five.pth"
    save_weights(five, Weights(MobileNetV2(5, 0.1)), Namespace())
    output = tmp_path / "p.pth"
    assert "5 classes" in prune(mixed, output, weights=five, expect=2).stderr
    assert "--teacher" in prune(mixed, output, "--teacher", five, expect=2).stderr
    other = tmp_path / "other.pth"
    save_weights(
        other, Weights(MobileNetV2(3, 0.1), normalization=Normalization((0, 0, 0), (1, 1, 1))), Namespace()
    )
    assert "normalization" in prune(mixed, output, "--teacher", other, expect=2).stderr
    assert not output.exists()


def test_a_bare_state_dict_gets_names_and_normalization_from_the_images(prune, mixed, tiny_weights, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(open_weights(tiny_weights).model.state_dict(), bare)
    prune(mixed, tmp_path / "p.pth", "--epochs", 0, "--output_stride", 32, weights=bare)
    pruned = open_weights(tmp_path / "p.pth")
    assert pruned.class_names == TINY_CLASSES
    assert all(0.2 < mean < 0.6 for mean in pruned.normalization.mean)
    assert pruned.model.architecture["output_stride"] == 32


def test_distillation_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    images, labels = torch.randn(7, 3, 2, 2), torch.randint(5, (7,))
    logits = torch.randn(7, 5, requires_grad=True)
    weight, temperature = 0.7, 3.0
    loss = distillation(teacher, cross_entropy(), weight, temperature)(images, logits, labels)
    p = torch.softmax(teacher(images).double() / temperature, 1)
    q = torch.softmax(logits.double() / temperature, 1)
    distance = (p * (p / q).log()).sum(1).mean() * temperature**2
    own = -torch.log_softmax(logits.double(), 1)[torch.arange(7), labels].mean()
    assert loss.item() == pytest.approx((weight * distance + (1 - weight) * own).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = weight * temperature * (q - p) / 7
    expected += (1 - weight) * (torch.softmax(logits.double(), 1) - nn.functional.one_hot(labels, 5)) / 7
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())
    plain = distillation(teacher, cross_entropy(), 0.0, temperature)(images, logits, labels)
    assert plain.item() == pytest.approx(own.item(), rel=1e-6)


def test_one_sparsity_for_the_whole_model_is_pointed_to_its_script(run_script):
    argv = ("prune.py", "--weights", "a.pth", "--sparsity_dict", "b.csv", "--sparsity", 0.5)
    assert "scripts/allocate_sparsity.py --target" in run_script(*argv, expect=2).stderr
