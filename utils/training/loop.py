"""The one training loop: epochs, the selection of the best one on val, and the printed table."""

import copy
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from utils.common import distributed
from utils.common.devices import device_of, on_device
from utils.common.errors import UserError
from utils.data.datasets import ImageData, Normalization
from utils.data.loader import Loader
from utils.evaluation import NotFiniteError, evaluate
from utils.training.checkpoint import (
    Epoch,
    Progress,
    RunConfig,
    Stateful,
    is_finite,
    load_progress,
    save_progress,
)
from utils.training.compilation import compiled
from utils.training.parallel import parallelize

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From images (B, 3, H, W), logits (B, classes) and labels (B,) to the mean loss."""
ValAccuracy = Callable[[nn.Module], float | None]
"""From a model to its accuracy on val in percent; None if there are no val images."""
EVALUATION_BATCH_SIZE = 500


class DivergedError(Exception):
    """The loss or the weights are no longer finite numbers."""


@dataclass
class Run:
    """Everything that a training run is made of.

    Args:
        config: files, seed and flags.
        model: trained in place.
        loader: shuffled training batches; `fit` sets the epoch.
        optimizer: over the model's parameters.
        scheduler: stepped after each batch.
        epochs: length of the run.
        loss_function: see LossFunction.
        val_accuracy: called with `selected` after each epoch; without val images the last epoch counts
            as the best.
        average: moving average of the model, updated after each optimizer step; it is then what is
            evaluated and selected, in place of the model.
        after_step: each called without arguments after each optimizer step and update of the average.
        before_epoch: each called with the number of the epoch, from 1.
        first_selectable_epoch: earlier ones are never the best (a pruning schedule still under way).
        state: further objects whose state a resumed run needs, by name.
        compile: train a compiled form of the model.
        amp: train in bfloat16 where that is safe.
    """

    config: RunConfig
    model: nn.Module
    loader: Loader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epochs: int
    loss_function: LossFunction
    val_accuracy: ValAccuracy
    average: AveragedModel | None = None
    after_step: list[Callable[[], None]] = field(default_factory=list)
    before_epoch: list[Callable[[int], None]] = field(default_factory=list)
    first_selectable_epoch: int = 1
    state: dict[str, Stateful] = field(default_factory=dict)
    compile: bool = False
    amp: bool = False

    @property
    def selected(self) -> nn.Module:
        """Return the model that is evaluated on val; after `fit` it holds the weights of the best epoch."""
        return self.average.module if self.average else self.model

    def step_hooks(self) -> list[Callable[[], None]]:
        """Return what is called after each optimizer step, in this order."""
        average = self.average
        update = [lambda: average.update_parameters(self.model)] if average else []
        return [self.scheduler.step, *update, *self.after_step]

    def stateful(self) -> dict[str, Stateful]:
        """Return everything whose state a checkpoint holds."""
        average = {"average": self.average} if self.average else {}
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            **average,
            **self.state,
        }


def cross_entropy(label_smoothing: float = 0.0) -> LossFunction:
    """Return the cross-entropy against the labels, smoothed by `label_smoothing`."""
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return lambda _images, logits, labels: criterion(logits, labels)


def accuracy_on_val(
    data: ImageData,
    normalization: Normalization,
    batch_size: int = EVALUATION_BATCH_SIZE,
    limit: int | None = None,
    convert: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> ValAccuracy:
    """Return the `val_accuracy` of a Run.

    Args:
        limit: number of batches to evaluate on; None for all.
        convert: makes what is evaluated from the model in training, such as its int8 form.
    """
    if not len(data.val):
        return lambda _model: None
    loader = Loader(data.val, normalization, batch_size, limit=limit, sharded=True)
    return lambda model: evaluate(convert(model), loader, sharded=True).accuracy_pct


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss_function: LossFunction,
    after_step: list[Callable[[], None]],
    amp: bool = False,
) -> tuple[float, float]:
    """Train on every batch once, where the model is; with `amp` in bfloat16 where that is safe.

    Returns:
        The mean loss, and the accuracy in percent of the logits computed on the way.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    model.train()
    device = device_of(model)
    # Read only at the end, so that no step waits for a GPU.
    losses, hits, counts = [], [], []
    progress = tqdm(loader, desc="training", leave=False, disable=not sys.stderr.isatty())
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
    total = distributed.all_reduce_sum(torch.tensor(sum(counts))).item()
    mean_loss = distributed.all_reduce_sum(torch.tensor(loss_sum, dtype=torch.double)).item() / total
    correct = distributed.all_reduce_sum(torch.stack(hits).sum().cpu())
    if not mean_loss < float("inf"):
        raise DivergedError("the loss is no longer a finite number")
    return mean_loss, 100 * correct.item() / total


