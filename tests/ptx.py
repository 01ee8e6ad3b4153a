"""What a compiled kernel does, read from what the compiler wrote: registers, spills, and every global access.

PTX is the last form that still names the kernel's pointers, so accesses are counted there, and each is traced back to
the pointer it goes through. Bytes are width * threads of every instruction, for a program and, inside a loop, a turn of
it. Lanes that a mask switches off are counted, so a tile that hangs over the tensor's edge counts in full, and so is a
small operand that several threads load or store (a threshold for each row): for those the number is an upper bound.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from drsn_kernels.backends.gpu import lowering

# [@%p1] ld.global[.L1::evict_first][.L2::cache_hint][.v4].b32 {...}, [%rd1 + 0], ...
_ACCESS = re.compile(r"^\s*(?:@!?%p\d+\s+)?(ld|st|atom|red)\.(?:[\w:]+\.)*?global\.([\w.:]+)\s([^;]*);", re.M)
_ASYNC_COPY = re.compile(r"^\s*(?:@!?%p\d+\s+)?cp\.async\.c[ag]\.shared\.global[\w.:]*\s[^,]*,([^,]*),\s*(\w+)", re.M)
_DEFINITION = re.compile(r"^\s*(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+(%rd\d+),\s*([^;]*);", re.M)
_POINTER = re.compile(r"\.param \.u64 \.ptr \.global[^,)]*?(\w+_param_(\d+))")
_LABEL = re.compile(r"^\s*(\$L\w+):", re.M)
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)")
_WIDE_REGISTER = re.compile(r"%rd\d+")

_SASS = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z0-9]+)([^;]*);")
_SASS_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_SASS_TARGET = re.compile(r"`\((\.L_x_\d+)\)")

# amdgcn: global_load_dwordx4, buffer_store_short, global_load_ushort, ...
_AMD_ACCESS = re.compile(r"^\s*(?:global|buffer)_(load|store|atomic)_(\w+)", re.M)
_AMD_LABEL = re.compile(r"^(\.L\w+):", re.M)
_AMD_BRANCH = re.compile(r"\bs_c?branch\w*\s+(\.L\w+)")
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
_AMD_WIDTHS |= {f"dwordx{n}": 4 * n for n in (2, 3, 4)}


# What linear_grad_kernel chooses from at run time: either weight's factors, and what the biases' gradients add up.
CHOSEN = ({"pooled", "dz"}, {"pooled", "positive"}, {"dv", "dz"})


class Access(NamedTuple):
    """One instruction. `pointers`: names of the kernel arguments that its address is computed from, one as a rule."""

    kind: str  # "ld", "st" or "atom"
    width: int  # bytes a thread
    loop: bool  # inside a loop
    pointers: frozenset[str]

    @property
    def attributed(self) -> bool:
        """To one argument, or to a pair of CHOSEN."""
        return len(self.pointers) == 1 or self.pointers in CHOSEN


class Resources(NamedTuple):
    registers: int  # a thread
    stack: int  # bytes a thread: registers spilled to memory, these kernels have no arrays


def ptx_accesses(ptx: str, arguments: list[str]) -> list[Access]:
    """Every global access in the order of the text. `arguments`: names of the run-time arguments as PTX counts them."""
    origin, in_loop = _origins(ptx, arguments), _in_loop(ptx, _LABEL, _BRANCH)
    found = []
    for match in _ACCESS.finditer(ptx):
        kind, modifiers, operands = match.groups()
        access = Access(*_kind_and_width(kind, modifiers), in_loop(match.start()), origin(_address(operands)))
        found.append((match.start(), access))
    for match in _ASYNC_COPY.finditer(ptx):
        found.append((match.start(), Access("ld", int(match[2], 0), in_loop(match.start()), origin(match[1]))))
    return [access for _, access in sorted(found, key=lambda pair: pair[0])]


def _kind_and_width(kind: str, modifiers: str) -> tuple[str, int]:
    parts = modifiers.split(".")
    count = next((int(part[1:]) for part in parts if re.fullmatch(r"v[248]", part)), 1)
    bits = next(int(match[1]) for part in reversed(parts) if (match := re.fullmatch(r"[bufs]f?(\d+)(?:x2)?", part)))
    return "atom" if kind == "red" else kind, count * bits // 8


def _address(operands: str) -> str:
    return operands[operands.index("[") + 1 : operands.index("]")]


def _origins(ptx: str, arguments: list[str]) -> Callable[[str], frozenset[str]]:
    """A function from an address expression to the pointer arguments it is computed from.

    Addresses live in 64-bit registers; a register that is defined in several places (a loop) has every origin of them.
    """
    pointers = {parameter: int(number) for parameter, number in _POINTER.findall(ptx)}
    sources: dict[str, set[str]] = {}
    origins: dict[str, set[str]] = {}
    for register, text in _DEFINITION.findall(ptx):
        sources.setdefault(register, set()).update(_WIDE_REGISTER.findall(text))
        for parameter, number in pointers.items():
            if re.search(rf"\b{parameter}\b", text):
                name = arguments[number] if number < len(arguments) else "scratch"  # Triton's own come last
                origins.setdefault(register, set()).add(name)

    def origin(address: str) -> frozenset[str]:
        found: set[str] = set()
        seen: set[str] = set()
        todo = _WIDE_REGISTER.findall(address)
        while todo:
            register = todo.pop()
            if register not in seen:
                seen.add(register)
                found |= origins.get(register, set())
                todo += sources.get(register, ())
        return frozenset(found)

    return origin


def _in_loop(text: str, label: re.Pattern, branch: re.Pattern) -> Callable[[int], bool]:
    """Whether a place in the text is between a label and a branch back to it."""
    labels = {match[1]: match.start() for match in label.finditer(text)}
    loops = [(labels.get(match[1], match.start()), match.start()) for match in branch.finditer(text)]
    return lambda place: any(start < place < end for start, end in loops)


def amdgcn_accesses(text: str) -> list[Access]:
    """Every global access; which argument it goes through is not worked out."""
    kinds = {"load": "ld", "store": "st", "atomic": "atom"}
    in_loop = _in_loop(text, _AMD_LABEL, _AMD_BRANCH)
    return [
        # the type is the first part of what follows: short of short_d16_hi
        Access(kinds[m[1]], _AMD_WIDTHS.get(m[2].split("_")[0], 4), in_loop(m.start()), frozenset())
        for m in _AMD_ACCESS.finditer(text)
    ]


def amdgcn_resources(text: str) -> Resources:
    """Vector registers, and private memory (which is where they spill to)."""

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(match[1]) if match else 0

    return Resources(field("vgpr_count"), field("private_segment_fixed_size"))


@functools.cache
def cubin_resources(cubin: bytes) -> Resources:
    """Registers and stack of a cubin that holds one kernel, by the cuobjdump in Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump told no resource usage: {text.strip()!r}")
    return Resources(int(match[1]), int(match[2]) + int(match[3]))


