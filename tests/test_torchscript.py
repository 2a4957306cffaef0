import io
import json
import random
import resource
import struct
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from models import MobileNetV2
from models.folding import fold_batch_norms
from tests.conftest import REPOSITORY
from utils.checkpoints.metadata import FORMAT_VERSION, Metadata
from utils.common.errors import UserError
from utils.data.datasets import Normalization, load_data
from utils.data.loader import Loader
from utils.deployment.torchscript import (
    METADATA_FILE,
    float_forms,
    pack_torchscript,
    save_torchscript,
    to_torchscript,
)
from utils.deployment.torchscript_reader import LARGEST_TEXT, read_torchscript
from utils.open_model import open_model
from utils.open_weights import open_weights
from utils.quantization.eager import (
    calibrate,
    calibrate_qat,
    convert_qat,
    post_training_quantize,
    prepare_qat,
    to_module,
    use_engine,
)
from utils.quantization.int8_model import Int8Model

ENGINE = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"
METADATA = Metadata(
    variant="ptq_per_channel",
    engine=ENGINE,
    architecture={"num_classes": 3, "width_mult": 0.1, "dropout": 0.0, "output_stride": 32},
    class_names=("blue", "grün", "red"),
    normalization=Normalization((0.1, 0.2, 1 / 3), (0.4, 0.5, 0.6)),
    image_size=32,
    parameters=sum(
        parameter.numel()
        for parameter in fold_batch_norms(MobileNetV2(num_classes=3, width_mult=0.1)).parameters()
    ),
    nonzeros=27,
    macs=12345,
    dense_size_mb=0.5,
    nonzero_size_mb=0.25,
    metrics={"test_accuracy_pct": 81.25},
)


@pytest.fixture(scope="module")
def models(tiny_qmodel, tiny_folder) -> dict[str, nn.Module | Int8Model]:
    use_engine(ENGINE)
    weights = open_weights(tiny_qmodel, "qmodel")
    data = load_data(Namespace(dataset="folder", data_dir=tiny_folder, image_size=None, val_size=None))
    batches = Loader(data.train, weights.normalization, 54)
    calibrated = calibrate(weights.model, batches)
    trained = prepare_qat(weights.model)
    calibrate_qat(trained, batches)
    return {
        "float": fold_batch_norms(weights.model),
        "ptq_per_tensor": post_training_quantize(calibrated, per_channel=False),
        "ptq_per_channel": post_training_quantize(calibrated, per_channel=True),
        "qat": convert_qat(trained),
    }


