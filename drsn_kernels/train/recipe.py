"""The paper's training recipe, once, for the demo, the training command and the experiments.

Source: Zhao et al., "Deep Residual Shrinkage Networks for Fault Diagnosis", IEEE TII 2020, 16(7):4681-4690,
DOI 10.1109/TII.2019.2943898: SGD with momentum 0.9, learning rate 0.1, 0.01 and 0.001 for 40 %, 40 % and 20 % of 100
epochs, batches of 128, weight decay 1e-4 on the weights of convolutions and linear layers, noise of -5 to 5 dB.
"""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..data._dataset import check_counts
from ..models import parameter_groups
from ..noise import KINDS, add_noise

if TYPE_CHECKING:
    import numpy as np

    Array = torch.Tensor | np.ndarray

# (x, generator) -> x with fresh noise
Noise = Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """The paper's optimizer and schedule.

    Attributes:
        epochs: in all; the learning rate falls to a tenth after 40 % and again after 80 % of them.
        batch: samples in a step, over all processes.
        lr, momentum: of SGD.
        weight_decay: of the weights of convolutions and linear layers; nothing else decays.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int = 100
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_counts(1, epochs=self.epochs)
        check_counts(2, batch=self.batch)  # batch statistics need two samples
        for name in ("lr", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(parameter_groups(model, self.weight_decay), lr=self.lr, momentum=self.momentum)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.MultiStepLR:
        """Call its `step()` after each epoch."""
        milestones = [max(1, round(share * self.epochs)) for share in (0.4, 0.8)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


@dataclass(frozen=True)
class RandomNoise:
    """Noise for every sample at an SNR of its own, drawn evenly from a range: ``noise(x, generator)``.

    Attributes:
        kind: of drsn_kernels.noise.add_noise: "gaussian", "laplace", "pink" or "uniform".
        snr_db: (lowest, highest) in decibels; equal for one fixed SNR.

    Raises:
        ValueError: an unknown kind, or a range that is not two finite numbers in ascending order.
    """

    kind: str = "gaussian"
    snr_db: tuple[float, float] = (-5.0, 5.0)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        try:
            low, high = self.snr_db
            ascending = math.isfinite(low) and math.isfinite(high) and low <= high
        except (TypeError, ValueError):
            ascending = False
        if not ascending:
            raise ValueError(f"snr_db must be (lowest, highest) in decibels, got {self.snr_db!r}")

    def __call__(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """x (N, *shape) -> a new tensor of that shape; the generator lies on the device of x."""
        low, high = self.snr_db
        snr = low + (high - low) * torch.rand(len(x), generator=generator, device=x.device)
        return add_noise(x, snr, self.kind, generator)


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside the block every module is in training mode, or none; then each is in the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Eval mode inside the block; then every module is in the mode that it was in."""
    return _mode(model, False)


def _tensor(name: str, values: "Array") -> torch.Tensor:
    """A tensor of real numbers, which shares the memory of an array."""
    if not isinstance(values, torch.Tensor):
        kind = getattr(getattr(values, "dtype", None), "kind", None)
        if kind is None:
            raise TypeError(f"{name} must be a tensor or a NumPy array, got {type(values).__name__}")
        if kind not in "biuf":
            advice = ": number them, with numpy.unique(y, return_inverse=True) say" if name == "y" else ""
            raise TypeError(f"{name} must hold real numbers, got an array of {values.dtype}{advice}")
        dtype = "float64" if values.dtype.itemsize > 8 else values.dtype.newbyteorder("=")  # torch has no longer one
        values = values.astype(dtype, order="C", copy=not values.flags.writeable)
        values = torch.from_numpy(values)
    if values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}")
    return values


def samples(model: nn.Module, x: "Array") -> torch.Tensor:
    """x (N, *shape), a tensor or an array of any real numbers, in the dtype of the model, without a gradient."""
    x = _tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must hold samples (N, *shape), got shape {tuple(x.shape)}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    return x.detach().to(dtype)


def labels(y: "Array", count: int) -> torch.Tensor:
    """y (N,), a tensor or an array of whole numbers of any dtype, as int64.

    Raises:
        TypeError, ValueError: texts, parts of numbers, negative ones, another shape, or not `count` of them.
    """
    y = _tensor("y", y)
    if y.dim() != 1:
        raise ValueError(f"y must hold the index of a class for each sample, of shape (N,), got {tuple(y.shape)}")
    if len(y) != count:
        raise ValueError(f"x and y must hold as many samples, got {count} in x and {len(y)} labels in y")
    whole = y.long()
    if y.is_floating_point() and not torch.equal(whole.to(y.dtype), y):
        part = float(y[whole.to(y.dtype) != y][0])
        raise ValueError(f"y must hold whole numbers, the indices of classes, got {part}")
    if count and int(whole.min()) < 0:
        raise ValueError(f"y must hold indices of classes from 0, got {int(whole.min())}")
    return whole


def _check_finite(x: torch.Tensor) -> None:
    finite = x.flatten(1).isfinite().all(1)
    if not finite.all():
        raise ValueError(f"x must hold finite numbers, but sample {int((~finite).nonzero()[0])} holds NaN or Inf")


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter; the CPU of a model that has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _check_classes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """ValueError where a label has no output of the model, or a sample is not finite."""
    _check_finite(x)
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which would compile for this one sample
    with torch.no_grad(), evaluating(model):
        outputs = model(x[:1].to(device_of(model))).shape[-1]
    if int(y.max()) >= outputs:
        raise ValueError(f"y must hold indices of classes below {outputs}, the model's outputs, got {int(y.max())}")


