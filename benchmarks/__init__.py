"""`python -m benchmarks` and `pytest --benchmark`, in the repository: what is fast, against what, on which machine.

cases.py    what is timed: operators, networks, shapes, and which of them a run selects
calls.py    who computes: ports, compilers, backends, the floor; and the calls of a case by provider
checks.py   no row without its correctness check, no input where rounding decides
clock.py    CPU and GPU time of a call, its launches, peak and saved bytes
rows.py     a row with all that is needed to read it by itself; JSON, CSV, Markdown
report.py   the figures the project aims at, the regression gate, plots
run.py      the command                     bench_operators.py   the same as tests of pytest-benchmark

gpu_suite.py   everything that needs a GPU, by one command
overhead.py  launches.py  launcher.py   what a call costs the host

Calls are timed in turn by drsn_kernels/demo/timing.py. Nothing here runs in the tests but on fake or tiny work.
"""

import sys
from pathlib import Path

# `python -m benchmarks.x` puts the repository first in sys.path, and with it the source tree, where nothing is
# compiled: measure the installed package.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
