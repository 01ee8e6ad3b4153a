"""Pictures of what a shrinkage does, from networks that are trained here, for docs/experiments/README.md.

    python -m experiments.pictures [--vibration FOLDER] [--image FOLDER] [--out docs/pictures] [--epochs N] [--quick]

Without a folder simulated vibration and scikit-learn's digits. OUT gets the PNGs, and numbers.json with what they show;
where OUT is docs/pictures, the page gets the tables.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import drsn_kernels as dk
from drsn_kernels._extras import require
from drsn_kernels.data import Dataset, load_digits
from drsn_kernels.demo.learning import spearman
from drsn_kernels.models import network
from drsn_kernels.train.recipe import Noise, RandomNoise, Recipe, accuracy, train_epochs

from . import ROOT, drawings
from .noises import pasted
from .report import insert
from .tasks import data

STORED, PAGE = ROOT / "docs" / "pictures", ROOT / "docs" / "experiments" / "README.md"
SNR_DB = (-5.0, 15.0)  # in training, and of the windows whose thresholds are looked at
SIGNAL_SNR_DB = 0.0
EPOCHS, QUICK_EPOCHS = {"vibration": 30, "image": 8}, 2
TESTED_IMAGES = 2000
SHOWN_IMAGES = 3
# As experiments/tasks.py has it, but the first unit keeps the image's size, so that its map shows single pixels.
IMAGE_NETWORK = {"dims": 2, "stem": (8, 1), "stages": ((8, 1, 1), (16, 1, 2), (16, 1, 2))}
ALPHA = 0.5  # of the untrained shrinkage: a sigmoid at 0


# ---- networks, and what their shrinkages do --------------------------------------------------------------------------


def build(dataset: Dataset, seed: int, **options) -> nn.Module:
    """A DRSN-CW with its initial weights."""
    torch.manual_seed(seed)
    return network("drsn-cw", in_channels=dataset.train_x.shape[1], classes=len(dataset.class_names), **options)


def train(model: nn.Module, dataset: Dataset, noise: Noise, epochs: int, seed: int) -> None:
    """By the paper's recipe."""
    recipe, generator = Recipe(epochs=epochs), torch.Generator().manual_seed(seed)
    losses = train_epochs(recipe, model, dataset.train_x, dataset.train_y, generator=generator, noise=noise)
    for epoch, loss in enumerate(losses, 1):
        print(f"epoch {epoch} of {epochs}: loss {loss:.3f}", flush=True)


@dataclass(frozen=True)
class Shrunk:
    """One shrinkage in one pass: its input x and output y (N, C, *spatial), without the identity, and tau (N, C).

    identity (N, C, *spatial) is what the unit adds to y: its own input, behind the shortcut. y + identity is the unit's
    output.
    """

    x: torch.Tensor
    tau: torch.Tensor
    y: torch.Tensor
    identity: torch.Tensor

    @property
    def alpha(self) -> torch.Tensor:
        """tau over the mean of |x| (N, C), the gate's output; 0 where x is 0 throughout."""
        mean = dk.abs_mean(self.x)
        return torch.where(mean > 0, self.tau / mean, 0)

    @property
    def zeroed(self) -> torch.Tensor:
        """Share of the channels that are zero after the shrinkage, at each position: (N, *spatial)."""
        return (self.y == 0).float().mean(1)


@torch.no_grad()
def observe(model: nn.Module, x: torch.Tensor) -> dict[str, Shrunk]:
    """All shrinkages of the model on x (N, C, *lengths), in eval mode, by module name."""
    model.eval()
    inputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # and what is added

    def keep(module, args, kwargs, name):
        inputs[name] = args[0], kwargs["residual"]

    hooks = [
        module.register_forward_pre_hook(partial(keep, name=name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, dk.Shrinkage)
    ]
    try:
        with dk.record_tau(model) as taus:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: Shrunk(x, taus[name], dk.soft_threshold(x, taus[name]), identity)
        for name, (x, identity) in inputs.items()
    }


def batches(model: nn.Module, x: torch.Tensor) -> Iterator[tuple[slice, dict[str, Shrunk]]]:
    """observe for 256 samples at a time, with their place in x."""
    for start in range(0, len(x), 256):
        part = slice(start, start + 256)
        yield part, observe(model, x[part])


