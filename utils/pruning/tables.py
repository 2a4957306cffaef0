"""Tables and lines that describe a pruned model: weights per layer, density, accuracy."""

from models.statistics import ModelStatistics
from utils.common.tables import format_table
from utils.evaluation import Evaluation
from utils.pruning.pruner import FineGrainedPruner


def format_layers(pruner: FineGrainedPruner) -> str:
    """Return a table of the kept and total weights of each layer."""
    rows = [(name, kept, pruner.masks[name].numel()) for name, kept in pruner.kept().items()]
    rows.append(("all layers", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    with_ratios = [(*row, f"{row[1] / row[2]:.4f}") for row in rows]
    return format_table(["layer", "kept", "total", "sparsity (kept)"], with_ratios)


def format_density(statistics: ModelStatistics) -> str:
    """Return one line about the fraction of all parameters that are nonzero."""
    return (
        f"density {100 * statistics.density:.2f} % "
        f"({statistics.nonzeros} of {statistics.parameters} parameters are not zero): "
        f"{statistics.nonzero_size_mb:.2f} MB of {statistics.dense_size_mb:.2f} MB by nonzeros"
    )


def format_accuracies(results: dict[str, Evaluation]) -> str:
    """Return a table of the test accuracy of each model and its change from the first model."""
    first_pct = next(iter(results.values())).accuracy_pct
    rows = [
        (name, e.accuracy_pct, f"{e.accuracy_pct - first_pct:+.2f}", e.correct, e.total, f"{e.loss:.4f}")
        for name, e in results.items()
    ]
    return format_table(["model", "test %", "change", "correct", "images", "loss"], rows)
