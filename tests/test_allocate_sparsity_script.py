import csv
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from models import MobileNetV2, MobileNetV2Quantization
from models.statistics import model_statistics, prunable_layers
from utils.checkpoints.weights import Weights, save_weights
from utils.evaluation import Evaluation
from utils.open_weights import open_weights
from utils.pruning.scanning_log import ScanningLog
from utils.pruning.sensitivity import scan_plan
from utils.pruning.sparsity_dict import READ_ONLY_COLUMNS, describe_layers, read_sparsity_dict

SCRIPT = "scripts/allocate_sparsity.py"


@pytest.fixture
def allocate(run_script, tiny_weights):
    def run(output, *argv, target=0.4, weights=tiny_weights, expect=0):
        return run_script(
            SCRIPT, "--weights", weights, "--target", target, "--o", output, *argv, expect=expect
        )

    return run


def write_log(path: Path, model, levels=(0.1, 0.4, 0.7), rows: int | None = None) -> Path:
    """The log of a scan in which the last layers bear most."""
    statistics = model_statistics(model, 32)
    plan = scan_plan(model, levels)
    log = ScanningLog(path, plan, 50.0, "abc", describe_layers(statistics.layers))
    log.start()
    names = [layer.name for layer in statistics.layers]
    for name, level in plan[:rows]:
        log.append(Evaluation(50, 100, 1 + (1 - level) * (53 - names.index(name)), (50,), (100,)))
    return path


@pytest.fixture(scope="module")
def scanning_log(tiny_weights, tmp_path_factory) -> Path:
    return write_log(tmp_path_factory.mktemp("log") / "log.csv", open_weights(tiny_weights).model)


@pytest.mark.parametrize("method", ["uniform", "erk", "global", "lamp", "sensitivity", None])
def test_the_csv_meets_the_target(allocate, tiny_weights, scanning_log, tmp_path, method):
    output = tmp_path / "s.csv"
    argv = ("--method", method) if method else ()
    if method == "sensitivity":
        argv += ("--scanning_log", scanning_log)
    printed = allocate(output, *argv).stdout
    model = open_weights(tiny_weights).model
    statistics = model_statistics(model, 32)
    ratios = read_sparsity_dict(output, prunable_layers(model))
    gone = sum(round((1 - ratios[layer.name]) * layer.parameters) for layer in statistics.layers)
    nonzeros, total = statistics.nonzeros - gone, statistics.parameters
    assert abs(nonzeros / total - 0.4) <= 0.5 / total
    assert f"density 40.00 % ({nonzeros} of {total} parameters are not zero)" in printed
    assert f"53 layers by {method or 'lamp'}" in printed
    assert "sparsity is the fraction of weights KEPT" in printed
    for layer in statistics.layers:
        kept = layer.parameters - round((1 - ratios[layer.name]) * layer.parameters)
        # The floor that is on by default.
        assert kept >= layer.shape[0]
        assert re.search(rf"^{re.escape(layer.name)} +{kept} +{layer.parameters} ", printed, re.MULTILINE)
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    described = describe_layers(statistics.layers)
    for row in rows:
        assert [row[column] for column in READ_ONLY_COLUMNS] == list(map(str, described[row["layer"]]))


def test_prune_takes_the_csv_and_reaches_the_density(
    run_script, allocate, tiny_folder, tiny_weights, tmp_path
):
    output = tmp_path / "s.csv"
    printed = allocate(output, "--spare", "stem", "classifier", target=0.271).stdout
    done = run_script(
        *("prune.py", "--dataset", "folder", "--data_dir", tiny_folder, "--weights", tiny_weights),
        *("--epochs", 0, "--threads", 1, "--sparsity_dict", output, "--output", tmp_path / "p.pth"),
        *("--record", tmp_path / "p.json"),
    )
    line = re.search(r"^density 27\.10 % .*$", printed, re.MULTILINE)[0]
    assert line in done.stdout
    results = json.loads((tmp_path / "p.json").read_text())["results"]
    assert results["nonzeros"] == round(0.271 * results["parameters"])
    pruned = open_weights(tmp_path / "p.pth").model
    for name in ("features.0.0", "classifier.1"):
        assert torch.count_nonzero(pruned.get_submodule(name).weight == 0) == 0
    # Pruned once more, to less: what is zero stays out of the count.
    again = allocate(tmp_path / "again.csv", target=0.2, weights=tmp_path / "p.pth").stdout
    assert "density 20.00 %" in again


def test_limits_hold(allocate, tiny_weights, tmp_path):
    output = tmp_path / "s.csv"
    allocate(
        output, "--spare", "stem", "--keep_at_least", "depthwise=0.8", "features.4.conv.2=0.9",
        "--keep_at_most", "features.18.0=0.05", "--spare", "classifier",
    )  # fmt: skip
    model = open_weights(tiny_weights).model
    ratios = read_sparsity_dict(output, prunable_layers(model))
    assert ratios["features.0.0"] == ratios["classifier.1"] == 1.0
    assert ratios["features.4.conv.2"] >= 0.899
    assert ratios["features.18.0"] == 0.05
    depthwise = [name for name, layer in prunable_layers(model).items() if getattr(layer, "groups", 1) > 1]
    assert min(ratios[name] for name in depthwise) >= 0.79


