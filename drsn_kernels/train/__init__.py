"""The paper's training recipe; `python -m drsn_kernels train`, which runs it on data; and what comes of a run."""

from .predictions import file_windows, probabilities
from .recipe import RandomNoise, Recipe, accuracy, epoch_batches, predict, train_epoch, train_epochs, train_step
from .saved import RunInfo, load

__all__ = [
    "RandomNoise",
    "Recipe",
    "RunInfo",
    "accuracy",
    "epoch_batches",
    "file_windows",
    "load",
    "predict",
    "probabilities",
    "train_epoch",
    "train_epochs",
    "train_step",
]
