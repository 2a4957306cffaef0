"""Train a qmodel with the rounding of int8, per channel, and write the int8 model.

After each epoch the int8 model itself, not its float imitation, is evaluated on val; the best is
kept. Weights that are zero at the start (a pruned model's) are zero at the end.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from models.folding import fold_batch_norms
from utils.checkpoints.weights import Weights, complete
from utils.common import cli, distributed, errors, runtime
from utils.common.devices import add_device_argument, choose_device
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Batches
from utils.deployment.comparison import (
    add_quantization_arguments,
    calibration_batches,
    compare,
    deploy,
    format_comparison,
)
from utils.evaluation import evaluate
from utils.open_weights import open_weights
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
from utils.training.distillation import add_distillation_arguments, load_teacher, training_loss
from utils.training.loop import (
    Progress,
    Run,
    add_training_arguments,
    check_training_outputs,
    finish,
    fit,
    training_batches,
)
from utils.training.optimization import add_optimization_arguments, build_optimizer, build_scheduler

# Fake quantization is not made for others.
DEVICES = ("auto", "cpu", "cuda")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--output", default="scripted_weights/mobilenetv2_qat.pt", help="TorchScript file to write"
    )
    cli.add_force_argument(parser)
    add_quantization_arguments(parser)
    schedule = parser.add_argument_group("quantization-aware training")
    schedule.add_argument(
        "--num_train_batches", type=cli.positive_int, help="batches an epoch, at most (default: all)"
    )
    schedule.add_argument(
        "--freeze_ranges",
        type=cli.fraction,
        default=0.5,
        help="fraction of the epochs after which the ranges of the activations are held",
    )
    schedule.add_argument(
        "--freeze_batch_norms",
        type=cli.fraction,
        default=0.75,
        help="fraction of the epochs after which the batch-norm statistics are held; at 0 the batch norms "
        "are folded into the weights before the training, and a step takes half the time",
    )
    add_training_arguments(parser, epochs=8, batch_size=128)
    add_optimization_arguments(parser, lr=1e-3, weight_decay=1e-4)
    add_distillation_arguments(parser)
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    add_device_argument(parser, DEVICES)
    cli.add_record_argument(parser)
    return parser


def freezing(model: nn.Module, args: argparse.Namespace) -> Callable[[int], None]:
    """A Run's `before_epoch` that holds ranges and batch-norm statistics late in the training."""

    def hook(epoch: int) -> None:
        done = (epoch - 1) / args.epochs
        # With one epoch alone nothing is late, and at 0 they are held from the start.
        if done >= args.freeze_ranges:
            freeze_ranges(model)
        if done >= args.freeze_batch_norms:
            freeze_batch_norms(model)

    return hook


def int8_on_val(
    model: nn.Module, weights: Weights, data: ImageData, args: argparse.Namespace
) -> Callable[[], tuple[nn.Module, float | None]]:
    """A Run's `candidate`: the model in training, and the accuracy on val of its int8 form."""
    if not len(data.val):
        return lambda: (model, None)
    val = Batches(data.val, weights.normalization, args.batch_size, limit=args.num_eval_batches, shared=True)
    return lambda: (model, evaluate(to_module(convert_qat(model)), val, shared=True).accuracy_pct)


def train(
    weights: Weights,
    teacher: nn.Module | None,
    data: ImageData,
    device: torch.device,
    args: argparse.Namespace,
) -> tuple[Int8Model, Progress]:
    """Quantization-aware training on a device; the int8 model of its best epoch."""
    has_batch_norms = args.freeze_batch_norms > 0
    model = prepare_qat(weights.model, args.weight_bits, has_batch_norms).to(device)
    calibrate_qat(model, calibration_batches(data, weights.normalization, args))
    pruner = FineGrainedPruner.from_zeros(model)
    batches = replace(training_batches(data, weights.normalization, args), limit=args.num_train_batches)
    optimizer = build_optimizer(model, args)
    progress = fit(
        Run(
            model=model,
            batches=batches,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, args, args.epochs * len(batches)),
            epochs=args.epochs,
            loss_function=training_loss(teacher, args),
            candidate=int8_on_val(model, weights, data, args),
            after_step=[pruner.apply],
            before_epoch=[freezing(model, args)],
        ),
        args,
    )
    model.load_state_dict(progress.best_state)
    return convert_qat(model), progress


def main(args: argparse.Namespace) -> None:
    """Train, convert, evaluate, write, time."""
    runtime.set_up(args.seed, args.threads, parallel=True)
    use_engine(args.backend)
    check_training_outputs(args)
    device = choose_device(args, DEVICES)
    weights = open_weights(args.weights, "qmodel")
    data = load_data(args, weights.image_size)
    weights = complete(args.weights, weights, data)
    weights.model.to(memory_format=torch.channels_last)
    teacher = load_teacher(args.teacher, weights, device) if args.teacher else None

    int8, progress = train(weights, teacher, data, device, args)
    if not distributed.is_main():
        return  # The rest is for one process, and times are taken while no other computes.
    print(f"kept epoch {progress.best_epoch} of {args.epochs}", flush=True)
    test = Batches(data.test, weights.normalization, args.batch_size, limit=args.num_eval_batches)
    metrics = {"best_epoch": progress.best_epoch, "val_accuracy_pct": progress.best_accuracy_pct}
    deployments = [
        deploy("float", fold_batch_norms(weights.model), weights, args.backend, test),
        deploy("qat", int8, weights, args.backend, test, metrics),
    ]
    deployments[1].save(args.output)
    rows = compare(deployments, args)
    if args.record:
        runtime.write_record(args.record, args, {**metrics, "rows": rows, "history": progress.rows()})
    finish(args)
    print(f"\n{format_comparison(rows)}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
