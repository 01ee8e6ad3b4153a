"""python -m benchmarks: the benchmark, from the repository root."""

import sys

from .installed import ensure_installed

ensure_installed()

from .run import main  # noqa: E402

sys.exit(main())
