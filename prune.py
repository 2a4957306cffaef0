"""Prune the weights of smallest magnitude in each layer, then train the rest to recover.

How much of each layer is kept is read from a CSV of scripts/generate_sparsity_dict_template.py,
whose column `sparsity` is the fraction of weights KEPT: 1.0 is not pruned, 0.0 prunes all of the
layer. The published recipe is `--optimizer adam --lr 1e-4 --scheduler none --weight_decay 0
--augment none --batch_size 32 --epochs 24`.
"""

import argparse
import copy
from dataclasses import replace

import torch
from torch import nn

from models.statistics import ModelStatistics, model_statistics, prunable_layers
from utils.checkpoints.weights import (
    Weights,
    add_output_stride_argument,
    complete,
    save_weights,
)
from utils.common import cli, distributed, errors, files, runtime
from utils.common.devices import add_device_argument, choose_device, device_of
from utils.common.errors import UserError
from utils.common.tables import format_table
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Batches
from utils.evaluation import Evaluation, evaluate
from utils.open_weights import open_weights
from utils.pruning.pruner import CubicRamp, FineGrainedPruner
from utils.pruning.sparsity_dict import MEANING, read_sparsity_dict
from utils.training.compilation import add_compile_argument, check_compiler
from utils.training.distillation import add_distillation_arguments, load_teacher, training_loss
from utils.training.kernels.layers import use_fast_layers
from utils.training.loop import (
    EVALUATION_BATCH_SIZE,
    Progress,
    Run,
    add_training_arguments,
    check_training_outputs,
    finish,
    fit,
    select_on_val,
    training_batches,
)
from utils.training.optimization import (
    ExponentialMovingAverage,
    add_average_argument,
    add_optimization_arguments,
    build_optimizer,
    build_scheduler,
)
from utils.training.precision import add_amp_argument, check_amp


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="weights file of the model to prune")
    parser.add_argument("--sparsity_dict", required=True, metavar="CSV", help=MEANING)
    parser.add_argument("--output", default="weights/mobilenetv2_pruned.pth", help="weights file to write")
    cli.add_force_argument(parser)
    add_output_stride_argument(parser)
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--schedule",
        choices=("one_shot", "gradual"),
        default="one_shot",
        help="prune all at once before the training, or step by step within it (Zhu & Gupta, 2017)",
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
        help="steps between two prunings of the ramp",
    )
    add_training_arguments(parser, epochs=24, batch_size=128, epochs_type=cli.non_negative_int)
    add_optimization_arguments(parser, lr=0.05, weight_decay=5e-4)
    add_average_argument(parser)
    add_compile_argument(parser)
    add_distillation_arguments(parser)
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    add_device_argument(parser)
    add_amp_argument(parser)
    cli.add_record_argument(parser)
    return parser


