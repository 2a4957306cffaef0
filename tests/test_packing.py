"""Packed files give back what was packed, or say in one line what is wrong with them."""

import io
import json
import random
import struct
import tracemalloc
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import MobileNetV2
from models.folding import fold_batch_norms
from models.statistics import prunable_layers
from scripts.pack_weights import check_logits, source_of
from tests.test_packing_codecs import tensors
from utils.checkpoints.metadata import Metadata
from utils.checkpoints.weights import MOBILENETV2_KINDS, save_weights
from utils.common.errors import UserError
from utils.deployment.torchscript import to_torchscript
from utils.deployment.torchscript_reader import read_torchscript
from utils.open_model import open_model
from utils.open_weights import open_weights
from utils.packing import float_weights as packing_float
from utils.packing import int8_weights as packing_int8
from utils.packing.container import HEADER, reading, write_archive
from utils.packing.format import PackedFile, Slot, is_packed
from utils.packing.format import encode as encode_tensors
from utils.packing.int8_weights import read_int8
from utils.packing.pack import KINDS, check_same, encode, packed_sizes
from utils.quantization import eager as quantization
from utils.quantization.int8_model import Int8Model

INT8_VARIANTS = ("ptq_per_tensor", "ptq_per_channel")


def open_source(path: Path, dtype: str | None):
    """What scripts/pack_weights.py packs of a file, and as which type."""
    return source_of(open_model(path), dtype)


def check_int8(path: Path, model: Int8Model, metadata: Metadata) -> None:
    """A packed file gives back the tensors bit for bit, and the logits of TorchScript."""
    assert "tensors came back bit for bit" in check_same(path, (model, metadata), "int8")
    images = torch.randn(8, 3, 32, 32)
    with quantization.engine(metadata.engine), torch.inference_mode():
        assert torch.equal(open_model(path).model(images), to_torchscript(model, 32)(images))


@pytest.fixture(scope="module")
def pruned(tiny_weights, tmp_path_factory) -> Path:
    """Weights of many densities: none in one layer, all in another."""
    weights = open_weights(tiny_weights)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, layer in enumerate(prunable_layers(weights.model).values()):
            kept = torch.rand(layer.weight.shape, generator=generator) < (0.0, 0.02, 0.27, 1.0)[index % 4]
            layer.weight.copy_(torch.where(kept, layer.weight, 0.0))
    path = tmp_path_factory.mktemp("pruned") / "pruned.pth"
    save_weights(path, replace(weights, metrics={"test_accuracy_pct": 81.25}), Namespace())
    return path


@pytest.fixture(scope="module")
def packed(pruned, tiny_qmodel, tiny_scripted, tmp_path_factory) -> dict[str, Path]:
    """A packed file of each kind."""
    folder, files = tmp_path_factory.mktemp("packed"), {}
    sources = {
        "float32": (pruned, None),
        "float16": (pruned, "float16"),
        "qmodel": (tiny_qmodel, None),
        **{variant: (tiny_scripted / f"mobilenetv2_{variant}.pt", None) for variant in INT8_VARIANTS},
    }
    for name, (path, dtype) in sources.items():
        files[name] = folder / f"{name}.packed"
        files[name].write_bytes(encode(*open_source(path, dtype)))
    return files


def state_bytes(path) -> dict[str, bytes]:
    state = open_weights(path, MOBILENETV2_KINDS).model.state_dict()
    return {name: value.numpy().tobytes() for name, value in state.items()}


def rewritten(path: Path, change) -> bytes:
    """The archive with header (a dict) and arrays (by name) as `change` leaves them; checksums fit."""
    file = PackedFile(path)
    header = json.loads(json.dumps(file.header))
    arrays = {name: file.archive.array(name, 2**24) for name in file.archive.entries if name != HEADER}
    change(header, arrays)
    return write_archive(json.dumps(header).encode(), arrays)


