"""Prune each layer alone, measure accuracy, and recommend how much of it to keep.

Writes a CSV row by row and a plot beside it; run the same command again to resume an interrupted scan.
`sparsity` is the fraction of weights KEPT. The recommended sparsity is the smallest one at which the accuracy
stays at or above the threshold, or 1.0 if there is none. Under torchrun the processes share the layers.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from models.statistics import model_statistics
from utils.checkpoints.weights import CompleteWeights, add_output_stride_argument, complete
from utils.common import cli, distributed, errors, files, runtime
from utils.common.devices import add_device_argument, choose_device
from utils.common.errors import UserError
from utils.data.datasets import load_data
from utils.data.loader import Loader
from utils.evaluation import evaluate
from utils.open_weights import open_weights
from utils.pruning.plots import plot_sensitivity
from utils.pruning.pruner import kept_count
from utils.pruning.scanning_log import ScanningLog
from utils.pruning.sensitivity import measure, scan_id, scan_plan
from utils.pruning.sparsity_dict import describe_layers


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="weights file of the model to scan")
    parser.add_argument(
        "--accuracy_threshold",
        type=cli.percent,
        required=True,
        metavar="PERCENT",
        help="accuracy that a recommended sparsity must reach, such as 80.5",
    )
    parser.add_argument(
        "--sparsities",
        type=cli.fraction,
        nargs="+",
        default=[0.5, 0.7, 0.9],
        help="fractions of each layer's weights KEPT, measured one by one",
    )
    parser.add_argument(
        "--split",
        choices=("test", "val"),
        default="val",
        help="images to measure on; the published scan used test, which is for reporting",
    )
    parser.add_argument("--batch_size", type=cli.positive_int, default=250, help="images per batch")
    parser.add_argument("--o", default="scanning_log.csv", help="CSV to write")
    parser.add_argument("--plot", help="PNG to write (default: beside --o, with its name)")
    cli.add_force_argument(parser)
    add_output_stride_argument(parser)
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    add_device_argument(parser)
    cli.add_record_argument(parser)
    return parser


def check_outputs(args: argparse.Namespace) -> Path:
    """Check every output before the work starts and return the path of the plot.

    Raises:
        UserError: an output cannot be written, or exists and is not a log to resume.
    """
    is_continued = Path(args.o).is_file()
    files.check_output(args.o, force=args.force or is_continued)
    files.lock(args.o)
    plot = Path(args.plot) if args.plot else Path(args.o).with_suffix(".png")
    read = {"--o": args.o, "--weights": args.weights}
    # The plot beside the log is part of it; another may be something else.
    files.check_outputs({"--plot": plot}, read, force=args.force or (is_continued and not args.plot))
    files.check_outputs({"--record": args.record}, read | {"--plot": plot}, force=args.force)
    return plot


def format_layer(log: ScanningLog, name: str) -> str:
    """Return a layer's row of the printed table."""
    cells = "".join(f"{row.accuracy_pct:9.2f}" for row in log.rows if row.layer == name)
    return f"{name:<22}{cells}{log.recommended()[name]:>13g}"


def scan(weights: CompleteWeights, batches: Loader, log: ScanningLog) -> None:
    """Measure the points missing from the log; append their rows and print one line per layer.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the log has every row that was measured.
        UserError: another process has ended; the log has every row that was measured.
    """
    print(f"{'accuracy % at sparsity':<22}{''.join(f'{level:9g}' for level in log.levels)}  recommended")
    for row in log.rows:
        if row.keep_ratio == log.levels[-1]:
            print(format_layer(log, row.layer))
    done = len(log.rows)
    to_do = log.plan[done:]
    start = time.perf_counter()
    is_hidden = not (distributed.is_main() and sys.stderr.isatty())
    progress = tqdm(total=len(log.plan), initial=done, leave=False, disable=is_hidden)
    try:
        for count, evaluation in enumerate(measure(weights.model, batches, to_do), 1):
            row = log.append(evaluation)
            progress.update()
            if row.keep_ratio == log.levels[-1]:
                left = (time.perf_counter() - start) / count * (len(to_do) - count)
                progress.write(f"{format_layer(log, row.layer)}   {tqdm.format_interval(left)} left")
                sys.stdout.flush()
    except (KeyboardInterrupt, RuntimeError) as error:
        found = f"{len(log.rows)} of {len(log.plan)} rows are in {log.path}"
        advice = f"{found}: run the same command again to continue"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(advice) from None
        if not distributed.is_lost_process(error):
            raise
        raise UserError(f"another process of this run has ended; {advice}") from error
    finally:
        progress.close()


def main(args: argparse.Namespace) -> None:
    """Start or resume a scan; write the log and the plot."""
    runtime.set_up(args.seed, args.threads, parallel=True)
    device = choose_device(args)
    plot = check_outputs(args)
    weights = open_weights(args.weights, output_stride=args.output_stride)
    data = load_data(args, weights.image_size)
    weights = complete(args.weights, weights, data)
    split = data.split(args.split)
    batches = Loader(split, weights.normalization, args.batch_size)
    # The images have this memory format, too.
    model = weights.model.to(memory_format=torch.channels_last)
    statistics = model_statistics(model, weights.image_size)

    log = ScanningLog(
        args.o,
        scan_plan(model, args.sparsities),
        args.accuracy_threshold,
        scan_id(weights, split),
        describe_layers(statistics.layers),
    )
    if distributed.is_main() and Path(args.o).is_file() and not args.force:
        is_edited = log.load()
        print(f"resuming after {len(log.rows)} of {len(log.plan)} rows in {args.o}")
        if is_edited:
            print("keeping the recommended_sparsity that was edited: clear a layer's cells to choose it anew")
    # Also a barrier: nothing is written before every process has checked the outputs.
    log.rows = distributed.gather(log.rows)[0]
    log.start()
    dense = evaluate(model.to(device), batches)
    print(
        f"unpruned: {args.split} accuracy {dense.accuracy_pct:.2f} % "
        f"({dense.correct} / {dense.total}), loss {dense.loss:.4f}"
    )
    if dense.accuracy_pct < args.accuracy_threshold:
        print(
            f"this is below --accuracy_threshold {args.accuracy_threshold:g}: most layers will stay unpruned"
        )
    scan(weights, batches, log)
    if not distributed.is_main():
        return

    shapes = {layer.name: layer.shape for layer in statistics.layers}
    plot_sensitivity(plot, log.rows, shapes, dense.accuracy_pct, args.accuracy_threshold)
    recommended = log.recommended()
    kept = sum(kept_count(layer.parameters, recommended[layer.name]) for layer in statistics.layers)
    prunable = sum(layer.parameters for layer in statistics.layers)
    density = 1 - (prunable - kept) / statistics.parameters
    if args.record:
        results = {
            "split": args.split,
            "dense_accuracy_pct": dense.accuracy_pct,
            "dense_loss": dense.loss,
            "recommended_sparsity": recommended,
            "density": density,
        }
        runtime.write_record(args.record, args, results)
    pruned = sum(keep_ratio < 1 for keep_ratio in recommended.values())
    print(f"recommended: prune {pruned} of {len(recommended)} layers, density {100 * density:.2f} %")
    print(f"wrote {args.o} and {plot}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
