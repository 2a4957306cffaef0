"""What each package may know (house rules): read from the imports and attributes of the sources."""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FLOORS = {
    "utils.common": (),
    "models": ("utils.common",),
    "utils.data": ("utils.common",),
    "utils.evaluation": ("utils.common", "utils.data"),
    "utils.checkpoints": ("utils.common", "models", "utils.data"),
    "utils.quantization": ("utils.common", "models"),
    "utils.training": ("utils.common", "models", "utils.data", "utils.evaluation", "utils.checkpoints"),
    "utils.pruning": ("utils.common", "models", "utils.data", "utils.evaluation", "utils.checkpoints"),
    "utils.deployment": (
        *("utils.common", "models", "utils.data", "utils.evaluation"),
        *("utils.checkpoints", "utils.quantization"),
    ),
    "utils.packing": ("utils.common", "models", "utils.data", "utils.checkpoints", "utils.quantization"),
    "utils": ("utils", "models"),
}
"""By package: what it may import beside itself. "utils" are the files directly in utils/."""
SOURCES = sorted(
    path
    for pattern in ("*.py", "models/*.py", "utils/**/*.py", "scripts/**/*.py", "benchmarks/*.py")
    for path in REPOSITORY.glob(pattern)
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The modules of ours and of others that a file imports, TYPE_CHECKING or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted_names(path: Path) -> set[str]:
    """Every `a.b.c` that a file imports or writes."""
    names = imports_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


IMPORTS = {module_of(path): imports_of(path) for path in SOURCES}
OURS = {module: {name for name in found if name in IMPORTS} for module, found in IMPORTS.items()}


def package_of(module: str) -> str:
    candidates = [name for name in FLOORS if module == name or module.startswith(f"{name}.")]
    return max(candidates, key=len, default="")


@pytest.mark.parametrize("module", [module for module in IMPORTS if package_of(module)])
def test_a_package_imports_from_the_floors_below_it(module):
    package = package_of(module)
    for imported in OURS[module] - {"utils", "models"} | ({"models"} & OURS[module]):
        other = package_of(imported)
        allowed = other == package or other in FLOORS[package]
        if package == "utils":
            allowed = bool(other)
        assert allowed, f"{module} imports {imported}"


def test_nothing_imports_in_a_circle():
    seen: dict[str, bool] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module in seen:
            return
        for imported in sorted(OURS[module] - {module}):
            visit(imported, (*way, module))
        seen[module] = True

    for module in IMPORTS:
        visit(module, ())


def test_scripts_never_import_each_other():
    scripts = {m for m in IMPORTS if not m.startswith(("models", "utils", "scripts.reporting"))}
    for module in IMPORTS:
        assert not OURS[module] & scripts - {module}, module


def test_few_files_lie_directly_in_utils():
    assert len(list((REPOSITORY / "utils").glob("*.py"))) <= 16


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("torch.ao", {"utils.quantization.eager", "models.mobilenetv2_quantization"}),
        ("torch.jit", {"utils.deployment.torchscript"}),
    ],
)
def test_what_torch_has_deprecated_stands_behind_one_module(name, allowed):
    users = {
        module_of(path)
        for path in SOURCES
        if any(found == name or found.startswith(f"{name}.") for found in dotted_names(path))
    }
    assert users == allowed


def test_the_loop_knows_no_command_line():
    assert "argparse" not in IMPORTS["utils.training.loop"]


def test_data_knows_no_models_and_packing_no_engines():
    for path in SOURCES:
        module = module_of(path)
        if module.startswith("utils.data"):
            assert not any(name.startswith("models") for name in IMPORTS[module])
        if module.startswith("utils.packing"):
            assert not any("backends" in name or name.endswith("eager") for name in dotted_names(path))
