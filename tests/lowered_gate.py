"""The gate's own launches as compiled for a GPU that is not there: run by test_triton_gate.py, prints JSON."""

import argparse
import json
import re

import gate_alone
import ptx
import steps
import torch

from drsn_kernels.backends.gpu.lowering import TARGETS, lowering
from drsn_kernels.gates import StandardGate

# N, C, H, O, norm, training, average, dtype: the paper's, a reduction gate, one alpha, wide with and without a norm
CASES = {
    "paper": (128, 16, 16, 16, True, True, "channel", torch.float32),
    "medium": (512, 64, 64, 64, True, True, "channel", torch.float32),
    "odd": (40, 35, 9, 35, True, False, "channel", torch.float32),
    "one": (40, 64, 64, 1, True, True, "sample", torch.float32),
    "wide": (128, 512, 512, 512, True, True, "channel", torch.float32),
    "wide, no norm": (128, 256, 256, 256, False, False, None, torch.float32),
    "float64": (128, 64, 64, 64, True, True, "channel", torch.float64),
}


def launched(n, c, h, o, norm, training, average, dtype) -> None:
    """A step of the gate, every tensor uninitialised."""
    step = steps.shrink((n, c, 8), dtype, hidden=h, outputs=o, norm=norm, training=training, average=average)
    new = torch.empty(0, dtype=dtype).new_empty
    gamma, beta, mean, var = (new(h) if norm else None for _ in range(4))
    batches = torch.zeros((), dtype=torch.int64) if norm else None
    parts = StandardGate(
        new((h, c)), new(h), gamma, beta, new((o, h)), new(o), mean, var, batches, 1e-5, 0.1, step.gate.batch_stats
    )
    pooled, state, tau = new((n, c)), new((step.state,)), new((n, 1 if step.one_tau else c))
    gate_alone.forward(step, parts, pooled[None], pooled, state, tau)
    gate_alone.backward(step, parts, pooled, state, new((1, n, c)), tau)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[name for name in TARGETS if name.startswith("cuda")])
    target = parser.parse_args().target
    found = {}
    for name, case in CASES.items():
        with lowering(target) as launches:
            launched(*case)
        found[name] = [
            {"kernel": launch.kernel, "stack": measured.stack, "registers": measured.registers,
             "shared": measured.shared, "limit": TARGETS[target].shared_program, "occupancy": measured.occupancy,
             "fma": sum(1 + bool(two) for two in re.findall(r"fma\.rn\.f32(x2)?", launch.compiled.asm["ptx"])),
             "tensor cores": "tf32" in launch.compiled.asm["ptx"], "threads": 32 * launch.num_warps,
             "waits": ptx.waits_for_loads(launch.compiled.asm["cubin"]),
             "tile": [launch.arguments.get(name) for name in ("BN", "BH", "BK")],
             "unattributed": sum(not access.attributed for access in measured.accesses),
             "loads": {pointer: sorted(measured.widths_of("ld", pointer)) for pointer in ("partial", "w1", "dz", "dv")}}
            for launch in launches for measured in (ptx.Measured(launch),)
        ]  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
