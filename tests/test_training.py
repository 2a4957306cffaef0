from argparse import Namespace

import pytest
import torch
from torch import nn

from models import MobileNetV2
from train import get_args_parser, output_stride_by_epoch
from utils.common.errors import UserError
from utils.data.datasets import Normalization, Split
from utils.data.loader import Batches
from utils.training.kernels.convolution import use_fast_convolutions
from utils.training.kernels.layers import use_fast_layers
from utils.training.loop import cross_entropy, train_one_epoch
from utils.training.optimization import ExponentialMovingAverage, build_optimizer, build_scheduler


def options(*argv: str) -> Namespace:
    return get_args_parser().parse_args(argv)


def small_model(**kwargs) -> MobileNetV2:
    torch.manual_seed(1)
    return MobileNetV2(num_classes=3, width_mult=0.1, dropout=0.0, **kwargs)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_is_only_on_matrices_and_filters(name):
    model = small_model()
    optimizer = build_optimizer(model, options("--optimizer", name, "--weight_decay", "0.01"))
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    weights = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {f"{n}.weight" for n in weights}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_one_cycle_rises_to_lr_and_ends_near_zero():
    optimizer = build_optimizer(small_model(), options("--lr", "0.4"))
    scheduler = build_scheduler(optimizer, options("--lr", "0.4"), 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.4 / 25)
    assert max(rates) == pytest.approx(0.4, rel=1e-3)
    assert 25 <= rates.index(max(rates)) <= 35
    assert rates[-1] < 1e-3


def test_the_published_schedule_is_constant():
    args = options("--optimizer", "adam", "--scheduler", "none", "--lr", "1e-4")
    optimizer = build_optimizer(small_model(), args)
    scheduler = build_scheduler(optimizer, args, 10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 1e-4


def test_average_follows_the_formula():
    model = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(model, decay=0.5)
    values, expected = [3.0, 7.0, -2.0], None
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked.fill_(step)
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert average.module.weight[0].item() == pytest.approx(expected, rel=1e-6)
    assert average.module.running_mean[1].item() == pytest.approx(expected, rel=1e-6)
    assert average.module.num_batches_tracked == 2


@pytest.mark.parametrize("make_fast", [use_fast_convolutions, use_fast_layers])
def test_train_one_epoch_counts_as_a_plain_loop_does(make_fast):
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.randint(3, (50,)))
    batches = Batches(split, Normalization((0.5,) * 3, (0.25,) * 3), 16, shuffle=True, epoch=1)
    ours, plain = small_model(output_stride=32), small_model(output_stride=32)
    make_fast(ours)
    calls = []
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-4)
    loss, accuracy_pct = train_one_epoch(
        ours, batches, optimizer, cross_entropy(0.1), [lambda: calls.append(1)]
    )

    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    plain.train()
    losses, correct = [], 0
    for images, labels in batches:
        optimizer.zero_grad()
        logits = plain(images)
        value = criterion(logits, labels)
        value.backward()
        optimizer.step()
        losses.append(value.item() * len(labels))
        correct += (logits.argmax(1) == labels).sum().item()
    assert len(calls) == 4
    assert loss == pytest.approx(sum(losses) / 50, rel=1e-4)
    assert accuracy_pct == pytest.approx(100 * correct / 50)


@pytest.mark.parametrize(("output_stride", "image_size"), [(32, 32), (16, 32), (32, 64)])
def test_fast_convolutions_compute_what_plain_ones_do(output_stride, image_size):
    """Every layer's output and gradients, on the inputs that the real model brings to it."""
    plain = small_model(output_stride=output_stride)
    fast = small_model(output_stride=output_stride)
    use_fast_convolutions(fast)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fast.named_parameters()]
    convolutions = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)}
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: inputs.update({name: args[0]}))
        for name, module in convolutions.items()
    ]
    plain.train()(torch.randn(4, 3, image_size, image_size).to(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    swapped = 0
    for name, module in convolutions.items():
        twin = fast.get_submodule(name).train()
        swapped += type(twin) is not nn.Conv2d
        results = []
        for layer in (module, twin):
            x = inputs[name].detach().clone().requires_grad_()
            output = layer(x)
            torch.manual_seed(2)
            output.backward(torch.randn(output.shape))
            results.append((output, x.grad, layer.weight.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert swapped == 51  # all but the stem


def test_early_output_strides_make_the_epochs_plan():
    args = options("--epochs", "5", "--early_output_strides", "32:2", "16:1", "--output_stride", "8")
    assert output_stride_by_epoch(args) == [32, 32, 16, 8, 8]
    with pytest.raises(UserError, match="leave at least one"):
        output_stride_by_epoch(options("--epochs", "3", "--early_output_strides", "32:3"))
