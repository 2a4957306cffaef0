"""The README's results table: published numbers, our run of the published recipe, and our own models."""

import statistics
from collections.abc import Callable
from typing import Any

HEADER = (
    "| model | test accuracy % | points | MACs, millions | file MB | density | latency ms | p90 ms |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
)
GROUPS = {
    "the published recipe, run here": {"float": ["published_float"]},
    "ours": {"float": ["float"]},
}
"""Rows by group: the records under results/evaluate that a row is made of, one a seed."""
NOTHING = "–"

ReadRecord = Callable[[str], dict[str, Any]]


def results_table(published: dict[str, Any], read: ReadRecord) -> str:
    """The table as Markdown; in each group `points` is the change against the group's first row.

    Args:
        published: the content of results/published.json.
        read: gives a record under results/ by its name.

    Raises:
        UserError: a record is missing, or is none.
    """
    latencies = {row["file"]: row for row in read("latency")["results"]["files"]}
    lines = [*HEADER, "| **published** | | | | | | | |", *map(_published_row, published["rows"])]
    for group, rows in GROUPS.items():
        lines.append(f"| **{group}** | | | | | | | |")
        first = None
        for model, names in rows.items():
            records = [read(f"evaluate/{name}") for name in names]
            accuracies = [record["results"]["accuracy_pct"] for record in records]
            mean = statistics.fmean(accuracies)
            first = mean if first is None else first
            latency = latencies[records[0]["arguments"]["weights"]]
            lines.append(_row(model, accuracies, mean - first, records[0]["results"], latency))
    return "\n".join([*lines, ""])


def _published_row(row: dict[str, Any]) -> str:
    latency = NOTHING if row["latency_ms"] is None else row["latency_ms"]
    return (
        f"| {row['model']} | {row['accuracy_pct']:.2f} | {row['change_points']:+.2f} | {NOTHING} "
        f"| {row['size_mb']:.1f} | {row['density']:.3f} | {latency} | {NOTHING} |"
    )


def _row(
    model: str, accuracies: list[float], change: float, measured: dict[str, Any], latency: dict[str, Any]
) -> str:
    accuracy = f"{statistics.fmean(accuracies):.2f}"
    if len(accuracies) > 1:
        accuracy += f" ± {statistics.stdev(accuracies):.2f}"
    return (
        f"| {model} | {accuracy} | {change:+.2f} | {measured['macs'] / 1e6:.1f} "
        f"| {measured['file_size_mb']:.2f} | {measured['density']:.3f} "
        f"| {latency['median_latency_ms']:.2f} | {latency['p90_latency_ms']:.2f} |"
    )
