"""The flags of training, and what is made of them: the one place where a Run is assembled."""

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.common import cli, distributed, runtime
from utils.common.devices import DEVICES, add_device_argument, choose_device
from utils.common.errors import UserError
from utils.common.files import sha256, unlock
from utils.data.augmentation import AUGMENTATIONS
from utils.data.datasets import ImageData, Normalization, notes_on_size
from utils.data.loader import Loader
from utils.training.checkpoint import Progress, RunConfig
from utils.training.compilation import check_compiler
from utils.training.distillation import distillation
from utils.training.loop import LossFunction, Run, ValAccuracy, cross_entropy
from utils.training.optimization import MUON_LR, OPTIMIZERS, SCHEDULERS, build_optimizer, build_scheduler
from utils.training.precision import check_amp

READ = ("weights", "teacher", "sparsity_dict")
"""The flags of training scripts that name files to read."""


def add_training_arguments(
    parser: ArgumentParser,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    epochs_type: Callable[[str], int] = cli.positive_int,
    devices: Sequence[str] = DEVICES,
) -> None:
    """Add the flags that every training has: its own with these defaults, images, runtime, --record."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=epochs_type, default=epochs, help="passes over the training images")
    group.add_argument("--batch_size", type=cli.positive_int, default=batch_size, help="images per step")
    group.add_argument("--augment", choices=AUGMENTATIONS, default="crop_flip", help="image augmentation")
    group.add_argument(
        "--cutout_size",
        type=cli.non_negative_int,
        default=8,
        help="cutout side in pixels (only with --augment *_cutout)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint that an interrupted run left beside --output",
    )

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="sgd",
        help="sgd has Nesterov momentum; muon orthogonalizes the updates of convolutions that mix more than "
        "three channels, and is sgd for the rest",
    )
    group.add_argument("--lr", type=cli.positive_float, default=lr, help="highest learning rate")
    group.add_argument(
        "--muon_lr",
        type=cli.positive_float,
        default=MUON_LR,
        help="highest learning rate of the weights that muon orthogonalizes; --lr is for the rest",
    )
    group.add_argument(
        "--scheduler", choices=SCHEDULERS, default="one_cycle", help="learning-rate schedule (per step)"
    )
    group.add_argument(
        "--weight_decay",
        type=cli.non_negative_float,
        default=weight_decay,
        help="of convolutions and linear layers; batch norms and biases have none",
    )
    group.add_argument(
        "--label_smoothing",
        type=cli.fraction_below_one,
        default=0.0,
        help="share of the target that is spread over all classes",
    )

    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--teacher",
        nargs="+",
        metavar="FILE",
        help="model file to learn from, such as the dense model's or a better one's; int8 is the fastest; "
        "the logits of several are averaged (default: no distillation)",
    )
    group.add_argument(
        "--distill_weight", type=cli.fraction, default=0.9, help="the teacher's share of the loss, 0 to 1"
    )
    group.add_argument(
        "--temperature", type=cli.positive_float, default=4.0, help="divides the logits in the teacher's part"
    )

    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    add_device_argument(parser, devices)
    cli.add_record_argument(parser)


def add_float_training_arguments(parser: ArgumentParser) -> None:
    """Add --ema, --compile and --amp, which quantization-aware training does not have."""
    parser.add_argument(
        "--ema",
        type=cli.fraction_below_one,
        default=0.0,
        help="decay of a moving average of the weights, which is what is evaluated and written; 0 is off",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="train with torch.compile instead of our own kernels (for a GPU): takes minutes before the "
        "first step; needs a C++ compiler",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="train in bfloat16 where that is safe: on a GPU, or on a CPU that computes with it (and g++)",
    )


def start_training(args: Namespace, devices: Sequence[str] = DEVICES) -> torch.device:
    """Seed, join the other processes, check what training needs, and return the device to train on.

    Raises:
        UserError: files cannot be written or resumed from, the device is not there, or it cannot do
            what the flags ask for.
    """
    runtime.set_up(args.seed, args.threads, parallel=True)
    distributed.check_batch_size(args.batch_size)
    _run_config(args).check_files(args.record, {f"--{name}": getattr(args, name, None) for name in READ})
    # No process writes before all have looked.
    distributed.barrier()
    device = choose_device(args, devices)
    if args.amp:
        check_amp(device)
    if args.compile:
        check_compiler(device)
    return device


def training_loader(
    data: ImageData, normalization: Normalization, args: Namespace, limit: int | None = None
) -> Loader:
    """Return the shuffled, augmented batches of the training images, at most `limit` per epoch."""
    for note in notes_on_size(data, args.batch_size):
        print(f"note: {note}", flush=True)
    return Loader(
        data.train,
        normalization,
        args.batch_size,
        shuffle=True,
        augment=args.augment,
        cutout_size=args.cutout_size,
        # The batch statistics of a last, small batch would be mostly noise.
        drop_last=len(data.train) > args.batch_size,
        limit=limit,
        sharded=True,
        seed=args.seed,
    )


def check_batch_statistics(model: nn.Module, loader: Loader) -> None:
    """Check that the batch norms see more than one value per channel.

    Raises:
        UserError: a training step has one image, whose last maps have one pixel.
    """
    images = min(loader.batch_size, len(loader.split))
    last_batch = len(loader.split) % loader.batch_size
    if last_batch and not loader.drop_last:
        images = min(images, last_batch)
    stride = {"output_stride": 1, **vars(model).get("architecture", {})}["output_stride"]
    side = -(-loader.split.images.shape[-1] // stride)
    if images * side**2 < 2:
        raise UserError(
            "a training step has one image, whose last maps have one pixel, and a batch norm needs more than "
            "one value: give a --batch_size of at least 2"
        )


def build_run(
    model: nn.Module,
    loader: Loader,
    teacher: nn.Module | None,
    val_accuracy: ValAccuracy,
    args: Namespace,
    **parts: Any,
) -> Run:
    """Assemble a Run.

    Args:
        model: what is trained.
        loader: from `training_loader`.
        teacher: what to distill from, in eval mode.
        val_accuracy: from `accuracy_on_val`.
        parts: further fields of Run: average, hooks, state.
    """
    check_batch_statistics(model, loader)
    optimizer = build_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.muon_lr, args.amp)
    return Run(
        config=replace(_run_config(args), inputs=_inputs(loader, args)),
        model=model,
        loader=loader,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, args.scheduler, args.epochs * len(loader)),
        epochs=args.epochs,
        loss_function=_loss_function(teacher, args),
        val_accuracy=val_accuracy,
        compile=args.compile,
        amp=args.amp,
        **parts,
    )


def finish_training(args: Namespace, progress: Progress, results: dict[str, Any]) -> None:
    """Write --record and remove the checkpoint, once the output is written."""
    if args.record:
        runtime.write_record(args.record, args, {**results, "history": progress.rows()})
    _run_config(args).checkpoint.unlink(missing_ok=True)
    unlock(args.output)


def _run_config(args: Namespace) -> RunConfig:
    return RunConfig(Path(args.output), args.resume, args.force, args.seed, runtime.plain(args))


def _inputs(loader: Loader, args: Namespace) -> dict[str, str]:
    split = hashlib.sha256()
    for tensor in (loader.split.images, loader.split.labels):
        split.update(tensor.contiguous().numpy().data)
    inputs = {"training images": split.hexdigest()}
    for name in READ:
        given = getattr(args, name, None)
        for path in [given] if isinstance(given, str) else given or []:
            inputs[f"--{name} {path}"] = sha256(path)
    return inputs


def _loss_function(teacher: nn.Module | None, args: Namespace) -> LossFunction:
    loss_function = cross_entropy(args.label_smoothing)
    if teacher is None:
        return loss_function
    return distillation(teacher, loss_function, args.distill_weight, args.temperature)
