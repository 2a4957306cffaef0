"""Calibration, fake quantization and int8 modules, by means of torch's eager-mode quantization.

Only this module and models/mobilenetv2_quantization.py use torch.ao.quantization, which is deprecated but
still part of torch.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as eager
from torch.ao.nn import quantized as int8
from torch.ao.nn.intrinsic import qat as fused

from models import MobileNetV2, MobileNetV2Quantization
from models.folding import INPUT, fold_batch_norms, without_constant_channels
from models.statistics import prunable_layers
from utils.common import distributed
from utils.common.devices import device_of, on_device
from utils.common.errors import UserError
from utils.quantization.int8_model import Int8Model, QParams, activation_names
from utils.quantization.observers import choose_activation_qparams, choose_weight_scale

WEIGHT_BITS = (8, 7, 6, 5, 4)


def supported_engines() -> list[str]:
    """List the quantization engines that this machine supports."""
    return [name for name in torch.backends.quantized.supported_engines if name != "none"]


def use_engine(name: str) -> None:
    """Make `name` the current quantization engine: int8 modules are packed for it and run on it.

    Raises:
        UserError: torch does not support it on this machine.
    """
    if name not in supported_engines():
        supported = ", ".join(supported_engines())
        raise UserError(f"the quantization engine {name!r} is not supported here: use one of {supported}")
    torch.backends.quantized.engine = name


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """Use a quantization engine within the block; None keeps the current one.

    Raises:
        UserError: as `use_engine`.
    """
    before = torch.backends.quantized.engine
    try:
        if name is not None:
            use_engine(name)
        yield
    finally:
        torch.backends.quantized.engine = before


def calibrate(model: MobileNetV2Quantization, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """Return a copy of a float model with folded batch norms and calibrated activation observers.

    Args:
        model: not fused; it is not changed.
        batches: batches of training images, preprocessed as for inference; at least one.

    Raises:
        UserError: an activation is not finite.
    """
    observed: Any = fold_batch_norms(without_constant_channels(model))
    with quietly():
        _set_observers(observed, ActivationObserver, lambda: WeightObserver(per_channel=True))
        # Logits keep their full range: two clipped logits could no longer be told apart.
        observed.classifier[-1].qconfig = observed.qconfig._replace(activation=eager.MinMaxObserver)
        eager.prepare(observed, inplace=True)
    with torch.no_grad():
        for images, _ in batches:
            try:
                observed(images)
            except RuntimeError as error:  # from the observers' histograms
                if "not finite" not in str(error):
                    raise
                raise UserError(
                    "the model answers with NaN or infinity: its weights or normalization are damaged"
                ) from error
    return observed


def post_training_quantize(calibrated: nn.Module, per_channel: bool, weight_bits: int = 8) -> Int8Model:
    """Quantize a calibrated model to int8.

    Args:
        calibrated: from `calibrate`; it is not changed.
        per_channel: whether each output channel of a weight has its own scale.
        weight_bits: one of WEIGHT_BITS; see `layer_bits`.
    """
    model = copy.deepcopy(calibrated)
    for layer, bits in layer_bits(model, weight_bits).items():
        layer.qconfig = layer.qconfig._replace(weight=partial(WeightObserver, per_channel, bits))
    return _convert(model)


def prepare_qat(
    model: MobileNetV2Quantization, weight_bits: int = 8, has_batch_norms: bool = True
) -> nn.Module:
    """Return a copy of a float model that trains with per-channel fake quantization.

    `calibrate_qat` initializes its activation ranges. Its state_dict holds everything that `convert_qat`
    needs, and fits any model that this function returns for the same arguments.

    Args:
        model: not fused; it is not changed.
        weight_bits: one of WEIGHT_BITS; see `layer_bits`.
        has_batch_norms: whether to train with batch norms. Otherwise they are folded into the weights
            first, which halves the time per step (static folding: Nagel et al., 2021, section 5.2.1,
            https://arxiv.org/abs/2106.08295).
    """
    trained: MobileNetV2
    if has_batch_norms:
        trained = fused_model = copy.deepcopy(model).train()
        fused_model.fuse_for_qat()
    else:
        # torch freezes the biases that folding creates.
        trained = fold_batch_norms(without_constant_channels(model)).train().requires_grad_(True)
    with quietly():
        _set_observers(
            trained,
            ActivationFakeQuantize.with_args(
                observer=eager.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
            ),
            eager.FakeQuantize.with_args(observer=WeightObserver, per_channel=True),
        )
        eager.prepare_qat(trained, inplace=True)
    for layer, bits in layer_bits(trained, weight_bits).items():
        layer.weight_fake_quant = eager.FakeQuantize(WeightObserver, per_channel=True, bits=bits)
    return trained


def layer_bits(model: nn.Module, weight_bits: int) -> dict[Any, int]:
    """Return the weight bits of each convolution and linear layer.

    The first layer and the depthwise convolutions, 3 % of the weights, keep 8 bits. In PTQ, fewer would
    cost 0.6 to 1 point of accuracy on CIFAR-10 at 5 bits and 1 to 6 points at 4 bits, most in heavily
    pruned models.
    """
    first, *others = prunable_layers(model).values()
    bits = {layer: 8 if getattr(layer, "groups", 1) > 1 else weight_bits for layer in others}
    return {first: 8, **bits}


@torch.no_grad()
def calibrate_qat(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Initialize the activation ranges of a model from `prepare_qat` before it trains.

    Ranges taken from the first training batch, while every layer is already rounding, would make the first
    steps undo what the weights have learned.
    """
    model.eval()
    model.apply(eager.disable_fake_quant)
    for images, _ in on_device(batches, device_of(model)):
        model(images)
    model.apply(eager.enable_fake_quant)


def freeze_ranges(model: nn.Module) -> None:
    """Freeze the activation ranges of a model from `prepare_qat`; weight scales still follow the weights."""
    for module in model.modules():
        if isinstance(module, eager.FusedMovingAvgObsFakeQuantize):
            module.disable_observer()


def freeze_batch_norms(model: nn.Module) -> None:
    """Freeze the batch-norm statistics of a model from `prepare_qat` and normalize by them."""
    model.apply(fused.freeze_bn_stats)


def convert_qat(model: nn.Module) -> Int8Model:
    """Convert a model from `prepare_qat` to int8; the model itself is not changed."""
    return _convert(copy.deepcopy(model).cpu().eval())


def to_module(model: Int8Model) -> nn.Module:
    """Build torch's int8 modules from the tensors, packed for the current engine.

    Returns:
        A module that maps images (N, 3, H, W) to logits (N, classes) on the CPU.
    """
    with torch.device("meta"):
        module: Any = MobileNetV2Quantization(**model.architecture)
    with quietly():
        for name in activation_names(model.architecture):
            qparams = model.activations[name]
            if name == INPUT:
                module.quant = int8.Quantize(qparams.scale, qparams.zero_point, torch.quint8)
                continue
            layer = module.get_submodule(name)
            replacement: Any = int8.QFunctional()
            if isinstance(layer, nn.Linear):
                replacement = int8.Linear(layer.in_features, layer.out_features)
            elif isinstance(layer, nn.Conv2d):
                sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
                rest = (layer.stride, layer.padding, layer.dilation, layer.groups)
                replacement = int8.Conv2d(*sizes, *rest)
            if name in model.weights:
                replacement.set_weight_bias(_quantized_weight(model, name), model.biases[name])
            replacement.scale, replacement.zero_point = qparams.scale, qparams.zero_point
            module.set_submodule(name, replacement)
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.BatchNorm2d | nn.ReLU6):
                module.set_submodule(name, nn.Identity())
        module.dequant = int8.DeQuantize()
    return module.eval()


