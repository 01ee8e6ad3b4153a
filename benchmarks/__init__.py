"""`pytest --benchmark` (bench_operators.py), what a call costs the host (overhead.py, launches.py), and everything that
needs a GPU by one command (gpu_suite.py).

The benchmark itself is in drsn_kernels/bench. Nothing here runs in the tests but on fake or tiny work.
"""

import sys
from pathlib import Path

# `python -m benchmarks.x` puts the repository first in sys.path, and with it the source tree, where nothing is
# compiled: measure the installed package.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
