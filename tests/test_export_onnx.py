import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch

from models import MobileNetV2Quantization
from models.folding import fold_batch_norms
from tests.conftest import REPOSITORY, TINY_CLASSES
from utils.checkpoints.weights import Weights, save_weights
from utils.common.errors import UserError
from utils.data.datasets import load_data
from utils.data.loader import Loader
from utils.deployment.comparison import deploy
from utils.deployment.onnx import check_logits, start_session, to_onnx
from utils.open_model import open_model
from utils.open_weights import open_weights
from utils.quantization import eager as quantization

SCRIPT = "scripts/export_onnx.py"


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements-dev.txt)")
    return pytest.importorskip("onnx", reason="onnx is not installed (requirements-dev.txt)")


@pytest.fixture(scope="module")
def export(run_script, tiny_folder):
    def run(weights, output, *argv, script=SCRIPT, **kwargs):
        images = ("--dataset", "folder", "--data_dir", tiny_folder)
        return run_script(
            script, "--weights", weights, "--o", output, *images, "--threads", 1, *argv, **kwargs
        )

    return run


@pytest.fixture(scope="module")
def data(tiny_folder):
    return load_data(Namespace(dataset="folder", data_dir=tiny_folder, image_size=None, val_size=None))


@pytest.fixture(scope="module")
def pruned_weights(tiny_weights, tmp_path_factory):
    weights = open_weights(tiny_weights)
    with torch.no_grad():
        # Logits so far apart that the class of an image is no matter of rounding.
        weights.model.classifier[1].weight.mul_(50)
        # A whole filter among the zeros.
        weights.model.features[3].conv[0][0].weight[2] = 0
        weights.model.features[3].conv[0][0].weight[5, :3] = 0
    path = tmp_path_factory.mktemp("pruned") / "pruned.pth"
    save_weights(path, weights, Namespace())
    return path


@pytest.fixture(scope="module")
def int8_models(pruned_weights, data):
    """Eager int8 models by variant, and their engine."""
    before, supported = torch.backends.quantized.engine, torch.backends.quantized.supported_engines
    quantization.use_engine("fbgemm" if "fbgemm" in supported else "qnnpack")
    weights = open_weights(pruned_weights)
    qmodel = MobileNetV2Quantization.from_float(weights.model)
    calibrated = quantization.calibrate(qmodel, Loader(data.train, weights.normalization, 32, limit=2))
    yield {
        "ptq_per_tensor": quantization.post_training_quantize(calibrated, per_channel=False),
        "ptq_per_channel": quantization.post_training_quantize(calibrated, per_channel=True),
    }
    torch.backends.quantized.engine = before


@pytest.fixture(scope="module")
def int8_files(int8_models, pruned_weights, data, tmp_path_factory):
    """Their TorchScript files."""
    weights, files = open_weights(pruned_weights), {}
    for variant, model in int8_models.items():
        batches = Loader(data.test, weights.normalization, 32)
        files[variant] = tmp_path_factory.mktemp("int8") / f"{variant}.pt"
        deploy(variant, model, weights, torch.backends.quantized.engine, batches).save(files[variant])
    return files


def exported(path, batch_size=None):
    """The ONNX model that the script makes of a file."""
    file = open_model(path)
    source = fold_batch_norms(file.source.model) if isinstance(file.source, Weights) else file.source
    return to_onnx(source, file.metadata, batch_size)


def arrays_of(onnx, model) -> dict[str, np.ndarray]:
    return {array.name: onnx.numpy_helper.to_array(array) for array in model.graph.initializer}


def images_of(data, path, count: int) -> torch.Tensor:
    images, _ = next(iter(Loader(data.test, open_weights(path).normalization, count)))
    return images


