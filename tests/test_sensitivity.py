import copy
import csv
import json
import os
import signal
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.utils import prune

from models import MobileNetV2, MobileNetV2Quantization
from models.statistics import LAYER_KINDS, layer_kind, model_statistics, prunable_layers
from tests import script_process
from tests.test_distributed import free_port
from utils.checkpoints.weights import Weights, save_weights
from utils.common.errors import UserError
from utils.data.datasets import Normalization, Split
from utils.data.loader import Loader
from utils.evaluation import Evaluation, NotFiniteError, evaluate
from utils.open_weights import open_weights
from utils.pruning import sensitivity
from utils.pruning.scanning_log import COLUMNS, Measurement, ScanningLog, read_scan, recommend
from utils.pruning.sensitivity import evaluate_with_pruned_layer, measure, scan_plan
from utils.pruning.sparsity_dict import READ_ONLY_COLUMNS, describe_layers, read_sparsity_dict

SCAN = "scripts/sensitivity_scan.py"
CONVERT = "scripts/scanning_log_to_sparsity_dict_template.py"


@pytest.mark.parametrize(
    ("accuracies_pct", "threshold_pct", "expected"),
    [
        ([90.0, 90.0, 90.0], 80.0, 0.5),
        ([79.99, 80.0, 90.0], 80.0, 0.7),
        ([10.0, 20.0, 80.0], 80.0, 0.9),
        ([10.0, 20.0, 79.99], 80.0, 1.0),
        # The smallest that passes, also where a larger one does not.
        ([81.0, 70.0, 85.0], 80.0, 0.5),
        ([70.0, 81.0, 70.0], 80.0, 0.7),
    ],
)
def test_the_smallest_sparsity_at_or_above_the_threshold(accuracies_pct, threshold_pct, expected):
    levels = (0.5, 0.7, 0.9)
    rows = [
        Measurement(name, level, round(100 * accuracy_pct), 10_000, 1.0)
        for name in ("features.0.0", "classifier.1")
        for level, accuracy_pct in zip(levels, accuracies_pct, strict=True)
    ]
    # 1.0 stands in the last row, or in none before it.
    place = levels.index(expected) if expected < 1 else 2
    cells = [expected if i == place else None for i in range(3)]
    assert recommend(rows, threshold_pct, 0.9) == cells * 2
    assert recommend(rows[:-1], threshold_pct, 0.9) == [*cells, *cells[:2]]


def learned_model() -> tuple[MobileNetV2, Loader]:
    """A model whose weights hold ties and negative zeros, and images that it tells apart in part."""
    torch.manual_seed(0)
    model = MobileNetV2(num_classes=3, width_mult=0.1, output_stride=32)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    batches = Loader(Split(images, torch.randint(3, (64,))), Normalization((0.5,) * 3, (0.25,) * 3), 32)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            for batch, _ in batches:
                model(batch)
        model.classifier[1].weight.mul_(100)
        model.features[2].conv[0][0].weight[:, :3] = -0.0
    return model.eval(), batches


def bits(model) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in model.state_dict().items()}


def assert_as_plain(evaluation: Evaluation, plain: Evaluation) -> None:
    assert evaluation.correct_by_class == plain.correct_by_class
    assert evaluation.total_by_class == plain.total_by_class
    assert (evaluation.correct, evaluation.total) == (plain.correct, plain.total)
    assert round(evaluation.loss, 4) == round(plain.loss, 4)


def assert_scan_as_plain(model, batches, plan) -> None:
    for point, evaluation in zip(plan, measure(model, batches, plan), strict=True):
        assert_as_plain(evaluation, evaluate_with_pruned_layer(model, batches, *point))


