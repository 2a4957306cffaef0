"""The README's smaller blocks, each made of one record or a few, as Markdown."""

import re
from typing import Any

from scripts.reporting.report_records import Results, computer, markdown_table, missing, number
from utils.common.errors import UserError
from utils.common.tables import NO_VALUE
from utils.pruning.allocation import METHODS

LAST_LINES = 9
OUR_INT8, OUR_FLOAT = "TorchScript int8", "TorchScript float"
"""How the names of our rows begin in a record of benchmarks/runtimes.py."""


def step(results: Results, argument: str) -> str:
    """`RECORD:SCRIPT`: the command of a step of the chain, its time, its last lines.

    Raises:
        UserError: there is no such record or step.
    """
    name, _, script = argument.partition(":")

    def show(record: dict[str, Any]) -> str | None:
        found = next((s for s in record["results"]["steps"] if s["script"] == script), None)
        if found is None:
            return None
        printed = [line for line in found["printed"] if line.strip()][-LAST_LINES:]
        seconds = f"{number(found['seconds']):.0f} s."
        return "\n".join(["```", f"$ {found['command']}", "…", *printed, "```", seconds, ""])

    text = results.need(name, show)
    if text is None:
        raise UserError(f"{results.folder / name}.json has no step {script}: write it again")
    return text


def chain_table(results: Results, argument: str) -> str:
    """`RECORD`: the closing table of the chain, each variant against float.

    Raises:
        UserError: there is no such record.
    """
    return results.need(argument, _show_chain)


def _show_chain(record: dict[str, Any]) -> str:
    variants = record["results"]["variants"]
    base = variants[0]
    rows = [
        [
            row["variant"],
            f"{row['accuracy_pct']:.2f}",
            f"{row['accuracy_pct'] - base['accuracy_pct']:+.2f}",
            f"{row['size_mb']:.2f}",
            f"{row['density']:.3f}",
            f"{row['latency_ms']:.2f}",
            f"{base['latency_ms'] / row['latency_ms']:.2f}×",
        ]
        for row in variants
    ]
    headers = ["variant", "accuracy %", "points", "size MB", "density", "latency ms", "speed-up"]
    where = f"{computer(record)}, seed {record['arguments']['seed']}"
    took = f"The whole chain took {record['results']['seconds']} s on {where}."
    return "\n".join([*markdown_table(headers, rows), "", took, ""])


def allocation_table(results: Results, _argument: str) -> str:
    """Accuracy on val by method (rows) and density (columns), from results/allocation; the best in bold.

    Raises:
        UserError: one of the records is none.
    """
    accuracies: dict[tuple[str, int], float] = {}
    epochs: set[int] = set()
    for name in results.names("allocation/*"):
        method, _, target = name.removeprefix("allocation/").rpartition("_")
        if method in METHODS and re.fullmatch(r"\d{3}", target):
            accuracies[method, int(target)], trained = results.need(name, _recovered)
            epochs.add(trained)
    if not accuracies:
        return missing("python scripts/reproduce.py")
    targets = sorted({target for _, target in accuracies}, reverse=True)
    # Rounded first, so that equal figures on the page are all bold or none.
    shown = {key: f"{accuracy:.2f}" for key, accuracy in accuracies.items()}
    best = {t: max((shown[key] for key in shown if key[1] == t), key=float) for t in targets}

    def cell(method: str, target: int) -> str:
        text = shown.get((method, target), NO_VALUE)
        return f"**{text}**" if text == best[target] else text

    methods = [method for method in METHODS if any(method == known for known, _ in accuracies)]
    rows = [[method, *(cell(method, target) for target in targets)] for method in methods]
    headers = ["val accuracy % at density", *(f"{target / 10:g} %" for target in targets)]
    recovery = " or ".join(str(count) for count in sorted(epochs))
    unit = "epoch" if epochs == {1} else "epochs"
    note = f"After the same recovery of {recovery} {unit}; the best of each column in bold."
    return "\n".join([*markdown_table(headers, rows), "", note, ""])


def _recovered(record: dict[str, Any]) -> tuple[float, int]:
    return number(record["results"]["val_accuracy_pct"]), int(number(record["arguments"]["epochs"]))


