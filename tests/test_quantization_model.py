from argparse import Namespace

import pytest
import torch
import torchvision
from torch import nn

from models import MobileNetV2, MobileNetV2Quantization
from models.folding import fold_batch_norms
from utils.checkpoints.weights import Weights, save_weights
from utils.open_weights import open_weights


def float_model(**kwargs) -> MobileNetV2:
    """With batch-norm statistics and scales that are not trivial, and activations beyond 6."""
    torch.manual_seed(0)
    model = MobileNetV2(num_classes=5, width_mult=0.25, **kwargs).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 3.0)
                module.bias.uniform_(-1.0, 3.0)
        for _ in range(5):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_close_logits(logits, expected):
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_state_dict_is_torchvisions():
    theirs = torchvision.models.mobilenet_v2(num_classes=10).state_dict()
    ours = MobileNetV2Quantization().state_dict()
    assert [(name, value.shape) for name, value in ours.items()] == [
        (name, value.shape) for name, value in theirs.items()
    ]
    assert sum(p.numel() for p in MobileNetV2Quantization().parameters()) == 2_236_682


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_float_outputs_are_mobilenetv2s(images, output_stride):
    model = float_model(output_stride=output_stride)
    quantizable = MobileNetV2Quantization.from_float(model)
    assert quantizable.architecture == model.architecture
    assert not quantizable.training
    with torch.no_grad():
        assert torch.equal(quantizable(images), model(images))


def test_from_float_shares_no_memory():
    model = float_model()
    quantizable = MobileNetV2Quantization.from_float(model)
    nn.init.zeros_(quantizable.classifier[1].weight)
    assert model.classifier[1].weight.abs().sum() > 0


@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("is_training", [True, False], ids=["train mode", "eval mode"])
def test_folded_outputs_are_the_same(images, output_stride, is_training):
    model = float_model(output_stride=output_stride)
    folded = fold_batch_norms(MobileNetV2Quantization.from_float(model).train(is_training))
    assert not folded.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        assert_close_logits(folded(images), model(images))


@pytest.mark.parametrize("is_training", [True, False], ids=["train mode", "eval mode"])
def test_outputs_fused_for_training_are_the_same(images, is_training):
    model = float_model(dropout=0.0)
    fused = MobileNetV2Quantization.from_float(model).train(is_training)
    fused.fuse_for_qat()
    assert fused.training == is_training
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 52
    with torch.no_grad():
        assert_close_logits(fused(images), model.train(is_training)(images))


def test_folding_twice_changes_nothing(images):
    once = fold_batch_norms(MobileNetV2Quantization.from_float(float_model()))
    with torch.no_grad():
        assert torch.equal(fold_batch_norms(once)(images), once(images))


def test_folding_leaves_the_model_as_it_was(images):
    model = MobileNetV2Quantization.from_float(float_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold_batch_norms(model)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fuse", [None, "fold", "fuse"], ids=["unfused", "folded", "fused for training"])
def test_relu6_stays_relu6(images, fuse):
    model = MobileNetV2Quantization.from_float(float_model())
    if fuse == "fold":
        model = fold_batch_norms(model)
    elif fuse == "fuse":
        model.fuse_for_qat()
    clamps = [m for m in model.modules() if isinstance(m, nn.ReLU6)]
    assert len(clamps) == 35
    assert not any(type(m) is nn.ReLU for m in model.modules())
    largest = []
    for clamp in clamps:
        clamp.register_forward_hook(lambda _m, _i, output: largest.append(output.max().item()))
    with torch.no_grad():
        model.eval()(images)
    assert max(largest) == 6.0
    assert sum(value == 6.0 for value in largest) > 20


def test_a_qmodel_file_comes_back_as_the_same_model(tmp_path, images):
    model = MobileNetV2Quantization.from_float(float_model(output_stride=8))
    save_weights(tmp_path / "qmodel.pth", Weights(model, kind="qmodel"), Namespace())
    read = open_weights(tmp_path / "qmodel.pth", "qmodel").model
    assert type(read) is MobileNetV2Quantization
    with torch.no_grad():
        assert torch.equal(read(images), model(images))
