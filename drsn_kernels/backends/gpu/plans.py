"""Which tile and how many programs each launch takes, and why. Nothing is tuned at run time.

What a plan puts into a constexpr depends on the length of a row, the dtype and the layout; where the gate is fused,
also on C and H (in one pass the next powers of two, else whether they are beyond WIDE, MIDDLE and LOGITS_APART, and
whether they are multiples of 4 and of a step); where launches overlap, on the multiprocessors; never on the batch size:
within a plan, another batch runs the kernel that is compiled already (tests/test_triton_lowering.py counts). Which plan
it is may depend on the batch: one pass or several launches, and of a normalised channel on chip the power of two that
holds it. Grids and splits are run-time values.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..step import Cost, checked
from .walk import Walk

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


class Planned(NamedTuple):
    """A launch as it would be made, for explain."""

    kernel: str
    programs: int
    warps: int
    plan: Any  # one of the classes below
    cost: Cost
    code: tuple = ()  # integers, constexprs and compiler options: launches that agree in them are the same launch

    def __str__(self) -> str:
        values = {f.name: getattr(self.plan, f.name) for f in fields(self.plan)}
        shown = (f"{name} {value}" for name, value in values.items() if name not in ("programs", "warps", "why"))
        return f"{self.kernel}: {self.programs} programs of {self.warps} warps; {', '.join(shown)}"


@dataclass(frozen=True)
class TilePlan:
    """A launch over tiles of R rows by B columns.

    rows walk:      a program takes R rows (of any samples), and walks its piece of their columns.
    channels_last:  a program takes B channels of one sample, and walks its piece of the sample's rows.
    """

    rows: int  # R
    columns: int  # B
    loop: bool  # more than one tile a program; else straight-line code
    splits: int  # pieces that a row (channels_last: a sample) is cut into; their sums are partials
    piece: int  # tiles in a piece
    programs: int
    warps: int
    why: str = field(default="", compare=False)


def _ragged(walk: Walk, itemsize: int) -> bool:
    return walk.align * itemsize < 16 or not all(unit for _, unit in walk.operands)


def group(walk: Walk, itemsize: int) -> int:
    """Elements of a row that a thread holds side by side, 16 bytes of them, as bits.py takes them; or 1."""
    return 1 if itemsize == 8 or _ragged(walk, itemsize) else 16 // itemsize


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tiles(walk: Walk, itemsize: int, sms: int, split: bool) -> TilePlan:
    """The plan of reduce, map and grad. `split`: rows may be cut, because sums over them may be partial."""
    ragged = _ragged(walk, itemsize)
    if walk.channels_last:
        # vectors along C; a tile stays in one sample, whose channels have their own sums and thresholds
        columns = min(max(power_of_two(walk.q), OCTET), CHANNELS)
        rows = min(max((RAGGED if ragged else SHARED) * TILE // columns, 1), power_of_two(walk.p))
        blocks = walk.n * cdiv(walk.q, columns)
        extent, step = walk.p, rows
    else:
        columns = max(power_of_two(walk.q), OCTET)
        if columns > WHOLE * TILE:  # of two lengths the one with fewer idle lanes
            longest = (RAGGED if ragged else PART) * TILE
            columns = min((longest, longest // 2), key=lambda b: cdiv(walk.q, b) * b)
        least = RAGGED if ragged else (4 // min(itemsize, 4)) * (2 if SPARSE * walk.q < columns else 1)
        rows = max(least * TILE // columns, 1)
        blocks = cdiv(walk.rows, rows)
        extent, step = walk.q, columns
    steps = cdiv(extent, step)
    splits = 1
    if steps > 1:
        wanted = cdiv(PROGRAMS_PER_SM * sms, blocks)
        pieces = cdiv(extent * (columns if walk.channels_last else 1), PIECE)
        # where nothing is summed over the loop, every tile is a program of its own
        splits = min(wanted, pieces, steps) if split else steps
    per_piece = cdiv(steps, splits)
    splits = cdiv(steps, per_piece)
    tile = rows * columns
    held = RAGGED_THREAD if ragged else (SHARED_THREAD if walk.channels_last else THREAD) // itemsize
    warps = min(max(tile // (32 * held), 1), MOST_WARPS)
    why = f"{'two' if walk.channels_last else 'four'} 16-byte accesses a thread"
    if ragged:
        why = "an access for each element: rows not aligned to 16 bytes, or elements not adjacent"
    if splits > 1:
        cut = "samples" if walk.channels_last else "rows"
        why += f"; {cut} in {splits} pieces, " + (
            f"because whole ones make {blocks} programs for {sms} multiprocessors" if split else "a tile each"
        )
    return TilePlan(rows, columns, split and steps > 1, splits, per_piece, blocks * splits, warps, why)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def up_to(n: int, unit: int) -> int:
    return cdiv(n, unit) * unit


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
# Channels above which dz has a launch of its own, where no sum over channels stands in it, and its elements for a
# program. A step of (128, 512, 32) takes 59 us, and with dz worked out by each program that multiplies by it 70.
LOGITS_APART = 128
LOGITS = 512
# Channels, and hidden units, of a fused gate; and products of its first or second layer, N * C * H. Called, by cuBLAS's
# products and a dozen small launches, a training step of (16, 1024, 300) took 133 us and fused 104, a forward pass in
# eval 57 and 37; of (128, 512, 32) 53 and 18. That cuBLAS is faster beyond these sizes is an estimate.
MOST_CHANNELS = 1024
MOST_PRODUCTS = 1 << 28
# A program of the gate's launches makes a tile of GATE_SAMPLES samples by GATE_TILE units or channels. Small tiles, as
# there are few: 64 for the first layer of (512, 64). Beyond WIDE units or channels products are long, and what counts
# is how many programs share them; WIDE_TILE for MIDDLE[0] < units <= MIDDLE[1], where weights are read less often then:
# a training step of (128, 512, 32) takes 58.5 us and not 61, but of (64, 128, 32) 23 and not 21.5, of (16, 1024, 300)
# 109 and not 104.
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


@dataclass(frozen=True)
class OnePassPlan:
    """One launch: S samples a program, in tiles of S * rows by columns; all channels are in the tile."""

    samples: int
    rows: int  # PB
    columns: int  # B
    loop: bool  # the sample is walked twice, from memory and then from L2
    units: int  # hidden units at a time
    warps: int
    registers: int | None  # that ptxas may use a thread, where it is told


class Product(NamedTuple):
    """How a sum over channels or units is made."""

    depth: int  # BK, of a slice in a step
    slices: int  # each made by a warp of its own; 1: the warps share the tile
    stages: int  # of the loop
    even: bool = False  # slices end where the sum does: none is masked

    @classmethod
    def over(cls, size: int, align: int, itemsize: int, sliced: bool = True) -> "Product":
        deepest = GATE_DEPTH if align * itemsize == 16 else ODD_DEPTH
        if size <= WIDE:
            return cls(min(max(power_of_two(size), 16), deepest), 1, GATE_STAGES)
        if sliced and itemsize == 4:  # float64 is multiplied in two dimensions
            even = size % (WIDE_DEPTH * WIDE_SLICES) == 0
            return cls(WIDE_DEPTH, WIDE_SLICES, WIDE_STAGES, even)
        return cls(min(BACK_DEPTH, deepest), 1, WIDE_STAGES)


NO_PRODUCT = Product(16, 1, 1)


@dataclass(frozen=True)
class GatePlan:
    """The gate's own launches: tiles of samples, channels, units and outputs."""

    samples: int  # BN
    channels: int  # BC, outputs too
    units: int  # BH
    over_channels: Product
    back: Product  # over channels, on the way back where dz is worked out there
    over_units: Product
    weights: int  # BW: tiles of a weight's gradient are square
    step: int  # WALK, samples of a step of it
    align: int  # elements that divide C and H, as rows are aligned
    tiles: int  # of samples
    groups: int  # statistics, and sums, that are merged as they are read; 1 where a launch has merged them before
    group: int  # samples in each
    at_a_time: int  # groups
    apart: bool  # with statistics of the batch, relu(v), and du on the way back, have launches of their own
    shares: int  # of samples, one a program, in the gradients of the weights
    share: int  # samples in one


