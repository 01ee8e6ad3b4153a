"""python -m drsn_kernels info | demo"""

import argparse
import json
import sys
from pathlib import Path

from . import info


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
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "info":
        report = info.collect()
        print(json.dumps(report, indent=2)) if options.json else info.show(report)
        return 0
    from .demo import run  # torch, and the optional packages, only where they are needed

    try:
        run(options.data, options.out, quick=options.quick, epochs=options.epochs, seed=options.seed)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
