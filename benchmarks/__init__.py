"""Benchmarks: what is fast, against what, on which machine. Nothing here runs in the tests."""

import sys
from pathlib import Path

# `python -m benchmarks.x` puts the repository first in sys.path, and with it the source tree, where nothing is
# compiled: measure the installed package.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
