"""The Triton kernels of the `triton` backend (backends/triton.py, which imports this at the first call, not before).

reduce.py  apply.py  grad.py    any gate: pooling, thresholding, and the gradients of both
gate.py                         the standard gate's own launches
one_pass.py                     step and standard gate in one launch
standard.py                     which of these a call with the standard gate takes

walk.py    how the operands of a call lie in memory     plans.py     tiles and programs, with reasons
tiles.py   what the kernels share: addresses, planes    launch.py    device, arguments, compiled kernels
lowering.py  listing.py         compiling for a GPU that is not there, and reading what came out
"""
