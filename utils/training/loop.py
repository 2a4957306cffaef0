"""The one training loop: epochs, selection on val, the printed table, checkpoints and resuming."""

import copy
import csv
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoints.weights import read_pickle
from utils.common import distributed
from utils.common.cli import non_negative_int, positive_int
from utils.common.devices import device_of, on_device
from utils.common.errors import UserError
from utils.common.files import atomic_write, check_output, save_torch
from utils.common.runtime import check_record, plain
from utils.data.datasets import ImageData, Normalization
from utils.data.loader import AUGMENTATIONS, Batches
from utils.evaluation import evaluate
from utils.training.compilation import compiled
from utils.training.parallel import parallelize

CHECKPOINT_FORMAT = "mobilenetv2-checkpoint"
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From images (B, 3, H, W), logits (B, classes) and labels (B,) to the mean loss."""
Candidate = Callable[[], tuple[nn.Module, float | None]]
"""Gives the model that would be kept now, and its accuracy on val in percent if there is a val."""
EVALUATION_BATCH_SIZE = 500


class Stateful(Protocol):
    """What a checkpoint keeps: models, optimizers, schedules, averages, pruners."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go on from what `state_dict` gave."""


@dataclass
class Run:
    """Everything that a training run is made of.

    Args:
        model: trained in place.
        batches: shuffled training batches; the epoch is set by `fit`.
        optimizer: over the model's parameters.
        scheduler: stepped after each batch.
        epochs: the run's length.
        loss_function: see LossFunction.
        candidate: called after each epoch; gives the model that would be kept now and its
            accuracy on val in percent (None without val images: then the last epoch is kept).
        after_step: each called without arguments after each optimizer step.
        before_epoch: each called with the epoch's number, from 1.
        first_selectable_epoch: earlier ones are never kept (a pruning schedule still under way).
        state: further objects that a resumed run needs, by name.
        compile: train a compiled form of the model.
        amp: train in bfloat16 where that is safe.
    """

    model: nn.Module
    batches: Batches
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epochs: int
    loss_function: LossFunction
    candidate: Candidate
    after_step: list[Callable[[], None]] = field(default_factory=list)
    before_epoch: list[Callable[[int], None]] = field(default_factory=list)
    first_selectable_epoch: int = 1
    state: dict[str, Stateful] = field(default_factory=dict)
    compile: bool = False
    amp: bool = False

    def stateful(self) -> dict[str, Stateful]:
        """Everything whose state a checkpoint keeps."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            **self.state,
        }


@dataclass(frozen=True)
class Epoch:
    """A row of the printed table and of the history CSV."""

    epoch: int
    loss: float
    train_accuracy_pct: float
    val_accuracy_pct: float | None
    lr: float
    images_per_s: float
    seconds: float

    HEADER = "epoch     loss  train %    val %        lr    img/s       s"

    def __str__(self) -> str:
        val = f"{self.val_accuracy_pct:8.2f}" if self.val_accuracy_pct is not None else "       –"
        return (
            f"{self.epoch:5d}  {self.loss:7.4f}  {self.train_accuracy_pct:7.2f} {val}  "
            f"{self.lr:8.2e}  {self.images_per_s:7.0f}  {self.seconds:6.1f}"
        )


@dataclass
class Progress:
    """How far a run has come, and the best that it has found."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best_accuracy_pct: float | None = None
    best_state: dict[str, Any] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """The epoch table, a dict a row, as records and checkpoints hold it."""
        return [_as_dict(epoch) for epoch in self.history]


def cross_entropy(label_smoothing: float = 0.0) -> LossFunction:
    """Cross-entropy against the labels, smoothed by `label_smoothing`."""
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return lambda _images, logits, labels: criterion(logits, labels)


