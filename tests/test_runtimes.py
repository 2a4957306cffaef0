import json
import re

import pytest

from models.statistics import count_macs
from tests.conftest import REPOSITORY
from utils.open_weights import open_weights

SCRIPT = "benchmarks/runtimes.py"


def test_outputs_are_compared_and_the_ratio_comes_last(run_script, tiny_weights, tiny_folder, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed (requirements-dev.txt)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements-dev.txt)")
    record = tmp_path / "record.json"
    images = ("--dataset", "folder", "--data_dir", tiny_folder)
    done = run_script(
        *(SCRIPT, "--quick", "--weights", tiny_weights, "--output_stride", 8, *images),
        *("--record", record, "--threads", 1),
    )
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"ratio \d+\.\d\d \(int8 inference, ms at batch size .* our TorchScript against .*\)", last
    )
    results = json.loads(record.read_text())["results"]
    model = open_weights(tiny_weights, output_stride=8).model
    assert results["macs"] == sum(count_macs(model, 32).values())
    rows = results["rows"]
    assert {(row["threads"], row["batch_size"]) for row in rows} == {(1, 1), (1, 32)}
    for row in rows:
        if "float" in row["model"]:
            assert row["largest_error"] < 1e-4
            assert row["same_class_pct"] == 100
            assert not row["counts"]
    ours, carried = (
        next(row for row in rows if row["model"].startswith(name))
        for name in ("TorchScript int8", "ONNX Runtime int8, our weights")
    )
    assert ours["times_ours"] == 1
    assert carried["rms_error"] == pytest.approx(ours["rms_error"], rel=0.02)
    assert carried["counts"]


def test_without_any_other_runtime_there_is_one_line(run_script, tmp_path):
    path = tmp_path / "wrapped.py"
    path.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "sys.modules['onnxruntime'] = sys.modules['openvino'] = None\n"
        f"runpy.run_path({str(REPOSITORY / SCRIPT)!r}, run_name='__main__')\n"
    )
    done = run_script(path, "--quick", expect=2)
    assert "pip install -r requirements-benchmarks.txt" in done.stderr
