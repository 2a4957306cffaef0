import json

import pytest

from scripts.report import fill
from scripts.reporting.tables import BLOCKS, HEADLINE
from tests.conftest import REPOSITORY
from utils.common.errors import UserError

PUBLISHED_ROWS = [
    {"model": "float", "accuracy_pct": 80.07, "change_points": 0.0, "size_mb": 9.1, "density": 1.0,
     "latency_ms": 27},
    {"model": "pruned", "accuracy_pct": 73.61, "change_points": -6.46, "size_mb": 8.5, "density": 0.271,
     "latency_ms": None},
]  # fmt: skip


def write(folder, name, results, **arguments):
    """A record as `--record` writes it."""
    record = {
        "command": "python train.py",
        "arguments": {"seed": 0, "dataset": "folder", **arguments},
        "versions": {"torch": "2.9", "torchvision": "0.24"},
        "cpu": "A CPU",
        "threads": 1,
        "results": results,
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return record


def evaluated(folder, name, accuracy_pct, file_size_mb=8.76, density=1.0, macs=88_000_000, split="test"):
    found = {"split": split, "accuracy_pct": accuracy_pct, "macs": macs, "density": density}
    write(folder, f"evaluate/{name}", {**found, "file_size_mb": file_size_mb}, weights=f"w/{name}.pt")


def timed(folder, **median_ms):
    files = [
        {"file": f"./w/{name}.pt", "median_latency_ms": ms, "p90_latency_ms": 1.25 * ms}
        for name, ms in median_ms.items()
    ]
    write(folder, "latency", {"batch_size": 1, "files": files})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "published.json").write_text(json.dumps({"rows": PUBLISHED_ROWS}))
    return tmp_path


@pytest.fixture
def whole(folder):
    """Every kind of record that the table takes."""
    evaluated(folder, "published_float", 55.0, macs=7_000_000)
    evaluated(folder, "float_os16", 86.5, macs=27_000_000)
    evaluated(folder, "float", 92.0)
    for seed, accuracy in enumerate((91.5, 91.7, 91.9)):
        evaluated(folder, f"ptq_per_channel_s{seed}", accuracy, 2.5)
    evaluated(folder, "ptq_per_tensor_s0", 90.0, 2.25)
    evaluated(folder, "pruned_271", 91.0, density=0.271)
    evaluated(folder, "pruned_271_qat_s0", 90.75, 2.5, density=0.27)
    evaluated(folder, "pruned_271_qat_s10", 90.25, 2.5, density=0.28)
    evaluated(folder, "pruned_100", 89.0, density=0.1)
    evaluated(folder, "packed_pruned_100_int8", 88.5, 0.375, density=0.1)
    evaluated(folder, "packed_float16", 92.0, 4.25)
    timed(folder, float=4.0, ptq_per_channel_s0=1.0, pruned_271=4.04)
    return folder


def table(folder, block="results_table"):
    return BLOCKS[block](folder)


def lines_of(folder):
    """The lines by their first cell."""
    lines = [line for line in table(folder).splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].strip("| "): line for line in lines}


def test_each_row_has_all_its_numbers(whole):
    lines = lines_of(whole)
    assert lines["ours: float"] == "| ours: float | 92.00 | +0.00 | 88,000,000 | 8.76 | 1.000 | 4 | 5 |"
    assert lines["ours: PTQ per channel, n = 3"] == (
        "| ours: PTQ per channel, n = 3 | 91.70 ± 0.20 | -0.30 | 88,000,000 | 2.5 | 1.000 | 1 | 1.25 |"
    )
    assert lines["ours: PTQ per tensor, n = 1"].startswith("| ours: PTQ per tensor, n = 1 | 90.00 | -2.00 |")
    # The mean of both seeds, ten read as a number; the sample standard deviation of two is |a - b| / √2.
    sparse = "ours: 72.9 % sparse (density 27.1 %)"
    assert lines[f"{sparse}, QAT, n = 2"] == (
        f"| {sparse}, QAT, n = 2 | 90.50 ± 0.35 | -1.50 | 88,000,000 | 2.5 | 0.275 | – | – |"
    )
    assert lines[sparse].endswith("| 0.271 | 4.04 | 5.05 |")
    sparser = "ours: 90 % sparse (density 10 %)"
    assert lines[sparser].startswith(f"| {sparser} | 89.00 | -3.00 |")
    assert lines[f"{sparser}, packed int8"] == (
        f"| {sparser}, packed int8 | 88.50 | -3.50 | 88,000,000 | 0.375 | 0.100 | – | – |"
    )
    assert lines["ours: float at output stride 16"].startswith(
        "| ours: float at output stride 16 | 86.50 | -5.50 | 27,000,000 |"
    )
    assert lines["published: float"] == "| published: float | 80.07 | +0.00 | – | 9.1 | 1.000 | 27 | – |"
    # Its own difference, which its accuracies do not always give.
    assert lines["published: 72.9 % sparse (density 27.1 %)"] == (
        "| published: 72.9 % sparse (density 27.1 %) | 73.61 | -6.46 | – | 8.5 | 0.271 | – | – |"
    )


