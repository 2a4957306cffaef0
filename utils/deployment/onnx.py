"""ONNX files with exactly our weights: float, or int8 as QuantizeLinear and DequantizeLinear (QDQ).

The frozen TorchScript graph of a MobileNetV2 knows a dozen operations, so each is translated here.
torch's own exporter would need one more package, and rounds int8 weights to float and back.

What int8 means stays the same: an activation is quantized where ours is, with our scale and zero
point. ReLU6 is no node; the range of the convolution in front ends at 6, and QuantizeLinear
saturates there. A bias is int32, in steps of the scale of the input times that of the weight, which
is what utils/quantization/eager.py has rounded it to.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models import MobileNetV2
from models.statistics import prunable_layers
from utils.common.errors import UserError
from utils.common.optional_packages import import_optional
from utils.data.loader import Batches
from utils.deployment.torchscript import GraphTensor, graph_operations, to_torchscript
from utils.open_model import ModelFile

if TYPE_CHECKING:
    import onnx

OPSET = 13
"""The first with a scale for each channel."""
IR_VERSION = 8
"""Read by runtimes since 2021; the newest is refused by runtimes of last year."""
FLOAT_TOLERANCE = 1e-4
"""Of logits that are 1; larger ones may differ by as much more."""
FLOAT_SAME_CLASS_PCT = 99.0
"""Not all, since an image may lie between two classes."""
INT8_STEPS = 8
INT8_SAME_CLASS_PCT = 98.0
"""Found on 2,000 images: 2 steps and all with files for fbgemm, 4 and 99.8 % with those for x86.
Engines break ties of rounding in different ways, and one activation in a million differs."""
INPUT, OUTPUT = "images", "logits"


def to_onnx(file: ModelFile, batch_size: int | None = None) -> "onnx.ModelProto":
    """Build the ONNX model: normalized float images (N, 3, H, W) to float logits (N, classes).

    Class names, normalization and image size are kept in its metadata properties.

    Args:
        file: of any kind; batch norms of weights are folded.
        batch_size: N; None leaves it open.

    Raises:
        UserError: onnx is not installed.
    """
    (onnx,) = import_optional("onnx")
    scripted = file.model
    if not isinstance(scripted, torch.jit.ScriptModule):
        scripted = to_torchscript(scripted, file.image_size)
    with torch.device("meta"):
        layers = list(prunable_layers(MobileNetV2(**file.architecture)))
    builder = _GraphBuilder(layers)
    builder.build(scripted)

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    n = "batch" if batch_size is None else batch_size
    side, classes = file.image_size, file.architecture["num_classes"]
    graph = helper.make_graph(
        [helper.make_node(**node) for node in builder.nodes],
        "MobileNetV2",
        [helper.make_tensor_value_info(INPUT, float32, [n, 3, side, side])],
        [helper.make_tensor_value_info(OUTPUT, float32, [n, classes])],
        [onnx.numpy_helper.from_array(array, name) for name, array in builder.arrays.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mobilenetv2",
    )
    properties = {
        "variant": file.variant,
        "architecture": file.architecture,
        "class_names": file.class_names,
        "normalization": asdict(file.normalization) if file.normalization else None,
    }
    helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def start_session(model: bytes, threads: int) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime on the CPU: a function from a batch of images to logits.

    Raises:
        UserError: onnxruntime is not installed.
    """
    (onnxruntime,) = import_optional("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    return run


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models lie apart on the same images.

    Args:
        images: how many were compared.
        largest: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the first model.
        same_class: images that both put into the same class.
    """

    images: int
    largest: float
    largest_logit: float
    same_class: int

    @property
    def same_class_pct(self) -> float:
        """Images that both put into the same class, in percent."""
        return 100 * self.same_class / self.images


@torch.inference_mode()
def compare_logits(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], batches: Batches
) -> Difference:
    """Run both on the same batches."""
    pairs = [(ours(images), theirs(images)) for images, _ in batches]
    first, second = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    return Difference(
        images=len(first),
        largest=(first - second).abs().max().item(),
        largest_logit=first.abs().max().item(),
        same_class=int((first.argmax(1) == second.argmax(1)).sum()),
    )


def check_difference(path: str | os.PathLike, difference: Difference, step: float | None) -> None:
    """Make sure that an exported model is the one that was given.

    Args:
        path: of the file to be, for the message.
        difference: between its logits and ours.
        step: `logit_step`.

    Raises:
        UserError: the difference is more than rounding explains.
    """
    if step is None:
        allowed, same_class_pct = FLOAT_TOLERANCE * max(1.0, difference.largest_logit), FLOAT_SAME_CLASS_PCT
    else:
        allowed, same_class_pct = INT8_STEPS * step, INT8_SAME_CLASS_PCT
    # Not the other way round, so that NaN fails as well.
    if not (difference.largest <= allowed and difference.same_class_pct >= same_class_pct):
        raise UserError(
            f"{path} was not written: its logits differ from ours by up to {difference.largest:.2g} "
            f"({allowed:.2g} is allowed) and {difference.same_class_pct:.2f} % of the images get the same "
            f"class ({same_class_pct} % is wanted): try another version of onnxruntime"
        )


def logit_step(model: "onnx.ModelProto") -> float | None:
    """What a logit of an int8 model changes by at least; None for a float model."""
    (onnx,) = import_optional("onnx")
    last = model.graph.node[-1]
    if last.op_type != "DequantizeLinear":
        return None
    return next(
        onnx.numpy_helper.to_array(a).item() for a in model.graph.initializer if a.name == last.input[1]
    )


@dataclass(frozen=True)
class _Quantized:
    """An activation in 8 bits: the name of its codes, its scale, its zero point."""

    codes: str
    scale: float
    zero_point: int


class _GraphBuilder:
    """Nodes and arrays of the ONNX graph, gathered along the TorchScript graph.

    In `values`, a float tensor of TorchScript stands for its ONNX name, an int8 one for _Quantized.
    """

    def __init__(self, layers: list[str]) -> None:
        self.layers = iter(layers)
        self.nodes: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.values: dict[GraphTensor, str | _Quantized] = {}

    def build(self, scripted: torch.jit.ScriptModule) -> None:
        """Translate each node.

        Raises:
            NotImplementedError: the graph holds an operation that is none of MobileNetV2's.
        """
        operations = {
            "aten::_convolution": self.float_convolution,
            "aten::linear": self.float_linear,
            "aten::hardtanh": self.clip,
            "aten::hardtanh_": self.clip,
            "aten::add": self.float_add,
            "aten::adaptive_avg_pool2d": self.average_pool,
            "aten::flatten": self.flatten,
            "aten::quantize_per_tensor": self.quantize_images,
            "quantized::conv2d": self.int8_convolution,
            "quantized::linear": self.int8_linear,
            "quantized::add": self.int8_add,
            "aten::dequantize": self.dequantize,
        }
        for kind, arguments, result in graph_operations(scripted):
            if kind not in operations:
                raise NotImplementedError(f"{kind} has no translation to ONNX here")
            # What no operation has computed are the images.
            arguments = [self.values.get(a, INPUT) if isinstance(a, GraphTensor) else a for a in arguments]
            self.values[result] = operations[kind](*arguments)
        self.nodes[-1]["outputs"] = [OUTPUT]

    def float_convolution(
        self, x: str, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], *rest: Any
    ) -> str:
        dilation, _transposed, _output_padding, groups, *_ = rest
        attributes = _convolution_attributes(stride, padding, dilation, groups)
        return self.node("Conv", [x, *self.float_weight(weight, bias)], **attributes)

    def float_linear(self, x: str, weight: Tensor, bias: Tensor) -> str:
        return self.node("Gemm", [x, *self.float_weight(weight, bias)], transB=1)

    def float_weight(self, weight: Tensor, bias: Tensor) -> list[str]:
        """Names of weight and bias."""
        layer = next(self.layers)
        return [self.array(f"{layer}.weight", weight), self.array(f"{layer}.bias", bias)]

    def clip(self, x: str, low: float, high: float) -> str:
        ends = [self.array(f"clip_{end:g}", np.float32(end)) for end in (low, high)]
        return self.node("Clip", [x, *ends])

    def float_add(self, x: str, y: str, _alpha: int) -> str:
        return self.node("Add", [x, y])

    def average_pool(self, x: str | _Quantized, _size: list[int]) -> str | _Quantized:
        # torch keeps the scale of an int8 input.
        if isinstance(x, str):
            return self.node("GlobalAveragePool", [x])
        return self.quantize(self.node("GlobalAveragePool", [self.dequantize(x)]), x.scale, x.zero_point)

    def flatten(self, x: str | _Quantized, _start: int, _end: int) -> str | _Quantized:
        if isinstance(x, str):
            return self.node("Flatten", [x], axis=1)
        return self.quantize(self.node("Flatten", [self.dequantize(x)], axis=1), x.scale, x.zero_point)

    def quantize_images(self, x: str, scale: float, zero_point: int, _dtype: int) -> _Quantized:
        return self.quantize(x, float(scale), int(zero_point))

    def int8_convolution(
        self, x: _Quantized, packed: torch.ScriptObject, scale: float, zero_point: int
    ) -> _Quantized:
        ops = torch.ops.quantized
        read = (ops.conv2d_stride, ops.conv2d_padding, ops.conv2d_dilation, ops.conv2d_groups)
        attributes = _convolution_attributes(*(attribute(packed) for attribute in read))
        inputs = [self.dequantize(x), *self.int8_weight(*ops.conv2d_unpack(packed), x.scale)]
        return self.quantize(self.node("Conv", inputs, **attributes), scale, zero_point)

    def int8_linear(
        self, x: _Quantized, packed: torch.ScriptObject, scale: float, zero_point: int
    ) -> _Quantized:
        weight_and_bias = torch.ops.quantized.linear_unpack(packed)
        inputs = [self.dequantize(x), *self.int8_weight(*weight_and_bias, x.scale)]
        return self.quantize(self.node("Gemm", inputs, transB=1), scale, zero_point)

    def int8_add(self, x: _Quantized, y: _Quantized, scale: float, zero_point: int) -> _Quantized:
        return self.quantize(self.node("Add", [self.dequantize(x), self.dequantize(y)]), scale, zero_point)

    def int8_weight(self, weight: Tensor, bias: Tensor, input_scale: float) -> list[str]:
        """Names of weight and bias, as they come out of DequantizeLinear."""
        layer = next(self.layers)
        if weight.qscheme() == torch.per_tensor_affine:
            scale = np.float32(weight.q_scale())
        else:
            scale = weight.q_per_channel_scales().float().numpy()
        bias_scale = scale * np.float32(input_scale)
        codes = np.rint(bias.detach().double().numpy() / bias_scale)
        limits = np.iinfo(np.int32)
        kinds = {
            "weight": (weight.int_repr().numpy(), scale),
            "bias": (codes.clip(limits.min, limits.max).astype(np.int32), bias_scale),
        }
        return [
            self.node(
                "DequantizeLinear",
                [
                    self.array(f"{layer}.{kind}", codes),
                    self.array(f"{layer}.{kind}_scale", scale),
                    self.array(f"{layer}.{kind}_zero_point", np.zeros_like(scale, dtype=codes.dtype)),
                ],
                **({"axis": 0} if scale.ndim else {}),
            )
            for kind, (codes, scale) in kinds.items()
        ]

    def quantize(self, x: str, scale: float, zero_point: int) -> _Quantized:
        return _Quantized(self.node("QuantizeLinear", [x, *self.range(scale, zero_point)]), scale, zero_point)

    def dequantize(self, x: _Quantized) -> str:
        # One for each reader, which is how runtimes recognize an int8 operation.
        return self.node("DequantizeLinear", [x.codes, *self.range(x.scale, x.zero_point)])

    def range(self, scale: float, zero_point: int) -> list[str]:
        return [
            self.array(f"scale_{scale!r}", np.float32(scale)),
            self.array(f"zero_point_{zero_point}", np.uint8(zero_point)),
        ]

    def array(self, name: str, value: Any) -> str:
        self.arrays[name] = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return name

    def node(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(
            {"op_type": op_type, "name": name, "inputs": inputs, "outputs": [name], **attributes}
        )
        return name


def _convolution_attributes(stride, padding, dilation, groups: int) -> dict[str, Any]:
    return {
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": int(groups),
    }
