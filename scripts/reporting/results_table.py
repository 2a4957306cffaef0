"""The README's results table: published numbers, our run of the published recipe, and our own models."""

import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scripts.reporting.report_records import Results, computer, markdown_table, missing, number
from utils.common.tables import NO_VALUE

HEADERS = (
    *("model", "test accuracy %", "points", "MACs, millions", "file MB", "density"),
    *("latency ms (median)", "p90 ms"),
)
PUBLISHED, RECIPE, OURS = "published", "the published recipe, run here", "ours"
FLOAT, FLOAT_16 = "float", "float at output stride 16"
INT8_FORMS = {"PTQ per tensor": "ptq_per_tensor", "PTQ per channel": "ptq_per_channel", "QAT": "qat"}
TRAININGS = {"published_float": "published_recipe", "float_os16": "float_os16_longer"}
"""The record of the training that made what evaluate/NAME is about, where it has another name; of
pruned_NNN it is prune_NNN."""


@dataclass(frozen=True)
class Row:
    """A model of the table; what was not measured is None.

    Args:
        group: PUBLISHED, RECIPE or OURS.
        pruning: such as `pruned to 27.1 %`; empty for a dense model.
        form: FLOAT, one of INT8_FORMS, or the like.
        accuracy_pct: on test, the mean over the seeds.
        seeds: how many runs the row is made of; None where that is no question.
        spread_pct: sample standard deviation of the accuracy over the seeds.
        points: accuracy minus that of the float model that the group is compared with.
        macs: of one image.
        file_mb: size of the file.
        density: fraction of the parameters that are not zero.
        median_ms: latency of a call.
        p90_ms: the latency that nine of ten calls keep.
    """

    group: str
    pruning: str
    form: str
    accuracy_pct: float
    seeds: int | None = None
    spread_pct: float | None = None
    points: float | None = None
    macs: float | None = None
    file_mb: float | None = None
    density: float | None = None
    median_ms: float | None = None
    p90_ms: float | None = None

    @property
    def label(self) -> str:
        """What the first column says."""
        parts = [self.pruning] if self.pruning else []
        if self.form != FLOAT or not parts:
            parts.append(self.form)
        if self.seeds:
            parts.append(f"n = {self.seeds}")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Measured:
    """What a record says about one file."""

    accuracy_pct: float
    where: str
    is_jpeg: bool
    weights: str = ""
    macs: float | None = None
    file_mb: float | None = None
    density: float | None = None


@dataclass(frozen=True)
class _Latencies:
    where: str
    by_file: dict[str, tuple[float, float]]


class Table:
    """The rows for which there are records, in the table's order, and where they were measured.

    Args:
        results: the records.

    Raises:
        UserError: one of the files is no record, or of another split than test.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._measured: list[_Measured] = []
        self._latencies = results.take("latency", _latencies)
        published = results.take("published", lambda content: [_published(row) for row in content["rows"]])
        recipe = [self._row(RECIPE, "", FLOAT, ["published_float"])]
        ours = [self._row(OURS, "", FLOAT_16, ["float_os16"]), *self._family("", "float", "")]
        for target in _pruned_targets(results):
            ours += self._family(_pruning(target), f"pruned_{target}", f"pruned_{target}_")
        ours += [self._row(OURS, _pruning(target), form, [name]) for name, target, form in _packed(results)]
        self.rows = [*(published or []), *_against_float(recipe), *_against_float(ours)]

    def is_measured(self) -> bool:
        """Whether any row was measured here."""
        return bool(self._measured)

    def origin(self) -> str:
        """Where and on what the rows were measured, in a line."""
        said = [f"Accuracy measured on {'; '.join(sorted({one.where for one in self._measured}))}."]
        if self._latencies:
            said.append(f"Latency at {self._latencies.where}.")
        if any(row.spread_pct is not None for row in self.rows):
            said.append("± is the sample standard deviation over n seeds.")
        if any(one.is_jpeg for one in self._measured):
            said.append(
                "Our numbers were measured on a JPEG copy (quality 75) of CIFAR-10, "
                "not on the official pixels."
            )
        return " ".join(said)

    def _family(self, pruning: str, name: str, prefix: str) -> list[Row | None]:
        """A float model's row and those of the int8 models made from it."""
        rows = [self._row(OURS, pruning, FLOAT, [name])]
        for form, int8_name in INT8_FORMS.items():
            names = [f"{prefix}{int8_name}_s{seed}" for seed in _seeds(self._results, f"{prefix}{int8_name}")]
            rows.append(self._row(OURS, pruning, form, names, is_seeded=True))
        return rows

    def _row(
        self, group: str, pruning: str, form: str, names: Sequence[str], is_seeded: bool = False
    ) -> Row | None:
        """The row made of the records that there are, one a seed; None if there is none."""
        found = [measured for name in names if (measured := _measure(self._results, name))]
        if not found:
            return None
        self._measured += found
        accuracies = [one.accuracy_pct for one in found]
        by_file = self._latencies.by_file if self._latencies else {}
        timed = [by_file[one.weights] for one in found if one.weights in by_file]
        median_ms, p90_ms = timed[0] if timed else (None, None)
        return Row(
            group,
            pruning,
            form,
            statistics.fmean(accuracies),
            seeds=len(found) if is_seeded else None,
            spread_pct=statistics.stdev(accuracies) if len(found) > 1 else None,
            macs=found[0].macs,
            file_mb=_mean([one.file_mb for one in found]),
            density=_mean([one.density for one in found]),
            median_ms=median_ms,
            p90_ms=p90_ms,
        )


