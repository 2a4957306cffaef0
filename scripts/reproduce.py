"""Run every command behind the results tables, in order, from nothing.

A step whose files are there, and whose record was written by the same command, is skipped, so that an
interrupted run goes on where it stopped; an interrupted training goes on from its checkpoint.
"""

import argparse
import json
import re
import shlex
import sys
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
FLOAT, OS16 = "weights/mobilenetv2_cifar10.pth", "runs/float_os16/mobilenetv2.pth"
OS16_LONGER = "runs/float_os16_longer/mobilenetv2.pth"
OS16_PACKED = "weights/mobilenetv2_cifar10_os16.npz"
PTQ = "mobilenetv2_ptq_per_channel.pt"
CUTOUT = "--augment crop_flip_cutout --cutout_size 12"
TRIVIALAUGMENT = "--augment crop_flip_trivialaugment_cutout --cutout_size 8"
COSINE = "--scheduler cosine --weight_decay 1e-3"
SHARP = "--dropout 0 --label_smoothing 0.1"
TEACH = f"{TRIVIALAUGMENT} {SHARP} AMP"
MUON_STEPS = "--optimizer muon --lr 0.2 --muon_lr 0.05 --epochs 30"
RECOVER = f"--teacher runs/int8/s0/{PTQ} --schedule gradual --optimizer muon"
# The fastest engine at output stride 8; accuracies and latencies are measured by steps of their own.
INT8 = "--backend onednn --num_eval_batches 1 --latency_rounds 1"
QAT = f"""{INT8} --teacher {FLOAT} --epochs 1 --num_train_batches 60 --lr 3e-3 {CUTOUT}
  --freeze_batch_norms 0 --freeze_ranges 0"""
