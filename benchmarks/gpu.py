"""The shrinkage step on a CUDA device: against the eager port, torch.compile and a copy.

    python -m benchmarks.gpu [--shapes ABCDEG] [--dtypes float32 bfloat16] [--rounds 30] [--no-compile] [--out FILE]

For each shape: a training step of the module (forward and backward), and its forward pass in eval, as the popular port,
as the best pure PyTorch form under torch.compile, and as drsn_kernels, beside `clone`, which reads and writes once; in
bfloat16 all of them under autocast, with float32 parameters. Then a training step of the paper's network over its
ResNet's.
Times are CUDA events around each call, cold (the L2 is overwritten before it) and warm, and of a CUDA graph's replay;
all of a shape run interleaved, and medians are shown. A row is printed only if the outputs agree. DRAM traffic is what
the plan moves (its budget), over the cold time.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import drsn_kernels as dk
from drsn_kernels.demo.baselines import BestShrinkage, PortShrinkage

from .shrinkage import SHAPES
from .timing import environment, geometric_mean, write

SHAPES = SHAPES | {"G": [(512, 64, 256), (1024, 32, 512), (4096, 16, 128)]}
DEVICE = "cuda"
FLUSH_BYTES = 256 << 20  # several times any L2


class Timer:
    """Milliseconds of calls by CUDA events, cold, warm and in a graph."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def _one(self, call: Callable[[], object], cold: bool) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.flush.zero_()
        # the host runs ahead of the device while it waits here, so that launches do not wait for the host
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def medians(self, candidates: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        for call in candidates.values():
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graphs = {name: captured(call) for name, call in candidates.items()}
        times = {name: {"cold": [], "warm": [], "graph": []} for name in candidates}
        for _ in range(self.rounds):
            for name, call in candidates.items():
                times[name]["cold"].append(self._one(call, cold=True))
                times[name]["warm"].append(self._one(call, cold=False))
                if graphs[name] is not None:
                    times[name]["graph"].append(self._one(graphs[name].replay, cold=True))
        return {
            name: {kind: statistics.median(values) if values else float("nan") for kind, values in kinds.items()}
            for name, kinds in times.items()
        }


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """The call as a CUDA graph; None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def candidates_of(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, training: bool, compiled: bool):
    """Calls by name on one x, and the outputs to compare: a training step each, or a forward pass in eval."""
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    g, leaf = torch.randn_like(x), x.clone().requires_grad_()
    ours = dk.Shrinkage(shape[1]).to(DEVICE)
    modules = {"port": PortShrinkage(shape[1]).to(DEVICE), "drsn_kernels": ours}
    if compiled:
        modules["torch.compile"] = BestShrinkage(shape[1]).to(DEVICE)
    mixed = partial(torch.autocast, DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    calls, outputs = {}, {}
    for name, module in modules.items():
        module.load_state_dict(ours.state_dict())
        module.train(training)
        run = torch.compile(module, dynamic=False) if name == "torch.compile" else module

        def forward(run=run):
            with torch.no_grad(), mixed():
                return run(x)

        def step(run=run, module=module):
            with mixed():
                y = run(leaf)
            return torch.autograd.grad(y, [leaf, *module.parameters()], g.to(y.dtype))

        calls[name] = step if training else forward
        outputs[name] = step()[0] if training else forward()
    calls["clone"] = x.clone
    exact = modules["port"].float()
    wide = leaf.detach().float().requires_grad_()
    y = exact(wide)
    outputs["exact"] = torch.autograd.grad(y, wide, g.float())[0] if training else y.detach()
    return calls, outputs


def budget(shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> int:
    """Bytes of the feature map that our plan moves through DRAM if nothing of x survives in L2 between launches."""
    numel, planes = torch.Size(shape).numel(), torch.Size(shape).numel() // 8
    if not training:
        return 2 * numel * dtype.itemsize
    return (3 + 3) * numel * dtype.itemsize + (3 + 2 + 3) * planes


def agree(outputs: dict[str, torch.Tensor]) -> bool:
    """Each within twice the port's own error of the port in float32; by norm, as single elements may flip at tau."""
    exact = outputs["exact"]
    error = {name: (y.float() - exact).norm() / exact.norm().clamp(min=1e-6) for name, y in outputs.items()}
    return all(e <= 2 * error["port"] + 1e-3 for e in error.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="ABCDEG")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device", file=sys.stderr)
        return 1
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    about = environment() | {"driver": driver.stdout.strip(), "triton": triton.__version__}
    print(json.dumps(about, indent=1))
    timer, rows = Timer(options.rounds), []
    print(f"{'shape':24s}{'dtype':10s}{'mode':7s}{'ours cold':>10s}{'warm':>8s}{'graph':>8s}{'% clone':>9s}"
          f"{'x port':>8s}{'x comp':>8s}{'GB/s':>7s}")  # fmt: skip
    for letter in options.shapes:
        for shape in SHAPES[letter]:
            for dtype in (getattr(torch, name) for name in options.dtypes):
                for channels_last in (False, True) if len(shape) == 4 else (False,):
                    for training in (False, True):
                        rows.append(row(timer, letter, shape, dtype, channels_last, training, not options.no_compile))
    for training in (False, True):
        for other in ("port", "torch.compile"):
            gains = [r["ms"][other]["cold"] / r["ms"]["drsn_kernels"]["cold"] for r in rows
                     if r["training"] == training and other in r["ms"]]  # fmt: skip
            print(f"geometric mean over {other}, {'training' if training else 'eval'}: {geometric_mean(gains):.2f}")
    networks = timer.medians(network_steps())
    for name, ms in networks.items():
        over = {kind: ms[kind] / networks["resnet"][kind] for kind in ms}
        print(f"paper network, training step, {name:22s}{ms['warm']:8.3f} ms, over ResNet {over['warm']:.2f}, "
              f"under CUDA graphs {ms['graph']:8.3f} ms, over ResNet {over['graph']:.2f}")  # fmt: skip
    if options.out:
        write(options.out, {"environment": about, "rows": rows, "networks_ms": networks})
    return 0


def network_steps() -> dict[str, Callable[[], object]]:
    """A training step of the paper's network (batch 128 of 1x2048) without the optimiser, by kind."""
    x = torch.randn(128, 1, 2048, device=DEVICE)
    target = torch.randint(8, (128,), device=DEVICE)
    models = {kind: dk.models.paper_network(kind).to(DEVICE).train() for kind in ("resnet", "drsn-cw")}
    models["drsn-cw, popular port"] = port = dk.models.paper_network("drsn-cw").to(DEVICE).train()
    for unit in [module for module in port.modules() if getattr(module, "shrinkage", None) is not None]:
        unit.shrinkage = PortShrinkage(unit.shrinkage.channels).to(DEVICE)

    def step(model):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        return torch.autograd.grad(loss, list(model.parameters()))

    return {name: partial(step, model) for name, model in models.items()}


def row(timer, letter, shape, dtype, channels_last, training, compiled) -> dict:
    torch._dynamo.reset()
    calls, outputs = candidates_of(shape, dtype, channels_last, training, compiled)
    name = "x".join(map(str, shape)) + (" cl" if channels_last else "")
    result = {"shape": shape, "group": letter, "dtype": str(dtype), "channels_last": channels_last,
              "training": training, "agree": agree(outputs), "ms": {}}  # fmt: skip
    if not result["agree"]:
        print(f"{name:24s}{str(dtype)[6:]:10s} outputs differ: not timed")
        return result
    ms = result["ms"] = timer.medians(calls)
    ours, moved = ms["drsn_kernels"], budget(shape, dtype, training)
    compile_gain = ms["torch.compile"]["cold"] / ours["cold"] if compiled else float("nan")
    print(
        f"{name:24s}{str(dtype)[6:]:10s}{'train' if training else 'eval':7s}{ours['cold']:10.4f}{ours['warm']:8.4f}"
        f"{ours['graph']:8.4f}{100 * ms['clone']['cold'] / ours['cold']:9.0f}{ms['port']['cold'] / ours['cold']:8.2f}"
        f"{compile_gain:8.2f}{moved / ours['cold'] / 1e6:7.0f}"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
