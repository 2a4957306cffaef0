"""Evaluate any file that holds a model: float or pruned weights, a qmodel, a teacher, or TorchScript.

Prints accuracy, accuracy by class and loss on a split, and what the model holds and costs.
"""

import argparse
import sys
from typing import Any

from tqdm import tqdm

from utils.checkpoints.weights import ALL_KINDS, add_output_stride_argument
from utils.common import cli, errors, runtime
from utils.common.devices import add_device_argument
from utils.common.files import file_size_mb
from utils.common.tables import format_table
from utils.data.datasets import load_data
from utils.data.loader import Loader
from utils.evaluation import Evaluation, evaluate
from utils.open_model import ModelFile, device_for, open_model


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="file of any kind that this project writes")
    add_output_stride_argument(parser)
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="images to evaluate on"
    )
    parser.add_argument("--batch_size", type=cli.positive_int, default=100, help="images per batch")
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    add_device_argument(parser)
    cli.add_record_argument(parser)
    cli.add_force_argument(parser)
    return parser


def describe_accuracy(split: str, evaluation: Evaluation, class_names: tuple[str, ...]) -> str:
    """Return accuracy and loss in a line, and a table by class."""
    by_class = zip(class_names, evaluation.correct_by_class, evaluation.total_by_class, strict=True)
    rows = [
        (name, f"{100 * correct / total:.2f}" if total else None, correct, total)
        for name, correct, total in by_class
    ]
    return (
        f"{split} accuracy {evaluation.accuracy_pct:.2f} % ({evaluation.correct} / {evaluation.total}), "
        f"loss {evaluation.loss:.4f}\n\n" + format_table(["class", "accuracy %", "correct", "images"], rows)
    )


def describe_model(file: ModelFile) -> str:
    """Say what the model holds and costs, one line each."""
    metadata = file.metadata
    return format_table(
        ["model", metadata.variant],
        [
            ("parameters", f"{metadata.parameters:,}"),
            ("nonzero", f"{metadata.nonzeros:,}"),
            ("density %", f"{100 * metadata.density:.2f}"),
            ("size dense, MB", f"{metadata.dense_size_mb:.2f}"),
            ("size of the nonzeros, MB", f"{metadata.nonzero_size_mb:.2f}"),
            ("size of the file, MB", f"{file_size_mb(file.path):.2f}"),
            (f"MACs per image of {metadata.image_size}x{metadata.image_size}", f"{metadata.macs:,}"),
        ],
    )


def as_record(
    file: ModelFile, split: str, evaluation: Evaluation, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Return the same numbers by name, for --record."""
    metadata = file.metadata
    return {
        "variant": metadata.variant,
        "split": split,
        "accuracy_pct": evaluation.accuracy_pct,
        "correct": evaluation.correct,
        "total": evaluation.total,
        "loss": evaluation.loss,
        "correct_by_class": dict(zip(class_names, evaluation.correct_by_class, strict=True)),
        "total_by_class": dict(zip(class_names, evaluation.total_by_class, strict=True)),
        "parameters": metadata.parameters,
        "nonzeros": metadata.nonzeros,
        "density": metadata.density,
        "dense_size_mb": metadata.dense_size_mb,
        "nonzero_size_mb": metadata.nonzero_size_mb,
        "file_size_mb": file_size_mb(file.path),
        "macs": metadata.macs,
        "image_size": metadata.image_size,
    }


def main(args: argparse.Namespace) -> None:
    """Open the file, evaluate it, print and record."""
    runtime.set_up(args.seed, args.threads)
    runtime.check_outputs(args)
    file = open_model(args.weights, args.output_stride, ALL_KINDS)
    device = device_for(file, args)
    data = load_data(args, file.metadata.image_size)
    normalization = file.fit(data)
    split = data.split(args.split)
    batches = tqdm(
        Loader(split, normalization, args.batch_size),
        desc=f"evaluating on {args.split}",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    file.use_engine()
    evaluation = evaluate(file.model.to(device), batches)
    # First, since a reader such as `head` may end the printing early.
    if args.record:
        runtime.write_record(args.record, args, as_record(file, args.split, evaluation, data.class_names))
    print(describe_accuracy(args.split, evaluation, data.class_names))
    print()
    print(describe_model(file))


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
