"""Benchmark inference with model files of any kind, in interleaved rounds.

Weights (.pth) are timed the way they would be deployed: as frozen TorchScript with the batch norms folded
into the convolutions, in whichever form is fastest in these rounds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from utils.checkpoints.weights import add_output_stride_argument
from utils.common import cli, errors, runtime
from utils.common.csv_files import write_csv
from utils.common.errors import UserError
from utils.common.files import file_size_mb
from utils.deployment.latency import Latency, format_rows, measure_fastest_forms
from utils.deployment.torchscript import float_forms
from utils.open_model import ModelFile, open_model

COLUMNS = {
    "file": ("file", "{}"),
    "variant": ("variant", "{}"),
    "size MB": ("size_mb", "{:.2f}"),
    "median ms": ("median_latency_ms", "{:.3f}"),
    "p90 ms": ("p90_latency_ms", "{:.3f}"),
    "p99 ms": ("p99_latency_ms", "{:.3f}"),
    "ms/image": ("median_latency_ms_per_image", "{:.4f}"),
    "images/s": ("images_per_s", "{:.1f}"),
    "speed-up": ("speedup", "{:.2f}"),
}
"""Columns of the printed table: header, name in CSV and record, format."""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--model_file",
        required=True,
        nargs="+",
        metavar="FILE",
        help="files of any kind that this project writes; the others are compared with the first",
    )
    add_output_stride_argument(parser)
    parser.add_argument("--batch_size", type=cli.positive_int, default=1, help="images per batch")
    parser.add_argument("--rounds", type=cli.positive_int, default=200, help="timed calls of each file")
    parser.add_argument(
        "--warm_up", type=cli.positive_int, default=10, help="untimed calls of each file before the rounds"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    cli.add_runtime_arguments(parser)
    cli.add_record_argument(parser)
    cli.add_force_argument(parser)
    return parser


def open_files(args: argparse.Namespace) -> dict[str, ModelFile]:
    """Open the files; return them by path.

    Raises:
        UserError: one of them cannot be opened, or they take images of different sizes.
    """
    files = {path: open_model(path, args.output_stride) for path in dict.fromkeys(args.model_file)}
    first = files[args.model_file[0]]
    for file in files.values():
        sides = file.metadata.image_size, first.metadata.image_size
        if sides[0] != sides[1]:
            raise UserError(
                f"{file.path} takes images of {sides[0]} pixels, {first.path} of {sides[1]}: "
                "give files of one image size"
            )
    return files


def rows_of(files: dict[str, ModelFile], measured: dict[str, tuple[str, Latency]]) -> list[dict[str, Any]]:
    """Return one row per file, with units in the names; `speedup` is relative to the first file."""
    _, first = next(iter(measured.values()))
    return [
        {
            "file": name,
            "variant": files[name].metadata.variant,
            "size_mb": round(file_size_mb(name), 2),
            "median_latency_ms": round(latency.median_ms, 3),
            "p90_latency_ms": round(latency.percentile_ms(90), 3),
            "p99_latency_ms": round(latency.percentile_ms(99), 3),
            "median_latency_ms_per_image": round(latency.median_ms / latency.batch_size, 4),
            "images_per_s": round(1000 * latency.batch_size / latency.median_ms, 1),
            "speedup": round(latency.speedup_over(first), 2),
        }
        for name, (_, latency) in measured.items()
    ]


def main(args: argparse.Namespace) -> None:
    """Open the files, time them in rounds, print, write and record."""
    runtime.set_up(args.seed, args.threads)
    runtime.check_outputs(args, "csv")
    files = open_files(args)
    image_size = next(iter(files.values())).metadata.image_size
    inputs = torch.randn(args.batch_size, 3, image_size, image_size).to(memory_format=torch.channels_last)

    # Only the fastest form of each model is shown.
    forms = {
        name: {f"TorchScript, engine {engine}": file.model}
        if (engine := file.metadata.engine)
        else float_forms(file.model, image_size)
        for name, file in files.items()
    }
    fastest = measure_fastest_forms(
        forms,
        inputs,
        args.rounds,
        args.warm_up,
        before=lambda name: files[name].use_engine(),
    )
    for name, (form, _) in fastest.items():
        print(f"{name}: {files[name].metadata.variant}, {form}")
    rows = rows_of(files, fastest)
    print(
        f"torch {torch.__version__}, {runtime.cpu_name()}, {torch.get_num_threads()} threads, "
        f"batch size {args.batch_size}, images of {image_size}x{image_size}, {args.rounds} rounds\n"
    )
    print(format_rows(rows, COLUMNS))
    if args.csv:
        write_csv(args.csv, list(rows[0]), [list(row.values()) for row in rows])
    if args.record:
        runtime.write_record(args.record, args, {"batch_size": args.batch_size, "files": rows})


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