def as_version_2(path: Path) -> bytes:
    """The packed file as the previous version of the format had it."""

    def change(header, arrays):
        header["format_version"] = 2
        for stream in header["types"]:
            names = [name for name in arrays if name.startswith(f"{stream}.")]
            arrays[stream] = np.concatenate([arrays.pop(name) for name in names])
        arrays["checksums"] = np.arange(200, dtype=np.uint8)

    return rewritten(path, change)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with reading(path):
        file = PackedFile(path)
        module = packing_int8 if file.header["dtype"] == "int8" else packing_float
        return module.read_tensors(file)[1]


def assert_equal_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@pytest.fixture
def refused(tmp_path):
    """Write a file and give the one line with which it is refused."""

    def refuse(content: bytes, read=open_model) -> str:
        path = tmp_path / "bad.packed"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read(path)
        assert len(str(caught.value).splitlines()) == 1
        assert str(path) in str(caught.value)
        return str(caught.value)

    return refuse


@given(st.lists(tensors(), max_size=5), st.sampled_from(("float32", "float16", "int8")), st.booleans())
@settings(max_examples=150, deadline=None)
def test_tensors_of_any_shape_density_and_type_come_back(tmp_path_factory, arrays, dtype, others):
    """Whatever the bits; only NaN and infinity are refused."""
    arrays = [np.resize(a.reshape(-1).view(np.uint8), a.size * np.dtype(dtype).itemsize) for a in arrays]
    arrays = [a.astype(np.uint8).view(dtype) for a in arrays] or [np.zeros(0, dtype)]
    slots = [Slot(f"w{i}", f"w{i}", "values", a.shape) for i, a in enumerate(arrays)]
    contents = dict(zip((slot.name for slot in slots), arrays, strict=True))
    if others:
        slots += [Slot("b", "", "biases", (3,)), Slot("c", "", "batch_norm", (2, 0))]
        contents |= {"b": np.array([1, -5, 2**31 - 1], np.int32), "c": np.zeros((2, 0), np.float32)}
    path = tmp_path_factory.getbasetemp() / "any.packed"
    if not all(np.isfinite(a).all() for a in arrays):
        with pytest.raises(UserError, match="NaN or infinity"):
            encode_tensors({}, slots, contents)
        return
    path.write_bytes(encode_tensors({}, slots, contents))
    found = PackedFile(path).read(slots, {"values": [dtype], "biases": ["int32"], "batch_norm": ["float32"]})
    assert_equal_tensors(found, contents)


@pytest.mark.parametrize("name", ["float32", "qmodel"])
def test_float32_comes_back_bit_for_bit_with_all_that_travels_with_it(name, packed, pruned, tiny_qmodel):
    source = {"float32": pruned, "qmodel": tiny_qmodel}[name]
    before, after = (open_weights(path, MOBILENETV2_KINDS) for path in (source, packed[name]))
    assert state_bytes(packed[name]) == state_bytes(source)
    assert list(after.model.state_dict()) == list(before.model.state_dict())
    for field in ("kind", "class_names", "normalization", "image_size", "metrics"):
        assert getattr(after, field) == getattr(before, field)
    assert after.model.architecture == before.model.architecture
    assert all(parameter.requires_grad for parameter in after.model.parameters())


def test_float16_is_rounded_once_and_zeros_stay(packed, pruned):
    before, after = (open_weights(path).model.state_dict() for path in (pruned, packed["float16"]))
    for name, value in before.items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(after[name], expected)
        assert after[name].dtype == value.dtype
        assert not after[name][value == 0].any()
    images = torch.randn(4, 3, 32, 32)
    models = [open_weights(path).model for path in (pruned, packed["float16"])]
    with torch.no_grad():
        torch.testing.assert_close(models[0](images), models[1](images), rtol=1e-2, atol=1e-2)
    assert open_source(packed["float16"], None)[1] == "float16"


@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_int8_answers_as_the_torchscript_file(variant, packed, tiny_scripted):
    path = tiny_scripted / f"mobilenetv2_{variant}.pt"
    _, metadata = read_torchscript(path)
    before = torch.backends.quantized.engine
    model, found_metadata = read_int8(packed[variant])
    file, expected = open_model(packed[variant]), open_model(path)
    assert torch.backends.quantized.engine == before
    assert found_metadata == file.metadata == metadata
    assert metadata.variant == variant
    file.use_engine()
    check_logits(expected, file)
    found = quantization.to_module(model)
    for size in (32, 48):
        images = torch.randn(5, 3, size, size)
        with torch.inference_mode():
            assert torch.equal(found(images), expected.model(images))
            assert torch.equal(file.model(images), expected.model(images))


