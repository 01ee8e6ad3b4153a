"""A Python process in which Triton compiles: in pytest's own process it interprets, and it is one or the other."""

import os
import subprocess
import sys
from pathlib import Path


def child(*arguments: str, cwd: Path, cache: Path, **env: str) -> subprocess.CompletedProcess:
    """Run Python in a folder, with Triton's disk cache in another: the fixture triton_cache, unless what is compiled is
    the question."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, cwd=cwd)
