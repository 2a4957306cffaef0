"""The CSV of a sensitivity scan, written row by row so that an interrupted scan can be resumed.

Columns:
    layer.
    sparsity: the fraction of the layer's weights that are KEPT. `keep_ratio` is read as well.
    accuracy_pct, correct, total.
    loss: in nats, to LOSS_DECIMALS, which the order of float additions does not change.
    recommended_sparsity: filled in once per layer, in the row of the smallest sparsity that stays at or
        above the threshold; 1.0 in the layer's last row if none does.
    shape, parameters, macs: for the person who decides.
    scan_id: tells the rows of one scan from those of another.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models import MobileNetV2
from models.statistics import prunable_layers
from utils.common import distributed
from utils.common.csv_files import Row, format_line, parse_csv, read_csv, read_text, suggest, write_csv
from utils.common.errors import UserError
from utils.pruning.sparsity_dict import ALIASES, READ_ONLY_COLUMNS

if TYPE_CHECKING:
    from utils.evaluation import Evaluation

MEASURED_COLUMNS = ("layer", "sparsity", "accuracy_pct", "correct", "total", "loss")
COLUMNS = (*MEASURED_COLUMNS, "recommended_sparsity", *READ_ONLY_COLUMNS, "scan_id")
MADE_BY = "scripts/sensitivity_scan.py"
LOSS_DECIMALS = 4

Point = tuple[str, float]
"""A layer and the fraction of its weights that is kept, while no other layer is pruned."""


@dataclass(frozen=True)
class Measurement:
    """One row of the log: the accuracy and loss of the model with one layer pruned."""

    layer: str
    keep_ratio: float
    correct: int
    total: int
    loss: float

    @property
    def accuracy_pct(self) -> float:
        """Return the accuracy in percent."""
        return 100 * self.correct / self.total


def recommend(keep_ratios: Sequence[float], accuracies_pct: Sequence[float], threshold_pct: float) -> float:
    """Return the smallest fraction kept whose accuracy is at or above the threshold, else 1.0."""
    passing = [
        keep_ratio
        for keep_ratio, accuracy_pct in zip(keep_ratios, accuracies_pct, strict=True)
        if accuracy_pct >= threshold_pct
    ]
    return min(passing, default=1.0)


class ScanningLog:
    """The rows of one scan in the order of its plan, each written to disk as soon as it is measured.

    Under torchrun every process holds the rows, and only the main one writes the file.

    Args:
        path: the CSV.
        plan: the points that the scan measures.
        threshold_pct: accuracy in percent that a recommended sparsity must reach.
        scan_id: from `sensitivity.scan_id`.
        descriptions: the cells of READ_ONLY_COLUMNS by layer.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        plan: Sequence[Point],
        threshold_pct: float,
        scan_id: str,
        descriptions: dict[str, Sequence[object]],
    ) -> None:
        self.path = Path(path)
        self.plan = list(plan)
        self.threshold_pct = threshold_pct
        self.scan_id = scan_id
        self.descriptions = descriptions
        self.rows: list[Measurement] = []
        self.edited_marks: dict[int, str] = {}
        """The cells recommended_sparsity that a person has edited, by row: they are kept."""

    def start(self) -> None:
        """Replace the file by one with the header and the rows so far."""
        if distributed.is_main():
            write_csv(self.path, COLUMNS, [self._cells(index) for index in range(len(self.rows))])

    def load(self) -> None:
        """Read the rows of an interrupted scan, without a last line that was cut off.

        Raises:
            UserError: the file is not a log, or is the log of another scan.
        """
        text = read_text(self.path, "scanning log")
        # Only complete lines count: a killed process may leave half of one.
        whole = text[: text.rfind("\n") + 1]
        try:
            if not whole.strip():
                raise UserError("it has no header")
            rows = parse_csv(self.path, whole, COLUMNS, MADE_BY, ALIASES)
            self.rows = [_measurement(row) for row in rows]
        except UserError as error:
            raise UserError(
                f"{self.path} exists and is not a log that the scan can go on with ({error}): "
                "give another --o, or --force to replace it"
            ) from error
        other = None
        if any(row["scan_id"] != self.scan_id for row in rows):
            other = "weights or images"
        elif [(row.layer, row.keep_ratio) for row in self.rows] != self.plan[: len(rows)]:
            other = "sparsities"
        if other:
            raise UserError(
                f"{self.path} is the log of a scan of other {other}: "
                "give another --o, or --force to replace it"
            )
        marks = [row["recommended_sparsity"] for row in rows]
        # The last layer may be measured only in part.
        unfinished = self.plan[len(rows)][0] if len(rows) < len(self.plan) else None
        found = {i: marks[i] for i, row in enumerate(self.rows) if row.layer != unfinished}
        if not self._may_be_automatic([(self.rows[i], mark) for i, mark in found.items()]):
            self.edited_marks = found

    def append(self, evaluation: "Evaluation") -> Measurement:
        """Write the result of the next point of the plan and return its row.

        Raises:
            UserError: the row could not be written, for example because the disk is full; earlier rows are
                complete.
        """
        name, keep_ratio = self.plan[len(self.rows)]
        loss = round(evaluation.loss, LOSS_DECIMALS)
        self.rows.append(Measurement(name, keep_ratio, evaluation.correct, evaluation.total, loss))
        if not distributed.is_main():
            return self.rows[-1]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(format_line(self._cells(len(self.rows) - 1)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror}): make room; "
                f"the same command goes on after {len(self.rows) - 1} rows"
            ) from error
        return self.rows[-1]

    def of_layer(self, name: str) -> list[Measurement]:
        """Return the rows of a layer so far."""
        return [row for row in self.rows if row.layer == name]

    def recommended(self) -> dict[str, float]:
        """Return the recommended sparsity of each layer measured so far."""
        names = dict.fromkeys(row.layer for row in self.rows)
        edited = {self.rows[i].layer: float(mark) for i, mark in self.edited_marks.items() if mark}
        return {name: self._recommended(self.of_layer(name)) for name in names} | edited

    @staticmethod
    def _may_be_automatic(marked: Sequence[tuple[Measurement, str]]) -> bool:
        """Return whether some threshold gives exactly these marks."""
        above, below = 100.0, -1.0  # accuracies that the threshold must not exceed, and must exceed
        for layer in dict.fromkeys(row.layer for row, _ in marked):
            rows = [(row, mark) for row, mark in marked if row.layer == layer]
            where = [i for i, (_, mark) in enumerate(rows) if mark]
            if not where:
                continue  # emptied in order to be chosen anew
            chosen, mark = rows[where[0]]
            is_choice = mark == f"{chosen.keep_ratio:g}"
            is_fallback = where[0] == len(rows) - 1 and mark in ("1", "1.0") and not is_choice
            if len(where) > 1 or not (is_choice or is_fallback):
                return False
            before = [row.accuracy_pct for row, _ in (rows if is_fallback else rows[: where[0]])]
            below = max([below, *before])
            above = min(above, chosen.accuracy_pct if is_choice else above)
        return below < above

    def _recommended(self, rows: Sequence[Measurement]) -> float:
        return recommend(
            [row.keep_ratio for row in rows], [row.accuracy_pct for row in rows], self.threshold_pct
        )

    def _cells(self, index: int) -> list[object]:
        row = self.rows[index]
        measured = [row.layer, row.keep_ratio, round(row.accuracy_pct, 6), row.correct, row.total, row.loss]
        return [*measured, self._mark(index), *self.descriptions[row.layer], self.scan_id]

    def _mark(self, index: int) -> object:
        if index in self.edited_marks:
            return self.edited_marks[index]
        # Sparsities increase, so the first that passes is the smallest and can be marked at once.
        row = self.rows[index]
        before = [other for other in self.rows[:index] if other.layer == row.layer]
        if self._recommended(before) < 1:
            return ""
        if row.accuracy_pct >= self.threshold_pct:
            return row.keep_ratio
        is_last = index + 1 == len(self.plan) or self.plan[index + 1][0] != row.layer
        return 1.0 if is_last else ""


