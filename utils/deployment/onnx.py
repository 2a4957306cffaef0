"""ONNX files with exactly our weights: float, or int8 with QuantizeLinear and DequantizeLinear (QDQ).

torch's own exporter needs another package and converts int8 weights to float and back.

Activations are quantized in the same places, with the same scales and zero points. In int8, ReLU6 needs
no node: the range of the convolution before it ends at 6, where QuantizeLinear saturates. Biases are
int32, in steps of the input scale times the weight scale, to which utils/quantization/int8_model.py has
rounded them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from models import MobileNetV2
from models.folding import INPUT, Operation, walk
from utils.checkpoints.metadata import Metadata
from utils.common.errors import UserError
from utils.common.optional_packages import import_optional
from utils.quantization.int8_model import Int8Model

if TYPE_CHECKING:
    import onnx

OPSET = 13
"""The first opset with per-channel scales."""
IR_VERSION = 8
"""Runtimes have supported it since 2021; last year's releases refuse the newest version."""
FLOAT_TOLERANCE = 1e-4
"""Relative to the largest logit, or absolute if that is below 1."""
FLOAT_SAME_CLASS_PCT = 99.0
"""Not 100, since an image may lie on the border between two classes."""
INT8_STEPS = 8
INT8_SAME_CLASS_PCT = 98.0
"""Measured on 2,000 images: 2 steps and 100 % for fbgemm files, 4 steps and 99.8 % for x86 files. Engines
round ties differently, which changes one activation in a million."""
OUTPUT = "logits"


def to_onnx(
    model: MobileNetV2 | Int8Model, metadata: Metadata, batch_size: int | None = None
) -> "onnx.ModelProto":
    """Build the ONNX model: normalized float images (N, 3, H, W) to float logits (N, classes).

    Variant, architecture, class names and normalization are stored in its metadata properties.

    Args:
        model: float with its batch norms folded, or int8.
        metadata: of the model.
        batch_size: N; None for any number.

    Raises:
        UserError: onnx is not installed.
    """
    (onnx,) = import_optional("onnx")
    graph = _Int8Graph(model) if isinstance(model, Int8Model) else _Graph(walk(model))
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    n = "batch" if batch_size is None else batch_size
    side, classes = metadata.image_size, metadata.architecture["num_classes"]
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node(**node) for node in graph.nodes],
            "MobileNetV2",
            [helper.make_tensor_value_info(INPUT, float32, [n, 3, side, side])],
            [helper.make_tensor_value_info(OUTPUT, float32, [n, classes])],
            [onnx.numpy_helper.from_array(array, name) for name, array in graph.arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mobilenetv2",
    )
    properties = {
        "variant": metadata.variant,
        "architecture": metadata.architecture,
        "class_names": metadata.class_names,
        "normalization": asdict(metadata.normalization) if metadata.normalization else None,
    }
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in properties.items()})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def start_session(model: bytes, threads: int) -> Callable[[Tensor], Tensor]:
    """Return a function that maps images to logits with ONNX Runtime on the CPU.

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


def check_logits(path: str | os.PathLike, ours: Tensor, theirs: Tensor, step: float | None) -> str:
    """Make sure that an exported model computes what the original does.

    Args:
        path: the file to write, for the message.
        ours: logits (N, classes) of the original model.
        theirs: logits (N, classes) of the exported model for the same images.
        step: quantization step of the logits of an int8 model; None for a float model.

    Returns:
        One line that says how much they differ.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    largest = (ours - theirs).abs().max().item()
    same_class_pct = 100 * int((ours.argmax(1) == theirs.argmax(1)).sum()) / len(ours)
    if step is None:
        allowed, wanted_pct = FLOAT_TOLERANCE * max(1.0, ours.abs().max().item()), FLOAT_SAME_CLASS_PCT
    else:
        allowed, wanted_pct = INT8_STEPS * step, INT8_SAME_CLASS_PCT
    # Written so that NaN fails as well.
    if not (largest <= allowed and same_class_pct >= wanted_pct):
        raise UserError(
            f"{path} was not written: its logits differ from ours by up to {largest:.2g} "
            f"({allowed:.2g} is allowed) and {same_class_pct:.2f} % of the images get the same "
            f"class ({wanted_pct} % is wanted): try another version of onnxruntime"
        )
    steps = "" if step is None else f" ({largest / step:.0f} steps of int8)"
    return (
        f"checked on {len(ours)} test images: logits differ by at most {largest:.2g}{steps}, "
        f"{same_class_pct:.2f} % get the same class"
    )


