"""Flags, calibration images, and the comparison of int8 with float, for both PTQ and QAT."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models import MobileNetV2
from models.statistics import count_macs
from utils.checkpoints.metadata import Metadata
from utils.checkpoints.weights import CompleteWeights
from utils.common.cli import positive_int
from utils.common.files import BYTES_PER_MB
from utils.common.runtime import cpu_name
from utils.data.datasets import ImageData, Normalization
from utils.data.loader import Loader
from utils.deployment.latency import format_rows, measure_fastest_forms
from utils.deployment.torchscript import (
    Scripted,
    float_forms,
    pack_torchscript,
    save_torchscript,
    to_torchscript,
)
from utils.evaluation import Evaluation, evaluate
from utils.quantization.eager import WEIGHT_BITS
from utils.quantization.int8_model import Int8Model

WARM_UP = 10
COLUMNS = {
    "model": ("variant", "{}"),
    "file MB": ("size_mb", "{:.2f}"),
    "density %": ("density_pct", "{:.2f}"),
    "test %": ("test_accuracy_pct", "{:.2f}"),
    "vs float": ("accuracy_change_points", "{:+.2f}"),
    "median ms": ("median_latency_ms", "{:.3f}"),
    "p90 ms": ("p90_latency_ms", "{:.3f}"),
    "speed-up": ("speedup", "{:.2f}"),
}
"""Columns of the printed table: header, key, format."""


def add_quantization_arguments(parser: ArgumentParser) -> None:
    """Add --weights, --backend, --weight_bits and the flags of calibration, evaluation and timing."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--weights",
        default="qmodel.pth",
        help="float weights (dense or pruned) or a qmodel; .pth or packed",
    )
    group.add_argument(
        "--backend",
        default="fbgemm",
        metavar="ENGINE",
        help="quantization engine to make the int8 models for: fbgemm, x86 or onednn (x86 CPUs; "
        "benchmarks/README.md says which is the fastest when), qnnpack (ARM)",
    )
    group.add_argument(
        "--weight_bits",
        type=int,
        choices=WEIGHT_BITS,
        default=8,
        help="bits of the quantized weights, such as 6 for -31 to 31. They are still stored and run as "
        "int8; only scripts/pack_weights.py makes the file smaller. The first layer and the depthwise "
        "convolutions (3 %% of the weights) keep 8 bits",
    )
    group.add_argument(
        "--num_calibration_batches",
        type=positive_int,
        default=32,
        help="batches of training images to calibrate activation ranges on",
    )
    group.add_argument(
        "--num_eval_batches",
        type=positive_int,
        help="evaluate on at most this many batches (default: all images)",
    )
    group = parser.add_argument_group("latency")
    group.add_argument("--latency_batch_size", type=positive_int, default=1, help="images per timed batch")
    group.add_argument(
        "--latency_rounds", type=positive_int, default=100, help="timed calls of each model, interleaved"
    )


def calibration_batches(data: ImageData, normalization: Normalization, args: Namespace) -> Loader:
    """Return training images to calibrate on, not augmented, shuffled with the seed."""
    return Loader(
        data.train,
        normalization,
        args.batch_size,
        shuffle=True,
        limit=args.num_calibration_batches,
        seed=args.seed,
    )


@dataclass(frozen=True)
class Deployment:
    """A model as TorchScript, with its results on the test images and the size of its file."""

    model: MobileNetV2 | Int8Model
    scripted: Scripted
    metadata: Metadata
    evaluation: Evaluation
    images_available: int
    size_mb: float

    def save(self, path: str | os.PathLike) -> None:
        """Write the TorchScript file.

        Raises:
            UserError: as `save_torchscript`.
        """
        save_torchscript(path, self.scripted, self.metadata)


