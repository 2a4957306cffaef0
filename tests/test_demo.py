import json

import pytest

from scripts.demo import format_summary


@pytest.fixture(scope="module")
def chain(run_script, tmp_path_factory):
    """The chain of `make demo` with a narrower model and fewer epochs."""
    folder = tmp_path_factory.mktemp("demo")
    # One thread: two wait for each other where the machine is busy.
    options = "--width_mult 0.35 --epochs 6 --recovery_epochs 1 --qat_epochs 1 --sparsities 0.5 --rounds 20"
    printed = run_script("scripts/demo.py", "--output_dir", folder, *options.split(), "--threads", 1).stdout
    return folder, printed, json.loads((folder / "summary.json").read_text())["results"]


def test_int8_is_within_a_point_and_a_half_of_the_float_model_it_was_made_from(chain):
    _, _, results = chain
    accuracy_pct = {row["variant"]: row["accuracy_pct"] for row in results["variants"]}
    assert accuracy_pct["float"] > 60
    assert accuracy_pct["pruned, PTQ per tensor"] >= accuracy_pct["pruned"] - 1.5
    assert accuracy_pct["pruned, PTQ per channel"] >= accuracy_pct["pruned"] - 1.5
    assert accuracy_pct["pruned, QAT"] >= accuracy_pct["pruned"] - 1.5


def test_sizes_and_densities_follow_from_what_was_done(chain):
    _, _, results = chain
    rows = {row["variant"]: row for row in results["variants"]}
    assert rows["float"]["density"] == 1.0
    assert rows["pruned"]["density"] < 0.95
    assert rows["pruned"]["size_mb"] == pytest.approx(rows["float"]["size_mb"], rel=0.02)
    for name in ("pruned, PTQ per tensor", "pruned, PTQ per channel", "pruned, QAT"):
        assert rows[name]["density"] < 0.95
        assert rows[name]["size_mb"] < rows["float"]["size_mb"] / 2
        assert rows[name]["latency_ms"] > 0


def test_each_step_is_told_with_its_command_and_the_table_closes_the_run(chain):
    folder, printed, results = chain
    assert [step["script"] for step in results["steps"]] == [
        "train.py",
        "scripts/generate_sparsity_dict_template.py",
        "scripts/sensitivity_scan.py",
        "scripts/scanning_log_to_sparsity_dict_template.py",
        "prune.py",
        "scripts/to_qmodel_weights.py",
        "post_training_quantization.py",
        "quantization_aware_training.py",
        *["evaluate.py"] * 5,
        "scripts/benchmarks.py",
    ]
    for number, step in enumerate(results["steps"], 1):
        assert f"[{number}/14] {step['title']}\n$ {step['command']}" in printed
    assert format_summary(results["variants"]) in printed
    assert printed.rstrip().endswith(f"everything is in {folder}")