def test_each_layer_alone_as_a_plain_loop_measures_it():
    model, batches = learned_model()
    before = bits(model)
    plan = [point for i, point in enumerate(scan_plan(model, [0.7, 0.3, 0.3])) if i % 7 == 0]
    losses = set()
    for (name, keep_ratio), evaluation in zip(plan, measure(model, batches, plan), strict=True):
        assert bits(model) == before
        pruned = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        prune.l1_unstructured(pruned.get_submodule(name), "weight", amount=1 - keep_ratio)
        prune.remove(pruned.get_submodule(name), "weight")
        pruned = pruned.to(memory_format=torch.channels_last)
        assert_as_plain(evaluation, evaluate(pruned, batches))
        assert evaluate_with_pruned_layer(model, batches, name, keep_ratio) == evaluate(pruned, batches)
        losses.add(evaluation.loss)
    assert len(losses) > len(plan) / 2
    assert bits(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("output_stride", [16, 8])
def test_each_block_and_output_stride_as_a_plain_loop_measures_it(output_stride):
    model, batches = learned_model()
    model.set_output_stride(output_stride)
    # Begins within a layer, as a scan does that goes on.
    plan = scan_plan(model, [0.2, 0.6])[3:]
    assert_scan_as_plain(model, batches, [point for i, point in enumerate(plan) if i % 18 < 3])


def test_a_model_prepared_for_quantization_is_scanned_alike():
    model, batches = learned_model()
    qmodel = MobileNetV2Quantization.from_float(model).to(memory_format=torch.channels_last)
    assert_scan_as_plain(qmodel, batches, scan_plan(qmodel, [0.4])[::8])


def images_that_run_again(monkeypatch) -> list[int]:
    """The number of images of each call of the model itself, in place of the folded network."""
    counts: list[int] = []
    own_logits, plain = sensitivity._PrunedLayer._own_logits, sensitivity.evaluate_with_pruned_layer

    def counting(layer, images):
        counts.append(len(images))
        return own_logits(layer, images)

    def counting_whole(model, batches, *point):
        counts.append(len(batches.split))
        return plain(model, batches, *point)

    monkeypatch.setattr(sensitivity._PrunedLayer, "_own_logits", counting)
    monkeypatch.setattr(sensitivity, "evaluate_with_pruned_layer", counting_whole)
    return counts


def test_answers_that_rounding_could_change_come_from_the_model_itself(monkeypatch):
    model, batches = learned_model()
    with torch.no_grad():
        # Two classes that are told apart by the last bits alone, if at all.
        model.classifier[1].weight[1] = model.classifier[1].weight[0] * (1 + 2**-23)
        model.classifier[1].bias[1] = model.classifier[1].bias[0]
        model.classifier[1].weight[2], model.classifier[1].bias[2] = 0.0, -100.0
    again = images_that_run_again(monkeypatch)
    plan = scan_plan(model, [0.5])[::6]
    evaluations = list(measure(model, batches, plan))
    assert sum(again) >= len(plan) * len(batches.split)
    for point, evaluation in zip(plan, evaluations, strict=True):
        assert_as_plain(evaluation, evaluate_with_pruned_layer(model, batches, *point))


def test_a_loss_that_could_be_rounded_otherwise_comes_from_the_model_itself(monkeypatch):
    model, batches = learned_model()
    plan = scan_plan(model, [0.5])[::10]
    monkeypatch.setattr(sensitivity, "LOSS_DECIMALS", 12)
    for point, evaluation in zip(plan, measure(model, batches, plan), strict=True):
        assert evaluation == evaluate_with_pruned_layer(model, batches, *point)


def test_a_scan_runs_on_the_folded_network_in_the_main(monkeypatch):
    model, batches = learned_model()
    again = images_that_run_again(monkeypatch)
    plan = scan_plan(model, [0.5])
    list(measure(model, batches, plan))
    probes = len(plan) * sensitivity.PROBES
    assert probes <= sum(again) < probes + 0.2 * len(plan) * len(batches.split)


def test_weights_that_are_nan_behind_a_layer_are_refused_as_without_shortcuts():
    model, batches = learned_model()
    with torch.no_grad():
        model.features[18][1].bias.fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        list(measure(model, batches, [("features.3.conv.2", 0.5)]))
    with pytest.raises(NotFiniteError):
        evaluate_with_pruned_layer(model, batches, "features.3.conv.2", 0.5)


@pytest.mark.parametrize(
    "other", [{"shuffle": True}, {"limit": 1}, {"drop_last": True}, {"augment": "flip"}, {"sharded": True}]
)
def test_batches_that_are_not_a_split_in_order_are_refused(other):
    model, batches = learned_model()
    with pytest.raises(ValueError, match="split"):
        next(measure(model, replace(batches, **other), scan_plan(model, [0.5])))


def test_weights_are_restored_after_an_error():
    model, batches = learned_model()
    before = bits(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.classifier.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_with_pruned_layer(model, batches, "features.0.0", 0.1)
    hook.remove()
    assert bits(model) == before


def test_the_plan_is_in_forward_order_from_the_smallest_up():
    model = MobileNetV2(width_mult=0.1)
    plan = scan_plan(model, [0.9, 0.5, 0.9, 0.7])
    assert plan[:4] == [
        ("features.0.0", 0.5),
        ("features.0.0", 0.7),
        ("features.0.0", 0.9),
        ("features.1.conv.0.0", 0.5),
    ]
    assert len(plan) == 53 * 3
    assert list(dict(plan)) == list(prunable_layers(model))


# Right answers of 100 at sparsity 0.5, 0.7, 0.9, and where and what the log marks at 80 %.
LAYERS = {
    "features.0.0": ([81, 70, 85], [0.5, "", ""]),
    "features.1.conv.0.0": ([70, 80, 90], ["", 0.7, ""]),
    "classifier.1": ([10, 20, 79], ["", "", 1.0]),
}


def make_log(path: Path, threshold_pct: float = 80.0, levels=(0.5, 0.7, 0.9), scan_id="abc") -> ScanningLog:
    plan = [(name, level) for name in LAYERS for level in levels]
    descriptions = dict.fromkeys(LAYERS, ("8x3x3x3", 216, 1000))
    return ScanningLog(path, plan, threshold_pct, scan_id, descriptions)


def results() -> list[Evaluation]:
    return [
        Evaluation(correct, 100, 1 / (correct + 3), (correct,), (100,))
        for corrects, _ in LAYERS.values()
        for correct in corrects
    ]


@pytest.fixture
def whole(tmp_path) -> Path:
    log = make_log(tmp_path / "whole.csv")
    log.start()
    for result in results():
        log.append(result)
    return log.path


def test_the_log_and_its_marks(whole):
    with open(whole, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    marks = [row["recommended_sparsity"] for row in rows]
    assert marks == [str(mark) for _, layer_marks in LAYERS.values() for mark in layer_marks]
    assert rows[1] == {
        "layer": "features.0.0",
        "sparsity": "0.7",
        "accuracy_pct": "70.0",
        "correct": "70",
        "total": "100",
        "loss": str(round(1 / 73, 4)),
        "recommended_sparsity": "",
        "shape": "8x3x3x3",
        "parameters": "216",
        "macs": "1000",
        "scan_id": "abc",
    }


def test_a_log_cut_at_any_byte_is_gone_on_with_to_the_same_end(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    content = whole.read_bytes()
    header = content.index(b"\n") + 1
    path = tmp_path / "cut.csv"
    for cut in range(header, len(content) + 1):
        path.write_bytes(content[:cut])
        log = make_log(path)
        log.load()
        assert len(log.rows) == content[:cut].count(b"\n") - 1
        log.start()
        for result in results()[len(log.rows) :]:
            log.append(result)
        assert path.read_bytes() == content, cut


def test_each_row_is_on_disk_as_soon_as_it_is_measured(tmp_path):
    log = make_log(tmp_path / "log.csv")
    log.start()
    for count, result in enumerate(results(), 1):
        log.append(result)
        assert log.path.read_text().count("\n") == 1 + count
        assert log.path.read_text().endswith("\n")


def test_another_threshold_moves_the_marks_of_rows_that_are_there(whole):
    log = make_log(whole, threshold_pct=75.0)
    log.load()
    log.start()
    assert log.recommended() == {"features.0.0": 0.5, "features.1.conv.0.0": 0.7, "classifier.1": 0.9}
    with open(whole, newline="") as file:
        marked = [
            (row["layer"], row["sparsity"]) for row in csv.DictReader(file) if row["recommended_sparsity"]
        ]
    assert marked == [("features.0.0", "0.5"), ("features.1.conv.0.0", "0.7"), ("classifier.1", "0.9")]


def test_edited_recommendations_are_kept_when_the_scan_is_run_again(whole):
    lines = whole.read_text().splitlines(True)
    with open(whole, newline="") as file:
        rows = list(csv.DictReader(file))
    marked = next(i for i, row in enumerate(rows) if row["recommended_sparsity"])
    row = rows[marked]
    cells = lines[marked + 1].split(",")
    cells[list(row).index("recommended_sparsity")] = "0.62"
    lines[marked + 1] = ",".join(cells)
    whole.write_text("".join(lines))
    log = make_log(whole)
    log.load()
    assert log.recommended()[row["layer"]] == 0.62
    log.start()
    assert whole.read_text() == "".join(lines)


def with_marks(path: Path, marks) -> None:
    """Write other recommendations into a log."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row, mark in zip(rows, marks, strict=True):
            writer.writerow(row | {"recommended_sparsity": mark})


def test_layers_whose_recommendations_were_cleared_get_new_ones(whole):
    with_marks(whole, ["", 0.62, "", "", "", "", "", "", 1])
    log = make_log(whole)
    assert log.load()
    assert log.recommended() == {"features.0.0": 0.62, "features.1.conv.0.0": 0.7, "classifier.1": 1.0}
    with_marks(whole, [""] * 9)
    assert not log.load()
    assert log.recommended() == {"features.0.0": 0.5, "features.1.conv.0.0": 0.7, "classifier.1": 1.0}


def test_a_recommendation_that_is_no_number_ends_in_one_line(whole):
    with_marks(whole, ["much", *[""] * 8])
    with pytest.raises(UserError, match="line 2, column recommended_sparsity: 'much'"):
        make_log(whole).load()


@pytest.mark.parametrize(
    ("other", "says"),
    [({"scan_id": "abd"}, "other weights or images"), ({"levels": (0.3, 0.7, 0.9)}, "other sparsities")],
)
def test_a_log_of_another_scan_is_left_alone(whole, other, says):
    content = whole.read_bytes()
    with pytest.raises(UserError, match=says):
        make_log(whole, **other).load()
    assert whole.read_bytes() == content


def test_a_log_whose_column_is_named_keep_ratio(whole):
    content = whole.read_text()
    whole.write_text(content.replace(",sparsity,", ",keep_ratio,", 1))
    log = make_log(whole)
    log.load()
    assert [(row.layer, row.keep_ratio) for row in log.rows] == log.plan
    log.start()
    assert whole.read_text() == content

    whole.write_text(content.replace(",sparsity,", ",sparsity,keep_ratio,", 1))
    with pytest.raises(UserError, match=r"two columns sparsity and keep_ratio: remove one\).*--force"):
        make_log(whole).load()


@pytest.mark.parametrize("content", ["", "\n\n", "precious", "layer,sparsity\nclassifier.1,1.0\n", "\0\n"])
def test_what_is_no_log_is_left_alone(tmp_path, content):
    path = tmp_path / "log.csv"
    path.write_text(content)
    with pytest.raises(UserError, match="--force"):
        make_log(path).load()
    assert path.read_text() == content


def test_a_full_disk_ends_in_one_line(tmp_path):
    log = make_log(tmp_path / "log.csv")
    log.start()
    log.append(results()[0])
    log.path = Path("/dev/full")
    with pytest.raises(UserError, match="resume after 1 rows"):
        log.append(results()[1])


def test_layers_are_told_apart_by_their_shapes():
    counts = dict.fromkeys(LAYER_KINDS, 0)
    for name, layer in prunable_layers(MobileNetV2()).items():
        counts[layer_kind(name, tuple(layer.weight.shape))] += 1
    assert list(counts.values()) == [17, 17, 17, 2]


# From here on as a user runs it.


@pytest.fixture(scope="module")
def scan(run_script, tiny_folder, tiny_weights):
    def run(output, *argv, weights=tiny_weights, expect=0):
        data = ("--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1)
        files = ("--weights", weights, "--o", output)
        return run_script(SCAN, *data, *files, *argv, expect=expect)

    return run


FAST = ("--accuracy_threshold", 30, "--split", "val", "--sparsities", 0.3, 0.6)


@pytest.fixture(scope="module")
def scanned(scan, tmp_path_factory):
    """The log of a whole scan, what was printed and what was recorded."""
    folder = tmp_path_factory.mktemp("scan")
    printed = scan(folder / "log.csv", *FAST, "--record", folder / "r.json").stdout
    return folder / "log.csv", printed, json.loads((folder / "r.json").read_text())["results"]


def test_the_scan_from_the_shell(scanned, tiny_weights):
    path, printed, record = scanned
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    weights = open_weights(tiny_weights)
    assert [(row["layer"], float(row["sparsity"])) for row in rows] == scan_plan(weights.model, [0.3, 0.6])
    for row in rows:
        assert row["total"] == "18"
        assert float(row["accuracy_pct"]) == pytest.approx(100 * int(row["correct"]) / 18, abs=1e-6)
    assert len({row["loss"] for row in rows}) > 3
    marks = {row["layer"]: float(row["recommended_sparsity"]) for row in rows if row["recommended_sparsity"]}
    assert marks == record["recommended_sparsity"]
    assert list(marks) == list(prunable_layers(weights.model))
    assert f"unpruned: val accuracy {record['dense_accuracy_pct']:.2f} %" in printed
    statistics = model_statistics(weights.model, 32)
    described = describe_layers(statistics.layers)
    assert [rows[0][column] for column in READ_ONLY_COLUMNS] == list(map(str, described["features.0.0"]))
    gone = sum(round((1 - marks[layer.name]) * layer.parameters) for layer in statistics.layers)
    assert record["density"] == pytest.approx(1 - gone / statistics.parameters, abs=1e-12)
    assert f"density {100 * record['density']:.2f} %" in printed
    assert printed.count(" left\n") == 53


def test_the_plot_is_a_picture_with_curves(scanned):
    with Image.open(scanned[0].with_suffix(".png")) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_an_interrupted_scan_ends_with_the_same_log(scan, scanned, tiny_folder, tiny_weights, tmp_path):
    output = tmp_path / "log.csv"
    argv = [SCAN, "--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1]
    argv += ["--weights", tiny_weights, "--o", output, *FAST]
    process = script_process.run_until(
        list(map(str, argv)),
        lambda: output.is_file() and len(output.read_text().splitlines()) > 8,
        signal.SIGINT,
    )
    printed = process.stderr.read()
    assert process.returncode == 130, printed
    assert "106 rows" in printed
    measured = output.read_text().splitlines()
    assert 8 < len(measured) < 107
    output.write_text("\n".join(measured)[:-3])  # as a kill within a line leaves it
    printed = scan(output, *FAST).stdout
    assert f"resuming after {len(measured) - 2} of 106 rows" in printed
    assert output.read_bytes() == scanned[0].read_bytes()
    assert output.with_suffix(".png").read_bytes() == scanned[0].with_suffix(".png").read_bytes()


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells the first or second of two processes."""
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def scan_on_two_ranks(argv) -> list:
    argv, port = [SCAN, *map(str, argv)], free_port()
    script_process.start_server()
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda rank: script_process.run(argv, env=rank_environment(rank, port)), (0, 1)))


def test_two_processes_write_the_log_of_one(scanned, tiny_folder, tiny_weights, tmp_path):
    output = tmp_path / "log.csv"
    argv = ("--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1)
    argv += ("--weights", tiny_weights, "--o", output, *FAST)
    first, second = scan_on_two_ranks(argv)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "recommended: prune" in first.stdout
    assert second.stdout == ""
    assert output.read_bytes() == scanned[0].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "log.png"]

    output.write_text("".join(output.read_text().splitlines(True)[:60]))
    first, second = scan_on_two_ranks(argv)
    assert "resuming after 59 of 106 rows" in first.stdout, first.stderr + second.stderr
    assert output.read_bytes() == scanned[0].read_bytes()


def test_a_process_that_dies_leaves_a_whole_log(scanned, tiny_folder, tiny_weights, tmp_path, monkeypatch):
    output, port = tmp_path / "log.csv", free_port()
    argv = [SCAN, "--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1]
    argv = list(map(str, [*argv, "--weights", tiny_weights, "--o", output, *FAST]))
    script_process.start_server()
    with ThreadPoolExecutor() as pool:
        main = pool.submit(script_process.run, argv, env=rank_environment(0, port))
        for name, value in rank_environment(1, port).items():
            monkeypatch.setenv(name, value)
        script_process.run_until(
            argv, lambda: output.is_file() and output.read_text().count("\n") > 20, signal.SIGKILL
        )
        ended = main.result()
    assert ended.returncode == 2, ended.stderr
    assert "another process of this run has ended" in ended.stderr
    rows = output.read_text()
    assert rows.endswith("\n")
    assert 20 < rows.count("\n") < 107
    assert scanned[0].read_text().startswith(rows)


def test_a_log_of_other_weights_is_refused_without_force(scan, scanned, tiny_weights, tmp_path):
    output = tmp_path / "log.csv"
    content = scanned[0].read_bytes()
    output.write_bytes(content)
    weights = open_weights(tiny_weights)
    with torch.no_grad():
        weights.model.features[0][0].weight[0, 0, 0, 0] += 1e-3
    other = tmp_path / "other.pth"
    save_weights(other, weights, Namespace())
    assert "other weights or images" in scan(output, *FAST, weights=other, expect=2).stderr
    assert "other weights or images" in scan(output, *FAST, "--split", "test", expect=2).stderr
    assert "other sparsities" in scan(output, *FAST, "--sparsities", 0.5, expect=2).stderr
    assert output.read_bytes() == content
    assert not output.with_suffix(".png").exists()
    scan(output, *FAST, "--sparsities", 0.5, "--force")
    assert len(output.read_text().splitlines()) == 54


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--accuracy_threshold", 0.8), "in percent"),
        (("--accuracy_threshold", 101), "in percent"),
        (("--sparsities", 0.5, 1.5), "--sparsities"),
        (("--sparsities", "nan"), "--sparsities"),
        (("--sparsities",), "--sparsities"),
        (("--split", "train"), "--split"),
        (("--batch_size", 0), "--batch_size"),
        (("--val_size", 0), "val split holds no images"),
        (("--weights", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--plot", "/proc/none/p.png"), "cannot be written"),
        (("--plot", "SAME"), "--plot and --o both name the file"),
    ],
)
def test_bad_arguments_are_refused(scan, tmp_path, argv, says):
    output = tmp_path / "log.csv"
    argv = [output if arg == "SAME" else arg for arg in argv]
    assert says in scan(output, *FAST, *argv, expect=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_is_there_is_kept(scan, tmp_path):
    (tmp_path / "log.png").write_text("precious")
    assert "--force" in scan(tmp_path / "log.csv", *FAST, expect=2).stderr
    assert (tmp_path / "log.png").read_text() == "precious"


def test_the_threshold_must_be_given(run_script, tiny_weights):
    assert "--accuracy_threshold" in run_script(SCAN, "--weights", tiny_weights, expect=2).stderr


def test_the_log_becomes_a_sparsity_dict_that_prune_takes(
    run_script, scanned, tiny_folder, tiny_weights, tmp_path
):
    path, _, record = scanned
    output = tmp_path / "s.csv"
    printed = run_script(CONVERT, "--f", path, "--o", output).stdout
    assert "sparsity is the fraction of weights KEPT" in printed
    layers = prunable_layers(open_weights(tiny_weights).model)
    assert read_sparsity_dict(output, layers) == record["recommended_sparsity"]
    template = tmp_path / "t.csv"
    run_script("scripts/generate_sparsity_dict_template.py", "--weights", tiny_weights, "--o", template)
    with open(output, newline="") as one, open(template, newline="") as other:
        for row, expected in zip(csv.DictReader(one), csv.DictReader(other), strict=True):
            assert {**row, "sparsity": "1.0"} == expected
    run_script(
        "prune.py", "--dataset", "folder", "--data_dir", tiny_folder, "--weights", tiny_weights,
        "--epochs", 0, "--sparsity_dict", output,
        "--output", tmp_path / "p.pth", "--record", tmp_path / "p.json",
    )  # fmt: skip
    pruned = json.loads((tmp_path / "p.json").read_text())["results"]
    zeros_elsewhere = sum(int((p == 0).sum()) for p in open_weights(tiny_weights).model.parameters())
    expected = record["density"] - zeros_elsewhere / pruned["parameters"]
    assert pruned["density"] == pytest.approx(expected, abs=1e-12)
    assert "--force" in run_script(CONVERT, "--f", path, "--o", output, expect=2).stderr


LOG_FAULTS = {
    "empty": (lambda text: "", "is empty"),
    "unfinished": (lambda text: "".join(text.splitlines(True)[:-5]), "holds 101 of 106 rows"),
    "torn": (lambda text: text[:-30], "line 107 has"),
    "a_sparsity_dict": (lambda text: "layer,sparsity\nclassifier.1,1.0\n", "no column accuracy_pct"),
    "unknown_layer": (
        lambda text: text.replace("features.0.0,", "features.0.1,", 1),
        "did you mean features.0.0?",
    ),
    "row_twice": (lambda text: text + text.splitlines()[-1] + "\n", "already has a row"),
    "not_a_count": (lambda text: text.replace(",18,", ",many,", 1), "line 2, column total"),
}


@pytest.mark.parametrize("fault", LOG_FAULTS)
def test_each_fault_of_the_log_ends_in_one_line(run_script, scanned, tmp_path, fault):
    spoil, says = LOG_FAULTS[fault]
    path = tmp_path / "log.csv"
    path.write_text(spoil(scanned[0].read_text()))
    error = run_script(CONVERT, "--f", path, "--o", tmp_path / "s.csv", expect=2).stderr
    assert says in error
    assert str(path) in error
    assert not (tmp_path / "s.csv").exists()


def test_marks_that_a_person_removed_or_doubled(scanned, tmp_path):
    def write(marks) -> Path:
        path = tmp_path / "log.csv"
        path.write_bytes(scanned[0].read_bytes())
        with_marks(path, marks)
        return path

    with pytest.raises(UserError, match=r"no recommended_sparsity for layer features\.0\.0"):
        read_scan(write([""] * 106))
    with pytest.raises(UserError, match="already has one"):
        read_scan(write([0.5] * 106))
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        read_scan(write([30, ""] * 53))
    by_hand = read_scan(write(["", "0.123456789"] * 53))[1]
    assert set(by_hand.values()) == {0.123456789}


def test_recommendations_are_the_same_under_either_name(scanned, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(scanned[0].read_text().replace(",sparsity,", ",keep_ratio,", 1))
    assert read_scan(path) == read_scan(scanned[0])


def test_a_bare_state_dict_can_be_scanned(scan, tiny_weights, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(open_weights(tiny_weights).model.state_dict(), bare)
    printed = scan(tmp_path / "log.csv", *FAST, "--sparsities", 1, "--output_stride", 32, weights=bare).stdout
    assert "recommended: prune 0 of 53 layers, density 100.00 %" in printed


def test_weights_of_other_classes_are_refused(scan, tmp_path):
    five = tmp_path / "five.pth"
    save_weights(five, Weights(MobileNetV2(5, 0.1)), Namespace())
    assert "5 classes" in scan(tmp_path / "log.csv", *FAST, weights=five, expect=2).stderr
    assert not (tmp_path / "log.csv").exists()
