"""Quantize a model to int8 without training, per tensor and per channel, and compare with float.

Activation ranges and bias corrections come from training images; test images are only reported on.
Writes three TorchScript files, which run without this repository.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from models import MobileNetV2
from models.folding import fold_batch_norms
from utils.checkpoints.weights import complete
from utils.common import cli, errors, runtime
from utils.data.datasets import load_data
from utils.data.loader import Loader
from utils.deployment.comparison import (
    add_quantization_arguments,
    calibration_batches,
    compare,
    deploy,
    format_comparison,
)
from utils.open_weights import open_qmodel
from utils.quantization.bias_correction import correct_biases
from utils.quantization.eager import calibrate, post_training_quantize, use_engine
from utils.quantization.int8_model import Int8Model

VARIANTS = ("float", "ptq_per_tensor", "ptq_per_channel")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--output_dir", default="scripted_weights", help="folder for the TorchScript files")
    cli.add_force_argument(parser)
    add_quantization_arguments(parser)
    parser.add_argument("--batch_size", type=cli.positive_int, default=32, help="images per batch")
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    cli.add_record_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Calibrate once, quantize twice, evaluate, write, time."""
    runtime.set_up(args.seed, args.threads)
    use_engine(args.backend)
    paths = {variant: Path(args.output_dir) / f"mobilenetv2_{variant}.pt" for variant in VARIANTS}
    runtime.check_outputs(args, also=paths.values())
    weights = open_qmodel(args.weights)
    data = load_data(args, weights.image_size)
    weights = complete(args.weights, weights, data)

    print("[1/3] calibrating", flush=True)
    calibration = calibration_batches(data, weights.normalization, args)
    is_hidden = not sys.stderr.isatty()
    calibrated = calibrate(weights.model, tqdm(calibration, leave=False, disable=is_hidden))
    folded = fold_batch_norms(weights.model)
    models: dict[str, MobileNetV2 | Int8Model] = {"float": folded}
    for variant, per_channel in (("ptq_per_tensor", False), ("ptq_per_channel", True)):
        int8 = post_training_quantize(calibrated, per_channel, args.weight_bits)
        models[variant] = correct_biases(int8, folded, calibration)
    print("[2/3] evaluating on test images", flush=True)
    test = Loader(data.test, weights.normalization, args.batch_size, limit=args.num_eval_batches)
    deployments = {
        variant: deploy(variant, model, weights, args.backend, test) for variant, model in models.items()
    }
    for variant, deployment in deployments.items():
        deployment.save(paths[variant])
    print("[3/3] timing", flush=True)
    rows = compare(list(deployments.values()), args)
    print(f"\n{format_comparison(rows)}\n")
    for path in paths.values():
        print(f"wrote {path}")
    if args.record:
        runtime.write_record(args.record, args, {"rows": rows})


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
