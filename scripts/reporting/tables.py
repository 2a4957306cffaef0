"""Tables of the records under results/, as Markdown; the same records give the same text."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from string import Formatter
from typing import Any

from utils.common.errors import UserError
from utils.common.tables import NO_VALUE
from utils.pruning.allocation import METHODS

Values = dict[str, Any]
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
NOT_MEASURED = "*Not measured yet: `python {}` does it.*\n"
"""What a block says until that command has written its record."""


def read(results: Path, pattern: str) -> dict[str, Values]:
    """Return the records in the folder whose names match, by name in alphabetical order.

    Raises:
        UserError: a file is not JSON.
    """
    found = {}
    for path in sorted(results.glob(f"{pattern}.json")):
        try:
            found[path.relative_to(results).with_suffix("").as_posix()] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not a valid record ({error}): write it again") from error
    return found


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


def number(value: object) -> float:
    """Return a value of a record; raise ValueError if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value


def model_rows(results: Path) -> tuple[list[Values], str]:
    """Return the values of each recorded model in order, and a note on how they were measured.

    Raises:
        UserError: a record is not of the test split.
    """
    published = read(results, "published").get("published", {"rows": []})
    rows = [_published(row) for row in published["rows"]]
    evaluated = read(results, "evaluate/*")
    if not evaluated:
        return rows, NOT_MEASURED.format("scripts/reproduce.py").strip()
    runs: dict[str, list[Values]] = {}
    for path, record in evaluated.items():
        if record["results"]["split"] != "test":
            raise UserError(f"{path}.json is of the split {record['results']['split']}: evaluate on test")
        runs.setdefault(re.sub(r"^evaluate/|_s\d+$", "", path), []).append(record)
    latency = read(results, "latency").get("latency")
    rows_timed = latency["results"]["files"] if latency else ()
    timed = {os.path.normpath(row["file"]): row for row in rows_timed}
    for name in sorted(runs, key=_identify):
        row = _names(name, "ours", *_identify(name)[1:])
        row |= {key: fmean(number(run["results"][key]) for run in runs[name]) for key in FIGURES}
        files = [os.path.normpath(run["arguments"]["weights"]) for run in runs[name]]
        row |= next((timed[file] for file in files if file in timed), {})
        if "float" in runs:
            # + 0.0 turns -0.0 into 0.0.
            dense = number(runs["float"][0]["results"]["accuracy_pct"])
            row["points"] = round(row["accuracy_pct"] - dense, 2) + 0.0
        if f"evaluate/{name}" not in evaluated:
            row["label"] += f", n = {len(runs[name])}"
        if len(runs[name]) > 1:
            row["spread"] = f" ± {stdev(run['results']['accuracy_pct'] for run in runs[name]):.2f}"
        rows.append(row)
    note = f"Our accuracies were measured on {'; '.join(sorted({*map(computer, evaluated.values())}))}."
    if latency:
        note += f" Our latencies are at batch size {latency['results']['batch_size']} on {computer(latency)}."
    if any(row["spread"] for row in rows):
        note += " ± is the sample standard deviation over n seeds."
    # --dataset cifar10 has the official pixels; the folder of images is the JPEG copy.
    if any(record["arguments"]["dataset"] == "folder" for record in evaluated.values()):
        note += " Our numbers are from a JPEG copy (quality 75) of CIFAR-10, not from the official pixels."
    return rows, note


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
    return names | {"spread": ""} | dict.fromkeys(("points", "macs", "median_latency_ms", "p90_latency_ms"))


def _published(row: Values) -> Values:
    name, form = f"published/{row['model']}", row["model"].replace("pruned", "float")
    names = _names(name, "published", 100 * row["density"], form)
    # Points as published; its accuracies do not always give them.
    figures = {"points": row["change_points"], "file_size_mb": row["size_mb"]}
    return names | row | figures | {"median_latency_ms": row["latency_ms"]}


def headline(results: Path) -> str:
    """Return the result of the project in a sentence, and the rows of HEADLINE; raises as `model_rows`."""
    rows, note = model_rows(results)
    by_name = {row["name"]: row for row in rows}
    shown = [by_name[name] for name in HEADLINE if name in by_name]
    sentence = ""
    if len(shown) == len(HEADLINE):
        _, published, _, _, ours, *_, smallest = shown
        sentence = (
            f"**{ours['accuracy_pct']:.2f} % on CIFAR-10 in an int8 file of {ours['file_size_mb']:.3g} MB, "
            f"{ours['median_latency_ms']:.3g} ms per image on one CPU core; "
            f"{smallest['accuracy_pct']:.2f} % in {smallest['file_size_mb']:.3g} MB.** Published: "
            f"{published['accuracy_pct']:.2f} % in {published['file_size_mb']:.3g} MB, "
            f"{published['median_latency_ms']:.3g} ms.\n\n"
        )
    return sentence + markdown_table(
        "model | test accuracy % | points vs float | size MB | latency ms",
        "{label} | {accuracy_pct:.2f}{spread} | {points:+.2f} | {file_size_mb:.3g} | {median_latency_ms:.3g}",
        shown,
        note,
    )