def cubin_instructions(cubin: bytes) -> int | None:
    """Machine instructions of a cubin that holds one kernel; None where a loop runs some of them again."""
    return sass_instructions(disassembled(cubin))


def disassembled(cubin: bytes) -> str:
    """By the nvdisasm in Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def waits_for_loads(cubin: bytes) -> int:
    """Groups of loads between which threads meet, in the order of the machine code: no load passes by a barrier."""
    order = re.findall(r"\b(LDG|BAR)\b", disassembled(cubin))
    return sum(one == "LDG" and (k == 0 or order[k - 1] != one) for k, one in enumerate(order))


def sass_instructions(text: str) -> int | None:
    """The same of nvdisasm's text. What fills up the end, a branch to itself and NOPs, does not count."""
    found, labels = 0, {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = found
        elif (instruction := _SASS.match(line)) and instruction[1] != "NOP":
            target = _SASS_TARGET.search(instruction[2])
            if instruction[1] == "BRA" and target and target[1] in labels:
                if labels[target[1]] < found:
                    return None
            else:
                found += 1
    return found


def widths(accesses: list[Access]) -> dict[str, dict[int, int]]:
    """{"ld": {16: 4, 4: 1}}: bytes a thread for each instruction, and the number of such instructions."""
    counts = Counter((access.kind, access.width) for access in accesses)
    out: dict[str, dict[int, int]] = {}
    for (kind, width), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[0][1])):
        out.setdefault(kind, {})[width] = count
    return out


