"""Inference time of the same weights in TorchScript (ours), ONNX Runtime and OpenVINO.

Float and int8: ours, that of each runtime's own static quantization, and ours carried over as QDQ
(scripts/export_onnx.py). All take turns in each round, for each batch size and number of threads;
medians are compared. Nobody wins by being wrong: an int8 model whose logits lie more than twice as
far from those of the float model as ours do (root mean square) is shown but not counted.

Without --weights the model is drawn at random, with settled batch norms, at output stride 32 unless
--output_stride says otherwise: times do not depend on what it has learned.
"""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.other_runtimes import Contestant, Run, onnxruntime_contestants, openvino_contestants
from models import MobileNetV2, MobileNetV2Quantization
from models.folding import fold_batch_norms
from models.statistics import count_macs
from utils.checkpoints.weights import (
    MOBILENETV2_KINDS,
    Weights,
    add_output_stride_argument,
    complete,
)
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.optional_packages import import_optional
from utils.common.tables import format_table
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Loader
from utils.deployment.latency import Latency, measure_fastest_forms
from utils.deployment.onnx import to_onnx
from utils.deployment.torchscript import float_forms, to_torchscript
from utils.open_model import metadata_of
from utils.open_weights import open_weights
from utils.quantization import eager as quantization
from utils.quantization.bias_correction import correct_biases
from utils.quantization.int8_model import Int8Model

OURS, FLOAT = "TorchScript int8", "TorchScript float"
SETTLING_BATCHES = 8
COMPARE_BATCH_SIZE = 32
LARGEST_ERROR = 2.0
"""Times that of ours."""
REST_S = 0.01
"""Before each turn, for the threads of the runtime before to stop spinning in wait for work."""
WARM_UP = 5


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="1 thread, batch 1 and 32, few rounds: 50 s at most"
    )
    parser.add_argument("--weights", help="float weights or a qmodel (default: drawn at random)")
    add_output_stride_argument(parser)
    parser.add_argument(
        "--batch_sizes", type=cli.positive_int, nargs="+", default=[1, 32, 256], help="images a call"
    )
    parser.add_argument(
        "--thread_counts", type=cli.thread_count, nargs="+", default=[1, 2], help="instead of --threads"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["fbgemm", "x86", "onednn"],
        metavar="ENGINE",
        help="quantization engines for ours",
    )
    parser.add_argument("--rounds", type=cli.positive_int, default=60, help="times taken of each, in turns")
    parser.add_argument(
        "--num_calibration_batches", type=cli.positive_int, default=16, help="of 32 training images each"
    )
    parser.add_argument(
        "--num_images", type=cli.positive_int, default=2000, help="test images to compare outputs on"
    )
    cli.add_data_arguments(parser)
    parser.set_defaults(dataset="synthetic")
    cli.add_runtime_arguments(parser)
    cli.add_record_argument(parser)
    cli.add_force_argument(parser)
    return parser


def random_weights(data: ImageData, output_stride: int) -> Weights:
    """MobileNetV2 whose batch norms know the images."""
    side = data.train.images.shape[-1]
    model = MobileNetV2(num_classes=len(data.class_names), output_stride=output_stride)
    weights = complete("random weights", Weights(model, image_size=side), data)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    model.train()
    with torch.no_grad():
        for images, _ in Loader(data.train, weights.normalization, 64, shuffle=True, limit=SETTLING_BATCHES):
            model(images)
    model.eval()
    return weights


def torchscript_contestants(
    folded: MobileNetV2, int8: Int8Model, side: int, engines: list[str]
) -> dict[str, Contestant]:
    """Return ours: float in each of its forms, int8 with each engine."""

    def start(_threads: int, _batch_size: int) -> dict[str, Run]:
        runs = {}
        for engine in engines:
            quantization.use_engine(engine)
            runs[engine] = to_torchscript(int8, side)  # kernels are made for the first batch
        return runs

    floats = float_forms(folded, side)
    return {
        FLOAT: Contestant(lambda threads, batch_size: floats, torch.channels_last),
        OURS: Contestant(start, torch.channels_last),
    }


def find_others() -> list[Callable[..., dict[str, Contestant]]]:
    """The runtimes that are installed.

    Raises:
        UserError: none is.
    """
    import_optional("onnx")  # both read ONNX
    found = []
    for package, contestants in {
        "onnxruntime": onnxruntime_contestants,
        "openvino": openvino_contestants,
    }.items():
        try:
            import_optional(package)
            found.append(contestants)
        except UserError as error:
            print(f"left out: {error}")
    if not found:
        raise UserError("there is no runtime to compare with: pip install -r requirements-benchmarks.txt")
    return found


def gather(
    others: list[Callable[..., dict[str, Contestant]]],
    weights: Weights,
    data: ImageData,
    args: argparse.Namespace,
) -> dict[str, Contestant]:
    """All contestants, quantized on the same training images."""
    limit = args.num_calibration_batches
    batches = Loader(data.train, weights.normalization, 32, shuffle=True, limit=limit, seed=args.seed)
    quantization.use_engine(args.backends[0])
    folded = fold_batch_norms(weights.model)
    calibrated = quantization.calibrate(weights.model, batches)
    int8 = correct_biases(quantization.post_training_quantize(calibrated, per_channel=True), folded, batches)
    contestants = torchscript_contestants(folded, int8, weights.image_size, args.backends)
    metadata = metadata_of(weights)
    float_model, our_int8 = (to_onnx(model, metadata).SerializeToString() for model in (folded, int8))
    calibration = [images.contiguous() for images, _ in batches]
    for other in others:
        contestants |= other(float_model, our_int8, calibration)
    return contestants


