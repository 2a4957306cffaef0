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
from utils.common.tables import NO_VALUE
from utils.pruning.allocation import METHODS

T = TypeVar("T")
Values = dict[str, Any]
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, OSError)
"""What reading a file raises that does not hold what it should."""
FORMS = {
    "published_float": "the published recipe, run here",
    "float_os16": "float at output stride 16",
    "float": "float",
    "": "float",
    "ptq_per_tensor": "PTQ per tensor",
    "ptq_per_channel": "PTQ per channel",
    "qat": "QAT",
}
"""Names of the models in the tables, by that of the record without `packed_` and `pruned_271_`; in order."""
FIGURES = ("accuracy_pct", "file_size_mb", "density", "macs")
"""Numbers of such a record, which are averaged over the seeds."""
HEADLINE = (
    *("published/float", "published/PTQ per channel", "published/pruned"),
    *("float", "ptq_per_channel", "qat", "pruned_271", "packed_pruned_100_int8_5_bits"),
)
"""The rows of the short table."""
IN_A_SENTENCE = ("ptq_per_channel", "packed_pruned_100_int8_5_bits", "published/PTQ per channel")
"""The rows in the sentence above it."""


class Results:
    """The records in a folder, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, convert: Callable[[Any], T]) -> T | None:
        """Return `convert` of one record, or None if there is no such file; raises as `read_all`."""
        return self.read_all(name, convert).get(name)

    def read_all(self, pattern: str, convert: Callable[[Any], T]) -> dict[str, T]:
        """Return `convert` of each matching record by name, in alphabetical order.

        Raises:
            UserError: a file does not hold what `convert` reads.
        """
        found = {}
        for path in sorted(self.folder.glob(f"{pattern}.json")):
            try:
                name = path.relative_to(self.folder).with_suffix("").as_posix()
                found[name] = convert(json.loads(path.read_text()))
            except MALFORMED as error:
                what = f"it has no {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{path} is not a valid record ({what}): write it again") from error
        return found


def number(value: object) -> float:
    """Return a value of a record; raise ValueError if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value


def computer(record: Values) -> str:
    """Return the CPU, threads and versions that a record was measured with."""
    threads, versions = record["threads"], record["versions"]
    return (
        f"{record['cpu']}, {threads} thread{'' if threads == 1 else 's'}, torch {versions['torch']}, "
        f"torchvision {versions['torchvision']}"
    )


def markdown_table(headers: str, template: str, rows: Iterable[Values], note: str) -> str:
    """Return a table with a note below it.

    Args:
        headers: column headers, separated by ` | `.
        template: of a row, such as `{model} | {ratio:.2f}×`. A field with a format must be a number; a
            cell with a field that is None becomes a dash.
        rows: values by name.
        note: the line below the table.
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
    """Return what a block says until `command` has written its record."""
    return f"*Not measured yet: `python {command}` does it.*\n"


def model_rows(results: Results) -> tuple[list[Values], str]:
    """Return the values of each recorded model in order, and a note on how they were measured.

    Raises:
        UserError: a record is malformed or not of the test split.
    """
    rows = results.read("published", lambda content: [*map(_published, content["rows"])]) or []
    evaluated = results.read_all("evaluate/*", _evaluated)
    if not evaluated:
        return rows, missing("scripts/reproduce.py").strip()
    timed_on, times = results.read("latency", _latencies) or ("", {})
    runs: dict[str, list[Values]] = {}
    for path, run in evaluated.items():
        runs.setdefault(re.sub(r"^evaluate/|_s\d+$", "", path), []).append(run)
    for name in sorted(runs, key=_identify):
        row = _names(name, "ours", *_identify(name)[1:])
        row |= {key: fmean(run[key] for run in runs[name]) for key in FIGURES}
        row |= next((times[run["file"]] for run in runs[name] if run["file"] in times), {})
        if "float" in runs:
            # + 0.0 turns -0.0 into 0.0.
            row["points"] = round(row["accuracy_pct"] - runs["float"][0]["accuracy_pct"], 2) + 0.0
        if f"evaluate/{name}" not in evaluated:
            row["label"] += f", n = {len(runs[name])}"
        if len(runs[name]) > 1:
            row["spread"] = f" ± {stdev(run['accuracy_pct'] for run in runs[name]):.2f}"
        rows.append(row)
    computers = sorted({run["computer"] for run in evaluated.values()})
    notes = {
        f"Our accuracies were measured on {'; '.join(computers)}.": True,
        f"Our latencies are at {timed_on}.": timed_on,
        "± is the sample standard deviation over n seeds.": any(row["spread"] for row in rows),
        "Our numbers are from a JPEG copy (quality 75) of CIFAR-10, not from the official pixels.": any(
            run["is_jpeg"] for run in evaluated.values()
        ),
    }
    return rows, " ".join(note for note, applies in notes.items() if applies)


def _identify(name: str) -> tuple[tuple[bool, float, int], float, str]:
    """Return what a record's name says: its place in the tables, the density in percent, the format."""
    packed, target, name = re.findall(r"^(packed_)?(?:pruned_(\d{3})_?)?(.*)$", name)[0]
    density_pct = int(target or 1000) / 10
    form = f"packed {name.replace('_', ' ')}" if packed else FORMS.get(name, name)
    return (bool(packed), -density_pct, [*FORMS, name].index(name)), density_pct, form


