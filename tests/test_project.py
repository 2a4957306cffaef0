"""What describes the project in more than one file says the same in each."""

import subprocess

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def requirements(name: str) -> list[str]:
    lines = (REPOSITORY / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def test_pip_installs_the_same_by_either_file():
    extras = PROJECT["optional-dependencies"]
    assert PROJECT["dependencies"] == requirements("requirements.txt")
    assert extras["dev"] == requirements("requirements-dev.txt")
    assert extras["benchmarks"] == requirements("requirements-benchmarks.txt")
    assert extras["export"] == [line for line in extras["benchmarks"] if line.startswith("onnx")]


def test_the_versions_behind_the_results_are_allowed():
    allowed = {line.name: line.specifier for line in map(Requirement, PROJECT["dependencies"])}
    for line in requirements("constraints.txt"):
        name, version = line.split("==")
        assert version in allowed[name]


def test_a_job_tests_the_lowest_versions():
    workflow = (REPOSITORY / ".github/workflows/test.yml").read_text()
    lowest = PROJECT["requires-python"].removeprefix(">=")
    constraints = [line.split(",")[0].replace(">=", "==") + ".*" for line in PROJECT["dependencies"][:2]]
    assert f'python: "{lowest}"\n            constraints: {" ".join(constraints)}\n' in workflow


def test_every_file_tells_the_same_version():
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    releases = [
        line for line in (REPOSITORY / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")
    ]
    assert releases[0] == "## [Unreleased]"
    assert releases[1].startswith(f"## [{version}] - ")


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is no clone")
def test_git_ignores_what_the_commands_write_and_not_what_is_shipped():
    written = [
        *("qmodel.pth", "sparsity_dict.csv", "scanning_log.csv", "scanning_log.png", "model.png"),
        *("weights/mobilenetv2.pth", "weights/mobilenetv2.history.csv", "weights/mobilenetv2_pruned.pth"),
        *("weights/mobilenetv2_cifar10.checkpoint.pth", "scripted_weights/mobilenetv2_qat.pt"),
    ]
    shipped = [
        *("weights/mobilenetv2_cifar10.pth", "weights/mobilenetv2_cifar10_os16.npz"),
        *("scripted_weights/README.md", "scripted_weights/mobilenetv2_cifar10_qat.pt", "results/demo.json"),
    ]
    command = ["git", "check-ignore", "--no-index", *written, *shipped]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == written, done.stderr
