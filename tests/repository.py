"""The repository around the installed package: ROOT, and benchmarks/, which a test imports after this."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT))
import benchmarks  # noqa: E402, F401 - takes ROOT, where the source tree lies, out of sys.path again