# ---- 1. thresholds against noise -------------------------------------------------------------------------------------


def _recorded(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Unit -> tau and alpha (N, C) of every sample."""
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for _, units in batches(model, x):
        for name, unit in units.items():
            parts.setdefault(name, []).append((unit.tau, unit.alpha))
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in parts.items()}


def thresholds(model: nn.Module, untrained: nn.Module, x: torch.Tensor, seed: int, out: Path) -> dict:
    """Rank correlation of tau, and of alpha = tau / mean |x|, with the noise level of the window, unit by unit.

    Also `rises`: the share of windows whose tau is higher at the lowest SNR than the same window's at the highest, so
    that differences between windows do not count; and `untrained`: tau's correlation in the network before training.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = SNR_DB
    snr = low + (high - low) * torch.rand(len(x), generator=generator)
    rms = 10 ** (-snr / 20)  # exact: the clean windows have unit RMS
    noisy, loudest, quietest = (dk.noise.add_noise(x, level, generator=generator) for level in (snr, low, high))
    found, loud, quiet = (_recorded(model, windows) for windows in (noisy, loudest, quietest))
    before = _recorded(untrained, noisy)
    numbers = {
        name: {
            "tau": spearman(tau.mean(1), rms),
            "untrained": spearman(before[name][0].mean(1), rms),
            "alpha": spearman(alpha.mean(1), rms),
            "rises": float((loud[name][0].mean(1) > quiet[name][0].mean(1)).double().mean()),
            "channels": [spearman(channel, rms) for channel in tau.T],
        }
        for name, (tau, alpha) in found.items()
    }
    drawings.thresholds(out / "thresholds.png", rms, {name: tau for name, (tau, _) in found.items()}, numbers)
    return {"windows": len(x), "snr_db": list(SNR_DB), "units": numbers}


def table(units: dict[str, dict]) -> str:
    """Markdown: what :func:`thresholds` found, a row for each unit."""
    lines = ["| unit | tau | channels | alpha | tau, untrained | tau rises |", "|---|---|---|---|---|---|"]
    for name, unit in units.items():
        defined = [rho for rho in unit["channels"] if rho is not None]
        span = f"{min(defined):+.2f} to {max(defined):+.2f}" if defined else ""
        tau, alpha, untrained = (drawings.signed(unit[key]) for key in ("tau", "alpha", "untrained"))
        lines.append(f"| {drawings.label(name)} | {tau} | {span} | {alpha} | {untrained} | {unit['rises']:.0%} |")
    return "\n".join(lines)


def regions_table(units: dict[str, dict]) -> str:
    """Markdown: what :func:`zeroed` found, a row for each unit."""
    lines = ["| unit | zero on the digit | on the pasted digit | elsewhere |", "|---|---|---|---|"]
    for name, unit in units.items():
        cells = [f"{unit[region]:.0%}" for region in ("digit", "pasted", "background")]
        lines.append(f"| {drawings.label(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(numbers: dict) -> dict[str, str]:
    """What stands between the markers of the page, by their name."""
    return {"thresholds": table(numbers["thresholds"]["units"]), "zeroed": regions_table(numbers["zeroed"]["units"])}


# ---- 2. a signal through the units -----------------------------------------------------------------------------------


def signal(model: nn.Module, x: torch.Tensor, seed: int, out: Path) -> dict:
    """The window of largest kurtosis, that is with the clearest strokes, clean and noisy, through every unit."""
    index = int(x.pow(4).mean((1, 2)).argmax())  # of unit variance each
    window = x[index : index + 1]
    noisy = dk.noise.add_noise(window, SIGNAL_SNR_DB, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([window, noisy])
    units = observe(model, both)
    numbers, shown = {}, {}
    for name, unit in units.items():
        zeros = (unit.y == 0).float().mean(2)
        carried = unit.identity[1].any(1).nonzero().flatten()  # the shortcut's channels of zeros are no input to show
        channel = int(carried[zeros[1, carried].argsort()[len(carried) // 2]])  # neither the busiest nor the emptiest
        parts = (unit.x, unit.tau, unit.y, unit.identity)
        shown[name] = Shrunk(*(part[:, channel] for part in parts))
        clean, under_noise = zeros.mean(1).tolist()
        numbers[name] = {"channel": channel, "zeroed_clean": clean, "zeroed_noisy": under_noise}
    drawings.signal(out / "signal.png", both[:, 0], shown, numbers, SIGNAL_SNR_DB)
    return {"window": index, "snr_db": SIGNAL_SNR_DB, "units": numbers}


# ---- 3. what is zeroed on an image -----------------------------------------------------------------------------------


def zeroed(model: nn.Module, x: torch.Tensor, seed: int, out: Path) -> dict:
    """Share of channels set to zero on the digit, on the small digit pasted in, and on neither, over images x."""
    images = pasted(x, torch.Generator().manual_seed(seed))
    digit = x[:, 0] > 0.2
    regions = {"digit": digit, "pasted": (images - x)[:, 0] > 0.2}
    regions["background"] = ~(digit | regions["pasted"])
    sums: dict[str, dict[str, float]] = {}
    for part, units in batches(model, images):
        for name, unit in units.items():
            full = _enlarge(unit.zeroed, x.shape[2:])
            for region, mask in regions.items():
                of_unit = sums.setdefault(name, dict.fromkeys(regions, 0.0))
                of_unit[region] += float(full[mask[part]].double().sum())
    numbers = {
        name: {region: total / int(regions[region].sum()) for region, total in of_unit.items()}
        for name, of_unit in sums.items()
    }
    first = images[:SHOWN_IMAGES]
    maps = {name: _enlarge(unit.zeroed, x.shape[2:]) for name, unit in observe(model, first).items()}
    drawings.zeroed(out / "zeroed.png", first[:, 0], regions["pasted"][:SHOWN_IMAGES], maps, numbers)
    return {"images": len(x), "units": numbers}


def _enlarge(maps: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Maps (N, h, w) to the image's size: every pixel gets the value of the position that covers it."""
    return F.interpolate(maps.unsqueeze(1), size, mode="nearest").squeeze(1)


# ---- 4. soft thresholding and ReLU -----------------------------------------------------------------------------------


def curves(tau: float = 1.0) -> dict[str, torch.Tensor]:
    """Both functions and their derivatives, by autograd, on a grid x: name -> (1000,)."""
    x = torch.linspace(-3, 3, 1000).requires_grad_()  # no point lies on a kink
    found = {"x": x.detach()}
    for name, function in {"soft threshold": partial(dk.soft_threshold, tau=tau), "ReLU": F.relu}.items():
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        found |= {name: y.detach(), f"{name}, derivative": slope}
    return found


# ---- 5. gradients by depth -------------------------------------------------------------------------------------------


def _shrink(x: torch.Tensor) -> torch.Tensor:
    """With the layer's units as positions, x (N, 1, units): each sample has one threshold."""
    return dk.shrink(x, lambda mean: torch.full_like(mean, ALPHA))


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "soft threshold": _shrink,
    "ReLU": F.relu,
    "sigmoid": torch.sigmoid,  # the classic case of vanishing: its derivative is at most 1/4
}


def gradient_norms(
    activation: Callable[[torch.Tensor], torch.Tensor], gain: float, depth: int, seed: int
) -> tuple[torch.Tensor, float]:
    """Norm (depth,) of the gradient at each layer's output over that at the last; the share of non-zero activations.

    A stack of `depth` fully connected layers of 256 units, each followed by the activation; nothing normalises, nothing
    is added, biases are 0. Weights are normal with variance gain / fan-in; the input (32, 1, 256) and the gradient at
    the last output are normal. float64, because the squares of a sigmoid's gradients underflow.
    """
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    outputs = [draw(32, 1, 256).requires_grad_()]
    for _ in range(depth):
        outputs.append(activation(outputs[-1] @ draw(256, 256) * (gain / 256) ** 0.5))
    grads = torch.autograd.grad(outputs[-1], outputs[1:], draw(32, 1, 256))
    norms = torch.stack([grad.norm() for grad in grads])
    kept = sum(float((y != 0).double().mean()) for y in outputs[1:]) / depth
    return norms / norms[-1], kept


def gradients(depth: int, seeds: range, out: Path) -> dict:
    """Gradient norms with weights of He's variance for all, and with the variance that suits what each lets through."""
    found: dict[str, dict[str, torch.Tensor]] = {"He": {}, "own": {}}
    numbers: dict[str, dict] = {}
    for name, activation in ACTIVATIONS.items():
        runs = [gradient_norms(activation, 2.0, depth, seed) for seed in seeds]
        found["He"][name] = torch.stack([norms for norms, _ in runs])
        kept = sum(share for _, share in runs) / len(runs)
        numbers[name] = {"kept": kept, "He": _per_layer(found["He"][name])}
        if name != "sigmoid":  # every layer multiplies the squared gradient by gain * kept
            found["own"][name] = torch.stack([gradient_norms(activation, 1 / kept, depth, s)[0] for s in seeds])
            numbers[name]["own"] = _per_layer(found["own"][name])
    drawings.gradients(out / "gradients.png", found, numbers)
    return {"depth": depth, "seeds": len(seeds), "activations": numbers}


def _per_layer(norms: torch.Tensor) -> float:
    """Geometric mean of the factor by which the norm (seeds, depth) changes on its way back through one layer."""
    return float((norms[:, 0].log().mean() / (norms.shape[1] - 1)).exp())


# ---- all of them -----------------------------------------------------------------------------------------------------


def make(
    vibration: Path | None, image: Path | None, out: Path, *, epochs: int | None = None, quick: bool, seed: int = 0
) -> dict:
    """Train both networks, draw every picture into the folder `out`, and return the numbers, also in numbers.json.

    Raises:
        ImportError: matplotlib or scikit-learn is missing. OSError, ValueError: a folder that cannot be read. All
        before anything is trained.
    """
    require("matplotlib", "train")
    signals = data("vibration" if vibration else "simulated", vibration, quick)
    images = data("image", image, quick) if image else load_digits()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the same numbers wherever it runs
    length = {task: epochs or (QUICK_EPOCHS if quick else EPOCHS[task]) for task in EPOCHS}
    numbers: dict = {"seed": seed, "epochs": length, "quick": quick}

    print(signals.description, flush=True)
    noise = RandomNoise("gaussian", SNR_DB)
    model = build(signals, seed)
    untrained = copy.deepcopy(model)
    train(model, signals, noise, length["vibration"], seed)
    tested = noise(signals.test_x, torch.Generator().manual_seed(seed + 1))
    numbers["vibration_accuracy"] = accuracy(model, tested, signals.test_y)
    numbers["thresholds"] = thresholds(model, untrained, signals.test_x, seed + 1, out)
    numbers["signal"] = signal(model, signals.test_x, seed + 1, out)

    print(images.description, flush=True)
    model = build(images, seed, **IMAGE_NETWORK)
    train(model, images, pasted, length["image"], seed)
    tested = pasted(images.test_x, torch.Generator().manual_seed(seed + 1))
    numbers["image_accuracy"] = accuracy(model, tested, images.test_y)
    numbers["zeroed"] = zeroed(model, images.test_x[:TESTED_IMAGES], seed + 1, out)

    drawings.curves(out / "derivative.png", curves())
    numbers["gradients"] = gradients(10 if quick else 50, range(seed, seed + (2 if quick else 10)), out)
    numbers = json.loads(json.dumps(numbers), parse_float=lambda digits: round(float(digits), 4))
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return numbers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.pictures", description=__doc__.split("\n")[0])
    parser.add_argument("--vibration", type=Path, metavar="FOLDER", help="CWRU .mat files; default: simulated")
    parser.add_argument("--image", type=Path, metavar="FOLDER", help="MNIST's idx files; default: 8 x 8 digits")
    parser.add_argument("--out", type=Path, help="default: docs/pictures; with --quick pictures-quick")
    parser.add_argument("--epochs", type=int, help="of both networks; default: 30 for vibration, 8 for images")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a few samples and epochs, to see that everything works")
    options = parser.parse_args(arguments)
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    out = options.out or (Path("pictures-quick") if options.quick else STORED)
    try:
        numbers = make(
            options.vibration, options.image, out, epochs=options.epochs, quick=options.quick, seed=options.seed
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if out.resolve() == STORED:
        for name, text in tables(numbers).items():
            insert(PAGE, name, text)
    print(f"{table(numbers['thresholds']['units'])}\nThe pictures and numbers.json are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