def read_recommended(path: str | os.PathLike) -> tuple[dict[str, float], dict[str, Sequence[object]]]:
    """Return the recommended sparsity and the READ_ONLY_COLUMNS of each layer from a finished scan.

    Raises:
        UserError: the file is not a scanning log, the scan is unfinished, or a layer does not have exactly
            one recommended sparsity.
    """
    with torch.device("meta"):
        layers = list(prunable_layers(MobileNetV2(width_mult=0.1)))
    rows = read_csv(path, "scanning log", COLUMNS, MADE_BY, ALIASES)
    measured: set[Point] = set()
    recommended: dict[str, float] = {}
    for row in rows:
        measurement = _measurement(row)
        name, point = measurement.layer, (measurement.layer, measurement.keep_ratio)
        if name not in layers:
            raise row.error("layer", f"the model has no layer {name!r}{suggest(name, layers)}")
        if point in measured:
            raise row.error("layer", f"{name} at sparsity {row['sparsity']} is there already: remove one row")
        measured.add(point)
        if row["recommended_sparsity"]:
            if name in recommended:
                raise row.error("recommended_sparsity", f"{name} has one already: leave one of the two")
            recommended[name] = row.fraction("recommended_sparsity", name)
    levels = {keep_ratio for _, keep_ratio in measured}
    if len(measured) < len(layers) * len(levels):
        raise UserError(
            f"{path} holds {len(measured)} of {len(layers) * len(levels)} rows: finish the scan, "
            f"the same command of {MADE_BY} goes on where it stopped"
        )
    for name in layers:
        if name not in recommended:
            raise UserError(
                f"{path} has no recommended_sparsity for layer {name}: fill it in one of its rows"
            )
    descriptions: dict[str, Sequence[object]] = {
        row["layer"]: [row[column] for column in READ_ONLY_COLUMNS] for row in rows
    }
    return {name: recommended[name] for name in layers}, descriptions


def _measurement(row: Row) -> Measurement:
    keep_ratio = row.fraction("sparsity", row["layer"])
    correct, total = row.whole_number("correct"), row.whole_number("total")
    if not 0 < total >= correct:
        raise row.error("total", f"{correct} of {total} images are not right answers of all")
    return Measurement(row["layer"], keep_ratio, correct, total, row.number("loss"))


def read_measurements(
    path: str | os.PathLike, descriptions: dict[str, Sequence[object]]
) -> list[Measurement]:
    """Return all rows of a finished scan at two or more sparsities below 1.

    Args:
        path: the CSV.
        descriptions: of the model's layers, from `describe_layers`.

    Raises:
        UserError: as in `read_recommended`, or the shapes are those of another model, or there are fewer
            than two sparsities below 1.
    """
    _, found = read_recommended(path)
    for name, (shape, *_) in found.items():
        if shape != descriptions[name][0]:
            raise UserError(
                f"{path} is the log of another model: {name} is {shape} there and {descriptions[name][0]} "
                "here: scan this one"
            )
    measurements = [_measurement(row) for row in read_csv(path, "scanning log", COLUMNS, MADE_BY, ALIASES)]
    levels = {row.keep_ratio for row in measurements} - {1.0}
    if len(levels) < 2:
        raise UserError(
            f"{path} holds {len(levels)} sparsities below 1, at least two are needed: "
            "scan with more --sparsities"
        )
    return measurements
