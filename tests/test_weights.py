import io
import os
import pickle
import random
import resource
import warnings
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from models import MobileNetV2
from utils.checkpoints.weights import Weights, check_classes, complete, save_weights
from utils.common.errors import UserError
from utils.data.datasets import ImageData, Normalization, Split
from utils.open_weights import open_weights


@pytest.fixture
def content(tiny_weights):
    return torch.load(tiny_weights, weights_only=True)


@pytest.fixture
def refused(tmp_path):
    """Write a file and give the one line with which it is refused."""

    def refuse(content: object, kind: str = "float") -> str:
        path = tmp_path / "bad.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            open_weights(path, kind)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert len(message) < 500
        assert str(path) in message
        return message

    return refuse


def assert_equal_states(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name


def test_round_trip(tmp_path):
    torch.manual_seed(0)
    model = MobileNetV2(num_classes=3, width_mult=0.25, dropout=0.3, output_stride=8)
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
        model.features[3].conv[0][0].weight[:, ::2] = 0
    written = Weights(
        model,
        class_names=("a", "b", "ç"),
        normalization=Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        image_size=48,
        metrics={"val_accuracy_pct": np.float64(81.5), "history": (1, 2)},
    )
    save_weights(tmp_path / "w.pth", written, Namespace(lr=0.1, output=Path("w.pth")))
    read = open_weights(tmp_path / "w.pth")
    assert read.kind == "float"
    assert read.model.architecture == model.architecture
    assert read.model.architecture == {
        "num_classes": 3,
        "width_mult": 0.25,
        "dropout": 0.3,
        "output_stride": 8,
    }
    assert_equal_states(read.model.state_dict(), model.state_dict())
    assert (read.class_names, read.normalization, read.image_size) == (
        written.class_names,
        written.normalization,
        48,
    )
    assert read.metrics == {"val_accuracy_pct": 81.5, "history": [1, 2]}
    assert not read.model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in read.model.parameters())
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(read.model(images), model.eval()(images))


def test_the_file_says_how_it_was_made(tmp_path):
    save_weights(
        tmp_path / "w.pth", Weights(MobileNetV2(width_mult=0.1)), Namespace(lr=0.1, output=Path("w"))
    )
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert content["arguments"] == {"lr": 0.1, "output": "w"}
    assert content["versions"]["torch"] == torch.__version__
    assert type(content["versions"]["torch"]) is str


def test_channels_last_weights_come_back_the_same(tmp_path):
    model = MobileNetV2(width_mult=0.1).to(memory_format=torch.channels_last)
    save_weights(tmp_path / "w.pth", Weights(model), Namespace())
    assert_equal_states(open_weights(tmp_path / "w.pth").model.state_dict(), model.state_dict())


def test_the_output_stride_can_be_another(tiny_weights):
    own, other = open_weights(tiny_weights), open_weights(tiny_weights, output_stride=8)
    assert own.model.architecture["output_stride"] == 32
    assert other.model.architecture["output_stride"] == 8
    assert_equal_states(other.model.state_dict(), own.model.state_dict())
    with torch.inference_mode():
        assert other.model.features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)


@pytest.mark.parametrize(("num_classes", "width_mult"), [(10, 1.0), (3, 0.1), (1000, 1.4)])
def test_a_bare_state_dict_of_torchvisions_loads(tmp_path, num_classes, width_mult):
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=num_classes, width_mult=width_mult).eval()
    torch.save(theirs.state_dict(), tmp_path / "bare.pth")
    read = open_weights(tmp_path / "bare.pth", output_stride=32)
    assert (read.kind, read.class_names, read.normalization) == ("float", None, None)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(read.model(images), theirs(images))


def test_a_bare_state_dict_of_the_old_file_format_loads(tmp_path, capfd):
    model = MobileNetV2(num_classes=4, width_mult=0.1)
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = open_weights(tmp_path / "old.pth")
    assert_equal_states(read.model.state_dict(), model.state_dict())
    assert read.model.architecture["output_stride"] == 16
    noted = capfd.readouterr().err
    assert noted.count("\n") == 1
    assert "16 is assumed (--output_stride)" in noted
    open_weights(tmp_path / "old.pth", output_stride=32)
    assert capfd.readouterr().err == ""