@pytest.fixture(scope="module")
def modules(models) -> dict[str, nn.Module]:
    """What runs, before it is TorchScript."""
    use_engine(ENGINE)
    return {name: model if name == "float" else to_module(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def scripted(models):
    return to_torchscript(models["ptq_per_channel"], 32)


@pytest.fixture(scope="module")
def content(scripted) -> bytes:
    return pack_torchscript(scripted, METADATA)


@pytest.fixture
def refused(tmp_path):
    """Write a file and give the one line with which it is refused."""

    def refuse(content: bytes, read=read_torchscript) -> str:
        path = tmp_path / "bad.pt"
        path.write_bytes(content)
        before = torch.backends.quantized.engine
        with pytest.raises(UserError) as caught:
            read(path)
        assert torch.backends.quantized.engine == before
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert str(path) in message
        return message

    return refuse


def repacked(content: bytes, change) -> bytes:
    """The archive with each entry, by its name without the leading folder, as `change` gives it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            entry = change(name.partition("/")[2], source.read(name))
            if entry is not None:
                target.writestr(name, entry)
    return packed.getvalue()


def with_metadata(content: bytes, **changes) -> bytes:
    def change(name, entry):
        if name != f"extra/{METADATA_FILE}":
            return entry
        return json.dumps({**json.loads(entry), **changes}).encode()

    return repacked(content, change)


@pytest.mark.parametrize("variant", ["float", "ptq_per_tensor", "ptq_per_channel", "qat"])
def test_a_saved_model_answers_as_the_eager_one_bit_for_bit(models, modules, tmp_path, variant):
    model = modules[variant]
    metadata = replace(METADATA, variant=variant, engine=None if variant == "float" else ENGINE)
    save_torchscript(tmp_path / "model.pt", to_torchscript(models[variant], 32), metadata)
    file = open_model(tmp_path / "model.pt")
    loaded = file.model
    assert file.metadata == metadata
    for size in (1, 2, 7, 64):
        images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
        with torch.inference_mode():
            expected = model(images)
            assert torch.equal(loaded(images), expected)
            # By now the JIT has profiled and optimized it.
            assert torch.equal(loaded(images), expected)
            images = images.to(memory_format=torch.channels_last)
            assert torch.equal(loaded(images), model(images))


def test_it_takes_images_of_other_sizes(modules, scripted):
    images = torch.randn(2, 3, 48, 64)
    with torch.inference_mode():
        assert torch.equal(scripted(images), modules["ptq_per_channel"](images))


def test_it_can_be_put_into_eval_mode(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    loaded = open_model(tmp_path / "model.pt").model
    assert not loaded.training
    assert not loaded.eval().training


def test_the_int8_graph_holds_what_is_needed_and_nothing_else(modules, scripted):
    shortcuts = [getattr(m, "use_res_connect", False) for m in modules["ptq_per_channel"].modules()]
    kinds = [node.kind() for node in scripted.inlined_graph.nodes()]
    counts = {kind: kinds.count(kind) for kind in set(kinds) - {"prim::Constant", "prim::ListConstruct"}}
    assert counts == {
        "aten::quantize_per_tensor": 1,
        "quantized::conv2d": 52,
        "quantized::add": sum(shortcuts),
        "aten::adaptive_avg_pool2d": 1,
        "aten::flatten": 1,
        "quantized::linear": 1,
        "aten::dequantize": 1,
    }


def test_the_float_graph_has_no_batch_norm_left(models):
    kinds = {node.kind() for node in to_torchscript(models["float"], 32).inlined_graph.nodes()}
    assert not any("batch_norm" in kind or "dropout" in kind for kind in kinds)


def test_equal_models_give_equal_files_that_name_no_place(models, scripted, content):
    assert pack_torchscript(scripted, METADATA) == content
    assert pack_torchscript(to_torchscript(models["ptq_per_channel"], 32), METADATA) == content
    for place in (REPOSITORY, Path(torch.__file__).parent, Path.home()):
        assert str(place).encode() not in content
    assert b".py(" not in content


def test_torch_alone_opens_it(content, modules):
    use_engine(ENGINE)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(torch.jit.load(io.BytesIO(content))(images), modules["ptq_per_channel"](images))


def test_it_loads_whatever_engine_is_current_and_leaves_that(content, tmp_path, modules):
    (tmp_path / "model.pt").write_bytes(content)
    images = torch.randn(3, 3, 32, 32)
    for name in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = name
        file = open_model(tmp_path / "model.pt")
        assert torch.backends.quantized.engine == name
        file.use_engine()
        with torch.inference_mode():
            assert torch.equal(file.model(images), modules["ptq_per_channel"](images))


@pytest.fixture
def onednn():
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("this machine does not run the engine onednn")
    before = torch.backends.quantized.engine
    use_engine("onednn")
    yield
    torch.backends.quantized.engine = before


@pytest.mark.parametrize("batch_size", [1, 32])
def test_an_engine_changes_no_logit_by_more_than_a_few_steps(models, modules, onednn, batch_size):
    images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, logits = (
            modules["ptq_per_channel"](images),
            to_torchscript(models["ptq_per_channel"], 32)(images),
        )
    step = models["ptq_per_channel"].activations["classifier.1"].scale
    torch.testing.assert_close(logits, expected, rtol=0, atol=8 * step)


def test_every_form_of_a_float_model_answers_alike(models):
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = models["float"](images)
        forms = float_forms(models["float"], 32)
        assert len(forms) >= 2
        for form in forms.values():
            torch.testing.assert_close(form(images), expected, rtol=1e-4, atol=1e-4)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_torchscript(tmp_path / "none.pt")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99, 0.9999])
def test_a_truncated_file(refused, content, kept):
    assert "truncated" in refused(content[: int(kept * len(content))])


def test_files_of_other_kinds(refused, tiny_qmodel):
    assert "not a TorchScript file" in refused(b"layer,sparsity\n")
    assert "not a TorchScript file" in refused(random.Random(0).randbytes(5000))
    assert "not a TorchScript file" in refused(tiny_qmodel.read_bytes())


def test_a_torchscript_file_of_another_project(refused):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(MobileNetV2(width_mult=0.1).eval()), buffer)
    assert "TorchScript file of another project" in refused(buffer.getvalue())


def test_an_engine_that_this_machine_lacks(refused, content):
    message = refused(with_metadata(content, engine="tpu"), open_model)
    assert "made for the quantization engine tpu, which this machine does not support" in message
    assert ENGINE in message


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"format_version": FORMAT_VERSION + 1},
        {"variant": "int4"},
        {"normalization": None},
        {"class_names": 3},
        {"parameters": "many"},
        {"parameters": 0},
        {"parameters": 26, "nonzeros": 27},
        {"nonzeros": -1},
        {"nonzeros": 10**9},
        {"macs": 0},
        {"dense_size_mb": -1},
        {"normalization": {"mean": [0.5] * 3, "std": [0.0, 0.2, 0.2]}},
        {"normalization": {"mean": [0.5] * 3, "std": [float("nan"), 0.2, 0.2]}},
        {"class_names": ["a", "b"]},
        {"image_size": 0},
        {"image_size": 4096},
        {"architecture": [1]},
        {"architecture": {"num_classes": 3.0}},
        {"metrics": ["a"]},
        {"metrics": None},
        {"versions": 3},
        {"engine": None},
        {"engine": []},
        {"variant": "float"},
        {"variant": []},
    ],
    ids=str,
)
def test_metadata_of_another_make(refused, content, changes):
    assert "damaged or not of this project" in refused(with_metadata(content, **changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(refused, float_content, value):
    def replacement(entry):
        return struct.pack("<f", value) + entry[4:]

    assert "holds NaN or infinity" in refused(
        with_part(float_content, "constants/0", replacement), open_model
    )


def test_metadata_that_is_missing_or_no_json(refused, content):
    def change(name, entry):
        return b"{" if name == f"extra/{METADATA_FILE}" else entry

    assert "damaged or not of this project" in refused(repacked(content, change))


def test_an_archive_that_lacks_a_part(refused, content):
    assert "damaged" in refused(repacked(content, lambda n, e: None if n == "constants/3" else e))


def test_damaged_files_are_refused_or_hold_what_was_written(tmp_path, content, modules):
    generator, refusals = random.Random(0), 0
    path = tmp_path / "damaged.pt"
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = modules["ptq_per_channel"](images)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 8)):
            damaged[generator.randrange(len(damaged))] ^= generator.randint(1, 255)
        path.write_bytes(damaged)
        try:
            file = open_model(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refusals += 1
        else:
            assert file.metadata == METADATA
            with torch.inference_mode():
                assert torch.equal(file.model(images), expected)
    assert refusals > 50


def test_a_full_disk_leaves_the_old_file_whole(scripted, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")

    def write_bytes(_self, _content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(UserError, match="No space left"):
        save_torchscript(path, scripted, METADATA)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


# Files are read as data


@pytest.fixture(scope="module")
def float_content(models) -> bytes:
    metadata = replace(METADATA, variant="float", engine=None)
    return pack_torchscript(to_torchscript(models["float"], 32), metadata)


def is_code(name: str) -> bool:
    return name.startswith("code/__torch__/models/")


def with_part(content: bytes, name: str, replacement) -> bytes:
    """The archive with one entry as `replacement` gives it."""
    return repacked(content, lambda n, e: replacement(e) if n == name else e)


def with_code(content: bytes, old: str, new: str) -> bytes:
    """The archive with a text in the code of the model replaced."""

    def change(name, entry):
        if not is_code(name):
            return entry
        assert old in entry.decode()
        return entry.decode().replace(old, new, 1).encode()

    return repacked(content, change)


def with_pickle(content: bytes, old: bytes, new: bytes) -> bytes:
    """The archive with bytes in the pickle of the constants replaced, the first time they occur."""

    def replacement(entry: bytes) -> bytes:
        assert old in entry
        return entry.replace(old, new, 1)

    return with_part(content, "constants.pkl", replacement)


@pytest.mark.parametrize("variant", ["float", "ptq_per_tensor", "ptq_per_channel", "qat"])
def test_reading_takes_no_torch_jit(models, tmp_path, monkeypatch, variant):
    """No file is loaded, and no code compiled."""
    path, model = tmp_path / "model.pt", models[variant]
    metadata = replace(METADATA, variant=variant, engine=None if variant == "float" else ENGINE)
    save_torchscript(path, to_torchscript(model, 32), metadata)

    def refuse(*_args, **_kwargs):
        raise AssertionError("a file was run")

    for name in ("load", "_script_module", "script", "CompilationUnit"):
        if hasattr(torch.jit, name):
            monkeypatch.setattr(torch.jit, name, refuse)
    monkeypatch.setattr(torch._C, "import_ir_module", refuse)
    monkeypatch.setattr(torch._C, "import_ir_module_from_buffer", refuse)
    found, found_metadata = read_torchscript(path)
    assert found_metadata == metadata
    if variant == "float":
        expected = model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    else:
        assert found.activations == model.activations
        for name, weight in model.weights.items():
            assert torch.equal(found.weights[name], weight)
            assert torch.equal(found.scales[name], model.scales[name])
            assert torch.equal(found.biases[name], model.biases[name])
    assert open_model(path).metadata == metadata


def test_code_that_maps_a_file_is_never_run(refused, content, tmp_path):
    """A call of it would create the file."""
    target = tmp_path / "target.bin"
    harm = f"torch.from_file({str(target)!r}, True, 4)"
    old = "    input = torch.quantize_per_tensor(x, "
    for new in (
        f"    evil = {harm}\n{old}",
        f"    evil = {harm}\n{old.replace('(x,', '(evil,')}",
        old.replace("(x,", f"({harm},"),
    ):
        assert "it calls from_file" in refused(with_code(content, old, new))
    assert not target.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_parameter"),
        ("__torch__.torch.classes.quantized", "EmbeddingPackedParamsBase"),
        ("__torch__.torch.classes.other", "Thing"),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused(refused, content, tmp_path, module, name):
    target = tmp_path / "touched"
    call = f"c{module}\n{name}\n(X".encode()
    argument = f"touch {target}".encode()
    pickled = b"\x80\x02" + call + struct.pack("<I", len(argument)) + argument + b"tR."
    assert f"it holds {module}.{name}" in refused(with_part(content, "constants.pkl", lambda _: pickled))
    assert not target.exists()


def test_compressed_parts_are_refused(refused, content):
    """They could be far larger than the file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            last = name.endswith("constants/1")
            method = zipfile.ZIP_DEFLATED if last else zipfile.ZIP_STORED
            target.writestr(name, bytes(2**24) if last else source.read(name), method)
    assert "constants/1 is compressed" in refused(packed.getvalue())


@pytest.mark.parametrize("part", [f"extra/{METADATA_FILE}", "constants.pkl", "code"])
def test_texts_that_are_too_large_are_refused(refused, content, part):
    def change(name, entry):
        return entry + b" " * LARGEST_TEXT if name == part or (part == "code" and is_code(name)) else entry

    assert f"is larger than {LARGEST_TEXT} bytes" in refused(repacked(content, change))


# The first weight of the file has the shape (8, 3, 3, 3) and is laid out as channels-last.
SHAPE = b"(K\x08K\x03K\x03K\x03t"
STRIDES = b"(K\x1bK\x01K\x09K\x03t"


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        (SHAPE, b"(K\x00K\x00K\x00K\x00t", "has strides"),
        (SHAPE, b"(K\x1bK\x00K\x09K\x03t", "has strides"),
        (SHAPE, b"(K\x1bK\x01K\x09K\x04t", "has strides"),
        (SHAPE, b"(K\xd8K\x01K\x09K\x03t", "has strides"),
        (SHAPE, b"(K\x1bK\x01K\x09t", "zip()"),
        (b"(K\x10K\x03K\x03K\x03t", STRIDES, "does not fill its storage"),
        (b"(K\x07K\x03K\x03K\x03t", STRIDES, "does not fill its storage"),
        (b"(K\x18K\x01K\x03K\x03t", b"(K\x09K\x01K\x03K\x01t", "another shape"),
    ],
)
def test_tensors_that_repeat_or_exceed_their_storage(refused, content, shape, strides, message):
    assert message in refused(with_pickle(content, SHAPE + STRIDES, shape + strides))


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x0f", b"p268435455\n"], ids=["binary", "text"])
def test_a_pickle_with_a_large_index_takes_no_memory(refused, content, opcode):
    """Python's unpickler would allocate 4 GB for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pickled = b"\x80\x02]" + opcode + b"."
    assert "an index that is too large" in refused(with_part(content, "constants.pkl", lambda _: pickled))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_code_that_takes_for_ever_to_search_is_refused(refused, content):
    old = "    input = torch.quantize_per_tensor(x, "
    harm = "ops.quantized.conv2d(" * 40_000
    assert "a line that is too long" in refused(with_code(content, old, f"    {harm}\n{old}"))


def test_a_storage_is_read_for_one_tensor(refused, content):
    def replacement(entry):
        # The second quantized weight takes the storage of the first.
        first, second = (f"X{chr(1)}\0\0\0{key}".encode() for key in ("1", "5"))
        assert entry.count(second) == 1
        return entry.replace(second, first)

    assert "constants/1" in refused(with_part(content, "constants.pkl", replacement))


@pytest.mark.parametrize("scale", [-0.01, 0.0, float("nan"), float("inf"), 1e300, 0.1])
def test_scales_that_are_no_positive_float32(refused, content, scale):
    """constants/2 holds the scales of the first weight; 0.1 is no float32."""

    def replacement(entry):
        return struct.pack("<d", scale) + entry[8:]

    message = refused(with_part(content, "constants/2", replacement))
    assert "a scale is not a positive float32" in message


@pytest.mark.parametrize("scale", ["-0.01", "0.", "nan", "inf", "1e999"])
def test_activations_whose_scale_is_invalid(refused, content, models, scale):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = [name for name in archive.namelist() if is_code(name.partition("/")[2])]
        code = archive.read(name).decode()
    for marker in ("quantize_per_tensor(x, ", "CONSTANTS.c3, "):
        start = code.index(marker) + len(marker)
        old = code[start : code.index(",", start)]
        assert "damaged or not of this project" in refused(with_code(content, marker + old, marker + scale))


def test_zero_points_that_int8_has_not(refused, content):
    def replacement(entry):
        return struct.pack("<q", 1) + entry[8:]

    assert "a weight is not symmetric" in refused(with_part(content, "constants/3", replacement))
    assert "damaged or not of this project" in refused(with_code(content, ", 0)", ", 256)"))


def test_a_float_file_of_another_type_or_shape(refused, float_content):
    for other in ("IntStorage", "HalfStorage", "UntypedStorage"):
        changed = with_pickle(float_content, b"ctorch\nFloatStorage", b"ctorch\n" + other.encode())
        assert f"it holds torch.{other}" in refused(changed)
    other = dict(METADATA.architecture, width_mult=0.2)
    assert "damaged or not of this project" in refused(with_metadata(float_content, architecture=other))


def test_an_archive_of_very_many_parts_is_refused(refused, content):
    packed = io.BytesIO(content)
    with zipfile.ZipFile(packed, "a") as archive:
        for index in range(4097):
            archive.writestr(f"archive/more/{index}", b"")
    assert "parts" in refused(packed.getvalue())


def test_another_number_of_parameters_than_the_tensors_have(refused, content):
    assert "is damaged (not 12345 parameters)" in refused(
        with_metadata(content, parameters=12345), open_model
    )
