from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from models import ResNet18
from models.mobilenetv2 import OUTPUT_STRIDES
from models.statistics import count_macs


def torchvisions(output_stride: int) -> nn.Module:
    model = resnet18(num_classes=7, zero_init_residual=True)
    model.conv1 = nn.Conv2d(3, 64, 3, 2 if output_stride == 32 else 1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if output_stride == 8:
        model.maxpool = nn.Identity()
    return model


def as_ours(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of torchvision's model under our names."""
    return {name.replace("fc.", "fc.1."): value for name, value in tensors}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
def test_outputs_and_gradients_equal_torchvisions(output_stride):
    torch.manual_seed(0)
    theirs, ours = torchvisions(output_stride), ResNet18(7, dropout=0.0, output_stride=output_stride)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            # As initialized, no gradient reaches the first convolution of a block.
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    ours.load_state_dict(as_ours(theirs.state_dict().items()))
    images, weights = torch.randn(4, 3, 32, 32), torch.randn(4, 7)
    for model in (ours, theirs):
        (model.train()(images) * weights).sum().backward()
    torch.testing.assert_close(gradients(ours), as_ours(gradients(theirs).items()))
    torch.testing.assert_close(ours.state_dict(), as_ours(theirs.state_dict().items()))
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_a_seed_draws_torchvisions_weights():
    torch.manual_seed(0)
    theirs = as_ours(torchvisions(16).state_dict().items())
    torch.manual_seed(0)
    ours = ResNet18(7).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
def test_macs_equal_the_count_by_hand(output_stride):
    side = {32: 16, 16: 32, 8: 32}[output_stride]
    expected = side**2 * 9 * 3 * 64
    side //= 1 if output_stride == 8 else 2
    expected += 4 * side**2 * 9 * 64 * 64
    for channels in (128, 256, 512):
        side //= 2
        narrow, wide = channels // 2, channels
        expected += side**2 * (9 * narrow * wide + 3 * 9 * wide * wide + narrow * wide)
    assert sum(count_macs(ResNet18(10, output_stride=output_stride), 32).values()) == expected + 512 * 10


def test_the_weights_do_not_depend_on_the_output_stride():
    torch.manual_seed(0)
    model, built = ResNet18(output_stride=32).eval(), ResNet18(output_stride=8).eval()
    built.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        coarse, fine = model(images), built(images)
        model.set_output_stride(8)
        assert torch.equal(model(images), fine)
        model.set_output_stride(32)
        assert torch.equal(model(images), coarse)
    assert not torch.allclose(coarse, fine)
    assert model.architecture == {"num_classes": 10, "dropout": 0.2, "output_stride": 32}


def test_each_block_starts_as_its_shortcut():
    model = ResNet18()
    assert not any(block.bn2.weight.any() for block in (*model.layer1, *model.layer4))


@pytest.mark.parametrize("arguments", [{"output_stride": 4}, {"num_classes": 0}, {"dropout": 1.0}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        ResNet18(**arguments)
