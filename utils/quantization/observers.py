"""Chooses scales and zero points from plain tensors.

Weights are scaled so that no kernel overflows. Kernels for x86 CPUs without VNNI, and fbgemm's depthwise
kernels on any CPU, add two neighbouring products in 16 bits, which saturates silently
(2 * 255 * 127 > 32767). torch avoids this by halving the range of all activations (`reduce_range`). Here,
two neighbouring weights of a filter sum to at most 128, which costs less accuracy and gives the same
results on every CPU.

Weight scales are restricted to a few values (`scale_from_index`), since packed files store thousands of
them.
"""

import torch
from torch import Tensor, nn

LARGEST_PAIR = 128
"""Two int8 weights with this sum, times activations of 255, make 32640, which fits in 16 bits."""
SMALLEST_SCALE = 2.0**-20
"""A channel whose weights are all zero would have scale 0, and its bias is divided by the scale."""
SCALES_PER_OCTAVE = 8
"""Scales of weights are 2**((k + 0.5) / 8). Without the half, the scale of a layer's input times that of
a weight would be a power of two times that of the output wherever both activations take all of ReLU6's
range, and many sums would lie halfway between two quantized values, where engines round differently."""
SCALES_OF_AN_OCTAVE = torch.tensor([2 ** ((k + 0.5) / SCALES_PER_OCTAVE) for k in range(SCALES_PER_OCTAVE)])
SHRINKS = torch.linspace(1.0, 0.3, 36)
"""Fractions of the observed range to try for an activation."""


def choose_weight_scale(weight: Tensor, per_channel: bool, bits: int = 8) -> Tensor:
    """Choose the scale of a symmetric int8 weight (out_channels, ...).

    With 8 bits, the largest pair decides: two weights of the same sign at positions 0 and 1, 2 and 3, ... of
    a filter, which a kernel adds in 16 bits. With fewer bits no pair exceeds LARGEST_PAIR and the largest
    weight decides: it fits, or is clipped by at most a twelfth where that lowers the squared error.
    Clipping more did not improve the accuracy of dense or pruned models and made packed files larger.

    Scales are rounded up to one of SCALES_PER_OCTAVE values, by 4 % on average, which makes them a fifth of
    the size in a packed file.

    Args:
        weight: float32.
        per_channel: whether each output channel gets a scale of its own.
        bits: quantized values span -(2**(bits - 1) - 1) to 2**(bits - 1) - 1.

    Returns:
        float32 (out_channels,) or (1,).
    """
    largest = 2 ** (bits - 1) - 1
    # One less than LARGEST_PAIR, since each of the two may be rounded up by a half.
    scale = torch.maximum(
        largest_pair(weight) / (LARGEST_PAIR - 1), weight.abs().flatten(1).amax(1) / largest
    )
    scale = (scale if per_channel else scale.max().view(1)).clamp(min=SMALLEST_SCALE)
    index = scale_index(scale)
    fitting, clipping = scale_from_index(index), scale_from_index((index - 1).clamp(min=0))
    if 2 * largest > LARGEST_PAIR:
        return fitting
    clips = _squared_error(weight, clipping, largest) < _squared_error(weight, fitting, largest)
    return torch.where(clips, clipping, fitting)


def _squared_error(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Return the squared error (out_channels,) or (1,) of the weight at this scale."""
    values = weight.reshape(len(scale), -1)
    quantized = (values / scale.view(-1, 1)).round().clamp(-largest, largest)
    return (quantized * scale.view(-1, 1) - values).square().sum(1)


def scale_index(scales: Tensor) -> Tensor:
    """Return the index of the smallest allowed scale at or above each scale, from SMALLEST_SCALE."""
    octaves = (scales.double() / SMALLEST_SCALE).log2()
    # The margin maps an allowed scale, rounded to float32, to its own index.
    return (SCALES_PER_OCTAVE * octaves - 0.5 - 1e-5).ceil().clamp(min=0).int()


def scale_from_index(index: Tensor) -> Tensor:
    """Return the float32 scale of an index; the inverse of `scale_index`."""
    octaves = index.div(SCALES_PER_OCTAVE, rounding_mode="floor")
    scales = SCALES_OF_AN_OCTAVE.to(index.device)[index.remainder(SCALES_PER_OCTAVE)]
    return torch.ldexp(scales * SMALLEST_SCALE, octaves)


def largest_pair(weight: Tensor) -> Tensor:
    """Return the largest absolute sum (out_channels,) of two neighbouring weights of the same sign.

    Positions are in the order of the kernels: the input channel varies fastest, then column, then row.
    """
    filters = weight.movedim(1, -1).flatten(1)
    pairs = nn.functional.pad(filters, (0, filters.shape[1] % 2)).unflatten(1, (-1, 2))
    positive, negative = pairs.clamp(min=0).sum(2), pairs.clamp(max=0).sum(2)
    return torch.maximum(positive.amax(1), -negative.amin(1))


def choose_activation_qparams(histogram: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the scale and zero point that quantize an activation to 0..255 with the least squared error.

    Clipping a few outliers costs less than the coarser step that a wider range would give all other values.
    The candidates are the observed range with each end multiplied by the fractions in SHRINKS.

    Args:
        histogram: counts (bins,) of the values between `low` and `high`.
        low: smallest observed value, a scalar.
        high: largest observed value, a scalar.

    Returns:
        Scale (float32) and zero point (int32), each of shape (1,).
    """
    bins = len(histogram)
    values = low + (high - low) / bins * (torch.arange(bins) + 0.5)
    values, counts = values[histogram > 0], histogram[histogram > 0]
    ends = (high.clamp(min=0) * SHRINKS).unique()
    candidates = []
    for start in (low.clamp(max=0) * SHRINKS).unique():
        scales = (ends - start).clamp(min=SMALLEST_SCALE)[:, None] / 255
        zero_points = (-start / scales).round()
        quantized = (values / scales + zero_points).round().clamp(0, 255)
        errors = (((quantized - zero_points) * scales - values).square() * counts).sum(1)
        best = errors.argmin()
        candidates.append((errors[best].item(), scales[best], zero_points[best]))
    _, scale, zero_point = min(candidates, key=lambda candidate: candidate[0])
    return scale, zero_point.int()
