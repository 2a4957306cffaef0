"""Time of a sensitivity scan against the plain loop, on the same weights and images.

Plain: for each layer and each fraction kept, prune a copy of the model and evaluate it on the whole split.
Ours: `measure`, as scripts/sensitivity_scan.py calls it. The two take turns, and every row is compared:
counts by class, and the loss as the log has it. Without --weights the model is random with settled batch
norms; its logits are close together, which makes equal answers hard to get.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models import MobileNetV2
from utils.checkpoints.weights import add_output_stride_argument, complete
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.tables import format_table
from utils.data.datasets import load_data, measure_normalization
from utils.data.loader import Loader
from utils.evaluation import evaluate
from utils.open_weights import open_weights
from utils.pruning.scanning_log import LOSS_DECIMALS
from utils.pruning.sensitivity import evaluate_with_pruned_layer, measure, scan_plan

SETTLING_BATCHES = 8
QUICK_IMAGES, QUICK_EVERY = 500, 5


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    quick = f"{QUICK_IMAGES} drawn images, every {QUICK_EVERY}th layer: 50 s at most"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--weights", help="weights file to scan (default: random weights)")
    add_output_stride_argument(parser)
    kept = [0.5, 0.7, 0.9]
    parser.add_argument("--sparsities", type=cli.fraction, nargs="+", default=kept, help="fractions KEPT")
    parser.add_argument("--images", type=cli.positive_int, help="of the test split (default: all)")
    parser.add_argument("--every", type=cli.positive_int, default=1, help="scan every n-th layer only")
    parser.add_argument("--batch_size", type=cli.positive_int, default=250, help="images per batch")
    cli.add_data_arguments(parser)
    parser.set_defaults(dataset="synthetic")
    cli.add_runtime_arguments(parser)
    cli.add_record_argument(parser)
    cli.add_force_argument(parser)
    return parser


def load(args: argparse.Namespace) -> tuple[MobileNetV2, Loader]:
    """Return the model to scan, opened or random, and the images to scan it on."""
    weights = open_weights(args.weights, output_stride=args.output_stride) if args.weights else None
    data = load_data(args, weights.image_size if weights else None)
    split = data.test.subset(torch.arange(min(args.images or len(data.test), len(data.test))))
    if weights:
        weights = complete(args.weights, weights, data)
        return weights.model, Loader(split, weights.normalization, args.batch_size)
    normalization = measure_normalization(data)
    model = MobileNetV2(len(data.class_names), output_stride=args.output_stride or 16).train()
    with torch.no_grad():
        for images, _ in Loader(data.train, normalization, 64, limit=SETTLING_BATCHES):
            model(images)
    return model, Loader(split, normalization, args.batch_size)


def main(args: argparse.Namespace) -> None:
    """Scan both ways, compare, print the table and the ratio.

    Raises:
        UserError: a row differs.
    """
    runtime.set_up(args.seed, args.threads)
    runtime.check_outputs(args)
    if args.quick:
        args.images, args.every = QUICK_IMAGES, QUICK_EVERY
    model, loader = load(args)
    model.eval().to(memory_format=torch.channels_last)
    whole_plan = scan_plan(model, args.sparsities)
    layers = list(dict(whole_plan))
    scanned = layers[:: args.every]
    plan = [point for point in whole_plan if point[0] in scanned]

    evaluate(model, loader)  # warms up
    seconds = {"plain loop": 0.0, "ours": 0.0}
    scan = measure(model, loader, plan)
    for name, keep_ratio in plan:
        start = time.perf_counter()
        ours = next(scan)
        between = time.perf_counter()
        plain = evaluate_with_pruned_layer(model, loader, name, keep_ratio)
        seconds["ours"] += between - start
        seconds["plain loop"] += time.perf_counter() - between
        rows = [(e.correct_by_class, e.total_by_class, round(e.loss, LOSS_DECIMALS)) for e in (ours, plain)]
        if rows[0] != rows[1]:
            raise UserError(f"{name} at {keep_ratio}: {ours}, but {plain} by the plain loop: report it")

    stride, count = model.architecture["output_stride"], len(loader.split)
    ratio = seconds["plain loop"] / seconds["ours"]
    print(f"torch {torch.__version__}, {runtime.cpu_name()}, {torch.get_num_threads()} threads")
    print(f"{len(plan)} rows over {count} images, output stride {stride}, batch size {args.batch_size}")
    print("all rows equal: correct answers by class, and the loss to the decimals of the log\n")
    table = [[way, total, 1000 * total / len(plan)] for way, total in seconds.items()]
    print(format_table(["scan", "s", "ms per row"], table))
    if args.record:
        results = {"rows": len(plan), "images": count, "seconds": seconds, "ratio": ratio}
        runtime.write_record(args.record, args, results)
    print(
        f"ratio {ratio:.2f} (sensitivity scan, seconds for {len(scanned)} of {len(layers)} layers at output "
        f"stride {stride}, the plain loop against ours)"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
