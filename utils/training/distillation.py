"""Training on a teacher's answers as well as on the labels (Hinton et al., 2015).

https://arxiv.org/abs/1503.02531
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from utils.checkpoints.weights import ALL_KINDS, Weights
from utils.common.cli import fraction, positive_float
from utils.common.errors import UserError
from utils.open_model import open_model
from utils.training.loop import LossFunction, cross_entropy


def add_distillation_arguments(parser: ArgumentParser) -> None:
    """--teacher, --distill_weight, --temperature."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--teacher",
        nargs="+",
        metavar="FILE",
        help="model file whose answers are learned as well: that of the dense model, or a better one; "
        "int8 answers fastest; of several, the mean of their logits (default: no distillation)",
    )
    group.add_argument(
        "--distill_weight", type=fraction, default=0.9, help="share of the teacher in the loss, from 0 to 1"
    )
    group.add_argument(
        "--temperature",
        type=positive_float,
        default=4.0,
        help="divides the logits in the teacher's part",
    )


class Ensemble(nn.Module):
    """Several models that answer as one."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to the mean of the members' logits (N, classes)."""
        return torch.stack([member(x) for member in self.members]).mean(0)


def load_teacher(paths: list[str], student: Weights, device: torch.device) -> nn.Module:
    """The teacher, in eval mode, for a student whose classes and normalization are known.

    Args:
        paths: any files that hold a model. An int8 one answers much faster than its float model, and
            nearly the same. Several make an ensemble.
        student: what is to be trained.
        device: where both run.

    Raises:
        UserError: a file holds no model, or one for other classes or another normalization, or an
            int8 one when the device is no CPU.
    """
    return Ensemble(_load_member(path, student, device) for path in paths).eval()


def _load_member(path: str, student: Weights, device: torch.device) -> nn.Module:
    teacher = open_model(path, kinds=ALL_KINDS)
    classes = teacher.metadata.architecture["num_classes"], student.model.architecture["num_classes"]
    if classes[0] != classes[1] or teacher.metadata.class_names not in (None, student.class_names):
        raise UserError(f"--teacher {path} knows other classes than the model: give one of the same data set")
    if teacher.metadata.normalization not in (None, student.normalization):
        raise UserError(
            f"--teacher {path} was trained with another normalization than the model: "
            "give one of the same data set and --val_size"
        )
    if teacher.metadata.engine is not None and device.type != "cpu":
        raise UserError(f"--teacher {path} is int8, which runs on a CPU alone: give float weights")
    return teacher.model.to(device, memory_format=torch.channels_last)


def training_loss(teacher: nn.Module | None, args: Namespace) -> LossFunction:
    """Cross-entropy with --label_smoothing, and the part of the teacher if there is one."""
    loss_function = cross_entropy(args.label_smoothing)
    if teacher is None:
        return loss_function
    return distillation(teacher, loss_function, args.distill_weight, args.temperature)


def distillation(
    teacher: nn.Module, loss_function: LossFunction, distill_weight: float, temperature: float
) -> LossFunction:
    """`loss_function` mixed with the distance to the teacher's softened answers.

    The teacher's part is the Kullback-Leibler divergence at `temperature`, times its square, so
    that the share of the two gradients does not depend on the temperature.

    Args:
        teacher: in eval mode; it sees the images of the batch, augmented as they are.
        distill_weight: share of the teacher's part; the rest is `loss_function`'s.
    """

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answers = log_softmax(teacher(images) / temperature, 1)
        own = log_softmax(logits / temperature, 1)
        distance = kl_div(own, answers, reduction="batchmean", log_target=True) * temperature**2
        return distill_weight * distance + (1 - distill_weight) * loss_function(images, logits, labels)

    return loss
