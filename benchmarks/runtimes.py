"""Inference time of the same weights in TorchScript (ours), ONNX Runtime and OpenVINO, float and int8.

The others run our float and int8 models as scripts/export_onnx.py writes them. For each batch size and
number of threads, all of them take turns in each round, and medians are compared. Nobody wins by being
wrong: an int8 model whose logits are more than twice as far from those of the float model as ours (root
mean square) is shown but not counted.
"""

import argparse
import io
import itertools
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.folding import fold_batch_norms
from utils.checkpoints.weights import CompleteWeights, add_output_stride_argument, complete
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.optional_packages import import_optional
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Loader
from utils.deployment.latency import Latency, format_rows, measure_fastest_forms
from utils.deployment.onnx import start_session, to_onnx
from utils.deployment.torchscript import float_forms, to_torchscript
from utils.open_model import metadata_of
from utils.open_weights import open_qmodel
from utils.quantization import eager as quantization
from utils.quantization.bias_correction import correct_biases

Run = Callable[[Tensor], Tensor]
Start = Callable[[int, int], dict[str, Run]]
"""Takes the number of threads and the batch size; returns the forms of a model by name, such as an engine."""

OURS, FLOAT = "TorchScript int8", "TorchScript float"
COMPARE_BATCH_SIZE = 32
LARGEST_ERROR = 2.0
"""Largest RMS error of a model that counts, as a multiple of ours."""
REST_S = 0.01
"""Pause before each turn, after which threads of the previous runtime no longer spin, waiting for work."""
WARM_UP = 5
COLUMNS = {
    "model": ("model", "{}"),
    "median ms": ("median_latency_ms", "{:.3f}"),
    "times ours": ("times_ours", "{:.2f}"),
    "same class %": ("same_class_pct", "{:.2f}"),
    "rms error": ("rms_error", "{:.1e}"),
    "largest": ("largest_error", "{:.1e}"),
    "test %": ("test_accuracy_pct", "{:.2f}"),
}
"""Columns of the printed tables: header, key in a row, format."""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="1 thread, batch 1 and 32, few rounds: 50 s at most"
    )
    parser.add_argument(
        "--weights", default="weights/mobilenetv2_cifar10.pth", help="float weights or a qmodel"
    )
    add_output_stride_argument(parser)
    parser.add_argument(
        "--batch_sizes", type=cli.positive_int, nargs="+", default=[1, 32, 256], help="images per call"
    )
    parser.add_argument(
        "--thread_counts", type=cli.thread_count, nargs="+", default=[1, 2], help="used instead of --threads"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["fbgemm", "x86", "onednn"],
        metavar="ENGINE",
        help="quantization engines for our int8 model",
    )
    parser.add_argument("--rounds", type=cli.positive_int, default=60, help="timed calls of each model")
    parser.add_argument(
        "--num_calibration_batches", type=cli.positive_int, default=16, help="batches of 32 training images"
    )
    parser.add_argument(
        "--num_images", type=cli.positive_int, default=2000, help="test images to compare outputs on"
    )
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    cli.add_record_argument(parser)
    cli.add_force_argument(parser)
    return parser