def train_one_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    loss_function: LossFunction,
    after_step: list[Callable[[], None]],
    amp: bool = False,
) -> tuple[float, float]:
    """Train on every batch once; returns the mean loss and the accuracy in percent on the way.

    The model trains where it is, with `amp` in bfloat16 where that is safe.

    Raises:
        UserError: the loss is no longer finite.
    """
    model.train()
    device = device_of(model)
    # Read at the end alone, so that a GPU is not waited for at each step.
    losses, hits, counts = [], [], []
    progress = tqdm(batches, desc="training", leave=False, disable=not sys.stderr.isatty())
    for images, labels in on_device(progress, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images).float()
            loss = loss_function(images, logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for hook in after_step:
            hook()
        losses.append(loss.detach())
        hits.append((logits.detach().argmax(1) == labels).sum())
        counts.append(len(labels))
    loss_sum = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True))
    total = distributed.sum_over_processes(torch.tensor(sum(counts))).item()
    mean_loss = distributed.sum_over_processes(torch.tensor(loss_sum, dtype=torch.double)).item() / total
    correct = distributed.sum_over_processes(torch.stack(hits).sum().cpu())
    if not mean_loss < float("inf"):
        raise UserError("the loss is no longer a finite number: give a lower --lr and start again")
    return mean_loss, 100 * correct.item() / total


def training_batches(data: ImageData, normalization: Normalization, args: Namespace) -> Batches:
    """Shuffled and augmented batches of the training images, as the flags name them."""
    distributed.check_batch_size(args.batch_size)
    return Batches(
        data.train,
        normalization,
        args.batch_size,
        shuffle=True,
        augment=args.augment,
        cutout_size=args.cutout_size,
        # A last batch of few images has batch statistics that are mostly noise.
        drop_last=len(data.train) > args.batch_size,
        shared=True,
        seed=args.seed,
    )


def select_on_val(kept: nn.Module, data: ImageData, normalization: Normalization) -> Candidate:
    """A Run's `candidate`: `kept` and its accuracy on the val images, if there are any."""
    if not len(data.val):
        return lambda: (kept, None)
    batches = Batches(data.val, normalization, EVALUATION_BATCH_SIZE, shared=True)
    return lambda: (kept, evaluate(kept, batches, shared=True).accuracy_pct)


def add_training_arguments(
    parser: ArgumentParser, epochs: int, batch_size: int, epochs_type: Callable[[str], int] = positive_int
) -> None:
    """--epochs, --batch_size, --augment, --cutout_size, --resume."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=epochs_type, default=epochs, help="passes over the training images")
    group.add_argument("--batch_size", type=positive_int, default=batch_size, help="images a step")
    group.add_argument("--augment", choices=AUGMENTATIONS, default="crop_flip", help="what varies the images")
    group.add_argument(
        "--cutout_size",
        type=non_negative_int,
        default=8,
        help="side in pixels of what the --augment that end with cutout cut",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint that an interrupted run left beside --output",
    )


def checkpoint_path(output: str | os.PathLike) -> Path:
    """Where the run that writes `output` leaves its checkpoint."""
    output = Path(output)
    return output.with_name(f"{output.stem}.checkpoint.pth")


def history_path(output: str | os.PathLike) -> Path:
    """Where the run that writes `output` leaves its epoch table as CSV."""
    output = Path(output)
    return output.with_name(f"{output.stem}.history.csv")


def check_training_outputs(args: Namespace) -> None:
    """Check --output, --record and, for --resume, the checkpoint before the work starts.

    Raises:
        UserError: nothing can be written, files exist and --force is off, or nothing to resume.
    """
    checkpoint = checkpoint_path(args.output)
    if args.resume and not checkpoint.is_file():
        raise UserError(f"--resume finds no checkpoint {checkpoint}: start the run without it")
    if not args.resume and not args.force and checkpoint.exists():
        raise UserError(
            f"{checkpoint} is from an interrupted run: give --resume to go on with it, "
            "or --force to start again"
        )
    check_output(args.output, force=args.force or args.resume)
    check_record(args)
    # No process writes before all have looked.
    distributed.barrier()


def fit(run: Run, args: Namespace) -> Progress:
    """Train for `run.epochs` epochs, print the table, and load the best state into the candidate.

    After each epoch a checkpoint and the history CSV are written beside `args.output`; with
    `args.resume` the run goes on from there, with what an unbroken run would have had: weights,
    optimizer, schedule, averages, and random draws, which depend on seed and epoch alone.

    Raises:
        UserError: the checkpoint is not of this run, or the loss is not finite.
        KeyboardInterrupt: Ctrl-C; the last finished epoch stands in the checkpoint.
    """
    checkpoint = checkpoint_path(args.output)
    progress = Progress()
    if args.resume:
        progress = _load_checkpoint(checkpoint, run, args)
    else:
        _save_checkpoint(checkpoint, run, args, progress)
    called = parallelize(run.model)
    if run.compile:
        called = compiled(called)
    print(Epoch.HEADER)
    for epoch in progress.history:
        print(epoch)
    try:
        for number in range(len(progress.history) + 1, run.epochs + 1):
            epoch = _one_epoch(run, called, args, number, progress)
            progress.history.append(epoch)
            print(epoch, flush=True)
            _write_history(history_path(args.output), progress.history)
            _save_checkpoint(checkpoint, run, args, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(progress.history)} of {run.epochs} epochs are in {checkpoint}; "
            "the same command with --resume goes on from there"
        ) from None
    except RuntimeError as error:
        if not distributed.is_lost_process(error):
            raise
        raise UserError(
            "another process of this run has ended: the same command with --resume goes on from the "
            f"checkpoint {checkpoint}"
        ) from error
    return progress


def finish(args: Namespace) -> None:
    """Remove the checkpoint once the run's output is written."""
    if distributed.is_main():
        checkpoint_path(args.output).unlink(missing_ok=True)