def training_benchmark(results: Results, _argument: str) -> str:
    """What benchmarks/training.py measured.

    Raises:
        UserError: the record is none.
    """
    text = results.take("benchmarks/training", _show_training)
    return text or missing("python benchmarks/training.py --record results/benchmarks/training.json")


def _show_training(record: dict[str, Any]) -> str:
    rows = [
        [
            str(case["output_stride"]),
            str(case["batch_size"]),
            f"{case['usual_images_per_s']:.0f}",
            f"{case['ours_images_per_s']:.0f}",
            f"{case['ours_ratio']:.2f}×",
            # Only where the CPU computes with bfloat16.
            f"{case['ours_amp_images_per_s']:.0f}" if "ours_amp_ratio" in case else NO_VALUE,
            f"{case['ours_amp_ratio']:.2f}×" if "ours_amp_ratio" in case else NO_VALUE,
        ]
        for case in record["results"]["cases"]
    ]
    headers = [
        "output stride",
        "batch size",
        "usual, images/s",
        "ours, images/s",
        "ours / usual",
        "ours with --amp",
        "with --amp / usual",
    ]
    note = f"Medians of {record['arguments']['rounds']} rounds on {computer(record)}."
    return "\n".join([*markdown_table(headers, rows), "", note, ""])


def scan_benchmark(results: Results, _argument: str) -> str:
    """What benchmarks/sensitivity_scan.py measured.

    Raises:
        UserError: the record is none.
    """
    text = results.take("benchmarks/sensitivity_scan", _show_scan)
    return text or missing(
        "python benchmarks/sensitivity_scan.py --record results/benchmarks/sensitivity_scan.json"
    )


def _show_scan(record: dict[str, Any]) -> str:
    measured = record["results"]
    rows = [
        [way, f"{seconds:.1f}", f"{1000 * seconds / measured['rows']:.0f}"]
        for way, seconds in measured["seconds"].items()
    ]
    note = (
        f"{measured['ratio']:.2f} times as fast for {measured['rows']} rows over {measured['images']} "
        f"images, every row the same, on {computer(record)}."
    )
    return "\n".join([*markdown_table(["scan", "s", "ms a row"], rows), "", note, ""])


def runtimes_benchmark(results: Results, output_stride: str) -> str:
    """What benchmarks/runtimes.py measured: our int8 against the best other that counts, by case.

    Raises:
        UserError: the record is none.
    """
    name = f"benchmarks/runtimes_os{output_stride}"
    return results.take(name, _show_runtimes) or missing(
        f"python benchmarks/runtimes.py --output_stride {output_stride} --record results/{name}.json"
    )


def _show_runtimes(record: dict[str, Any]) -> str:
    cases: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in record["results"]["rows"]:
        cases.setdefault((row["threads"], row["batch_size"]), []).append(row)
    headers = ["threads", "batch size", "ours, int8 ms", "best other int8 ms", "which", "ours / best other",
               "ours, float ms", "% of the limit"]  # fmt: skip
    rows = [[*map(str, case), *_compare_runtimes(rows)] for case, rows in sorted(cases.items())]
    versions = record["versions"]
    note = (
        f"Output stride {record['arguments']['output_stride']}, medians of {record['arguments']['rounds']} "
        f"rounds on {record['cpu']}, torch {versions['torch']}; "
        f"a ratio below 1 means that ours is faster."
    )
    return "\n".join([*markdown_table(headers, rows), "", note, ""])


def _compare_runtimes(rows: list[dict[str, Any]]) -> list[str]:
    """The cells of a case behind threads and batch size."""
    ours = _row_of(rows, OUR_INT8)
    counted = [row for row in rows if row["counts"]]
    other = [NO_VALUE] * 3
    if counted:
        best = min(counted, key=lambda row: row["times_ours"])
        # Not the quotient of the medians: the benchmark compares round by round.
        other = [f"{best['median_latency_ms']:.2f}", best["model"], f"{1 / best['times_ours']:.2f}"]
    share = ours["limit_pct"]
    return [
        f"{ours['median_latency_ms']:.2f}",
        *other,
        f"{_row_of(rows, OUR_FLOAT)['median_latency_ms']:.2f}",
        NO_VALUE if share is None else f"{share:.1f}",
    ]


def _row_of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = [row for row in rows if row["model"].startswith(name)]
    if not found:
        raise ValueError(f"a case without a row of {name}")
    return found[0]