@pytest.mark.parametrize("engine", ["fbgemm", "x86", "qnnpack"])
def test_a_model_trained_in_int8_on_any_engine(engine, tiny_qmodel, tmp_path):
    before = torch.backends.quantized.engine
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"{engine} does not run here")
    weights = open_weights(tiny_qmodel, "qmodel")
    prepared = quantization.prepare_qat(weights.model)
    quantization.calibrate_qat(prepared, [(torch.randn(8, 3, 32, 32), torch.zeros(8))])
    with quantization.engine(engine):
        model = quantization.convert_qat(prepared)
    assert torch.backends.quantized.engine == before
    metadata = Metadata(
        variant="qat",
        engine=engine,
        architecture=weights.model.architecture,
        class_names=weights.class_names,
        normalization=weights.normalization,
        image_size=32,
        parameters=sum(p.numel() for p in fold_batch_norms(weights.model).parameters()),
        nonzeros=4,
        macs=3,
        dense_size_mb=2.0,
        nonzero_size_mb=1.0,
    )
    path = tmp_path / "qat.packed"
    path.write_bytes(encode((model, metadata), "int8"))
    assert PackedFile(path).header["types"]["biases"] == "int32"
    check_int8(path, model, metadata)


def test_fewer_bits_take_fewer_bytes_and_come_back_bit_for_bit(tiny_qmodel, tiny_scripted, tmp_path):
    _, metadata = read_torchscript(tiny_scripted / "mobilenetv2_ptq_per_channel.pt")
    weights, sizes = open_weights(tiny_qmodel, "qmodel"), {}
    for per_channel in (True, False):
        calibrated = quantization.calibrate(weights.model, [(torch.randn(8, 3, 32, 32), torch.zeros(8))])
        for bits in (8, 6, 4):
            path = tmp_path / f"{bits}.packed"
            model = quantization.post_training_quantize(calibrated, per_channel, bits)
            path.write_bytes(encode((model, metadata), "int8"))
            check_int8(path, model, metadata)
            sizes[bits] = path.stat().st_size
        assert sizes[4] < 0.85 * sizes[6] < 0.85 * 0.9 * sizes[8]


def test_a_reader_of_numpy_and_json_alone(packed, tiny_scripted):
    """What the docstring of utils/packing/format.py says is enough to read the weights."""
    with np.load(packed["ptq_per_channel"]) as archive:
        header = json.loads(archive["header.json"])
        bits = np.unpackbits(archive["mask"]) if "mask" in archive else None
        values = archive["values.0"].view(np.int8)
    model, _ = read_torchscript(tiny_scripted / "mobilenetv2_ptq_per_channel.pt")
    value = bit = 0
    for encoding, (name, weight) in zip(header["encodings"], model.weights.items(), strict=True):
        found = np.zeros(weight.numel(), np.int8)
        places = slice(None)
        assert encoding in "dm"
        if encoding == "m":
            places, bit = np.flatnonzero(bits[bit : bit + len(found)]), bit + len(found)
        count = len(found[places])
        found[places], value = values[value : value + count], value + count
        assert np.array_equal(found.reshape(weight.shape), weight.numpy()), name


@pytest.mark.parametrize("name", ["float32", "float16", "ptq_per_channel"])
def test_packing_a_packed_file_gives_the_same_bytes(name, packed):
    assert encode(*open_source(packed[name], None)) == packed[name].read_bytes()


