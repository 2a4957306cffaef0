"""int8 quantization, after training and while training, with torch's eager mode.

The one module that calls torch.ao.quantization, which torch has deprecated and still ships.

What makes an int8 model here:

- Activations take all of 0..255. ReLU6 is no operation of its own: the range of the convolution in
  front of it is observed behind the ReLU6, so it lies within [0, 6] with zero point 0, and where the
  convolution saturates is the clamp.
- Weights are symmetric, so that a pruned weight is exactly 0 in int8.
- Weights are scaled so that no kernel overflows. Kernels for x86 CPUs without VNNI, and fbgemm's
  depthwise ones on any, add two neighbouring products in 16 bits, which saturates without a word
  (2 * 255 * 127 > 32767). torch's answer is to halve the range of all activations (`reduce_range`);
  here two neighbouring weights of a filter add up to 128 at most (`WeightObserver`), which costs
  less and gives the same numbers on every CPU.
- Weights may use fewer codes than int8 has (`weight_bits`). They are stored and computed as int8 all
  the same, with the same kernels; it is the packed file that shrinks, to the entropy of the codes.
- Scales of weights and biases take few different values (`scale_of`, `bias_units`), since a model has
  thousands of them, which a packed file holds as well.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.ao import quantization as eager
from torch.ao.nn import quantized as int8
from torch.ao.nn.intrinsic import qat as fused

from models import MobileNetV2Quantization
from utils.common import distributed
from utils.common.devices import device_of, on_device
from utils.common.errors import UserError

LARGEST_PAIR = 128
"""Two int8 weights of this sum, times activations of 255, make 32640: a 16-bit number."""
NEGLIGIBLE_DEVIATION = 0.01
"""Of a channel behind its batch norm; less than half of what int8 tells apart in 0 to 6."""
SMALLEST_SCALE = 2.0**-20
"""Of weights. A channel without any would have 0, by which its bias is divided."""
SCALES_AN_OCTAVE = 8
"""Scales of weights are 2**((k + 0.5) / 8). Without the half, the scale of a layer's input times that of
a weight would be a power of two times that of the output wherever both activations take all of ReLU6's
range, and many sums would lie halfway between two codes, where engines round differently."""
SCALES_OF_AN_OCTAVE = torch.tensor([2 ** ((k + 0.5) / SCALES_AN_OCTAVE) for k in range(SCALES_AN_OCTAVE)])
WEIGHT_BITS = (8, 7, 6, 5, 4)
BIAS_UNITS_A_STEP = 4
"""Biases are rounded to a quarter of a step of their layer's output, or finer."""
SHRINKS = torch.linspace(1.0, 0.3, 36)
"""Fractions of the seen range that are tried for an activation."""


def use_engine(name: str) -> None:
    """Make `name` the quantization engine: int8 models are packed for it, and run on it.

    Raises:
        UserError: torch does not support it on this machine.
    """
    supported = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if name not in supported:
        raise UserError(
            f"the quantization engine {name!r} is not supported here: use one of {', '.join(supported)}"
        )
    torch.backends.quantized.engine = name


def fold_batch_norms(model: MobileNetV2Quantization) -> nn.Module:
    """A copy of a float model in eval mode, without its batch norms; the outputs stay the same."""
    model = copy.deepcopy(model).eval()
    model.fuse_model()
    return model


@torch.no_grad()
def without_constant_channels(model: MobileNetV2Quantization) -> MobileNetV2Quantization:
    """A copy of a float model in which a channel that hardly varies is the constant that it nearly is.

    Where a convolution's input is dead, its batch norm divides by the root of next to nothing: the
    folded weight is hundreds of times larger than all others, adds nothing to the output, and leaves
    a scale for the whole tensor that rounds the others to zero.
    """
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            deviation = norm.weight.abs() * (norm.running_var / (norm.running_var + norm.eps)).sqrt()
            norm.weight[deviation < NEGLIGIBLE_DEVIATION] = 0
    return model


