"""Tables of the records under results/, as Markdown; the same records give the same text."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from string import Formatter
from typing import Any, TypeVar

from utils.common.errors import UserError
from utils.common.files import check_input
from utils.common.tables import NO_VALUE
from utils.pruning.allocation import METHODS

T = TypeVar("T")
Values = dict[str, Any]
WRONG_FORM = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError)
"""What a conversion runs into when a file does not hold what it should."""
FORMS = {
    "published_float": "the published recipe, run here",
    "float_os16": "float at output stride 16",
    "float": "float",
    "": "float",
    "ptq_per_tensor": "PTQ per tensor",
    "ptq_per_channel": "PTQ per channel",
    "qat": "QAT",
}
"""What the tables call the models of results/evaluate, in their order; of `pruned_271` no name is left."""
FIGURES = ("accuracy_pct", "file_size_mb", "density", "macs")
"""What is read of such a record, and averaged over the seeds."""
HEADLINE = (
    *("published/float", "published/PTQ per channel", "published/pruned"),
    *("float", "ptq_per_channel", "qat", "pruned_271", "packed_pruned_100_int8_5_bits"),
)
"""The records behind the rows of the short table."""
OURS, PUBLISHED, SMALLEST = "ptq_per_channel", "published/PTQ per channel", "packed_pruned_100_int8_5_bits"
"""The records behind the sentence above it."""


class Results:
    """The records in a folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, convert: Callable[[Any], T]) -> T | None:
        """Return what `convert` makes of a record, or None if there is no such file; raises as `read_all`."""
        return self.read_all(name, convert).get(name)

    def read_all(self, pattern: str, convert: Callable[[Any], T]) -> dict[str, T]:
        """Return what `convert` makes of each record that matches, by name, in alphabetical order.

        Raises:
            UserError: a file does not hold what `convert` reads.
        """
        found = {}
        for path in sorted(self.folder.glob(f"{pattern}.json")):
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            check_input(path, "result file")
            try:
                found[name] = convert(json.loads(path.read_text()))
            except WRONG_FORM as error:
                what = f"it has no {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{path} is not a valid record ({what}): write it again") from error
        return found


