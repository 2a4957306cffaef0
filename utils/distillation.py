"""Training on a teacher's answers as well as on the labels (Hinton et al., 2015).

https://arxiv.org/abs/1503.02531
"""

from argparse import ArgumentParser

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from utils.cli import fraction, positive_float
from utils.errors import UserError
from utils.training import LossFunction
from utils.weights import Weights, load_weights


def add_distillation_arguments(parser: ArgumentParser) -> None:
    """--teacher, --distill_weight, --temperature."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--teacher",
        help="weights file whose answers are learned as well: that of the dense model, or a better one "
        "(default: no distillation)",
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


def load_teacher(path: str, student: Weights) -> nn.Module:
    """The teacher, in eval mode, for a student whose classes and normalization are known.

    Raises:
        UserError: the file is no float weights, or made for other classes or another normalization.
    """
    teacher = load_weights(path)
    classes = teacher.model.architecture["num_classes"], student.model.architecture["num_classes"]
    if classes[0] != classes[1] or teacher.class_names not in (None, student.class_names):
        raise UserError(f"--teacher {path} knows other classes than the model: give one of the same data set")
    if teacher.normalization not in (None, student.normalization):
        raise UserError(
            f"--teacher {path} was trained with another normalization than the model: "
            "give one of the same data set and --val_size"
        )
    return teacher.model.to(memory_format=torch.channels_last)


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