def _quantized_weight(model: Int8Model, name: str) -> Tensor:
    values, scale = model.weights[name], model.scales[name].double()
    if not model.per_channel:
        return torch._make_per_tensor_quantized_tensor(values, scale.item(), 0)
    zero_points = torch.zeros(len(scale), dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(values, scale, zero_points, 0)


def from_module(module: Any) -> Int8Model:
    """Extract the tensors of torch's int8 modules; the inverse of `to_module`."""
    weights, scales, biases, activations = {}, {}, {}, {}
    for name in activation_names(module.architecture):
        layer = module.quant if name == INPUT else module.get_submodule(name)
        activations[name] = QParams(float(layer.scale), int(layer.zero_point))
        if isinstance(layer, int8.Conv2d | int8.Linear):
            weight = layer.weight()
            is_per_channel = weight.qscheme() == torch.per_channel_affine
            weights[name] = weight.int_repr()
            scale = weight.q_per_channel_scales() if is_per_channel else torch.tensor([weight.q_scale()])
            scales[name] = scale.float()
            biases[name] = layer.bias().detach()
    return Int8Model(dict(module.architecture), weights, scales, biases, activations)


class WeightObserver(eager.ObserverBase):
    """`choose_weight_scale` as a torch observer."""

    def __init__(
        self, per_channel: bool, bits: int = 8, is_dynamic: bool = False, factory_kwargs=None
    ) -> None:
        super().__init__(torch.qint8, is_dynamic)
        self.per_channel, self.bits = per_channel, bits
        self.qscheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
        self.ch_axis = 0 if per_channel else -1
        self.quant_max = 2 ** (bits - 1) - 1
        self.quant_min = -self.quant_max
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Choose the scale of the weight and return the weight unchanged."""
        self.scale = choose_weight_scale(weight.detach(), self.per_channel, self.bits)
        return weight

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return scales (out_channels,) or (1,), and as many zero points, all 0."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int)


class ActivationFakeQuantize(eager.FusedMovingAvgObsFakeQuantize):
    """Fake quantization of an activation, with a moving average of the range of each batch.

    In a distributed run, the range is that of the global batch.
    """

    def forward(self, activation: Tensor) -> Tensor:
        """Update the range unless it is frozen, and round; the shape stays."""
        if distributed.world_size() == 1 or not (self.training and self.observer_enabled):
            return super().forward(activation)
        # The range depends only on the minimum and the maximum of the batch.
        extremes = torch.stack([-activation.detach().amin(), activation.detach().amax()])
        super().forward(distributed.all_reduce_max(extremes) * extremes.new_tensor([-1, 1]))
        self.disable_observer()
        rounded = super().forward(activation)
        self.enable_observer()
        return rounded


class ActivationObserver(eager.HistogramObserver):
    """`choose_activation_qparams` as a torch observer."""

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, each of shape (1,)."""
        if self.min_val > self.max_val:
            # It has seen nothing: the addition in a block without a shortcut.
            return torch.ones(1), torch.zeros(1, dtype=torch.int)
        return choose_activation_qparams(self.histogram, self.min_val, self.max_val)


def _set_observers(model: Any, activation: Any, weight: Any) -> None:
    """Set the observers of activations and weights; the input of a ReLU6 is not observed."""
    model.qconfig = eager.QConfig(activation, weight)
    for sequence in ending_in_relu6(model).values():
        sequence[0].qconfig = eager.QConfig(nn.Identity, weight)


def _convert(model: nn.Module) -> Int8Model:
    """Convert a model in place to int8 modules and return their tensors."""
    for sequence in ending_in_relu6(model).values():
        sequence[0].activation_post_process = sequence[-1].activation_post_process
        sequence[-1] = nn.Identity()
    with quietly():
        eager.convert(model, inplace=True)
        return from_module(model).with_rounded_biases()


def ending_in_relu6(model: nn.Module) -> dict[str, Any]:
    """Return the sequences whose last module is a ReLU6, by name."""
    sequences = {name: one for name, one in model.named_modules() if isinstance(one, nn.Sequential)}
    return {name: one for name, one in sequences.items() if isinstance(one[-1], nn.ReLU6)}


@contextmanager
def quietly() -> Iterator[None]:
    """Silence torch's deprecation warnings for eager quantization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # One of them comes from C++ once per process, and could go straight to stderr. Triggered here, it
        # goes through Python and is ignored like the others.
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)
        yield
