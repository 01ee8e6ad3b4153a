"""How many instructions a compiled kernel executes, without a GPU: SASS as it is, PTX followed through its loops.

SASS has the instructions, but the turns of its loops depend on run-time values. Those are known of a recorded launch
(lowering.Launch), so one thread of program 0 is followed through the PTX: its integers are computed, everything else is
only counted. Where code is straight, SASS is counted; in loops, PTX by the number of SASS instructions it takes.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# ---- SASS ------------------------------------------------------------------------------------------------------------

# Clocks that a warp instruction holds its pipe of one quarter of a multiprocessor (throughput table of the CUDA C++
# Programming Guide for 9.0): ALU and the integer multiplier take 64 lanes a clock and multiprocessor.
ALU = frozenset(
    "LOP3 SHF ISETP SEL FSEL FSETP FMNMX PRMT IADD3 LEA VIADD F2FP IABS SGXT VIMNMX HSETP2 HMNMX2 PLOP3 VOTE R2P P2R "
    "MOV BMSK IMNMX VIADDMNMX CS2R".split()
)
INTEGER_MULTIPLY = frozenset(("IMAD", "IDP"))
SLOW = {"SHFL": 4, "MUFU": 8, "I2F": 8, "F2I": 8, "I2FP": 2, "POPC": 8, "REDUX": 8, "BREV": 8, "FLO": 8}


def sass(cubin: bytes) -> Counter:
    """Instructions of a kernel by name, as they stand in the code, NOP left out."""
    text = _tool("nvdisasm", cubin, "-c")
    found = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?(\w+)", text, re.M))
    del found["NOP"]
    return found


def registers(cubin: bytes) -> int:
    """Of a thread."""
    return int(re.search(r"REG:(\d+)", _tool("cuobjdump", cubin, "-res-usage"))[1])


def _tool(name: str, cubin: bytes, option: str) -> str:
    """What a tool in Triton's wheel says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def clocks(found: Counter) -> int:
    """That a warp takes of its quarter of a multiprocessor at least: one an instruction, or its busiest pipe."""
    alu = 2 * sum(n for name, n in found.items() if name in ALU)
    multiply = 2 * sum(n for name, n in found.items() if name in INTEGER_MULTIPLY)
    slow = sum(SLOW.get(name, 0) * n for name, n in found.items())
    return max(found.total(), alu, multiply, slow)


# ---- PTX -------------------------------------------------------------------------------------------------------------


class Executed(NamedTuple):
    instructions: int  # of a thread
    loops: bool  # some were executed more than once
    unknown: int  # branches whose condition depends on what was loaded: taken as not taken


_LINE = re.compile(r"^\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);", re.M)
_LABEL = re.compile(r"^\s*(\$\w+):", re.M)
_MASK = {32: 2**32 - 1, 64: 2**64 - 1}
LIMIT = 3_000_000  # instructions of one thread


def _signed(value: int, bits: int) -> int:
    value &= _MASK[bits]
    return value - (1 << bits) if value >> (bits - 1) else value


def _divided(a: int, b: int) -> int | None:
    return None if b == 0 else int(a / b) if abs(a) < 2**52 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


