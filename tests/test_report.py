import csv
import json

import pytest
import torch
from PIL import Image

from benchmarks import runtimes
from scripts.report import fill
from scripts.reporting.tables import BLOCKS
from tests.conftest import REPOSITORY
from tests.test_results_table import evaluated, write
from utils.common.errors import UserError

PAGE = """# x
<!-- begin scan_benchmark -->
old
<!-- end scan_benchmark -->
kept
<!-- begin runtimes_benchmark 8 -->
<!-- end runtimes_benchmark -->
"""
SCAN = {"rows": 50, "images": 2000, "seconds": {"plain loop": 100.0, "ours": 25.0}, "ratio": 4.0}


def lines_of(folder, block):
    return BLOCKS[block](folder).splitlines()


def test_blocks_are_made_of_the_results_alone(tmp_path):
    write(tmp_path, "benchmarks/sensitivity_scan", SCAN)
    filled = fill(PAGE, tmp_path)
    assert "old" not in filled
    assert "kept" in filled
    assert "| ours | 25.0 | 500 |" in filled
    assert "--output_stride 8 --record results/benchmarks/runtimes_os8.json` does it" in filled
    assert fill(filled, tmp_path) == filled
    with pytest.raises(UserError, match="'scam_benchmark' is unknown"):
        fill(PAGE.replace("scan_", "scam_"), tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seconds": {"ours": float("nan")}}, "nan is not a number"),
        ({"seconds": {"ours": "25"}}, "unsupported operand"),
        ({"seconds": {"ours": None}}, "unsupported operand"),
        ({"ratio": None}, "unsupported format string"),
        ({"rows": 0}, "float division by zero"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, change, says):
    write(tmp_path, "benchmarks/sensitivity_scan", {**SCAN, **change})
    with pytest.raises(UserError, match=rf"record for scan_benchmark under .* is not valid: {says}"):
        fill(PAGE, tmp_path)


def test_a_record_without_a_value_is_named(tmp_path):
    write(tmp_path, "benchmarks/sensitivity_scan", {name: SCAN[name] for name in ("images", "rows", "ratio")})
    with pytest.raises(UserError, match=r"scan_benchmark.*no 'seconds'"):
        fill(PAGE, tmp_path)


# Blocks of one benchmark each


def test_allocations_by_method_and_density(tmp_path):
    for name, accuracy in {
        "uniform_271": 90.104, "lamp_271": 90.096, "erk_271": 89.9, "lamp_100": 85.0, "uniform_100": 86.5,
    }.items():  # fmt: skip
        write(tmp_path, f"allocation/{name}", {"val_accuracy_pct": accuracy}, epochs=3)
    lines = lines_of(tmp_path, "allocation_table")
    assert lines == [
        "| val accuracy % at density | 27.1 % | 10 % |",
        "| --- | --: | --: |",
        # Both are the best at two digits.
        "| uniform | **90.10** | **86.50** |",
        "| erk | 89.90 | – |",
        "| global | – | – |",
        "| lamp | **90.10** | 85.00 |",
        "| sensitivity | – | – |",
        "",
        "After the same recovery of 3 epochs; the best of each column in bold.",
    ]
    write(tmp_path, "allocation/erk_100", {"val_accuracy_pct": 90.0}, epochs=1)
    with pytest.raises(ValueError, match="too many values"):
        lines_of(tmp_path, "allocation_table")
    for name in ("uniform_271", "lamp_271", "erk_271", "lamp_100", "uniform_100"):
        write(tmp_path, f"allocation/{name}", {"val_accuracy_pct": 90.0}, epochs=1)
    assert "recovery of 1 epoch;" in lines_of(tmp_path, "allocation_table")[-1]
    write(tmp_path, "allocation/erk_100", {"val_accuracy_pct": None}, epochs=1)
    with pytest.raises(ValueError, match="None is not a number"):
        lines_of(tmp_path, "allocation_table")


def test_training_throughput(tmp_path):
    case = {"output_stride": 16, "batch_size": 32, "usual_images_per_s": 250.4, "ours_images_per_s": 800.6}
    write(tmp_path, "benchmarks/training", {"cases": [{**case, "ours_ratio": 3.21}]}, rounds=7)
    lines = lines_of(tmp_path, "training_benchmark")
    assert lines[2] == "| 16 | 32 | 250 | 801 | 3.21× | – | – |"
    assert lines[-1] == "Medians of 7 rounds on A CPU, 1 thread, torch 2.9, torchvision 0.24."


def test_training_throughput_in_bfloat16(tmp_path):
    case = {
        "output_stride": 16,
        "batch_size": 32,
        "usual_images_per_s": 250.4,
        "ours_images_per_s": 800.6,
        "ours_ratio": 3.21,
        "ours_amp_images_per_s": 1500.2,
        "ours_amp_ratio": 5.99,
    }
    write(tmp_path, "benchmarks/training", {"cases": [case]}, rounds=7)
    lines = lines_of(tmp_path, "training_benchmark")
    assert lines[2] == "| 16 | 32 | 250 | 801 | 3.21× | 1500 | 5.99× |"


def test_training_with_and_without_kernels(tmp_path):
    case = {"output_stride": 8, "batch_size": 32, "without_kernels_images_per_s": 100.4}
    case |= {"ours_images_per_s": 250.0, "ours_ratio": 2.5, "kernels_ratio": 2.5}
    amp = {"without_kernels_amp_images_per_s": 200.0, "ours_amp_images_per_s": 600.0, "kernels_ratio": 3.01}
    write(tmp_path, "benchmarks/training_ablation", {"cases": [case, case | amp]}, rounds=3)
    lines = lines_of(tmp_path, "training_ablation")
    assert lines[2] == "| 8 | 32 | 100 | – | 250 | – | 2.50× |"
    assert lines[3] == "| 8 | 32 | 100 | 200 | 250 | 600 | 3.01× |"
    assert (
        lines[-1] == "Images per second, medians of 3 rounds on A CPU, 1 thread, torch 2.9, torchvision 0.24."
    )


def test_scan_times(tmp_path):
    write(tmp_path, "benchmarks/sensitivity_scan", SCAN)
    lines = lines_of(tmp_path, "scan_benchmark")
    assert lines[2:4] == ["| plain loop | 100.0 | 2000 |", "| ours | 25.0 | 500 |"]
    assert lines[-1].startswith("4.00 times as fast for 50 rows over 2000 images")


def runtime_row(model, batch_size, median_ms, times_ours, counts=False):
    return {
        "threads": 1, "batch_size": batch_size, "model": model, "median_latency_ms": median_ms,
        "times_ours": times_ours, "counts": counts,
    }  # fmt: skip


def test_runtimes_are_compared_with_the_best_that_counts(tmp_path):
    rows = [
        runtime_row(f"{runtimes.FLOAT}, frozen", 1, 2.0, 4.0),
        runtime_row(f"{runtimes.OURS}, x86", 1, 0.5, 1.0),
        runtime_row("A int8, its own", 1, 0.75, 1.6, counts=True),
        runtime_row("B int8, our weights", 1, 0.6, 1.25, counts=True),
        runtime_row("B int8, its own", 1, 0.1, 0.2),
        runtime_row(runtimes.FLOAT, 32, 40.0, 4.0),
        runtime_row(runtimes.OURS, 32, 10.0, 1.0),
    ]
    write(tmp_path, "benchmarks/runtimes_os8", {"rows": rows}, rounds=60, output_stride=8)
    lines = lines_of(tmp_path, "runtimes_benchmark 8")
    assert lines[2:4] == [
        "| 1 | 1 | 0.50 | 0.60 | B int8, our weights | 0.80 | 2.00 |",
        "| 1 | 32 | 10.00 | – | – | – | 40.00 |",
    ]
    write(tmp_path, "benchmarks/runtimes_os8", {"rows": rows[2:3]}, rounds=60, output_stride=8)
    with pytest.raises(KeyError, match="TorchScript int8"):
        lines_of(tmp_path, "runtimes_benchmark 8")


@pytest.mark.parametrize(
    ("block", "command"),
    [
        ("allocation_table", "scripts/reproduce.py"),
        ("training_benchmark", "benchmarks/training.py --record results/benchmarks/training.json"),
        (
            "scan_benchmark",
            "benchmarks/sensitivity_scan.py --record results/benchmarks/sensitivity_scan.json",
        ),
        (
            "runtimes_benchmark 8",
            "benchmarks/runtimes.py --output_stride 8 --record results/benchmarks/runtimes_os8.json",
        ),
    ],
)
def test_a_block_without_records_names_the_command(tmp_path, block, command):
    text = f"<!-- begin {block} -->\n<!-- end {block.split()[0]} -->"
    assert f"-->\n*Not measured yet: `python {command}` does it.*\n<!--" in fill(text, tmp_path)


# The script


def run_report(run_script, folder, expect=0):
    argv = ("--results_dir", folder, "--pages", folder / "README.md", folder / "more.md")
    return run_script("scripts/report.py", *argv, expect=expect)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_second_run_changes_nothing(run_script, tmp_path):
    pages = {"README.md": "headline", "more.md": "results_table"}
    for name, block in pages.items():
        (tmp_path / name).write_text(f"<!-- begin {block} -->\n<!-- end {block} -->\n")
    evaluated(tmp_path, "float", 92.0)
    evaluated(tmp_path, "packed_int8", 100.0, 0.5)
    picture = tmp_path / "accuracy_against_size.png"
    printed = run_report(run_script, tmp_path).stdout.splitlines()
    assert printed == [f"wrote {path}" for path in (picture, *(tmp_path / name for name in pages))]
    with Image.open(picture) as image:
        assert min(image.size) > 300
        assert not {"Software", "Creation Time"} & image.info.keys()
    before = content(tmp_path)
    assert b"| ours: float | 92.00 | +0.00 |" in before[tmp_path / "README.md"]
    assert b"| ours: packed int8 | 100.00 | +8.00 |" in before[tmp_path / "more.md"]
    assert run_report(run_script, tmp_path).stdout.count(" is up to date\n") == 2
    assert content(tmp_path) == before
    evaluated(tmp_path, "packed_int8", 91.0, 0.5)
    run_report(run_script, tmp_path)
    assert {path for path, found in content(tmp_path).items() if found != before[path]} == {
        tmp_path / "more.md", picture, tmp_path / "evaluate/packed_int8.json",
    }  # fmt: skip


def test_without_records_nothing_is_drawn(run_script, tmp_path):
    for name in ("README.md", "more.md"):
        (tmp_path / name).write_text("nothing")
    write(tmp_path, "float", {"test_accuracy_pct": 92.0})
    run_report(run_script, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_bad_input_ends_in_one_line(run_script, tmp_path):
    for name in ("README.md", "more.md"):
        (tmp_path / name).write_text("nothing")
    (tmp_path / "published.json").write_text("{")
    assert "published.json" in run_report(run_script, tmp_path, expect=2).stderr
    # --readme is the older name of --pages.
    argv = ("--results_dir", tmp_path / "none", "--readme", tmp_path / "README.md")
    assert "--results_dir" in run_script("scripts/report.py", *argv, expect=2).stderr
    assert (tmp_path / "README.md").read_text() == "nothing"


def test_the_pages_of_the_repository_are_up_to_date():
    results = REPOSITORY / "results"
    for path in [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.glob("benchmarks/*.md"),
    ]:
        assert fill(path.read_text(), results) == path.read_text(), path


@pytest.mark.parametrize("script", ["train.py", "prune.py", "quantization_aware_training.py"])
def test_what_is_recorded_is_the_epoch_table(run_script, request, tiny_folder, tmp_path, script):
    output, record, template = tmp_path / "out.pth", tmp_path / "record.json", tmp_path / "template.csv"
    argv = ["--width_mult", 0.1, "--output_stride", 32]
    if script == "prune.py":
        weights = request.getfixturevalue("tiny_weights")
        run_script("scripts/generate_sparsity_dict_template.py", "--weights", weights, "--o", template)
        argv = ["--weights", weights, "--sparsity_dict", template]
    elif script == "quantization_aware_training.py":
        argv = ["--weights", request.getfixturevalue("tiny_qmodel"), "--latency_rounds", 3]
    run_script(
        *(script, *argv, "--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1, "--epochs", 2),
        *("--batch_size", 27, "--output", output, "--record", record),
    )
    recorded = json.loads(record.read_text())["results"]["history"]
    with open(tmp_path / "out.history.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in recorded] == [1, 2]
    for row, printed in zip(recorded, table, strict=True):
        assert list(row) == list(printed)
        assert list(row.values()) == pytest.approx([float(cell) for cell in printed.values()], abs=1e-6)
    if script != "quantization_aware_training.py":
        assert "history" not in torch.load(output, weights_only=True)["metrics"]
