"""`pytest --benchmark` (bench_operators.py), and what a call costs the host (overhead.py, launches.py).

The suite itself is in drsn_kernels/bench. Nothing here runs in the tests.
"""

import sys
from pathlib import Path

# `python -m benchmarks.x` puts the repository first in sys.path, and with it the source tree, where nothing is
# compiled: measure the installed package.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
