"""Run every command behind the results tables, in order, from nothing.

A step whose files are there, and whose record was written by the same command, is skipped, so that an
interrupted run goes on where it stopped; an interrupted training goes on from its checkpoint.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.common import cli, errors
from utils.common.steps import command_line, data_flags, run_script
from utils.pruning.allocation import METHODS
from utils.training.checkpoint import checkpoint_path
from utils.training.precision import is_fast_in_bfloat16

FREE_FLAGS = re.compile(r" --(force|resume|threads \d+)\b")  # which no number depends on
PUBLISHED, FLOAT = "runs/published/mobilenetv2.pth", "weights/mobilenetv2_cifar10.pth"
OS16, OS16_LONGER = "runs/float_os16/mobilenetv2.pth", "runs/float_os16_longer/mobilenetv2.pth"
OS16_PACKED = "weights/mobilenetv2_cifar10_os16.npz"
SPARSE_271 = "weights/mobilenetv2_cifar10_pruned.pth"
SPARSE_170 = "runs/pruned_170/mobilenetv2.pth"  # as dense as fits into 0.37 MB
SPARSE_100 = "runs/pruned_100/mobilenetv2.pth"
KINDS = ("ptq_per_tensor", "ptq_per_channel", "qat")
CUTOUT = "--augment crop_flip_cutout --cutout_size 12"
TRIVIALAUGMENT = "--augment crop_flip_trivialaugment_cutout --cutout_size 8"
COSINE = "--scheduler cosine --weight_decay 1e-3"
SHARP = "--dropout 0 --label_smoothing 0.1"
MUON_STEPS = "--optimizer muon --lr 0.2 --muon_lr 0.05 --epochs 30"
ENGINE = "--backend onednn"  # the fastest at output stride 8
UNMEASURED = "--num_eval_batches 1 --latency_rounds 1"  # since they are measured by steps of their own


def lines(steps: Iterable[str]) -> str:
    """Return several steps, or groups of them, as one text."""
    return "\n".join(steps)


def int8_file(prefix: str, kind: str = "ptq_per_channel", seed: int = 0) -> str:
    """Return where an int8 model is."""
    return f"runs/int8/{prefix}s{seed}/mobilenetv2_{kind}.pt"


def evaluate(name: str, file: str) -> str:
    """Return the step that measures a model of the results table."""
    return f"0.5 evaluate.py DATA --weights {file} --record results/evaluate/{name}.json"


def pack(name: str, source: str) -> str:
    """Return the steps that pack a model and evaluate what came of it."""
    file = f"runs/packed/{name}.npz"
    return lines([f"0.2 scripts/pack_weights.py --weights {source} --o {file}", evaluate(name, file)])


def ptq(prefix: str, source: str, seeds: Iterable[int] = (0,)) -> str:
    """Return the steps that convert a model and quantize it after training, with each seed."""
    qmodel = f"runs/int8/{prefix}qmodel.pth"
    steps = [f"0.1 scripts/to_qmodel_weights.py --weights {source} --output {qmodel}"]
    for folder, seed in ((f"runs/int8/{prefix}s{seed}", seed) for seed in seeds):
        steps.append(f"""1 post_training_quantization.py DATA --weights {qmodel} {ENGINE} --seed {seed}
  {UNMEASURED} --output_dir {folder} --record {folder}/ptq.json""")
    return lines(steps)


def qat(prefix: str, variant: str, flags: str) -> str:
    """Return the step of quantization-aware training with a seed, or to fewer bits."""
    folder = f"runs/int8/{prefix}{variant}"
    return f"""5 quantization_aware_training.py DATA --weights runs/int8/{prefix}qmodel.pth {ENGINE} {flags}
  --teacher {FLOAT} --epochs 1 --num_train_batches 60 --lr 3e-3 {CUTOUT} --freeze_batch_norms 0
  --freeze_ranges 0 {UNMEASURED} --output {folder}/mobilenetv2_qat.pt --record {folder}/qat.json"""


def family(prefix: str, source: str, seeds: Sequence[int], bits: int | None = None) -> str:
    """Return the steps that quantize a float model with each seed, and pack it, at last with fewer bits."""
    steps = [evaluate(prefix.rstrip("_") or "float", source), ptq(prefix, source, seeds)]
    for seed in seeds:
        steps.append(qat(prefix, f"s{seed}", f"--seed {seed}"))
        steps += [evaluate(f"{prefix}{kind}_s{seed}", int8_file(prefix, kind, seed)) for kind in KINDS]
    steps.append(pack(f"packed_{prefix}float16", f"{source} --dtype float16"))
    if bits:
        steps += [pack(f"packed_{prefix}int8", int8_file(prefix, "qat"))] if seeds else []
        steps.append(qat(prefix, "few_bits", f"--weight_bits {bits}"))
        few_bits = f"runs/int8/{prefix}few_bits/mobilenetv2_qat.pt"
        steps.append(pack(f"packed_{prefix}int8_{bits}_bits", few_bits))
    return lines(steps)


def allocation(target: str, method: str) -> str:
    """Return the steps that share a density out by a method, and prune by that."""
    log = "runs/allocation/scanning_log.csv"
    special = {"global": "--spare classifier", "sensitivity": f"--scanning_log {log}"}.get(method, "")
    path = f"runs/allocation/{method}_{target}"
    return f"""0.2 scripts/allocate_sparsity.py --weights {OS16} --target 0.{target} --method {method}
  {special} --o {path}.csv
