"""Run the whole chain, script by script, and end with one table of every variant against float.

Every step is the command that a person would type; it is printed before it is run.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.common import cli, errors, runtime
from utils.common.files import check_output
from utils.common.steps import run_script
from utils.common.tables import format_table

ACCEPTED_LOSS_OF_A_LAYER = 2.0
"""Points of accuracy on val that pruning a layer alone may cost in the demo."""


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--output_dir", default="demo", help="folder for everything that is written")
    cli.add_force_argument(parser)
    parser.add_argument("--epochs", type=cli.positive_int, default=8, help="of training the float model")
    parser.add_argument("--lr", type=cli.positive_float, default=0.1, help="of training the float model")
    parser.add_argument("--recovery_epochs", type=cli.positive_int, default=3, help="after pruning")
    parser.add_argument(
        "--qat_epochs", type=cli.positive_int, default=1, help="of quantization-aware training"
    )
    parser.add_argument("--width_mult", type=cli.positive_float, default=0.5, help="as train.py's")
    parser.add_argument("--output_stride", type=int, default=16, help="as train.py's")
    parser.add_argument(
        "--sparsities", type=cli.fraction, nargs="+", default=[0.25, 0.5, 0.75], help="as the scan's"
    )
    parser.add_argument("--rounds", type=cli.positive_int, default=200, help="of the benchmark")
    cli.add_data_arguments(parser)
    parser.set_defaults(dataset="synthetic")
    cli.add_runtime_arguments(parser)
    return parser


class Chain:
    """The steps, each a script of this repository run with the same images, seed and threads."""

    def __init__(self, args: argparse.Namespace, steps: int) -> None:
        self.folder = Path(args.output_dir)
        self.runtime = ["--seed", args.seed] + (["--threads", args.threads] if args.threads else [])
        self.data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
        for name in ("image_size", "val_size"):
            if getattr(args, name) is not None:
                self.data += [f"--{name}", getattr(args, name)]
        self.steps = steps
        self.done: list[dict[str, Any]] = []

    def run(self, title: str, script: str, *argv: object) -> None:
        """Run one script; its failure ends the chain.

        Raises:
            UserError: the script did not end well; it has said why.
        """
        step = run_script(f"[{len(self.done) + 1}/{self.steps}] {title}", script, *argv)
        self.done.append({"title": title, **step})

    def record(self, name: str) -> dict[str, Any]:
        """The results that a step recorded."""
        return json.loads(self.path(f"records/{name}.json").read_text())["results"]

    def path(self, name: str) -> Path:
        """A file of the demo."""
        return self.folder / name


def run_chain(chain: Chain, args: argparse.Namespace) -> dict[str, Path]:
    """Train, evaluate, scan, prune, convert, quantize; the file of each variant."""
    path, data, seeded, force = chain.path, chain.data, chain.runtime, ["--force"]
    recipe = ["--batch_size", 128]
    chain.run(
        "train the float model", "train.py", *data, *seeded, *force, *recipe,
        "--epochs", args.epochs, "--lr", args.lr,
        "--width_mult", args.width_mult, "--output_stride", args.output_stride,
        "--output", path("float.pth"), "--record", path("records/train.json"),
    )  # fmt: skip
    chain.run(
        "write a sparsity dict in which nothing is pruned yet",
        "scripts/generate_sparsity_dict_template.py", *force,
        "--weights", path("float.pth"), "--o", path("template.csv"),
    )  # fmt: skip
    threshold = max(1.0, chain.record("train")["val_accuracy_pct"] - ACCEPTED_LOSS_OF_A_LAYER)
    chain.run(
        "prune each layer alone and see what it costs", "scripts/sensitivity_scan.py",
        *data, *seeded, *force, "--weights", path("float.pth"), "--split", "val",
        "--accuracy_threshold", f"{threshold:.2f}", "--sparsities", *args.sparsities,
        "--o", path("scanning_log.csv"),
    )  # fmt: skip
    chain.run(
        "turn the scan into a sparsity dict", "scripts/scanning_log_to_sparsity_dict_template.py", *force,
        "--f", path("scanning_log.csv"), "--o", path("sparsity_dict.csv"),
    )  # fmt: skip
    chain.run(
        "prune and recover", "prune.py", *data, *seeded, *force, *recipe,
        "--epochs", args.recovery_epochs, "--lr", 0.05,
        "--weights", path("float.pth"), "--sparsity_dict", path("sparsity_dict.csv"),
        "--output", path("pruned.pth"),
    )  # fmt: skip
    chain.run(
        "convert for quantization", "scripts/to_qmodel_weights.py", *force,
        "--weights", path("pruned.pth"), "--output", path("qmodel.pth"),
    )  # fmt: skip
    chain.run(
        "quantize after training", "post_training_quantization.py", *data, *seeded, *force,
        "--weights", path("qmodel.pth"), "--output_dir", path("scripted_weights"),
    )  # fmt: skip
    chain.run(
        "quantize while training", "quantization_aware_training.py", *data, *seeded, *force, *recipe,
        "--epochs", args.qat_epochs, "--lr", 0.001,
        "--weights", path("qmodel.pth"), "--output", path("scripted_weights/mobilenetv2_qat.pt"),
    )  # fmt: skip
    return {
        "float": path("float.pth"),
        "pruned": path("pruned.pth"),
        "pruned, PTQ per tensor": path("scripted_weights/mobilenetv2_ptq_per_tensor.pt"),
        "pruned, PTQ per channel": path("scripted_weights/mobilenetv2_ptq_per_channel.pt"),
        "pruned, QAT": path("scripted_weights/mobilenetv2_qat.pt"),
    }


def measure(chain: Chain, args: argparse.Namespace, files: dict[str, Path]) -> list[dict[str, Any]]:
    """Accuracy, size, density and latency of each variant, as evaluate.py and benchmarks.py say."""
    for index, (variant, file) in enumerate(files.items()):
        chain.run(
            f"evaluate: {variant}", "evaluate.py", *chain.data, *chain.runtime, "--force",
            "--weights", file, "--record", chain.path(f"records/evaluate_{index}.json"),
        )  # fmt: skip
    chain.run(
        "measure latency", "scripts/benchmarks.py", *chain.runtime, "--force", "--rounds", args.rounds,
        "--model_file", *files.values(), "--record", chain.path("records/benchmark.json"),
    )  # fmt: skip
    rows = []
    for index, (variant, timed) in enumerate(zip(files, chain.record("benchmark")["files"], strict=True)):
        evaluated = chain.record(f"evaluate_{index}")
        rows.append(
            {
                "variant": variant,
                "accuracy_pct": evaluated["accuracy_pct"],
                "size_mb": evaluated["file_size_mb"],
                "density": evaluated["density"],
                "latency_ms": timed["median_latency_ms"],
            }
        )
    return rows


def format_summary(rows: list[dict[str, Any]]) -> str:
    """The closing table, each number against the float model's."""
    base = rows[0]
    return format_table(
        ["variant", "accuracy %", "points", "size MB", "of float", "density", "latency ms", "speed-up"],
        [
            [
                row["variant"],
                f"{row['accuracy_pct']:.2f}",
                f"{row['accuracy_pct'] - base['accuracy_pct']:+.2f}",
                f"{row['size_mb']:.2f}",
                f"{row['size_mb'] / base['size_mb']:.2f}×",
                f"{row['density']:.3f}",
                f"{row['latency_ms']:.2f}",
                f"{base['latency_ms'] / row['latency_ms']:.2f}×",
            ]
            for row in rows
        ],
    )


def main(args: argparse.Namespace) -> None:
    """Run every step, then print and keep the table."""
    runtime.set_up(args.seed, args.threads)
    start = time.perf_counter()
    chain = Chain(args, steps=14)
    summary = check_output(chain.path("summary.json"), force=args.force)
    chain.path("records").mkdir(parents=True, exist_ok=True)
    rows = measure(chain, args, run_chain(chain, args))
    seconds = round(time.perf_counter() - start)
    runtime.write_record(summary, args, {"variants": rows, "steps": chain.done, "seconds": seconds})
    print(f"\n{format_summary(rows)}\n\n{seconds} s; everything is in {chain.folder}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
