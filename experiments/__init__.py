"""The paper's question asked of real data: do networks with shrinkage recognise more under noise?

python -m experiments.run      train what is missing in the grid, a row of results.csv for each run
python -m experiments.report   the tables and plots of docs/experiments
python -m experiments.timing   training time of the networks against the ResNet's
"""

import sys
from pathlib import Path

# `python -m` puts the current folder first: the installed package is meant, with its compiled kernels, and not the
# source tree beside this folder.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]
