"""Training throughput of train.py's path against the usual CIFAR loop, in images per second.

Usual: MobileNetV2 as torchvision builds it, in contiguous NCHW, a DataLoader over PIL images with
torchvision's random crop and flip, SGD with Nesterov momentum. Ours: the same model, batch size, kind of
augmentation and optimizer through our loader, training kernels and loop, in float32 and, where the CPU
computes with it, in bfloat16 (`train.py --amp`). With --ablation: our loop with our kernels against our loop
on torch's own operations. Each side runs in a process of its own, since ours also sets up the allocator. They
take turns of a few steps each, and medians of the rounds are compared.
"""

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

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


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed."""

    output_stride: int
    batch_size: int


class PillowImages(Dataset):
    """A split as the usual data sets give it: one PIL image and one label at a time."""

    def __init__(self, split: Split, transform: Callable) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images]
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return the augmented image and its label."""
        return self.transform(self.images[index]), self.labels[index]


class UsualLoop:
    """Trains as the well-known CIFAR repos do."""

    def __init__(self, split: Split, normalization: Normalization, case: Case) -> None:
        from torchvision import transforms  # takes a second, and --help does not need it

        transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(normalization.mean, normalization.std),
            ]
        )
        self.loader = DataLoader(
            PillowImages(split, transform),
            case.batch_size,
            shuffle=True,
            num_workers=WORKERS,
            drop_last=True,
            persistent_workers=True,
        )
        # torchvision's model has no output stride; ours has its layers and none of our speed-ups.
        self.model = MobileNetV2(output_stride=case.output_stride).train()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True)
        self.batches: Iterator[list[torch.Tensor]] = iter(())

    def step(self, count: int) -> None:
        """Train on the next `count` batches."""
        for _ in range(count):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            images, labels = batch
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            loss.item()


class OurLoop:
    """Trains as train.py does, with `--amp` or without; `kernels=False` leaves every layer to torch."""

    def __init__(
        self, split: Split, normalization: Normalization, case: Case, amp: bool = False, kernels: bool = True
    ) -> None:
        runtime.keep_freed_memory()
        self.amp = amp
        self.model = MobileNetV2(output_stride=case.output_stride).to(memory_format=torch.channels_last)
        if kernels:
            use_fast_layers(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, fused=True
        )
        self.loader = Loader(
            split, normalization, case.batch_size, shuffle=True, augment="crop_flip", drop_last=True
        )

    def step(self, count: int) -> None:
        """Train on the first `count` batches of the next epoch."""
        self.loader = dataclasses.replace(self.loader, limit=count, epoch=self.loader.epoch + 1)
        train_one_epoch(self.model, self.loader, self.optimizer, cross_entropy(), [], self.amp)


SIDES: dict[str, Callable[[Split, Normalization, Case], UsualLoop | OurLoop]] = {
    "usual": UsualLoop,
    "without_kernels": functools.partial(OurLoop, kernels=False),
    "ours": OurLoop,
    "ours_amp": functools.partial(OurLoop, amp=True),
}
COLUMNS = {
    "output_stride": "output stride",
    "batch_size": "batch size",
    "usual_images_per_s": "usual img/s",
    "without_kernels_images_per_s": "without kernels img/s",
    "ours_images_per_s": "ours img/s",
    "ours_amp_images_per_s": "with --amp",
    "ours_ratio": "ratio",
    "ours_amp_ratio": "with --amp",
}
"""What is recorded, and the header that is printed above it."""


def serve(connection: Connection, side: str, case: Case, data: Data, threads: int) -> None:
    """Train, in a process of its own, as many steps as asked for, and answer with the seconds."""
    torch.set_num_threads(threads)
    loop = SIDES[side](*data, case)
    while count := connection.recv():
        start = time.perf_counter()
        loop.step(count)
        connection.send(time.perf_counter() - start)


def time_case(
    case: Case, sides: list[str], data: Data, threads: int, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Return the images per second of each side in each round."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides:
        connections[side], theirs = context.Pipe()
        # Not daemonic: the usual loop has worker processes of its own.
        process = context.Process(target=serve, args=(theirs, side, case, data, threads))
        process.start()
        theirs.close()  # so that `recv` fails, rather than waits, if the process dies
        processes.append(process)
    for round_ in range(-1, rounds):
        for side, connection in connections.items():
            connection.send(steps)
            seconds = connection.recv()
            # The first round warms up: workers start, buffers are allocated, kernels are chosen.
            if round_ >= 0:
                speeds[side].append(steps * case.batch_size / seconds)
    for connection in connections.values():
        connection.send(0)
    for process in processes:
        process.join()
    return speeds


def case_results(case: Case, speeds: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians of a case; ratios are to the first side, taken within each round."""
    baseline, *others = speeds
    medians = {f"{side}_images_per_s": statistics.median(values) for side, values in speeds.items()}
    ratios = {
        f"{side}_ratio": statistics.median(map(operator.truediv, speeds[side], speeds[baseline]))
        for side in others
    }
    return dataclasses.asdict(case) | medians | ratios


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one case, few rounds, drawn images: 50 s at most"
    )
    parser.add_argument(
        "--ablation", action="store_true", help="compare our loop with and without our training kernels"
    )
    parser.add_argument(
        "--output_strides",
        type=int,
        nargs="+",
        choices=OUTPUT_STRIDES,
        default=[32, 16, 8],
        help="of the model",
    )
    parser.add_argument(
        "--batch_sizes", type=cli.positive_int, nargs="+", default=[32, 128], help="images per step"
    )
    parser.add_argument(
        "--rounds", type=cli.positive_int, default=7, help="rounds, in each of which every side trains once"
    )
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
    if args.ablation:
        sides = ["without_kernels", "ours"]
    else:
        sides = ["usual", "ours", *(["ours_amp"] if is_fast_in_bfloat16() else [])]
    images = load_data(args)
    split = images.train.subset(torch.arange(min(len(images.train), 4096)))
    data, threads = (split, measure_normalization(images)), torch.get_num_threads()
    rows = []
    for case in itertools.starmap(Case, itertools.product(args.output_strides, args.batch_sizes)):
        steps = max(1, min(args.images, len(split)) // case.batch_size)
        rows.append(case_results(case, time_case(case, sides, data, threads, args.rounds, steps)))
    print(f"torch {torch.__version__}, {runtime.cpu_name()}, {threads} threads\n")
    print(format_table([COLUMNS[name] for name in rows[0]], [list(row.values()) for row in rows]))
    if args.record:
        runtime.write_record(args.record, args, {"cases": rows})
    last = rows[-1]
    fastest = max(("ours_ratio", "ours_amp_ratio"), key=lambda name: last.get(name, 0))
    print(
        f"ratio {last[fastest]:.2f} (training throughput, images/s at output stride "
        f"{last['output_stride']} and batch {last['batch_size']}, "
        f"ours{' with --amp' if 'amp' in fastest else ''} against "
        f"{'ours without kernels' if args.ablation else 'the usual loop'})"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