2 prune.py DATA AMP --weights {OS16} --sparsity_dict {path}.csv --optimizer muon --lr 0.05 --muon_lr 0.0125
  --epochs 1 --label_smoothing 0.1 --output {path}.pth --record results/allocation/{method}_{target}.json"""


TEACH = f"{TRIVIALAUGMENT} {SHARP} AMP"
RECOVER = f"--teacher {int8_file('')} --schedule gradual --optimizer muon"
COMMANDS = f"""
# The published recipe, and ours: coarse output strides first, since they are cheap.
40 train.py DATA --optimizer adam --lr 1e-4 --scheduler none --weight_decay 0 --augment none --batch_size 32
  --epochs 24 --output_stride 32 --output {PUBLISHED} --record results/published_recipe.json
{evaluate("published_float", PUBLISHED)}
60 train.py DATA {MUON_STEPS} --early_output_strides 32:10 --output_stride 16 {SHARP} --compile
  --output {OS16} --record results/float_os16.json
75 train.py DATA --weights {OS16} {MUON_STEPS} --early_output_strides 16:8 --output_stride 8 {SHARP} AMP
  --output runs/float_os8/mobilenetv2.pth --record results/float_os8.json
60 train.py DATA --weights runs/float_os8/mobilenetv2.pth --optimizer muon --lr 0.15 --muon_lr 0.04 {COSINE}
  --epochs 34 --output_stride 8 {CUTOUT} --label_smoothing 0.1 AMP
  --output runs/float_os8_cutout/mobilenetv2.pth --record results/float_os8_cutout.json

# Output stride 16 taught by the int8 form of 8, which answers fast; then 8, taught by both and by itself.
{ptq("cutout_", "runs/float_os8_cutout/mobilenetv2.pth")}
90 train.py DATA --weights runs/float_os8_cutout/mobilenetv2.pth --teacher {int8_file("cutout_")}
  --optimizer muon --lr 0.05 --muon_lr 0.0125 {COSINE} --epochs 58 --output_stride 16 {TEACH}
  --output runs/float_os16_cutout/mobilenetv2.pth --record results/float_os16_cutout.json
