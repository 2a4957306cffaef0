import importlib
import json
import re
from pathlib import Path

import pytest

from scripts import reproduce
from scripts.reproduce import Step, steps

DATA = ["--dataset", "folder", "--data_dir", "images"]
PLAN = steps(DATA)


def parse(step: Step):
    module = importlib.import_module(step.script.removesuffix(".py").replace("/", "."))
    return module.get_args_parser().parse_args(step.arguments())


@pytest.mark.parametrize("step", PLAN, ids=lambda step: f"{step.script}:{step.output}")
def test_a_step_is_a_command_that_its_script_takes(step, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = vars(parse(step))
    assert arguments["force"]
    assert arguments.get("record") == (str(step.record) if step.record else None)
    written = {arguments.get(flag) for flag in ("output", "o", "output_dir", "record")}
    assert str(step.output) in written


def test_no_step_needs_what_only_a_later_one_makes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = set()
    for step in PLAN:
        arguments = vars(parse(step))
        for flag in ("weights", "sparsity_dict", "teacher", "scanning_log", "model_file"):
            given = arguments.get(flag) or []
            for path in given if isinstance(given, list) else [given]:
                assert path in made or str(Path(path).parent) in made, f"{step.title} needs {path}"
        made.add(str(step.output))
    assert len({step.record for step in PLAN if step.record}) == len([s for s in PLAN if s.record])


def test_an_interrupted_training_is_resumed_beside_an_older_record(tmp_path):
    output = tmp_path / "m.pth"
    step = Step("a", 1, "train.py", ("--output", output), output, tmp_path / "record.json")
    assert "--resume" not in step.arguments()
    (tmp_path / "m.checkpoint.pth").touch()
    assert {"--resume", "--force"} <= set(step.arguments())


def test_the_list_names_every_command_and_its_time(run_script):
    printed = run_script("scripts/reproduce.py", "--list", *DATA).stdout
    assert len(re.findall(r"^\[\d+/\d+\] .*, about [\d.]+ minutes?$", printed, re.MULTILINE)) == len(PLAN)
    assert printed.count("\n  python ") == len(PLAN)


def test_a_step_that_was_run_by_the_same_command_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    record = Path("record.json")
    step = Step("a", 1, "evaluate.py", ("--weights", "w.pth"), record, record)
    other = Step("b", 1, "evaluate.py", ("--weights", "other.pth"), record, record)
    assert not step.is_done()
    record.write_text(
        json.dumps({"command": "python evaluate.py --weights w.pth --record record.json --threads 2 --force"})
    )
    assert step.is_done()
    assert not other.is_done()
    monkeypatch.setattr(reproduce, "steps", lambda data: [step, other])
    run = []
    monkeypatch.setattr(reproduce, "run_script", lambda heading, script, *argv: run.append(argv))
    reproduce.main(reproduce.get_args_parser().parse_args([]))
    assert run == [("--weights", "other.pth", "--record", "record.json", "--force")]
    assert "[1/2] a, about 1 minute: done before" in capsys.readouterr().out
