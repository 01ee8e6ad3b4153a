"""`pytest --benchmark` runs benchmarks/ through pytest-benchmark; without it nothing there is collected."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


def pytest_addoption(parser):
    group = parser.getgroup("drsn_kernels benchmarks")
    group.addoption("--benchmark", action="store_true", help="run the benchmark suite, benchmarks/, instead of tests/")
    group.addoption("--benchmark-grid", choices=("quick", "standard", "full"), default="quick",
                    help="how many of the cases: see python -m benchmarks --help (default: quick)")  # fmt: skip
    group.addoption("--benchmark-shapes", metavar="LETTERS", default="ABCDE", help="groups of shapes, of ABCDEFG")
    group.addoption("--benchmark-device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--benchmark-compile", choices=("auto", "none", "best", "all"), default="auto",
                    help="torch.compile of: nothing, the best form, every form; default: by case")  # fmt: skip
    group.addoption("--benchmark-rounds", type=int, metavar="N", help="of all providers in turn")


def pytest_configure(config):
    if not config.getoption("--benchmark"):
        return
    rounds = config.getoption("--benchmark-rounds")
    if rounds is not None and rounds < 1:
        raise pytest.UsageError(f"--benchmark-rounds must be at least 1, got {rounds}")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
    import repository  # noqa: F401 - the package benchmarks, whose modules are collected and import one another

    if not config.option.file_or_dir:  # not testpaths
        config.args[:] = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path, config):
    inside = BENCHMARKS in (collection_path, *collection_path.parents)
    return True if inside and not config.getoption("--benchmark") else None


def pytest_terminal_summary(terminalreporter, config):
    asked = [(config.invocation_params.dir / name.split("::")[0]).resolve() for name in config.option.file_or_dir]
    if not config.getoption("--benchmark") and any(BENCHMARKS in (path, *path.parents) for path in asked):
        terminalreporter.write_line("benchmarks/ is not run without --benchmark: pytest --benchmark")