def test_the_script_writes_a_float_model_that_gives_our_logits(onnx, export, pruned_weights, data, tmp_path):
    path = tmp_path / "new" / "float.onnx"
    done = export(pruned_weights, path, "--num_check_images", 50)
    assert "checked on 50 test images" in done.stdout
    assert "100.00 % get the same class" in done.stdout
    run, model = start_session(path.read_bytes(), threads=1), open_weights(pruned_weights).model
    for count in (1, 7):
        images = images_of(data, pruned_weights, count)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=1e-4, atol=1e-4)


def test_the_file_says_what_it_is(onnx, pruned_weights):
    model = exported(pruned_weights, batch_size=4)
    properties = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert properties["class_names"] == list(TINY_CLASSES)
    assert properties["normalization"] == {"mean": [0.35] * 3, "std": [0.2] * 3}
    assert properties["variant"] == "float"
    (images,), (logits,) = model.graph.input, model.graph.output
    shape = [d.dim_value for d in images.type.tensor_type.shape.dim]
    assert shape == [4, 3, 32, 32]
    assert [d.dim_value for d in logits.type.tensor_type.shape.dim] == [4, 3]


def test_pruned_weights_are_zero_in_the_file(onnx, pruned_weights):
    arrays = arrays_of(onnx, exported(pruned_weights))
    weight = arrays["features.3.conv.0.0.weight"]
    assert not weight[2].any()
    assert not weight[5, :3].any()
    assert weight[5, 3:].all()


@pytest.mark.parametrize("variant", ["ptq_per_tensor", "ptq_per_channel"])
def test_int8_weights_and_scales_are_ours(onnx, variant, int8_models, int8_files):
    model = int8_models[variant]
    arrays = arrays_of(onnx, exported(int8_files[variant]))
    assert len(model.weights) == len(model.biases) == 53
    for name, weight in model.weights.items():
        found, scale = arrays[f"{name}.weight"], arrays[f"{name}.weight_scale"]
        assert found.dtype == np.int8
        assert np.array_equal(found, weight)
        assert np.array_equal(scale, model.scales[name].numpy().reshape(scale.shape))
        bias, step = arrays[f"{name}.bias"], arrays[f"{name}.bias_scale"]
        assert bias.dtype == np.int32
        # Whole steps before they are rounded, but for the precision of float32.
        assert np.allclose(bias, model.biases[name].double().numpy() / step, rtol=1e-6, atol=1e-3)
        for kind in ("weight", "bias"):
            assert not arrays[f"{name}.{kind}_zero_point"].any()
            shape = () if variant == "ptq_per_tensor" else (len(weight),)
            assert arrays[f"{name}.{kind}_scale"].shape == shape


@pytest.mark.parametrize("variant", ["ptq_per_tensor", "ptq_per_channel"])
def test_int8_outputs_are_ours(onnx, variant, int8_models, int8_files, data, pruned_weights):
    file = open_model(int8_files[variant])
    model = exported(int8_files[variant])
    images = images_of(data, pruned_weights, len(data.test))
    with torch.inference_mode():
        ours, theirs = file.model(images), start_session(model.SerializeToString(), threads=1)(images)
    step = int8_models[variant].activations["classifier.1"].scale
    assert (ours - theirs).abs().max() <= 2.01 * step
    assert (ours.argmax(1) == theirs.argmax(1)).double().mean() >= 0.98
    assert check_logits("x.onnx", ours, theirs, step).startswith(f"checked on {len(data.test)} test images")


def test_relu6_is_where_int8_saturates(onnx, int8_files):
    model = exported(int8_files["ptq_per_channel"])
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {
        "QuantizeLinear",
        "DequantizeLinear",
        "Conv",
        "Add",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
    }
    arrays, producers = arrays_of(onnx, model), {node.output[0]: node for node in model.graph.node}
    ends_at_6 = 0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and producers.get(node.input[0], node).op_type == "Conv":
            scale, zero_point = (arrays[name] for name in node.input[1:])
            ends_at_6 += zero_point == 0 and 255 * scale <= 6 + 1e-5
    # The stem, 17 depthwise and 16 expanding convolutions, and the last one.
    assert ends_at_6 == 35


