"""Run the whole chain, script by script, and end with one table of every variant against float.

Every step is the command that a person would type; it is printed before it is run.
"""

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.steps import data_flags, run_script
from utils.common.tables import format_table

ACCEPTED_LOSS_OF_A_LAYER = 2.0
"""Points of accuracy on val that pruning a layer alone may cost in the demo."""
VARIANTS = {
    "float": "float.pth",
    "pruned": "pruned.pth",
    "pruned, PTQ per tensor": "scripted_weights/mobilenetv2_ptq_per_tensor.pt",
    "pruned, PTQ per channel": "scripted_weights/mobilenetv2_ptq_per_channel.pt",
    "pruned, QAT": "scripted_weights/mobilenetv2_qat.pt",
}
"""Their files, in the order in which they are evaluated and timed."""
CHAIN = """
train the float model
  train.py {images} --batch_size 128 --epochs {epochs} --lr {lr} --width_mult {width_mult}
  --output_stride {output_stride} --output {to}/float.pth --record {to}/records/train.json
write a sparsity dict in which nothing is pruned yet
  scripts/generate_sparsity_dict_template.py --force --weights {to}/float.pth --o {to}/template.csv
prune each layer alone and see what it costs
  scripts/sensitivity_scan.py {images} --weights {to}/float.pth --split val --accuracy_threshold {threshold}
  --sparsities {sparsities} --o {to}/scanning_log.csv
turn the scan into a sparsity dict
  scripts/scanning_log_to_sparsity_dict_template.py --force --f {to}/scanning_log.csv
  --o {to}/sparsity_dict.csv
prune and recover
  prune.py {images} --batch_size 128 --epochs {recovery_epochs} --lr 0.05 --weights {to}/float.pth
  --sparsity_dict {to}/sparsity_dict.csv --output {to}/pruned.pth
convert for quantization
  scripts/to_qmodel_weights.py --force --weights {to}/pruned.pth --output {to}/qmodel.pth
quantize after training
  post_training_quantization.py {images} --weights {to}/qmodel.pth --output_dir {to}/scripted_weights
quantize while training
  quantization_aware_training.py {images} --batch_size 128 --epochs {qat_epochs} --lr 0.001
  --weights {to}/qmodel.pth --output {to}/scripted_weights/mobilenetv2_qat.pt
measure latency
  scripts/benchmarks.py {seeded} --rounds {rounds} --record {to}/records/benchmark.json --model_file {files}
"""
"""The title of each step, and its command with the arguments of the demo in braces. Before the last step
every variant is evaluated."""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--output_dir", default="demo", help="folder for everything that is written")
    cli.add_force_argument(parser)
    parser.add_argument("--epochs", type=cli.positive_int, default=8, help="of training the float model")
    parser.add_argument("--lr", type=cli.positive_float, default=0.1, help="of training the float model")
    parser.add_argument("--recovery_epochs", type=cli.positive_int, default=3, help="after pruning")
    parser.add_argument("--qat_epochs", type=cli.positive_int, default=1, help="while quantizing")
    parser.add_argument("--width_mult", type=cli.width_mult, default=0.5, help="as train.py's")
    parser.add_argument("--output_stride", type=cli.positive_int, default=16, help="as train.py's")
    scanned = [0.25, 0.5, 0.75]
    parser.add_argument("--sparsities", type=cli.fraction, nargs="+", default=scanned, help="as the scan's")
    parser.add_argument("--rounds", type=cli.positive_int, default=200, help="of the benchmark")
    cli.add_data_arguments(parser)
    parser.set_defaults(dataset="synthetic")
    cli.add_runtime_arguments(parser)
    return parser


def recorded(folder: Path, name: str) -> dict[str, Any]:
    """Return the results that a step recorded."""
    return json.loads((folder / f"records/{name}.json").read_text())["results"]


def run_chain(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run the steps, and return what was run.

    Raises:
        UserError: a script failed; it has said why.
    """
    seeded = f"--seed {args.seed} --force" + (f" --threads {args.threads}" if args.threads else "")
    to = shlex.quote(str(folder))
    values = vars(args) | {
        "seeded": seeded,
        "images": f"{shlex.join(data_flags(args))} {seeded}",
        "sparsities": " ".join(map(str, args.sparsities)),
        "to": to,
        "files": " ".join(f"{to}/{file}" for file in VARIANTS.values()),
    }
    *steps, last = [step.split("\n", 1) for step in re.split(r"\n(?=\S)", CHAIN.strip())]
    for index, (variant, file) in enumerate(VARIANTS.items()):
        command = "evaluate.py {images} --weights {to}/" + file
        steps.append([f"evaluate: {variant}", f"{command} --record {{to}}/records/evaluate_{index}.json"])
    done = []
    for number, (title, command) in enumerate([*steps, last], 1):
        if "{threshold}" in command:
            threshold = recorded(folder, "train")["val_accuracy_pct"] - ACCEPTED_LOSS_OF_A_LAYER
            values["threshold"] = f"{max(1.0, threshold):.2f}"
        argv = shlex.split(command.format_map(values))
        done.append({"title": title, **run_script(f"[{number}/{len(steps) + 1}] {title}", *argv)})
    return done


def measured(folder: Path) -> list[dict[str, Any]]:
    """Return accuracy, size, density and latency of each variant, as the scripts have recorded them."""
    rows = []
    for index, timed in enumerate(recorded(folder, "benchmark")["files"]):
        evaluated = recorded(folder, f"evaluate_{index}")
        row = {"variant": [*VARIANTS][index], "accuracy_pct": evaluated["accuracy_pct"]}
        row |= {"size_mb": evaluated["file_size_mb"], "density": evaluated["density"]}
        rows.append(row | {"latency_ms": timed["median_latency_ms"]})
    return rows


def format_summary(rows: list[dict[str, Any]]) -> str:
    """Return the closing table, each number against the float model's."""
    base, cells = rows[0], []
    for row in rows:
        points = f"{row['accuracy_pct'] - base['accuracy_pct']:+.2f}"
        sizes = [row["size_mb"], f"{row['size_mb'] / base['size_mb']:.2f}×", f"{row['density']:.3f}"]
        times = [row["latency_ms"], f"{base['latency_ms'] / row['latency_ms']:.2f}×"]
        cells.append([row["variant"], row["accuracy_pct"], points, *sizes, *times])
    headers = ["variant", "accuracy %", "points", "size MB", "of float", "density", "latency ms", "speed-up"]
    return format_table(headers, cells)


def main(args: argparse.Namespace) -> None:
    """Run every step, then print and keep the table."""
    runtime.set_up(args.seed, args.threads)
    start = time.perf_counter()
    folder = Path(args.output_dir)
    summary = folder / "summary.json"
    # The steps are run with --force.
    kept = [path.name for path in folder.glob("*")]
    if kept and not args.force:
        raise UserError(f"{folder} is not empty ({kept[0]}): give --force to overwrite it, or another folder")
    (folder / "records").mkdir(parents=True, exist_ok=True)
    done = run_chain(args, folder)
    rows = measured(folder)
    seconds = round(time.perf_counter() - start)
    runtime.write_record(summary, args, {"variants": rows, "steps": done, "seconds": seconds})
    print(f"\n{format_summary(rows)}\n\n{seconds} s; everything is in {folder}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
