"""Faster training of convolutions on small maps; the same numbers up to float rounding.

oneDNN's convolutions are made for large maps. The last stages of MobileNetV2 on 32x32 images have
maps of 1x1 to 4x4, where a pointwise convolution is faster as the matrix product that it is, and
the weight gradient of a depthwise one takes ten times as long as a sum of products a tap.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

LARGEST_MAP_FOR_LINEAR = 16
LARGEST_MAP_FOR_TAPS = 4
"""Positions a map; above them oneDNN is as fast or faster (measured by benchmarks/training.py)."""


def use_fast_convolutions(model: nn.Module) -> None:
    """Let the pointwise and depthwise convolutions of `model` train fast on small maps.

    Parameters, state_dict, and what is computed stay as they are; only training is affected.
    """
    for module in model.modules():
        # Exactly Conv2d: a subclass (such as those of quantization-aware training) has a forward
        # of its own.
        if type(module) is not nn.Conv2d or module.bias is not None:
            continue
        if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1:
            module.__class__ = PointwiseConv2d
        elif module.groups == module.in_channels == module.out_channels:
            module.__class__ = DepthwiseConv2d


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that trains as a linear layer over the pixels of a small map."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_channels, H, W)."""
        if not self.training or x.shape[2] * x.shape[3] > LARGEST_MAP_FOR_LINEAR:
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1)
        return nn.functional.linear(pixels, self.weight.flatten(1)).permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose weight gradient on a small map is summed up a tap at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H // stride, W // stride)."""
        if not self.training or x.shape[2] * x.shape[3] > LARGEST_MAP_FOR_TAPS:
            return super().forward(x)
        return _DepthwiseOnSmallMaps.apply(x, self.weight, self.stride, self.padding)


class _DepthwiseOnSmallMaps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(x, weight, None, stride, padding, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor):
        x, weight = ctx.saved_tensors
        (stride_y, stride_x), (pad_y, pad_x) = ctx.stride, ctx.padding
        channels, _, kernel_y, kernel_x = weight.shape
        grad_x = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), channels,
            (True, False, False),
        )[0]  # fmt: skip
        grad_weight = torch.zeros_like(weight)
        height, width = x.shape[2:]
        for y in range(kernel_y):
            for x_ in range(kernel_x):
                rows = _overlap(y - pad_y, stride_y, height, grad_output.shape[2])
                columns = _overlap(x_ - pad_x, stride_x, width, grad_output.shape[3])
                if rows and columns:
                    products = grad_output[:, :, rows[0], columns[0]] * x[:, :, rows[1], columns[1]]
                    grad_weight[:, 0, y, x_] = products.sum((0, 2, 3))
        return grad_x, grad_weight, None, None


def _overlap(offset: int, stride: int, in_size: int, out_size: int) -> tuple[slice, slice] | None:
    """Outputs, and the inputs that a tap at `offset` brings to them, where those are in the map."""
    outputs = [o for o in range(out_size) if 0 <= o * stride + offset < in_size]
    if not outputs:
        return None
    first, last = outputs[0], outputs[-1]
    return (
        slice(first, last + 1),
        slice(first * stride + offset, last * stride + offset + 1, stride),
    )
