"""Layers that train faster on a CPU; the same numbers up to float rounding.

They compute the same thing with fewer passes through memory (utils/training/kernels/build.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.common import distributed
from utils.training.kernels import build as training_kernels
from utils.training.parallel import SynchronizedBatchNorm2d
from utils.training.recast import recast


def use_fast_layers(model: nn.Module) -> None:
    """Let the layers of `model` train fast on a CPU, if a C++ compiler builds our kernels.

    Parameters, state_dict, and what is computed stay as they are; only training is affected. Not for
    torch.compile, which does not know the kernels.
    """
    # The processes of a run exchange sums in an order that is not the same without kernels.
    if all(distributed.gather(training_kernels.available())):
        recast(model, _fast_form)
        return
    print("no C++ compiler works here (such as g++): training with torch's own operations, which are slower")


def _fast_form(layer: nn.Module, before: nn.Module) -> type[nn.Module] | None:
    if type(layer) is nn.BatchNorm2d:
        return FusedBatchNorm2d
    if type(layer) is nn.ReLU6 and isinstance(before, FusedBatchNorm2d):
        before.has_relu6 = True
        return AbsorbedReLU6
    if type(layer) is nn.Conv2d and layer.bias is None:
        if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1:
            return PointwiseConv2d
        if _is_depthwise_3x3(layer):
            return DepthwiseConv2d
    return None


def _is_depthwise_3x3(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and layer.kernel_size == (3, 3)
        and layer.padding == (1, 1)
        and layer.dilation == (1, 1)
    )


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that trains as a matrix product over the pixels of all images."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_channels, H, W)."""
        if not self.training or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            pixels = x.permute(0, 2, 3, 1)
            return nn.functional.linear(pixels, self.weight.flatten(1)).permute(0, 3, 1, 2)
        return super().forward(x)


class DepthwiseConv2d(nn.Conv2d):
    """A 3x3 depthwise convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H / stride, W / stride)."""
        if not self.training or not training_kernels.takes(x):
            return super().forward(x)
        return _Depthwise.apply(x, self.weight, self.stride[0])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        taps = weight.detach().flatten(1).t().contiguous()
        ctx.save_for_backward(x, taps)
        ctx.stride = stride
        return training_kernels.depthwise_forward(x, taps, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor):
        x, taps = ctx.saved_tensors
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        grad_x = training_kernels.depthwise_backward_input(grad_y, taps, ctx.stride, x.shape)
        grad_taps = training_kernels.depthwise_backward_weight(grad_y, x, ctx.stride)
        return grad_x, grad_taps.t().reshape(-1, 1, 3, 3), None


class AbsorbedReLU6(nn.ReLU6):
    """A ReLU6 that the batch norm before it computes while training."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input while training; any shape."""
        return x if self.training else super().forward(x)


class FusedBatchNorm2d(SynchronizedBatchNorm2d):
    """A batch norm that trains together with the ReLU6 after it.

    In a run over several processes, the statistics are those of the batch of all of them.
    """

    has_relu6 = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W); while training also the ReLU6, if there is one."""
        if not self.training:
            return super().forward(x)
        if training_kernels.takes(x, pixels_a_row=_pixels_a_row(x)):
            return _BatchNorm.apply(x, self.weight, self.bias, self)
        y = super().forward(x)
        return nn.functional.relu6(y) if self.has_relu6 else y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
        rows = _as_rows(x)
        sums = distributed.all_reduce_sum(training_kernels.batch_norm_sums(rows, norm.running_mean))
        ctx.count = distributed.world_size() * x.numel() // x.shape[1]
        parameters = training_kernels.batch_norm_parameters(sums, ctx.count, norm, rows.shape[1])
        norm.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, parameters)
        ctx.has_relu6 = norm.has_relu6
        return _like(x, training_kernels.batch_norm_forward(rows, parameters, norm.has_relu6))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor):
        x, parameters = ctx.saved_tensors
        channels = x.shape[1]
        rows, grad_rows = _as_rows(x), _as_rows(grad_y.contiguous(memory_format=torch.channels_last))
        sums = training_kernels.batch_norm_backward_sums(grad_rows, rows, parameters, channels, ctx.has_relu6)
        inverse = parameters[1, :channels]
        # For this process alone: gradients of parameters are averaged over processes later.
        grad_bias, grad_weight = sums[0].float(), sums[1].float() * inverse
        sums = distributed.all_reduce_sum(sums)
        grad_rows = training_kernels.batch_norm_backward(
            grad_rows, rows, parameters, sums, ctx.count, ctx.has_relu6
        )
        return _like(x, grad_rows), grad_weight, grad_bias, None


def _pixels_a_row(x: Tensor) -> int:
    """Return 2 where a pixel has half a multiple of the channels that a kernel takes at a time, else 1."""
    is_half = x.shape[1] % training_kernels.LANES == training_kernels.LANES // 2
    return 2 if is_half and x.numel() // x.shape[1] % 2 == 0 else 1


def _as_rows(x: Tensor) -> Tensor:
    """Return maps (N, C, H, W), channels last, as rows (pixels / n, n * C) of one or two pixels each."""
    return x.permute(0, 2, 3, 1).view(-1, _pixels_a_row(x) * x.shape[1])


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows of channels as maps of the size of `x`."""
    count, channels, height, width = x.shape
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)
