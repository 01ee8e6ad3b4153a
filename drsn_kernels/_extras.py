"""What the commands share: optional dependencies, named clearly when they are missing; errors as one sentence."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import and return ``module``; if it is missing, raise ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} is needed here and could not be imported ({error}): pip install "drsn_kernels[{extra}]"'
        ) from error


def exit_status(run: Callable[[], int]) -> int:
    """What run() returns; where it raises what a user can mend, the error is a sentence on stderr."""
    try:
        return run()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
