"""`python -m drsn_kernels bench` and `pytest --benchmark`: what is fast, against what, on which machine.

cases.py      what is timed: operators, networks, shapes, and which of them a run selects
baselines.py  the step as people write it        providers.py  who computes: ports, compilers, backends, the floor
workloads.py  the calls of a case, by provider   verify.py     no row without its correctness check
ties.py       no input where rounding decides
measure.py    interleaved timing, CPU and GPU    counts.py     launches, peak and saved bytes    budget.py
record.py     rows, environment, JSON, CSV       summary.py    the figures the project aims at
compare.py    the regression gate                plots.py      run.py   the command
"""
