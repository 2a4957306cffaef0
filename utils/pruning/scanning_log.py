"""The CSV of a sensitivity scan, written row by row so that an interrupted scan can be resumed.

Columns:
    layer.
    sparsity: the fraction of the layer's weights that are KEPT. `keep_ratio` is accepted as well.
    accuracy_pct, correct, total.
    loss: in nats, rounded to LOSS_DECIMALS, so that it does not depend on the order of float additions.
    recommended_sparsity: filled in once per layer, in the row of the smallest sparsity that stays at or
        above the threshold; 1.0 in the layer's last row if none does.
    shape, parameters, macs: to help a person decide.
    scan_id: tells the rows of one scan from those of another.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from models import MobileNetV2
from models.statistics import prunable_layers
from utils.common import distributed
from utils.common.csv_files import Row, format_line, read_csv, suggest, write_csv
from utils.common.errors import UserError
from utils.evaluation import Evaluation
from utils.pruning.sparsity_dict import ALIASES, READ_ONLY_COLUMNS

MEASURED_COLUMNS = ("layer", "sparsity", "accuracy_pct", "correct", "total", "loss")
COLUMNS = (*MEASURED_COLUMNS, "recommended_sparsity", *READ_ONLY_COLUMNS, "scan_id")
MADE_BY = "scripts/sensitivity_scan.py"
LOSS_DECIMALS = 4

Point = tuple[str, float]
"""A layer and the fraction of its weights that is kept, while no other layer is pruned."""


@dataclass(frozen=True)
class Measurement:
    """One row of the log: accuracy and loss with one layer pruned, and the row's recommendation, if any."""

    layer: str
    keep_ratio: float
    correct: int
    total: int
    loss: float
    recommended: float | None = None

    @property
    def accuracy_pct(self) -> float:
        """Return the accuracy in percent."""
        return 100 * self.correct / self.total


def recommend(rows: Sequence[Measurement], threshold_pct: float, largest: float) -> list[float | None]:
    """Return what recommended_sparsity holds in each row, None where it is empty.

    Args:
        rows: each layer's from its smallest sparsity up.
        threshold_pct: accuracy in percent that a recommended sparsity must reach.
        largest: the sparsity of each layer's last row.
    """
    cells: list[float | None] = []
    decided = set()
    for row in rows:
        cells.append(None)
        is_enough = row.accuracy_pct >= threshold_pct
        if row.layer not in decided and (is_enough or row.keep_ratio == largest):
            cells[-1] = row.keep_ratio if is_enough else 1.0
            decided.add(row.layer)
    return cells


@dataclass
class ScanningLog:
    """The rows of one scan in the order of its plan, each written to disk as soon as it is measured.

    Under torchrun every process holds the rows, and only the main one writes the file.

    Args:
        path: the CSV.
        plan: the points that the scan measures, from `sensitivity.scan_plan`.
        threshold_pct: accuracy in percent that a recommended sparsity must reach.
        scan_id: from `sensitivity.scan_id`.
        descriptions: the cells of READ_ONLY_COLUMNS by layer.
        rows: what is measured so far; `recommended` is set only in layers where a person edited it.
    """

    path: str | os.PathLike
    plan: list[Point]
    threshold_pct: float
    scan_id: str
    descriptions: dict[str, Sequence[object]]
    rows: list[Measurement] = field(default_factory=list)

    @property
    def levels(self) -> list[float]:
        """Return the sparsities at which each layer is measured, from the smallest up."""
        return sorted({keep_ratio for _, keep_ratio in self.plan})

    def start(self) -> None:
        """Replace the file with the header and the rows so far."""
        if distributed.is_main():
            write_csv(self.path, COLUMNS, self._table())

    def load(self) -> bool:
        """Read the rows of an interrupted scan, and return whether a person edited its recommendations.

        Recommendations that no threshold explains were edited and are kept; otherwise all are made anew.

        Raises:
            UserError: the file is not a log, or is the log of another scan.
        """
        advice = "give another --o, or --force to replace it"
        try:
            rows = read_csv(self.path, "scanning log", COLUMNS, MADE_BY, ALIASES, is_growing=True)
            self.rows = [_measurement(row) for row in rows]
        except UserError as error:
            raise UserError(
                f"{self.path} exists and is not a log that this scan can resume ({error}): {advice}"
            ) from error
        if any(row["scan_id"] != self.scan_id for row in rows):
            raise UserError(f"{self.path} is the log of a scan of other weights or images: {advice}")
        if [(row.layer, row.keep_ratio) for row in self.rows] != self.plan[: len(rows)]:
            raise UserError(f"{self.path} is the log of a scan of other sparsities: {advice}")
        # Layers whose cells are all empty get a new recommendation in any case.
        marked = {row.layer for row in self.rows if row.recommended is not None}
        kept = [row for row in self.rows if row.layer in marked]
        thresholds = [*(row.accuracy_pct for row in kept), math.inf]
        possible = (recommend(kept, threshold, self.levels[-1]) for threshold in thresholds)
        is_edited = [row.recommended for row in kept] not in possible
        if not is_edited:
            self.rows = [replace(row, recommended=None) for row in self.rows]
        return is_edited

    def append(self, evaluation: Evaluation) -> Measurement:
        """Write the result of the next point of the plan and return its row.

        Raises:
            UserError: the row could not be written, for example because the disk is full; earlier rows are
                complete.
        """
        done = len(self.rows)
        loss = round(evaluation.loss, LOSS_DECIMALS)
        self.rows.append(Measurement(*self.plan[done], evaluation.correct, evaluation.total, loss))
        if distributed.is_main():
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(format_line(self._table()[-1]))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(
                    f"{self.path} could not be written ({error.strerror}): free some space, then run the "
                    f"same command again to resume after {done} rows"
                ) from error
        return self.rows[-1]

    def recommended(self) -> dict[str, float]:
        """Return the recommended sparsity of each layer for which there is one so far."""
        marks = zip(self.rows, self._marks(), strict=True)
        return {row.layer: mark for row, mark in marks if mark is not None}

    def _marks(self) -> list[float | None]:
        edited = {row.layer for row in self.rows if row.recommended is not None}
        automatic = recommend(self.rows, self.threshold_pct, self.levels[-1])
        return [
            row.recommended if row.layer in edited else mark
            for row, mark in zip(self.rows, automatic, strict=True)
        ]

    def _table(self) -> list[Sequence[object]]:
        return [
            (
                *(row.layer, row.keep_ratio, round(row.accuracy_pct, 6), row.correct, row.total, row.loss),
                *(mark, *self.descriptions[row.layer], self.scan_id),
            )
            for row, mark in zip(self.rows, self._marks(), strict=True)
        ]