def _names(name: str, group: str, density_pct: float, form: str) -> Values:
    """Return the names of a row, and None for each number that it may lack."""
    weights = "dense" if density_pct == 100 else f"{100 - density_pct:g} % sparse (density {density_pct:g} %)"
    label = ", ".join(part for part in (weights, form) if part not in ("dense", "float")) or "float"
    names = {"name": name, "weights": f"{group}, {weights}", "form": form, "label": f"{group}: {label}"}
    return names | {"spread": ""} | dict.fromkeys(("points", "macs", "median_ms", "p90_ms"))


def _published(row: Values) -> Values:
    figures = {
        "accuracy_pct": number(row["accuracy_pct"]),
        "points": number(row["change_points"]),  # as published; its accuracies do not always give it
        "file_size_mb": number(row["size_mb"]),
        "density": number(row["density"]),
        "median_ms": row["latency_ms"] and number(row["latency_ms"]),
    }
    form = row["model"].replace("pruned", "float")
    return _names(f"published/{row['model']}", "published", 100 * figures["density"], form) | figures


def _evaluated(record: Values) -> Values:
    found, arguments = record["results"], record["arguments"]
    if found["split"] != "test":
        raise ValueError(f"it is of the split {found['split']}, not test")
    return {
        **{key: number(found[key]) for key in FIGURES},
        "file": os.path.normpath(arguments["weights"]),
        "computer": computer(record),
        # --dataset cifar10 has the official pixels; the folder of images is the JPEG copy.
        "is_jpeg": arguments["dataset"] == "folder",
    }


def _latencies(record: Values) -> tuple[str, dict[str, Values]]:
    """Return the conditions, and the latencies by file."""
    return f"batch size {record['results']['batch_size']} on {computer(record)}", {
        os.path.normpath(row["file"]): {
            "median_ms": number(row["median_latency_ms"]),
            "p90_ms": number(row["p90_latency_ms"]),
        }
        for row in record["results"]["files"]
    }


def headline(results: Results) -> str:
    """Return the result of the project in a sentence, and the rows of HEADLINE; raises as `model_rows`."""
    rows, note = model_rows(results)
    by_name = {row["name"]: row for row in rows}
    shown = [by_name[name] for name in HEADLINE if name in by_name]
    sentence = ""
    ours, smallest, published = (by_name.get(name) for name in IN_A_SENTENCE)
    if ours and smallest and published and ours["median_ms"] and published["median_ms"]:
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
        note,
    )


def results_table(results: Results) -> str:
    """Return a row per model; raises as `model_rows`."""
    return markdown_table(
        "model | test accuracy % | points vs float | MACs | size MB | density | latency ms (median) | p90 ms",
        "{label} | {accuracy_pct:.2f}{spread} | {points:+.2f} | {macs:,.0f} | {file_size_mb:.3g} "
        "| {density:.3f} | {median_ms:.3g} | {p90_ms:.3g}",
        *model_rows(results),
    )


