"""A graph on the CPU: operators are recorded with the tensors and numbers that they are given, and run again with them.

As in a CUDA graph, a number is kept by its value and a tensor by its address, and a capture leaves nothing behind.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drsn_kernels import graphs

CPU = torch.device("cpu")


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorded(TorchDispatchMode):
    """Every operator inside; afterwards the tensors that were there before hold what they held."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple] = {}  # storages that were not made inside, and their content
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for t in tensors((args, kwargs)):
            if place(t) not in self.made and place(t) not in self.before:
                self.before[place(t)] = t.untyped_storage(), t.untyped_storage().clone()
        results = func(*args, **kwargs)
        self.made |= {place(t) for t in tensors(results)} - set(self.before)
        self.calls.append((func, args, kwargs, results))
        return results

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for own, new in zip(tensors(results), tensors(again), strict=True):
                if place(own) != place(new):  # else a view, or written in place
                    own.copy_(new)


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    yield


def capture(run: Callable[[], object], device: torch.device) -> tuple[Recorded, object]:
    graph = Recorded()
    with torch.random.fork_rng():
        try:
            with graph:
                results = run()
        finally:
            graph.undo()
    return graph, results


def install(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """drsn_kernels.graphs on the CPU; the graphs it captures, as they come."""
    captured: list[Recorded] = []

    def noted(run, device):
        graph, results = capture(run, device)
        captured.append(graph)
        return graph, results

    monkeypatch.setattr(graphs, "device_of", lambda optimizer: CPU)
    monkeypatch.setattr(graphs, "aside", aside)
    monkeypatch.setattr(graphs, "capture", noted)
    return captured
