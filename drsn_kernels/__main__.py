"""python -m drsn_kernels info | demo | train | warmup"""

import argparse
import json
import sys
from pathlib import Path

from . import info
from ._extras import exit_status
from .train import arguments as train_arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m drsn_kernels", description="Fused kernels for residual shrinkage networks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tell = commands.add_parser("info", help="versions, and which backends are available and why")
    tell.add_argument("--json", action="store_true", help="print JSON")
    demo = commands.add_parser("demo", help="check, speed and learning on vibration signals, in a few minutes")
    demo.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of CWRU .mat files (default: simulated bearings)"
    )
    demo.add_argument("--out", type=Path, metavar="FOLDER", default=Path("demo-out"), help="for results and plots")
    demo.add_argument("--quick", action="store_true", help="a small version of every part, in under a minute")
    demo.add_argument("--epochs", type=int, metavar="N", help="training epochs (default 40, 10 with --quick)")
    demo.add_argument("--seed", type=int, default=0)
    warm = commands.add_parser("warmup", help="compile the Triton kernels of a model ahead of its first step")
    warm.add_argument("model", metavar="PACKAGE.MODULE:FACTORY", help="a callable without arguments, or an nn.Module")
    warm.add_argument(
        "--input", action="append", required=True, metavar="SIZES", help="such as 128,1,2048; may be repeated"
    )
    warm.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    warm.add_argument("--autocast", action="store_true", help="a float32 model under torch.autocast to --dtype")
    warm.add_argument("--eval-only", action="store_true", help="without a training step")
    warm.add_argument("--channels-last", action="store_true", help="inputs and model in channels_last order")
    warm.add_argument("--target", metavar="GPU", help="without a GPU: cuda:80, cuda:90, cuda:100 or hip:gfx942")
    train = commands.add_parser("train", help="train a network of the paper on vibration, speech or images")
    train_arguments.add_arguments(train)
    return parser


def _run(options: argparse.Namespace) -> int:
    # torch, and the optional packages, only where they are needed
    if options.command == "warmup":
        from .warmup import command

        command(
            options.model, options.input, dtype=options.dtype, eval_only=options.eval_only, autocast=options.autocast,
            channels_last=options.channels_last, target=options.target,
        )  # fmt: skip
        return 0
    if options.command == "train":
        from .train.command import command

        return command(options)
    from .demo import run

    run(options.data, options.out, quick=options.quick, epochs=options.epochs, seed=options.seed)
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        print("error: bench is no command of the package; in the repository: python -m benchmarks", file=sys.stderr)
        return 2
    options = _parser().parse_args(train_arguments.join_snr(arguments))
    if options.command == "info":
        report = info.collect()
        print(json.dumps(report, indent=2)) if options.json else info.show(report)
        return 0
    return exit_status(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