def number(value: object) -> float:
    """Return a number that a record holds, or raise ValueError if it is not one, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value


def computer(record: Values) -> str:
    """Return what a record was measured on: CPU, threads, versions."""
    threads, versions = record["threads"], record["versions"]
    return (
        f"{record['cpu']}, {threads} thread{'' if threads == 1 else 's'}, torch {versions['torch']}, "
        f"torchvision {versions['torchvision']}"
    )


def markdown_table(headers: str, template: str, rows: Iterable[Values], note: str) -> str:
    """Return a table and a line below it.

    Args:
        headers: of the columns, with ` | ` between them.
        template: of a row, such as `{model} | {ratio:.2f}×`. What it formats must be a number; a cell with
            a value of None is a dash.
        rows: values by name.
        note: the line below.
    """
    lines = [headers, " | ".join(["---", *["--:"] * headers.count("|")])]
    lines += [" | ".join(_cell(cell, row) for cell in template.split(" | ")) for row in rows]
    return "\n".join([*(f"| {line} |" for line in lines), "", note, ""])


def _cell(template: str, row: Values) -> str:
    fields = [(name, form) for _, name, form, _ in Formatter().parse(template) if name]
    if any(row[name] is None for name, _ in fields):
        return NO_VALUE
    return template.format_map({name: number(row[name]) if form else row[name] for name, form in fields})


def missing(command: str) -> str:
    """Return what a block says as long as there is no record of what `command` measures."""
    return f"*Not measured yet: `python {command}` does it.*\n"


def model_rows(results: Results) -> tuple[list[Values], str]:
    """Return the values of each model that there is a record of, in order, and where they were measured.

    Raises:
        UserError: a file is not a record, or not of the test split.
    """
    rows = results.read("published", lambda content: [_published(row) for row in content["rows"]]) or []
    timed_on, times = results.read("latency", _latencies) or ("", {})
    evaluated = results.read_all("evaluate/*", _evaluated)
    if not evaluated:
        return rows, missing("scripts/reproduce.py").strip()
    runs: dict[str, list[Values]] = {}
    for path, run in evaluated.items():
        runs.setdefault(re.sub(r"^evaluate/|_s\d+$", "", path), []).append(run)
    for name in sorted(runs, key=_identify):
        row = _unmeasured(name, "ours", *_identify(name)[1:])
        row |= {key: fmean(run[key] for run in runs[name]) for key in FIGURES}
        row |= next((times[run["file"]] for run in runs[name] if run["file"] in times), {})
        if "float" in runs:
            # Plus zero, since what rounds to zero may be below it.
            row["points"] = round(row["accuracy_pct"] - runs["float"][0]["accuracy_pct"], 2) + 0.0
        if f"evaluate/{name}" not in evaluated:
            row["label"] += f", n = {len(runs[name])}"
        if len(runs[name]) > 1:
            row["spread"] = f" ± {stdev(run['accuracy_pct'] for run in runs[name]):.2f}"
        rows.append(row)
    computers = sorted({run["computer"] for run in evaluated.values()})
    said = [f"Our accuracies were measured on {'; '.join(computers)}."]
    if timed_on:
        said.append(f"Our latencies are at {timed_on}.")
    if any(row["spread"] for row in rows):
        said.append("± is the sample standard deviation over n seeds.")
    if any(run["is_jpeg"] for run in evaluated.values()):
        said.append(
            "Our numbers are from a JPEG copy (quality 75) of CIFAR-10, not from the official pixels."
        )
    return rows, " ".join(said)


def _identify(name: str) -> tuple[tuple[bool, float, int], float, str]:
    """Return what a record's name says: its place in the tables, the density in percent, the form."""
    packed, target, name = re.findall(r"^(packed_)?(?:pruned_(\d{3})_?)?(.*)$", name)[0]
    density_pct = int(target or 1000) / 10
    form = f"packed {name.replace('_', ' ')}" if packed else FORMS.get(name, name)
    return (bool(packed), -density_pct, [*FORMS, name].index(name)), density_pct, form


def _unmeasured(name: str, group: str, density_pct: float, form: str) -> Values:
    """Return what a model is called, and what its row has without a measurement."""
    weights = "dense" if density_pct == 100 else f"{100 - density_pct:g} % sparse (density {density_pct:g} %)"
    label = ", ".join(part for part in (weights, form) if part not in ("dense", "float")) or "float"
    names = {"name": name, "group": group, "weights": weights, "form": form, "label": f"{group}: {label}"}
    return names | {"spread": ""} | dict.fromkeys(("points", "macs", "median_ms", "p90_ms"))


def _published(row: Values) -> Values:
    # Its own differences, which its accuracies do not always give.
    renamed = {
        "accuracy_pct": "accuracy_pct",
        "points": "change_points",
        "file_size_mb": "size_mb",
        "density": "density",
    }
    figures = {key: number(row[published]) for key, published in renamed.items()}
    if row["latency_ms"] is not None:
        figures["median_ms"] = number(row["latency_ms"])
    form = row["model"].replace("pruned", "float")
    return _unmeasured(f"published/{row['model']}", "published", 100 * figures["density"], form) | figures


def _evaluated(record: Values) -> Values:
    found, arguments = record["results"], record["arguments"]
    if found["split"] != "test":
        raise ValueError(f"it is of the split {found['split']}, not test")
    return {
        **{key: number(found[key]) for key in FIGURES},
        "file": os.path.normpath(arguments["weights"]),
        "computer": computer(record),
        # The official pixels come by --dataset cifar10 alone; the folder of images is the JPEG copy.
        "is_jpeg": arguments["dataset"] == "folder",
    }