@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_biases_and_scales_that_are_others_come_back_as_they_are(
    variant, tiny_scripted, tmp_path, monkeypatch
):
    source, dtype = open_source(tiny_scripted / f"mobilenetv2_{variant}.pt", None)
    path = tmp_path / "others.packed"
    path.write_bytes(encode(source, dtype))
    types = PackedFile(path).header["types"]
    assert (types["biases"], types["scales"]) == ("int32", "int8")
    monkeypatch.setattr(packing_int8, "_bias_multiples", lambda bias, units: None)
    monkeypatch.setattr(packing_int8, "_scale_indices", lambda scales: None)
    path.write_bytes(encode(source, dtype))
    types = PackedFile(path).header["types"]
    assert (types["biases"], types["scales"]) == ("float32", "float32")
    check_int8(path, *source)


@pytest.mark.parametrize("name", ["float32", "float16", "qmodel", *INT8_VARIANTS])
def test_the_bytes_of_layers_and_kinds_add_up_to_the_file(name, packed):
    sizes = packed_sizes(packed[name])
    assert sizes["bytes"].sum() == packed[name].stat().st_size
    assert sizes["bytes"].min() >= 0
    is_int8 = name in INT8_VARIANTS
    wanted = set(KINDS) - ({"batch_norm"} if is_int8 else {"scales"})
    if name == "qmodel":
        wanted.discard("positions")
    assert set(sizes["kind"]) - {"positions"} == wanted - {"positions"}
    layers = list(dict.fromkeys(sizes["layer"]))
    with torch.device("meta"):
        assert layers == [*prunable_layers(MobileNetV2(width_mult=0.1)), ""]
    assert not sizes.duplicated(["layer", "kind"]).any()


def test_an_empty_layer_takes_next_to_nothing(packed):
    by_layer = packed_sizes(packed["float32"]).query("kind in ('values', 'positions')")
    by_layer = by_layer.groupby("layer")["bytes"].sum()
    layers = dict(zip(by_layer.index, by_layer, strict=True))
    shapes = {
        name: layer.weight for name, layer in prunable_layers(open_weights(packed["float32"]).model).items()
    }
    for index, (name, weight) in enumerate(shapes.items()):
        if weight.numel() > 500:
            bytes_each = layers.get(name, 0) / weight.numel()
            low, high = ((0.0, 0.05), (0.05, 0.3), (0.8, 1.4), (3.2, 4.1))[index % 4]
            assert low <= bytes_each <= high, name


def test_int8_sources_take_no_other_type_and_float_ones_no_int8(packed, tiny_scripted, pruned):
    with pytest.raises(UserError, match="is int8, which --dtype float16 cannot undo"):
        open_source(packed["ptq_per_tensor"], "float16")
    with pytest.raises(UserError, match=r"quantize them with post_training_quantization\.py"):
        open_source(pruned, "int8")
    with pytest.raises(UserError, match="float TorchScript file"):
        open_source(tiny_scripted / "mobilenetv2_float.pt", None)


@pytest.mark.parametrize("name", ["features.0.0.weight", "features.0.1.running_var"])
def test_what_float16_cannot_hold_is_refused(name, tiny_weights):
    weights = open_weights(tiny_weights)
    with torch.no_grad():
        weights.model.state_dict()[name].view(-1)[0] = 7e4
    with pytest.raises(UserError, match=f"{name} has values beyond 65504"):
        encode(weights, "float16")
    weights.model.state_dict()[name].view(-1)[0] = float("nan")
    for dtype in ("float16", "float32"):
        with pytest.raises(UserError, match=name):
            encode(weights, dtype)


def test_weights_are_not_int8_and_int8_is_no_weights(packed):
    with pytest.raises(UserError, match="packed int8 model: weights"):
        open_weights(packed["ptq_per_tensor"])
    with pytest.raises(UserError, match="a qmodel"):
        open_weights(packed["float32"], "qmodel")


def test_what_is_no_packed_file(tmp_path, pruned):
    assert not is_packed(pruned)
    assert not is_packed(tmp_path / "missing")
    for path, message in ((pruned, "not a packed file"), (tmp_path / "missing", "does not exist")):
        with pytest.raises(UserError, match=message):
            packed_sizes(path)


def test_another_version(packed, refused):
    for name in ("float32", "ptq_per_tensor"):
        for version in (1, 4, "3", None, [3]):
            content = rewritten(
                packed[name], lambda header, _, version=version: header.update(format_version=version)
            )
            assert f"has format version {version!r}, this program reads 2 and 3: use" in refused(content)