_ARITHMETIC: dict[str, Callable[..., int | None]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "neg": lambda a: -a,
    "not": lambda a: ~a,
    "abs": abs,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << (b & 63),
    "shr": lambda a, b: a >> (b & 63),
    "min": min,
    "max": max,
    "div": _divided,
    "rem": lambda a, b: None if b == 0 else a - b * _divided(a, b),
    "bfe": lambda a, at, length: a >> at & ((1 << length) - 1),
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


class _Thread:
    """Registers of one thread; None, or nothing, where a value is not known."""

    def __init__(self, parameters: dict[str, int]) -> None:
        self.parameters = parameters
        self.registers: dict[str, int | None] = {"%tid.x": 0, "%ctaid.x": 0, "%ctaid.y": 0, "%ctaid.z": 0}

    def value(self, operand: str, signed: bool, bits: int) -> int | None:
        found = self.registers.get(operand) if operand.startswith("%") else _number(operand)
        if found is None or isinstance(found, bool):
            return found
        return _signed(found, bits) if signed else found & _MASK[bits]


@functools.cache
def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def _step(opcode: str, operands: list[str]) -> Callable[[_Thread], None]:
    """What an instruction does to the registers, as far as it is about integers and predicates."""
    name, *kinds = opcode.split(".")
    target, *sources = operands
    kind = next((k for k in reversed(kinds) if re.fullmatch(r"[sub](8|16|32|64)|pred", k)), "")
    bits = 64 if kind.endswith("64") else 32
    signed = kind.startswith("s")
    if name == "ld" and kinds[0] == "param":
        parameter = sources[0].strip("[]")
        return lambda thread: thread.registers.__setitem__(target, thread.parameters.get(parameter))
    if name == "setp" and kinds[0] in _COMPARISONS and kind:
        compare = _COMPARISONS[kinds[0]]

        def decide(thread: _Thread) -> None:
            a, b = (thread.value(source, signed, bits) for source in sources)
            thread.registers[target] = None if a is None or b is None else compare(a, b)

        return decide
    if name == "selp" and kind:

        def select(thread: _Thread) -> None:
            chosen = thread.registers.get(sources[2])
            found = None if chosen is None else thread.value(sources[0 if chosen else 1], signed, bits)
            thread.registers[target] = found

        return select
    compute = _ARITHMETIC.get(name)
    if compute is not None and kind and not target.startswith("{") and "hi" not in kinds:
        wide = 64 if "wide" in kinds or name == "cvt" and kinds[-2:-1] and kinds[-2].endswith("64") else bits

        def calculate(thread: _Thread) -> None:
            widths = (bits,) * len(sources) if "wide" not in kinds else (bits, bits, 64)[: len(sources)]
            given = [thread.value(source, signed, width) for source, width in zip(sources, widths, strict=True)]
            found = None if None in given else compute(*given)
            if kind == "pred":
                found = None if found is None else bool(found & 1)
            thread.registers[target] = found if found is None or isinstance(found, bool) else found & _MASK[wide]

        return calculate
    names = re.findall(r"%\w+", target)

    def forget(thread: _Thread) -> None:
        for one in names:
            thread.registers[one] = None

    return forget


def follow(ptx: str, values: Iterable[int], program: int = 0) -> Executed:
    """One thread of a program. values: of the kernel's run-time parameters in order, anything for a pointer.

    Raises:
        ValueError: the thread has executed LIMIT instructions and not come to the end.
    """
    body = ptx[ptx.index(".entry") :]
    kernel = re.search(r"\.entry\s+(\w+)", body)[1]
    thread = _Thread({f"{kernel}_param_{number}": value for number, value in enumerate(values)})
    thread.registers["%ctaid.x"] = program
    code, labels = [], {}
    for match in sorted([*_LINE.finditer(body), *_LABEL.finditer(body)], key=lambda m: m.start()):
        if match.re is _LABEL:
            labels[match[1]] = len(code)
            continue
        negated, predicate, opcode, rest = match.groups()
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest) if part.strip()]
        jump = operands[0] if opcode.split(".")[0] == "bra" else None
        step = None if jump or opcode in ("ret", "exit") or not operands else _step(opcode, operands)
        code.append((predicate, bool(negated), opcode, jump, step))
    place = count = unknown = 0
    seen: set[int] = set()
    while place < len(code):
        predicate, negated, opcode, jump, step = code[place]
        seen.add(place)
        count += 1
        if count > LIMIT:
            raise ValueError(f"{kernel} has executed {LIMIT} instructions and not come to its end")
        place += 1
        taken = True
        if predicate is not None:
            holds = thread.registers.get(predicate)
            unknown += holds is None and jump is not None
            taken = holds is not None and bool(holds) != negated
        if jump is not None:
            place = labels[jump] if taken else place
        elif opcode in ("ret", "exit") and taken:
            break
        elif step is not None:
            step(thread)
    return Executed(count, count > len(seen), unknown)


# ---- both ------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Of one launch."""

    programs: int
    warps: int  # of a program
    fit: int  # programs that a multiprocessor holds at a time
    sass: int  # instructions, as they stand in the code
    clocks: int  # that a warp takes of its quarter of a multiprocessor for those, at least
    followed: int  # PTX instructions of a thread
    loops: bool


def work(launch: Any) -> Work:
    """Of a recorded launch (lowering.Launch)."""
    compiled = launch.compiled
    if compiled.hash not in _known:
        cubin = compiled.asm["cubin"]
        fit = _fit(registers(cubin), compiled.metadata.shared, launch.num_warps)
        _known[compiled.hash] = sass(cubin), fit
    found, fit = _known[compiled.hash]
    program = launch.arguments.get("of_pooled", 0)  # linear_grad's first make dA, which takes less time
    followed = follow(compiled.asm["ptx"], run_time_values(launch), program)
    return Work(
        launch.programs, launch.num_warps, fit, found.total(), clocks(found), followed.instructions, followed.loops
    )  # fmt: skip


_known: dict[str, tuple[Counter, int]] = {}


def _fit(registers: int, shared: int, warps: int) -> int:
    """The CUDA occupancy calculator's formula for compute capability 9.0."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4
    return max(min(32, min(64, by_registers) // warps, (228 << 10) // (shared + 1024)), 1)


def run_time_values(launch: Any) -> list[int]:
    """The launch's parameters as PTX counts them; tensors are 0."""
    found: list[int] = []

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for one, own in zip(kind, value, strict=True):
                add(one, own)
        elif kind != "constexpr":
            found.append(value if isinstance(value, int) else 0)

    for name, kind in launch.compiled.src.signature.items():
        add(kind, launch.arguments.get(name, 0))
    return found
