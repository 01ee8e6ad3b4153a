"""The learning part of the demo: DRSN-CW against the same ResNet on noisy vibration windows.

The networks (Table II) and the recipe (train/recipe.py) are the paper's: Zhao et al., IEEE TII 2020, DOI
10.1109/TII.2019.2943898.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .._extras import require
from ..data import Dataset
from ..models import paper_network
from ..noise import add_noise
from ..train import Recipe, accuracy, files, train_epochs
from ..train.predictions import probabilities
from . import plots

SNR_DB = (-5.0, -3.0, 0.0, 3.0, 5.0)
TAU_SNR_DB = (-5.0, 15.0)
MODELS = {"drsn-cw": "DRSN-CW", "resnet": "ResNet"}
EPOCHS = 40
# Fewer classes and more steps an epoch, so that both networks have learnt something by the end.
QUICK_CLASSES, QUICK_EPOCHS, QUICK_BATCH, QUICK_TRAIN, QUICK_TEST = 4, 12, 64, 1024, 256


def noisy(x: torch.Tensor, snr_db: float | torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Windows with Gaussian noise, what the networks see.

    The clean windows have unit variance and the sum is not standardised again, as with a sensor of fixed gain: noise
    adds power, and the signal keeps its scale.
    """
    return add_noise(x, snr_db, generator=generator)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 of a vector, equal values sharing their mean rank; float64."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[index]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Spearman's rank correlation of two vectors; None where one is constant, because it is undefined there."""
    rho = float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])
    return None if math.isnan(rho) else rho


def _progress(epochs: int, label: str) -> Iterable[int]:
    """Epoch numbers with a tqdm bar where tqdm is installed, a line for every fifth of the epochs where not."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _lines(epochs, label)
    return tqdm(range(epochs), desc=f"training {label}", unit="epoch")


def _lines(epochs: int, label: str) -> Iterable[int]:
    for epoch in range(epochs):
        if epoch % max(epochs // 5, 1) == 0:
            print(f"training {label}: epoch {epoch + 1} of {epochs}", flush=True)
        yield epoch


def train(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epochs: int,
    snr_db: Sequence[float] = SNR_DB,
    seed: int = 0,
    label: str = "model",
    batch: int = Recipe.batch,
) -> float:
    """Train on windows x (N, 1, L) with labels y (N,); returns the mean loss of the last epoch.

    Every epoch draws fresh noise, and for every window one of the given SNRs. x stays on the CPU; batches go to the
    device of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(snr_db)

    def noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return noisy(x, levels[torch.randint(len(levels), (len(x),), generator=generator)], generator)

    losses = train_epochs(Recipe(epochs, batch), model, x, y, generator=generator, noise=noise)
    return [loss for _, loss in zip(_progress(epochs, label), losses, strict=True)][-1]


