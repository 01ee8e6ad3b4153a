"""A training run that can be stopped anywhere and continued exactly.

What decides an epoch is the state of one generator at its start: it draws the order and the noise. A checkpoint holds
that state with the number of steps taken since, so a run that is continued draws the same epoch again and goes on at
the next batch.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..data import Dataset
from ..graphs import graphed
from . import files
from .progress import Progress
from .ranks import Ranks
from .recipe import Noise, Recipe, epoch_batches, predict, train_step

CHECKPOINT = "checkpoint.pt"
AGREE = 16  # steps after which all ranks ask one another whether to save or stop


class Stopped(Exception):
    """A signal ended the run; its checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put into the list instead of ending the process; a second SIGINT ends it at once."""
    found: list[int] = []

    def note(number: int, frame) -> None:
        if found and number == found[0] == signal.SIGINT:
            raise KeyboardInterrupt
        found.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """The state of a run: network, optimizer, schedule, generator, and where in which epoch it is.

    Args:
        network: on the device of `ranks`, with the weights to begin with.
        data: its transform stands before the network.
        noise: of each epoch, or None.
        test_x: (N, C, *lengths) what the network is tested on after each epoch, noise included.
        seed: of the order and the noise.
        out: folder of checkpoint.pt and log.csv; read if there is a checkpoint.
        save_seconds: between checkpoints inside an epoch.
        graph: replay the steps as a CUDA graph (see :func:`drsn_kernels.graphed`): on a GPU, one process.
        about: what a checkpoint says of the network and its data, in plain values: see :func:`.saved.describe`.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Dataset,
        recipe: Recipe,
        *,
        noise: Noise | None,
        test_x: torch.Tensor,
        seed: int,
        out: Path,
        ranks: Ranks,
        save_seconds: float,
        graph: bool = False,
        about: dict | None = None,
    ) -> None:
        self.about = about
        self.network, self.data, self.recipe, self.noise = network, data, recipe, noise
        self.test_x, self.out, self.ranks, self.save_seconds, self.graph = test_x, out, ranks, save_seconds, graph
        self.model = nn.Sequential(data.transform.to(ranks.device), network)
        self.optimizer = recipe.optimizer(self.model)
        self.schedule = recipe.schedule(self.optimizer)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for a network that draws, by dropout say
        self.history: list[dict] = []
        # This rank's part of the sums over the epoch: the steps' mean losses, the right answers.
        self.sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        self._begin_epoch()
        if (out / CHECKPOINT).exists():
            self._load(out / CHECKPOINT)

    def _begin_epoch(self) -> None:
        self.epoch_state = self.generator.get_state()
        self.step, self.seconds = 0, 0.0
        self.sums.zero_()

    def _save(self) -> None:
        """Called by all ranks at the same step, because the sums are spread over them; the first one writes."""
        sums = self.ranks.total(self.sums)
        if self.ranks.first:
            state = {
                "about": self.about,
                "epoch": len(self.history),
                "step": self.step,
                "seconds": self.seconds,
                "sums": sums,
                "generator": self.epoch_state,
                "torch_generator": torch.get_rng_state(),
                "network": self.network.state_dict(),
                "transform": self.data.transform.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "history": self.history,
            }
            files.write_checkpoint(self.out / CHECKPOINT, state)

    def _load(self, path: Path) -> None:
        """Continue what the checkpoint holds; ValueError naming it where that is no state of this run."""
        state = files.read_checkpoint(path)
        try:
            self._restore(state)
        except Exception as error:  # what is missing or of another kind fails in as many ways as there are parts
            reason = str(error).split("\n")[0].rstrip(":")
            raise ValueError(f"{path} does not fit this run: {type(error).__name__}: {reason}") from error

    def _restore(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.data.transform.load_state_dict(state["transform"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history, self.step, self.seconds = state["history"], state["step"], state["seconds"]
        self.sums += state["sums"].to(self.sums) / self.ranks.world
        self.epoch_state = state["generator"]
        self.generator.set_state(self.epoch_state)
        torch.set_rng_state(state["torch_generator"])

    def train(self) -> None:
        """Train what is left of the epochs.

        Raises:
            Stopped: after SIGINT or SIGTERM; the checkpoint is written.
            ValueError: loss or weights are not finite any more; no checkpoint is written from then on.
        """
        parallel = self.ranks.parallel(self.model)

        def step(x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
            loss, right = train_step(parallel, self.optimizer, x, y, weight)
            self.sums += torch.stack([loss.double() / self.ranks.world, right.double()])

        step = graphed(step, self.optimizer) if self.graph else step
        with caught_signals() as signals:
            while len(self.history) < self.recipe.epochs:
                parallel.train()
                stop = self._epoch(step, signals)
                if stop:
                    raise Stopped(stop)

    def _epoch(self, step: Callable, signals: list[int]) -> int:
        """Train to the end of the epoch, or to the step after a signal; returns its number, or 0."""
        saved = time.perf_counter()
        start, stop = saved - self.seconds, 0
        batches = epoch_batches(
            self.data.train_x, self.data.train_y, self.recipe.batch, generator=self.generator, noise=self.noise
        )
        total = sum(len(y) for _, y in batches)
        seen = sum(len(y) for _, y in batches[: self.step])
        with Progress(len(self.history) + 1, self.recipe.epochs, total, seen, silent=not self.ranks.first) as progress:
            for x, y in batches[self.step :]:
                x, target = self.ranks.share(x), self.ranks.share(y)
                step(x, target, len(target) * self.ranks.world / len(y))
                self.step += 1
                seen += len(y)
                progress.step(len(y), lambda seen=seen: self._means(self.sums * self.ranks.world, seen))
                now = time.perf_counter()
                self.seconds = now - start
                asked = self.ranks.world == 1 or self.step % AGREE == 0 or seen == total
                stop, save = self._agree(signals, now - saved > self.save_seconds) if asked else (0, False)
                if (stop or save) and seen < total:
                    self._finite_means(seen)
                    self._save()
                    saved = now
                if stop:
                    break
        if seen == total:
            self._end_epoch(seen)
        return stop

    def _agree(self, signals: list[int], save: bool) -> tuple[int, bool]:
        """The signal to stop by (0: none) and whether to save: at the same step on all ranks."""
        stop, save = self.ranks.highest([signals[0] if signals else 0, int(save)])
        return stop, bool(save)

    def _means(self, sums: torch.Tensor, samples: int) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far."""
        loss, right = sums.tolist()
        return loss / self.step, right / samples

    def _finite_means(self, samples: int) -> tuple[float, float]:
        """Mean loss and accuracy over all ranks; ValueError, on all of them, where training has diverged."""
        loss, accuracy = self._means(self.ranks.total(self.sums), samples)
        # The last step may have spoilt the weights after a loss that was finite.
        finite = all(bool(parameter.isfinite().all()) for parameter in self.network.parameters())
        if not (finite and math.isfinite(loss)):
            what = "the weights became NaN or Inf" if math.isfinite(loss) else f"the loss became {loss}"
            lr = self.optimizer.param_groups[0]["lr"]
            raise ValueError(f"{what} in epoch {len(self.history) + 1}: lr {lr:g} is too large for this task")
        return loss, accuracy

    def _end_epoch(self, samples: int) -> None:
        epoch, lr = len(self.history) + 1, self.optimizer.param_groups[0]["lr"]
        loss, train_accuracy = self._finite_means(samples)
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": loss,
            "train_acc": train_accuracy,
            "test_acc": self._test(),
            "seconds": self.seconds,
            "samples_per_s": samples / self.seconds,
        }
        self.schedule.step()
        self.history.append(row)
        self._begin_epoch()
        self._save()
        if self.ranks.first:
            files.write_log(self.out / "log.csv", self.history)
            print(
                f"epoch {epoch}/{self.recipe.epochs}  lr {lr:g}  loss {loss:.4f}  train {100 * train_accuracy:.2f} %  "
                f"test {100 * row['test_acc']:.2f} %  {row['samples_per_s']:.0f} samples/s",
                flush=True,
            )

    def _test(self) -> float:
        """Accuracy on the test set, each rank predicting its share."""
        target = self.ranks.share(self.data.test_y)
        right = (predict(self.model, self.ranks.share(self.test_x)) == target).sum().to(self.ranks.device)
        return float(self.ranks.total(right)) / len(self.data.test_y)