def one_pass(walk: Walk, hidden: int, outputs: int, itemsize: int, sms: int, keep: bool) -> OnePassPlan | str:
    """The plan of the one-launch step, or why the multi-launch plan is better. keep: planes are written, or read."""
    channels, length = (walk.q, walk.p) if walk.channels_last else (walk.p, walk.q)
    sample_bytes = channels * length * itemsize
    rows = power_of_two(walk.p)
    columns = max(power_of_two(walk.q), OCTET)
    wide = columns if walk.channels_last else rows
    if wide > ONE_PASS_CHANNELS:
        return f"{channels} channels do not fit the tile of one program (at most {ONE_PASS_CHANNELS})"
    ragged = 2 if _ragged(walk, itemsize) else 1  # half a tile: every element has an address of its own
    lean = not keep and ragged == 1 and itemsize <= 4 and not walk.wide  # others take more registers
    crowded = lean and walk.n > sms and CROWDED_BYTES < sample_bytes and 4 * sms * sample_bytes <= L2_BYTES
    samples, loop = 1, crowded or rows * columns * max(itemsize, 4) * ragged > 4 * ON_CHIP
    if loop:
        together = min(walk.n, 2 * sms)
        if together * sample_bytes > L2_BYTES:
            return f"a sample of {sample_bytes} bytes fits no registers, and {together} under way do not fit the L2"
        tile = WALKED // ragged
        if walk.channels_last:
            rows = max(tile // columns, 8)
        else:
            columns = max(tile // rows, 32)
        warps = 8
    else:
        samples = max(2048 // (rows * columns), 1)
        warps = min(max(samples * rows * columns * ragged // 1024, 4), 16)
    weights = max(itemsize, 4) * hidden * (channels + outputs)
    if weights > samples * sample_bytes:
        return f"each program would read {weights} bytes of weights for {samples * sample_bytes} bytes of x"
    if cdiv(walk.n, samples) * 4 < 3 * sms and (walk.n * sample_bytes > 2 << 20 or 2 * sms * sample_bytes > L2_BYTES):
        return f"{cdiv(walk.n, samples)} programs of whole samples leave most of {sms} multiprocessors idle"
    units = min(max(32 * warps * PRODUCTS // (samples * wide), 1), 32, power_of_two(hidden))
    # Alone, ptxas stops at 64 or 128 here and spills for it; told of these limits on the other plans, it spills there.
    most = CROWDED_REGISTERS if crowded else min(65536 // (32 * warps), 255)
    registers = most if warps >= 8 and (loop or ragged > 1) else None
    return OnePassPlan(samples, rows, columns, loop, units, warps, registers)


def gate(n: int, channels: int, hidden: int, outputs: int, sms: int, itemsize: int = 4) -> GatePlan:
    """The plan of the gate's own launches, on numbers of `itemsize` bytes. Only counts depend on n."""
    wide = max(channels, hidden)
    samples = GATE_SAMPLES if wide <= WIDE else WIDE_SAMPLES
    tile = WIDE_TILE if MIDDLE[0] < wide <= MIDDLE[1] else GATE_TILE
    align = 4 if channels % 4 == hidden % 4 == 0 else 1
    tiles = cdiv(n, samples)
    # beyond WIDE units a step is several slices of them, which do not merge
    apart, many = hidden > min(MERGED_BY_ALL, WIDE), tiles > MOST_GROUPS
    over_units = Product.over(hidden, align, itemsize)

    def weights_of(size: int) -> int:
        return cdiv(hidden, size) * (cdiv(channels, size) + cdiv(outputs, size))

    weights = WEIGHT_TILE if weights_of(WEIGHT_TILE) >= WEIGHT_TILES else tile
    shares = max(min(cdiv(n, GATE_WALK), GATE_PROGRAMS * sms // weights_of(weights)), 1)
    step = STEP if weights == GATE_TILE and itemsize == 4 else STEP // 2
    share = up_to(cdiv(n, shares), step)
    return GatePlan(
        samples=samples, channels=tile, units=tile, over_channels=Product.over(channels, align, itemsize),
        back=Product.over(channels, align, itemsize, sliced=False), over_units=over_units,
        weights=weights, step=step, align=align, tiles=tiles, groups=1 if many else tiles,
        group=n if many else samples, at_a_time=GATE_MERGED // over_units.depth, apart=apart,
        shares=cdiv(n, share), share=share,
    )  # fmt: skip


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


@dataclass(frozen=True)
class NormPlan:
    """Launches over tiles of R rows by B columns, each of one channel; channels_last: of B channels.

    A channel is cut into blocks of B columns, and each of them into groups of R rows. A program of the launch that sums
    walks a piece of the groups, and leaves one of `splits` partial results of its channels.
    """

    rows: int  # R
    columns: int  # B
    on_chip: bool  # a channel is one tile: one launch
    loop: bool  # more than one group in a piece
    blocks: int  # of columns; channels_last: of channels
    splits: int
    piece: int  # groups
    merge: bool  # a launch of its own merges partial results
    walking: int  # programs of the launch that sums
    programs: int  # of the others, a tile each
    warps: int
    registers: int | None  # that ptxas may use a thread, where it is told: of two programs a multiprocessor
    why: str = field(default="", compare=False)


def norm(walk: Walk, itemsize: int, sms: int, operands: int, given: bool = False) -> NormPlan:
    """The plan of passes over x, or x and g. given: nothing is summed."""
    ragged, last = _ragged(walk, itemsize), walk.channels_last
    heavy = 2 if ragged or itemsize == 8 else 1  # an element in a thread, as registers go
    registers = NORM_WIDE_REGISTERS if itemsize == 8 else None
    extent = walk.rows if last else walk.n
    columns = max(power_of_two(walk.q), OCTET)
    sector = min(columns, max(NORM_SECTOR // itemsize, OCTET)) if last else columns
    held = power_of_two(extent) * sector
    if not given and held * heavy * operands <= NORM_ON_CHIP:
        tile = max(held, NORM_LEAST)
        blocks = cdiv(walk.q, sector) if last else 1
        programs = blocks if last else walk.p
        each = NORM_THREAD // (2 if itemsize == 8 else 1)
        warps = min(tile * operands // (32 * each), NORM_ON_CHIP_WARPS)
        why = "a program keeps a channel in registers"
        registers = NORM_REGISTERS if warps == NORM_ON_CHIP_WARPS and heavy == 1 else registers
        return NormPlan(
            tile // sector, sector, True, False, blocks, 1, 1, False, programs, programs, warps, registers, why
        )  # fmt: skip

    tile = (NORM_GIVEN if given else NORM_TILE) // heavy
    if last:
        columns = min(columns, CHANNELS)
    elif columns > tile:  # of three lengths the one with fewest idle lanes
        columns = min((tile, tile // 2, tile // 4), key=lambda b: cdiv(walk.q, b) * b)
    rows = max(tile // columns, 1)
    # without samples, as one of several processes may be, nothing is launched, but explained
    blocks, groups = max(cdiv(walk.q, columns), 1), max(cdiv(extent, rows), 1)
    side = blocks if last else max(walk.p, 1) * blocks  # programs for each piece
    pieces = groups
    if not given:
        most = NORM_MERGED if last else max(NORM_PARTIALS // blocks, 1)
        pieces = min(groups, most, cdiv(PROGRAMS_PER_SM * sms, side))
    piece = cdiv(groups, pieces)
    pieces = cdiv(groups, piece)
    splits = pieces if last else pieces * blocks
    merge = not given and (last or splits > NORM_PARTIALS)
    if given:
        why = "statistics are given: every tile is a program of its own"
    else:
        why = f"a channel does not fit the registers of a program: it is walked by {splits}"
        why += ", and a launch merges what they leave" if merge else ""
    warps = max(rows * columns * heavy // (32 * NORM_THREAD), 1)
    return NormPlan(
        rows, columns, False, piece > 1, blocks, splits, piece, merge, side * pieces, side * groups,
        min(warps, MOST_WARPS), registers, why,
    )  # fmt: skip


# ---- other constants, for a while ------------------------------------------------------------------------------------

_caches: list[Any] = []


def cached(prepare: Callable) -> Callable:
    """functools.lru_cache for what is planned by the constants above: using() empties it."""
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
        raise ValueError(f"plans has no constant {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    before = {name: globals()[name] for name in constants}
    globals().update(constants)
    _forget()
    try:
        yield
    finally:
        globals().update(before)
        _forget()


def _forget() -> None:
    checked.clear()
    for found in _caches:
        found.cache_clear()
