"""Which tile and how many programs each launch takes, and why. Nothing is tuned at run time.

A plan depends on the length of a row, the dtype and the layout, never on the batch size or the number of channels in a
`constexpr`: another batch size runs the kernel that is compiled already (tests/test_triton_plans.py counts).
`splits` and the grid are run-time values.
"""

from dataclasses import dataclass

from .walk import Walk

# 8 KiB of x a program, 4 warps: four 16-byte loads in flight a thread, and 16 programs fit an SM's 2,048 threads, so
# 128 KiB are on their way where 3 TB/s at 600 ns want 14 KiB an SM. Larger tiles only lengthen the tail of the grid.
TILE_BYTES = 8192
WARPS = 4
# A row up to twice that is one tile, straight-line code; longer ones are walked by columns in a loop.
# Of channels_last, so many channels: 1 KiB of neighbouring float32, and 8 rows to sum over before threads meet.
CHANNELS = 256
# Rows are split among programs where there are fewer programs than this for each SM; a piece is at least PIECE elements
# long, so that its partial sum (one float) stays far below the traffic of the piece.
PROGRAMS_PER_SM = 4
PIECE = 4096


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


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tiles(walk: Walk, itemsize: int, sms: int, split: bool) -> TilePlan:
    """The plan of reduce, apply and grad. `split`: rows may be cut, because sums over them may be partial."""
    elements = TILE_BYTES // itemsize
    unit = walk.unit_bits
    if walk.channels_last:
        # vectors along C; a tile stays in one sample, whose channels have their own sums and thresholds
        columns = min(max(_power_of_two(walk.q), unit), CHANNELS)
        rows = min(max(elements // columns, 1), _power_of_two(walk.p))
        blocks = walk.n * _cdiv(walk.q, columns)
        extent, step = walk.p, rows
    else:
        whole = max(_power_of_two(walk.q), unit)
        if whole * itemsize <= 2 * TILE_BYTES:
            columns = whole
        else:  # of the lengths that fill the warps with 16-byte loads, the one with the least idle lanes
            columns = min((elements, elements // 2, elements // 4), key=lambda b: _cdiv(walk.q, b) * b)
        rows = max(elements // columns, 1)
        blocks = _cdiv(walk.rows, rows)
        extent, step = walk.q, columns
    steps = _cdiv(extent, step)
    splits = 1
    if steps > 1:
        wanted = _cdiv(PROGRAMS_PER_SM * sms, blocks)
        pieces = _cdiv(extent * (columns if walk.channels_last else 1), PIECE)
        # where nothing is summed over the loop, every tile is a program of its own
        splits = min(wanted, pieces, steps) if split else steps
    per_piece = _cdiv(steps, splits)
    splits = _cdiv(steps, per_piece)
    tile_bytes = rows * columns * itemsize
    warps = 2 * WARPS if tile_bytes > TILE_BYTES else WARPS if tile_bytes > TILE_BYTES // 4 else 1
    return TilePlan(rows, columns, split and steps > 1, splits, per_piece, blocks * splits, warps)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# ---- the standard gate -----------------------------------------------------------------------------------------------

# A tile of this many elements fits the registers: compiled for sm_90, (64, 256) takes 117 of 128 registers at 16 warps,
# float32 or bfloat16, three planes included. (64, 512) spills 16 to 136 bytes a thread, forward and backward.
ON_CHIP = 16384
# A sample that does not fit is walked twice while two samples an SM fit this much of the L2 (50 MB on an H100).
L2_BYTES = 36 << 20
# Channels of a tile of the gate's kernels; a product over more of them leaves less than one sample a tile.
MOST_CHANNELS = 2048
# Elements of a gate's products (samples x units x channels) a program holds: 32 registers a thread at 4 warps. Twice as
# many spill in the backward pass, which holds two products at a time.
PRODUCTS = 4096


@dataclass(frozen=True)
class OnePassPlan:
    """One launch: S samples a program, in tiles of S * rows by columns; all channels are in the tile."""

    samples: int
    rows: int  # PB
    columns: int  # B
    loop: bool  # the sample is walked twice, from memory and then from L2
    units: int  # hidden units at a time
    warps: int


@dataclass(frozen=True)
class GatePlan:
    """The gate's own launches: tiles of samples x units x channels; and whether tau and dA are had on the way."""

    samples: int
    units: int
    channels: int
    on_the_way: bool  # the second layer in apply, dA in grad; else by launches of their own
    dot: int  # of the hidden units at a time, where a dot product over them is computed on the way
    vector: int  # thresholds a program, where they have a launch of their own
    warps: int = WARPS


def one_pass(walk: Walk, hidden: int, outputs: int, itemsize: int, sms: int) -> OnePassPlan | str:
    """The plan of the one-launch step, or why the multi-launch plan is better."""
    channels, length = (walk.q, walk.p) if walk.channels_last else (walk.p, walk.q)
    sample_bytes = channels * length * itemsize
    rows = _power_of_two(walk.p)
    columns = max(_power_of_two(walk.q), walk.unit_bits)
    wide = columns if walk.channels_last else rows
    if wide > 1024:
        return f"{channels} channels do not fit the tile of one program (at most 1024)"
    samples, loop = 1, rows * columns * max(itemsize, 4) > 4 * ON_CHIP
    if loop:
        if 2 * sms * sample_bytes > L2_BYTES:
            return f"a sample of {sample_bytes} bytes is too large to keep in registers or, one for each program, in L2"
        if walk.channels_last:
            rows = max(8192 // columns, 8)
        else:
            columns = max(8192 // rows, 32)
        warps = 8
    else:
        samples = max(2048 // (rows * columns), 1)
        warps = min(max(samples * rows * columns // 1024, 4), 16)
    weights = 4 * hidden * (channels + outputs)
    if weights > samples * sample_bytes:
        return f"each program would read {weights} bytes of weights for {samples * sample_bytes} bytes of x"
    if _cdiv(walk.n, samples) * 4 < 3 * sms and walk.n * sample_bytes > 2 << 20:
        return f"{_cdiv(walk.n, samples)} programs of whole samples leave most of {sms} multiprocessors idle"
    units = min(max(PRODUCTS // (samples * wide), 1), 32, _power_of_two(hidden))
    return OnePassPlan(samples, rows, columns, loop, units, warps)


def gate(walk: Walk, plan: TilePlan, hidden: int) -> GatePlan | str:
    """The plan of the gate's own launches, around reduce, apply and grad over tiles of `plan`; or why there is none."""
    channels = walk.q if walk.channels_last else walk.p
    if channels > MOST_CHANNELS:
        return f"{channels} channels do not fit the tile of the gate's kernels (at most {MOST_CHANNELS})"
    wide = _power_of_two(channels)
    units = 8 if wide <= 128 else 4  # 8 neighbouring weights of w2 are a sector; more programs where products are long
    samples = min(max(PRODUCTS // (units * wide), 1), 32)
    # A threshold costs two loads for each hidden unit, from L1 or L2; the elements of the tile it serves carry that.
    vector, served = (plan.columns, plan.rows) if walk.channels_last else (plan.rows, plan.columns)
    dot = min(max(2048 // vector, 8), 64)
    return GatePlan(samples, units, wide, hidden <= served, dot, 64)