def ramp_epochs(args: argparse.Namespace) -> int:
    """Epochs until all is pruned; 0 when it is so from the start.

    Raises:
        UserError: the flags of the schedule contradict each other.
    """
    if args.schedule == "one_shot":
        if args.ramp_epochs is not None:
            raise UserError("--ramp_epochs goes with --schedule gradual")
        return 0
    if not args.epochs:
        raise UserError("--schedule gradual prunes while it trains: give --epochs of at least 1")
    if args.ramp_epochs is None:
        return max(1, args.epochs // 2)
    if args.ramp_epochs > args.epochs:
        raise UserError(f"--ramp_epochs {args.ramp_epochs} is more than --epochs {args.epochs}")
    return args.ramp_epochs


def format_layers(pruner: FineGrainedPruner) -> str:
    """The layer table: kept and total weights."""
    rows = [(name, int(mask.sum()), mask.numel()) for name, mask in pruner.masks.items()]
    rows.append(("all layers", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return format_table(
        ["layer", "kept", "total", "sparsity (kept)"],
        [(name, kept, total, f"{kept / total:.4f}") for name, kept, total in rows],
    )


def format_density(statistics: ModelStatistics) -> str:
    """What is left of the model, of all its parameters, in a line."""
    return (
        f"density {100 * statistics.density:.2f} % "
        f"({statistics.nonzeros} of {statistics.parameters} parameters are not zero): "
        f"{statistics.nonzero_size_mb:.2f} MB of {statistics.dense_size_mb:.2f} MB by nonzeros"
    )


def format_accuracies(results: dict[str, Evaluation]) -> str:
    """Test accuracy of each state of the model, and its change against the first."""
    first = next(iter(results.values()))
    return format_table(
        ["model", "test %", "change", "correct", "images", "loss"],
        [
            (
                name,
                f"{result.accuracy_pct:.2f}",
                f"{result.accuracy_pct - first.accuracy_pct:+.2f}",
                result.correct,
                result.total,
                f"{result.loss:.4f}",
            )
            for name, result in results.items()
        ],
    )


def recover(
    weights: Weights,
    keep_ratios: dict[str, float],
    teacher: nn.Module | None,
    data: ImageData,
    args: argparse.Namespace,
) -> tuple[nn.Module, Progress]:
    """Prune and train, pruned weights held at zero; the model that is kept, in its best state."""
    model, normalization = weights.model, weights.normalization
    if device_of(model).type == "cpu":
        use_fast_layers(model, kernels=not args.compile)
    batches = training_batches(data, normalization, args)
    ramp = CubicRamp(ramp_epochs(args) * len(batches), args.prune_every) if ramp_epochs(args) else None
    pruner = FineGrainedPruner(model, keep_ratios, ramp)
    pruner.apply()
    average = ExponentialMovingAverage(model, args.ema) if args.ema else None
    kept: nn.Module = average.module if average else model
    optimizer = build_optimizer(model, args)

    def update_average() -> None:
        average.update_parameters(model)
        # The average remembers what a weight was before it was pruned.
        pruner.apply(kept)

    progress = fit(
        Run(
            model=model,
            batches=batches,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, args, args.epochs * len(batches)),
            epochs=args.epochs,
            loss_function=training_loss(teacher, args),
            candidate=select_on_val(kept, data, normalization),
            after_step=[pruner.step, update_average] if average else [pruner.step],
            first_selectable_epoch=max(1, ramp_epochs(args)),
            state={"pruner": pruner, "average": average} if average else {"pruner": pruner},
            compile=args.compile,
            amp=args.amp,
        ),
        args,
    )
    kept.load_state_dict(progress.best_state)
    return kept, progress


def main(args: argparse.Namespace) -> None:
    """Prune, recover, save; test is measured before, between and after, for the report alone."""
    runtime.set_up(args.seed, args.threads, parallel=True)
    check_training_outputs(args)
    ramp_epochs(args)
    device = choose_device(args)
    check_amp(args, device)
    check_compiler(args, device)
    weights = open_weights(args.weights, output_stride=args.output_stride)
    keep_ratios = read_sparsity_dict(args.sparsity_dict, prunable_layers(weights.model))
    data = load_data(args, weights.image_size)
    weights = complete(args.weights, weights, data)
    teacher = load_teacher(args.teacher, weights, device) if args.teacher else None
    model = weights.model.to(memory_format=torch.channels_last)
    test = Batches(data.test, weights.normalization, EVALUATION_BATCH_SIZE)

    kept: nn.Module = copy.deepcopy(model)
    pruner = FineGrainedPruner(kept, keep_ratios)
    pruner.apply()
    print(format_layers(pruner))
    print()
    print(format_density(model_statistics(kept, weights.image_size)))
    print(flush=True)
    for measured in (model, kept):
        measured.to(device)
    results = {"dense": evaluate(model, test), "pruned": evaluate(kept, test)}
    progress = Progress()
    if args.epochs:
        kept, progress = recover(weights, keep_ratios, teacher, data, args)
    if not distributed.is_main():
        return
    if args.epochs:
        results["recovered"] = evaluate(kept, test)
        print(f"kept epoch {progress.best_epoch} of {args.epochs}")
        print()

    statistics = model_statistics(kept.cpu(), weights.image_size)
    final = list(results.values())[-1]
    metrics = {
        "best_epoch": progress.best_epoch,
        "val_accuracy_pct": progress.best_accuracy_pct,
        "dense_test_accuracy_pct": results["dense"].accuracy_pct,
        "pruned_test_accuracy_pct": results["pruned"].accuracy_pct,
        "test_accuracy_pct": final.accuracy_pct,
        "test_loss": final.loss,
        "parameters": statistics.parameters,
        "nonzeros": statistics.nonzeros,
        "density": statistics.density,
    }
    save_weights(args.output, replace(weights, model=kept, metrics=metrics), args)
    if args.record:
        runtime.write_record(args.record, args, {**metrics, "history": progress.rows()})
    finish(args)
    print(format_accuracies(results))
    print()
    print(format_density(statistics))
    print(f"wrote {args.output} ({files.file_size_mb(args.output):.2f} MB)")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