def thresholds(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The threshold of every shrinkage for every window, averaged over channels: module name -> (N,), in eval mode."""
    return probabilities(model, x, thresholds=True)[1]


def _tau_against_noise(model: nn.Module, x: torch.Tensor, seed: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Rank correlations of the thresholds with the noise; noise RMS and mean relative threshold of each window."""
    generator = torch.Generator().manual_seed(seed)
    low, high = TAU_SNR_DB
    snr = low + (high - low) * torch.rand(len(x), generator=generator)
    noise_rms = 10 ** (-snr / 20)  # exact, because the clean windows have unit RMS
    taus = thresholds(model, noisy(x, snr, generator))
    layers = {name: spearman(tau, noise_rms) for name, tau in taus.items()}
    # Layers differ in scale, so each is taken relative to its own mean before they are averaged.
    relative = torch.stack([tau / tau.mean() for tau in taus.values()]).mean(0)
    defined = [rho for rho in layers.values() if rho is not None]
    result = {
        "snr_db_range": list(TAU_SNR_DB),
        "windows": len(x),
        "spearman_by_layer": layers,
        "spearman_mean_of_layers": sum(defined) / len(defined) if defined else None,
        "spearman_of_mean_threshold": spearman(relative, noise_rms),
    }
    return result, noise_rms, relative


def _spread(x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """About `count` windows, evenly spaced, so that every class keeps its share."""
    index = torch.linspace(0, len(x) - 1, min(count, len(x))).round().long()
    return x[index], y[index]


def _few_classes(dataset: Dataset, count: int) -> Dataset:
    """The dataset with every n-th of its classes, so that at most `count` are left, and a part of their windows."""
    names = dataset.class_names
    chosen = torch.arange(0, len(names), max(len(names) // count, 1))[:count]

    def part(x: torch.Tensor, y: torch.Tensor, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.isin(y, chosen)
        return _spread(x[kept], torch.searchsorted(chosen, y[kept]), windows)

    train_x, train_y = part(dataset.train_x, dataset.train_y, QUICK_TRAIN)
    test_x, test_y = part(dataset.test_x, dataset.test_y, QUICK_TEST)
    return replace(
        dataset, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y,
        class_names=tuple(names[i] for i in chosen.tolist()),
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def _print_accuracy(results: dict) -> None:
    print("\nTest accuracy in % at each SNR")
    print(f"{'model':<10}" + "".join(f"{snr:>+8g} dB" for snr in SNR_DB) + f"{'mean':>10}")
    for name, label in MODELS.items():
        print(
            f"{label:<10}"
            + "".join(f"{100 * value:>11.1f}" for value in results[name]["accuracy"].values())
            + f"{100 * results[name]['mean_accuracy']:>10.1f}"
        )
    gain = 100 * (results["drsn-cw"]["mean_accuracy"] - results["resnet"]["mean_accuracy"])
    print(f"DRSN-CW minus ResNet: {gain:+.1f} points on average (one run of one seed).")


def _print_thresholds(result: dict) -> None:
    low, high = result["snr_db_range"]
    print(f"\nSpearman's rank correlation of tau with the window's noise level, {low:g} to {high:g} dB")
    for name, rho in result["spearman_by_layer"].items():
        print(f"{name:<24}{_number(rho):>10}")
    print(f"{'mean of the layers':<24}{_number(result['spearman_mean_of_layers']):>10}")
    print(f"{'of the mean threshold':<24}{_number(result['spearman_of_mean_threshold']):>10}")


def run(
    dataset: Dataset,
    out: Path,
    *,
    quick: bool,
    seed: int,
    epochs: int | None = None,
) -> dict:
    """Train both networks, print their accuracy and the thresholds, write two plots and learning.json to `out`.

    Args:
        dataset: training and test windows (N, 1, L).
        out: folder for the files; created if needed.
        quick: a few epochs on four of the classes, to see that everything works; its accuracies compare nothing.
        seed: of the initial weights, the order of the windows and all noise; both networks see the same noise.
        epochs: instead of the default 40 (12 if quick).

    Returns:
        The results as a dict that JSON can hold: accuracy of each model at each SNR, seconds, rank correlations.

    Raises:
        ImportError: matplotlib is missing (before any training). ValueError: epochs below 1.
    """
    epochs = (QUICK_EPOCHS if quick else EPOCHS) if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    require("matplotlib", "demo")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = ""
    if quick:
        every, dataset = len(dataset.class_names), _few_classes(dataset, QUICK_CLASSES)
        few = len(dataset.class_names)
        expected = (
            f"Quick: {few} of {every} classes, {', '.join(dataset.class_names)}. Both networks should end far above "
            f"{100 / few:.0f} %, which guessing gives; which of them is ahead means nothing yet.\n"
        )
    train_x, train_y, test_x, test_y = dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y
    generator = torch.Generator().manual_seed(seed + 1)
    tests = {snr: noisy(test_x, snr, generator) for snr in SNR_DB}  # the same noise for every model

    print(
        f"{dataset.description}\n{expected}{len(train_x)} training windows, {len(test_x)} test windows, "
        f"{epochs} epochs, SNR {', '.join(f'{snr:g}' for snr in SNR_DB)} dB on windows of unit variance"
    )
    results, models = {}, {}
    for name, label in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = paper_network(name, len(dataset.class_names)).to(device)
        start = time.perf_counter()
        loss = train(
            model, train_x, train_y, epochs=epochs, seed=seed, label=label, batch=QUICK_BATCH if quick else Recipe.batch
        )
        seconds = time.perf_counter() - start
        accuracies = {f"{snr:g}": accuracy(model, x, test_y) for snr, x in tests.items()}
        models[name] = model
        results[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_seconds": seconds,
            "final_loss": loss,
            "accuracy": accuracies,
            "mean_accuracy": sum(accuracies.values()) / len(accuracies),
        }
    _print_accuracy(results)
    tau, noise_rms, relative = _tau_against_noise(models["drsn-cw"], test_x, seed + 2)
    _print_thresholds(tau)

    drawn = [
        plots.accuracy(
            out / "accuracy.png",
            SNR_DB,
            {MODELS[n]: list(r["accuracy"].values()) for n, r in results.items()},
            1 / len(dataset.class_names),
        ),
        plots.thresholds(out / "thresholds.png", noise_rms, relative, tau["spearman_of_mean_threshold"]),
    ]
    report = {
        "data": dataset.description,
        "notes": list(dataset.notes),
        "classes": list(dataset.class_names),
        "train_windows": len(train_x),
        "test_windows": len(test_x),
        "epochs": epochs,
        "seed": seed,
        "quick": quick,
        "device": device,
        "snr_db": list(SNR_DB),
        "models": results,
        "thresholds": tau,
        "plots": [str(path) for path in drawn],
    }
    files.write_json(out / "learning.json", report)
    print(f"\nWritten to {out}: {', '.join(path.name for path in drawn)}, learning.json")
    return report
