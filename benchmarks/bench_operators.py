"""The benchmark suite as tests of pytest-benchmark: one for each case and provider, a table for each case.

    pytest --benchmark                                    one shape of each group, and the paper's network
    pytest --benchmark --benchmark-shapes C -k "not network and not compiled"
    pytest --benchmark --benchmark-json=now.json --benchmark-columns=median,iqr,rounds

All providers of a case that are selected run interleaved, once, after each was checked; each test then replays its own
times, so that pytest-benchmark's tables, files and comparisons hold them. The other columns are in "extra_info".
"""

import pytest

from .cases import select
from .rows import environment
from .run import ROUNDS, Settings, check_device, measure, providers_of


class Replay:
    """A timer for pytest-benchmark that runs through times taken before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def feed(self, benchmark, seconds: list[float]) -> None:
        left = iter(seconds)

        def advance() -> None:
            self.now += next(left)

        benchmark.pedantic(advance, rounds=len(seconds), iterations=1)


replay = Replay()


def _settings(config) -> Settings:
    grid = config.getoption("--benchmark-grid")
    rounds = config.getoption("--benchmark-rounds")
    device = check_device(config.getoption("--benchmark-device"))
    return Settings(device, ROUNDS[grid] if rounds is None else rounds, config.getoption("--benchmark-compile"), grid)


def pytest_generate_tests(metafunc) -> None:
    try:
        settings = _settings(metafunc.config)
        letters = metafunc.config.getoption("--benchmark-shapes")
        cases = select(letters, settings.grid, settings.device)
    except ValueError as error:
        raise pytest.UsageError(f"--benchmark: {error}") from None
    tests = [(case, provider) for case in cases for provider in providers_of(case, settings)]
    metafunc.parametrize("case, provider", tests, ids=[f"{case}-{provider}" for case, provider in tests])


@pytest.fixture(scope="session")
def measured(request):
    """case -> its rows by provider, and why others have none; timed at its first test."""
    settings, about, results = _settings(request.config), None, {}

    def of(case):
        nonlocal about
        about = about or environment(settings.device)
        if case not in results:
            chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            rows, refused = measure(case, settings, about, [p["provider"] for p in chosen if p.get("case") == case])
            results[case] = {row["provider"]: row for row in rows}, refused
        return results[case]

    return of


@pytest.mark.benchmark(timer=replay)
def test_speed(case, provider, measured, benchmark):
    rows, refused = measured(case)
    if provider.name in refused:
        pytest.fail(f"not timed: {refused[provider.name]}", pytrace=False)
    row = dict(rows[provider.name])
    seconds = row.pop("seconds")
    benchmark.group = case.id
    benchmark.extra_info.update(row)
    replay.feed(benchmark, seconds)
