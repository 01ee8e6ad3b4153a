"""One training step of the paper's network as ResNet and as DRSN-CW, eager and fused; interleaved, medians."""

import statistics
from functools import partial

import torch
from torch import nn

from ..models import network
from ..modules import Shrinkage
from ..train.recipe import Recipe, train_step
from .port import PortShrinkage, swap
from .timing import Call, interleaved, ratio, saved_bytes

PAPER_RATIO = 1.545  # DRSN-CW over ResNet, 1511.1 s over 978.0 s (Zhao et al. 2020, section IV)
SHAPE = (128, 1, 2048)
FEATURES = (128, 16, 1024)  # of a unit
PORT, FUSED = "DRSN-CW, popular port", "DRSN-CW, fused"
FORMS = {PORT: PortShrinkage, FUSED: Shrinkage}


def _networks() -> dict[str, nn.Module]:
    """PyTorch's ResNet, the network with each form of shrinkage, and the ResNet with the normalisation of the last."""
    return {
        "ResNet": network("resnet", fused=False),
        PORT: swap(network(fused=False), PortShrinkage),
        FUSED: network(),
        "ResNet, fused norms": network("resnet"),
    }


def _kept(form: type[nn.Module]) -> float:
    """Bytes that a shrinkage keeps for its backward pass, over the elements of x."""
    module, x = form(FEATURES[1]), torch.randn(FEATURES, requires_grad=True)
    return saved_bytes(Call(partial(module, x), parameters=tuple(module.parameters()))) / x.numel()


def run(steps: int) -> dict:
    """Time `steps` training steps of each network, one after another in turn; print and return medians and ratios."""
    torch.manual_seed(0)
    x, y = torch.randn(SHAPE), torch.randint(8, SHAPE[:1])
    calls = {name: Call(partial(train_step, net, Recipe().optimizer(net), x, y)) for name, net in _networks().items()}
    times = {name: samples["time"] for name, samples in interleaved(calls, steps).items()}
    kept = {name: _kept(form) for name, form in FORMS.items()}

    median = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    # the ratio of a step to the ResNet step beside it: what both share of a noisy machine falls out
    over = {name: ratio(t, times["ResNet"]) for name, t in times.items()}
    print(f"{'network':24s}{'ms a step':>10s}{'over ResNet':>13s}{'kept by a shrinkage for backward':>35s}")
    for name in times:
        bytes_kept = f"{kept[name]:.2f} bytes an element" if name in kept else ""
        print(f"{name:24s}{median[name]:10.1f}{over[name]:13.2f}{bytes_kept:>35s}")
    print(f"{'the paper, DRSN-CW':24s}{'':10s}{PAPER_RATIO:13.3f}")
    return {
        "batch": SHAPE[0],
        "steps": steps,
        "threads": torch.get_num_threads(),
        "median_ms": median,
        "ratio_to_resnet": over,
        "paper_ratio": PAPER_RATIO,
        "bytes_kept_per_element": kept,
    }
