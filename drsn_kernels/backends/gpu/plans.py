"""Which tile and how many programs each launch takes, and why, by the numbers of tuned.py. None is tuned at run time.

What a plan puts into a constexpr depends on the length of a row, the dtype and the layout; where the gate is fused,
also on C and H (in one pass and in a whole gate the next powers of two, else whether they are beyond WIDE, MIDDLE and
LOGITS_APART, and whether they are multiples of 4 and of a step); where launches overlap, on the multiprocessors; never
on the batch size: within a plan, another batch runs the kernel that is compiled already (tests/test_triton_lowering.py
counts). Which plan it is may depend on the batch: one pass or several launches, and of a normalised channel on chip the
power of two that holds it. Grids and splits are run-time values.
"""

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..step import Cost
from . import tuned
from .walk import Walk


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
        columns = min(max(power_of_two(walk.q), tuned.OCTET), tuned.CHANNELS)
        rows = min(max((tuned.RAGGED if ragged else tuned.SHARED) * tuned.TILE // columns, 1), power_of_two(walk.p))
        blocks = walk.n * cdiv(walk.q, columns)
        extent, step = walk.p, rows
    else:
        columns = max(power_of_two(walk.q), tuned.OCTET)
        if columns > tuned.WHOLE * tuned.TILE:  # of two lengths the one with fewer idle lanes
            longest = (tuned.RAGGED if ragged else tuned.PART) * tuned.TILE
            columns = min((longest, longest // 2), key=lambda b: cdiv(walk.q, b) * b)
        least = tuned.RAGGED if ragged else (4 // min(itemsize, 4)) * (2 if tuned.SPARSE * walk.q < columns else 1)
        rows = max(least * tuned.TILE // columns, 1)
        blocks = cdiv(walk.rows, rows)
        extent, step = walk.q, columns
    steps = cdiv(extent, step)
    splits = 1
    if steps > 1:
        wanted = cdiv(tuned.PROGRAMS_PER_SM * sms, blocks)
        pieces = cdiv(extent * (columns if walk.channels_last else 1), tuned.PIECE)
        # where nothing is summed over the loop, every tile is a program of its own
        splits = min(wanted, pieces, steps) if split else steps
    per_piece = cdiv(steps, splits)
    splits = cdiv(steps, per_piece)
    tile = rows * columns
    held = tuned.RAGGED_THREAD if ragged else (tuned.SHARED_THREAD if walk.channels_last else tuned.THREAD) // itemsize
    warps = min(max(tile // (32 * held), 1), tuned.MOST_WARPS)
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
        deepest = tuned.GATE_DEPTH if align * itemsize == 16 else tuned.ODD_DEPTH
        if size <= tuned.WIDE:
            return cls(min(max(power_of_two(size), 16), deepest), 1, tuned.GATE_STAGES)
        if sliced and itemsize == 4:  # float64 is multiplied in two dimensions
            even = size % (tuned.WIDE_DEPTH * tuned.WIDE_SLICES) == 0
            return cls(tuned.WIDE_DEPTH, tuned.WIDE_SLICES, tuned.WIDE_STAGES, even)
        return cls(min(tuned.BACK_DEPTH, deepest), 1, tuned.WIDE_STAGES)


NO_PRODUCT = Product(16, 1, 1)


@dataclass(frozen=True)
class WholeGatePlan:
    """The gate in one launch, where statistics are given."""

    samples: int  # BN
    channels: int  # BC, all of them
    units: int  # BH, all of them
    align: int  # elements that divide C and H, as rows are aligned


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
    columns = max(power_of_two(walk.q), tuned.OCTET)
    wide = columns if walk.channels_last else rows
    if wide > tuned.ONE_PASS_CHANNELS:
        return f"{channels} channels do not fit the tile of one program (at most {tuned.ONE_PASS_CHANNELS})"
    ragged = 2 if _ragged(walk, itemsize) else 1  # half a tile: every element has an address of its own
    lean = not keep and ragged == 1 and itemsize <= 4 and not walk.wide  # others take more registers
    crowded = lean and walk.n > sms and tuned.CROWDED_BYTES < sample_bytes and 4 * sms * sample_bytes <= tuned.L2_BYTES
    samples, loop = 1, crowded or rows * columns * max(itemsize, 4) * ragged > 4 * tuned.ON_CHIP
    if loop:
        together = min(walk.n, 2 * sms)
        if together * sample_bytes > tuned.L2_BYTES:
            return f"a sample of {sample_bytes} bytes fits no registers, and {together} under way do not fit the L2"
        tile = tuned.WALKED // ragged
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
    programs = cdiv(walk.n, samples)
    if programs * 4 < 3 * sms and (walk.n * sample_bytes > 2 << 20 or 2 * sms * sample_bytes > tuned.L2_BYTES):
        return f"{programs} programs of whole samples leave most of {sms} multiprocessors idle"
    together = tuned.ONE_PASS_UNITS if lean else tuned.KEPT_UNITS
    units = min(max(32 * warps * tuned.PRODUCTS // (samples * wide), 1), together, power_of_two(hidden))
    # Alone, ptxas stops at 64 or 128 here and spills for it; told of these limits on the other plans, it spills there.
    most = tuned.CROWDED_REGISTERS if crowded else min(65536 // (32 * warps), 255)
    registers = most if warps >= 8 and (loop or ragged > 1) else None
    return OnePassPlan(samples, rows, columns, loop, units, warps, registers)


def whole_gate(channels: int, hidden: int, batch_stats: bool) -> WholeGatePlan | None:
    """The plan of the gate's one launch, where it is one."""
    if batch_stats or max(channels, hidden) > tuned.WHOLE_GATE:
        return None
    wide = [max(power_of_two(size), 16) for size in (channels, hidden)]
    return WholeGatePlan(tuned.WHOLE_SAMPLES, *wide, _align(channels, hidden))


def _align(channels: int, hidden: int) -> int:
    return 4 if channels % 4 == hidden % 4 == 0 else 1


def gate(n: int, channels: int, hidden: int, outputs: int, sms: int, itemsize: int = 4) -> GatePlan:
    """The plan of the gate's own launches, on numbers of `itemsize` bytes. Only counts depend on n."""
    wide = max(channels, hidden)
    samples = tuned.GATE_SAMPLES if wide <= tuned.WIDE else tuned.WIDE_SAMPLES
    tile = tuned.WIDE_TILE if tuned.MIDDLE[0] < wide <= tuned.MIDDLE[1] else tuned.GATE_TILE
    align = _align(channels, hidden)
    tiles = cdiv(n, samples)
    # beyond tuned.WIDE units a step is several slices of them, which do not merge
    apart, many = hidden > min(tuned.MERGED_BY_ALL, tuned.WIDE), tiles > tuned.MOST_GROUPS
    over_units = Product.over(hidden, align, itemsize)

    def weights_of(size: int) -> int:
        return cdiv(hidden, size) * (cdiv(channels, size) + cdiv(outputs, size))

    weights = tuned.WEIGHT_TILE if weights_of(tuned.WEIGHT_TILE) >= tuned.WEIGHT_TILES else tile
    shares = max(min(cdiv(n, tuned.GATE_WALK), tuned.GATE_PROGRAMS * sms // weights_of(weights)), 1)
    step = tuned.STEP if weights == tuned.GATE_TILE and itemsize == 4 else tuned.STEP // 2
    share = up_to(cdiv(n, shares), step)
    return GatePlan(
        samples=samples, channels=tile, units=tile, over_channels=Product.over(channels, align, itemsize),
        back=Product.over(channels, align, itemsize, sliced=False), over_units=over_units,
        weights=weights, step=step, align=align, tiles=tiles, groups=1 if many else tiles,
        group=n if many else samples, at_a_time=tuned.GATE_MERGED // over_units.depth, apart=apart,
        shares=cdiv(n, share), share=share,
    )  # fmt: skip


# ---- batch normalisation ---------------------------------------------------------------------------------------------


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
    registers = tuned.NORM_WIDE_REGISTERS if itemsize == 8 else None
    extent = walk.rows if last else walk.n
    columns = max(power_of_two(walk.q), tuned.OCTET)
    sector = min(columns, max(tuned.NORM_SECTOR // itemsize, tuned.OCTET)) if last else columns
    held = power_of_two(extent) * sector
    if not given and held * heavy * operands <= tuned.NORM_ON_CHIP:
        tile = max(held, tuned.NORM_LEAST)
        blocks = cdiv(walk.q, sector) if last else 1
        programs = blocks if last else walk.p
        each = tuned.NORM_THREAD // (2 if itemsize == 8 else 1)
        warps = min(tile * operands // (32 * each), tuned.NORM_ON_CHIP_WARPS)
        why = "a program keeps a channel in registers"
        registers = tuned.NORM_REGISTERS if warps == tuned.NORM_ON_CHIP_WARPS and heavy == 1 else registers
        return NormPlan(
            tile // sector, sector, True, False, blocks, 1, 1, False, programs, programs, warps, registers, why
        )  # fmt: skip

    tile = (tuned.NORM_GIVEN if given else tuned.NORM_TILE) // heavy
    if last:
        columns = min(columns, tuned.CHANNELS)
    elif columns > tile:  # of three lengths the one with fewest idle lanes
        columns = min((tile, tile // 2, tile // 4), key=lambda b: cdiv(walk.q, b) * b)
    rows = max(tile // columns, 1)
    # without samples, as one of several processes may be, nothing is launched, but explained
    blocks, groups = max(cdiv(walk.q, columns), 1), max(cdiv(extent, rows), 1)
    side = blocks if last else max(walk.p, 1) * blocks  # programs for each piece
    pieces = groups
    if not given:
        most = tuned.NORM_MERGED if last else max(tuned.NORM_PARTIALS // blocks, 1)
        pieces = min(groups, most, cdiv(tuned.PROGRAMS_PER_SM * sms, side))
    piece = cdiv(groups, pieces)
    pieces = cdiv(groups, piece)
    splits = pieces if last else pieces * blocks
    merge = not given and (last or splits > tuned.NORM_PARTIALS)
    if given:
        why = "statistics are given: every tile is a program of its own"
    else:
        why = f"a channel does not fit the registers of a program: it is walked by {splits}"
        why += ", and a launch merges what they leave" if merge else ""
    warps = max(rows * columns * heavy // (32 * tuned.NORM_THREAD), 1)
    return NormPlan(
        rows, columns, False, piece > 1, blocks, splits, piece, merge, side * pieces, side * groups,
        min(warps, tuned.MOST_WARPS), registers, why,
    )  # fmt: skip
