"""One training step of the paper's network as ResNet and as DRSN-CW, eager and fused; interleaved, medians."""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from ..models import ResidualShrinkageUnit, paper_network
from ..modules import Shrinkage
from .baselines import PortShrinkage

BATCH = 128
PAPER_RATIO = 1.545  # DRSN-CW over ResNet, 1511.1 s over 978.0 s (Zhao et al. 2020, section IV)


def networks() -> dict[str, nn.Module]:
    models = {"ResNet": paper_network("resnet"), "DRSN-CW, popular port": paper_network("drsn-cw"),
              "DRSN-CW, fused": paper_network("drsn-cw")}  # fmt: skip
    for unit in models["DRSN-CW, popular port"].modules():
        if isinstance(unit, ResidualShrinkageUnit):
            port = PortShrinkage(unit.out_channels)
            port.load_state_dict(unit.shrinkage.state_dict())
            unit.shrinkage = port
    return models


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the module's backward pass, each storage once, parameters and x's own left out."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x.clone().requires_grad_())
    del y
    return sum(sizes.values())


def run(steps: int) -> dict:
    """Time `steps` training steps of each network, one after another in turn; print and return medians and ratios."""
    torch.manual_seed(0)
    models = networks()
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for name, m in models.items()}
    x, y = torch.randn(BATCH, 1, 2048), torch.randint(8, (BATCH,))
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps + 3):
        for name, model in models.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizers[name].step()
            if step >= 3:  # warm
                times[name].append(time.perf_counter() - start)
    features = torch.randn(BATCH, 16, 1024)
    shrinkage = {"DRSN-CW, popular port": PortShrinkage(16), "DRSN-CW, fused": Shrinkage(16)}
    kept = {name: saved_bytes(module, features) / features.numel() for name, module in shrinkage.items()}

    median = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    # the ratio of a step to the ResNet step beside it: what both share of a noisy machine falls out
    ratio = {
        name: statistics.median(a / b for a, b in zip(t, times["ResNet"], strict=True)) for name, t in times.items()
    }
    print(f"{'network':24s}{'ms a step':>10s}{'over ResNet':>13s}{'kept by a shrinkage for backward':>35s}")
    for name in models:
        bytes_kept = f"{kept[name]:.2f} bytes an element" if name in kept else ""
        print(f"{name:24s}{median[name]:10.1f}{ratio[name]:13.2f}{bytes_kept:>35s}")
    print(f"{'the paper, DRSN-CW':24s}{'':10s}{PAPER_RATIO:13.3f}")
    return {
        "batch": BATCH,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "median_ms": median,
        "ratio_to_resnet": ratio,
        "paper_ratio": PAPER_RATIO,
        "bytes_kept_per_element": kept,
    }
