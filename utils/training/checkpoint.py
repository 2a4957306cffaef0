"""The checkpoint and the epoch table of a training run: written after each epoch, read to resume."""

import csv
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from utils.checkpoints.weights import read_pickle
from utils.common.errors import UserError
from utils.common.files import Paths, atomic_write, check_outputs, lock, save_torch

CHECKPOINT_FORMAT = "mobilenetv2-checkpoint"
# The outcome of a run depends on these by float rounding at most (a GPU draws its own dropout), so a
# resumed run may change them.
FREE_TO_CHANGE = {"resume", "force", "threads", "device", "compile", "record", "output", "data_dir"}


class Stateful(Protocol):
    """What a checkpoint holds: models, optimizers, schedules, averages, pruners."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Continue from what `state_dict` returned."""


@dataclass(frozen=True)
class RunConfig:
    """The files of a run, and what it must have in common with the run that it resumes.

    Args:
        output: file that the script writes in the end; checkpoint and history are written beside it.
        resume: continue from the checkpoint.
        force: overwrite files that exist.
        seed: of shuffling, augmentation and dropout.
        flags: plain values by name; a resumed run must have those of its checkpoint, except for
            FREE_TO_CHANGE.
        inputs: fingerprints of the images and files that the run reads, by what they are.
    """

    output: Path
    resume: bool
    force: bool
    seed: int
    flags: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """Return where the run keeps its checkpoint until the output is written."""
        return checkpoint_path(self.output)

    @property
    def history(self) -> Path:
        """Return where the run writes its epoch table as CSV."""
        return self.output.with_name(f"{_stem(self.output)}.history.csv")

    def check_files(self, record: str | os.PathLike | None, read: Paths) -> None:
        """Lock what is written, and check the files before the work starts.

        Args:
            record: file for the measured numbers, if they are wanted.
            read: the files that the run reads, by flag.

        Raises:
            UserError: a file cannot be written or exists and `force` is off, two flags name the same
                file, another run writes the output, or there is nothing to resume.
        """
        overwrite = self.force or self.resume
        check_outputs({"--output": self.output}, {}, force=overwrite)
        # `m.pt` and `m.pth` have the same checkpoint.
        for path in (self.output, self.checkpoint, *([record] if record else [])):
            lock(path)
        if self.resume and not self.checkpoint.is_file():
            raise UserError(f"--resume finds no checkpoint {self.checkpoint}: start the run without it")
        if not self.resume and not self.force and self.checkpoint.exists():
            raise UserError(
                f"{self.checkpoint} is from an interrupted run: give --resume to go on with it, "
                "or --force to start again"
            )
        written = {"--output": self.output, "the history": self.history, "the checkpoint": self.checkpoint}
        check_outputs(written, {"--record": record, **read}, force=overwrite)
        # A run that was killed at its very end has written its record, but still has its checkpoint.
        check_outputs({"--record": record}, read, force=self.force or (self.resume and self._wrote(record)))

    def _wrote(self, record: str | os.PathLike | None) -> bool:
        """Return whether a file is the record of a run with these flags."""
        if record is None or not os.path.isfile(record):
            return False
        try:
            then = json.loads(Path(record).read_text())["arguments"]
            must_agree = self.flags.keys() - (FREE_TO_CHANGE - {"output"})
            return all(then[name] == self.flags[name] for name in must_agree)
        except (OSError, ValueError, LookupError, TypeError):
            return False


def checkpoint_path(output: str | os.PathLike) -> Path:
    """Return where the run that writes `output` keeps its checkpoint."""
    output = Path(output)
    return output.with_name(f"{_stem(output)}.checkpoint.pth")


def _stem(output: Path) -> str:
    """Return the name without the suffix of a model file; `m.v2` is a name as it stands."""
    return output.stem if output.suffix in (".pth", ".pt") else output.name


@dataclass(frozen=True)
class Epoch:
    """A row of the printed table and of the history CSV."""

    epoch: int
    loss: float
    train_accuracy_pct: float
    val_accuracy_pct: float | None
    lr: float
    images_per_s: float
    seconds: float

    HEADER = "epoch     loss  train %    val %        lr    img/s       s"

    def __str__(self) -> str:
        val = f"{self.val_accuracy_pct:8.2f}" if self.val_accuracy_pct is not None else "       –"
        return (
            f"{self.epoch:5d}  {self.loss:7.4f}  {self.train_accuracy_pct:7.2f} {val}  "
            f"{self.lr:8.2e}  {self.images_per_s:7.0f}  {self.seconds:6.1f}"
        )


@dataclass
class Progress:
    """The epochs that a run has finished, and the weights of the best one."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best_accuracy_pct: float | None = None
    best_state: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return the epoch table, one dictionary per epoch."""
        return [asdict(epoch) for epoch in self.history]

    def metrics(self) -> dict[str, Any]:
        """Return what is recorded about the best epoch."""
        return {"best_epoch": self.best_epoch, "val_accuracy_pct": self.best_accuracy_pct}


def is_finite(state: dict[str, Any]) -> bool:
    """Return whether no parameter and no statistic in a state_dict is NaN or infinite."""
    # The observers of quantization-aware training start at infinity.
    names = ("weight", "bias", "running_mean", "running_var")
    return all(torch.isfinite(value).all() for name, value in state.items() if name.split(".")[-1] in names)


def save_progress(config: RunConfig, objects: dict[str, Stateful], progress: Progress) -> None:
    """Write the history CSV, once there is an epoch in it, and the checkpoint.

    Args:
        objects: everything whose state a resumed run needs, by name.
    """
    if progress.history:
        with atomic_write(config.history) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Epoch)])
            writer.writeheader()
            for row in progress.rows():
                writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    content = {
        "format": CHECKPOINT_FORMAT,
        "arguments": config.flags,
        "inputs": config.inputs,
        "state": {name: value.state_dict() for name, value in objects.items()},
        "progress": {**vars(progress), "history": progress.rows()},
    }
    save_torch(config.checkpoint, content)


def load_progress(config: RunConfig, objects: dict[str, Stateful]) -> Progress:
    """Read the checkpoint, and load the state of each object from it.

    Raises:
        UserError: the file is not a checkpoint, or one of a run with other flags or another model.
    """
    path = config.checkpoint
    content = read_pickle(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of an interrupted run: start again without --resume")
    try:
        then, now = content["arguments"], config.flags
        # Flags that are newer than the checkpoint are not compared.
        for name in sorted(then.keys() - FREE_TO_CHANGE):
            if then.get(name) != now.get(name):
                raise UserError(
                    f"{path} was made with --{name} {then.get(name)}, not {now.get(name)}: "
                    "give the same arguments, or start again with --force"
                )
        for name, fingerprint in content.get("inputs", {}).items():
            if config.inputs.get(name) != fingerprint:
                raise UserError(
                    f"{path} was made with other {name} (their content differs): "
                    "give the same, or start again with --force"
                )
        for name, value in objects.items():
            value.load_state_dict(content["state"][name])
        saved = content["progress"]
        progress = Progress(**{**saved, "history": [Epoch(**row) for row in saved["history"]]})
        if not is_finite(progress.best_state):
            raise ValueError("the best weights are not finite")
        return progress
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} does not fit this run: start again without --resume, with --force"
        ) from error