def allocation_table(results: Path) -> str:
    """Return accuracy on val by method (rows) and density (columns), the best of each column in bold."""
    records = read(results, "allocation/*_[0-9][0-9][0-9]")
    if not records:
        return NOT_MEASURED.format("scripts/reproduce.py")
    (epochs,) = {record["arguments"]["epochs"] for record in records.values()}
    targets = sorted({name[-3:] for name in records}, reverse=True)
    rows: list[Values] = [{"method": method} for method in METHODS]
    for target in targets:
        of_target = [records.get(f"allocation/{method}_{target}") for method in METHODS]
        # Rounded, so that equal figures are all bold or none.
        cells = [
            f"{number(found['results']['val_accuracy_pct']):.2f}" if found else None for found in of_target
        ]
        best = max(filter(None, cells), key=float)
        for row, cell in zip(rows, cells, strict=True):
            row[f"at_{target}"] = f"**{cell}**" if cell == best else cell
    return markdown_table(
        " | ".join(["val accuracy % at density", *(f"{int(target) / 10:g} %" for target in targets)]),
        " | ".join(["{method}", *(f"{{at_{target}}}" for target in targets)]),
        rows,
        f"After the same recovery of {epochs} epoch{'s' * (epochs > 1)}; the best of each column in bold.",
    )


def _runtime_cases(measured: Values) -> list[Values]:
    """Return our int8 model and the best other one that counts, by threads and batch size."""
    cases: dict[tuple[int, int], list[Values]] = {}
    for row in measured["rows"]:
        cases.setdefault((row["threads"], row["batch_size"]), []).append(row)
    shown = []
    for (threads, batch_size), rows in sorted(cases.items()):
        # Such as "TorchScript int8" of "TorchScript int8, onednn".
        ms = {row["model"].split(",")[0]: row["median_latency_ms"] for row in rows}
        best = min((row for row in rows if row["counts"]), key=lambda row: row["times_ours"], default=None)
        case = {"threads": threads, "batch_size": batch_size, "best": None, "best_ms": None, "ratio": None}
        case |= {"ours_ms": ms["TorchScript int8"], "float_ms": ms["TorchScript float"]}
        if best:
            # Not the quotient of the medians: the benchmark compares round by round.
            ratio = 1 / best["times_ours"]
            case |= {"best": best["model"], "best_ms": best["median_latency_ms"], "ratio": ratio}
        shown.append(case)
    return shown


def _training_cases(measured: Values) -> list[Values]:
    """Return the cases, with None for what a CPU without bfloat16 or an older record lacks."""
    amp = ("without_kernels_amp_images_per_s", "ours_amp_images_per_s", "ours_amp_ratio")
    return [dict.fromkeys((*amp, "kernels_ratio")) | case for case in measured["cases"]]


def benchmark(
    record: str, script: str, rows: Callable[[Values], list[Values]], headers: str, template: str, note: str
) -> Callable[[Path], str]:
    """Return the block of a record that a script under benchmarks/ wrote."""
    name = f"benchmarks/{record}"

    def block(results: Path) -> str:
        content = read(results, name).get(name)
        if content is None:
            return NOT_MEASURED.format(f"benchmarks/{script} --record results/{name}.json")
        filled = note.format_map(content | {"computer": computer(content)})
        return markdown_table(headers, template, rows(content["results"]), filled)

    return block


BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "results_table": lambda results: markdown_table(
        "model | test accuracy % | points vs float | MACs | size MB | density | latency ms (median) | p90 ms",
        "{label} | {accuracy_pct:.2f}{spread} | {points:+.2f} | {macs:,.0f} | {file_size_mb:.3g} "
        "| {density:.3f} | {median_latency_ms:.3g} | {p90_latency_ms:.3g}",
        *model_rows(results),
    ),
    "allocation_table": allocation_table,
    "training_benchmark": benchmark(
        "training",
        "training.py",
        _training_cases,
        "output stride | batch size | usual, images/s | ours, images/s | ours / usual "
        "| ours with --amp | with --amp / usual",
        "{output_stride} | {batch_size} | {usual_images_per_s:.0f} | {ours_images_per_s:.0f} "
        "| {ours_ratio:.2f}× | {ours_amp_images_per_s:.0f} | {ours_amp_ratio:.2f}×",
        "Medians of {arguments[rounds]} rounds on {computer}.",
    ),
    "training_ablation": benchmark(
        "training_ablation",
        "training.py --ablation",
        _training_cases,
        "output stride | batch size | without kernels | without, --amp | with kernels | with, --amp "
        "| fastest with / fastest without",
        "{output_stride} | {batch_size} | {without_kernels_images_per_s:.0f} "
        "| {without_kernels_amp_images_per_s:.0f} | {ours_images_per_s:.0f} | {ours_amp_images_per_s:.0f} "
        "| {kernels_ratio:.2f}×",
        "Images per second, medians of {arguments[rounds]} rounds on {computer}.",
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
