import importlib
import json
import re
from pathlib import Path

import pytest

from scripts import reproduce
from scripts.reproduce import FREE_FLAGS, Step, steps
from tests.conftest import REPOSITORY

DATA = ["--dataset", "folder", "--data_dir", "images"]
PLAN = steps(DATA)
RENAMED = {
    *("float_os8", "float_os8_cutout", "float_os16_cutout", "float_os16_longer", "float_os8_taught"),
    "prune_271_shorter",
}
"""Records of trainings whose files had other names, since what came later took theirs."""


def parse(step: Step):
    script, *argv = step.arguments()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return module.get_args_parser().parse_args(argv)


@pytest.mark.parametrize("step", PLAN, ids=lambda step: f"{step.command[0]}:{step.command[-1]}")
def test_a_step_is_a_command_that_its_script_takes(step, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = vars(parse(step))
    assert arguments["force"]
    assert arguments.get("record") == next(map(str, step.files("--record")), None)
    assert {arguments.get(flag) for flag in ("output", "o", "output_dir", "record")} - {None}


def test_no_step_needs_what_only_a_later_one_makes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = set()
    for step in PLAN:
        arguments = vars(parse(step))
        for flag in ("weights", "sparsity_dict", "teacher", "scanning_log", "model_file"):
            given = arguments.get(flag) or []
            for path in given if isinstance(given, list) else [given]:
                assert path in made or str(Path(path).parent) in made, f"{step.command} needs {path}"
        made.update(map(str, step.files("--output", "--o", "--output_dir")))
    records = [path for step in PLAN for path in step.files("--record")]
    assert len(set(records)) == len(records)


def test_the_commands_are_those_that_made_the_results(monkeypatch):
    monkeypatch.setattr(reproduce, "is_fast_in_bfloat16", lambda: True)
    compared = 0
    for step in steps(["--dataset", "folder", "--data_dir", "data/cifar10-jpeg"]):
        for record in [path for path in step.files("--record") if path.parts[0] == "results"]:
            recorded = json.loads((REPOSITORY / record).read_text())["command"]
            both = [
                FREE_FLAGS.sub("", command) for command in (recorded, " ".join(["python", *step.command]))
            ]
            if record.stem in RENAMED:
                both = [re.sub(r"(runs|weights|results)/\S+", "FILE", command) for command in both]
            assert both[0] == both[1]
            compared += 1
    assert compared == 71


def test_an_interrupted_training_is_resumed_beside_an_older_record(tmp_path):
    step = Step(
        1, ["train.py", "--output", str(tmp_path / "m.pth"), "--record", str(tmp_path / "record.json")]
    )
    assert "--resume" not in step.arguments()
    (tmp_path / "m.checkpoint.pth").touch()
    assert {"--resume", "--force"} <= set(step.arguments())


def test_the_list_names_every_command_and_its_time(run_script):
    printed = run_script("scripts/reproduce.py", "--list", *DATA).stdout
    assert (
        len(re.findall(r"^\[\d+/\d+\] about [\d.]+ minutes?\n  python \S+\.py ", printed, re.MULTILINE))
        == 120
    )
    assert len(PLAN) == 120


def test_a_step_that_was_run_by_the_same_command_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    record = Path("record.json")
    step = Step(1, ["evaluate.py", "--weights", "w.pth", "--record", "record.json"])
    other = Step(0.5, ["evaluate.py", "--weights", "other.pth", "--record", "record.json"])
    assert not step.is_done()
    record.write_text(
        json.dumps({"command": "python evaluate.py --weights w.pth --record record.json --threads 2 --force"})
    )
    assert step.is_done()
    assert not other.is_done()
    assert not Step(1, [*step.command, "--output", "missing.pth"]).is_done()
    monkeypatch.setattr(reproduce, "steps", lambda data: [step, other, step])
    run = []
    monkeypatch.setattr(reproduce, "run_script", lambda heading, *command: run.append(command))
    reproduce.main(reproduce.get_args_parser().parse_args([]))
    # What follows a step that was run is run as well.
    assert run == [(*other.command, "--force"), (*step.command, "--force")]
    assert "[1/3] about 1 minute: done before: python evaluate.py" in capsys.readouterr().out


def test_what_reproduce_has_run_is_skipped(run_script, tiny_folder, tiny_weights, monkeypatch, tmp_path):
    data = ["--dataset", "folder", "--data_dir", str(tiny_folder)]
    record = tmp_path / "evaluated.json"
    step = Step(1, ["evaluate.py", *data, "--weights", str(tiny_weights), "--record", str(record)])
    monkeypatch.chdir(REPOSITORY)
    reproduce.run_script("evaluate", *step.arguments())
    assert step.is_done()


def test_a_failing_step_stops_the_run(monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    failing = Step(1, ["evaluate.py", "--weights", "missing.pth"])
    monkeypatch.setattr(reproduce, "steps", lambda data: [failing, failing])
    with pytest.raises(reproduce.errors.UserError, match=r"evaluate\.py ended with exit code 2"):
        reproduce.main(reproduce.get_args_parser().parse_args([]))
    captured = capfd.readouterr()
    assert captured.out.count("$ python evaluate.py --weights missing.pth --force") == 1
    assert "missing.pth" in captured.err
