import json

import pytest

from scripts.report import Results, fill
from utils.errors import UserError

RECORD = {
    "command": "python scripts/demo.py",
    "arguments": {"seed": 3},
    "versions": {"torch": "2.9", "torchvision": "0.24"},
    "cpu": "A CPU",
    "threads": 2,
    "results": {
        "seconds": 61,
        "variants": [
            {"variant": "float", "accuracy_pct": 90.0, "size_mb": 9.0, "density": 1.0, "latency_ms": 3.0},
            {"variant": "int8", "accuracy_pct": 89.5, "size_mb": 2.5, "density": 0.5, "latency_ms": 0.75},
        ],
        "steps": [
            {"script": "train.py", "command": "python train.py", "seconds": 12.4, "printed": ["a", "", "b"]}
        ],
    },
}
README = """# x
<!-- begin chain_table demo -->
old
<!-- end chain_table -->
kept
<!-- begin step demo:train.py -->
<!-- end step -->
"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(RECORD))
    return Results(tmp_path)


def test_blocks_are_made_of_the_results_alone(results):
    filled = fill(README, results)
    assert "old" not in filled
    assert "kept" in filled
    assert "| int8 | 89.50 | -0.50 | 2.50 | 0.500 | 0.75 | 4.00× |" in filled
    assert "61 s on A CPU, 2 threads, torch 2.9, torchvision 0.24, seed 3" in filled
    assert "$ python train.py\n…\na\nb\n```\n12 s." in filled
    assert fill(filled, results) == filled


def test_what_is_missing_is_named(results):
    with pytest.raises(UserError, match=r"nothing\.json"):
        fill(README.replace("demo", "nothing"), results)
    with pytest.raises(UserError, match=r"prune\.py"):
        fill(README.replace("train.py", "prune.py"), results)
    with pytest.raises(UserError, match="unknown"):
        fill(README.replace("chain_table", "chair_table"), results)
