"""The command line: `python -m drsn_kernels`, or `drsn` where the package is installed.

A command is an entry of COMMANDS. What only one of them needs is imported when it runs.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import info
from ._extras import exit_status, program
from ._version import __version__
from .train import arguments as train_arguments


@dataclass(frozen=True)
class Command:
    """What follows the program's name.

    Attributes:
        help: a line for the list of all commands.
        description: for its own --help, in lines as they are printed.
        examples: what follows the program's name, and beside it what that does.
        arguments: adds its options to a parser.
        run: takes the parsed options and returns the exit status.
    """

    help: str
    description: str
    examples: tuple[tuple[str, str], ...]
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# ---- info


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(options: argparse.Namespace) -> int:
    report = info.collect()
    print(json.dumps(report, indent=2)) if options.json else info.show(report)
    return 0


# ---- demo


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of CWRU .mat files (default: simulated bearings)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("demo-out"),
                        help="for results and plots; default demo-out")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small version of every part, in under a minute")
    parser.add_argument("--epochs", type=int, metavar="N", help="training epochs (default 40, fewer with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise; default 0")


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    run(options.data, options.out, quick=options.quick, epochs=options.epochs, seed=options.seed)
    return 0


# ---- train


def _train(options: argparse.Namespace) -> int:
    from .train.command import command

    return command(options)


# ---- predict, export


def _predict(options: argparse.Namespace) -> int:
    from .train.predictions import command

    return command(options)


def _export(options: argparse.Namespace) -> int:
    from .train.exported import command

    return command(options)


# ---- warmup


def _warmup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PACKAGE.MODULE:FACTORY", help="a callable without arguments, or an nn.Module")
    parser.add_argument(
        "--input", action="append", required=True, metavar="SIZES", help="such as 128,1,2048; may be repeated"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="default float32")  # fmt: skip
    parser.add_argument("--autocast", action="store_true", help="a float32 model under torch.autocast to --dtype")
    parser.add_argument("--eval-only", action="store_true", help="without a training step")
    parser.add_argument("--channels-last", action="store_true", help="inputs and model in channels_last order")
    parser.add_argument("--target", metavar="GPU", help="without a GPU: cuda:80, cuda:90, cuda:100 or hip:gfx942")


def _warmup(options: argparse.Namespace) -> int:
    from .warmup import command

    command(
        options.model, options.input, dtype=options.dtype, eval_only=options.eval_only,
        autocast=options.autocast, channels_last=options.channels_last, target=options.target,
    )  # fmt: skip
    return 0


# ---- all of them, in the order in which --help has them

COMMANDS = {
    "info": Command(
        "versions, and which backends are available and why",
        "Print the versions of what is installed, and for each backend whether it is available and why.",
        (("info", "a table"), ("info --json", "the same for a program to read")),
        _info_arguments,
        _info,
    ),
    "demo": Command(
        "check, speed and learning on vibration signals, in a few minutes",
        "Four parts: what is installed; the fused operator against plain PyTorch; a training step of the paper's\n"
        "network with and without it; DRSN-CW and a ResNet trained on noisy vibration signals.",
        (
            ("demo --quick", "every part, small; under a minute"),
            ("demo --out results", "on simulated bearings; tables and plots in results"),
            ("demo --data cwru", "on a folder of CWRU .mat files"),
        ),
        _demo_arguments,
        _demo,
    ),
    "train": Command(
        "train a network of the paper",
        "Train a network of the paper by its recipe, with noise, and leave a folder with the checkpoint, a log,\n"
        "results and pictures. A run that was stopped continues exactly.",
        (
            ("train --epochs 10 --out run", "DRSN-CW on simulated bearings"),
            ("train --data cwru --snr -5:5 --out run", "on CWRU .mat files, noise of -5 to 5 dB"),
            ("train --task own --data FOLDER --out run", "on your recordings, a subfolder for each class"),
            ("train --resume --out run", "continue, after Ctrl-C or a power cut"),
        ),
        train_arguments.add_arguments,
        _train,
    ),
    "predict": Command(
        "classes of recordings by a trained network",
        "Read recordings that a run has not seen, cut them into windows and print a table: the class of every window\n"
        "and its probability, and a line for the file as a whole, with the mean of the probabilities.",
        (
            ("predict --run run new.wav more/", "a table on the screen"),
            ("predict --run run --out predictions.csv new.csv", "the table as a file"),
        ),
        train_arguments.add_predict_arguments,
        _predict,
    ),
    "export": Command(
        "a trained network as an ONNX file",
        "Write the model of a run as an ONNX file for any number of windows, and compare it with the model.",
        (
            ("export --run run --onnx model.onnx", "normalisation included"),
            ("export --run checkpoint.pt --onnx model.onnx", "of a checkpoint that was copied"),
        ),
        train_arguments.add_export_arguments,
        _export,
    ),
    "warmup": Command(
        "compile the Triton kernels of a model ahead of its first step",
        "Build a model, run it once for each --input, and leave its kernels in Triton's cache on the disk.\n"
        "With --target they are compiled for a GPU that is not there.",
        (
            ("warmup package.module:model --input 128,1,2048", "for the GPU of this machine"),
            ("warmup package.module:model --input 128,1,2048 --target cuda:90", "for an H100, without one"),
        ),
        _warmup_arguments,
        _warmup,
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(), formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fused kernels for deep residual shrinkage networks in PyTorch.",
        epilog=f"options and examples of a command: {program()} COMMAND --help",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"drsn_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        width = max(len(example) for example, _ in command.examples)
        lines = [f"  {program()} {example:{width}s}  # {what}" for example, what in command.examples]
        command.arguments(
            commands.add_parser(
                name, help=command.help, description=command.description, epilog="\n".join(["examples:", *lines]),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )  # fmt: skip
        )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 after an error in one sentence, 2 for options that argparse refuses."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        print("error: bench is no command of the package; in the repository: python -m benchmarks", file=sys.stderr)
        return 2
    if not arguments:
        _parser().print_help(sys.stderr)
        return 2
    options = _parser().parse_args(train_arguments.join_snr(arguments))
    return exit_status(lambda: COMMANDS[options.command].run(options))


if __name__ == "__main__":
    sys.exit(main())
