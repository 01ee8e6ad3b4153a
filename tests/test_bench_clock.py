"""What a clock reports: on a CUDA device GPU time, and host time apart. Host and device are made up."""

import contextlib
from types import SimpleNamespace

import pytest
import repository  # noqa: F401 - benchmarks/
import torch

from benchmarks import clock as clocks
from benchmarks import run
from benchmarks.cases import Case
from benchmarks.clock import CudaClock, WallClock
from benchmarks.rows import ENVIRONMENT
from drsn_kernels.demo.timing import Call

ABOUT = {name: "" for name in ENVIRONMENT}
MS, US = 1e-3, 1e-6


class Machine:
    """A host with its time, and a device that does what is launched one after the other, as soon as it can."""

    cycles_per_second = 2e9

    def __init__(self):
        self.now = self.free = 0.0
        self.captured = None  # while a graph is captured: what it holds
        self.launched = []

    def spend(self, seconds):
        self.now += seconds

    def launch(self, name, seconds):
        if self.captured is not None:
            self.captured.append((name, seconds))
            return
        self.launched.append(name)
        self.free = max(self.free, self.now) + seconds

    def wait(self):
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now = max(self.now, self.free)

    def call(self, host=MS, device=30 * US, pieces=10):
        """Ten launches, each after its share of host time."""
        for _ in range(pieces):
            self.spend(host / pieces)
            self.launch("kernel", device / pieces)


@pytest.fixture
def machine(monkeypatch):
    """A machine in place of torch.cuda and of the host's clock."""
    machine = Machine()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(machine.free, machine.now)

        def query(self):
            return self.at <= machine.now

        def synchronize(self):
            machine.now = max(machine.now, self.at)

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Graph:
        def replay(self):
            machine.spend(10 * US)
            for name, seconds in self.holds:
                machine.launch(name, seconds)

    @contextlib.contextmanager
    def capture(graph):
        machine.captured = graph.holds = []
        try:
            yield
        finally:
            machine.captured = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": machine.wait, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": lambda stream: contextlib.nullcontext(),
        "_sleep": lambda cycles: machine.launch("sleep", cycles / machine.cycles_per_second),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    flush = SimpleNamespace(zero_=lambda: machine.launch("flush", 60 * US))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: flush)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: machine.now)
    return machine


def forbidden_in_a_graph(machine):
    if machine.captured is not None:
        raise RuntimeError("this call cannot be captured")


@pytest.mark.parametrize("way", ["graph", "events"])
def test_a_call_bound_by_the_host_is_not_reported_as_gpu_time(machine, way):
    def bound():
        if way == "events":
            forbidden_in_a_graph(machine)
        machine.call(host=1 * MS, device=30 * US)

    start, stop = clocks._events()
    start.record()
    bound()
    stop.record()
    assert start.elapsed_time(stop) > 0.9  # what events around such a call show: the host

    clock, call = CudaClock(), Call(bound)
    for _ in range(3):
        assert clock(call) == {"gpu": pytest.approx(30 * US), "host": pytest.approx(1 * MS)}
    assert clock.way(call) == way


@pytest.mark.parametrize("way", ["graph", "events"])
def test_a_call_bound_by_the_device_does_not_have_its_time_in_the_hosts(machine, way):
    idle = []

    def bound():
        idle.append(machine.free <= machine.now)
        if way == "events":
            forbidden_in_a_graph(machine)
        machine.call(host=20 * US, device=5 * MS)

    clock, call = CudaClock(), Call(bound)
    machine.launch("of somebody else", 7 * MS)
    for _ in range(3):
        assert clock(call) == {"gpu": pytest.approx(5 * MS), "host": pytest.approx(20 * US)}
    assert idle[0]  # the host is timed with nothing in the queue, so that it does not wait for room there
    assert clock.way(call) == way


def test_what_comes_before_a_call_is_in_neither_time(machine):
    clock, call = CudaClock(), Call(machine.call, before=lambda: machine.call(host=2 * MS, device=8 * MS))
    assert clock(call) == {"gpu": pytest.approx(30 * US), "host": pytest.approx(1 * MS)}
    assert clock.way(call) == "events"


def test_the_cache_is_cold_and_the_device_asleep_before_what_is_timed(machine):
    graph, events = Call(machine.call), Call(machine.call, before=lambda: machine.launch("before", 1 * US))
    clock = CudaClock()
    for call, before in ((graph, []), (events, ["before"])):
        clock(call)
        assert machine.launched[-12 - len(before) :] == [*before, "flush", "sleep", *["kernel"] * 10]


def test_a_head_start_that_was_too_short_is_doubled(machine):
    """The host is ten times as slow as it was on the idle device: no sample is taken before it sleeps long enough."""
    hosts = iter([1 * MS] + [10 * MS] * 20)
    clock = CudaClock()
    machine.launched.clear()
    times = clock(Call(lambda: machine.call(host=next(hosts)), before=lambda: None))
    assert times == {"gpu": pytest.approx(30 * US), "host": pytest.approx(1 * MS)}
    assert machine.launched.count("sleep") == 4  # 2, 4, 8 and 16 ms


def waiting(machine):
    def run():
        machine.call()
        machine.wait()

    return Call(run)


def test_a_call_that_waits_for_the_device_has_no_gpu_time(machine):
    with pytest.raises(RuntimeError, match="no GPU time: .* waits for the device"):
        CudaClock()(waiting(machine))


def test_without_gpu_time_or_with_a_wrong_graph_there_is_no_row(machine):
    clock, right = CudaClock(), Call(machine.call)

    def judge(mode):
        wrong = lambda call: None if call is right else "y differs"  # noqa: E731
        return SimpleNamespace(objection=wrong, case=Case("shrink_train", "C", (4, 6, 40), mode))

    lenient = SimpleNamespace(objection=lambda call: None, case=None)
    assert run.objection(lenient, waiting(machine), clock).startswith("raised RuntimeError: no GPU time")
    assert run.objection(judge("both"), right, clock) == "y differs"
    assert run.objection(judge("step"), right, clock) is None  # each step starts where the one before ended


def test_slowed_on_the_device(machine):
    clock = CudaClock()
    slower = clock.slowed(Call(machine.call), 1.5)
    assert clock(slower)["gpu"] == pytest.approx(45 * US, rel=1e-4) and clock.way(slower) == "graph"


def test_the_wall_clock_leaves_out_what_comes_before(machine):
    call = Call(lambda: machine.spend(2), lambda: machine.spend(5))
    assert WallClock()(call) == {"time": 2} and WallClock().way(call) == "wall"


def test_slowed_waits_for_the_factor(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(ticks))
    assert WallClock().slowed(Call(lambda: "result"), 5).run() == "result"
    assert next(ticks) == 6  # started at 0, took 1, waited until 5


@pytest.mark.gpu
@pytest.mark.parametrize("mode, way", [("both", "graph"), ("backward", "events")])
def test_rows_of_a_gpu_are_checked_as_they_are_timed(mode, way):
    settings = run.Settings("cuda", rounds=1, compile="none")
    rows, refused = run.measure(Case("shrink_train", "C", (8, 6, 40), mode), settings, ABOUT)
    assert refused == {} and {one["provider"] for one in rows} >= {"port", "best", "triton"}
    assert {one["clock"] for one in rows if one["provider"] != "floor"} == {way}
