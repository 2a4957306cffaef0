"""Run every command behind the README's results table, in order, from nothing.

A step whose files are there, and whose record under results/ was written by the same command, is
skipped, so that an interrupted run goes on where it stopped; a training goes on from its checkpoint.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli, errors
from utils.steps import command_line, run_script
from utils.training import checkpoint_path

RUNS = Path("runs")
RESULTS = Path("results")
WEIGHTS = Path("weights")


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
        """All arguments; a training that was interrupted is resumed."""
        argv = [*self.argv, *(["--record", self.record] if self.record else [])]
        is_interrupted = self.script in TRAINING and checkpoint_path(self.output).is_file()
        return [*map(str, argv), "--resume" if is_interrupted else "--force"]

    def is_done(self) -> bool:
        """Whether the output is there and was made by this command."""
        if not self.output.exists() or self.record is None:
            return False
        try:
            command = json.loads(self.record.read_text())["command"]
        except (OSError, ValueError, KeyError):
            return False
        command = command.removesuffix(" --force").removesuffix(" --resume")
        return command == command_line(self.script, *self.argv, "--record", self.record)


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
    published = RUNS / "published/mobilenetv2.pth"
    float_weights = WEIGHTS / "mobilenetv2_cifar10.pth"
    return [
        Step(
            "the published recipe", 40, "train.py",
            (*data, "--optimizer", "adam", "--lr", "1e-4", "--scheduler", "none", "--weight_decay", 0,
             "--augment", "none", "--batch_size", 32, "--epochs", 24, "--output_stride", 32,
             "--output", published),
            published, RESULTS / "published_recipe.json",
        ),
        Step(
            "the float model, at output strides 32 and then 16", 90, "train.py",
            (*data, "--optimizer", "muon", "--lr", "0.2", "--muon_lr", "0.05", "--epochs", 30,
             "--early_output_strides", "32:10", "--output_stride", 16, "--dropout", 0,
             "--label_smoothing", "0.1", "--compile", "--output", float_weights),
            float_weights, RESULTS / "float_os16.json",
        ),
    ]  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet."""
    data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
    for name in ("image_size", "val_size"):
        if getattr(args, name) is not None:
            data += [f"--{name}", str(getattr(args, name))]
    to_do = steps(data)
    anew = False
    for number, step in enumerate(to_do, 1):
        heading = f"[{number}/{len(to_do)}] {step.title}, about {step.minutes:g} minutes"
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