def _latencies(record: Values) -> tuple[str, dict[str, Values]]:
    return f"batch size {record['results']['batch_size']} on {computer(record)}", {
        os.path.normpath(row["file"]): {
            "median_ms": number(row["median_latency_ms"]),
            "p90_ms": number(row["p90_latency_ms"]),
        }
        for row in record["results"]["files"]
    }


def headline(results: Results, _argument: str) -> str:
    """Return what the project achieves in a sentence, and the models of HEADLINE; raises as `model_rows`."""
    rows, origin = model_rows(results)
    shown = [row for name in HEADLINE for row in rows if row["name"] == name]
    by_name = {row["name"]: row for row in shown}
    sentence = ""
    if {OURS, PUBLISHED, SMALLEST} <= by_name.keys() and by_name[OURS].get("median_ms"):
        ours, published, smallest = (by_name[name] for name in (OURS, PUBLISHED, SMALLEST))
        sentence = (
            f"**{ours['accuracy_pct']:.2f} % on CIFAR-10 in an int8 file of {ours['file_size_mb']:.3g} MB, "
            f"{ours['median_ms']:.3g} ms per image on one CPU core; {smallest['accuracy_pct']:.2f} % in "
            f"{smallest['file_size_mb']:.3g} MB.** Published: {published['accuracy_pct']:.2f} % in "
            f"{published['file_size_mb']:.3g} MB, {published['median_ms']:.3g} ms.\n\n"
        )
    return sentence + markdown_table(
        "model | test accuracy % | points vs float | size MB | latency ms",
        "{label} | {accuracy_pct:.2f}{spread} | {points:+.2f} | {file_size_mb:.3g} | {median_ms:.3g}",
        shown,
        origin,
    )


def results_table(results: Results, _argument: str) -> str:
    """Return every model; raises as `model_rows`."""
    return markdown_table(
        "model | test accuracy % | points vs float | MACs | size MB | density | latency ms (median) | p90 ms",
        "{label} | {accuracy_pct:.2f}{spread} | {points:+.2f} | {macs:,.0f} | {file_size_mb:.3g} "
        "| {density:.3f} | {median_ms:.3g} | {p90_ms:.3g}",
        *model_rows(results),
    )


def allocation_table(results: Results, _argument: str) -> str:
    """Return accuracy on val by method (rows) and density (columns), the best of each column in bold.

    Raises:
        UserError: a file is not a record.
    """
    targets: dict[str, dict[str, str]] = {}
    epochs = set()
    for name, (accuracy, trained) in results.read_all("allocation/*_[0-9][0-9][0-9]", _recovered).items():
        method, _, target = name.removeprefix("allocation/").rpartition("_")
        targets.setdefault(target, {})[method] = accuracy
        epochs.add(trained)
    if not targets:
        return missing("scripts/reproduce.py")
    headers, template = "val accuracy % at density", "{method}"
    rows: list[Values] = [{"method": method} for method in METHODS]
    for target, column in sorted(targets.items(), reverse=True):
        headers += f" | {int(target) / 10:g} %"
        template += f" | {{at_{target}}}"
        # Equal figures on the page are all bold or none.
        best = max(column.values(), key=float)
        for row in rows:
            shown = column.get(row["method"])
            row[f"at_{target}"] = f"**{best}**" if shown == best else shown
    recovery = " or ".join(f"{count} epoch{'s' * (count > 1)}" for count in sorted(epochs))
    note = f"After the same recovery of {recovery}; the best of each column in bold."
    return markdown_table(headers, template, rows, note)


def _recovered(record: Values) -> tuple[str, int]:
    return f"{number(record['results']['val_accuracy_pct']):.2f}", int(number(record["arguments"]["epochs"]))


