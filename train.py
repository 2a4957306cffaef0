"""Train MobileNetV2, or a teacher for it, and write one weights file; selects on val, reports test once.

The published recipe is `--optimizer adam --lr 1e-4 --scheduler none --weight_decay 0 --augment none
--batch_size 32 --epochs 24 --output_stride 32`.
"""

import argparse
from dataclasses import replace

import torch

from models import MobileNetV2, ResNet18
from models.mobilenetv2 import OUTPUT_STRIDES
from utils.checkpoints.foreign import load_pretrained
from utils.checkpoints.weights import CompleteWeights, save_weights
from utils.common import cli, distributed, errors, files
from utils.common.errors import UserError
from utils.data.datasets import load_data, measure_normalization
from utils.data.loader import Loader
from utils.evaluation import evaluate
from utils.open_model import open_teacher
from utils.open_weights import open_weights
from utils.training.arguments import (
    add_float_training_arguments,
    add_training_arguments,
    build_run,
    finish_training,
    start_training,
    training_loader,
)
from utils.training.kernels.layers import use_fast_layers
from utils.training.loop import EVALUATION_BATCH_SIZE, accuracy_on_val, fit
from utils.training.optimization import ExponentialMovingAverage

KINDS = {"mobilenetv2": "float", "resnet18": "resnet18"}
"""Kind of the weights file, by --model."""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--output", default="weights/mobilenetv2.pth", help="weights file to write")
    cli.add_force_argument(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        choices=sorted(KINDS),
        default="mobilenetv2",
        help="resnet18 is large, and serves only as a --teacher",
    )
    model.add_argument(
        "--output_stride",
        type=int,
        choices=sorted(OUTPUT_STRIDES),
        default=16,
        help="how many times smaller the last map is than the image; 32 is torchvision's",
    )
    model.add_argument(
        "--width_mult", type=cli.width_mult, default=1.0, help="multiplies the channels of every layer"
    )
    model.add_argument(
        "--dropout", type=cli.fraction_below_one, default=0.2, help="probability before the classifier"
    )
    start = model.add_mutually_exclusive_group()
    start.add_argument("--weights", help="weights file to start from instead of random weights")
    start.add_argument(
        "--pretrained", action="store_true", help="start from torchvision's ImageNet weights (downloaded)"
    )
    add_training_arguments(parser, epochs=30, batch_size=128, lr=0.2, weight_decay=5e-4)
    add_float_training_arguments(parser)
    parser.add_argument(
        "--early_output_strides",
        type=early_output_stride,
        nargs="+",
        default=[],
        metavar="STRIDE:EPOCHS",
        help="epochs at coarser (faster) output strides before --output_stride, such as 32:10 16:10",
    )
    return parser


def early_output_stride(text: str) -> tuple[int, int]:
    """Parse STRIDE:EPOCHS into two numbers."""
    stride, _, epochs = text.partition(":")
    if not (stride.isdecimal() and epochs.isdecimal() and int(stride) in OUTPUT_STRIDES):
        raise argparse.ArgumentTypeError(f"{text!r} must be STRIDE:EPOCHS, such as 32:10")
    return int(stride), int(epochs)


def output_stride_by_epoch(args: argparse.Namespace) -> list[int]:
    """Return the output stride of each epoch.

    Raises:
        UserError: the early epochs leave none at the model's own output stride.
    """
    early_epochs = sum(epochs for _, epochs in args.early_output_strides)
    if early_epochs >= args.epochs:
        raise UserError(
            f"--early_output_strides takes {early_epochs} of {args.epochs} epochs: "
            "leave at least one at --output_stride"
        )
    strides = [stride for stride, epochs in args.early_output_strides for _ in range(epochs)]
    return strides + [args.output_stride] * (args.epochs - len(strides))


def build_model(args: argparse.Namespace, num_classes: int) -> MobileNetV2 | ResNet18:
    """Return a model with random, given or ImageNet weights.

    Raises:
        UserError: the weights are of another model, or --model has no such option.
    """
    if args.model == "resnet18":
        if args.pretrained or args.width_mult != 1.0:
            raise UserError("--pretrained and --width_mult are for mobilenetv2: leave them out for resnet18")
        model: MobileNetV2 | ResNet18 = ResNet18(num_classes, args.dropout, args.output_stride)
    else:
        model = MobileNetV2(num_classes, args.width_mult, args.dropout, args.output_stride)
    if args.weights:
        given = open_weights(args.weights, KINDS[args.model], args.output_stride).model
        for name in ("width_mult", "num_classes"):
            theirs, ours = given.architecture.get(name), model.architecture.get(name)
            if theirs != ours:
                raise UserError(f"{args.weights} has {name} {theirs}, and {ours} is wanted here")
        model.load_state_dict(given.state_dict())
    elif args.pretrained:
        assert isinstance(model, MobileNetV2)
        load_pretrained(model)
    return model.to(memory_format=torch.channels_last)


def main(args: argparse.Namespace) -> None:
    """Train, select on val, save, report test."""
    device = start_training(args)
    strides = output_stride_by_epoch(args)
    data = load_data(args)
    weights = CompleteWeights(
        model=build_model(args, len(data.class_names)),
        kind=KINDS[args.model],
        class_names=data.class_names,
        normalization=measure_normalization(data),
        image_size=data.train.images.shape[-1],
    )
    model = weights.model.to(device)
    teacher = open_teacher(args.teacher, weights, device)
    # On ResNet-18 the fast layers gain nothing.
    if device.type == "cpu" and args.model == "mobilenetv2" and not args.compile:
        use_fast_layers(model)
    average = ExponentialMovingAverage(model, args.ema) if args.ema else None

    trained = [model, average.module] if average else [model]

    def set_output_stride(epoch: int) -> None:
        for one in trained:
            one.set_output_stride(strides[epoch - 1])

    run = build_run(
        model,
        training_loader(data, weights.normalization, args),
        teacher,
        accuracy_on_val(data, weights.normalization),
        args,
        average=average,
        before_epoch=[set_output_stride],
        first_selectable_epoch=1 + sum(epochs for _, epochs in args.early_output_strides),
    )
    progress = fit(run)
    if not distributed.is_main():
        return

    test = evaluate(run.selected, Loader(data.test, weights.normalization, EVALUATION_BATCH_SIZE))
    metrics = {
        **progress.metrics(),
        "test_accuracy_pct": test.accuracy_pct,
        "test_loss": test.loss,
    }
    save_weights(args.output, replace(weights, model=run.selected.cpu(), metrics=metrics), args)
    finish_training(args, progress, metrics)
    print(f"test accuracy {test.accuracy_pct:.2f} % ({test.correct} / {test.total}), loss {test.loss:.4f}")
    print(f"wrote {args.output} ({files.file_size_mb(args.output):.2f} MB)")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
