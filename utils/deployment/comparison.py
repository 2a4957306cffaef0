"""What PTQ and QAT share: flags, calibration images, and the comparison of int8 with float."""

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
from utils.common.tables import format_table
from utils.data.datasets import ImageData, Normalization
from utils.data.loader import Loader
from utils.deployment.latency import measure_fastest_forms
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
        help="quantization engine that the int8 models are made for: fbgemm, x86 or onednn (x86 CPUs; "
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
        help="batches of training images that activation ranges are calibrated on",
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
    """Return training images to calibrate on: not augmented, shuffled by the seed."""
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
    """A model as TorchScript, with its results on the test images; `size_mb` is the size of its file."""

    model: MobileNetV2 | Int8Model
    scripted: Scripted
    metadata: Metadata
    evaluation: Evaluation
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
        batches: of the test split.
        metrics: stored in the file along with the accuracy.
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
    return Deployment(model, scripted, metadata, evaluation, size_mb)


def compare(deployments: Sequence[Deployment], args: Namespace) -> list[dict[str, Any]]:
    """Time the models in interleaved rounds and return one row each, relative to the first, float one.

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
                "accuracy_change_points": evaluation.accuracy_pct - first.evaluation.accuracy_pct,
                "latency_batch_size": latency.batch_size,
                "median_latency_ms": latency.median_ms,
                "p90_latency_ms": latency.p90_ms,
                "speedup": latency.speedup_over(first_latency),
            }
        )
    return rows


def format_comparison(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows of `compare` under a line that names the conditions."""
    batch_size = rows[0]["latency_batch_size"]
    conditions = (
        f"torch {torch.__version__}, {cpu_name()}, {torch.get_num_threads()} threads, "
        f"times of a batch of {batch_size}"
    )
    table = format_table(
        ["model", "file MB", "density %", "test %", "vs float", "median ms", "p90 ms", "speed-up"],
        [
            (
                row["variant"],
                f"{row['size_mb']:.2f}",
                f"{100 * row['density']:.2f}",
                f"{row['test_accuracy_pct']:.2f}",
                f"{row['accuracy_change_points']:+.2f}",
                f"{row['median_latency_ms']:.3f}",
                f"{row['p90_latency_ms']:.3f}",
                f"{row['speedup']:.2f}",
            )
            for row in rows
        ],
    )
    return f"{conditions}\n\n{table}"