def _runtime_cases(measured: Values) -> list[Values]:
    """Return our int8 beside the best other that counts, by threads and batch size."""
    cases: dict[tuple[int, int], list[Values]] = {}
    for row in measured["rows"]:
        cases.setdefault((row["threads"], row["batch_size"]), []).append(row)
    shown = []
    for (threads, batch_size), rows in sorted(cases.items()):
        ours, ours_float = _row_of(rows, "TorchScript int8"), _row_of(rows, "TorchScript float")
        best = min((row for row in rows if row["counts"]), key=lambda row: row["times_ours"], default=None)
        shown.append(
            {
                "threads": threads,
                "batch_size": batch_size,
                "ours_ms": ours["median_latency_ms"],
                "float_ms": ours_float["median_latency_ms"],
                "best": best and best["model"],
                "best_ms": best and best["median_latency_ms"],
                # Not the quotient of the medians: the benchmark compares round by round.
                "ratio": best and 1 / best["times_ours"],
            }
        )
    return shown


def _row_of(rows: list[Values], name: str) -> Values:
    found = next((row for row in rows if row["model"].startswith(name)), None)
    if found is None:
        raise ValueError(f"a case without a row of {name}")
    return found


def benchmark(
    record: str, script: str, rows: Callable[[Values], list[Values]], headers: str, template: str, note: str
) -> Callable[[Results, str], str]:
    """Return the block of what a script under benchmarks/ measured; its argument takes the place of `{}`."""

    def show(content: Values) -> str:
        said = note.format_map(content | {"computer": computer(content)})
        return markdown_table(headers, template, rows(content["results"]), said)

    def block(results: Results, argument: str) -> str:
        name = f"benchmarks/{record}".format(argument)
        command = f"benchmarks/{script} --record results/{name}.json".format(argument)
        return results.read(name, show) or missing(command)

    return block


AMP = ("ours_amp_images_per_s", "ours_amp_ratio")
"""What is measured only where the CPU computes with bfloat16."""
BLOCKS: dict[str, Callable[[Results, str], str]] = {
    "headline": headline,
    "results_table": results_table,
    "allocation_table": allocation_table,
    "training_benchmark": benchmark(
        "training",
        "training.py",
        lambda found: [dict.fromkeys(AMP) | case for case in found["cases"]],
        "output stride | batch size | usual, images/s | ours, images/s | ours / usual "
        "| ours with --amp | with --amp / usual",
        "{output_stride} | {batch_size} | {usual_images_per_s:.0f} | {ours_images_per_s:.0f} "
        "| {ours_ratio:.2f}× | {ours_amp_images_per_s:.0f} | {ours_amp_ratio:.2f}×",
        "Medians of {arguments[rounds]} rounds on {computer}.",
    ),
    "training_ablation": benchmark(
        "training_ablation",
        "training.py --ablation",
        lambda found: found["cases"],
        "output stride | batch size | without kernels, images/s | with kernels, images/s | with / without",
        "{output_stride} | {batch_size} | {without_kernels_images_per_s:.0f} | {ours_images_per_s:.0f} "
        "| {ours_ratio:.2f}×",
        "Medians of {arguments[rounds]} rounds on {computer}.",
    ),
    "scan_benchmark": benchmark(
        "sensitivity_scan",
        "sensitivity_scan.py",
        lambda found: [
            {"scan": scan, "seconds": seconds, "ms_per_row": 1000 * seconds / found["rows"]}
            for scan, seconds in found["seconds"].items()
        ],
        "scan | s | ms per row",
        "{scan} | {seconds:.1f} | {ms_per_row:.0f}",
        "{results[ratio]:.2f} times as fast for {results[rows]} rows over {results[images]} images, "
        "every row the same, on {computer}.",
    ),
    "runtimes_benchmark": benchmark(
        "runtimes_os{}",
        "runtimes.py --output_stride {}",
        _runtime_cases,
        "threads | batch size | ours, int8 ms | best other int8 ms | which | ours / best other "
        "| ours, float ms",
        "{threads} | {batch_size} | {ours_ms:.2f} | {best_ms:.2f} | {best} | {ratio:.2f} | {float_ms:.2f}",
        "Output stride {arguments[output_stride]}, medians of {arguments[rounds]} rounds on {cpu}, "
        "torch {versions[torch]}; a ratio below 1 means that ours is faster.",
    ),
}