def least_batch(batch: int) -> int:
    """The fewest samples in the last of several batches: half of one, and two, which batch statistics need."""
    return max(2, (batch + 1) // 2)


def epoch_batches(
    x: torch.Tensor,
    y: torch.Tensor,
    batch: int,
    *,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch, in an order from the generator and with fresh noise on all of x.

    A last batch of less than half the size, or of one sample, is left out (unless it is the only one): a few samples
    are too few for batch statistics. Nothing else draws from the generator, so its state at the start decides the
    epoch.

    Args:
        x, y: (N, *shape) and int64 (N,), on the CPU.
        batch: samples in a batch.
        generator: for the order, then for the noise; torch's own if None.
        noise: such as :class:`RandomNoise`; None for none.
    """
    order = torch.randperm(len(x), generator=generator)
    inputs = x if noise is None else noise(x, generator)
    batches = list(zip(inputs[order].split(batch), y[order].split(batch), strict=True))
    if len(batches) > 1 and len(batches[-1][0]) < least_batch(batch):
        batches.pop()
    return batches


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on a batch (B, *shape), (B,); the mean cross-entropy and the number of right answers before it.

    Both are tensors () on the model's device, so that nothing waits for a GPU. The loss is multiplied by `weight`:
    with several processes, a rank's share of the batch times their number, and DDP's mean over the ranks is then the
    mean over the batch.
    """
    device = device_of(model)
    x, y = x.to(device), y.to(device)
    logits = model(x)
    loss = F.cross_entropy(logits, y) * weight
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == y).sum()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: "Array",
    y: "Array",
    batch: int,
    *,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
) -> float:
    """Train on every sample once (see :func:`epoch_batches`); returns the mean of the batches' losses.

    x, y and what they may be, and the mode of the model: as in :func:`train_epochs`. A model whose data have a
    transform is trained as ``nn.Sequential(data.transform, network)``, because noise belongs on the signal before it.
    """
    x = samples(model, x)
    y = labels(y, len(x))
    if not len(x):
        raise ValueError("x must hold samples to train on, got none")
    batches = epoch_batches(x, y, batch, generator=generator, noise=noise)
    total = torch.zeros((), device=device_of(model))
    with _mode(model, True):
        for inputs, targets in batches:
            total += train_step(model, optimizer, inputs, targets)[0]
    return float(total) / len(batches)


def train_epochs(
    recipe: Recipe,
    model: nn.Module,
    x: "Array",
    y: "Array",
    *,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
) -> Iterator[float]:
    """Train by the recipe, yielding each epoch's loss (see :func:`train_epoch`); an epoch runs when it is asked for.

    Args:
        recipe: epochs, batch and learning rate.
        model: ends each epoch in the mode in which it was.
        x: (N, *shape), a tensor or a NumPy array of any real numbers; computed in the dtype of the model.
        y: (N,), the index of each sample's class, whole numbers of any dtype.
        generator: of order and noise; torch's own if None.
        noise: such as :class:`RandomNoise`; None for none.

    Raises:
        TypeError, ValueError: at the call: x or y of other kinds or shapes, of different numbers, a label that is no
            index of an output of the model, NaN or Inf in x.

    Example::

        generator, noise = torch.Generator().manual_seed(0), RandomNoise("pink", (0, 0))
        for loss in train_epochs(Recipe(epochs=40), model, x, y, generator=generator, noise=noise):
            print(loss)
    """
    x = samples(model, x)
    y = labels(y, len(x))
    if not len(x):
        raise ValueError("x must hold samples to train on, got none")
    if noise is not None and not callable(noise):
        raise TypeError(f"noise must be a function of x and a generator, such as RandomNoise, or None, got {noise!r}")
    _check_classes(model, x, y)

    def epochs() -> Iterator[float]:
        optimizer = recipe.optimizer(model)
        schedule = recipe.schedule(optimizer)
        for _ in range(recipe.epochs):
            yield train_epoch(model, optimizer, x, y, recipe.batch, generator=generator, noise=noise)
            schedule.step()

    return epochs()


@torch.no_grad()
def predict(model: nn.Module, x: "Array", batch: int = 256) -> torch.Tensor:
    """Predicted classes (N,) of x (N, *shape), int64 on the CPU, computed in eval mode; the model is left in its own.

    x: a tensor or a NumPy array of any finite numbers; computed in the dtype of the model, `batch` samples at a time.
    """
    check_counts(1, batch=batch)
    x = samples(model, x)
    _check_finite(x)
    device = device_of(model)
    with evaluating(model):
        return torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(batch)])


def accuracy(model: nn.Module, x: "Array", y: "Array") -> float:
    """Share of x (N, *shape) whose predicted class is y (N,), between 0 and 1. x, y: as in :func:`train_epochs`."""
    x = samples(model, x)
    y = labels(y, len(x))
    if not len(x):
        raise ValueError("x must hold at least one sample, got none")
    _check_classes(model, x, y)
    return float((predict(model, x) == y.cpu()).double().mean())
