"""Two processes of one gloo group, for tests of torch.distributed."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORLD = 2


def _serve(rank: int, store: str, pipe: Connection) -> None:
    """Run jobs until there are no more; what a job raises goes back as text."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    while True:
        order = pipe.recv()
        if order is None:
            break
        job, arguments = order
        try:
            pipe.send((job(rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Started at the first job and kept for the next ones, because a process takes seconds to import torch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.pipes: list[Connection] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(self.folder / f"store{time.monotonic_ns()}")
        for rank in range(WORLD):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()  # or the end of the process would not be seen here
            self.processes.append(process)
            self.pipes.append(mine)

    def run(self, job: Callable, *arguments: Any) -> list:
        """The results of job(rank, *arguments), by rank. job: a function of a module that a test may import."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((job, arguments))
        results: dict[Connection, Any] = {}
        while len(results) < WORLD:
            for pipe in wait([p for p in self.pipes if p not in results]):
                try:
                    results[pipe], error = pipe.recv()
                except EOFError:
                    error = "the process ended"
                if error is not None:
                    rank = self.pipes.index(pipe)
                    self._end(kill=True)  # the other rank may wait for this one for ever
                    raise AssertionError(f"rank {rank}: {error}")
        return [results[pipe] for pipe in self.pipes]

    def _end(self, kill: bool) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            process.kill() if kill else pipe.send(None)
        for process in self.processes:
            process.join()
        self.processes, self.pipes = [], []

    def close(self) -> None:
        self._end(kill=False)