@torch.inference_mode()
def compare_outputs(
    contestants: dict[str, Contestant], weights: Weights, data: ImageData, num_images: int
) -> dict[str, dict[str, float]]:
    """By name: how far logits and classes lie from those of the float model, and the accuracy."""
    split = data.test.subset(torch.arange(min(num_images, len(data.test))))
    batches = Loader(split, weights.normalization, COMPARE_BATCH_SIZE, drop_last=True)
    expected = torch.cat([weights.model(images) for images, _ in batches])
    labels = split.labels[: len(expected)]
    outputs = {}
    for name, contestant in contestants.items():
        run = next(iter(contestant.start(1, COMPARE_BATCH_SIZE).values()))
        # Copies, since a runtime may reuse the memory of its results.
        logits = torch.cat([run(images.contiguous()).clone() for images, _ in batches])
        error, classes = logits - expected, logits.argmax(1)
        outputs[name] = {
            "same_class_pct": 100 * (classes == expected.argmax(1)).double().mean().item(),
            "rms_error": error.square().mean().sqrt().item(),
            "largest_error": error.abs().max().item(),
            "test_accuracy_pct": 100 * (classes == labels).double().mean().item(),
        }
    return outputs


def time_case(
    contestants: dict[str, Contestant], side: int, threads: int, batch_size: int, rounds: int
) -> dict[str, tuple[str, Latency]]:
    """The fastest form of each and its times."""
    torch.set_num_threads(threads)
    inputs = torch.randn(batch_size, 3, side, side)

    def fixed(run: Run, images: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda _: run(images)

    models = {}
    for name, contestant in contestants.items():
        images = inputs.to(memory_format=contestant.memory_format)
        forms = contestant.start(threads, batch_size)
        models[name] = {form: fixed(run, images) for form, run in forms.items()}
    return measure_fastest_forms(
        models, inputs, rounds, WARM_UP, before=lambda _: threads > 1 and time.sleep(REST_S)
    )


def rows_of(
    measured: dict[str, tuple[str, Latency]],
    outputs: dict[str, dict[str, float]],
    threads: int,
) -> list[dict[str, Any]]:
    """A row a contestant; `times_ours` is its time divided by that of our int8."""
    ours, allowed = measured[OURS][1], LARGEST_ERROR * outputs[OURS]["rms_error"]
    rows = []
    for name, (form, latency) in measured.items():
        is_int8 = "int8" in name
        rows.append(
            {
                "threads": threads,
                "batch_size": latency.batch_size,
                "model": name if form == "default" else f"{name}, {form}",
                "median_latency_ms": latency.median_ms,
                "times_ours": ours.speedup_over(latency),
                **outputs[name],
                "counts": is_int8 and name != OURS and outputs[name]["rms_error"] <= allowed,
            }
        )
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table of one case."""
    return format_table(
        ["model", "median ms", "times ours", "same class %", "rms error", "largest", "test %"],
        [
            [
                row["model"],
                f"{row['median_latency_ms']:.3f}",
                row["times_ours"],
                row["same_class_pct"],
                f"{row['rms_error']:.1e}",
                f"{row['largest_error']:.1e}",
                row["test_accuracy_pct"],
            ]
            for row in rows
        ],
    )


def main(args: argparse.Namespace) -> None:
    """Quantize, compare outputs, time every case, print a table each and the least favourable ratio."""
    if args.quick:
        args.thread_counts, args.batch_sizes, args.rounds = [1], [1, 32], 20
        args.num_calibration_batches, args.num_images, args.backends = 2, 128, args.backends[:1]
    runtime.set_up(args.seed, args.threads)
    runtime.check_record(args)
    logging.disable(logging.WARNING)  # the runtimes' advice
    for engine in args.backends:
        quantization.use_engine(engine)
    others = find_others()
    stride = args.output_stride
    weights = open_weights(args.weights, MOBILENETV2_KINDS, stride) if args.weights else None
    data = load_data(args, weights and weights.image_size)
    weights = complete(args.weights, weights, data) if weights else random_weights(data, stride or 32)
    weights = replace(weights, model=MobileNetV2Quantization.from_float(weights.model))
    macs = sum(count_macs(weights.model, weights.image_size).values())

    contestants = gather(others, weights, data, args)
    outputs = compare_outputs(contestants, weights, data, args.num_images)
    print(f"torch {torch.__version__}, {runtime.cpu_name()}, {macs / 1e6:.2f} million MACs an image")

    rows, ratios = [], []
    for threads, batch_size in itertools.product(args.thread_counts, args.batch_sizes):
        measured = time_case(contestants, weights.image_size, threads, batch_size, args.rounds)
        case = rows_of(measured, outputs, threads)
        print(f"\nthreads {threads}, batch size {batch_size}\n{format_rows(case)}", flush=True)
        rows += case
        counted = [row for row in case if row["counts"]]
        if counted:
            best = min(counted, key=lambda row: row["times_ours"])
            ratios.append((1 / best["times_ours"], best))
    if args.record:
        runtime.write_record(args.record, args, {"macs": macs, "rows": rows})
    if not ratios:
        raise UserError("no other int8 model gives the outputs of the float one: see the column rms error")
    ratio, best = max(ratios, key=lambda pair: pair[0])
    print(
        f"\nratio {ratio:.2f} (int8 inference, ms at batch size {best['batch_size']} and {best['threads']} "
        f"threads, our TorchScript against {best['model']}, the best other; the least favourable case)"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