def test_a_missing_file_is_named(refused):
    assert "does not exist" in refused(None)


def test_a_folder_is_no_weights_file(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        open_weights(tmp_path)


def test_an_empty_file(refused):
    assert "truncated, damaged or not a weights file" in refused(b"")


@pytest.mark.parametrize("kept", [0.0001, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_file(refused, tiny_weights, kept):
    whole = tiny_weights.read_bytes()
    assert "truncated" in refused(whole[: int(kept * len(whole))])


def test_a_file_without_its_last_byte(refused, tiny_weights):
    assert "truncated" in refused(tiny_weights.read_bytes()[:-1])


def test_damaged_files_are_refused_or_hold_what_was_written(tmp_path, tiny_weights):
    whole, generator, refusals = tiny_weights.read_bytes(), random.Random(0), 0
    expected = open_weights(tiny_weights)
    path = tmp_path / "damaged.pth"
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 8)):
            damaged[generator.randrange(len(damaged))] ^= generator.randint(1, 255)
        path.write_bytes(damaged)
        try:
            read = open_weights(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refusals += 1
        else:
            assert_equal_states(read.model.state_dict(), expected.model.state_dict())
    assert refusals > 90


def test_one_flipped_bit_of_a_weight_is_noticed(refused, tiny_weights, content):
    whole = bytearray(tiny_weights.read_bytes())
    place = whole.index(content["state_dict"]["features.18.0.weight"].numpy().tobytes()[:64])
    whole[place + 1] ^= 1
    assert "damaged (a checksum is wrong)" in refused(bytes(whole))


@pytest.mark.parametrize(
    "noise",
    [
        random.Random(0).randbytes(10_000),
        random.Random(1).randbytes(3),
        b"layer,sparsity\nfeatures.0.0,1.0\n",
        b"hello\n" * 100,
        "é".encode() * 50,
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"PK\x05\x06" + bytes(18),
        pickle.dumps({"a": 1}),
    ],
    ids=["random", "random short", "csv", "text", "utf-8", "png", "empty zip", "plain pickle"],
)
def test_files_of_other_kinds(refused, noise):
    assert "not a weights file" in refused(noise)


def test_a_zip_archive_of_something_else(refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not a weights file" in refused(buffer.getvalue())


class Bomb:
    """Pickled as a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["alone", "in metrics"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, content, zipped, place):
    path, evidence = tmp_path / "bomb.pth", tmp_path / "the code ran"
    bomb = Bomb(evidence)
    torch.save(
        bomb if place == "alone" else {**content, "metrics": {"x": bomb}},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match="could run code"):
        open_weights(path)
    assert not evidence.exists()
    torch.load(path, weights_only=False)
    assert evidence.exists()  # the file was a bomb indeed


def test_a_whole_pickled_model_is_not_opened(refused):
    assert "could run code: save its state_dict" in refused(MobileNetV2(width_mult=0.1))


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), "text"], ids=["list", "tensor", "str"])
def test_what_is_no_dictionary(refused, value):
    assert f"holds a {type(value).__name__}, not weights" in refused(value)


def test_another_architecture(refused):
    for make in (torchvision.models.resnet18, torchvision.models.mobilenet_v3_small):
        assert "is not a MobileNetV2" in refused(make(num_classes=3).state_dict())
    assert "it is empty" in refused({})


def test_a_bare_state_dict_with_a_layer_missing_or_reshaped(refused):
    state = MobileNetV2(num_classes=3, width_mult=0.1).state_dict()
    missing = {name: value for name, value in state.items() if name != "features.5.conv.1.0.weight"}
    assert "is not a MobileNetV2: its tensors have other shapes" in refused(missing)
    reshaped = {**state, "features.5.conv.1.0.weight": torch.zeros(7)}
    assert "is not a MobileNetV2: its tensors have other shapes" in refused(reshaped)


def test_the_checkpoint_of_an_unfinished_run(refused, content):
    assert "checkpoint of an unfinished run" in refused({**content, "format": "mobilenetv2-checkpoint"})


def test_a_torchscript_file(refused, tmp_path):
    path = tmp_path / "bad.pth"
    torch.jit.trace(MobileNetV2(width_mult=0.1).eval(), torch.zeros(1, 3, 32, 32)).save(str(path))
    assert "is a TorchScript file" in refused(None)


def test_a_qmodel_where_weights_are_wanted_and_the_reverse(refused, content):
    message = refused({**content, "kind": "qmodel"}, kind="float")
    assert "is a qmodel (written by scripts/to_qmodel_weights.py), float weights" in message
    assert "is float weights (dense or pruned), a qmodel" in refused(content, kind="qmodel")
    bare = refused(content["state_dict"], kind="qmodel")
    assert "bare state_dict" in bare
    assert "convert it first" in bare


@pytest.mark.parametrize("version", [2, 99, None, "1"])
def test_another_format_version(refused, content, version):
    assert f"format version {version!r}, this program reads 1" in refused(
        {**content, "format_version": version}
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(refused, content, value):
    content["state_dict"]["features.2.conv.0.0.weight"][0, 0] = value
    assert "holds NaN or infinity in features.2.conv.0.0.weight" in refused(content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.complex64])
def test_wrong_dtypes(refused, content, dtype):
    state = content["state_dict"]
    state["classifier.1.bias"] = state["classifier.1.bias"].to(dtype)
    assert f"classifier.1.bias is {dtype}" in refused(content)


def test_a_tensor_without_values(refused, content):
    state = content["state_dict"]
    state["classifier.1.weight"] = state["classifier.1.weight"].to("meta")
    assert "classifier.1.weight is torch.float32 (torch.strided, meta)" in refused(content)


def test_a_tensor_larger_than_its_memory(refused, content):
    content["state_dict"]["classifier.1.weight"] = torch.zeros(1).expand(3, 1280)
    assert "classifier.1.weight is larger than its memory in the file" in refused(content)
    content["state_dict"]["classifier.1.weight"] = torch.zeros(1).expand(20000, 20000)
    assert "classifier.1.weight has the shape [20000, 20000], not [3, 1280]" in refused(content)


def test_a_negative_variance(refused, content):
    content["state_dict"]["features.3.conv.1.1.running_var"][2] = -1.0
    assert "holds a negative variance in features.3.conv.1.1.running_var" in refused(content)


def in_itself() -> list:
    metrics: list = []
    metrics.append(metrics)
    return metrics


def laughs() -> list:
    """A list of 100 lists of 100 lists …, which are all the same one: some hundred bytes, 10**14 values."""
    value = [0] * 100
    for _ in range(6):
        value = [value] * 100
    return value


@pytest.mark.parametrize("key", ["format", "format_version", "kind"])
@pytest.mark.parametrize(
    "value", [laughs(), torch.tensor([1, 2]), "x" * 10**5], ids=["list", "tensor", "text"]
)
def test_what_says_what_a_file_is_has_a_type(refused, content, key, value):
    refused({**content, key: value})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("metrics", {"best": torch.float32}, "its metadata holds a dtype"),
        ("metrics", {"best": torch.zeros(1)}, "its metadata holds a Tensor"),
        ("metrics", {"loss": float("nan")}, "its metadata holds nan"),
        ("metrics", {"loss": in_itself()}, "nested too deeply"),
        ("metrics", {"loss": laughs()}, "too large"),
        ("metrics", {"note": "x" * 10_001}, "a text of 10001 characters"),
        ("metrics", {"seed": 2**64}, "its metadata holds a int"),
        ("metrics", {1: 2}, "values by name"),
        ("metrics", [["a", 1]], "values by name"),
        ("class_names", ["a", "b"], "names 2 classes for 3 outputs"),
        ("class_names", [1, 2, 3], "the class names are not texts"),
        ("image_size", 4096, "image_size 4096"),
        ("image_size", True, "image_size True"),
        ("image_size", torch.tensor(32), "image_size a Tensor"),
        ("normalization", {"mean": [0.5] * 3, "std": [0.2, 0, 0.2]}, "three positive"),
        ("normalization", {"mean": [0.5] * 3, "std": [0.2, -0.2, 0.2]}, "three positive"),
        ("normalization", {"mean": [0.5] * 3, "std": [1e-300] * 3}, "three positive"),
        ("normalization", {"mean": [1e300] * 3, "std": [0.2] * 3}, "three positive"),
        ("normalization", {"mean": "0.5", "std": "0.2"}, "is not numbers"),
        ("normalization", {}, "'mean'"),
        ("class_names", [], "names 0 classes for 3 outputs"),
        ("class_names", "abc", "the class names are not texts"),
        ("normalization", {"mean": [0.5] * 3, "std": [torch.tensor(0.2)] * 3}, "its metadata holds a Tensor"),
        ("architecture", {"num_classes": 3, "dropout": torch.tensor(0.2)}, "the architecture has 'dropout'"),
        ("architecture", {"num_classes": 10**9}, "the architecture has 'num_classes'"),
        ("architecture", {"num_classes": 3, "width_mult": 1e9}, "the architecture has 'width_mult'"),
        ("architecture", {"num_classes": laughs()}, "the architecture has 'num_classes' a list"),
        ("architecture", {"num_classes": 3.0}, "the architecture has 'num_classes' 3.0"),
        ("architecture", {"num_classes": 3, (1, 2): 1}, "the architecture has a tuple 1"),
        ("architecture", [3], "the architecture is a list"),
        ("architecture", {"width_mult": 1.0}, "the architecture has no num_classes"),
        ("state_dict", [1], "its state_dict is a list"),
    ],
)
def test_metadata_of_the_wrong_type_or_size(refused, content, key, value, says):
    assert says in refused({**content, key: value})


@pytest.mark.parametrize("classes", [0, 10**6, 2**50])
def test_a_bare_state_dict_of_no_or_very_many_classes(refused, content, classes):
    state = content["state_dict"]
    # On "meta" they need no memory in the file.
    state["classifier.1.weight"] = torch.empty(classes, 1280, device="meta")
    assert f"is not a MobileNetV2: it has {classes} classes" in refused(state)
    if classes:
        state["classifier.1.weight"] = torch.zeros(1).expand(classes, 1280)
        assert "classifier.1.weight is larger than its memory" in refused(state)


def long(number: int) -> bytes:
    return b"\x8a\x08" + number.to_bytes(8, "little")


def hex_of_hex(times: int) -> bytes:
    """Each call of it doubles the text."""
    text = b"X\x40\x00\x00\x00" + b"a" * 64 + b"X\x06\x00\x00\x00latin1\x86R"
    return b"c_codecs\nencode\n" * (times + 1) + text + b"X\x03\x00\x00\x00hex\x86R" * times


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize(
    "bomb",
    [
        b"cbuiltins\nbytearray\n" + long(10**9) + b"\x85R",
        b"ctorch\nTensor\n" + long(10**9) + b"\x85R",
        b"ctorch.storage\nUntypedStorage\n" + long(10**9) + b"\x85R",
        hex_of_hex(25),
    ],
    ids=["bytearray", "tensor", "storage", "codec"],
)
def test_a_pickle_that_would_fill_the_memory(refused, tmp_path, bomb, zipped):
    """torch.load knows what it names, and would call it."""
    marker = {"format": "here"}
    torch.save(marker, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    place = b"X\x04\x00\x00\x00here"
    whole = (tmp_path / "whole.pth").read_bytes()
    if zipped:
        archive, packed = zipfile.ZipFile(io.BytesIO(whole)), io.BytesIO()
        with zipfile.ZipFile(packed, "w") as target:
            for name in archive.namelist():
                target.writestr(name, archive.read(name).replace(place, bomb))
        bombed = packed.getvalue()
    else:
        bombed = whole.replace(place, bomb)
    assert bomb in bombed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "could run code" in refused(bombed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("second", ["data.pkl", "DATA.PKL"])
def test_an_archive_with_two_members_of_one_name(refused, tiny_weights, second):
    """torch could read another one than was checked."""
    whole = io.BytesIO(tiny_weights.read_bytes())
    with warnings.catch_warnings(), zipfile.ZipFile(whole, "a") as archive:
        warnings.simplefilter("ignore")
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        archive.writestr(name.replace("data.pkl", second), archive.read(name))
    assert "damaged" in refused(whole.getvalue())


def test_a_compressed_archive_is_not_unpacked(refused, tiny_weights):
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(tiny_weights) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name) + bytes(2**20))
    assert "is a compressed archive" in refused(buffer.getvalue())


def test_a_normalization_that_the_file_lacks_can_be_given(tmp_path, capsys):
    torch.save(MobileNetV2(num_classes=2, width_mult=0.1).state_dict(), tmp_path / "bare.pth")
    weights = open_weights(tmp_path / "bare.pth", output_stride=32)
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    given = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    data = ImageData(split, split, split, ("a", "b"), given)
    assert complete("bare.pth", weights, data).normalization == given
    assert capsys.readouterr().err == ""
    complete("bare.pth", weights, replace(data, normalization=None))
    assert "does not say its normalization" in capsys.readouterr().err
    own = replace(weights, normalization=Normalization((0.1, 0.1, 0.1), (0.25, 0.25, 0.25)))
    with pytest.raises(UserError, match="another normalization than --normalization"):
        complete("bare.pth", own, data)


def test_a_sparse_tensor(refused, content):
    state = content["state_dict"]
    state["classifier.1.weight"] = state["classifier.1.weight"].to_sparse()
    assert "contains more than dense tensors" in refused(content)


def test_tensors_that_share_memory_in_the_file_do_not_in_the_model(tmp_path, content):
    ones = torch.ones(2**20)
    for name, value in content["state_dict"].items():
        if value.is_floating_point():
            content["state_dict"][name] = ones[: value.numel()].view(value.shape)
    torch.save(content, tmp_path / "shared.pth")
    model = open_weights(tmp_path / "shared.pth").model
    with torch.no_grad():
        model.classifier[1].weight.mul_(2)
    assert torch.equal(model.classifier[1].weight, torch.full((3, 1280), 2.0))
    assert torch.equal(model.classifier[1].bias, torch.ones(3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", {"num_classes": 3, "width_mult": 0.25, "output_stride": 32}),
        ("architecture", {"num_classes": 4, "width_mult": 0.1}),
        ("architecture", {"num_classes": 3, "width_mult": 1e9}),
        ("architecture", {"num_classes": 3, "width_mult": float("inf")}),
        ("architecture", {"num_classes": 3, "width_mult": float("nan")}),
        ("architecture", {"num_classes": 3, "width_mult": "wide"}),
        ("architecture", {"num_classes": 3, "width_mult": 0.1, "output_stride": 5}),
        ("architecture", {"num_classes": 3, "width_mult": 0.1, "depth": 3}),
        ("architecture", None),
        ("state_dict", None),
        ("state_dict", []),
        ("state_dict", {"classifier.1.weight": 3}),
        ("normalization", {"mean": [0.5], "std": [0.2]}),
        ("normalization", {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.0, 0.2]}),
        ("normalization", {"mean": [0.5, 0.5, float("nan")], "std": [0.2, 0.2, 0.2]}),
        ("normalization", {"mean": [0.5, 0.5, 0.5]}),
        ("normalization", "imagenet"),
        ("image_size", 0),
        ("image_size", 10**9),
        ("image_size", None),
        ("class_names", 3),
    ],
)
def test_contents_that_do_not_fit(refused, content, key, value):
    assert "does not fit MobileNetV2" in refused({**content, key: value})


@pytest.mark.parametrize("kind", [None, "int8", ["float"]])
def test_an_unknown_kind(refused, content, kind):
    assert "unknown kind" in refused({**content, "kind": kind})


def test_more_names_than_classes(refused, content):
    assert "names 2 classes for 3 outputs" in refused({**content, "class_names": ["a", "b"]})


def images_of(*class_names: str) -> ImageData:
    empty = Split(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    return ImageData(empty, empty, empty, class_names)


def test_classes_that_are_those_of_the_images():
    check_classes("w.pth", ("cat", "dog"), 2, images_of("cat", "dog"))
    check_classes("w.pth", None, 2, images_of("cat", "dog"))


def test_another_number_of_classes():
    with pytest.raises(UserError, match=r"w\.pth has 10 classes, the images have 2"):
        check_classes("w.pth", None, 10, images_of("cat", "dog"))


def test_other_class_names_or_another_order():
    with pytest.raises(UserError, match=r"w\.pth has 'dog' as class 1, the images have 'horse'"):
        check_classes("w.pth", ("cat", "dog"), 2, images_of("cat", "horse"))
    with pytest.raises(UserError, match=r"w\.pth has 'dog' as class 0, the images have 'cat'"):
        check_classes("w.pth", ("dog", "cat"), 2, images_of("cat", "dog"))


def prefixed(prefix):
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


def pruned_by_torch(state):
    mask = (torch.arange(3 * 1280) % 2 == 0).view(3, 1280)
    state["classifier.1.weight"].mul_(mask)
    kept = {name: value for name, value in state.items() if name != "classifier.1.weight"}
    return {
        **kept,
        "classifier.1.weight_orig": state["classifier.1.weight"] + 5.0 * ~mask,
        "classifier.1.weight_mask": mask.float(),
    }


@pytest.mark.parametrize(
    ("wrapped", "says"),
    [
        (lambda state: {"net": state, "acc": 94.4, "epoch": 3}, "took 'net'"),
        (lambda state: {"state_dict": state, "optimizer": {"lr": 1}}, "took 'state_dict'"),
        (lambda state: {"model": {}, "model_ema": state}, "took 'model_ema' (averaged weights)"),
        (lambda state: {"model": prefixed("module.")(state)}, "took 'model'; removed the prefix 'module.'"),
        (prefixed("module."), "removed the prefix 'module.'"),
        (prefixed("_orig_mod.module."), "removed the prefix '_orig_mod.module.'"),
        (lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.")(state)}, "ignored n_averaged"),
        (pruned_by_torch, "multiplied weights by their masks"),
        (lambda state: {**state, "features.0.total_ops": torch.zeros(1)}, "ignored features.0.total_ops"),
        (lambda state: {**state, "epoch": 3}, "ignored epoch"),
        (lambda state: {n: v for n, v in state.items() if "num_batches" not in n}, ""),
        (lambda state: {n: v.double() if v.is_floating_point() else v for n, v in state.items()}, "float64"),
    ],
)
def test_other_peoples_checkpoints(tmp_path, capsys, wrapped, says):
    torch.manual_seed(0)
    model = MobileNetV2(num_classes=3, width_mult=0.6).eval()
    torch.save(wrapped(model.state_dict()), tmp_path / "theirs.pth")
    read = open_weights(tmp_path / "theirs.pth", output_stride=16)
    assert read.model.architecture["width_mult"] == 0.6
    assert_equal_states(read.model.state_dict(), model.state_dict())
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == bool(says)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_fewer_bits_are_converted(tmp_path, capsys, dtype):
    model = MobileNetV2(num_classes=3, width_mult=0.1).to(dtype)
    torch.save(model.state_dict(), tmp_path / "half.pth")
    read = open_weights(tmp_path / "half.pth", output_stride=16)
    assert_equal_states(read.model.state_dict(), model.float().state_dict())
    assert f"converted {dtype} to float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"conv_stem.weight": torch.zeros(1)}, "timm"),
        ({"features.0.0.scale": torch.zeros(1), "x._packed_params": torch.zeros(1)}, "quantized model"),
        ({"a": 1, "b": 2}, "it holds a, b"),
        ({}, "it is empty"),
    ],
)
def test_what_is_refused_is_named(refused, content, says):
    assert says in refused(content)


def test_a_safetensors_file_names_the_package_that_reads_it(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(20))
    with pytest.raises(UserError, match=r"pip install safetensors|is no safetensors file"):
        open_weights(tmp_path / "a.safetensors")


def test_a_dictionary_that_holds_itself_is_refused(refused):
    content: dict = {}
    content["model"] = content
    assert "is not a MobileNetV2" in refused(content)
