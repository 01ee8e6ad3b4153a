"""The arguments of `python -m drsn_kernels train`."""

import argparse
import math
from pathlib import Path

from ..models import NAMES
from ..noise import KINDS

# Of --task own, the first two of CWRU recordings too: how recordings become windows.
OWN = {"length": None, "stride": None, "rate": None, "channels": None, "normalise": "window"}
# What a run is: stored in its config.json, and taken from there by --resume.
DEFAULTS = {
    "task": "vibration",
    "data": None,
    "model": "drsn-cw",
    "noise": "gaussian",
    "snr": (-5.0, 5.0),
    "noise_protocol": "fresh",
    "epochs": 100,
    "batch": 128,
    "lr": 0.1,
    "seed": 0,
    "test_speakers": (),
    "without_normal": False,
    **OWN,
}
PROTOCOLS = ("fresh", "fixed")
TASKS = ("vibration", "own", "speech", "image")


def decibels(text: str) -> tuple[float, float]:
    """ "-5:5" or "0" -> (lowest, highest)."""
    low, _, high = text.partition(":")
    try:
        values = float(low), float(high or low)
    except ValueError:
        values = (math.nan, math.nan)
    if not (all(map(math.isfinite, values)) and values[0] <= values[1]):
        raise argparse.ArgumentTypeError(f"takes LOWEST:HIGHEST or one number, in decibels, got {text!r}")
    return values


def channel_list(text: str) -> list[int | str]:
    """ "0,2" or "x,y" -> numbers from 0, or names."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"takes numbers from 0 or names, with commas between them, got {text!r}")
    return [int(name) if name.isdecimal() else name for name in names]


def join_snr(arguments: list[str]) -> list[str]:
    """--snr -5:5 as --snr=-5:5: argparse takes -5:5 for an option, because it is no number."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--snr":
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a run are left out of the namespace unless they are given, so that --resume can tell."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--task", choices=TASKS, help="default vibration")
    parser.add_argument("--data", type=Path, metavar="FOLDER",
                        help="own: a subfolder of recordings for each class, or a table, .npz or .csv; vibration: CWRU "
                        ".mat files (default: simulated bearings); speech: LABEL_SPEAKER_TAKE.wav files; image: idx "
                        "files as of MNIST (default: scikit-learn's digits)")  # fmt: skip
    parser.add_argument("--model", choices=NAMES, help="default drsn-cw")
    parser.add_argument("--noise", choices=(*KINDS, "none"),
                        help="in training and test; default gaussian, with --task own none")  # fmt: skip
    parser.add_argument("--snr", type=decibels, metavar="DB",
                        help="LOWEST:HIGHEST, drawn for each sample and epoch, or a number; default -5:5")  # fmt: skip
    parser.add_argument("--noise-protocol", choices=PROTOCOLS,
                        help="of the training data: new noise and SNR in every epoch, or, as in the paper, once; "
                        "default fresh")  # fmt: skip
    parser.add_argument("--epochs", type=int, metavar="N", help="default 100")
    parser.add_argument("--batch", type=int, metavar="N", help="samples a step, over all processes; default 128")
    parser.add_argument("--lr", type=float, help="at first; a tenth after 40 %% and 80 %% of the epochs; default 0.1")
    parser.add_argument("--seed", type=int, help="of weights, order and noise; default 0")
    parser.add_argument("--test-speakers", metavar="NAME,NAME", type=lambda text: tuple(text.split(",")),
                        help="speech: hold these speakers out instead of takes 0 to 4")  # fmt: skip
    parser.add_argument("--without-normal", action="store_true", help="vibration: without the class of Normal_*.mat")
    own = parser.add_argument_group("of --task own", "--length and --stride also of --task vibration with --data")
    own.argument_default = argparse.SUPPRESS
    own.add_argument("--length", type=int, metavar="SAMPLES",
                     help="a window; default 2048, or less where a recording of one's own is short")  # fmt: skip
    own.add_argument("--stride", type=int, metavar="SAMPLES",
                     help="from one training window to the next; default half the length")  # fmt: skip
    own.add_argument("--rate", type=float, metavar="HZ", help="bring all recordings to this sampling rate; a file that "
                     "does not say its own is taken to be at it")  # fmt: skip
    own.add_argument("--channels", type=channel_list, metavar="A,B", help="by number from 0 or name; default all")
    own.add_argument("--normalise", choices=("window", "training"), help="each window to zero mean and unit variance, "
                     "or all by the training data's, which keeps levels; default window")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("train-out"), help="default train-out")
    parser.add_argument("--resume", action="store_true", default=False,
                        help="continue the run in --out exactly, with its options")  # fmt: skip
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=None,
                        help="a step as one CUDA graph; default: on a GPU and in one process")  # fmt: skip
    parser.add_argument("--save-minutes", type=float, default=5.0, metavar="MINUTES",
                        help="between checkpoints inside an epoch; default 5")  # fmt: skip


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE",
                        help=".npy, .npz, .csv, .txt, .mat or .wav, or folders of them")  # fmt: skip
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of a run, or its checkpoint.pt")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .csv file; default: on the screen")
    parser.add_argument("--thresholds", action="store_true", help="the mean threshold of every shrinkage unit as well")
    parser.add_argument("--rate", type=float, metavar="HZ", help="of files that do not say their sampling rate; "
                        "default: the run's")  # fmt: skip
    parser.add_argument("--channels", type=channel_list, metavar="A,B",
                        help="by number from 0 or name; default: the run's")  # fmt: skip
    parser.add_argument("--stride", type=int, metavar="SAMPLES",
                        help="from one window to the next; default: its length")  # fmt: skip
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of a run, or its checkpoint.pt")
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="to write")
