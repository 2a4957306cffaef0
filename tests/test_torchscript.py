import io
import json
import random
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
from utils.data.loader import Batches
from utils.deployment.torchscript import (
    METADATA_FILE,
    float_forms,
    pack_torchscript,
    save_torchscript,
    to_torchscript,
)
from utils.deployment.torchscript_reader import read_torchscript
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
    parameters=100,
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
    batches = Batches(data.train, weights.normalization, 54)
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


def test_equal_models_give_equal_files_that_name_no_place(scripted, content):
    assert pack_torchscript(scripted, METADATA) == content
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
    assert "made for the quantization engine tpu, which this machine does not run" in message
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
    ],
    ids=str,
)
def test_metadata_of_another_make(refused, content, changes):
    assert "metadata that cannot be read" in refused(with_metadata(content, **changes))


def test_metadata_that_is_missing_or_no_json(refused, content):
    def change(name, entry):
        return b"{" if name == f"extra/{METADATA_FILE}" else entry

    assert "metadata that cannot be read" in refused(repacked(content, change))


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
