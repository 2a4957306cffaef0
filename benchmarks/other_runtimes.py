"""Models in ONNX Runtime and OpenVINO: float, int8 by their own static quantization, and our int8.

For benchmarks/runtimes.py alone; the packages are optional.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.common.errors import UserError
from utils.common.optional_packages import import_optional
from utils.deployment.onnx import INPUT, start_session

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A model in a runtime.

    Args:
        start: from threads and batch size to its forms by name (an engine, say), of which the
            fastest counts; each maps images to logits.
        memory_format: of the images that it takes without rearranging them.
    """

    start: Callable[[int, int], dict[str, Run]]
    memory_format: torch.memory_format = torch.contiguous_format


def onnxruntime_contestants(
    float_model: bytes, our_int8: bytes, calibration: list[Tensor]
) -> dict[str, Contestant]:
    """ONNX Runtime, with its own quantization (QDQ, per channel) and with ours."""
    import_optional("onnx", "onnxruntime", "onnxruntime.quantization")
    own_int8 = quantize_by_onnxruntime(float_model, calibration)

    def contestant(model: bytes) -> Contestant:
        return Contestant(lambda threads, _batch_size: {"default": start_session(model, threads)})

    return {
        "ONNX Runtime float": contestant(float_model),
        "ONNX Runtime int8, its own": contestant(own_int8),
        "ONNX Runtime int8, our weights": contestant(our_int8),
    }


def quantize_by_onnxruntime(float_model: bytes, calibration: list[Tensor]) -> bytes:
    """Its static quantization: QDQ, weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(float_model)
        quantize_static(
            source,
            target,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


def openvino_contestants(
    float_model: bytes, our_int8: bytes, calibration: list[Tensor]
) -> dict[str, Contestant]:
    """OpenVINO, with its own quantization (NNCF), if that is installed, and with ours."""
    openvino, _ = import_optional("openvino", "openvino.passes")
    core = openvino.Core()

    def read(model: bytes) -> Any:
        return core.read_model(io.BytesIO(model))

    def contestant(graph: Any) -> Contestant:
        def start(threads: int, batch_size: int) -> dict[str, Run]:
            fixed = graph.clone()
            fixed.reshape([batch_size, *(d.get_length() for d in list(graph.input(0).partial_shape)[1:])])
            options = {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",  # or float layers would run in bfloat16
            }
            request = core.compile_model(fixed, "CPU", options).create_infer_request()

            def run(images: Tensor) -> Tensor:
                results = request.infer({0: images.numpy()}, share_inputs=True, share_outputs=True)
                return torch.from_numpy(results[0])

            return {"default": run}

        return Contestant(start)

    contestants = {
        "OpenVINO float": contestant(read(float_model)),
        "OpenVINO int8, our weights": contestant(read(our_int8)),
    }
    try:
        (nncf,) = import_optional("nncf")
    except UserError as error:
        print(f"left out: OpenVINO int8, its own ({error})")
        return contestants
    # Else NNCF takes the weights of depthwise convolutions for activations and leaves them float. (Not
    # for a model with our int8 weights: they would be folded to float.)
    folding, folded = openvino.passes.Manager(), read(float_model)
    folding.register_pass(openvino.passes.ConstantFolding())
    folding.run_passes(folded)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        images = nncf.Dataset([batch.numpy() for batch in calibration])
        quantized = nncf.quantize(folded, images, subset_size=len(calibration))
    return contestants | {"OpenVINO int8, its own": contestant(quantized)}
