"""Time of a sensitivity scan against the plain loop, on the same weights and images.

Plain: for each layer and each fraction kept, prune a copy of the model and evaluate it on the whole
split. Ours: `measure` of utils/pruning/sensitivity.py, as scripts/sensitivity_scan.py calls it. The two take
turns, a few layers each, and every row is compared: counts by class, and the loss as the log has it.

Without --weights the model is drawn at random, with settled batch norms. Its classes lie close
together, which is the hard case for equal answers.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models import MobileNetV2
from models.mobilenetv2 import OUTPUT_STRIDES
from utils.checkpoints.weights import CompleteWeights, Weights, complete
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.tables import format_table
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Loader
from utils.evaluation import Evaluation, evaluate
from utils.open_weights import open_weights
from utils.pruning.scanning_log import LOSS_DECIMALS, Point
from utils.pruning.sensitivity import evaluate_with_pruned_layer, measure, scan_plan

SETTLING_BATCHES = 8
LAYERS_A_TURN = 4
QUICK_IMAGES, QUICK_EVERY = 500, 5


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_IMAGES} drawn images, every {QUICK_EVERY}th layer: 50 s at most",
    )
    parser.add_argument("--weights", help="weights file to scan (default: random weights)")
    parser.add_argument(
        "--output_stride", type=int, choices=sorted(OUTPUT_STRIDES), default=16, help="of random weights"
    )
    parser.add_argument(
        "--sparsities", type=cli.fraction, nargs="+", default=[0.5, 0.7, 0.9], help="fractions KEPT"
    )
    parser.add_argument("--images", type=cli.positive_int, help="of the test split (default: all)")
    parser.add_argument("--every", type=cli.positive_int, default=1, help="scan each n-th layer only")
    parser.add_argument("--batch_size", type=cli.positive_int, default=250, help="images a batch")
    cli.add_data_arguments(parser)
    parser.set_defaults(dataset="synthetic")
    cli.add_runtime_arguments(parser)
    cli.add_record_argument(parser)
    cli.add_force_argument(parser)
    return parser


def load_or_draw_weights(args: argparse.Namespace) -> tuple[CompleteWeights, ImageData]:
    """The weights to scan and the images that fit them."""
    if args.weights:
        weights = open_weights(args.weights)
        data = load_data(args, weights.image_size)
        return complete(args.weights, weights, data), data
    data = load_data(args)
    model = MobileNetV2(len(data.class_names), output_stride=args.output_stride)
    weights = complete("random weights", Weights(model), data)
    batches = Loader(data.train, weights.normalization, 64, limit=SETTLING_BATCHES)
    model.train()
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    return weights, data


def check_equal(point: Point, ours: Evaluation, plain: Evaluation) -> None:
    """Make sure that both ways write the same row.

    Raises:
        UserError: they do not.
    """
    rows = [(e.correct_by_class, e.total_by_class, round(e.loss, LOSS_DECIMALS)) for e in (ours, plain)]
    if rows[0] != rows[1]:
        name, keep_ratio = point
        raise UserError(
            f"{name} at sparsity {keep_ratio}: {ours.correct} right answers and loss {ours.loss}, "
            f"by the plain loop {plain.correct} and {plain.loss}: this is a fault, please report it"
        )


def main(args: argparse.Namespace) -> None:
    """Scan both ways, compare, print the table and the ratio."""
    runtime.set_up(args.seed, args.threads)
    runtime.check_record(args)
    if args.quick:
        args.images, args.every = QUICK_IMAGES, QUICK_EVERY
    weights, data = load_or_draw_weights(args)
    split = data.test
    if args.images:
        split = split.subset(torch.arange(min(args.images, len(split))))
    batches = Loader(split, weights.normalization, args.batch_size)
    model = weights.model.eval().to(memory_format=torch.channels_last)
    whole_plan = scan_plan(model, args.sparsities)
    layers = list(dict.fromkeys(name for name, _ in whole_plan))[:: args.every]
    plan = [point for point in whole_plan if point[0] in layers]

    evaluate(model, batches)  # warms up
    seconds: dict[str, list[float]] = {"plain loop": [], "ours": []}
    scan = measure(model, batches, plan)
    for first in range(0, len(layers), LAYERS_A_TURN):
        points = [point for point in plan if point[0] in layers[first : first + LAYERS_A_TURN]]
        start = time.perf_counter()
        ours = [next(scan) for _ in points]
        between = time.perf_counter()
        plain = [evaluate_with_pruned_layer(model, batches, *point) for point in points]
        seconds["ours"].append(between - start)
        seconds["plain loop"].append(time.perf_counter() - between)
        for point, one, other in zip(points, ours, plain, strict=True):
            check_equal(point, one, other)

    stride = model.architecture["output_stride"]
    totals = {way: sum(parts) for way, parts in seconds.items()}
    ratio = totals["plain loop"] / totals["ours"]
    print(f"torch {torch.__version__}, {runtime.cpu_name()}, {torch.get_num_threads()} threads")
    print(f"{len(plan)} rows over {len(split)} images, output stride {stride}, batch size {args.batch_size}")
    print("all rows equal: right answers by class, and the loss as it stands in the log\n")
    rows = [[way, total, 1000 * total / len(plan)] for way, total in totals.items()]
    print(format_table(["scan", "s", "ms a row"], rows))
    if args.record:
        results = {"rows": len(plan), "images": len(split), "seconds": totals, "ratio": ratio}
        runtime.write_record(args.record, args, results)
    print(
        f"ratio {ratio:.2f} (sensitivity scan, seconds for {len(layers)} of {len(set(dict(whole_plan)))} "
        f"layers at output stride {stride}, the plain loop against ours)"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
