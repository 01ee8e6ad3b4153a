"""The numbers that plans depend on, each with what chose it: a limit of the hardware, or the measurement that set it.

`python -m benchmarks.sweep` times those that its CHOICES name, of the streams and of the gate, against others on a GPU
and prints the lines to paste here. NORM_* come from compiled registers and the cost model; nothing has timed others.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ... import checked

# ---- tiles of the streams, and launches that overlap -----------------------------------------------------------------

# Bytes of x that a thread holds: four 16-byte loads in flight. With two, half as many elements share what a row takes:
# its address, its threshold, its sum. 32 programs of a warp fit an SM, with 64 KiB on their way, where 3 TB/s at 600 ns
# want 14 KiB.
THREAD = 64
# Elements of a tile at least, so many of float32 and twice as many of 16 bits: a warp's. A warp with a row of its own
# adds it up without shared memory.
TILE = 512
# A tile is twice that where rows fill less of it than 1 / SPARSE: a warp with 300 of 512 elements has too few bytes
# under way. Eval of (16, 1024, 300) took 40.4 us, and 34.0 with two rows in two warps.
SPARSE = 1.5
# In tiles: the longest row that is one, straight-line code; the longest part of a longer row, walked in a loop. On rows
# of 4800, 8 and 4 took 1.05 times as long.
WHOLE, PART = 16, 8
# In tiles: what channels_last takes, so that a thread has several rows for what its columns need; and the bytes of it
# that a thread holds. With 64, half the warps of a multiprocessor are too few for sums: 1.4 times as long in bfloat16.
SHARED, SHARED_THREAD = 8, 32
# Where rows are not aligned, or elements not adjacent, every element has an address of its own: so many elements a
# thread, because with 16 rows of 49 took 96 to 153 registers, and so many tiles.
RAGGED_THREAD, RAGGED = 8, 2
MOST_WARPS = 8
# The shortest row of a tile: a byte of a bit plane.
OCTET = 8
# Of channels_last, so many channels: 1 KiB of neighbouring float32, and 8 rows to sum over before threads meet.
CHANNELS = 256
# Rows are split among programs where there are fewer programs than this for each SM; a piece is at least PIECE elements
# long, so that its partial sum (one float) stays far below the traffic of the piece.
PROGRAMS_PER_SM = 4
PIECE = 4096

# Whether launches of a pass overlap, from compute capability 9.0 on (launch.await_previous): 3 to 6 us less for a step.
DEPENDENT = True
# A launch of more programs than this lets the next one begin when it has ended. Each would say that it may, about one a
# nanosecond: with 16,384 programs in each of four launches, a step of (512, 64, 256) took 92.7 us, so 77.4. Programs of
# a product in slices want a multiprocessor each, so the launch before lets them begin only if it leaves half of them
# free: beside 128 others, a few of 128 shared one, and eval of (128, 512, 32) took 27.3 us instead of 23.2.
LETTING = 4096
# dx is made beside the gradients of the gate's parameters, as soon as dA is there (launch.await_counted), where its
# programs have at most so many warps: a step of (128, 16, 128) took 19.6 us and 21.1 without, of (128, 512, 128) in
# bfloat16 64.3 and 66.9. Each warp waits for itself: with 4 and 8 of them (64, 512, 7, 7) took 55.6 and 53.4 without,
# (64, 64, 56, 56) 102.7 and 99.9.
COUNTED_WARPS = 2

# ---- the standard gate -----------------------------------------------------------------------------------------------

# A tile of this many elements fits the registers: compiled for sm_90, (64, 256) takes 117 of 128 registers at 16 warps,
# float32 or bfloat16, three planes included. (64, 512) spills 16 to 136 bytes a thread, forward and backward.
ON_CHIP = 16384
# Elements of a tile of a sample that does not fit, at 8 warps.
WALKED = 8192
# It is walked twice while two samples an SM, or all there are, fit this much of the L2 (50 MB on an H100).
L2_BYTES = 36 << 20
# Where there are more samples than multiprocessors and nothing is kept, a sample of more bytes than this is walked even
# if it fits: whole ones leave an SM to one program of 16 warps, which loads, waits for its gate and stores. At 8 warps
# of CROWDED_REGISTERS, two samples share an SM: (512, 64, 256) in eval takes 33.0 us in float32 and 14.8 in bfloat16,
# whole samples 34.3 and 18.1, tiles of half the size in 64 registers 37.2 and 14.9.
CROWDED_BYTES = 16 << 10
CROWDED_REGISTERS = 128
# Channels of a sample that one program takes through the gate.
ONE_PASS_CHANNELS = 64
# Products of a sample, a unit and a channel that a thread of it holds.
PRODUCTS = 32
# Hidden units that it makes at once: all of them, as then it waits for what the gate reads while it waits for x. Fewer
# where planes are kept, in float64, and with 64-bit offsets or an address for each element: 64 spill 8 to 56 bytes.
ONE_PASS_UNITS = 64
KEPT_UNITS = 32
# Channels above which dz has a launch of its own, where no sum over channels stands in it, and its elements for a
# program. A step of (128, 512, 32) takes 59 us, and with dz worked out by each program that multiplies by it 70.
LOGITS_APART = 128
LOGITS = 512
# Channels, and hidden units, of a fused gate; and products of its first or second layer, N * C * H. Called, by cuBLAS's
# products and a dozen small launches, a training step of (16, 1024, 300) took 133 us and fused 104, a forward pass in
# eval 57 and 37; of (128, 512, 32) 53 and 18. That cuBLAS is faster beyond these sizes is an estimate.
MOST_CHANNELS = 1024
MOST_PRODUCTS = 1 << 28
# Channels, and hidden units, up to which one launch makes the gate where its statistics are given; samples and warps
# of a program. A forward pass in eval of (32, 64, 1024) takes 14.2 us, by 4 warps 15.2 and by two launches 15.6.
WHOLE_GATE = 64
WHOLE_SAMPLES = 16
WHOLE_WARPS = 8
# A program of the gate's other launches makes a tile of GATE_SAMPLES samples by GATE_TILE units or channels. Small
# tiles, as there are few: 64 for the first layer of (512, 64). Beyond WIDE units or channels products are long, and
# what counts is how many programs share them; WIDE_TILE for MIDDLE[0] < units <= MIDDLE[1], where weights are read less
# often then: a training step of (128, 512, 32) takes 58.5 us and not 61, but of (64, 128, 32) 23 and not 21.5, of (16,
# 1024, 300) 109 and not 104.
WIDE = 64
GATE_SAMPLES = 32
WIDE_SAMPLES = 16
GATE_TILE = 16
WIDE_TILE = 32
MIDDLE = (128, 512)
# Up to WIDE channels or units a product is one step: with two, a training step of (16, 64, 4800) took 50 us and not 45.
# Where rows are not aligned, addresses of 64 spill 120 bytes, and in float64 696.
GATE_DEPTH = 64
ODD_DEPTH = 32
# Beyond that, each of WIDE_SLICES warps makes a part of the sum, WIDE_DEPTH at a time: there are about as many programs
# as multiprocessors, and a warp that has a quarter of its multiprocessor to itself waits for each of its instructions.
# The second layer of (128, 512) took 12 us without slices and takes 7. With 8 or 16 it takes as long, and the gradients
# of the weights, in the same launch as dA, get fewer programs on a multiprocessor.
WIDE_SLICES = 4
WIDE_DEPTH = 32
# Not on the way back to the hidden units where dz is worked out there, from three tensors: in the order of ordered()
# that took 17 us instead of 8.
BACK_DEPTH = 64
# Steps of a product whose loads are under way together: by 2, 3 and 4 the first layer of (128, 512) took 6.5, 5.1 and
# 5.2 us.
GATE_STAGES = 1
WIDE_STAGES = 3
# How float32 is multiplied, in Triton's words. Forward, and where dz comes ready, a weight is read along the products,
# and as "ieee" wants it in shared memory lanes meet in a bank: 25 us for the first layer of (128, 512), 7 by "tf32x3".
# Else the way back reads it across: there "tf32x3" took 7 us for what "ieee" does in 3.5, and pays in large tiles of a
# weight's gradient only.
FORWARD_PRECISION = "tf32x3"
BACKWARD_PRECISION = "ieee"
WEIGHT_PRECISION = "tf32x3"  # of tiles of WEIGHT_TILE, and in the same launch as a sum in slices
# Tiles stay in registers until a product takes them, so that all loads of a program are waited for together
# (product.held). Not timed: of 64 channels, what lies between reduce and dx has 4 such waits with it, and 8 without.
HELD = True
# 8 warps take 1.0 to 1.6 times as long.
GATE_WARPS = 4
GATE_REGISTERS = 255
# The gradient of a weight is made in tiles of GATE_TILE or WIDE_TILE, but of WEIGHT_TILE where these are WEIGHT_TILES
# or more: 37 and 25 us for (128, 512), 7 and 13 for (64, 128), where few programs would have all of the work.
WEIGHT_TILE = 64
WEIGHT_TILES = 64
# It is a sum over the batch: a program walks it by STEP samples, in larger tiles and in float64 by half as many: whole
# steps spill. Above GATE_WALK samples it is shared out, while there are fewer programs than GATE_PROGRAMS for each
# multiprocessor, and the shares are added up, ADDED elements of ADDED_SHARES shares at a time. Of 512 samples, 16 steps
# took 12 us, 4 steps 6 and adding up 1.5, by torch 4.
STEP = 64
GATE_WALK = 128
GATE_PROGRAMS = 2
ADDED = 64
ADDED_SHARES = 32
# Programs merge the statistics of the batch's tiles as they need them, GATE_MERGED (tiles x units) at a time, up to
# MOST_GROUPS tiles; of more, one launch does it before, MERGED at a time, by programs of MERGED_UNITS units. Those of a
# product do so up to MERGED_BY_ALL units. Of more, launches of their own make relu(v), and du and relu(v) on the way
# back, and the products load these: of (128, 512) the second layer took 7.3 us and takes 5.2 behind 3.3 where a merge
# took 2.0; the weights' gradients took 25 and 15. For 64 units it is as fast either way.
GATE_MERGED = 1024
MERGED_BY_ALL = 64
MOST_GROUPS = 128
MERGED = 4096
MERGED_UNITS = 8
MERGE_WARPS = 8  # 4 spill in float64

# ---- batch normalisation ---------------------------------------------------------------------------------------------

# Elements of a channel that one program holds, and reads once: x forward; of x and g backward, so that of each it is
# half as many. A thread of 16 warps has 32 of them, and two such programs share a multiprocessor in 64 registers, where
# addresses of every element, and float64, would spill.
NORM_ON_CHIP = 16384
NORM_ON_CHIP_WARPS = 16
NORM_REGISTERS = 64
NORM_WIDE_REGISTERS = 128  # of float64 and of the launch that merges: alone, ptxas stops at 64 and spills 8 bytes
# The least tile of a channel on chip: batches of fewer elements take the same code.
NORM_LEAST = 2048
# Of channels_last, bytes of neighbouring channels that it takes: a sector.
NORM_SECTOR = 32
# Elements of a tile where a channel is walked by several programs, and of one where statistics are given; those of a
# thread. In float64, and where every element has an address of its own, half as many.
NORM_TILE = 4096
NORM_GIVEN = 1024
NORM_THREAD = 16
# Partial statistics of a channel that every program of the last launch merges: one for each lane of four warps. Of
# channels_last each would merge those of all its channels, so a launch does it.
NORM_PARTIALS = 128
# It takes so many of MERGED_UNITS channels at once, and by that many programs a channel is walked at most. With 8 warps
# it spills.
NORM_MERGED = 512
NORM_MERGE_WARPS = 16

# ---- other numbers, for a while --------------------------------------------------------------------------------------

_caches: list[Any] = []


def cached(prepare: Callable) -> Callable:
    """functools.lru_cache for what is planned by the numbers above: using() empties it."""
    found = functools.lru_cache(maxsize=4096)(prepare)
    _caches.append(found)
    return found


@contextlib.contextmanager
def using(**constants: Any) -> Iterator[None]:
    """Inside the block, constants of this module have these values, such as using(THREAD=64, TILE=1024).

    For comparing plans: the block is the whole process's, and all prepared launches are forgotten at both of its ends.
    A forward pass and the backward pass of what it kept belong in the same block.

    Raises:
        ValueError: a name that is no constant of this module.
    """
    known = {name for name in globals() if name.isupper() and not name.startswith("_")}
    if unknown := sorted(constants.keys() - known):
        raise ValueError(f"tuned has no constant {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    before = {name: globals()[name] for name in constants}
    globals().update(constants)
    forget()
    try:
        yield
    finally:
        globals().update(before)
        forget()


def forget() -> None:
    """All prepared launches, and what calls are known to take."""
    checked.calls.clear()
    for found in _caches:
        found.cache_clear()
