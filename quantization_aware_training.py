"""Fine-tune a model with per-channel fake quantization and write the int8 model of the best epoch.

After each epoch the int8 model itself, not its float imitation, is evaluated on val. Weights that are
zero at the start (a pruned model's) are zero at the end.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

from models.folding import fold_batch_norms
from utils.checkpoints.weights import CompleteWeights, complete
from utils.common import cli, distributed, errors
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Loader
from utils.deployment.comparison import (
    add_quantization_arguments,
    calibration_batches,
    compare,
    deploy,
    format_comparison,
)
from utils.open_model import open_model, open_teacher
from utils.open_weights import open_qmodel
from utils.pruning.pruner import FineGrainedPruner
from utils.quantization.eager import (
    calibrate_qat,
    convert_qat,
    freeze_batch_norms,
    freeze_ranges,
    prepare_qat,
    to_module,
    use_engine,
)
from utils.quantization.int8_model import Int8Model
from utils.training.arguments import (
    add_training_arguments,
    build_run,
    finish_training,
    start_training,
    training_loader,
)
from utils.training.checkpoint import Progress
from utils.training.loop import accuracy_on_val, fit

DEVICES = ("auto", "cpu", "cuda")
"""Those that fake quantization runs on."""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--output", default="scripted_weights/mobilenetv2_qat.pt", help="TorchScript file to write"
    )
    cli.add_force_argument(parser)
    add_quantization_arguments(parser)
    schedule = parser.add_argument_group("quantization-aware training")
    schedule.add_argument(
        "--num_train_batches", type=cli.positive_int, help="batches per epoch, at most (default: all)"
    )
    schedule.add_argument(
        "--freeze_ranges",
        type=cli.fraction,
        default=0.5,
        help="fraction of the epochs after which the ranges of the activations are frozen",
    )
    schedule.add_argument(
        "--freeze_batch_norms",
        type=cli.fraction,
        default=0.75,
        help="fraction of the epochs after which the batch-norm statistics are frozen; at 0 the batch norms "
        "are folded into the weights before the training, and a step takes half the time",
    )
    add_training_arguments(parser, epochs=8, batch_size=128, lr=1e-3, weight_decay=1e-4, devices=DEVICES)
    parser.set_defaults(compile=False, amp=False)  # what fake quantization is not trained with
    return parser


def freezing(model: nn.Module, args: argparse.Namespace) -> Callable[[int], None]:
    """Return a Run's `before_epoch` that freezes ranges and batch-norm statistics late in the training."""

    def hook(epoch: int) -> None:
        done = (epoch - 1) / args.epochs
        # In a run of one epoch nothing is late; fractions of 0 freeze from the start.
        if done >= args.freeze_ranges:
            freeze_ranges(model)
        if done >= args.freeze_batch_norms:
            freeze_batch_norms(model)

    return hook


def train(
    weights: CompleteWeights,
    teacher: nn.Module | None,
    data: ImageData,
    device: torch.device,
    args: argparse.Namespace,
) -> tuple[Int8Model, Progress]:
    """Train with fake quantization; return the int8 model of the best epoch."""
    model = prepare_qat(weights.model, args.weight_bits, args.freeze_batch_norms > 0).to(device)
    calibrate_qat(model, calibration_batches(data, weights.normalization, args))
    pruner = FineGrainedPruner.from_zeros(model)
    candidate = accuracy_on_val(
        data,
        weights.normalization,
        args.batch_size,
        args.num_eval_batches,
        convert=lambda trained: to_module(convert_qat(trained)),
    )
    run = build_run(
        model,
        training_loader(data, weights.normalization, args, limit=args.num_train_batches),
        teacher,
        candidate,
        args,
        after_step=[pruner.apply],
        before_epoch=[freezing(model, args)],
    )
    progress = fit(run)
    return convert_qat(run.selected), progress


def main(args: argparse.Namespace) -> None:
    """Train, convert, evaluate, write, time."""
    device = start_training(args, DEVICES)
    use_engine(args.backend)
    weights = open_qmodel(args.weights)
    data = load_data(args, weights.image_size)
    weights = complete(args.weights, weights, data)
    weights.model.to(memory_format=torch.channels_last)
    teacher = open_teacher(args.teacher, weights, device)

    int8, progress = train(weights, teacher, data, device, args)
    if not distributed.is_main():
        return  # Latency is measured while no other process computes.

    test = Loader(data.test, weights.normalization, args.batch_size, limit=args.num_eval_batches)
    metrics = progress.metrics()
    deployments = [
        deploy("float", fold_batch_norms(weights.model), weights, args.backend, test),
        deploy("qat", int8, weights, args.backend, test, metrics),
    ]
    deployments[1].save(args.output)
    open_model(args.output)  # what cannot be read back must not cost the checkpoint
    rows = compare(deployments, args)
    finish_training(args, progress, {**metrics, "rows": rows})
    print(f"\n{format_comparison(rows)}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
