import pytest
import torch
from torch import nn

from models import MobileNetV2
from models.statistics import count_macs, model_statistics, prunable_layers


def test_prunable_layers_are_all_convolutions_and_linears_in_forward_order():
    model = MobileNetV2(output_stride=32).eval()
    order = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(torch.zeros(1, 3, 32, 32))
    assert list(prunable_layers(model)) == order
    assert len(order) == 53
    assert order[0] == "features.0.0"
    assert order[-1] == "classifier.1"


def test_macs_of_layers_with_groups_strides_and_padding():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16x16 outputs of 27 weights, 8 channels
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),  # 16x16 outputs of 9 weights, 8 channels
        nn.Conv2d(8, 12, 1, groups=4),  # 16x16 outputs of 2 weights, 12 channels
        nn.Flatten(),
        nn.Linear(12 * 256, 5),
    )
    assert count_macs(model, image_size=32) == {
        "0": 256 * 8 * 27,
        "1": 256 * 8 * 9,
        "2": 256 * 12 * 2,
        "4": 12 * 256 * 5,
    }


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was(training):
    model = MobileNetV2(width_mult=0.1, output_stride=32).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, image_size=32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_of_the_published_model():
    statistics = model_statistics(MobileNetV2(output_stride=16), image_size=32)
    assert statistics.parameters == 2_236_682
    assert f"{statistics.dense_size_mb:.2f}" == "8.53"
    assert statistics.macs == 24_461_312 == sum(layer.macs for layer in statistics.layers)
    assert len(statistics.layers) == 53
    first = statistics.layers[0]
    assert (first.name, first.shape, first.parameters) == ("features.0.0", (32, 3, 3, 3), 864)
    # All that is not a prunable weight: two numbers a batch-norm channel, ten biases.
    prunable = sum(layer.parameters for layer in statistics.layers)
    assert statistics.parameters - prunable == 2 * 17_056 + 10


def test_zeros_are_counted_in_all_parameters_and_a_layer_at_a_time():
    model = MobileNetV2(num_classes=10, width_mult=0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
        model.classifier[1].weight[:, :100] = 0
        model.features[0][1].bias.zero_()
    statistics = model_statistics(model, image_size=32)
    zeros = 10 * 100 + 8
    assert statistics.nonzeros == statistics.parameters - zeros
    assert statistics.density == (statistics.parameters - zeros) / statistics.parameters
    assert statistics.nonzero_size_mb == pytest.approx((statistics.parameters - zeros) * 4 / 2**20)
    assert statistics.layers[-1].nonzeros == 12_800 - 1_000
    assert statistics.layers[0].nonzeros == statistics.layers[0].parameters


def test_the_published_pruned_size_is_27_10_percent_of_the_dense_one():
    model = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.Flatten(), nn.Linear(1, 2_236_679, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
        model[2].weight[round(0.2710 * 2_236_682) - 3 :] = 0
    statistics = model_statistics(model, image_size=1)
    assert (statistics.parameters, f"{100 * statistics.density:.2f}") == (2_236_682, "27.10")
    assert f"{statistics.nonzero_size_mb:.2f}" == "2.31"
