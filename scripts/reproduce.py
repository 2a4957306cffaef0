"""Run every command behind the README's results table, in order, from nothing.

A step whose files are there, and whose record under results/ was written by the same command, is
skipped, so that an interrupted run goes on where it stopped; a training goes on from its checkpoint.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.common import cli, errors
from utils.common.steps import command_line, run_script
from utils.pruning.allocation import METHODS
from utils.training.checkpoint import checkpoint_path
from utils.training.precision import is_fast_in_bfloat16

FREE_FLAGS = re.compile(r" --(force|resume|threads \d+)\b")
"""What a number does not depend on."""

RUNS = Path("runs")
RESULTS = Path("results")
WEIGHTS = Path("weights")

PUBLISHED = RUNS / "published/mobilenetv2.pth"
FLOAT_OS16 = RUNS / "float_os16/mobilenetv2.pth"
FLOAT_OS8 = RUNS / "float_os8/mobilenetv2.pth"
FLOAT_OS8_CUTOUT = RUNS / "float_os8_cutout/mobilenetv2.pth"
FLOAT_OS16_CUTOUT = RUNS / "float_os16_cutout/mobilenetv2.pth"
FLOAT_OS16_LONGER = RUNS / "float_os16_longer/mobilenetv2.pth"
FLOAT_OS8_TAUGHT = RUNS / "float_os8_taught/mobilenetv2.pth"
FLOAT = WEIGHTS / "mobilenetv2_cifar10.pth"
SHIPPED_PACKED = {"packed_float16_at_output_stride_16": WEIGHTS / "mobilenetv2_cifar10_os16.npz"}
"""By name: the packed file that comes with the repository."""
SCANNING_LOG = RESULTS / "scanning_log.csv"
SEEDS = {"": (0, 1, 2), "pruned_271_": (0, 1, 2), "pruned_100_": (0,)}
"""Of the int8 models, by the prefix of their names; the float model has none."""
INT8_KINDS = ("ptq_per_tensor", "ptq_per_channel", "qat")
CUTOUT = ("--augment", "crop_flip_cutout", "--cutout_size", 12)
QAT_RECIPE = (
    "--epochs", 1, "--num_train_batches", 60, "--lr", "3e-3", *CUTOUT,
    "--freeze_batch_norms", 0, "--freeze_ranges", 0,
)  # fmt: skip
UNMEASURED = ("--num_eval_batches", 1, "--latency_rounds", 1)
"""Accuracies and times of int8 models are measured after all of them are made."""
TRIVIALAUGMENT = ("--augment", "crop_flip_trivialaugment_cutout", "--cutout_size", 8)
ENGINE = "onednn"
"""The fastest one at output stride 8."""
SCAN_THRESHOLD_PCT = 90
"""Of val accuracy, below which the scan does not recommend to go."""


@dataclass(frozen=True)
class Pruning:
    """How a pruned model is made.

    Args:
        source: the weights that are pruned further.
        output: the pruned ones.
        ramp_epochs: over which they are pruned.
        epochs: in all.
        lr: and muon_lr, the highest rates.
        augment: the flags of what varies the images.
        few_bits: of a weight in the smallest file.
        output_stride: if it is not the source's.
        before: what made the source, if that is pruned to the same density already.
    """

    source: Path
    output: Path
    ramp_epochs: int
    epochs: int
    lr: str = "0.05"
    muon_lr: str = "0.0125"
    augment: tuple[object, ...] = TRIVIALAUGMENT
    few_bits: int = 5
    output_stride: int | None = None
    before: "Pruning | None" = None


PRUNED = WEIGHTS / "mobilenetv2_cifar10_pruned.pth"
PRUNED_271_SHORTER = RUNS / "pruned_271_shorter/mobilenetv2.pth"
PRUNED_100_OS16 = RUNS / "pruned_100_os16/mobilenetv2.pth"
PRUNINGS = {
    "271": Pruning(
        PRUNED_271_SHORTER, PRUNED, 1, 6, "0.03", "0.0075", few_bits=6,
        before=Pruning(FLOAT, PRUNED_271_SHORTER, 1, 9),
    ),
    "170": Pruning(PRUNED, RUNS / "pruned_170/mobilenetv2.pth", 1, 3, "0.03", "0.0075"),
    "100": Pruning(
        PRUNED_100_OS16, RUNS / "pruned_100/mobilenetv2.pth", 1, 13, augment=CUTOUT, output_stride=8,
        before=Pruning(FLOAT, PRUNED_100_OS16, 4, 10, augment=CUTOUT, output_stride=16),
    ),
}  # fmt: skip
"""By density in thousandths. 17 % is as dense as fits into 0.37 MB."""


@dataclass(frozen=True)
class Step:
    """A command and what it leaves.

    Args:
        title: what it is for.
        minutes: that it takes on 2 cores, about.
        script: of this repository.
        argv: its arguments, without --force and --record.
        output: the file that later steps need.
        record: under results/, with the numbers; None for what has none.
    """

    title: str
    minutes: float
    script: str
    argv: tuple[object, ...]
    output: Path
    record: Path | None = None

    def arguments(self) -> list[str]:
        """All arguments; a training that was interrupted is resumed, whatever record an older one left."""
        argv = [*self.argv, *(["--record", self.record] if self.record else [])]
        is_interrupted = self.script in TRAINING and checkpoint_path(self.output).is_file()
        return [*map(str, argv), "--force", *(["--resume"] if is_interrupted else [])]

    def is_done(self) -> bool:
        """Whether the output is there and was made by this command."""
        if not self.output.exists() or self.record is None:
            return False
        try:
            command = json.loads(self.record.read_text())["command"]
        except (OSError, ValueError, KeyError):
            return False
        own = command_line(self.script, *self.argv, "--record", self.record)
        return FREE_FLAGS.sub("", command) == FREE_FLAGS.sub("", own)


TRAINING = ("train.py", "prune.py", "quantization_aware_training.py")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--list", action="store_true", help="print the commands and their times, run nothing")
    cli.add_data_arguments(parser)
    return parser


def steps(data: list[str]) -> list[Step]:
    """The commands of the results table.

    Args:
        data: --dataset, --data_dir and the like, for the scripts that need images.
    """
    amp = ["--amp"] if is_fast_in_bfloat16() else []
    return [
        *float_steps(data, amp),
        *taught_steps(data, amp),
        *int8_steps(data, "", FLOAT),
        *pruning_steps(data, amp),
        *pruned_int8_steps(data),
        *packing_steps(),
        *measuring_steps(data),
        *allocation_steps(data, amp),
        *benchmark_steps(data),
    ]


def float_steps(data: list[str], amp: list[str]) -> Iterator[Step]:
    """The published recipe, and ours: coarse output strides first, since they are cheap."""
    yield Step(
        "the published recipe", 40, "train.py",
        (*data, "--optimizer", "adam", "--lr", "1e-4", "--scheduler", "none", "--weight_decay", 0,
         "--augment", "none", "--batch_size", 32, "--epochs", 24, "--output_stride", 32,
         "--output", PUBLISHED),
        PUBLISHED, RESULTS / "published_recipe.json",
    )  # fmt: skip
    muon = ("--optimizer", "muon", "--lr", "0.2", "--muon_lr", "0.05", "--epochs", 30)
    sharp = ("--dropout", 0, "--label_smoothing", "0.1")
    yield Step(
        "the float model at output strides 32 and then 16", 60, "train.py",
        (*data, *muon, "--early_output_strides", "32:10", "--output_stride", 16, *sharp, "--compile",
         "--output", FLOAT_OS16),
        FLOAT_OS16, RESULTS / "float_os16.json",
    )  # fmt: skip
    yield Step(
        "the same weights at output stride 8", 75, "train.py",
        (*data, "--weights", FLOAT_OS16, *muon, "--early_output_strides", "16:8", "--output_stride", 8,
         *sharp, *amp, "--output", FLOAT_OS8),
        FLOAT_OS8, RESULTS / "float_os8.json",
    )  # fmt: skip

    yield Step(
        "the same weights with cutout and more weight decay", 60, "train.py",
        (*data, "--weights", FLOAT_OS8, "--optimizer", "muon", "--lr", "0.15", "--muon_lr", "0.04",
         "--scheduler", "cosine", "--weight_decay", "1e-3", "--epochs", 34, "--output_stride", 8,
         *CUTOUT, "--label_smoothing", "0.1", *amp, "--output", FLOAT_OS8_CUTOUT),
        FLOAT_OS8_CUTOUT, RESULTS / "float_os8_cutout.json",
    )  # fmt: skip


def pruning_steps(data: list[str], amp: list[str]) -> Iterator[Step]:
    """The sensitivity scan, and for each density the share of each layer and the training."""
    yield Step(
        "prune each layer alone and see what it costs", 10, "scripts/sensitivity_scan.py",
        (*data, "--weights", FLOAT, "--split", "val", "--accuracy_threshold", SCAN_THRESHOLD_PCT,
         "--sparsities", "0.1", "0.3", "0.6", "--o", SCANNING_LOG),
        SCANNING_LOG, RESULTS / "scan.json",
    )  # fmt: skip
    for name, pruning in PRUNINGS.items():
        sparsity_dict = RESULTS / f"sparsity_dict_{name}.csv"
        source = (pruning.before or pruning).source
        yield Step(
            f"share a density of {int(name) / 10:.1f} % out among the layers", 0.2,
            "scripts/allocate_sparsity.py",
            ("--weights", source, "--target", f"0.{name}", "--o", sparsity_dict), sparsity_dict,
        )  # fmt: skip
        if pruning.before:
            record = pruning.before.output.parent.name.replace("pruned", "prune")
            yield recovery_step(data, amp, sparsity_dict, pruning.before, RESULTS / f"{record}.json")
        yield recovery_step(data, amp, sparsity_dict, pruning, RESULTS / f"prune_{name}.json")


def recovery_step(
    data: list[str], amp: list[str], sparsity_dict: Path, pruning: Pruning, record: Path
) -> Step:
    """The pruning to a density, and the training in it."""
    stride = ("--output_stride", pruning.output_stride) if pruning.output_stride else ()
    return Step(
        "prune and recover", (2 if pruning.output_stride == 16 else 4) * pruning.epochs, "prune.py",
        (*data, *amp, "--weights", pruning.source, "--sparsity_dict", sparsity_dict,
         "--teacher", teacher(""), "--schedule", "gradual", "--optimizer", "muon",
         "--lr", pruning.lr, "--muon_lr", pruning.muon_lr, *pruning.augment,
         "--ramp_epochs", pruning.ramp_epochs, "--epochs", pruning.epochs, *stride,
         "--output", pruning.output),
        pruning.output, record,
    )  # fmt: skip


def int8_folder(prefix: str, seed: int) -> Path:
    """Where the int8 files that were made with a seed are."""
    return RUNS / f"int8/{prefix}s{seed}"


def qmodel_file(prefix: str) -> Path:
    """What is quantized, by the prefix of the names of the int8 models."""
    return RUNS / f"int8/{prefix}qmodel.pth"


def few_bits_file(name: str) -> Path:
    """The int8 model of a density whose weights have fewer bits."""
    return RUNS / f"int8/pruned_{name}_few_bits/mobilenetv2_qat.pt"


def int8_steps(data: list[str], prefix: str, source: Path) -> Iterator[Step]:
    """PTQ and QAT of a model with each of its seeds."""
    yield conversion_step(prefix, source)
    for seed in SEEDS.get(prefix, ()):
        yield ptq_step(data, prefix, seed)
        folder = int8_folder(prefix, seed)
        yield Step(
            f"quantize while training, seed {seed}", 5, "quantization_aware_training.py",
            (*data, *quantized(prefix, seed), "--teacher", FLOAT, *QAT_RECIPE, *UNMEASURED,
             "--output", folder / "mobilenetv2_qat.pt"),
            folder / "mobilenetv2_qat.pt", folder / "qat.json",
        )  # fmt: skip


def conversion_step(prefix: str, source: Path) -> Step:
    """The weights of what is quantized."""
    qmodel = qmodel_file(prefix)
    return Step("convert for quantization", 0.1, "scripts/to_qmodel_weights.py",
                ("--weights", source, "--output", qmodel), qmodel)  # fmt: skip


def ptq_step(data: list[str], prefix: str, seed: int) -> Step:
    """PTQ of a model with a seed."""
    folder = int8_folder(prefix, seed)
    return Step(
        f"quantize after training, seed {seed}", 1, "post_training_quantization.py",
        (*data, *quantized(prefix, seed), *UNMEASURED, "--output_dir", folder),
        folder, folder / "ptq.json",
    )  # fmt: skip


def quantized(prefix: str, seed: int) -> tuple[object, ...]:
    """The flags that PTQ and QAT share."""
    return "--weights", qmodel_file(prefix), "--backend", ENGINE, "--seed", seed


def pruned_int8_steps(data: list[str]) -> Iterator[Step]:
    """The same of each pruned model, and one with fewer bits, for a small file."""
    for name, pruning in PRUNINGS.items():
        prefix = f"pruned_{name}_"
        yield from int8_steps(data, prefix, pruning.output)
        output = few_bits_file(name)
        yield Step(
            f"quantize to weights of {pruning.few_bits} bits while training", 5,
            "quantization_aware_training.py",
            (*data, "--weights", qmodel_file(prefix), "--backend", ENGINE,
             "--weight_bits", pruning.few_bits, "--teacher", FLOAT, *QAT_RECIPE, *UNMEASURED,
             "--output", output),
            output, output.with_name("qat.json"),
        )  # fmt: skip


def teacher(prefix: str) -> Path:
    """The int8 form of a model, which answers fast."""
    return int8_folder(prefix, 0) / "mobilenetv2_ptq_per_channel.pt"


def taught_steps(data: list[str], amp: list[str]) -> Iterator[Step]:
    """The float model at output stride 16, taught by the int8 one at 8; then at 8, by both and by itself."""

    def quantized_teacher(prefix: str, source: Path) -> Iterator[Step]:
        yield conversion_step(prefix, source)
        yield ptq_step(data, prefix, 0)

    def step(
        title: str, minutes: float, source: Path, teaching: tuple[object, ...], lr: str, muon_lr: str,
        epochs: int, output_stride: int, output: Path,
    ) -> Step:  # fmt: skip
        return Step(
            title, minutes, "train.py",
            (*data, "--weights", source, "--teacher", *teaching, "--optimizer", "muon", "--lr", lr,
             "--muon_lr", muon_lr, "--scheduler", "cosine", "--weight_decay", "1e-3", "--epochs", epochs,
             "--output_stride", output_stride, *TRIVIALAUGMENT, "--dropout", 0, "--label_smoothing", "0.1",
             *amp, "--output", output),
            output, RESULTS / ("float.json" if output == FLOAT else f"{output.parent.name}.json"),
        )  # fmt: skip

    yield from quantized_teacher("cutout_", FLOAT_OS8_CUTOUT)
    first = teacher("cutout_")
    both = (first, teacher("os16_"), "--distill_weight", "0.7")
    yield step("back at output stride 16, with a teacher", 90,
               FLOAT_OS8_CUTOUT, (first,), "0.05", "0.0125", 58, 16, FLOAT_OS16_CUTOUT)  # fmt: skip
    yield step("the same for longer", 40,
               FLOAT_OS16_CUTOUT, (first,), "0.02", "0.005", 24, 16, FLOAT_OS16_LONGER)  # fmt: skip
    yield from quantized_teacher("os16_", FLOAT_OS16_LONGER)
    yield step("the same at output stride 8, with two teachers", 135,
               FLOAT_OS16_LONGER, both, "0.04", "0.01", 40, 8, FLOAT_OS8_TAUGHT)  # fmt: skip
    yield from quantized_teacher("taught_", FLOAT_OS8_TAUGHT)
    itself = (teacher("taught_"), "--distill_weight", "0.5")
    yield step("the same for longer, with its own int8 form as teacher", 135,
               FLOAT_OS8_TAUGHT, itself, "0.03", "0.0075", 42, 8, FLOAT)  # fmt: skip


def packed_file(name: str) -> Path:
    """Where a packed file is, by its name."""
    return SHIPPED_PACKED.get(name, RUNS / f"packed/{name}.npz")


def packed_files() -> dict[str, tuple[Path, tuple[str, ...]]]:
    """By name: what is packed, and the flags."""
    float16 = ("--dtype", "float16")
    files = {
        "packed_float16": (FLOAT, float16),
        "packed_float16_at_output_stride_16": (FLOAT_OS16_LONGER, float16),
    }
    for name, pruning in PRUNINGS.items():
        packed = f"packed_pruned_{name}"
        files[f"{packed}_float16"] = pruning.output, float16
        if f"pruned_{name}_" in SEEDS:
            files[f"{packed}_int8"] = int8_folder(f"pruned_{name}_", 0) / "mobilenetv2_qat.pt", ()
        files[f"{packed}_int8_{pruning.few_bits}_bits"] = few_bits_file(name), ()
    return files


def packing_steps() -> Iterator[Step]:
    """Files that are as small as what is in them."""
    for name, (source, flags) in packed_files().items():
        packed = packed_file(name)
        yield Step(
            "pack", 0.2, "scripts/pack_weights.py", ("--weights", source, *flags, "--o", packed), packed
        )


def models() -> dict[str, Path]:
    """Every model of the table by its name."""
    found = {"published_float": PUBLISHED, "float_os16": FLOAT_OS16_LONGER, "float": FLOAT}
    found |= {f"pruned_{name}": pruning.output for name, pruning in PRUNINGS.items()}
    for prefix, seeds in SEEDS.items():
        for kind, seed in itertools.product(INT8_KINDS, seeds):
            found[f"{prefix}{kind}_s{seed}"] = int8_folder(prefix, seed) / f"mobilenetv2_{kind}.pt"
    return found | {name: packed_file(name) for name in packed_files()}


def measuring_steps(data: list[str]) -> Iterator[Step]:
    """Accuracy on the test images, once for each model; times of all of them in the same rounds."""
    for name, path in models().items():
        record = RESULTS / f"evaluate/{name}.json"
        yield Step(f"evaluate {name}", 0.5, "evaluate.py", (*data, "--weights", path), record, record)
    # Seeds and packing change no time.
    timed = [
        path
        for name, path in models().items()
        if not (name.endswith(("_s1", "_s2")) or path.suffix == ".npz")
    ]
    latency = RESULTS / "latency.json"
    yield Step("time them side by side", 3, "scripts/benchmarks.py",
               ("--threads", 1, "--model_file", *timed), latency, latency)  # fmt: skip


def allocation_steps(data: list[str], amp: list[str]) -> Iterator[Step]:
    """The methods of sharing out a density, compared at output stride 16 after an epoch of recovery."""
    log = RUNS / "allocation/scanning_log.csv"
    yield Step(
        "scan at output stride 16", 8, "scripts/sensitivity_scan.py",
        (*data, "--weights", FLOAT_OS16, "--split", "val", "--accuracy_threshold", 85,
         "--sparsities", "0.05", "0.1", "0.3", "0.6", "--o", log),
        log, log.with_suffix(".json"),
    )  # fmt: skip
    special = {"global": ("--spare", "classifier"), "sensitivity": ("--scanning_log", log)}
    for target, method in itertools.product(("100", "271", "150"), METHODS):
        sparsity_dict = RUNS / f"allocation/{method}_{target}.csv"
        yield Step(
            f"allocate by {method}", 0.2, "scripts/allocate_sparsity.py",
            ("--weights", FLOAT_OS16, "--target", f"0.{target}", "--method", method, *special.get(method, ()),
             "--o", sparsity_dict),
            sparsity_dict,
        )  # fmt: skip
        record = RESULTS / f"allocation/{method}_{target}.json"
        yield Step(
            f"prune by it to {int(target) / 10:.1f} %", 2, "prune.py",
            (*data, *amp, "--weights", FLOAT_OS16, "--sparsity_dict", sparsity_dict, "--optimizer", "muon",
             "--lr", "0.05", "--muon_lr", "0.0125", "--epochs", 1, "--label_smoothing", "0.1",
             "--output", sparsity_dict.with_suffix(".pth")),
            record, record,
        )  # fmt: skip


def benchmark_steps(data: list[str]) -> Iterator[Step]:
    """The claims about speed; see benchmarks/README.md."""
    runtimes = ("runtimes.py", *data, "--weights", FLOAT, "--rounds", 15, "--output_stride")
    for name, minutes, (script, *argv) in (
        ("training", 6, ("training.py", "--rounds", 5)),
        ("sensitivity_scan", 5, ("sensitivity_scan.py", *data, "--weights", FLOAT_OS16, "--images", 2000)),
        ("runtimes_os8", 5, (*runtimes, 8)),
        ("runtimes_os32", 3, (*runtimes, 32)),
    ):
        record = RESULTS / f"benchmarks/{name}.json"
        yield Step(f"benchmark {script}", minutes, f"benchmarks/{script}", tuple(argv), record, record)


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet."""
    data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
    for name in ("image_size", "val_size"):
        if getattr(args, name) is not None:
            data += [f"--{name}", str(getattr(args, name))]
    to_do = steps(data)
    anew = False
    for number, step in enumerate(to_do, 1):
        heading = (
            f"[{number}/{len(to_do)}] {step.title}, about {step.minutes:g} minute{'s' * (step.minutes != 1)}"
        )
        if args.list:
            print(f"{heading}\n  {command_line(step.script, *step.arguments())}")
        elif not anew and step.is_done():
            print(f"{heading}: done before")
        else:
            run_script(heading, step.script, *step.arguments())
            # What follows was made from other files, except where nothing was measured.
            anew = anew or step.record is not None


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
