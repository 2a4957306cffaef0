"""Optimizers, learning-rate schedules and the average of the weights, as the flags name them."""

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from utils.common.cli import fraction_below_one, non_negative_float, positive_float
from utils.training.muon import Muon, is_orthogonalized

OPTIMIZERS = ("sgd", "muon", "adam", "adamw")
SCHEDULERS = ("none", "cosine", "one_cycle")
MOMENTUM = 0.9
ONE_CYCLE_WARM_UP = 0.3


def add_optimization_arguments(parser: ArgumentParser, lr: float, weight_decay: float) -> None:
    """--optimizer, --lr, --scheduler, --weight_decay, --label_smoothing."""
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="sgd",
        help="sgd is with Nesterov momentum; muon is muon for the convolutions that mix more than three "
        "channels, sgd for the rest",
    )
    group.add_argument("--lr", type=positive_float, default=lr, help="highest learning rate")
    group.add_argument(
        "--muon_lr",
        type=positive_float,
        default=0.05,
        help="highest learning rate of what --optimizer muon orthogonalizes, while --lr is that of the rest",
    )
    group.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default="one_cycle",
        help="learning rate over the run, a step at a time",
    )
    group.add_argument(
        "--weight_decay",
        type=non_negative_float,
        default=weight_decay,
        help="on convolutions and linear weights; norms and biases have none",
    )
    group.add_argument(
        "--label_smoothing",
        type=fraction_below_one,
        default=0.0,
        help="share of the target that is spread over all classes",
    )


def add_average_argument(parser: ArgumentParser) -> None:
    """--ema."""
    parser.add_argument(
        "--ema",
        type=fraction_below_one,
        default=0.0,
        help="decay of a moving average of the weights, which is then what is kept; 0 is off",
    )


def build_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """The optimizer that --optimizer, --lr and --weight_decay name, over all parameters."""
    parameters = list(model.parameters())
    # Norm scales and biases are few; decaying them costs accuracy and regularizes nothing.
    undecayed = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    if args.optimizer == "muon":
        return _build_muon([p for p in parameters if p.ndim > 1], undecayed, args)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay}, undecayed]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=MOMENTUM, nesterov=True, fused=True)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return optimizer(groups, lr=args.lr, fused=True)


def _build_muon(decayed: list[nn.Parameter], undecayed: dict[str, Any], args: Namespace) -> Muon:
    groups = [
        {
            "params": [p for p in decayed if is_orthogonalized(p)],
            "orthogonalize": True,
            "lr": args.muon_lr,
            "momentum": 0.0,
            "nesterov": False,
            # SGD decays by lr * weight_decay a step, and this is to be the same for all weights.
            "weight_decay": args.weight_decay * args.lr / args.muon_lr,
        },
        {"params": [p for p in decayed if not is_orthogonalized(p)], "weight_decay": args.weight_decay},
        undecayed,
    ]
    for group in groups[1:]:
        group["orthogonalize"] = False
    dtype = torch.bfloat16 if getattr(args, "amp", False) else torch.float32
    return Muon(groups, dtype, lr=args.lr, momentum=MOMENTUM, nesterov=True, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, args: Namespace, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that --scheduler names, to be stepped after each of `total_steps` batches."""
    total_steps = max(total_steps, 1)
    if args.scheduler == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps + 1,
            pct_start=ONE_CYCLE_WARM_UP,
            cycle_momentum=False,
        )
    if args.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class ExponentialMovingAverage(AveragedModel):
    """A copy of a model whose weights and batch-norm statistics follow it as a moving average.

    The decay grows from 0 to `decay` over the first steps, so that a short run is not held back by
    its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
            if not averaged.is_floating_point():
                return current
            steps = int(count)
            return torch.lerp(current, averaged, min(decay, (1 + steps) / (10 + steps)))

        super().__init__(model, avg_fn=average, use_buffers=True)
