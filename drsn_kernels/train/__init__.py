"""The paper's training recipe, and `python -m drsn_kernels train`, which runs it on a folder of data."""

from .recipe import RandomNoise, Recipe, accuracy, epoch_batches, predict, train_epoch, train_epochs, train_step

__all__ = ["RandomNoise", "Recipe", "accuracy", "epoch_batches", "predict", "train_epoch", "train_epochs", "train_step"]
