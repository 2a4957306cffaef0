import copy

import pytest
import torch
from torch import nn

from models import MobileNetV2
from utils.training.kernels import build as training_kernels
from utils.training.kernels.layers import (
    AbsorbedReLU6,
    DepthwiseConv2d,
    FusedBatchNorm2d,
    PointwiseConv2d,
    use_fast_layers,
)

needs_compiler = pytest.mark.skipif(not training_kernels.available(), reason="there is no C++ compiler")
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def maps(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(memory_format=torch.channels_last)


def norm_and_relu6(channels: int, has_relu6: bool) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.copy_(torch.rand(channels, generator=generator) + 0.5)
    return nn.Sequential(norm, nn.ReLU6() if has_relu6 else nn.Identity()).train()


def step(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers of one training step of a layer, in float32."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(maps(*y.shape, seed=2).to(y.dtype))
    named = {"y": y, "x": x.grad}
    named |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    named |= dict(layer.named_buffers())
    return {name: value.detach().float() for name, value in named.items()}


def assert_same_step(ours: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    expected, found = step(plain, x.float()), step(ours, x)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < ROUNDING[x.dtype], f"{name} is off by {error}"


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("has_relu6", [True, False])
@pytest.mark.parametrize("size", [(4, 32, 8, 8), (3, 24, 4, 6), (16, 48, 1, 1), (1, 16, 33, 7)])
def test_batch_norm_is_torchs(size, has_relu6, dtype):
    plain = norm_and_relu6(size[1], has_relu6)
    ours = copy.deepcopy(plain)
    use_fast_layers(ours)
    assert type(ours[0]) is FusedBatchNorm2d
    # Far from the running mean as well, where a difference of squares would lose its digits.
    assert_same_step(ours, plain, (maps(*size) * 2 + 30).to(dtype))
    assert_same_step(ours, plain, (maps(*size) * 2).to(dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "size", [(4, 32, 8, 8), (2, 16, 7, 5), (3, 48, 1, 1), (2, 16, 2, 2), (2, 16, 1, 9), (1, 144, 32, 32)]
)
def test_depthwise_convolution_is_torchs(size, stride, dtype):
    plain = nn.Sequential(nn.Conv2d(size[1], size[1], 3, stride, 1, groups=size[1], bias=False)).train()
    ours = copy.deepcopy(plain)
    use_fast_layers(ours)
    assert type(ours[0]) is DepthwiseConv2d
    assert_same_step(ours, plain, maps(*size).to(dtype))


@needs_compiler
@pytest.mark.parametrize("size", [(2, 20, 4, 4), (3, 24, 3, 3)])
def test_a_map_that_no_kernel_takes_is_left_to_torch(size):
    plain = norm_and_relu6(size[1], True)
    ours = copy.deepcopy(plain)
    use_fast_layers(ours)
    assert_same_step(ours, plain, maps(*size))


@needs_compiler
def test_a_layout_that_no_kernel_takes_is_left_to_torch():
    plain = nn.Sequential(*norm_and_relu6(16, True), nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False))
    ours = copy.deepcopy(plain)
    use_fast_layers(ours)
    assert_same_step(ours, plain, maps(2, 16, 5, 4).contiguous())


@needs_compiler
@pytest.mark.parametrize(("output_stride", "width_mult"), [(8, 1.0), (16, 0.5), (32, 0.35)])
def test_a_whole_model_has_the_loss_and_gradients_that_it_has_without(output_stride, width_mult):
    torch.manual_seed(0)
    plain = MobileNetV2(10, width_mult, 0.0, output_stride).to(memory_format=torch.channels_last)
    x, labels = maps(8, 3, 32, 32), torch.arange(8)
    plain.train()
    with torch.no_grad():
        for _ in range(3):
            plain(x)
    ours = copy.deepcopy(plain)
    use_fast_layers(ours)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    losses, gradients = [], []
    for model in (plain, ours):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.classifier[1].weight.grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()
    for one, other in zip(plain.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plain.eval()(x), ours.eval()(x), rtol=1e-2, atol=1e-3)


@needs_compiler
def test_layers_are_exchanged_where_they_stand_and_nowhere_else():
    model = MobileNetV2(10)
    use_fast_layers(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(FusedBatchNorm2d) == 52
    assert kinds.count(AbsorbedReLU6) == 35
    assert kinds.count(DepthwiseConv2d) == 17
    assert kinds.count(PointwiseConv2d) == 34
    assert [module.has_relu6 for module in model.modules() if isinstance(module, FusedBatchNorm2d)].count(
        True
    ) == 35


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_training_that_diverges_shows(bad):
    layer = norm_and_relu6(16, True)
    use_fast_layers(layer)
    x = maps(2, 16, 4, 4)
    x[0, 3, 1, 1] = bad
    assert layer(x)[:, 3].isnan().all()


def test_without_a_compiler_torchs_operations_are_used(monkeypatch):
    monkeypatch.setattr(training_kernels, "_library", lambda: None)
    plain = MobileNetV2(10, 0.35, 0.0, 32).train()
    ours = copy.deepcopy(plain)
    use_fast_layers(ours)
    assert not any(isinstance(module, FusedBatchNorm2d) for module in ours.modules())
    x = maps(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-3, atol=1e-4)


def test_a_compiler_that_fails_is_none(monkeypatch, tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert training_kernels._library.__wrapped__() is None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["g++"]


@needs_compiler
def test_kernels_are_built_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert training_kernels._library.__wrapped__() is not None
    (library,) = (path for path in tmp_path.rglob("*") if path.is_file())
    made = library.stat().st_mtime_ns
    assert training_kernels._library.__wrapped__() is not None
    assert library.stat().st_mtime_ns == made