@pytest.mark.parametrize("name", ["float32", "float16", "qmodel", *INT8_VARIANTS])
def test_files_of_version_2_still_open(name, packed, tmp_path):
    path = tmp_path / "version_2.packed"
    path.write_bytes(as_version_2(packed[name]))
    assert len(PackedFile(path).archive.entries) < len(PackedFile(packed[name]).archive.entries)
    assert_equal_tensors(tensors_of(path), tensors_of(packed[name]))
    assert encode(*open_source(path, None)) == packed[name].read_bytes()


def test_a_foreign_archive(packed, refused):
    content = rewritten(packed["float32"], lambda header, _: header.update(format="something"))
    assert "has format 'something'" in refused(content)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr(HEADER, "{}")
    assert "truncated or damaged" in refused(written.getvalue())


@pytest.mark.parametrize("part", [0.0005, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file(part, packed, refused):
    content = packed["ptq_per_channel"].read_bytes()
    assert "truncated or damaged" in refused(content[: max(int(len(content) * part), 42)])


def test_damage_within_a_stream(packed, refused):
    path = packed["ptq_per_channel"]
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            content = bytearray(path.read_bytes())
            start = entry.header_offset + 30 + len(entry.filename)
            content[start + entry.compress_size // 2] ^= 0xFF
            assert "truncated or damaged" in refused(bytes(content))


@pytest.mark.parametrize("name", ["mask", "values.0", "values.3", "batch_norm.1"])
def test_arrays_of_another_length(name, packed, refused):
    for length in (0, 1, -1, 10):

        def change(_, arrays, length=length):
            arrays[name] = np.resize(arrays[name], max(len(arrays[name]) + length, 1) if length else 0)

        assert "truncated or damaged" in refused(rewritten(packed["float32"], change))


def test_gaps_that_do_not_end_with_the_weights(packed, refused):
    def change(_, arrays):
        arrays["gaps"] = np.append(arrays["gaps"][:-1], [255] * 1000 + [0]).astype(np.uint8)

    assert "truncated or damaged" in refused(rewritten(packed["float32"], change))


def test_not_a_number_is_refused(packed, refused):
    def change(_, arrays):
        for plane in range(4):
            arrays[f"values.{plane}"] = np.full_like(arrays[f"values.{plane}"], 255)

    assert "values holds NaN or infinity" in refused(rewritten(packed["float32"], change))


@pytest.mark.parametrize(
    "architecture",
    [
        {"width_mult": 1e5},
        {"num_classes": 10**9},
        {"num_classes": 10**30},
        {"width_mult": float("nan")},
        {"width_mult": 1e300},
        {"num_classes": "3"},
        {"num_classes": [3]},
        {"depth": 3},
        {"output_stride": 7},
    ],
)
@pytest.mark.parametrize("name", ["float32", "ptq_per_tensor"])
def test_an_architecture_is_not_believed(name, architecture, packed, refused):
    def change(header, _):
        header.get("metadata", header)["architecture"].update(architecture)

    content = rewritten(packed[name], change)
    tracemalloc.start()
    try:
        assert "truncated or damaged" in refused(content)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


HEADER_VALUES = (None, True, -1, 2**70, 1.5, "", "x", [], [1], {}, {"a": 1}, [[[]]])


def mutated(path: Path, random: random.Random) -> tuple[bytes, bool]:
    """A file with one to eight bytes changed, a piece cut, doubled or zeroed, or rewritten with an edited
    header, with streams swapped, missing, added, shortened or lengthened, whose checksums fit.

    Also returned: whether it was rewritten so, in which case nothing tells that it was not packed so.
    """
    content = bytearray(path.read_bytes())
    kind = random.choice(("bits", "bits", "bits", "cut", "piece", "header", "streams"))
    start, length = random.randrange(len(content)), random.randint(1, 200)
    if kind == "bits":
        for _ in range(random.randint(1, 8)):
            content[random.randrange(len(content))] ^= random.randint(1, 255)
    elif kind == "cut":
        del content[start:]
    elif kind == "piece":
        content[start : start + length] = random.choice(
            (b"", bytes(length), content[start : start + length] * 2)
        )
    elif kind == "header":

        def edit(header, _):
            place = random.choice([header, header.get("metadata", header), header["types"]])
            place = random.choice([place, place.get("architecture", place)])
            key = random.choice(list(place))
            place[key] = random.choice(HEADER_VALUES)

        return rewritten(path, edit), True
    else:

        def edit(_, arrays):
            first, second = random.choices(list(arrays), k=2)
            change = random.choice(("swap", "drop", "add", "shorten", "lengthen"))
            if change == "swap":
                arrays[first], arrays[second] = arrays[second], arrays[first]
            elif change == "drop":
                del arrays[first]
            elif change == "add":
                arrays["more"] = arrays[first]
            else:
                size = len(arrays[first])
                arrays[first] = np.resize(
                    arrays[first], size + (length if change == "lengthen" else -min(length, size))
                )

        return rewritten(path, edit), True
    return bytes(content), False


def test_a_thousand_mutated_files_are_refused_or_hold_what_was_packed(packed, tmp_path):
    generator, path, refusals = random.Random(0), tmp_path / "mutated.packed", 0
    files = [packed["float32"], packed["ptq_per_channel"], *(tmp_path / f"version_2_{i}" for i in range(2))]
    for old, new in zip(files[2:], files, strict=False):
        old.write_bytes(as_version_2(new))
    expected = [tensors_of(file) for file in files]
    for index in range(1000):
        content, is_rewritten = mutated(files[index % 4], generator)
        path.write_bytes(content)
        try:
            if not is_packed(path):
                # It is taken for weights then, which have tests of their own.
                raise UserError("other")
            found = tensors_of(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refusals += 1
            continue
        if not is_rewritten:
            assert_equal_tensors(found, expected[index % 4])
    assert refusals > 800


@pytest.mark.parametrize("name", ["float32", "ptq_per_channel"])
def test_whole_models_of_mutated_files(name, packed, tmp_path):
    """The rest of the way, up to a model that runs."""
    generator, path = random.Random(1), tmp_path / "mutated.packed"
    for _ in range(40):
        path.write_bytes(mutated(packed[name], generator)[0])
        try:
            file = open_model(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert file.metadata.parameters > 0


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_stream_that_is_longer_than_the_model_is_not_unpacked(method, packed, refused):
    """A bomb in the place of a stream: 64 MB that take 64 kB."""
    source = zipfile.ZipFile(packed["float32"])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", method) as archive:
        for name in source.namelist():
            archive.writestr(name, bytes(64 * 2**20) if name == "values.0.npy" else source.read(name))
    tracemalloc.start()
    try:
        assert "values.0 has 67108864 bytes" in refused(written.getvalue())
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_the_header_is_first_and_small(packed):
    content = packed["ptq_per_tensor"].read_bytes()
    name_length = struct.unpack_from("<H", content, 26)[0]
    assert content[30 : 30 + name_length] == HEADER.encode()
    file = PackedFile(packed["ptq_per_tensor"])
    assert file.archive.size(HEADER) < 900
    header = packed_sizes(packed["ptq_per_tensor"]).query("kind == 'header'")["bytes"].item()
    assert header < 2500


def test_arrays_that_belong_to_nothing(packed, refused):
    for more in ("more", "checksums", "values", "values.4"):

        def change(_, arrays, more=more):
            arrays[more] = np.zeros(1, np.uint8)

        assert "members that belong to nothing" in refused(rewritten(packed["float32"], change))


@pytest.mark.parametrize("encodings", ["x" * 53, "d" * 52, ["d"] * 54])
def test_other_encodings(packed, refused, encodings):
    def change(header, _):
        header["encodings"] = encodings

    assert "other encodings" in refused(rewritten(packed["float32"], change))


def test_a_type_of_a_stream_that_is_not_there(packed, refused):
    def change(header, _):
        header["types"]["scales"] = "float32"

    assert "other streams" in refused(rewritten(packed["float32"], change))