class _Graph:
    """Nodes and arrays of the ONNX graph of a float model; `values` maps operations to ONNX values."""

    def __init__(self, operations: list[Operation]) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.values: dict[str, str] = {}
        self.store(INPUT, INPUT)
        for operation in operations:
            inputs, layer = [self.load(name) for name in operation.inputs], operation.layer
            if operation.kind == "pool":
                self.store(self.node("GlobalAveragePool", inputs), operation.name)
                value = self.node("Flatten", [self.load(operation.name)], axis=1)
            elif operation.kind == "add":
                value = self.node("Add", inputs)
            elif isinstance(layer, nn.Linear):
                value = self.node("Gemm", [*inputs, *self.parameters(operation)], transB=1)
            else:
                assert isinstance(layer, nn.Conv2d)
                value = self.node(
                    "Conv",
                    [*inputs, *self.parameters(operation)],
                    strides=list(layer.stride),
                    pads=[*layer.padding, *layer.padding],
                    dilations=list(layer.dilation),
                    group=layer.groups,
                )
            self.store(value, operation.name, operation.has_relu6)
        self.load(operations[-1].name)
        self.nodes[-1]["outputs"] = [OUTPUT]

    def array(self, name: str, value: Any) -> str:
        self.arrays[name] = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return name

    def node(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(
            {"op_type": op_type, "name": name, "inputs": inputs, "outputs": [name], **attributes}
        )
        return name

    def store(self, value: str, name: str, has_relu6: bool = False) -> None:
        """Make a value the output of an operation."""
        if has_relu6:
            ends = [self.array(f"clip_{end}", np.float32(end)) for end in (0, 6)]
            value = self.node("Clip", [value, *ends])
        self.values[name] = value

    def load(self, name: str) -> str:
        """Return the output of an operation as a float value."""
        return self.values[name]

    def parameters(self, operation: Operation) -> list[str]:
        """Add the weight and the bias of a layer."""
        kinds = ("weight", "bias")
        return [self.array(f"{operation.name}.{kind}", getattr(operation.layer, kind)) for kind in kinds]


class _Int8Graph(_Graph):
    """The graph of an int8 model, in which activations and parameters are quantized."""

    def __init__(self, model: Int8Model) -> None:
        self.model = model
        super().__init__(model.operations)

    def qparams(self, name: str) -> list[str]:
        qparams = self.model.qparams(name)
        return [
            self.array(f"scale_{qparams.scale!r}", np.float32(qparams.scale)),
            self.array(f"zero_point_{qparams.zero_point}", np.uint8(qparams.zero_point)),
        ]

    def store(self, value: str, name: str, has_relu6: bool = False) -> None:
        self.values[name] = self.node("QuantizeLinear", [value, *self.qparams(name)])

    def load(self, name: str) -> str:
        # One node per consumer: the pattern by which runtimes recognize int8 operations.
        return self.node("DequantizeLinear", [self.values[name], *self.qparams(name)])

    def parameters(self, operation: Operation) -> list[str]:
        model, name = self.model, operation.name
        scale = model.scales[name].numpy() if model.per_channel else np.float32(model.scales[name].item())
        bias_scale = scale * np.float32(model.input_scale(name))
        limits = np.iinfo(np.int32)
        bias = np.rint(model.biases[name].double().numpy() / bias_scale).clip(limits.min, limits.max)
        return [
            self.quantized(f"{name}.weight", model.weights[name].numpy(), scale),
            self.quantized(f"{name}.bias", bias.astype(np.int32), bias_scale),
        ]

    def quantized(self, name: str, values: np.ndarray, scale: Any) -> str:
        """Add a quantized weight or bias and return the output of its DequantizeLinear."""
        inputs = [
            self.array(name, values),
            self.array(f"{name}_scale", scale),
            self.array(f"{name}_zero_point", np.zeros_like(scale, dtype=values.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, **({"axis": 0} if scale.ndim else {}))