def allocation_table(results: Results) -> str:
    """Return accuracy on val by method (rows) and density (columns), the best of each column in bold.

    Raises:
        UserError: a record is malformed.
    """
    records = results.read_all("allocation/*_[0-9][0-9][0-9]", _recovered)
    if not records:
        return missing("scripts/reproduce.py")
    found = {tuple(name.split("/")[1].split("_")): accuracy for name, (accuracy, _) in records.items()}
    targets = sorted({target for _, target in found}, reverse=True)
    # By what is printed, so that equal figures are all bold or none.
    best = {target: max((a for (_, t), a in found.items() if t == target), key=float) for target in targets}
    rows: list[Values] = []
    for method in METHODS:
        cells = {target: found.get((method, target)) for target in targets}
        bold = {f"at_{target}": f"**{cell}**" for target, cell in cells.items() if cell == best[target]}
        rows.append({"method": method, **{f"at_{target}": cell for target, cell in cells.items()}, **bold})
    recovery = " or ".join(
        f"{epochs} epoch{'s' * (epochs > 1)}" for epochs in sorted({epochs for _, epochs in records.values()})
    )
    return markdown_table(
        " | ".join(["val accuracy % at density", *(f"{int(target) / 10:g} %" for target in targets)]),
        " | ".join(["{method}", *(f"{{at_{target}}}" for target in targets)]),
        rows,
        f"After the same recovery of {recovery}; the best of each column in bold.",
    )


def _recovered(record: Values) -> tuple[str, int]:
    """Return the accuracy as it is printed, and the epochs that were trained for it."""
    return f"{number(record['results']['val_accuracy_pct']):.2f}", int(number(record["arguments"]["epochs"]))


def _runtime_cases(measured: Values) -> list[Values]:
    """Return our int8 model and the best other one that counts, by threads and batch size."""
    cases: dict[tuple[int, int], list[Values]] = {}
    for row in measured["rows"]:
        cases.setdefault((row["threads"], row["batch_size"]), []).append(row)
    shown = []
    for (threads, batch_size), rows in sorted(cases.items()):
        # Such as "TorchScript int8" of "TorchScript int8, onednn".
        by_name = {row["model"].split(",")[0]: row for row in rows}
        best = min((row for row in rows if row["counts"]), key=lambda row: row["times_ours"], default=None)
        shown.append(
            {
                "threads": threads,
                "batch_size": batch_size,
                "ours_ms": by_name["TorchScript int8"]["median_latency_ms"],
                "float_ms": by_name["TorchScript float"]["median_latency_ms"],
                "best": best and best["model"],
                "best_ms": best and best["median_latency_ms"],
                # Not the quotient of the medians: the benchmark compares round by round.
                "ratio": best and 1 / best["times_ours"],
            }
        )
    return shown


def benchmark(
    record: str, script: str, rows: Callable[[Values], list[Values]], headers: str, template: str, note: str
) -> Callable[[Results], str]:
    """Return the block of a record that a script under benchmarks/ wrote."""

    def show(content: Values) -> str:
        filled = note.format_map(content | {"computer": computer(content)})
        return markdown_table(headers, template, rows(content["results"]), filled)

    name = f"benchmarks/{record}"
    command = f"benchmarks/{script} --record results/{name}.json"
    return lambda results: results.read(name, show) or missing(command)


AMP = ("ours_amp_images_per_s", "ours_amp_ratio")
"""Measured only on a CPU that computes in bfloat16."""
BLOCKS: dict[str, Callable[[Results], str]] = {
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
    **{
        f"runtimes_benchmark {stride}": benchmark(
            f"runtimes_os{stride}",
            f"runtimes.py --output_stride {stride}",
            _runtime_cases,
            "threads | batch size | ours, int8 ms | best other int8 ms | which | ours / best other "
            "| ours, float ms",
            "{threads} | {batch_size} | {ours_ms:.2f} | {best_ms:.2f} | {best} | {ratio:.2f} "
            "| {float_ms:.2f}",
            "Output stride {arguments[output_stride]}, medians of {arguments[rounds]} rounds on {cpu}, "
            "torch {versions[torch]}; a ratio below 1 means that ours is faster.",
        )
        for stride in (8, 32)
    },
}
"""By name; each makes the text of a block from the records."""
