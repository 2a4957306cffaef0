"""The CSV that says how much of each layer to keep; people edit it by hand.

Its column `sparsity` is the fraction of the layer's weights that are KEPT: 1.0 prunes nothing, 0.0 prunes the
whole layer. The code calls this number keep_ratio, and a file may use that name for the column too.
"""

import os
from collections.abc import Collection, Iterable, Sequence

from models.statistics import LayerStatistics
from utils.common.csv_files import Row, read_csv, suggest, write_csv
from utils.common.errors import UserError

COLUMNS = ("layer", "sparsity")
ALIASES = {"keep_ratio": "sparsity"}
# These help a person decide; the reader ignores them.
READ_ONLY_COLUMNS = ("shape", "parameters", "macs")
MEANING = "sparsity is the fraction of weights KEPT: 1.0 prunes nothing, 0.0 prunes the whole layer"
MADE_BY = "scripts/generate_sparsity_dict_template.py"


def describe_layers(layers: Iterable[LayerStatistics]) -> dict[str, Sequence[object]]:
    """Return the cells of READ_ONLY_COLUMNS by layer; shape 32x3x3x3 is 32 filters of 3x3 over 3 channels."""
    return {layer.name: ("x".join(map(str, layer.shape)), layer.parameters, layer.macs) for layer in layers}


def write_sparsity_dict(
    path: str | os.PathLike, keep_ratios: dict[str, float], descriptions: dict[str, Sequence[object]]
) -> None:
    """Write one row per layer, in the order of `keep_ratios`.

    Args:
        path: the CSV to write.
        keep_ratios: fraction to keep by layer, in forward order.
        descriptions: from `describe_layers`.

    Raises:
        UserError: the file cannot be written.
    """
    rows = ((name, float(ratio), *descriptions[name]) for name, ratio in keep_ratios.items())
    write_csv(path, COLUMNS + READ_ONLY_COLUMNS, rows)


def read_sparsity_dict(path: str | os.PathLike, layers: Collection[str]) -> dict[str, float]:
    """Return the fraction to keep of each of `layers`, in their order.

    Raises:
        UserError: the file is not such a table, a layer is unknown, missing or listed twice, or a value
            is not a number from 0 to 1.
    """
    rows: dict[str, Row] = {}
    for row in read_csv(path, "sparsity dict", COLUMNS, MADE_BY, ALIASES):
        if "recommended_sparsity" in row.cells:
            raise UserError(
                f"{path} is a scanning log: turn it into a sparsity dict with "
                f"scripts/scanning_log_to_sparsity_dict_template.py --f {path}"
            )
        name = row["layer"]
        if name not in layers:
            raise row.error("layer", f"the model has no layer {name!r}{suggest(name, layers)}")
        if name in rows:
            raise row.error(
                "layer", f"{name} already has a row in line {rows[name].line}: remove one of the two"
            )
        rows[name] = row
    keep_ratios = {name: row.fraction("sparsity", name) for name, row in rows.items()}
    missing = [name for name in layers if name not in rows]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path} has no row for layer {missing[0]}{others}: add it, with 1.0 to leave it unpruned"
        )
    return {name: keep_ratios[name] for name in layers}
