import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from models import ResNet18
from models.statistics import count_macs


def torchvisions_with_a_small_stem() -> nn.Module:
    model = resnet18(num_classes=7)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    return model


def test_outputs_equal_torchvisions_at_output_stride_32():
    torch.manual_seed(0)
    theirs = torchvisions_with_a_small_stem().train()
    theirs(torch.randn(8, 3, 64, 64))
    ours = ResNet18(7, output_stride=32)
    state = theirs.eval().state_dict()
    ours.load_state_dict({name.replace("fc.", "fc.1."): value for name, value in state.items()})
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs(images))


@pytest.mark.parametrize("output_stride", [32, 16, 8])
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
