"""The PTX instructions that backends/gpu/bits.py writes out, in numpy, so that Triton's interpreter can run the text.

By the PTX ISA, each on 32-bit registers as arrays of uint32. `install` hands them to the interpreter, which has none.
"""

import re

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def prmt(a, b, selector):
    """Four bytes out of eight; with bit 3 of a selector, the sign of the byte instead."""
    source = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)]
    out = np.zeros(np.broadcast(a, b).shape, np.uint32)
    for i in range(4):
        choice = int(selector) >> 4 * i & 15
        byte = source[choice & 7]
        if choice & 8:
            byte = np.where(byte & 128, np.uint32(255), np.uint32(0))
        out |= (byte << np.uint32(8 * i)).astype(np.uint32)
    return out


def dp4a(a, b, c):
    """c + the dot product of four signed bytes."""

    def signed(word, i):
        return (((word.astype(np.int64) >> 8 * i) & 255) ^ 128) - 128

    return (c.astype(np.int64) + sum(signed(a, i) * signed(b, i) for i in range(4))).astype(np.uint32)


def funnel_left(low, high, by):
    """The upper half of high:low << by."""
    by = by & np.uint32(31)
    both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    return ((both << by.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def to_bfloat16(bits):
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FFF), rounded)


def to_float16(bits):
    with np.errstate(over="ignore"):
        return bits.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)


INSTRUCTIONS = {
    "prmt.b32": prmt,
    "dp4a.s32.s32": dp4a,
    "shr.u32": lambda a, by: a >> by,
    "shf.l.wrap.b32": funnel_left,
    "cvt.rn.bf16x2.f32": lambda high, low: (to_bfloat16(high) << np.uint32(16)) | to_bfloat16(low),
    "cvt.rn.f16x2.f32": lambda high, low: (to_float16(high) << np.uint32(16)) | to_float16(low),
}


def run(text: str, inputs: list[np.ndarray]) -> np.ndarray:
    """$0 of inline assembly, whose $1, $2, ... are the inputs."""
    registers = {f"${i + 1}": np.ascontiguousarray(value).view(np.uint32) for i, value in enumerate(inputs)}
    shape = inputs[0].shape
    for statement in re.split(r"[;{}]\s*", text):
        if not statement.strip() or statement.startswith(".reg"):
            continue
        name, operands = statement.strip().split(" ", 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = (registers[s] if s in registers else np.broadcast_to(np.uint32(int(s, 0)), shape) for s in sources)
        if name == "prmt.b32":
            a, b, _ = values
            registers[target] = prmt(a, b, int(sources[2], 0))
        else:
            registers[target] = INSTRUCTIONS[name](*values)
    return registers["$0"]


class Call:
    def __init__(self, result):
        self.get_result = lambda index: result


def install(monkeypatch) -> None:
    """For one test: the interpreter runs inline assembly, and launches ask for it."""
    from drsn_kernels.backends.gpu import launch

    def create_inline_asm(self, text, constraints, values, types, pure, pack):
        assert pack == 1 and constraints == ",".join(["=r"] + ["r"] * len(values))
        data = np.broadcast_arrays(*(v.data for v in values))
        return Call(interpreter.TensorHandle(run(text, data).view(np.int32), tl.int32))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(launch, "capability", lambda: 80)