def read_scan(
    path: str | os.PathLike,
) -> tuple[list[Measurement], dict[str, float], dict[str, Sequence[object]]]:
    """Return a finished scan's rows, recommended sparsities by layer, and READ_ONLY_COLUMNS by layer.

    Raises:
        UserError: the file is not a scanning log, the scan is unfinished, or a layer does not have exactly
            one recommended sparsity.
    """
    with torch.device("meta"):
        layers = list(prunable_layers(MobileNetV2(width_mult=0.1)))
    measurements: dict[Point, Measurement] = {}
    recommended: dict[str, float] = {}
    descriptions: dict[str, Sequence[object]] = {}
    for row in read_csv(path, "scanning log", COLUMNS, MADE_BY, ALIASES):
        measurement = _measurement(row)
        name, point = measurement.layer, (measurement.layer, measurement.keep_ratio)
        if name not in layers:
            raise row.error("layer", f"the model has no layer {name!r}{suggest(name, layers)}")
        if point in measurements:
            raise row.error("layer", f"{name} already has a row at sparsity {row['sparsity']}: remove one")
        if measurement.recommended is not None:
            if name in recommended:
                raise row.error("recommended_sparsity", f"{name} already has one: keep only one of the two")
            recommended[name] = measurement.recommended
        measurements[point] = measurement
        descriptions[name] = [row[column] for column in READ_ONLY_COLUMNS]
    count = len(layers) * len({keep_ratio for _, keep_ratio in measurements})
    if len(measurements) < count:
        raise UserError(
            f"{path} holds {len(measurements)} of {count} rows: run the same {MADE_BY} command again to "
            "finish the scan"
        )
    for name in layers:
        if name not in recommended:
            raise UserError(
                f"{path} has no recommended_sparsity for layer {name}: fill it in in one of its rows"
            )
    return list(measurements.values()), {name: recommended[name] for name in layers}, descriptions


def read_measurements(
    path: str | os.PathLike, descriptions: dict[str, Sequence[object]]
) -> list[Measurement]:
    """Return all rows of a finished scan at two or more sparsities below 1.

    Args:
        path: the CSV.
        descriptions: of the model's layers, from `describe_layers`.

    Raises:
        UserError: as in `read_scan`, or the scanned model has other shapes, or there are fewer than two
            sparsities below 1.
    """
    measurements, _, found = read_scan(path)
    for name, (shape, *_) in found.items():
        if shape != descriptions[name][0]:
            raise UserError(
                f"{path} is the log of another model: {name} is {shape} there and {descriptions[name][0]} "
                "here: scan this model"
            )
    levels = {row.keep_ratio for row in measurements} - {1.0}
    if len(levels) < 2:
        raise UserError(
            f"{path} holds {len(levels)} sparsities below 1, but at least two are needed: "
            "scan again with more --sparsities"
        )
    return measurements


def _measurement(row: Row) -> Measurement:
    name, correct, total = row["layer"], row.number("correct", int), row.number("total", int)
    if not 0 <= correct <= total or total == 0:
        raise row.error("total", f"{correct} correct of {total} images is impossible: restore the numbers")
    recommended = row.fraction("recommended_sparsity", name) if row["recommended_sparsity"] else None
    keep_ratio = row.fraction("sparsity", name)
    return Measurement(name, keep_ratio, correct, total, row.number("loss", float), recommended)
