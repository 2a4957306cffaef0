"""Prune the weights of smallest magnitude in each layer, then train the rest to recover.

A CSV from scripts/generate_sparsity_dict_template.py says how much of each layer to keep: its column
`sparsity` is the fraction of weights KEPT, so 1.0 prunes nothing and 0.0 prunes the whole layer. The
published recipe is `--optimizer adam --lr 1e-4 --scheduler none --weight_decay 0 --augment none
--batch_size 32 --epochs 24`.
"""

import argparse
import copy
from dataclasses import replace

import torch
from torch import nn

from models.statistics import model_statistics, prunable_layers
from utils.checkpoints.weights import CompleteWeights, add_output_stride_argument, complete, save_weights
from utils.common import cli, distributed, errors, files
from utils.common.devices import device_of
from utils.common.errors import UserError
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Loader
from utils.evaluation import evaluate
from utils.open_model import open_teacher
from utils.open_weights import open_weights
from utils.pruning.pruner import CubicRamp, FineGrainedPruner
from utils.pruning.sparsity_dict import MEANING, read_sparsity_dict
from utils.pruning.tables import format_accuracies, format_density, format_layers
from utils.training.arguments import (
    add_float_training_arguments,
    add_training_arguments,
    build_run,
    finish_training,
    start_training,
    training_loader,
)
from utils.training.checkpoint import Progress
from utils.training.kernels.layers import use_fast_layers
from utils.training.loop import EVALUATION_BATCH_SIZE, accuracy_on_val, fit
from utils.training.optimization import ExponentialMovingAverage


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="weights file of the model to prune")
    parser.hints["--sparsity"] = (
        "scripts/allocate_sparsity.py --target shares a density of the whole model out among the layers, and "
        "writes a CSV for --sparsity_dict"
    )
    parser.add_argument("--sparsity_dict", required=True, metavar="CSV", help=MEANING)
    parser.add_argument("--output", default="weights/mobilenetv2_pruned.pth", help="weights file to write")
    cli.add_force_argument(parser)
    add_output_stride_argument(parser)
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--schedule",
        choices=("one_shot", "gradual"),
        default="one_shot",
        help="prune everything before training, or step by step during training (Zhu & Gupta, 2017)",
    )
    pruning.add_argument(
        "--ramp_epochs",
        type=cli.positive_int,
        help="epochs over which --schedule gradual prunes (default: half of --epochs)",
    )
    pruning.add_argument(
        "--prune_every",
        type=cli.positive_int,
        default=50,
        help="training steps from one pruning to the next with --schedule gradual",
    )
    add_training_arguments(
        parser, epochs=24, batch_size=128, lr=0.05, weight_decay=5e-4, epochs_type=cli.non_negative_int
    )
    add_float_training_arguments(parser)
    return parser


def ramp_epochs(args: argparse.Namespace) -> int:
    """Return the number of epochs over which the model is pruned; 0 for one_shot.

    Raises:
        UserError: the flags of the schedule contradict each other.
    """
    if args.schedule == "one_shot":
        if args.ramp_epochs is not None:
            raise UserError("--ramp_epochs goes with --schedule gradual")
        return 0
    if not args.epochs:
        raise UserError("--schedule gradual prunes during training: give --epochs of at least 1")
    if args.ramp_epochs is None:
        return max(1, args.epochs // 2)
    if args.ramp_epochs > args.epochs:
        raise UserError(f"--ramp_epochs {args.ramp_epochs} is more than --epochs {args.epochs}")
    return args.ramp_epochs


def recover(
    weights: CompleteWeights,
    keep_ratios: dict[str, float],
    teacher: nn.Module | None,
    data: ImageData,
    args: argparse.Namespace,
) -> tuple[nn.Module, Progress]:
    """Prune, then train with the pruned weights held at zero; return the model of the best epoch."""
    model = weights.model
    if device_of(model).type == "cpu" and not args.compile:
        use_fast_layers(model)
    loader = training_loader(data, weights.normalization, args)
    epochs = ramp_epochs(args)
    ramp = CubicRamp(epochs * len(loader), args.prune_every) if epochs else None
    pruner = FineGrainedPruner(model, keep_ratios, ramp)
    pruner.apply()
    average = ExponentialMovingAverage(model, args.ema) if args.ema else None

    def hold_zeros() -> None:
        pruner.step()
        # The average remembers what a weight was before it was pruned.
        if average:
            pruner.apply(average.module)

    run = build_run(
        model,
        loader,
        teacher,
        accuracy_on_val(data, weights.normalization),
        args,
        average=average,
        after_step=[hold_zeros],
        first_selectable_epoch=max(1, epochs),
        state={"pruner": pruner},
    )
    progress = fit(run)
    return run.selected, progress


def main(args: argparse.Namespace) -> None:
    """Prune, recover and save; test accuracy is measured before, between and after, only to report it."""
    device = start_training(args)
    ramp_epochs(args)
    weights = open_weights(args.weights, output_stride=args.output_stride)
    keep_ratios = read_sparsity_dict(args.sparsity_dict, prunable_layers(weights.model))
    data = load_data(args, weights.image_size)
    weights = complete(args.weights, weights, data)
    weights.model.to(memory_format=torch.channels_last)
    teacher = open_teacher(args.teacher, weights, device)

    pruned: nn.Module = copy.deepcopy(weights.model)
    pruner = FineGrainedPruner(pruned, keep_ratios)
    pruner.apply()
    print(format_layers(pruner), end="\n\n")
    print(format_density(model_statistics(pruned, weights.image_size)), end="\n\n", flush=True)
    test = Loader(data.test, weights.normalization, EVALUATION_BATCH_SIZE)
    results = {"dense": evaluate(weights.model.to(device), test), "pruned": evaluate(pruned.to(device), test)}
    progress = Progress()
    if args.epochs:
        pruned, progress = recover(weights, keep_ratios, teacher, data, args)
    if not distributed.is_main():
        return

    if args.epochs:
        results["recovered"] = evaluate(pruned, test)
        print()
    statistics = model_statistics(pruned.cpu(), weights.image_size)
    final = list(results.values())[-1]
    metrics = {
        **progress.metrics(),
        "dense_test_accuracy_pct": results["dense"].accuracy_pct,
        "pruned_test_accuracy_pct": results["pruned"].accuracy_pct,
        "test_accuracy_pct": final.accuracy_pct,
        "test_loss": final.loss,
        "parameters": statistics.parameters,
        "nonzeros": statistics.nonzeros,
        "density": statistics.density,
    }
    save_weights(args.output, replace(weights, model=pruned, metrics=metrics), args)
    finish_training(args, progress, metrics)
    print(format_accuracies(results), end="\n\n")
    print(format_density(statistics))
    print(f"wrote {args.output} ({files.file_size_mb(args.output):.2f} MB)")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
