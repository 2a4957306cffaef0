"""Argument types, and what holds for the command line of every script."""

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from utils.common import cli, distributed, errors

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = (REPOSITORY, REPOSITORY / "scripts", REPOSITORY / "benchmarks")
SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for folder in FOLDERS
    for path in folder.glob("*.py")
    if "__main__" in path.read_text()
)


@pytest.mark.parametrize(
    ("kind", "accepted", "refused"),
    [
        (cli.positive_int, {"1": 1, " 12 ": 12}, ["0", "-1", "1.5", "1e3", "nan", "", "x", "1" + "0" * 400]),
        (cli.non_negative_int, {"0": 0, "7": 7}, ["-1", "0.5", "inf", "1000001"]),
        (cli.seed, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "4294967296", "x"]),
        (cli.thread_count, {"1": 1, "64": 64}, ["0", "-2", "100000", "two"]),
        (cli.positive_float, {"0.1": 0.1, "1e-4": 1e-4}, ["0", "-0.1", "nan", "inf", "1e400", "0,1"]),
        (cli.non_negative_float, {"0": 0.0, "5e-4": 5e-4}, ["-1e-9", "nan", "-inf"]),
        (cli.fraction, {"0": 0.0, "1": 1.0, "0.5": 0.5}, ["-0.1", "1.0001", "nan", "50%"]),
        (cli.fraction_below_one, {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "nan"]),
        (cli.percent, {"1": 1.0, "70": 70.0, "100": 100.0}, ["0.7", "0", "-5", "100.5", "nan", "70%"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_argument_types(kind, accepted, refused):
    for text, value in accepted.items():
        assert kind(text) == value
        assert type(kind(text)) is type(value)
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be|in percent"):
            kind(text)


def parser_with_flags() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("What it is for.\n\nMore for readers.")
    parser.add_argument("--epochs", type=cli.positive_int, default=24, help="passes over the images")
    parser.add_argument("--limit", type=cli.positive_int, help="at most so many (default: all)")
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    cli.add_force_argument(parser)
    cli.add_record_argument(parser)
    return parser


def test_help_is_the_first_paragraph_and_the_defaults():
    text = " ".join(parser_with_flags().format_help().split())
    assert "What it is for." in text
    assert "More for readers" not in text
    assert "passes over the images (default: 24)" in text
    assert "at most so many (default: all)" in text
    assert "seed of every random generator (default: 0)" in text
    assert "None" not in text
    assert "False" not in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--epochs", "-3"], "'-3' must be a whole number from 1 to"),
        (["--epochs"], "expected one argument"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3: did you mean --epochs?"),
        (["--datadir=x"], "did you mean --data_dir?"),
        (["--nothing_like_it"], "--nothing_like_it (see --help)"),
        (["--two\nlines"], "unrecognized arguments: --two lines"),
        (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    ],
)
def test_bad_arguments_end_in_one_line_and_exit_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_with_flags().parse_args(argv)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert said in captured.err


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.UserError("a.pth is bad:\n give another"), 2, "error: a.pth is bad: give another"),
        (KeyboardInterrupt("3 epochs are saved"), 130, "interrupted: 3 epochs are saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "error: out of memory: give a smaller --batch_size or --image_size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
            2,
            "error: out of memory: give a smaller --batch_size or --image_size",
        ),
    ],
)
def test_how_a_script_ends(error, code, line, capsys):
    with pytest.raises(SystemExit) as ended:
        errors.run(raises(error))
    assert ended.value.code == code
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug")])
def test_a_bug_is_not_made_to_look_like_bad_input(error):
    with pytest.raises(type(error), match="a bug"):
        errors.run(raises(error))


