"""Optional dependencies: imported where they are used, and named clearly when they are missing."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import and return ``module``; if it is missing, raise ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} is needed here and could not be imported ({error}): pip install "drsn_kernels[{extra}]"'
        ) from error