def _one_epoch(run: Run, called: nn.Module, args: Namespace, number: int, progress: Progress) -> Epoch:
    # Dropout draws from the global generator; seeding it an epoch at a time makes a resumed run
    # draw what an unbroken one does.
    torch.manual_seed(args.seed * 1_000_003 + number)
    for hook in run.before_epoch:
        hook(number)
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    batches = replace(run.batches, epoch=number)
    start = time.perf_counter()
    loss, train_accuracy_pct = train_one_epoch(
        called, batches, run.optimizer, run.loss_function, [run.scheduler.step, *run.after_step], run.amp
    )
    seconds = time.perf_counter() - start
    model, val_accuracy_pct = run.candidate()
    if number >= run.first_selectable_epoch and (
        progress.best_state is None
        or val_accuracy_pct is None
        or val_accuracy_pct > progress.best_accuracy_pct
    ):
        progress.best_epoch = number
        progress.best_accuracy_pct = val_accuracy_pct
        progress.best_state = copy.deepcopy(model.state_dict())
    return Epoch(
        number, loss, train_accuracy_pct, val_accuracy_pct, lr, _trained_images(batches) / seconds, seconds
    )


def _trained_images(batches: Batches) -> int:
    return min(len(batches) * batches.batch_size, len(batches.split))


# The run's outcome depends on these by float rounding at the most (a GPU draws its own dropout), so a
# resumed run may change them.
FREE_TO_CHANGE = {"resume", "force", "threads", "device", "compile", "record", "output", "data_dir"}


def _save_checkpoint(path: Path, run: Run, args: Namespace, progress: Progress) -> None:
    content = {
        "format": CHECKPOINT_FORMAT,
        "arguments": plain(args),
        "state": {name: value.state_dict() for name, value in run.stateful().items()},
        "progress": {
            "history": progress.rows(),
            "best_epoch": progress.best_epoch,
            "best_accuracy_pct": progress.best_accuracy_pct,
            "best_state": progress.best_state,
        },
    }
    save_torch(path, content)


def _load_checkpoint(path: Path, run: Run, args: Namespace) -> Progress:
    content = read_pickle(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of an interrupted run: start again without --resume")
    then, now = content["arguments"], plain(args)
    # A flag that is newer than the checkpoint was not given then.
    for name in sorted(then.keys() - FREE_TO_CHANGE):
        if then.get(name) != now.get(name):
            raise UserError(
                f"{path} was made with --{name} {then.get(name)}, not {now.get(name)}: "
                "give the same arguments, or start again with --force"
            )
    try:
        for name, value in run.stateful().items():
            value.load_state_dict(content["state"][name])
        progress = content["progress"]
        progress["history"] = [Epoch(**row) for row in progress["history"]]
        return Progress(**progress)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} does not fit this run: start again without --resume, with --force"
        ) from error


def _as_dict(epoch: Epoch) -> dict[str, Any]:
    return {f.name: getattr(epoch, f.name) for f in fields(Epoch)}


def _write_history(path: Path, history: list[Epoch]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Epoch)])
        writer.writeheader()
        for epoch in history:
            row = _as_dict(epoch)
            writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
