"""Python in a process of its own, which finds the installed package; and a function in several threads."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable


def python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=900)


def in_threads(run: Callable, count: int = 4) -> list:
    """run(i) in `count` threads at a time: what each returned; an exception in one is raised here."""
    results, start = [None] * count, threading.Barrier(count)

    def body(i: int) -> None:
        start.wait()
        try:
            results[i] = run(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in results:
        if isinstance(error, BaseException):
            raise error
    return results
