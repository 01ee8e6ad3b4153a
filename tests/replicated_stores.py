"""Sums that several threads hold and store, as compiled for cuda:90: run by test_replicated_stores.py, prints JSON.

A sum across lanes is a butterfly: a lane adds the value of lane ^ 4, then ^ 2, then ^ 1, and all end with the result.
Where the result goes through shared memory, each of them stores it, to one address. That is well defined only if they
all hold the same bits. Addition commutes, so they do; fma(a, b, the other lane's product) does not.
"""

import json
import re

import torch
import triton
import triton.language as tl
from oracle import gate_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import drsn_kernels as dk


@triton.jit
def products(a, w, out, N: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    n, h, c = tl.arange(0, N), tl.arange(0, H), tl.arange(0, C)
    left = tl.load(a + n[:, None] * C + c[None, :])
    right = tl.load(w + h[:, None] * C + c[None, :])
    total = tl.sum(left[:, None, :] * right[None, :, :], 2)
    tl.store(out + n[:, None] * H + h[None, :], total)


def contracted(ptx: str) -> int:
    """Number of multiply-adds that add another lane's value: the two lanes round different products."""
    shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+)", ptx))
    for result, operands in re.findall(r"(?:cvt\.u64\.u32|shl\.b64|or\.b64|mov\.b64)\s+(%rd\d+), (.*);", ptx):
        if shuffled & set(re.findall(r"%\w+", operands)):  # float64 is shuffled in two halves and put together
            shuffled.add(result)
    return sum(addend in shuffled for addend in re.findall(r"fma\.rn\.f\d+\s+.*, (%\w+);", ptx))


def reduction(fusion: bool) -> dict:
    """`products` of (32, 8) and (8, 8): lanes that hold one result, unconditional stores to shared memory."""
    signature = {"a": "*fp32", "w": "*fp32", "out": "*fp32", "N": "constexpr", "H": "constexpr", "C": "constexpr"}
    source = ASTSource(products, signature, {(3,): 32, (4,): 8, (5,): 8})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fusion})
    ttgir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    layout = re.search(r"convert_layout .*#ttg\.slice<\{dim = 2, parent = (#\w+)\}>> ->", ttgir)[1]
    lanes = re.search(rf"^{layout} = .*threadsPerWarp = \[\d+, \d+, (\d+)\]", ttgir, re.M)[1]
    stores = re.findall(r"^\s*st\.shared", ptx, re.M)
    return {"lanes": int(lanes), "stores": len(stores), "contracted": contracted(ptx)}


def small_steps() -> list[dict]:
    """Every launch of the steps that benchmarks/gpu_suite.py runs under racecheck, and of one in float64."""
    from drsn_kernels.backends.gpu.lowering import lowering

    cases = [(shape, torch.float32) for shape in ((3, 5, 7), (2, 40, 33), (2, 3, 5, 5))] + [((3, 5, 7), torch.float64)]
    with lowering("cuda:90") as launches, dk.use_backend("triton", strict=True):
        for shape, dtype in cases:
            for kind in ("norm", "batch norm"):
                x = torch.randn(shape, dtype=dtype)
                if len(shape) == 4:
                    x = x.contiguous(memory_format=torch.channels_last)
                y, tau = dk.shrink(x.requires_grad_(), gate_of(shape[1], kind).to(dtype), residual=x, return_tau=True)
                (y.sum() + tau.sum() + dk.abs_mean(x).sum()).backward()
    return [
        {"kernel": launch.kernel, "shuffles": launch.compiled.asm["ptx"].count("shfl.sync.bfly"),
         "fusion": launch.compiled.metadata.enable_fp_fusion, "contracted": contracted(launch.compiled.asm["ptx"])}
        for launch in launches
    ]  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"fused": reduction(True), "apart": reduction(False), "launches": small_steps()}))