def run_python(code: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_a_reader_that_goes_away_is_no_error_to_complain_about():
    code = "from utils.common import errors; errors.run(lambda: [print(i) for i in range(100000)])"
    process = run_python(code)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_a_reader_that_goes_away_before_the_last_lines():
    code = "from utils.common import errors; errors.run(lambda: print(input()))"
    # Buffered, so few lines are written only when the script ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = run_python(code, stdin=subprocess.PIPE, env=environment)
    process.stdout.close()
    process.stdin.write("line\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_sigterm_ends_a_script_as_ctrl_c_does(tmp_path):
    target = tmp_path / "file"
    code = (
        "import sys, time; from utils.common import errors, files\n"
        "def main():\n"
        f"    with files.atomic_write({str(target)!r}) as path:\n"
        "        path.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
        "errors.run(main)\n"
    )
    process = run_python(code)
    assert process.stdout.readline() == "writing\n"
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_there_are_scripts_to_test():
    assert {"train.py", "evaluate.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_and_an_unknown_one_ends_in_one_line(script, capsys):
    parser = runpy.run_path(str(REPOSITORY / script), run_name="imported")["get_args_parser"]()
    assert isinstance(parser, cli.ArgumentParser)
    flags = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    text = " ".join(parser.format_help().split())
    for action in flags:
        name = action.option_strings or action.dest
        assert action.help, f"{script} {name} has no help"
        for option in action.option_strings:
            assert option == option.lower(), option
            assert "-" not in option.lstrip("-"), f"{option}: flags are written with underscores"
        if isinstance(action.default, int | float | str) and action.default is not False:
            assert f"(default: {action.default})" in text, f"{script} {name} does not show its default"
    assert "(default: None)" not in text
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--no_such_flag"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_from_the_repositorys_root(run_script, script):
    shown = run_script(script, "--help")
    assert shown.stdout.startswith(f"usage: {Path(script).name}")
    assert shown.stderr == ""


def test_help_imports_nothing_heavy_but_torch():
    """Then it takes as long as `import torch`; torchvision and pandas would take as long again."""
    code = f"""
import runpy, sys
sys.path.insert(0, {str(REPOSITORY)!r})
for script in {SCRIPTS}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path({str(REPOSITORY)!r} + "/" + script, run_name="__main__")
    except SystemExit:
        pass
    heavy = {{"torchvision", "pandas", "matplotlib", "onnx"}} & set(sys.modules)
    assert not heavy, (script, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_does_nothing(tmp_path):
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for package in ("models", "utils")
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert len(modules) > 15
    code = f"""
import importlib, random, runpy, sys
import matplotlib, numpy, torch
sys.path.insert(0, {str(REPOSITORY)!r})
def state():
    return (torch.get_num_threads(), torch.backends.quantized.engine, torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.initial_seed(), random.getstate(),
            str(numpy.random.get_state()), dict(matplotlib.rcParams))
before = state()
for module in {modules}:
    importlib.import_module(module)
for script in {SCRIPTS}:
    runpy.run_path({str(REPOSITORY)!r} + "/" + script, run_name="imported")
after = state()
assert before == after, [(a, b) for a, b in zip(before, after) if a != b]
"""
    files_before = snapshot()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    assert snapshot() == files_before


def snapshot() -> set[str]:
    """What stands in the folders that a script writes to by default, and in the root."""
    return {
        str(path)
        for folder in (".", "scripts", "weights", "scripted_weights")
        for path in (REPOSITORY / folder).glob("*")
        if path.name != "__pycache__"
    }


EXTREMES = ("1e300", "-1e300", "1e-320", "2147483648", "nan", "inf", "-0", "", " ", "١٢", "1" * 5000)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_bounds(script, capsys):
    parser = runpy.run_path(str(REPOSITORY / script), run_name="imported")["get_args_parser"]()
    numbers = [action for action in parser._actions if action.type not in (None, str) and not action.choices]
    for action in numbers:
        for text in EXTREMES:
            try:
                value = action.type(text)
            except (argparse.ArgumentTypeError, ValueError):
                continue
            for number in value if isinstance(value, tuple) else [value]:
                limit = cli.LARGEST_SEED if action.dest == "seed" else cli.LARGEST
                assert isinstance(number, str) or 0 <= number <= limit, (action.dest, text)


def test_a_stdout_that_knows_only_ascii_does_not_end_a_script():
    code = "from utils.common import errors; errors.run(lambda: print('–', chr(0xDCFF)))"
    process = run_python(code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "\\u2013 \\udcff\n", "")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_does_not_end_a_script(closed):
    code = (
        "import sys; from utils.common import errors; from tqdm import tqdm\n"
        "errors.run(lambda: [print(i) for i in tqdm(range(2), disable=not sys.stderr.isatty())])\n"
    )
    command = f'"{sys.executable}" -c "$CODE" {closed}>&-'
    ended = subprocess.run(command, shell=True, cwd=REPOSITORY, env=os.environ | {"CODE": code}, check=False)
    assert ended.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_stdout_ends_in_one_line():
    code = "from utils.common import errors; errors.run(lambda: print('x'))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: what is printed cannot be written")
    assert ended.stderr.count("\n") == 1


def test_names_from_files_do_not_reach_the_terminal_raw():
    assert errors.one_line("\x1b[2Ja\x07 \u202eb\r\n") == "\\x1b[2Ja\\x07 \\u202eb"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_the_environment_of_torchrun_is_checked(name, monkeypatch):
    monkeypatch.setenv(name, "abc")
    with pytest.raises(errors.UserError, match=f"{name} is 'abc'"):
        distributed.launched() if name == "WORLD_SIZE" else distributed.local_rank()
