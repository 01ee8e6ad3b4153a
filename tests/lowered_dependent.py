"""Every kernel as it is compiled where launches may begin before the one before them has ended (tuned.DEPENDENT).

Run by test_dependent_launches.py; prints JSON by GPU.
"""

import json
import re

import ptx
import torch
from oracle import gate_of

import drsn_kernels as dk
from drsn_kernels.backends.gpu.lowering import lowering

SASS_ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS|LD|ST|ATOMG?|REDG?|UBLKCP|UTMA\w+)\b")


def calls() -> None:
    """Between them all kernels."""
    for shape, kind, dtype in (
        ((8, 16, 128), "batch norm", torch.float32), ((33, 80, 64), "batch norm", torch.bfloat16),
        ((8, 16, 7, 7), "batch norm", torch.float32), ((8, 64, 14, 14), "batch norm", torch.bfloat16),
        ((4, 8, 9600), "batch norm", torch.float32), ((300, 8, 20), "norm", torch.float32),
        ((4200, 8, 8), "batch norm", torch.float32), ((8, 160, 16), "batch norm", torch.float32),
        ((4, 32, 4800), "norm", torch.float32),
    ):  # fmt: skip
        x = torch.randn(shape).to(dtype)
        x = (x.contiguous(memory_format=torch.channels_last) if shape[-1] == 14 else x).requires_grad_()
        gate = gate_of(shape[1], kind).to(torch.promote_types(dtype, torch.float32))
        y, tau = dk.shrink(x, gate, residual=x, return_tau=True)
        results = y, tau, dk.abs_mean(x), dk.squeeze_excite(x, gate)
        torch.autograd.backward(results, [torch.randn(t.shape).to(t).as_strided(t.shape, t.stride()) for t in results])
    for x in (torch.randn(64, 16, 1024), torch.randn(64, 4, 20, 20).contiguous(memory_format=torch.channels_last)):
        norm = dk.BatchNormReLU(x.shape[1])
        norm(x.requires_grad_()).sum().backward()
        norm.eval()(x).sum().backward()
    with torch.no_grad():
        dk.shrink(torch.randn(8, 80, 64), gate_of(80, "norm"))


def one_step() -> None:
    x = torch.randn(8, 16, 128, requires_grad=True)
    dk.shrink(x, gate_of(16, "batch norm")).sum().backward()


def before(launch) -> dict:
    """What a program does in front of its wait, in PTX and in machine code."""
    ptx_text, sass = launch.compiled.asm["ptx"], ptx.disassembled(launch.compiled.asm["cubin"])
    ahead, wait, _ = ptx_text.partition("griddepcontrol.wait")
    arguments = ptx.flat_arguments(launch.compiled.src.signature)
    found = [(one.kind, *sorted(one.pointers)) for one in ptx.ptx_accesses(ahead, arguments)] if wait else []
    looks = found.index(("ld", "counter")) + 1 if ("ld", "counter") in found else len(found)
    in_front, waits, _ = sass.partition("ACQBULK")
    return {
        "waits": [ptx_text.count("griddepcontrol.wait"), sass.count("ACQBULK")], "before": sorted(set(found)),
        "behind the counter": sorted(set(found[looks:])), "counts": counting(ptx_text),
        "sass": sorted(set(SASS_ACCESS.findall(in_front))) if waits else [],
    }  # fmt: skip


def counting(text: str) -> list[str]:
    """What comes last before a program counts itself in, in its order."""
    count = re.search(r"\b(?:atom|red)\.\S*release\S*", text)
    last = {"store": "st.global", "barrier": "bar.sync"}
    return [*sorted(last, key=lambda name: text.rfind(last[name], 0, count.start())), "count"] if count else []


def main() -> None:
    found = {}
    for gpu, call in (("cuda:90", calls), ("cuda:80", one_step)):
        with lowering(gpu) as launches, dk.use_backend("triton", strict=True):
            call()
        by_code = {launch.compiled.hash: launch for launch in launches}
        found[gpu] = [
            {"kernel": f"{one.compiled.src.fn.__module__.rpartition('.')[2]}.{one.kernel}",
             "dependent": one.arguments["DEPENDENT"], "early": bool(one.arguments.get("EARLY")),
             "beside": one.kernel == "grad_kernel" and "counter" in ptx.flat_arguments(one.compiled.src.signature),
             "group": one.arguments.get("GROUP"), "channels_last": one.arguments.get("CHANNELS_LAST"),
             "pdl": one.compiled.metadata.launch_pdl, **before(one), "stack": ptx.Measured(one).stack,
             "loads": ptx.waits_for_loads(one.compiled.asm["cubin"]),
             "next": one.compiled.asm["ptx"].count("griddepcontrol.launch_dependents"),
             "past L1": one.compiled.asm["ptx"].count("ld.global.cg")}
            for one in by_code.values()
        ]  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
