"""Classify photos with a model file of any kind: the most probable classes of each, one line per image.

Images may have any size and mode. They are resized and normalized as the model's file says.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.checkpoints.weights import ALL_KINDS, add_output_stride_argument
from utils.common import cli, errors, files, runtime
from utils.common.csv_files import write_csv
from utils.common.devices import add_device_argument, device_of
from utils.common.errors import UserError, printable
from utils.data.datasets import given_normalization
from utils.data.image_file import IMAGE_EXTENSIONS, read_image
from utils.data.loader import normalize
from utils.evaluation import NotFiniteError
from utils.open_model import ModelFile, device_for, open_model

Prediction = list[tuple[str, float]]
"""Classes and their probabilities in percent, the most probable first."""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, or folders of images")
    parser.add_argument("--weights", required=True, help="file of any kind that this project writes")
    add_output_stride_argument(parser)
    cli.add_normalization_argument(parser)
    parser.add_argument("--top_k", type=cli.positive_int, default=3, help="classes per image")
    parser.add_argument("--batch_size", type=cli.positive_int, default=64, help="images per batch")
    parser.add_argument("--csv", metavar="FILE", help="write the predictions as CSV instead of printing them")
    cli.add_force_argument(parser)
    cli.add_runtime_arguments(parser)
    add_device_argument(parser)
    return parser


def list_images(given: Sequence[str]) -> list[Path]:
    """Return the images that the command line names, those of a folder and its subfolders in order.

    Raises:
        UserError: a path does not exist, or a folder holds no images.
    """
    paths: list[Path] = []
    for one in map(Path, given):
        if not one.is_dir():
            paths.append(one)
            continue
        found = [
            path for path in sorted(one.rglob("*")) if not path.name.startswith(".") and not path.is_dir()
        ]
        images = [path for path in found if path.suffix.lower() in IMAGE_EXTENSIONS]
        if not images:
            raise UserError(f"{one} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
        if len(found) > len(images):
            print(f"note: {len(found) - len(images)} other files in {one} are skipped", file=sys.stderr)
        paths += images
    return paths


def read_batches(
    paths: Sequence[Path], image_size: int, batch_size: int, unreadable: list[Path]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield the paths and pixels, (B, 3, H, W) uint8, of the images that can be read.

    Args:
        unreadable: the other paths are appended here, after a line on stderr about each.
    """
    for start in range(0, len(paths), batch_size):
        read: list[tuple[Path, np.ndarray]] = []
        for path in paths[start : start + batch_size]:
            try:
                read.append((path, read_image(path, image_size)))
            except UserError as error:
                tqdm.write(f"error: {errors.one_line(error)}", file=sys.stderr)
                unreadable.append(path)
        if read:
            pixels = torch.from_numpy(np.stack([image for _, image in read]))
            yield [path for path, _ in read], pixels.permute(0, 3, 1, 2)


@torch.inference_mode()
def predict(file: ModelFile, pixels: Tensor, class_names: Sequence[str], top_k: int) -> list[Prediction]:
    """Return the `top_k` most probable classes of each image.

    Args:
        file: with a normalization.
        pixels: (B, 3, H, W) uint8, of the model's image size.

    Raises:
        NotFiniteError: a logit is not finite.
    """
    assert file.metadata.normalization is not None
    logits = file.model(normalize(pixels, file.metadata.normalization).to(device_of(file.model)))
    if not logits.isfinite().all():
        raise NotFiniteError
    probabilities, classes = (100 * logits.softmax(1)).topk(min(top_k, logits.shape[1]))
    return [
        [(class_names[label], percent) for label, percent in zip(*row, strict=True)]
        for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]


def main(args: argparse.Namespace) -> None:
    """Open the model, classify every image, print or write, and report the unreadable ones last."""
    runtime.set_up(args.seed, args.threads)
    runtime.check_outputs(args, "csv")
    file = open_model(args.weights, args.output_stride, ALL_KINDS).with_normalization(
        given_normalization(args)
    )
    class_names = file.metadata.class_names or tuple(
        f"class {label}" for label in range(file.metadata.architecture["num_classes"])
    )
    paths = list_images(args.images)
    files.check_outputs({"--csv": args.csv}, {"an image": paths}, force=args.force)
    file.model.to(device_for(file, args))
    file.use_engine()

    unreadable: list[Path] = []
    rows: list[list[object]] = []
    progress = tqdm(total=len(paths), disable=not (args.csv and sys.stderr.isatty()), leave=False)
    for batch, pixels in read_batches(paths, file.metadata.image_size, args.batch_size, unreadable):
        for path, found in zip(batch, predict(file, pixels, class_names, args.top_k), strict=True):
            name = printable(os.fspath(path))
            rows.append([name, *(cell for label, percent in found for cell in (label, round(percent, 2)))])
            if not args.csv:
                classes = ", ".join(f"{printable(label)} {percent:.2f} %" for label, percent in found)
                print(f"{name}: {classes}", flush=True)
        progress.update(len(batch))
    progress.close()
    if args.csv:
        count = max((len(row) // 2 for row in rows), default=0)
        columns = ["path", *(f"{what}_{k}" for k in range(1, count + 1) for what in ("class", "percent"))]
        write_csv(args.csv, columns, rows)
        print(f"wrote {args.csv}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(paths)} images could not be read, see above")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