def start_openvino(model: bytes, threads: int, batch_size: int) -> Run:
    """Run an ONNX model in OpenVINO."""
    (openvino,) = import_optional("openvino")
    core = openvino.Core()
    graph = core.read_model(io.BytesIO(model))
    graph.reshape([batch_size, *(d.get_length() for d in list(graph.input(0).partial_shape)[1:])])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # or float layers would run in bfloat16
    }
    request = core.compile_model(graph, "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        results = request.infer({0: images.numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return run


Runtime = Callable[[bytes, int, int], Run]
"""Takes an ONNX model, the number of threads and the batch size."""
RUNTIMES: dict[str, tuple[str, Runtime]] = {
    "ONNX Runtime": ("onnxruntime", lambda model, threads, _: start_session(model, threads)),
    "OpenVINO": ("openvino", start_openvino),
}
"""By name, the package that is needed and how to start a model."""


def installed_runtimes() -> dict[str, Runtime]:
    """Return the RUNTIMES whose packages are installed.

    Raises:
        UserError: none is.
    """
    import_optional("onnx")  # all of them read ONNX
    found = {}
    for name, (package, start) in RUNTIMES.items():
        try:
            import_optional(package)
            found[name] = start
        except UserError as error:
            print(f"left out: {error}")
    if not found:
        raise UserError("there is no runtime to compare with: pip install -r requirements-benchmarks.txt")
    return found


def gather(
    runtimes: dict[str, Runtime], weights: CompleteWeights, data: ImageData, args: argparse.Namespace
) -> dict[str, Start]:
    """Quantize the model and return all contestants by name."""
    side, limit = weights.image_size, args.num_calibration_batches
    loader = Loader(data.train, weights.normalization, 32, shuffle=True, limit=limit, seed=args.seed)
    quantization.use_engine(args.backends[0])
    folded = fold_batch_norms(weights.model)
    calibrated = quantization.calibrate(weights.model, loader)
    int8 = correct_biases(quantization.post_training_quantize(calibrated, per_channel=True), folded, loader)
    floats = float_forms(folded, side)

    def start_ours(_threads: int, _batch_size: int) -> dict[str, Run]:
        runs: dict[str, Run] = {}
        for engine in args.backends:
            quantization.use_engine(engine)
            runs[engine] = to_torchscript(int8, side)  # kernels are made for the first batch
        return runs

    contestants: dict[str, Start] = {FLOAT: lambda _threads, _batch_size: floats, OURS: start_ours}
    metadata = metadata_of(weights)
    float_model, int8_model = (to_onnx(model, metadata).SerializeToString() for model in (folded, int8))

    def start_theirs(start: Runtime, model: bytes, threads: int, batch_size: int) -> dict[str, Run]:
        return {"default": start(model, threads, batch_size)}

    for name, start in runtimes.items():
        contestants[f"{name} float"] = partial(start_theirs, start, float_model)
        contestants[f"{name} int8, our weights"] = partial(start_theirs, start, int8_model)
    return contestants


@torch.inference_mode()
def compare_outputs(
    contestants: dict[str, Start], weights: CompleteWeights, data: ImageData, num_images: int
) -> dict[str, dict[str, float]]:
    """Return, by name, how far logits and classes are from those of the float model, and the accuracy."""
    split = data.test.subset(torch.arange(min(num_images, len(data.test))))
    loader = Loader(split, weights.normalization, COMPARE_BATCH_SIZE, drop_last=True)
    expected = torch.cat([weights.model(images) for images, _ in loader])
    labels = split.labels[: len(expected)]
    outputs = {}
    for name, start in contestants.items():
        run = next(iter(start(1, COMPARE_BATCH_SIZE).values()))
        # Copies, since a runtime may reuse the memory of its results.
        logits = torch.cat([run(images.contiguous()).clone() for images, _ in loader])
        error, classes = logits - expected, logits.argmax(1)
        outputs[name] = {
            "same_class_pct": 100 * (classes == expected.argmax(1)).double().mean().item(),
            "rms_error": error.square().mean().sqrt().item(),
            "largest_error": error.abs().max().item(),
            "test_accuracy_pct": 100 * (classes == labels).double().mean().item(),
        }
    return outputs


def time_case(
    contestants: dict[str, Start], side: int, threads: int, batch_size: int, rounds: int
) -> dict[str, tuple[str, Latency]]:
    """Return the fastest form of each contestant and its times."""
    torch.set_num_threads(threads)
    inputs = torch.randn(batch_size, 3, side, side)
    ours = inputs.to(memory_format=torch.channels_last)  # which TorchScript need not rearrange

    models: dict[str, dict[str, Callable[[Tensor], object]]] = {}
    for name, start in contestants.items():
        images = ours if name in (OURS, FLOAT) else inputs
        models[name] = {
            form: partial(lambda run, images, _: run(images), run, images)
            for form, run in start(threads, batch_size).items()
        }
    rest_s = REST_S if threads > 1 else 0.0
    return measure_fastest_forms(models, inputs, rounds, WARM_UP, before=lambda _: time.sleep(rest_s))


def rows_of(
    measured: dict[str, tuple[str, Latency]], outputs: dict[str, dict[str, float]], threads: int
) -> list[dict[str, Any]]:
    """Return one row per contestant; `times_ours` is its time divided by that of our int8."""
    ours, allowed = measured[OURS][1], LARGEST_ERROR * outputs[OURS]["rms_error"]
    return [
        {
            "threads": threads,
            "batch_size": latency.batch_size,
            "model": name if form == "default" else f"{name}, {form}",
            "median_latency_ms": latency.median_ms,
            "times_ours": ours.speedup_over(latency),
            **outputs[name],
            "counts": "int8" in name and name != OURS and outputs[name]["rms_error"] <= allowed,
        }
        for name, (form, latency) in measured.items()
    ]


def main(args: argparse.Namespace) -> None:
    """Quantize, compare outputs, time every case, print their tables and the least favourable ratio."""
    if args.quick:
        args.thread_counts, args.batch_sizes, args.rounds = [1], [1, 32], 20
        args.num_calibration_batches, args.num_images, args.backends = 2, 128, args.backends[:1]
    runtime.set_up(args.seed, args.threads)
    runtime.check_outputs(args)
    logging.disable(logging.WARNING)  # the runtimes' advice
    for engine in args.backends:
        quantization.use_engine(engine)
    runtimes = installed_runtimes()
    weights = open_qmodel(args.weights, args.output_stride)
    data = load_data(args, weights.image_size)
    weights = complete(args.weights, weights, data)
    contestants = gather(runtimes, weights, data, args)
    outputs = compare_outputs(contestants, weights, data, args.num_images)
    macs = metadata_of(weights).macs
    print(f"torch {torch.__version__}, {runtime.cpu_name()}, {macs / 1e6:.2f} million MACs per image")

    rows: list[dict[str, Any]] = []
    for threads, batch_size in itertools.product(args.thread_counts, args.batch_sizes):
        measured = time_case(contestants, weights.image_size, threads, batch_size, args.rounds)
        case = rows_of(measured, outputs, threads)
        print(f"\nthreads {threads}, batch size {batch_size}\n{format_rows(case, COLUMNS)}", flush=True)
        rows += case
    if args.record:
        runtime.write_record(args.record, args, {"macs": macs, "rows": rows})
    counted = [row for row in rows if row["counts"]]
    if not counted:
        raise UserError("no other int8 model gives the outputs of the float one: see the column rms error")
    worst = min(counted, key=lambda row: row["times_ours"])
    print(
        f"\nratio {1 / worst['times_ours']:.2f} (int8 inference, ms at batch size {worst['batch_size']} and "
        f"{worst['threads']} threads, our TorchScript against {worst['model']}, the best other; the least "
        "favourable case)"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
