"""The main job: `python -m drsn_kernels demo` shows what the package does on this machine, in a few minutes.

1. environment   versions, backends available or not (info.py)
2. check         the fused operator against plain PyTorch, here and now (check.py, port.py)
3. speed         a training step of the paper's network, fused and not, over its ResNet (speed.py, timing.py)
4. learning      DRSN-CW and ResNet on noisy vibration signals (learning.py, plots.py)
"""

import time
from pathlib import Path

import torch

from .. import info
from .._extras import require
from ..data import Dataset, load_cwru, simulate_bearing
from ..train import files
from . import check, learning, speed


def _heading(number: int, title: str) -> None:
    print(f"\n{number}. {title}\n{'-' * (len(title) + 3)}", flush=True)


def _data(folder: Path | None, seed: int) -> Dataset:
    if folder is None:
        return simulate_bearing(generator=torch.Generator().manual_seed(seed))
    return load_cwru(folder)


def run(data: Path | None, out: Path, *, quick: bool = False, epochs: int | None = None, seed: int = 0) -> dict:
    """Run the four parts, print them, and write results.json and the plots to `out`. Returns the results.

    Raises:
        ImportError: a package of the extra [demo] is missing. OSError, ValueError: `data` is missing, wrong or
        unreadable (the message names the file); `epochs` is below 1, `seed` below 0 or of more than 62 bits, `out` a
        file. All before any work is done.
    """
    for module in ("numpy", "matplotlib", *(["scipy"] if data is not None else [])):
        require(module, "demo")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed must be a whole number from 0 to 2^62 - 1, got {seed}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    dataset = _data(data, seed)
    start = time.perf_counter()
    results: dict = {"quick": quick, "seed": seed}

    _heading(1, "environment")
    results["environment"] = info.collect()
    info.show(results["environment"])

    _heading(2, "check: the fused operator against plain PyTorch in float64")
    results["check"] = check.run()

    _heading(3, "speed: one training step of the paper's network, batch 128 of 1x2048")
    results["speed"] = speed.run(steps=8 if quick else 40)

    _heading(4, "learning: DRSN-CW and ResNet on noisy vibration signals")
    results["learning"] = learning.run(dataset, out, quick=quick, epochs=epochs, seed=seed)

    results["seconds"] = time.perf_counter() - start
    path = files.write_json(out / "results.json", results)
    print(f"\nDone in {results['seconds']:.0f} s. Results: {path}")
    return results
