"""The arguments of the command; `pytest --benchmark` has the same under its own prefix."""

import argparse
import math
from pathlib import Path

from .cases import OPS, SHAPES
from .compare import TOLERANCE
from .providers import COMPILE

ROUNDS = {"quick": 7, "standard": 15, "full": 15}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", metavar="LETTERS", help=f"of {''.join(SHAPES)}; default ABCDE, on CUDA ABCDEG")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a training step and a forward pass on one shape a letter")
    size.add_argument("--full", action="store_true", help="every operator, mode, dtype and format on every shape")
    parser.add_argument("--ops", nargs="+", metavar="OP", help=f"only these of {', '.join(OPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, metavar="N", help="of all providers in turn (default 15, 7 with --quick)")
    parser.add_argument("--compile", choices=("auto", *COMPILE), default="auto",
                        help="torch.compile of: nothing, the best form, every form; default: by case")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results.json, results.csv and plots")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a stored results.json; a regression exits with 1")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="SHARE",
                        help=f"of the stored ratio to the floor (default {TOLERANCE})")  # fmt: skip
    parser.add_argument("--slow-down", type=slow_down, metavar="PROVIDER=FACTOR",
                        help="make a provider slower on purpose, to see the gate catch it")  # fmt: skip


def slow_down(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    try:
        value = float(factor)
    except ValueError:
        value = 0
    if not name or not 1 <= value < math.inf:  # nor nan
        raise argparse.ArgumentTypeError(f"takes PROVIDER=FACTOR with a finite factor of at least 1, got {text!r}")
    return name, value