def fit(run: Run) -> Progress:
    """Train, print the epoch table, and load the weights of the best epoch into `run.selected`.

    After each epoch a checkpoint and the history CSV are written beside the output. A resumed run
    continues from there with what an uninterrupted one would have had: weights, optimizer, schedule,
    average, and random numbers, which depend on the seed and the epoch alone.

    Raises:
        UserError: the checkpoint is not of this run, the loss is not finite, or another process of
            the run has ended.
        KeyboardInterrupt: Ctrl-C; the checkpoint holds the last finished epoch.
    """
    if run.config.resume:
        progress = load_progress(run.config, run.stateful())
    else:
        progress = Progress()
        save_progress(run.config, run.stateful(), progress)
    called = parallelize(run.model)
    if run.compile:
        called = compiled(called)
    print(Epoch.HEADER)
    for epoch in progress.history:
        print(epoch)
    try:
        for number in range(len(progress.history) + 1, run.epochs + 1):
            epoch = _one_epoch(run, called, number, progress)
            if not is_finite(run.selected.state_dict()):
                raise DivergedError("the weights are no longer finite numbers")
            progress.history.append(epoch)
            print(epoch, flush=True)
            save_progress(run.config, run.stateful(), progress)
    except (DivergedError, NotFiniteError) as error:
        # With the same flags it would diverge again, and a resumed run cannot change them.
        if distributed.is_main():
            run.config.checkpoint.unlink(missing_ok=True)
        raise UserError(
            f"{error} after {len(progress.history)} epochs: start again with a lower --lr"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(progress.history)} of {run.epochs} epochs are in {run.config.checkpoint}; "
            "the same command with --resume goes on from there"
        ) from None
    except RuntimeError as error:
        if not distributed.is_lost_process(error):
            raise
        raise UserError(
            "another process of this run has ended: the same command with --resume goes on from the "
            f"checkpoint {run.config.checkpoint}"
        ) from error
    print(f"best epoch {progress.best_epoch} of {run.epochs}", flush=True)
    run.selected.load_state_dict(progress.best_state)
    return progress


def _one_epoch(run: Run, called: nn.Module, number: int, progress: Progress) -> Epoch:
    # Dropout draws from the global generator; seeding it before each epoch makes a resumed run
    # draw what an uninterrupted one does.
    torch.manual_seed(run.config.seed * 1_000_003 + number)
    for hook in run.before_epoch:
        hook(number)
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    loader = replace(run.loader, epoch=number)
    start = time.perf_counter()
    loss, train_accuracy_pct = train_one_epoch(
        called, loader, run.optimizer, run.loss_function, run.step_hooks(), run.amp
    )
    seconds = time.perf_counter() - start
    val_accuracy_pct = run.val_accuracy(run.selected)
    best = progress.best_accuracy_pct
    is_better = best is None or val_accuracy_pct is None or val_accuracy_pct > best
    if is_better and number >= run.first_selectable_epoch:
        progress.best_epoch = number
        progress.best_accuracy_pct = val_accuracy_pct
        progress.best_state = copy.deepcopy(run.selected.state_dict())
    images = min(len(loader) * loader.batch_size, len(loader.split))
    return Epoch(number, loss, train_accuracy_pct, val_accuracy_pct, lr, images / seconds, seconds)
