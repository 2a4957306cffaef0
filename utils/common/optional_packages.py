"""Packages that only some scripts need, imported on use."""

import importlib
from types import ModuleType

from utils.common.errors import UserError


def import_optional(*names: str, install: str = "-r requirements-benchmarks.txt") -> tuple[ModuleType, ...]:
    """Import modules of optional packages and return them.

    Args:
        names: of the modules.
        install: what pip is to install if one is missing.

    Raises:
        UserError: a package is not installed.
    """
    try:
        return tuple(importlib.import_module(name) for name in names)
    except ImportError as error:
        missing = (error.name or names[0]).split(".")[0]
        raise UserError(f"the package {missing} is not installed here: pip install {install}") from error
