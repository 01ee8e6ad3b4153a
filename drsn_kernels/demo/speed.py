"""One training step of the paper's network as ResNet and as DRSN-CW, eager and fused; interleaved, medians."""

import statistics

import torch

from ..bench.cases import NETWORK, Case
from ..bench.counts import saved_bytes
from ..bench.measure import interleaved, ratio
from ..bench.providers import FLOOR, PORT, Provider
from ..bench.summary import PAPER_RATIO
from ..bench.workloads import build

NAMES = {"floor": "ResNet", "port": "DRSN-CW, popular port", "ours": "DRSN-CW, fused"}
PROVIDERS = (FLOOR, PORT, Provider("ours", "ours"))
SHAPE = NETWORK["paper_network"][1][0]


def run(steps: int) -> dict:
    """Time `steps` training steps of each network, one after another in turn; print and return medians and ratios."""
    calls, _, _ = build(Case("paper_network", "N", SHAPE, "step"), PROVIDERS, "cpu")
    times = {NAMES[name]: samples["time"] for name, samples in interleaved(calls, steps).items()}
    shrinkage = Case("shrink_train", "N", (SHAPE[0], 16, 1024))
    units, _, _ = build(shrinkage, PROVIDERS[1:], "cpu")
    kept = {NAMES[name]: saved_bytes(call) / shrinkage.numel for name, call in units.items()}

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