40 train.py DATA --weights runs/float_os16_cutout/mobilenetv2.pth --teacher {int8_file("cutout_")}
  --optimizer muon --lr 0.02 --muon_lr 0.005 {COSINE} --epochs 24 --output_stride 16 {TEACH}
  --output {OS16_LONGER} --record results/float_os16_longer.json
{evaluate("float_os16", OS16_LONGER)}
0.2 scripts/pack_weights.py --weights {OS16_LONGER} --dtype float16 --o {OS16_PACKED}
{evaluate("packed_float16_at_output_stride_16", OS16_PACKED)}
{ptq("os16_", OS16_LONGER)}
135 train.py DATA --weights {OS16_LONGER} --teacher {int8_file("cutout_")} {int8_file("os16_")}
  --distill_weight 0.7 --optimizer muon --lr 0.04 --muon_lr 0.01 {COSINE} --epochs 40
  --output_stride 8 {TEACH} --output runs/float_os8_taught/mobilenetv2.pth
  --record results/float_os8_taught.json
{ptq("taught_", "runs/float_os8_taught/mobilenetv2.pth")}
135 train.py DATA --weights runs/float_os8_taught/mobilenetv2.pth --teacher {int8_file("taught_")}
  --distill_weight 0.5 --optimizer muon --lr 0.03 --muon_lr 0.0075 {COSINE} --epochs 42
  --output_stride 8 {TEACH} --output {FLOAT} --record results/float.json
{family("", FLOAT, seeds=(0, 1, 2))}

# What each layer can bear; then for each density the share of each layer, and the training.
10 scripts/sensitivity_scan.py DATA --weights {FLOAT} --split val --accuracy_threshold 90
  --sparsities 0.1 0.3 0.6 --o results/scanning_log.csv --record results/scan.json
0.2 scripts/allocate_sparsity.py --weights {FLOAT} --target 0.271 --o results/sparsity_dict_271.csv
36 prune.py DATA AMP --weights {FLOAT} --sparsity_dict results/sparsity_dict_271.csv {RECOVER}
  --lr 0.05 --muon_lr 0.0125 {TRIVIALAUGMENT} --ramp_epochs 1 --epochs 9
  --output runs/pruned_271_shorter/mobilenetv2.pth --record results/prune_271_shorter.json
24 prune.py DATA AMP --weights runs/pruned_271_shorter/mobilenetv2.pth
  --sparsity_dict results/sparsity_dict_271.csv {RECOVER} --lr 0.03 --muon_lr 0.0075 {TRIVIALAUGMENT}
  --ramp_epochs 1 --epochs 6 --output {SPARSE_271} --record results/prune_271.json
{family("pruned_271_", SPARSE_271, seeds=(0, 1, 2), bits=6)}
0.2 scripts/allocate_sparsity.py --weights {SPARSE_271} --target 0.170 --o results/sparsity_dict_170.csv
12 prune.py DATA AMP --weights {SPARSE_271} --sparsity_dict results/sparsity_dict_170.csv {RECOVER}
  --lr 0.03 --muon_lr 0.0075 {TRIVIALAUGMENT} --ramp_epochs 1 --epochs 3
  --output {SPARSE_170} --record results/prune_170.json
{family("pruned_170_", SPARSE_170, seeds=(), bits=5)}
0.2 scripts/allocate_sparsity.py --weights {FLOAT} --target 0.100 --o results/sparsity_dict_100.csv
20 prune.py DATA AMP --weights {FLOAT} --sparsity_dict results/sparsity_dict_100.csv {RECOVER}
  --lr 0.05 --muon_lr 0.0125 {CUTOUT} --ramp_epochs 4 --epochs 10 --output_stride 16
  --output runs/pruned_100_os16/mobilenetv2.pth --record results/prune_100_os16.json
52 prune.py DATA AMP --weights runs/pruned_100_os16/mobilenetv2.pth
  --sparsity_dict results/sparsity_dict_100.csv {RECOVER} --lr 0.05 --muon_lr 0.0125 {CUTOUT}
  --ramp_epochs 1 --epochs 13 --output_stride 8 --output {SPARSE_100} --record results/prune_100.json
{family("pruned_100_", SPARSE_100, seeds=(0,), bits=5)}