def results_table(results: Results, _argument: str = "") -> str:
    """The table as Markdown, and a line on where its numbers come from.

    Raises:
        UserError: as `Table`.
    """
    table = Table(results)
    cells = []
    for group in dict.fromkeys(row.group for row in table.rows):
        cells.append([f"**{group}**", *[""] * (len(HEADERS) - 1)])
        cells += [_cells(row) for row in table.rows if row.group == group]
    text = "\n".join([*markdown_table(HEADERS, cells), "", ""]) if cells else ""
    return text + (f"{table.origin()}\n" if table.is_measured() else missing("python scripts/reproduce.py"))


def _published(row: dict[str, Any]) -> Row:
    # Its own differences, which its accuracies do not always give.
    return Row(
        PUBLISHED,
        "",
        row["model"],
        number(row["accuracy_pct"]),
        points=number(row["change_points"]),
        file_mb=number(row["size_mb"]),
        density=number(row["density"]),
        median_ms=None if row["latency_ms"] is None else number(row["latency_ms"]),
    )


def _against_float(rows: Sequence[Row | None]) -> list[Row]:
    """The rows that are there, with their points against the dense float one."""
    there = [row for row in rows if row]
    base = next((row.accuracy_pct for row in there if (row.pruning, row.form) == ("", FLOAT)), None)
    if base is None:
        return there
    return [replace(row, points=row.accuracy_pct - base) for row in there]


def _measure(results: Results, name: str) -> _Measured | None:
    """What evaluate/NAME says; without it, what the training that made the file says."""
    training = TRAININGS.get(name, name.replace("pruned_", "prune_", 1))
    return results.take(f"evaluate/{name}", _evaluated) or results.take(training, _trained)


def _evaluated(record: dict[str, Any]) -> _Measured:
    found = record["results"]
    if found["split"] != "test":
        raise ValueError(f"it is of the split {found['split']}, not test")
    return _Measured(
        number(found["accuracy_pct"]),
        computer(record),
        _is_jpeg(record),
        os.path.normpath(record["arguments"]["weights"]),
        number(found["macs"]),
        number(found["file_size_mb"]),
        number(found["density"]),
    )


def _trained(record: dict[str, Any]) -> _Measured:
    density = record["results"].get("density")
    return _Measured(
        number(record["results"]["test_accuracy_pct"]),
        computer(record),
        _is_jpeg(record),
        density=None if density is None else number(density),
    )


def _is_jpeg(record: dict[str, Any]) -> bool:
    # The official pixels come by --dataset cifar10 alone; the folder of images is the JPEG copy.
    return record["arguments"]["dataset"] == "folder"


def _latencies(record: dict[str, Any]) -> _Latencies:
    by_file = {
        os.path.normpath(row["file"]): (number(row["median_latency_ms"]), number(row["p90_latency_ms"]))
        for row in record["results"]["files"]
    }
    return _Latencies(f"batch size {record['results']['batch_size']} on {computer(record)}", by_file)


def _seeds(results: Results, name: str) -> list[int]:
    found = (re.fullmatch(rf"evaluate/{name}_s(\d+)", path) for path in results.names("evaluate/*"))
    return sorted(int(match[1]) for match in found if match)


def _pruned_targets(results: Results) -> list[str]:
    """Densities in tenths of a percent, three digits each, the densest first."""
    names = [*results.names("evaluate/*"), *results.names("*")]
    found = (re.fullmatch(r"evaluate/pruned_(\d{3})(?:_.*)?|prune_(\d{3})", name) for name in names)
    return sorted({match[1] or match[2] for match in found if match}, reverse=True)


def _pruning(target: str | None) -> str:
    return f"pruned to {int(target) / 10:g} %" if target else ""


def _packed(results: Results) -> list[tuple[str, str | None, str]]:
    """Name, target and form of each packed file that was evaluated; dense ones first."""
    found = []
    for path in results.names("evaluate/packed_*"):
        name = path.removeprefix("evaluate/")
        match = re.fullmatch(r"packed_(?:pruned_(\d{3})_)?(.+)", name)
        found.append((name, match[1], f"packed {match[2].replace('_', ' ')}"))
    return sorted(found, key=lambda packed: (-int(packed[1] or 1000), packed[0]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _cells(row: Row) -> list[str]:
    # The published figures have no more digits.
    size_digits, time_digits = (1, 0) if row.group == PUBLISHED else (2, 2)
    spread = "" if row.spread_pct is None else f" ± {row.spread_pct:.2f}"
    return [
        row.label,
        f"{row.accuracy_pct:.2f}{spread}",
        # Plus zero, since what rounds to zero may be below it.
        NO_VALUE if row.points is None else f"{round(row.points, 2) + 0.0:+.2f}",
        NO_VALUE if row.macs is None else f"{row.macs / 1e6:.1f}",
        # Below a megabyte the third digit is where the files differ.
        _digits(row.file_mb, 3 if row.file_mb and row.file_mb < 1 else size_digits),
        _digits(row.density, 3),
        _digits(row.median_ms, time_digits),
        _digits(row.p90_ms, time_digits),
    ]


def _digits(value: float | None, digits: int) -> str:
    return NO_VALUE if value is None else f"{value:.{digits}f}"
