"""What the two quantization scripts share: flags, calibration images, and int8 beside float."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models import MobileNetV2
from models.statistics import count_macs
from utils.checkpoints.metadata import Metadata
from utils.checkpoints.weights import Weights
from utils.common.cli import positive_int
from utils.common.files import BYTES_PER_MB
from utils.common.runtime import cpu_name
from utils.common.tables import format_table
from utils.data.datasets import ImageData, Normalization
from utils.data.loader import Batches
from utils.deployment.latency import measure_fastest_forms
from utils.deployment.torchscript import (
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
    """--weights, --backend, --weight_bits, batches of calibration and evaluation, those of the timing."""
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
        help="codes of the weights: 6 are -31 to 31. They stay int8, as fast and as large, until "
        "scripts/pack_weights.py makes fewer codes a smaller file. The first layer and the depthwise "
        "ones, 3 %% of the weights, keep 8 bits",
    )
    group.add_argument(
        "--num_calibration_batches",
        type=positive_int,
        default=32,
        help="batches of training images that the ranges of the activations are taken from",
    )
    group.add_argument(
        "--num_eval_batches",
        type=positive_int,
        help="evaluate on at most so many batches (default: on all images)",
    )
    group = parser.add_argument_group("inference time")
    group.add_argument(
        "--latency_batch_size", type=positive_int, default=1, help="images a call whose time is taken"
    )
    group.add_argument(
        "--latency_rounds", type=positive_int, default=100, help="times taken of each model, in turns"
    )


def calibration_batches(data: ImageData, normalization: Normalization, args: Namespace) -> Batches:
    """Training images as they are used, not augmented, drawn by the seed."""
    return Batches(
        data.train,
        normalization,
        args.batch_size,
        shuffle=True,
        limit=args.num_calibration_batches,
        seed=args.seed,
    )


@dataclass(frozen=True)
class Deployment:
    """One form of a model with its results on the test images; `size_mb` is that of its file."""

    model: MobileNetV2 | Int8Model
    scripted: torch.jit.ScriptModule
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
    weights: Weights,
    engine: str,
    batches: Batches,
    metrics: dict[str, Any] | None = None,
) -> Deployment:
    """Turn a model into TorchScript and evaluate that.

    Args:
        variant: one of utils.checkpoints.metadata.VARIANTS.
        model: int8, or float with its batch norms folded.
        weights: what it was made from, with class names and normalization.
        engine: the current quantization engine.
        batches: of the test split.
        metrics: kept in the file, beside the accuracy.
    """
    is_int8 = isinstance(model, Int8Model)
    tensors = [*model.weights.values(), *model.biases.values()] if is_int8 else [*model.parameters()]
    counts = [(tensor.numel(), int(torch.count_nonzero(tensor)), tensor.itemsize) for tensor in tensors]
    scripted = to_torchscript(model, weights.image_size)
    evaluation = evaluate(scripted, batches)
    metadata = Metadata(
        variant=variant,
        engine=engine if is_int8 else None,
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
    """Time the models in turns; a row each, compared with the first one, which is float.

    The float model is timed in whichever form of TorchScript is the fastest here, so that the
    speed-up is not flattered.
    """
    first = deployments[0]
    side = first.metadata.image_size
    inputs = torch.randn(args.latency_batch_size, 3, side, side).to(memory_format=torch.channels_last)
    # Made anew, since these have run on batches of another size, which some engines do not forget.
    models = {d.metadata.variant: {"TorchScript": to_torchscript(d.model, side)} for d in deployments}
    models[first.metadata.variant] = float_forms(first.scripted, side)
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
    """The rows of `compare` as they are printed, under a line that says what was timed on what."""
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