FORMS = ("ptq_per_tensor", "ptq_per_channel", "qat")
TIMED = ("", "pruned_271_", "pruned_100_")
FILES = {
    "SPARSE_271": "weights/mobilenetv2_cifar10_pruned.pth",
    "SPARSE_170": "runs/pruned_170/mobilenetv2.pth",  # as dense as fits into 0.37 MB
    "SPARSE_100": "runs/pruned_100/mobilenetv2.pth",
}
LOOPS = {
    "SEED": ("0", "1", "2"),
    "FORM": FORMS,
    "DENSITY": ("271", "170", "100"),
    "SPARSER": ("170", "100"),
    "QUANTIZED": ("271", "100"),
    "PACKED": (
        *("float16", "pruned_271_float16", "pruned_271_int8", "pruned_271_int8_6_bits", "pruned_170_float16"),
        *("pruned_170_int8_5_bits", "pruned_100_float16", "pruned_100_int8", "pruned_100_int8_5_bits"),
    ),
    "TARGET": ("271", "150", "100"),
    "PLAIN": ("uniform", "erk", "lamp"),
    "METHOD": METHODS,
}
"""A step that names one of these stands for as many steps."""
COMMANDS = f"""
# The published recipe, and ours: coarse output strides first, since they are cheap.
40 train.py DATA --optimizer adam --lr 1e-4 --scheduler none --weight_decay 0 --augment none --batch_size 32
  --epochs 24 --output_stride 32 --output runs/published/mobilenetv2.pth
  --record results/published_recipe.json
0.5 evaluate.py DATA --weights runs/published/mobilenetv2.pth --record results/evaluate/published_float.json
60 train.py DATA {MUON_STEPS} --early_output_strides 32:10 --output_stride 16 {SHARP} --compile
  --output {OS16} --record results/float_os16.json
75 train.py DATA --weights {OS16} {MUON_STEPS} --early_output_strides 16:8 --output_stride 8 {SHARP} AMP
  --output runs/float_os8/mobilenetv2.pth --record results/float_os8.json
60 train.py DATA --weights runs/float_os8/mobilenetv2.pth --optimizer muon --lr 0.15 --muon_lr 0.04 {COSINE}
  --epochs 34 --output_stride 8 {CUTOUT} --label_smoothing 0.1 AMP
  --output runs/float_os8_cutout/mobilenetv2.pth --record results/float_os8_cutout.json

# Output stride 16 taught by the int8 form of 8, which answers fast; then 8, taught by both and by itself.
1 post_training_quantization.py DATA --weights runs/float_os8_cutout/mobilenetv2.pth {INT8} --seed 0
  --output_dir runs/int8/cutout_s0 --record runs/int8/cutout_s0/ptq.json
90 train.py DATA --weights runs/float_os8_cutout/mobilenetv2.pth --teacher runs/int8/cutout_s0/{PTQ}
  --optimizer muon --lr 0.05 --muon_lr 0.0125 {COSINE} --epochs 58 --output_stride 16 {TEACH}
  --output runs/float_os16_cutout/mobilenetv2.pth --record results/float_os16_cutout.json
40 train.py DATA --weights runs/float_os16_cutout/mobilenetv2.pth --teacher runs/int8/cutout_s0/{PTQ}
  --optimizer muon --lr 0.02 --muon_lr 0.005 {COSINE} --epochs 24 --output_stride 16 {TEACH}
  --output {OS16_LONGER} --record results/float_os16_longer.json
0.5 evaluate.py DATA --weights {OS16_LONGER} --record results/evaluate/float_os16.json
0.2 scripts/pack_weights.py --weights {OS16_LONGER} --dtype float16 --o {OS16_PACKED}
0.5 evaluate.py DATA --weights {OS16_PACKED} --record results/evaluate/packed_float16_at_output_stride_16.json
1 post_training_quantization.py DATA --weights {OS16_LONGER} {INT8} --seed 0
  --output_dir runs/int8/os16_s0 --record runs/int8/os16_s0/ptq.json
135 train.py DATA --weights {OS16_LONGER} --teacher runs/int8/cutout_s0/{PTQ} runs/int8/os16_s0/{PTQ}
  --distill_weight 0.7 --optimizer muon --lr 0.04 --muon_lr 0.01 {COSINE} --epochs 40
  --output_stride 8 {TEACH} --output runs/float_os8_taught/mobilenetv2.pth
  --record results/float_os8_taught.json
1 post_training_quantization.py DATA --weights runs/float_os8_taught/mobilenetv2.pth {INT8} --seed 0
  --output_dir runs/int8/taught_s0 --record runs/int8/taught_s0/ptq.json
135 train.py DATA --weights runs/float_os8_taught/mobilenetv2.pth --teacher runs/int8/taught_s0/{PTQ}
  --distill_weight 0.5 --optimizer muon --lr 0.03 --muon_lr 0.0075 {COSINE} --epochs 42
  --output_stride 8 {TEACH} --output {FLOAT} --record results/float.json
0.5 evaluate.py DATA --weights {FLOAT} --record results/evaluate/float.json
1 post_training_quantization.py DATA --weights {FLOAT} {INT8} --seed SEED
  --output_dir runs/int8/sSEED --record runs/int8/sSEED/ptq.json
5 quantization_aware_training.py DATA --weights {FLOAT} --seed SEED {QAT}
  --output runs/int8/sSEED/mobilenetv2_qat.pt --record runs/int8/sSEED/qat.json
0.5 evaluate.py DATA --weights runs/int8/sSEED/mobilenetv2_FORM.pt
  --record results/evaluate/FORM_sSEED.json
0.2 scripts/pack_weights.py --weights {FLOAT} --dtype float16 --o runs/packed/packed_float16.npz

# What each layer can bear; then for each density the share of each layer, and the training.
10 scripts/sensitivity_scan.py DATA --weights {FLOAT} --split val --accuracy_threshold 90
  --sparsities 0.1 0.3 0.6 --o results/scanning_log.csv --record results/scan.json
0.2 scripts/allocate_sparsity.py --weights {FLOAT} --target 0.271 --o results/sparsity_dict_271.csv
36 prune.py DATA AMP --weights {FLOAT} --sparsity_dict results/sparsity_dict_271.csv {RECOVER}
  --lr 0.05 --muon_lr 0.0125 {TRIVIALAUGMENT} --ramp_epochs 1 --epochs 9
  --output runs/pruned_271_shorter/mobilenetv2.pth --record results/prune_271_shorter.json
24 prune.py DATA AMP --weights runs/pruned_271_shorter/mobilenetv2.pth
  --sparsity_dict results/sparsity_dict_271.csv {RECOVER} --lr 0.03 --muon_lr 0.0075 {TRIVIALAUGMENT}
  --ramp_epochs 1 --epochs 6 --output SPARSE_271 --record results/prune_271.json
0.2 scripts/allocate_sparsity.py --weights SPARSE_271 --target 0.170 --o results/sparsity_dict_170.csv
12 prune.py DATA AMP --weights SPARSE_271 --sparsity_dict results/sparsity_dict_170.csv {RECOVER}
  --lr 0.03 --muon_lr 0.0075 {TRIVIALAUGMENT} --ramp_epochs 1 --epochs 3
  --output SPARSE_170 --record results/prune_170.json
0.2 scripts/allocate_sparsity.py --weights {FLOAT} --target 0.100 --o results/sparsity_dict_100.csv
20 prune.py DATA AMP --weights {FLOAT} --sparsity_dict results/sparsity_dict_100.csv {RECOVER}
  --lr 0.05 --muon_lr 0.0125 {CUTOUT} --ramp_epochs 4 --epochs 10 --output_stride 16
  --output runs/pruned_100_os16/mobilenetv2.pth --record results/prune_100_os16.json
52 prune.py DATA AMP --weights runs/pruned_100_os16/mobilenetv2.pth
  --sparsity_dict results/sparsity_dict_100.csv {RECOVER} --lr 0.05 --muon_lr 0.0125 {CUTOUT}
  --ramp_epochs 1 --epochs 13 --output_stride 8 --output SPARSE_100 --record results/prune_100.json

# The pruned models in int8, and packed.
0.5 evaluate.py DATA --weights SPARSE_DENSITY --record results/evaluate/pruned_DENSITY.json
1 post_training_quantization.py DATA --weights SPARSE_271 {INT8} --seed SEED
  --output_dir runs/int8/pruned_271_sSEED --record runs/int8/pruned_271_sSEED/ptq.json
5 quantization_aware_training.py DATA --weights SPARSE_271 --seed SEED {QAT}
  --output runs/int8/pruned_271_sSEED/mobilenetv2_qat.pt --record runs/int8/pruned_271_sSEED/qat.json
0.5 evaluate.py DATA --weights runs/int8/pruned_271_sSEED/mobilenetv2_FORM.pt
  --record results/evaluate/pruned_271_FORM_sSEED.json
1 post_training_quantization.py DATA --weights SPARSE_100 {INT8} --seed 0
  --output_dir runs/int8/pruned_100_s0 --record runs/int8/pruned_100_s0/ptq.json
5 quantization_aware_training.py DATA --weights SPARSE_100 --seed 0 {QAT}
  --output runs/int8/pruned_100_s0/mobilenetv2_qat.pt --record runs/int8/pruned_100_s0/qat.json
0.5 evaluate.py DATA --weights runs/int8/pruned_100_s0/mobilenetv2_FORM.pt
  --record results/evaluate/pruned_100_FORM_s0.json
0.2 scripts/pack_weights.py --weights SPARSE_DENSITY --dtype float16
  --o runs/packed/packed_pruned_DENSITY_float16.npz
0.2 scripts/pack_weights.py --weights runs/int8/pruned_QUANTIZED_s0/mobilenetv2_qat.pt
  --o runs/packed/packed_pruned_QUANTIZED_int8.npz
5 quantization_aware_training.py DATA --weights SPARSE_271 --weight_bits 6 {QAT}
  --output runs/int8/pruned_271_few_bits/mobilenetv2_qat.pt --record runs/int8/pruned_271_few_bits/qat.json
0.2 scripts/pack_weights.py --weights runs/int8/pruned_271_few_bits/mobilenetv2_qat.pt
  --o runs/packed/packed_pruned_271_int8_6_bits.npz
5 quantization_aware_training.py DATA --weights SPARSE_SPARSER --weight_bits 5 {QAT}
  --output runs/int8/pruned_SPARSER_few_bits/mobilenetv2_qat.pt
  --record runs/int8/pruned_SPARSER_few_bits/qat.json
0.2 scripts/pack_weights.py --weights runs/int8/pruned_SPARSER_few_bits/mobilenetv2_qat.pt
  --o runs/packed/packed_pruned_SPARSER_int8_5_bits.npz
0.5 evaluate.py DATA --weights runs/packed/packed_PACKED.npz
  --record results/evaluate/packed_PACKED.json

# Their times, in the same rounds; seeds and packing change none.
3 scripts/benchmarks.py --threads 1 --model_file runs/published/mobilenetv2.pth {OS16_LONGER} {FLOAT}
  SPARSE_271 SPARSE_170 SPARSE_100
  {" ".join(f"runs/int8/{model}s0/mobilenetv2_{form}.pt" for model in TIMED for form in FORMS)}
  --record results/latency.json

# The methods of sharing out a density, compared at output stride 16 after an epoch of recovery.
8 scripts/sensitivity_scan.py DATA --weights {OS16} --split val --accuracy_threshold 85 --sparsities 0.05
  0.1 0.3 0.6 --o runs/allocation/scanning_log.csv --record runs/allocation/scanning_log.json
0.2 scripts/allocate_sparsity.py --weights {OS16} --target 0.TARGET --method PLAIN
  --o runs/allocation/PLAIN_TARGET.csv
0.2 scripts/allocate_sparsity.py --weights {OS16} --target 0.TARGET --method global
  --spare classifier --o runs/allocation/global_TARGET.csv
0.2 scripts/allocate_sparsity.py --weights {OS16} --target 0.TARGET --method sensitivity
  --scanning_log runs/allocation/scanning_log.csv --o runs/allocation/sensitivity_TARGET.csv
2 prune.py DATA AMP --weights {OS16} --sparsity_dict runs/allocation/METHOD_TARGET.csv
  --optimizer muon --lr 0.05 --muon_lr 0.0125 --epochs 1 --label_smoothing 0.1
  --output runs/allocation/METHOD_TARGET.pth --record results/allocation/METHOD_TARGET.json

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
--data_dir and the like, AMP for --amp where it is fast; others are in FILES and LOOPS."""


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
        if not all(path.exists() for path in self.files("--output", "--o", "--output_dir")):
            return False
        try:
            command = json.loads(self.files("--record")[0].read_text())["command"]
        except (OSError, ValueError, LookupError):
            return False
        return FREE_FLAGS.sub("", command) == FREE_FLAGS.sub("", " ".join(["python", *self.command]))


def steps(data: list[str]) -> list[Step]:
    """Return the steps, with these flags for the scripts that need images."""
    stands_for = {"DATA": data, "AMP": ["--amp"] if is_fast_in_bfloat16() else []}
    stands_for |= {name: [file] for name, file in FILES.items()}
    found = []
    for step in re.split(r"\n(?=[\d.]+ )", COMMANDS)[1:]:
        texts = [step]
        for name, values in LOOPS.items():
            if name in step:
                texts = [text.replace(name, value) for text in texts for value in values]
        for minutes, *words in (shlex.split(text, comments=True) for text in texts):
            parts = [part for word in words for part in stands_for.get(word, [word])]
            found.append(Step(float(minutes), parts))
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
