"""Training runs small enough for a test, in one process or, by tests/ranks.py, in two."""

import math
import os
import signal
from pathlib import Path

import torch
from torch import nn

from drsn_kernels.data import Dataset
from drsn_kernels.models import DRSN
from drsn_kernels.train import RandomNoise, Recipe, command, run
from drsn_kernels.train.ranks import Ranks
from drsn_kernels.train.run import Run, Stopped

CPU = torch.device("cpu")


def tones(dtype: torch.dtype) -> Dataset:
    """Two tones in 40 + 10 windows."""
    time, y = torch.arange(64) / 64, torch.arange(50) % 2
    phase = torch.rand(len(y), 1, generator=torch.Generator().manual_seed(0))
    x = torch.sin(2 * math.pi * (torch.where(y == 0, 3, 11)[:, None] * time + phase)).unsqueeze(1).to(dtype)
    return Dataset(x[:40], y[:40], x[40:], y[40:], ("low", "high"), 64.0, "Two tones.")


def new_run(
    out: Path, *, batch: int = 8, lr: float = 0.1, dropout: float = 0.2, ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32, save_seconds: float = 1e9, graph: bool = False,
) -> Run:  # fmt: skip
    """Three epochs, of five steps with batch 8; or what a checkpoint in `out` has left of them."""
    torch.manual_seed(3)
    net = nn.Sequential(DRSN(1, 8, stages=((4, 1, 2),)), nn.Dropout(dropout), nn.Linear(8, 2)).to(dtype)
    ranks = ranks or Ranks(0, 1, CPU)
    net.to(ranks.device)
    data = tones(dtype)
    return Run(
        net, data, Recipe(3, batch, lr), noise=RandomNoise("pink"), test_x=data.test_x, seed=5, out=out,
        ranks=ranks, save_seconds=save_seconds, graph=graph,
    )  # fmt: skip


def trained_together(rank: int, out: Path, stop_after: int | None = None) -> tuple[dict, list, str]:
    """Weights and history after a run of two ranks in float64, and the signal that ended it. With `stop_after`, rank 1
    gets SIGTERM after so many steps; the ranks ask one another at every second step."""
    real, agree, steps = run.train_step, run.AGREE, iter(range(1, 1000))

    def step(*arguments):
        result = real(*arguments)
        if next(steps) == stop_after and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    run.train_step, run.AGREE = step, 2
    ours = new_run(out, batch=7, dropout=0, ranks=Ranks(rank, 2, CPU), dtype=torch.float64)  # shares of 4 and 3
    ended = ""
    try:
        ours.train()
    except Stopped as stopped:
        ended = str(stopped)
    finally:
        run.train_step, run.AGREE = real, agree
    return {name: t.clone() for name, t in ours.network.state_dict().items()}, ours.history, ended


def begun_together(rank: int, out: Path) -> str:
    """The error by which a rank of two ends where the folder of a run cannot be made."""
    try:
        command._begin(out, {"settings": {}}, Ranks(rank, 2, CPU))
    except OSError as error:
        return str(error)
    return ""
