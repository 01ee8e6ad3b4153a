"""The Triton kernels of the `triton` backend (backends/triton.py, which imports this at the first call, not before).

walk.py    how the operands of a call lie in memory          plans.py   tiles and programs, with reasons
tiles.py   what the kernels share: addresses, bit planes     launch.py  device, arguments
reduce.py  apply.py  grad.py                                 any gate
"""
