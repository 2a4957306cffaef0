"""Each package imports only from the floors below it, and some names stay in one file."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = {
    path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text())
    for folder in ("", "models/**/", "utils/**/", "scripts/**/", "benchmarks/**/")
    for path in REPOSITORY.glob(f"{folder}*.py")
}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in SOURCES}

LOWER_FLOORS = (
    *("utils.common", "models", "utils.data"),
    *("utils.evaluation", "utils.checkpoints", "utils.quantization"),
)
BELOW_THE_OPENERS = (*LOWER_FLOORS, "utils.training", "utils.pruning", "utils.deployment", "utils.packing")
MAY_IMPORT = {
    "utils.common": (),
    "models": ("utils.common",),
    "utils.data": ("utils.common",),
    "utils.evaluation": ("utils.common", "utils.data"),
    "utils.checkpoints": ("utils.common", "models", "utils.data"),
    "utils.quantization": ("utils.common", "models"),
    "utils.training": ("utils.common", "models", "utils.data", "utils.evaluation", "utils.checkpoints"),
    "utils.pruning": ("utils.common", "models", "utils.data", "utils.evaluation", "utils.checkpoints"),
    "utils.deployment": LOWER_FLOORS,
    "utils.packing": ("utils.common", "models", "utils.data", "utils.checkpoints", "utils.quantization"),
    "utils.open_weights": BELOW_THE_OPENERS,
    "utils.open_model": (*BELOW_THE_OPENERS, "utils.open_weights"),
    "utils.plots": (*BELOW_THE_OPENERS, "utils.open_weights", "utils.open_model"),
    "scripts.reporting": ("utils", "models"),
    "benchmarks": ("utils", "models"),
}
"""What a package or module may import of the project besides itself, from the ground floor up."""
SCRIPTS_MAY_IMPORT = ("utils", "models", "scripts.reporting")


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def imports(tree: ast.AST) -> set[str]:
    """Return the dotted names that the file imports: at the top, in functions, under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def attributes(tree: ast.AST) -> set[str]:
    """Return dotted names that the file reads, such as torch.jit.trace, by any alias it imported."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            found.add(f"{aliases.get(first, first)}.{rest}")
    return found


def project_imports(tree: ast.AST) -> set[str]:
    """Return the modules of the project among the imports."""
    found = set()
    for name in imports(tree):
        module = name if name in MODULES else name.rpartition(".")[0]
        if module in MODULES:
            found.add(module)
    return found


def users_of(name: str) -> set[str]:
    """Return the files that import or read anything called `name`."""
    return {
        file
        for file, tree in SOURCES.items()
        if any(is_in(used, name) for used in imports(tree) | attributes(tree))
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_below(module):
    home = next((place for place in MAY_IMPORT if is_in(module, place)), module)
    allowed = (home, *MAY_IMPORT.get(home, SCRIPTS_MAY_IMPORT))
    upwards = {
        other
        for other in project_imports(SOURCES[MODULES[module]])
        if not any(is_in(other, place) for place in allowed)
    }
    assert not upwards


def test_every_package_has_a_floor():
    packages = {module for module in MODULES if is_in(module, "utils") and module != "utils"}
    assert not [module for module in packages if not any(is_in(module, place) for place in MAY_IMPORT)]


def test_no_import_goes_in_a_circle():
    graph = {module: project_imports(SOURCES[file]) - {module} for module, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_utils_itself_holds_few_files():
    assert len([file for file in SOURCES if Path(file).parent == Path("utils")]) <= 16


@pytest.mark.parametrize(
    "name, homes",
    [
        ("torch.ao", {"utils/quantization/eager.py", "models/mobilenetv2_quantization.py"}),
        ("torch.quantization", set()),  # the old name of torch.ao.quantization
        ("torch.jit", {"utils/deployment/torchscript.py"}),
        ("torch.backends.quantized", {"utils/quantization/eager.py"}),  # the engines
    ],
)
def test_a_name_of_torch_stays_at_home(name, homes):
    assert users_of(name) == homes


def test_the_training_loop_knows_no_command_line():
    assert "utils/training/loop.py" not in users_of("argparse")


def test_packing_knows_no_engines():
    assert not [file for file in users_of("utils.quantization.eager") if file.startswith("utils/packing/")]


def test_what_is_read_through_another_name_is_found():
    tree = ast.parse("from torch import jit as j\nimport torch as t\nj.trace\nt.ao.quantization.f(t.jit.x())")
    assert {"torch.jit"} <= imports(tree)
    assert {"torch.jit.trace", "torch.ao.quantization.f", "torch.jit.x"} <= attributes(tree)