def flat_arguments(signature: dict) -> list[str]:
    """Names of a kernel's run-time arguments as PTX numbers them: constexprs left out, tuples flattened."""

    def walk(name: str, kind) -> Iterator[str]:
        if isinstance(kind, tuple):
            for part in kind:
                yield from walk(name, part)
        elif kind != "constexpr":
            yield name

    return [flat for name, kind in signature.items() for flat in walk(name, kind)]


# ---- a launch --------------------------------------------------------------------------------------------------------

# Of one SM, the same for compute capability 8.0, 9.0 and 10.0, but for shared memory.
REGISTERS_SM = 65536
WARPS_SM = 64  # 2,048 threads
CTAS_SM = 32
SHARED_SM = {"cuda:80": 164 << 10, "cuda:90": 228 << 10, "cuda:100": 228 << 10}
# Registers are handed out to a warp in units of 256, and to warps in fours; shared memory in units of 128 bytes, and
# 1 KiB of it a CTA is the system's.
_REGISTER_UNIT, _WARP_UNIT, _SHARED_UNIT, _SHARED_RESERVED = 256, 4, 128, 1024


class Measured:
    """A recorded launch (lowering.Launch), and what its compiled code needs and moves, worked out when asked for."""

    def __init__(self, launch: Any):
        self.launch, self.target = launch, launch.target
        self.compiled, self.num_warps = launch.compiled, launch.num_warps
        self._cuda = lowering.TARGETS[launch.target].backend == "cuda"

    @functools.cached_property
    def _resources(self) -> Resources:
        if self._cuda:
            return cubin_resources(self.compiled.asm["cubin"])
        return amdgcn_resources(self.compiled.asm["amdgcn"])

    @property
    def registers(self) -> int:
        """Registers a thread (hip: vector registers)."""
        return self._resources.registers

    @property
    def stack(self) -> int:
        """Bytes of local memory a thread. These kernels have no arrays: anything above 0 is spilled registers."""
        return self._resources.stack

    @functools.cached_property
    def instructions(self) -> int | None:
        """Machine instructions of a thread; None for hip, and where there is a loop."""
        return cubin_instructions(self.compiled.asm["cubin"]) if self._cuda else None

    @property
    def shared(self) -> int:
        """Bytes of shared memory a program asks for. cuobjdump says 1,024 more on 9.0 and later, the system's share."""
        return self.compiled.metadata.shared

    @property
    def occupancy(self) -> int | None:
        """Programs that fit one SM at a time, None for hip. The CUDA occupancy calculator's formula."""
        if not self._cuda:
            return None
        warps_by_registers = _down(REGISTERS_SM // _up(self.registers * 32, _REGISTER_UNIT), _WARP_UNIT)
        shared = _up(self.shared + _SHARED_RESERVED, _SHARED_UNIT)
        return min(
            CTAS_SM, min(WARPS_SM, warps_by_registers) // self.num_warps, SHARED_SM[self.target] // shared
        )  # fmt: skip

    @functools.cached_property
    def accesses(self) -> list[Access]:
        """Every global access in the code."""
        if self._cuda:
            return ptx_accesses(self.compiled.asm["ptx"], flat_arguments(self.compiled.src.signature))
        return amdgcn_accesses(self.compiled.asm["amdgcn"])

    @property
    def widths(self) -> dict[str, dict[int, int]]:
        """{"ld": {16: 4, 4: 1}, "st": ...}: bytes a thread for each instruction, and how many there are."""
        return widths(self.accesses)

    def widths_of(self, kind: str, argument: str) -> set[int]:
        """Widths of the loads ("ld") or stores ("st") through one pointer argument."""
        return {a.width for a in self.accesses if a.kind == kind and argument in a.pointers}

    def moved(self, kind: str, argument: str | None = None, *, loop: bool = False) -> int:
        """Bytes that one program loads ("ld") or stores ("st"), through one pointer argument or all of them.

        Outside of loops, or with `loop` in one turn of each loop. Lanes that are masked off count, and so do threads
        that access one element together: exact for the elements of full tiles, an upper bound for small operands.
        """
        threads = self.num_warps * lowering.TARGETS[self.target].warp_size
        return threads * sum(
            a.width
            for a in self.accesses
            if a.kind == kind and a.loop == loop and (argument is None or argument in a.pointers)
        )


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _down(n: int, unit: int) -> int:
    return n // unit * unit