def calibrate(model: MobileNetV2Quantization, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of a float model, its batch norms folded, that knows the ranges of its activations.

    Args:
        model: not fused; stays as it is.
        batches: of training images, as the model sees them when it is used; at least one.
    """
    observed = fold_batch_norms(without_constant_channels(model))
    with _quietly():
        _set_observers(observed, ActivationObserver, lambda: WeightObserver(per_channel=True))
        # Where two logits are clipped, their order is lost.
        observed.classifier[-1].qconfig = observed.qconfig._replace(activation=eager.MinMaxObserver)
        eager.prepare(observed, inplace=True)
    with torch.no_grad():
        for images, _ in batches:
            observed(images)
    return observed


def post_training_quantize(calibrated: nn.Module, per_channel: bool, weight_bits: int = 8) -> nn.Module:
    """The int8 model, for the current engine.

    Args:
        calibrated: of `calibrate`; stays as it is, so that both kinds are made from one.
        per_channel: whether each output channel of a weight has a scale of its own.
        weight_bits: one of WEIGHT_BITS; see `layer_bits`.
    """
    model = copy.deepcopy(calibrated)
    for layer, bits in layer_bits(model, weight_bits).items():
        layer.qconfig = layer.qconfig._replace(weight=partial(WeightObserver, per_channel, bits))
    return _convert(model)


def prepare_qat(
    model: MobileNetV2Quantization, weight_bits: int = 8, has_batch_norms: bool = True
) -> nn.Module:
    """A copy of a float model that trains with the rounding of int8, per channel.

    `calibrate_qat` gives its activations their first ranges. Its state_dict holds all that
    `convert_qat` needs, and loads into another model of this function with the same arguments.

    Args:
        model: not fused; stays as it is.
        weight_bits: one of WEIGHT_BITS; see `layer_bits`.
        has_batch_norms: whether batch norms are trained. Otherwise they are folded into the weights
            before, and a step takes half the time (static folding: Nagel et al., 2021, section 5.2.1,
            https://arxiv.org/abs/2106.08295).
    """
    if has_batch_norms:
        model = copy.deepcopy(model).train()
        model.fuse_model(is_qat=True)
    else:
        model = fold_batch_norms(without_constant_channels(model)).train()
        # torch holds the biases that folding makes.
        model.requires_grad_(True)
    with _quietly():
        _set_observers(
            model,
            ActivationFakeQuantize.with_args(
                observer=eager.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
            ),
            eager.FakeQuantize.with_args(observer=WeightObserver, per_channel=True),
        )
        eager.prepare_qat(model, inplace=True)
    for layer, bits in layer_bits(model, weight_bits).items():
        layer.weight_fake_quant = eager.FakeQuantize(WeightObserver, per_channel=True, bits=bits)
    return model


def layer_bits(model: nn.Module, weight_bits: int) -> dict[nn.Module, int]:
    """Bits of the weights of each convolution and linear layer.

    The first layer and the depthwise convolutions keep 8: they are 3 % of the weights. Quantized after
    training, they would cost 0.6 to 1 point of accuracy on CIFAR-10 at 5 bits and 1 to 6 at 4, the most
    where few weights are left.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return {
        layer: 8 if layer is layers[0] or getattr(layer, "groups", 1) > 1 else weight_bits for layer in layers
    }


@torch.no_grad()
def calibrate_qat(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let the activations of a model of `prepare_qat` find their ranges before it trains.

    From ranges of a first batch of training, with all layers rounding at once, the first steps
    would lead away from the weights that are there.
    """
    model.eval()
    model.apply(eager.disable_fake_quant)
    for images, _ in on_device(batches, device_of(model)):
        model(images)
    model.apply(eager.enable_fake_quant)


def freeze_ranges(model: nn.Module) -> None:
    """Hold the ranges of the activations of a model of `prepare_qat` from now on.

    The scales of its weights go on following the weights.
    """
    for module in model.modules():
        if isinstance(module, eager.FusedMovingAvgObsFakeQuantize):
            module.disable_observer()


def freeze_batch_norms(model: nn.Module) -> None:
    """Let a model of `prepare_qat` normalize by its running statistics, and hold these, from now on."""
    model.apply(fused.freeze_bn_stats)


def convert_qat(model: nn.Module) -> nn.Module:
    """The int8 model, for the current engine, of a model of `prepare_qat`, which stays as it is.

    Wherever that one trains, the int8 model runs on the CPU.
    """
    return _convert(copy.deepcopy(model).cpu().eval())


def int8_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Weights (int8) and biases (float32) of an int8 model, by their names in the float model."""
    parameters = {}
    for name, layer in model.named_modules():
        if isinstance(layer, int8.Conv2d | int8.Linear):
            parameters[f"{name}.weight"] = layer.weight().int_repr()
            parameters[f"{name}.bias"] = layer.bias()
    return parameters


def int8_operations(model: MobileNetV2Quantization) -> list[str]:
    """Names of the modules whose int8 output has a scale and a zero point, in forward order.

    Each takes what the one before it gives; an addition takes an earlier one's as well.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        or (name.endswith(".skip_add") and model.get_submodule(name.rpartition(".")[0]).use_res_connect)
    ]
    return ["quant", *names]


def int8_model(
    model: MobileNetV2Quantization,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
    ranges: dict[str, tuple[float, int]],
) -> nn.Module:
    """The int8 model, for the current engine, of what one consists of.

    Args:
        model: of the same architecture, best on the meta device; is changed into the int8 model.
        weights: of each convolution and linear layer, quantized (qint8).
        biases: float32 (out_channels,), of each.
        ranges: scale and zero point of the output of each of `int8_operations`.
    """
    for name in int8_operations(model):
        parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        layer, (scale, zero_point) = getattr(parent, child), ranges[name]
        if name == "quant":
            setattr(parent, child, int8.Quantize(scale, zero_point, torch.quint8))
            continue
        if isinstance(layer, nn.Linear):
            replacement = int8.Linear(layer.in_features, layer.out_features)
        elif isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            rest = (layer.stride, layer.padding, layer.dilation, layer.groups)
            replacement = int8.Conv2d(*sizes, *rest)
        else:
            replacement = int8.QFunctional()
        if name in weights:
            replacement.set_weight_bias(weights[name], biases[name])
        replacement.scale, replacement.zero_point = scale, zero_point
        setattr(parent, child, replacement)
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.BatchNorm2d | nn.ReLU6):
                setattr(parent, child, nn.Identity())
    model.dequant = int8.DeQuantize()
    return model.eval()


class WeightObserver(eager.ObserverBase):
    """Scales of a weight (out_channels, ...): one a tensor or one an output channel, zero point 0.

    With 8 bits, a scale is chosen for the largest sum of two weights of one sign that a kernel adds up
    in 16 bits: those at places 0 and 1, 2 and 3, ... of a filter. With fewer bits no two codes exceed
    LARGEST_PAIR, and the largest weight decides: it fits, or is clipped by a twelfth at most where that
    leaves a smaller squared error. To clip more for a still smaller error gained no accuracy, dense or
    pruned, and cost bytes.

    A scale is the next one of SCALES_AN_OCTAVE, 4 % larger on average, and takes a fifth of the bytes.
    """

    def __init__(
        self, per_channel: bool, bits: int = 8, is_dynamic: bool = False, factory_kwargs=None
    ) -> None:
        super().__init__(torch.qint8, is_dynamic)
        self.per_channel = per_channel
        self.qscheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
        self.ch_axis = 0 if per_channel else -1
        self.quant_max = 2 ** (bits - 1) - 1
        self.quant_min = -self.quant_max
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Measure the weight; it is returned as it came."""
        values = weight.detach()
        # One less than LARGEST_PAIR, since each of the two may be rounded up by a half.
        scale = torch.maximum(
            largest_pair(values) / (LARGEST_PAIR - 1), values.abs().flatten(1).amax(1) / self.quant_max
        )
        scale = (scale if self.per_channel else scale.max().view(1)).clamp(min=SMALLEST_SCALE)
        codes = scale_codes(scale)
        fitting, clipping = scale_of(codes), scale_of((codes - 1).clamp(min=0))
        if 2 * self.quant_max <= LARGEST_PAIR:
            fitting = torch.where(
                self._error(values, clipping) < self._error(values, fitting), clipping, fitting
            )
        self.scale = fitting
        return weight

    def _error(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Squared error (out_channels,) or (1,) of the weight in codes of this scale."""
        values = weight.reshape(len(scale), -1)
        codes = (values / scale.view(-1, 1)).round().clamp(self.quant_min, self.quant_max)
        return (codes * scale.view(-1, 1) - values).square().sum(1)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales (out_channels,) or (1,), and as many zero points, all 0."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int)


def scale_codes(scales: Tensor) -> Tensor:
    """The number of the next possible scale of a weight upwards, counted from SMALLEST_SCALE."""
    octaves = (scales.double() / SMALLEST_SCALE).log2()
    # A scale that is possible is its own, though it is rounded to a float32.
    return (SCALES_AN_OCTAVE * octaves - 0.5 - 1e-5).ceil().clamp(min=0).int()


def scale_of(codes: Tensor) -> Tensor:
    """The reverse of `scale_codes`: float32."""
    octaves = codes.div(SCALES_AN_OCTAVE, rounding_mode="floor")
    scales = SCALES_OF_AN_OCTAVE.to(codes.device)[codes.remainder(SCALES_AN_OCTAVE)]
    return torch.ldexp(scales * SMALLEST_SCALE, octaves)


def largest_pair(weight: Tensor) -> Tensor:
    """Largest magnitude (out_channels,) of the sums of weights of one sign at neighbouring places.

    Places are counted as kernels do: the input channel fastest, then the column, then the row.
    """
    filters = weight.movedim(1, -1).flatten(1)
    if filters.shape[1] % 2:
        filters = nn.functional.pad(filters, (0, 1))
    pairs = filters.unflatten(1, (-1, 2))
    positive, negative = pairs.clamp(min=0).sum(2), pairs.clamp(max=0).sum(2)
    return torch.maximum(positive.amax(1), -negative.amin(1))


class ActivationFakeQuantize(eager.FusedMovingAvgObsFakeQuantize):
    """Rounds an activation as int8 does; its range follows that of the batch as a moving average.

    In a run over several processes, it is the range of the batch of all of them.
    """

    def forward(self, activation: Tensor) -> Tensor:
        """Follow the range, unless that is held, and round; the shape stays."""
        if distributed.world_size() == 1 or not (self.training and self.observer_enabled):
            return super().forward(activation)
        # Of a batch, the range depends on its least and its greatest value alone.
        extremes = torch.stack([-activation.detach().amin(), activation.detach().amax()])
        super().forward(distributed.max_over_processes(extremes) * extremes.new_tensor([-1, 1]))
        self.disable_observer()
        rounded = super().forward(activation)
        self.enable_observer()
        return rounded


class ActivationObserver(eager.HistogramObserver):
    """The range of an activation that quantizes it to 0..255 with the least squared error.

    A few outliers would widen the range and coarsen all other values; clipping them costs less. The
    candidates are the seen range with each end drawn in toward zero by the fractions of SHRINKS.
    """

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each of shape (1,)."""
        if self.min_val > self.max_val:
            # Nothing was seen: the addition of a block that has no shortcut.
            return torch.ones(1), torch.zeros(1, dtype=torch.int)
        bin_width = (self.max_val - self.min_val) / self.bins
        values = self.min_val + bin_width * (torch.arange(self.bins) + 0.5)
        values, counts = values[self.histogram > 0], self.histogram[self.histogram > 0]
        highs = (self.max_val.clamp(min=0) * SHRINKS).unique()
        candidates = []
        for low in (self.min_val.clamp(max=0) * SHRINKS).unique():
            scales = (highs - low).clamp(min=SMALLEST_SCALE)[:, None] / 255
            zero_points = (-low / scales).round()
            codes = (values / scales + zero_points).round().clamp(0, 255)
            errors = (((codes - zero_points) * scales - values).square() * counts).sum(1)
            best = errors.argmin()
            candidates.append((errors[best].item(), scales[best], zero_points[best]))
        _, scale, zero_point = min(candidates, key=lambda candidate: candidate[0])
        return scale, zero_point.int()


def _set_observers(model: nn.Module, activation, weight) -> None:
    """Say what observes the activations and the weights; in front of a ReLU6 nothing does."""
    model.qconfig = eager.QConfig(activation, weight)
    for sequence in _ending_in_relu6(model):
        sequence[0].qconfig = eager.QConfig(nn.Identity, weight)


def _convert(model: nn.Module) -> nn.Module:
    """Replace, in place, each layer by its int8 form."""
    for sequence in _ending_in_relu6(model):
        sequence[0].activation_post_process = sequence[-1].activation_post_process
        sequence[-1] = nn.Identity()
    with _quietly():
        eager.convert(model, inplace=True)
        round_biases(model)
    return model


def round_biases(model: nn.Module) -> None:
    """Make each bias of an int8 model a whole number of accumulator steps, with no needless digits.

    fbgemm takes any float, but other engines and runtimes hold biases as int32; rounded once here, all
    compute the same.
    """

    def round_bias(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weight, bias = layer.weight(), layer.bias()
        per_channel = weight.qscheme() == torch.per_channel_affine
        scales = weight.q_per_channel_scales() if per_channel else weight.q_scale()
        steps = torch.as_tensor(inputs[0].q_scale() * scales, dtype=torch.float64)
        units = bias_units(steps, layer.scale)
        layer.set_weight_bias(weight, ((bias.double() / units).round() * units).float())

    layers = [m for m in model.modules() if isinstance(m, int8.Conv2d | int8.Linear)]
    hooks = [layer.register_forward_pre_hook(round_bias) for layer in layers]
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()


def bias_units(steps: Tensor, output_scale: float) -> Tensor:
    """Of what the biases of an int8 layer are multiples, float64.

    Args:
        steps: float64 (out_channels,) or (1,), of the accumulator: the scale of the input times that
            of the weight.
        output_scale: of the layer.

    Returns:
        The steps, each times the power of two that brings it up to 1/BIAS_UNITS_A_STEP of the output's
        scale, or just below; larger ones stay.
    """
    ratio = output_scale / BIAS_UNITS_A_STEP / steps
    return torch.ldexp(steps, (torch.frexp(ratio).exponent - 1).clamp(min=0))


def _ending_in_relu6(model: nn.Module) -> Iterator[nn.Sequential]:
    for module in model.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.ReLU6):
            yield module


@contextmanager
def _quietly():
    """Torch announces in several warnings that this way of quantizing is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