def test_sensitivity_prunes_the_layers_that_bear_it(allocate, tiny_weights, scanning_log, tmp_path):
    output = tmp_path / "s.csv"
    allocate(output, "--method", "sensitivity", "--scanning_log", scanning_log, target=0.5)
    ratios = read_sparsity_dict(output, prunable_layers(open_weights(tiny_weights).model))
    assert ratios["features.0.0"] == 1.0
    assert ratios["features.18.0"] == pytest.approx(0.1, abs=1e-3)


def test_a_target_below_what_is_possible_names_the_smallest(allocate, scanning_log, tmp_path):
    output = tmp_path / "s.csv"
    error = allocate(output, target=0.01, expect=2).stderr
    smallest = re.search(r"the smallest density possible is (0\.\d+):", error)[1]
    assert not output.exists()
    allocate(output, target=smallest)
    spared = allocate(output, "--force", "--spare", "features.18.0", target=smallest, expect=2).stderr
    assert float(re.search(r"possible is (0\.\d+)", spared)[1]) > float(smallest) + 0.3
    # The scan did not go below 0.1, which is more than the floor of all.
    sensitivity = ("--method", "sensitivity", "--scanning_log", scanning_log)
    scanned = allocate(output, "--force", *sensitivity, target=smallest, expect=2).stderr
    assert float(re.search(r"possible is (0\.\d+)", scanned)[1]) > float(smallest) + 0.03
    capped = allocate(output, "--force", "--keep_at_most", "features.18.0=0.5", target=1, expect=2).stderr
    assert "the largest density possible is 0." in capped


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--target", 27.1), "--target"),
        (("--target", -0.1), "--target"),
        (("--target", "nan"), "--target"),
        (("--method", "random"), "--method"),
        (("--weights", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--spare", "depthwis"), "did you mean depthwise?"),
        (("--keep_at_least", "features.18.1=0.5"), "did you mean features.18.0?"),
        (("--keep_at_least", "stem"), "LAYER=FRACTION"),
        (("--keep_at_most", "stem=50"), "--keep_at_most"),
        (("--keep_at_most", "stem=0.5", "--spare", "stem"), "features.0.0 must keep at most"),
        (("--keep_per_channel", -1), "--keep_per_channel"),
        (("--method", "sensitivity"), "--scanning_log"),
        (("--scanning_log", "log.csv"), "--method sensitivity"),
        (("--method", "sensitivity", "--scanning_log", "nowhere.csv"), "nowhere.csv does not exist"),
        (("--o", "/proc/none/s.csv"), "cannot be written"),
    ],
)
def test_bad_arguments_are_refused(allocate, tmp_path, argv, says):
    assert says in allocate(tmp_path / "s.csv", *argv, expect=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_csv_that_is_there_is_kept(allocate, tmp_path):
    output = tmp_path / "s.csv"
    output.write_text("precious")
    assert "--force" in allocate(output, expect=2).stderr
    assert output.read_text() == "precious"
    allocate(output, "--force")
    assert output.read_text().startswith("layer,sparsity,")


def test_logs_that_do_not_serve(allocate, tiny_weights, tmp_path):
    weights = open_weights(tiny_weights)
    wider = MobileNetV2(num_classes=3, width_mult=0.25)
    logs = {
        "is the log of another model: features.7.conv.2 is 16x48x1x1": write_log(tmp_path / "w.csv", wider),
        "holds 150 of 159 rows": write_log(tmp_path / "u.csv", weights.model, rows=150),
        "holds 1 sparsities below 1": write_log(tmp_path / "o.csv", weights.model, levels=(0.5, 1.0)),
    }
    for says, path in logs.items():
        argv = ("--method", "sensitivity", "--scanning_log", path)
        assert says in allocate(tmp_path / "s.csv", *argv, expect=2).stderr, says
    assert not (tmp_path / "s.csv").exists()


def test_a_qmodel_is_refused(allocate, tiny_weights, tmp_path):
    weights = open_weights(tiny_weights)
    path = tmp_path / "qmodel.pth"
    qmodel = Weights(MobileNetV2Quantization.from_float(weights.model), "qmodel")
    save_weights(path, qmodel, Namespace())
    error = allocate(tmp_path / "s.csv", weights=path, expect=2).stderr
    assert "float weights (dense or pruned) is wanted" in error


def test_weights_at_a_large_width_are_shared_out_exactly(allocate, tmp_path):
    """The published size, 27.10 % of 2,236,682, of a model with layers of 409,600 weights."""
    model = MobileNetV2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 1e-3
    path, output = tmp_path / "w.pth", tmp_path / "s.csv"
    save_weights(path, Weights(model), Namespace())
    printed = allocate(output, target=0.271, weights=path).stdout
    assert "density 27.10 % (606141 of 2236682 parameters are not zero): 2.31 MB of 8.53 MB" in printed
