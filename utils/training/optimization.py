"""Optimizers, learning-rate schedules and the moving average of the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from utils.training.muon import Muon, is_orthogonalized

OPTIMIZERS = ("sgd", "muon", "adam", "adamw")
SCHEDULERS = ("none", "cosine", "one_cycle")
MOMENTUM = 0.9
MUON_LR = 0.05
ONE_CYCLE_WARM_UP = 0.3


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    muon_lr: float = MUON_LR,
    amp: bool = False,
) -> torch.optim.Optimizer:
    """Return an optimizer over all parameters of the model.

    Args:
        name: one of OPTIMIZERS.
        lr: highest learning rate.
        weight_decay: of convolutions and linear layers; batch norms and biases have none.
        muon_lr: highest learning rate of the weights that muon orthogonalizes.
        amp: orthogonalize in bfloat16.
    """
    parameters = list(model.parameters())
    # Norm scales and biases are few; decaying them costs accuracy and regularizes nothing.
    undecayed = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    decayed = [p for p in parameters if p.ndim > 1]
    if name == "muon":
        groups = _muon_groups(decayed, undecayed, lr, weight_decay, muon_lr)
        dtype = torch.bfloat16 if amp else torch.float32
        return Muon(groups, dtype, lr=lr, momentum=MOMENTUM, nesterov=True, fused=True)
    groups = [{"params": decayed, "weight_decay": weight_decay}, undecayed]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True, fused=True)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return optimizer(groups, lr=lr, fused=True)


def _muon_groups(
    decayed: list[nn.Parameter], undecayed: dict[str, Any], lr: float, weight_decay: float, muon_lr: float
) -> list[dict[str, Any]]:
    groups = [
        {
            "params": [p for p in decayed if is_orthogonalized(p)],
            "orthogonalize": True,
            "lr": muon_lr,
            "momentum": 0.0,
            "nesterov": False,
            # SGD decays by lr * weight_decay per step, and this is to be the same for all weights.
            "weight_decay": weight_decay * lr / muon_lr,
        },
        {"params": [p for p in decayed if not is_orthogonalized(p)], "weight_decay": weight_decay},
        undecayed,
    ]
    for group in groups[1:]:
        group["orthogonalize"] = False
    return groups


def build_scheduler(
    optimizer: torch.optim.Optimizer, name: str, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule `name`, one of SCHEDULERS, to be stepped after each of `total_steps` batches."""
    total_steps = max(total_steps, 1)
    if name == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps + 1,
            pct_start=ONE_CYCLE_WARM_UP,
            cycle_momentum=False,
        )
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class ExponentialMovingAverage(AveragedModel):
    """A copy of a model whose weights and batch-norm statistics follow it as a moving average.

    The decay grows from 0 to `decay` over the first steps, so that a short run is not held back by
    its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            if not averaged.is_floating_point():
                return current
            steps = int(count)
            return torch.lerp(current, averaged, min(decay, (1 + steps) / (10 + steps)))

        super().__init__(model, avg_fn=average, use_buffers=True)