def deploy(
    variant: str,
    model: MobileNetV2 | Int8Model,
    weights: CompleteWeights,
    engine: str,
    batches: Loader,
    metrics: dict[str, Any] | None = None,
) -> Deployment:
    """Convert a model to TorchScript and evaluate the result.

    Args:
        variant: one of utils.checkpoints.metadata.VARIANTS.
        model: int8, or float with its batch norms folded.
        weights: what it was made from, with class names and normalization.
        engine: the current quantization engine.
        batches: batches of the test split.
        metrics: measured numbers to store in the file along with the accuracy.
    """
    if isinstance(model, Int8Model):
        tensors = [*model.weights.values(), *model.biases.values()]
    else:
        tensors = list(model.parameters())
    counts = [(tensor.numel(), int(torch.count_nonzero(tensor)), tensor.itemsize) for tensor in tensors]
    scripted = to_torchscript(model, weights.image_size)
    evaluation = evaluate(scripted, batches)
    metadata = Metadata(
        variant=variant,
        engine=engine if isinstance(model, Int8Model) else None,
        architecture=weights.model.architecture,
        class_names=weights.class_names,
        normalization=weights.normalization,
        image_size=weights.image_size,
        parameters=sum(total for total, _, _ in counts),
        nonzeros=sum(nonzeros for _, nonzeros, _ in counts),
        macs=sum(count_macs(weights.model, weights.image_size).values()),
        dense_size_mb=sum(total * size for total, _, size in counts) / BYTES_PER_MB,
        nonzero_size_mb=sum(nonzeros * size for _, nonzeros, size in counts) / BYTES_PER_MB,
        metrics={
            "test_accuracy_pct": evaluation.accuracy_pct,
            "test_images": evaluation.total,
            **(metrics or {}),
        },
    )
    size_mb = len(pack_torchscript(scripted, metadata)) / BYTES_PER_MB
    return Deployment(model, scripted, metadata, evaluation, len(batches.split), size_mb)


def compare(deployments: Sequence[Deployment], args: Namespace) -> list[dict[str, Any]]:
    """Time the models in interleaved rounds and return one row each; the first is the float model.

    The float model is timed in its fastest TorchScript form, so that the speed-up is not overstated.
    """
    first = deployments[0]
    side = first.metadata.image_size
    inputs = torch.randn(args.latency_batch_size, 3, side, side).to(memory_format=torch.channels_last)
    # New modules: those that were evaluated keep kernels for another batch size with some engines.
    models = {first.metadata.variant: float_forms(first.scripted, side)}
    for deployment in deployments[1:]:
        models[deployment.metadata.variant] = {"TorchScript": to_torchscript(deployment.model, side)}
    latencies = measure_fastest_forms(models, inputs, args.latency_rounds, WARM_UP)
    _, first_latency = latencies[first.metadata.variant]
    rows = []
    for deployment in deployments:
        evaluation, metadata = deployment.evaluation, deployment.metadata
        _, latency = latencies[metadata.variant]
        rows.append(
            {
                "variant": metadata.variant,
                "engine": metadata.engine,
                "size_mb": deployment.size_mb,
                "density": metadata.density,
                "test_accuracy_pct": evaluation.accuracy_pct,
                "test_correct": evaluation.correct,
                "test_images": evaluation.total,
                "test_images_available": deployment.images_available,
                "accuracy_change_points": evaluation.accuracy_pct - first.evaluation.accuracy_pct,
                "latency_batch_size": latency.batch_size,
                "median_latency_ms": latency.median_ms,
                "p90_latency_ms": latency.percentile_ms(90),
                "speedup": latency.speedup_over(first_latency),
            }
        )
    return rows


def format_comparison(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows of `compare` below a line that names the conditions."""
    conditions = (
        f"torch {torch.__version__}, {cpu_name()}, {torch.get_num_threads()} threads, "
        f"times of a batch of {rows[0]['latency_batch_size']}"
    )
    evaluated, available = rows[0]["test_images"], rows[0]["test_images_available"]
    if evaluated < available:
        conditions += f"\naccuracy on {evaluated:,} of {available:,} test images"
    rows = [{**row, "density_pct": 100 * row["density"]} for row in rows]
    return f"{conditions}\n\n{format_rows(rows, COLUMNS)}"
