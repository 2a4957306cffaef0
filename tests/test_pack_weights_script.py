import json
import re

import pytest
import torch

from tests.conftest import TINY_CLASSES
from utils.common.files import BYTES_PER_MB
from utils.open_weights import open_weights
from utils.packing.format import PackedFile

SCRIPT = "scripts/pack_weights.py"


@pytest.fixture(scope="module")
def packed_int8(run_script, tiny_scripted, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "new" / "int8.packed"
    done = run_script(SCRIPT, "--weights", tiny_scripted / "mobilenetv2_ptq_per_channel.pt", "--o", path)
    return path, done.stdout


@pytest.fixture(scope="module")
def packed_float(run_script, tiny_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "float.packed"
    done = run_script(SCRIPT, "--weights", tiny_weights, "--o", path)
    return path, done.stdout


def test_it_says_what_was_checked_and_where_the_bytes_are(packed_int8, tiny_scripted):
    path, printed = packed_int8
    before = (tiny_scripted / "mobilenetv2_ptq_per_channel.pt").stat().st_size
    size = path.stat().st_size
    assert "logits of 8 random images are equal" in printed
    sizes = f"size {before / BYTES_PER_MB:.3f} MB -> {size / BYTES_PER_MB:.3f} MB, ratio {before / size:.2f}×"
    assert sizes in printed
    table = dict(re.findall(r"^(values|positions|scales|biases|header|all) +(\d+) ", printed, re.MULTILINE))
    assert int(table.pop("all")) == size
    assert sum(map(int, table.values())) == size


def test_float_weights_stay_float32_unless_asked(packed_float, run_script, tiny_weights, tmp_path):
    path, printed = packed_float
    assert "314 tensors came back bit for bit\n" in printed
    assert PackedFile(path).header["dtype"] == "float32"
    state = open_weights(tiny_weights).model.state_dict()
    assert all(
        torch.equal(value, state[name]) for name, value in open_weights(path).model.state_dict().items()
    )
    half = tmp_path / "half.packed"
    done = run_script(SCRIPT, "--weights", tiny_weights, "--o", half, "--dtype", "float16")
    assert "as float16" in done.stdout
    assert half.stat().st_size < 0.6 * path.stat().st_size < 0.6 * tiny_weights.stat().st_size


def test_evaluate_gives_the_same_numbers(
    packed_int8, packed_float, tiny_scripted, tiny_weights, run_script, tiny_folder, tmp_path
):
    pairs = (
        (packed_int8[0], tiny_scripted / "mobilenetv2_ptq_per_channel.pt"),
        (packed_float[0], tiny_weights),
    )
    for pair in pairs:
        results = []
        for path in pair:
            record = tmp_path / "record.json"
            run_script(
                *("evaluate.py", "--weights", path, "--dataset", "folder", "--data_dir", tiny_folder),
                *("--threads", 1, "--record", record, "--force"),
            )
            results.append(json.loads(record.read_text())["results"])
            assert results[-1].pop("file_size_mb") == path.stat().st_size / BYTES_PER_MB
        assert results[0] == results[1]
        assert set(results[0]["correct_by_class"]) == set(TINY_CLASSES)


def test_benchmarks_and_the_export_take_packed_files(
    packed_int8, packed_float, run_script, tiny_folder, tmp_path
):
    done = run_script(
        *("scripts/benchmarks.py", "--model_file", packed_float[0], packed_int8[0]),
        *("--rounds", 2, "--warm_up", 1, "--threads", 1),
    )
    assert "ptq_per_channel" in done.stdout
    pytest.importorskip("onnxruntime")
    output = tmp_path / "model.onnx"
    done = run_script(
        *("scripts/export_onnx.py", "--weights", packed_int8[0], "--o", output, "--num_check_images", 20),
        *("--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1),
    )
    assert "ptq_per_channel, any batch size" in done.stdout


def test_the_scripts_that_go_on_with_weights_take_packed_ones(packed_float, run_script, tmp_path):
    qmodel = tmp_path / "qmodel.pth"
    run_script("scripts/to_qmodel_weights.py", "--weights", packed_float[0], "--output", qmodel)
    packed = tmp_path / "qmodel.packed"
    run_script(SCRIPT, "--weights", qmodel, "--o", packed)
    assert open_weights(packed, "qmodel").class_names == TINY_CLASSES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "quantize them with post_training_quantization.py"),
        (("--dtype", "int4"), "invalid choice"),
    ],
)
def test_a_type_that_float_weights_cannot_have(arguments, message, run_script, tiny_weights, tmp_path):
    path = tmp_path / "x.packed"
    assert message in run_script(SCRIPT, "--weights", tiny_weights, "--o", path, *arguments, expect=2).stderr
    assert not path.exists()


def test_bad_files_end_with_one_line(packed_float, packed_int8, run_script, tmp_path):
    bad = tmp_path / "bad.packed"
    for path in (packed_float[0], packed_int8[0]):
        content = path.read_bytes()
        damaged = content[:900] + bytes([content[900] ^ 255]) + content[901:]
        for wrong in (content[:-40], damaged):
            bad.write_bytes(wrong)
            done = run_script(SCRIPT, "--weights", bad, "--o", tmp_path / "o", expect=2)
            assert "is truncated or damaged" in done.stderr
    assert "does not exist" in run_script(SCRIPT, "--weights", "none", "--o", tmp_path / "o", expect=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.packed"]


def test_nothing_is_overwritten_without_force(packed_float, run_script, tiny_weights):
    path, _ = packed_float
    before = path.read_bytes()
    assert "--force" in run_script(SCRIPT, "--weights", tiny_weights, "--o", path, expect=2).stderr
    run_script(SCRIPT, "--weights", tiny_weights, "--o", path, "--force")
    assert path.read_bytes() == before