def test_the_order(whole):
    lines = table(whole).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:-2]] == [
        *("published: float", "published: 72.9 % sparse (density 27.1 %)"),
        *("ours: the published recipe, run here", "ours: float at output stride 16", "ours: float"),
        *("ours: PTQ per tensor, n = 1", "ours: PTQ per channel, n = 3"),
        *("ours: 72.9 % sparse (density 27.1 %)", "ours: 72.9 % sparse (density 27.1 %), QAT, n = 2"),
        *("ours: 90 % sparse (density 10 %)", "ours: packed float16"),
        "ours: 90 % sparse (density 10 %), packed int8",
    ]


def test_the_headline_is_eight_of_the_rows(whole):
    assert table(whole, "headline").splitlines()[:7] == [
        "| model | test accuracy % | points vs float | size MB | latency ms |",
        "| --- | --: | --: | --: | --: |",
        "| published: float | 80.07 | +0.00 | 9.1 | 27 |",
        "| published: 72.9 % sparse (density 27.1 %) | 73.61 | -6.46 | 8.5 | – |",
        "| ours: float | 92.00 | +0.00 | 8.76 | 4 |",
        "| ours: PTQ per channel, n = 3 | 91.70 ± 0.20 | -0.30 | 2.5 | 1 |",
        "| ours: 72.9 % sparse (density 27.1 %) | 91.00 | -1.00 | 8.76 | 4.04 |",
    ]
    shipped = table(REPOSITORY / "results", "headline").splitlines()
    assert len([line for line in shipped if line.startswith(("| published: ", "| ours: "))]) == 8
    # The last one is the smallest of all packed files.
    sizes = {
        path.stem: json.loads(path.read_text())["results"]["file_size_mb"]
        for path in (REPOSITORY / "results/evaluate").glob("packed_*.json")
    }
    assert min(sizes, key=sizes.get) == HEADLINE[-1]


def test_where_the_numbers_come_from(whole):
    last = table(whole).splitlines()[-1]
    assert last.count("A CPU, 1 thread, torch 2.9, torchvision 0.24") == 2
    assert "Our latencies are at batch size 1 on" in last
    assert last.endswith("from a JPEG copy (quality 75) of CIFAR-10, not from the official pixels.")
    for path in (whole / "evaluate").iterdir():
        path.write_text(path.read_text().replace('"folder"', '"cifar10"'))
    assert "JPEG" not in table(whole)


def test_without_the_float_model_there_are_no_points(folder):
    evaluated(folder, "float_os16", 86.57)
    assert lines_of(folder)["ours: float at output stride 16"].startswith(
        "| ours: float at output stride 16 | 86.57 | – |"
    )


def test_no_difference_has_no_minus(folder):
    evaluated(folder, "float", 92.0)
    evaluated(folder, "packed_float16", 91.999)
    assert lines_of(folder)["ours: packed float16"].startswith("| ours: packed float16 | 92.00 | +0.00 |")


def test_without_any_record_of_ours_the_command_is_named(folder):
    for block in ("results_table", "headline"):
        text = table(folder, block)
        assert "published: float" in text
        assert "ours" not in text
        assert text.endswith("\n\n*Not measured yet: `python scripts/reproduce.py` does it.*\n")


FAULTS = {
    "no_json": (lambda record: "{", r"evaluate/float\.json is not a valid record"),
    "binary": (lambda record: b"\xff\xfe\x00", r"evaluate/float\.json is not a valid record"),
    "no_object": (lambda record: "[]", "a record for results_table under .* is not valid"),
    "no_accuracy": (lambda record: record.replace("accuracy_pct", "accuracy"), "no 'accuracy_pct'"),
    "text": (lambda record: record.replace("8.76", '"8.76"'), "'8.76' is not a number"),
    "nan": (lambda record: record.replace("92.0", "NaN"), "nan is not a number"),
    "null": (lambda record: record.replace("92.0", "null"), "None is not a number"),
    "on_val": (lambda record: record.replace('"test"', '"val"'), r"evaluate/float\.json.*split val"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_record_is_named(whole, fault):
    spoil, says = FAULTS[fault]
    path = whole / "evaluate/float.json"
    spoiled = spoil(path.read_text())
    path.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    with pytest.raises(UserError, match=says):
        fill("<!-- begin results_table -->\n<!-- end results_table -->", whole)
