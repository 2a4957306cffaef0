"""Training throughput of train.py's path against the usual CIFAR loop, in images per second.

Usual: MobileNetV2 as torchvision builds it, in contiguous NCHW, a DataLoader over PIL images with
torchvision's random crop and flip, SGD with Nesterov momentum. Ours: the same model, batch size, kind of
augmentation and optimizer through our loader, training kernels and loop, in float32 and, where the CPU
computes with it, in bfloat16 (`train.py --amp`). With --ablation: our loop with our kernels against our loop
on torch's own operations, both in float32 and in bfloat16. Each side runs in a process of its own, since ours
also sets up the allocator. They take turns of a few steps each, and medians of the rounds are compared.
"""

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate

from models import MobileNetV2
from models.mobilenetv2 import OUTPUT_STRIDES
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.tables import format_table
from utils.data.datasets import Normalization, Split, load_data, measure_normalization
from utils.data.loader import Loader
from utils.training.kernels import build
from utils.training.kernels.layers import use_fast_layers
from utils.training.loop import cross_entropy, train_one_epoch
from utils.training.optimization import MOMENTUM
from utils.training.precision import is_fast_in_bfloat16

LR = 0.01
WORKERS = 2
Data = tuple[Split, Normalization]
Train = Callable[[int], None]
"""Trains on as many further batches."""


def augmented(transform: Callable, samples: list[tuple[Image.Image, int]]) -> list[torch.Tensor]:
    """Return a batch of images, each transformed on its own, and of labels."""
    return default_collate([(transform(image), label) for image, label in samples])


def usual_loop(data: Data, output_stride: int, batch_size: int) -> Train:
    """Train as the well-known CIFAR repos do."""
    from torchvision import transforms  # takes a second, and --help does not need it

    split, normalization = data
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    normalize = [transforms.ToTensor(), transforms.Normalize(normalization.mean, normalization.std)]
    collate = functools.partial(augmented, transforms.Compose([*augment, *normalize]))
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images]
    samples: Any = list(zip(images, split.labels.tolist(), strict=True))
    workers: Any = {"num_workers": WORKERS, "persistent_workers": True, "collate_fn": collate}
    loader = DataLoader(samples, batch_size, shuffle=True, drop_last=True, **workers)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    # torchvision's model has no output stride; ours has its layers and none of our speed-ups.
    model = MobileNetV2(output_stride=output_stride).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True)

    def train(count: int) -> None:
        for images, labels in itertools.islice(batches, count):
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()

    return train


def our_loop(
    data: Data, output_stride: int, batch_size: int, amp: bool = False, kernels: bool = True
) -> Train:
    """Train as train.py does, with `--amp` or without; `kernels=False` leaves every layer to torch."""
    runtime.keep_freed_memory()
    model = MobileNetV2(output_stride=output_stride).to(memory_format=torch.channels_last)
    if kernels:
        use_fast_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, fused=True)
    loader = Loader(*data, batch_size, shuffle=True, augment="crop_flip", drop_last=True)
    epochs = itertools.count(1)

    def train(count: int) -> None:
        batches = dataclasses.replace(loader, limit=count, epoch=next(epochs))
        train_one_epoch(model, batches, optimizer, cross_entropy(), [], amp)

    return train


SIDES: dict[str, Callable[[Data, int, int], Train]] = {
    "usual": usual_loop,
    "without_kernels": functools.partial(our_loop, kernels=False),
    "without_kernels_amp": functools.partial(our_loop, kernels=False, amp=True),
    "ours": our_loop,
    "ours_amp": functools.partial(our_loop, amp=True),
}


def serve(connection: Connection, side: str, threads: int, data: Data, *case: int) -> None:
    """Train, in a process of its own, as many steps as asked for, and answer with the seconds."""
    torch.set_num_threads(threads)
    train = SIDES[side](data, *case)
    while count := connection.recv():
        start = time.perf_counter()
        train(count)
        connection.send(time.perf_counter() - start)