# Their times, in the same rounds; seeds and packing change none.
3 scripts/benchmarks.py --threads 1 --model_file {PUBLISHED} {OS16_LONGER} {FLOAT} {SPARSE_271} {SPARSE_170}
  {SPARSE_100} {lines(int8_file(name, kind) for name in ("", "pruned_271_", "pruned_100_") for kind in KINDS)}
  --record results/latency.json

# The methods of sharing out a density, compared at output stride 16 after an epoch of recovery.
8 scripts/sensitivity_scan.py DATA --weights {OS16} --split val --accuracy_threshold 85 --sparsities 0.05
  0.1 0.3 0.6 --o runs/allocation/scanning_log.csv --record runs/allocation/scanning_log.json
{lines(allocation(target, method) for target in ("100", "271", "150") for method in METHODS)}

# The claims about speed; see benchmarks/README.md.
6 benchmarks/training.py --rounds 5 --record results/benchmarks/training.json
5 benchmarks/sensitivity_scan.py DATA --weights {OS16} --images 2000
  --record results/benchmarks/sensitivity_scan.json
5 benchmarks/runtimes.py DATA --weights {FLOAT} --rounds 15 --output_stride 8
  --record results/benchmarks/runtimes_os8.json
3 benchmarks/runtimes.py DATA --weights {FLOAT} --rounds 15 --output_stride 32
  --record results/benchmarks/runtimes_os32.json
"""
"""Each step from the start of a line: minutes on 2 CPU cores, script, flags. DATA stands for --dataset,
--data_dir and the like, AMP for --amp where it is fast."""


class Step(NamedTuple):
    """A command of the list: script and flags, without --force."""

    minutes: float
    command: list[str]

    def files(self, *flags: str) -> list[Path]:
        """Return what those of the flags that the command has name."""
        return [Path(value) for flag, value in pairwise(self.command) if flag in flags]

    def arguments(self) -> list[str]:
        """Return script and flags; a training that was interrupted is resumed, whatever an older one left."""
        is_interrupted = any(checkpoint_path(path).is_file() for path in self.files("--output"))
        return [*self.command, "--force", *(["--resume"] if is_interrupted else [])]

    def is_done(self) -> bool:
        """Return whether all that it writes is there, and was written by this command."""
        records = self.files("--record")
        if not all(path.exists() for path in [*records, *self.files("--output", "--o", "--output_dir")]):
            return False
        try:
            command = json.loads(records[0].read_text())["command"]
        except (OSError, ValueError, LookupError):
            return False
        return FREE_FLAGS.sub("", command) == FREE_FLAGS.sub("", " ".join(["python", *self.command]))


def steps(data: list[str]) -> list[Step]:
    """Return the steps, with these flags for the scripts that need images."""
    stands_for = {"DATA": data, "AMP": ["--amp"] if is_fast_in_bfloat16() else []}
    found = []
    for step in re.split(r"\n(?=[\d.]+ )", COMMANDS)[1:]:
        minutes, *words = shlex.split(step, comments=True)
        found.append(Step(float(minutes), [part for word in words for part in stands_for.get(word, [word])]))
    return found


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--list", action="store_true", help="print the commands and their times, run nothing")
    cli.add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet."""
    to_do = steps(data_flags(args))
    anew = False
    for number, step in enumerate(to_do, 1):
        heading = f"[{number}/{len(to_do)}] about {step.minutes:g} minute{'s' * (step.minutes != 1)}"
        if args.list:
            print(f"{heading}\n  {command_line(*step.arguments())}")
        elif not anew and step.is_done():
            print(f"{heading}: done before: {command_line(*step.command)}")
        else:
            run_script(heading, *step.arguments())
            # What follows was made from other files, except where nothing was measured.
            anew = anew or "--record" in step.command


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
