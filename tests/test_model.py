import pytest
import torch
import torchvision

from models import MobileNetV2
from models.statistics import count_macs

PARAMETERS = 2_236_682
# The last map is 1x1, 2x2 and 4x4 for images of 32x32.
MACS = {32: 6_124_928, 16: 24_461_312, 8: 87_976_448}


def torchvision_model(num_classes=10, width_mult=1.0):
    return torchvision.models.mobilenet_v2(num_classes=num_classes, width_mult=width_mult, dropout=0.2)


def with_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose batch norms are not trivial and whose outputs tell images apart."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
        model.classifier[1].weight.normal_()
        model.train()(torch.randn(16, 3, 64, 64))
    return model.eval()


def shapes(model):
    return [(name, tuple(value.shape), value.dtype) for name, value in model.state_dict().items()]


def test_parameters_are_the_published_number():
    assert sum(p.numel() for p in MobileNetV2(num_classes=10).parameters()) == PARAMETERS


@pytest.mark.parametrize("width_mult", [0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_state_dict_has_torchvisions_keys_and_shapes_in_its_order(width_mult, num_classes):
    with torch.device("meta"):
        ours = MobileNetV2(num_classes, width_mult)
        theirs = torchvision_model(num_classes, width_mult)
    assert shapes(ours) == shapes(theirs)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize(("width_mult", "size"), [(1.0, 32), (1.0, 64), (0.35, 96), (1.4, 33)])
def test_outputs_equal_torchvisions_at_output_stride_32(width_mult, size):
    torch.manual_seed(0)
    theirs = with_statistics(torchvision_model(7, width_mult))
    ours = MobileNetV2(7, width_mult, output_stride=32).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).min() > 0.1


def test_gradients_equal_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision_model(5, 0.25).train()
    ours = MobileNetV2(5, 0.25, output_stride=32).train()
    ours.load_state_dict(theirs.state_dict())
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for model in (theirs, ours):
        torch.manual_seed(1)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name].grad)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name])


@pytest.mark.parametrize(("output_stride", "side"), [(32, 1), (16, 2), (8, 4)])
def test_output_stride_sets_the_last_map_and_not_the_weights(output_stride, side):
    model = MobileNetV2(output_stride=output_stride, width_mult=0.25).eval()
    with torch.inference_mode():
        assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, side, side)
        assert model.features(torch.zeros(1, 3, 64, 96)).shape == (1, 1280, 2 * side, 3 * side)
    assert shapes(model) == shapes(MobileNetV2(output_stride=32, width_mult=0.25))


@pytest.mark.parametrize("to", [8, 16, 32])
def test_a_changed_output_stride_equals_a_model_built_with_it(to):
    torch.manual_seed(0)
    model = with_statistics(MobileNetV2(4, 0.25, output_stride=16))
    built = MobileNetV2(4, 0.25, output_stride=to).eval()
    built.load_state_dict(model.state_dict())
    model.set_output_stride(to)
    assert model.architecture == built.architecture
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), built(images), rtol=1e-5, atol=1e-5)


def counted_by_hand(output_stride: int, image_size: int, num_classes: int) -> int:
    """Multiply-adds from the paper's table alone: channels written out, sizes divided by strides."""
    stem, stage_24 = {32: (2, 2), 16: (1, 2), 8: (1, 1)}[output_stride]
    # (channels in, expansion, channels out, stride) of the 17 bottlenecks.
    blocks = [(32, 1, 16, 1), (16, 6, 24, stage_24), (24, 6, 24, 1), (24, 6, 32, 2)]
    blocks += [(32, 6, 32, 1)] * 2 + [(32, 6, 64, 2)] + [(64, 6, 64, 1)] * 3 + [(64, 6, 96, 1)]
    blocks += [(96, 6, 96, 1)] * 2 + [(96, 6, 160, 2)] + [(160, 6, 160, 1)] * 2 + [(160, 6, 320, 1)]
    area = (image_size // stem) ** 2
    total = area * 3 * 9 * 32
    for channels_in, expansion, channels_out, stride in blocks:
        hidden = channels_in * expansion
        if expansion > 1:
            total += area * channels_in * hidden
        area //= stride**2
        total += area * 9 * hidden + area * hidden * channels_out
    return total + area * 320 * 1280 + 1280 * num_classes


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_macs_equal_the_paper_tables_count(output_stride):
    macs = count_macs(MobileNetV2(output_stride=output_stride), image_size=32)
    assert len(macs) == 53
    assert sum(macs.values()) == counted_by_hand(output_stride, 32, 10) == MACS[output_stride]


def test_macs_at_imagenet_size_are_the_papers_300_million():
    with torch.device("meta"):
        model = MobileNetV2(1000, output_stride=32)
    assert counted_by_hand(32, 224, 1000) == 300_774_272
    with torch.device("meta"):
        images = torch.zeros(1, 3, 224, 224)
        assert model(images).shape == (1, 1000)


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_stride": 4},
        {"width_mult": 0.0},
        {"width_mult": -1.0},
        {"num_classes": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        MobileNetV2(**arguments)