def time_case(
    sides: list[str], data: Data, output_stride: int, batch_size: int, images: int, rounds: int
) -> dict[str, np.ndarray]:
    """Return the images per second of each side in each round."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    for side in sides:
        connections[side], theirs = context.Pipe()
        case = (theirs, side, torch.get_num_threads(), data, output_stride, batch_size)
        # Not daemonic: the usual loop has worker processes of its own.
        context.Process(target=serve, args=case).start()
        theirs.close()  # so that `recv` fails, rather than waits, if the process dies
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    steps = max(1, images // batch_size)
    for side, connection in [*connections.items()] * (rounds + 1):
        connection.send(steps)
        speeds[side].append(steps * batch_size / connection.recv())
    for connection in connections.values():
        connection.send(0)
    for process in multiprocessing.active_children():
        process.join()
    # The first round warms up: workers start, buffers are allocated, kernels are chosen.
    return {side: np.array(values[1:]) for side, values in speeds.items()}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one case, few rounds: 50 s at most")
    parser.add_argument("--ablation", action="store_true", help="time our loop with and without kernels")
    strides: Any = {"choices": OUTPUT_STRIDES, "default": [32, 16, 8], "help": "of the model"}
    parser.add_argument("--output_strides", type=int, nargs="+", **strides)
    parser.add_argument("--batch_sizes", type=cli.positive_int, nargs="+", default=[32, 128], help="per step")
    parser.add_argument("--rounds", type=cli.positive_int, default=7, help="in which every side trains once")
    parser.add_argument("--images", type=cli.positive_int, default=768, help="images per round and side")
    cli.add_data_arguments(parser)
    parser.set_defaults(dataset="synthetic")
    cli.add_runtime_arguments(parser)
    cli.add_record_argument(parser)
    cli.add_force_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Time every case, print the table and the ratio of the last row."""
    runtime.set_up(args.seed, args.threads)
    runtime.check_outputs(args)
    if args.ablation and not build.available():
        raise UserError("--ablation compares kernels, which need a C++ compiler such as g++: install one")
    if args.quick:
        args.output_strides, args.batch_sizes, args.rounds, args.images = [32], [128], 3, 512
    amp = ["", "_amp"] if is_fast_in_bfloat16() else [""]
    others = [f"without_kernels{suffix}" for suffix in amp] if args.ablation else ["usual"]
    ours = [f"ours{suffix}" for suffix in amp]
    images = load_data(args)
    data = images.train.subset(torch.arange(min(len(images.train), 4096))), measure_normalization(images)
    count = min(args.images, len(data[0]))
    rows = []
    for stride, batch_size in itertools.product(args.output_strides, args.batch_sizes):
        speeds = time_case([*others, *ours], data, stride, batch_size, count, args.rounds)
        medians = {side: float(np.median(values)) for side, values in speeds.items()}
        row: dict[str, float] = {"output_stride": stride, "batch_size": batch_size}
        row |= {f"{side}_images_per_s": median for side, median in medians.items()}
        baseline, *compared = speeds
        row |= {f"{side}_ratio": float(np.median(speeds[side] / speeds[baseline])) for side in compared}
        fastest, other = (max(group, key=medians.__getitem__) for group in (ours, others))
        # Of the two that are the fastest by their medians.
        ratio = float(np.median(speeds[fastest] / speeds[other]))
        rows.append(row | ({"kernels_ratio": ratio} if args.ablation else {}))
    print(f"torch {torch.__version__}, {runtime.cpu_name()}, {torch.get_num_threads()} threads\n")
    headers = [name.replace("images_per_s", "img/s").replace("_", " ") for name in rows[0]]
    print(format_table(headers, [list(row.values()) for row in rows]))
    if args.record:
        runtime.write_record(args.record, args, {"cases": rows})
    sides = f"ours{' with --amp' if fastest == 'ours_amp' else ''} against the usual loop"
    if args.ablation:
        sides = "the fastest with our kernels against the fastest without"
    print(
        f"ratio {ratio:.2f} (training throughput, images/s at output stride {stride} and batch {batch_size}, "
        f"{sides})"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