def test_onnxruntime_runs_every_layer_in_int8(onnx, int8_files, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    # The next level is made for this CPU.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    content = exported(int8_files["ptq_per_channel"]).SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("QLinearConv") == 52
    assert nodes.count("QGemm") == 1
    assert (nodes.count("QuantizeLinear"), nodes.count("DequantizeLinear")) == (1, 1)


def test_the_script_writes_int8_files_and_the_same_bytes_again(onnx, export, int8_files, tmp_path):
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    done = export(int8_files["ptq_per_channel"], first)
    assert "steps of int8)" in done.stdout
    assert "ptq_per_channel, any batch size" in done.stdout
    export(int8_files["ptq_per_channel"], second)
    assert first.read_bytes() == second.read_bytes()


def test_another_image_size_and_output_stride(onnx, export, pruned_weights, tmp_path):
    path = tmp_path / "large.onnx"
    export(pruned_weights, path, "--image_size", 48, "--output_stride", 16, "--batch_size", 2)
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [2, 3, 48, 48]


@pytest.mark.parametrize(
    ("largest", "same_class", "step"),
    [(0.01, 100, None), (math.nan, 100, None), (0.0, 95, None), (0.9, 100, 0.1), (0.1, 97, 0.1)],
)
def test_a_difference_that_rounding_does_not_explain_is_refused(largest, same_class, step):
    ours = torch.tensor([[5.0, -5.0, 4.9999]]).repeat(100, 1)
    theirs = ours.clone()
    theirs[0, 1] += 1e-5
    check_logits("x.onnx", ours, theirs, step)
    theirs[0, 1] = ours[0, 1] + largest
    theirs[same_class:, 2] = 5.0001
    with pytest.raises(UserError, match="not written"):
        check_logits("x.onnx", ours, theirs, step)


def wrapped(tmp_path, *lines: str):
    """The script, run after some lines of Python."""
    path = tmp_path / "wrapped.py"
    start = ["import runpy, sys", f"sys.path.insert(0, {str(REPOSITORY)!r})"]
    end = f"runpy.run_path({str(REPOSITORY / SCRIPT)!r}, run_name='__main__')"
    path.write_text("\n".join([*start, *lines, end]))
    return path


def test_a_file_that_does_not_give_our_outputs_is_not_written(onnx, export, pruned_weights, tmp_path):
    spoilt = wrapped(
        tmp_path,
        "from utils.deployment import onnx as onnx_export",
        "plain = onnx_export._Graph.array",
        "onnx_export._Graph.array = lambda self, name, value: plain(",
        "    self, name, value + 0.1 if name.endswith('.bias') else value",
        ")",
    )
    output = tmp_path / "wrong.onnx"
    output.write_text("the old file")
    done = export(pruned_weights, output, "--force", script=spoilt, expect=2)
    assert "wrong.onnx was not written: its logits differ from ours" in done.stderr
    assert output.read_text() == "the old file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wrapped.py", "wrong.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_there_is_one_line(export, pruned_weights, tmp_path, package):
    # What Python does with an import of a package that is not there.
    without = wrapped(tmp_path, f"sys.modules[{package!r}] = None")
    output = tmp_path / "none.onnx"
    done = export(pruned_weights, output, script=without, expect=2)
    assert "is not installed" in done.stderr
    assert "pip install -r requirements-benchmarks.txt" in done.stderr
    assert not output.exists()


def test_bad_arguments(onnx, export, pruned_weights, tmp_path):
    output = tmp_path / "model.onnx"
    done = export(pruned_weights, output, "--batch_size", 1000, expect=2)
    assert "--batch_size 1000 is more than the 90 test images" in done.stderr
    assert "does not exist" in export(tmp_path / "no.pth", output, expect=2).stderr
    output.write_text("")
    assert "--force" in export(pruned_weights, output, expect=2).stderr
    assert output.read_text() == ""
