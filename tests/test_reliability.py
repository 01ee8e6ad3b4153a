"""What a long-running program relies on: threads, the same bits every time, memory that runs out, bad settings."""

import contextlib
import copy
import functools
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from oracle import AVERAGES, standard_gate, varied
from processes import in_threads, python
from torch import nn

import drsn_kernels as dk
from drsn_kernels import backends
from drsn_kernels.backends import cpu, cpu_memory

native = pytest.mark.skipif(cpu._cpu is None, reason=f"no compiled CPU kernels: {cpu.MISSING}")


# ---- several Python threads ------------------------------------------------------------------------------------------

THREADS, STEPS = 4, 3


@pytest.fixture
def threadable(kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter keeps its state in globals")
    return kernels


def same(a, b) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def passes(module: nn.Module, xs: list, lock=None) -> list[list[torch.Tensor]]:
    """Output and every gradient of one forward and backward pass for each x; autograd.grad, so no .grad is shared."""
    found = []
    for x in xs:
        x = x.detach().requires_grad_()
        with lock or contextlib.nullcontext():
            y = module(x, residual=x)
        found.append([y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], torch.cos(x.detach()))])
    return found


SIZES = [(4, 6, 70), (8, 32, 1025)]  # the second: outputs of more than 1 MiB, from the arena


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU], ids=["fused gate", "any gate"])
def test_one_module_in_several_threads(threadable, shape, activation):
    module = dk.Shrinkage(shape[1], activation=activation).eval()
    xs = [[varied(shape) for _ in range(STEPS)] for _ in range(THREADS)]
    alone = [passes(module, mine) for mine in xs]
    for ours, expected in zip(in_threads(lambda i: passes(module, xs[i])), alone, strict=True):
        assert all(same(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU], ids=["fused gate", "any gate"])
def test_one_module_in_training_with_forward_passes_one_at_a_time(threadable, activation):
    """As with any BatchNorm, running statistics updated from several threads need a lock; backward passes need none."""
    module, lock = dk.Shrinkage(6, activation=activation), threading.Lock()
    xs = [[varied((4, 6, 70)) for _ in range(STEPS)] for _ in range(THREADS)]
    alone = [passes(copy.deepcopy(module), mine) for mine in xs]
    for ours, expected in zip(in_threads(lambda i: passes(module, xs[i], lock)), alone, strict=True):
        assert all(same(a, b) for a, b in zip(ours, expected, strict=True))
    assert module.fc[1].num_batches_tracked == THREADS * STEPS


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_model_trained_in_each_thread(threadable, shape):
    model = nn.Sequential(nn.Conv1d(shape[1], shape[1], 3, padding=1), dk.Shrinkage(shape[1]), nn.BatchNorm1d(shape[1]))
    xs = [varied(shape) for _ in range(THREADS)]

    def train(i: int) -> list[torch.Tensor]:
        mine = copy.deepcopy(model)
        optimizer = torch.optim.SGD(mine.parameters(), 0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            mine(xs[i]).square().mean().backward()
            optimizer.step()
        return list(mine.state_dict().values())

    torch.set_num_threads(1)  # torch's convolution may add up in another order where threads are scarce
    expected = [train(i) for i in range(THREADS)]
    assert all(same(a, b) for a, b in zip(in_threads(train), expected, strict=True))


# ---- the same bits every time ----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A gate that torch computes element by element: nothing in it that depends on the number of threads."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, pooled):
        return torch.sigmoid(self.scale * pooled)


class Doubled(nn.Module):
    """Exact, however torch shares many averages out: its sigmoid is not, nor the gradient of a parameter."""

    def forward(self, pooled):
        return 2 * pooled


def lying(shape, layout: str, dtype=torch.float32) -> torch.Tensor:
    x = varied(shape, dtype)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([x, x], -1).flatten(-2)[..., ::2] if layout == "strided" else x


OPERATORS = {  # of (x, gate, average)
    "soft_threshold": lambda x, gate, average: dk.soft_threshold(x, torch.full(x.shape[:2], 0.3).to(x.device)),
    "abs_mean": lambda x, gate, average: dk.abs_mean(x),
    "shrink": lambda x, gate, average: dk.shrink(x, gate, average=average),
    "shrink, residual": lambda x, gate, average: dk.shrink(x, gate, average=average, residual=x),
    "shrink, in place": lambda x, gate, average: dk.shrink(x * 1, gate, average=average, inplace=True),
    "squeeze_excite": lambda x, gate, average: dk.squeeze_excite(x, gate),
}


@functools.lru_cache(maxsize=1)
def waves(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.cos(torch.arange(shape.numel(), dtype=torch.float64, device=device)).view(shape).to(dtype)


def everything(op, x, gate, average="channel") -> list[torch.Tensor]:
    """Output, gradients of x and of the gate, and the gate's buffers after the step; the gate is left as it was."""
    x, gate = x.detach().requires_grad_(), copy.deepcopy(gate)
    y = op(x, gate, average)
    g = waves(y.shape, y.dtype, y.device)
    grads = torch.autograd.grad(y, [x, *gate.parameters()], g, allow_unused=True)
    return [y.detach(), *(t for t in grads if t is not None), *gate.buffers()]


# Work for three threads: many rows; rows of several segments; a gate whose products are shared out.
SHAPES = {"rows": (8, 20, 1025), "long rows": (1, 3, 100_003), "wide gate": (70, 300, 5)}
LONG = {"one row": (1, 1, 300_001), "long rows in channels_last": (3, 40_001, 5)}
GATES = ["any", "plain", "norm", "batch norm"]


def check_threads(x, gate, operators: dict, averages: list) -> None:
    for average, (name, op) in itertools.product(averages, operators.items()):
        if average != averages[0] and not name.startswith("shrink"):
            continue  # has no average
        torch.set_num_threads(1)
        expected = everything(op, x, gate, average)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert same(everything(op, x, gate, average), expected), (name, average, threads)


@pytest.fixture
def cpu_kernels(kernels):
    if kernels.backend != "cpu":
        pytest.skip("no threads of ours")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("sizes", SHAPES | LONG)
def test_neither_threads_nor_repetition_change_a_bit(cpu_kernels, sizes, layout, dtype):
    """The guarantee of docs/use.md for the cpu backend, on every instruction set."""
    x, gate = lying((SHAPES | LONG)[sizes], layout, dtype), Doubled() if sizes in LONG else Scaled()
    check_threads(x, gate, OPERATORS, AVERAGES if sizes == "rows" else ["channel"])


@native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("kind", GATES[1:])
@pytest.mark.parametrize("sizes", SHAPES)
def test_nor_with_a_fused_gate(sizes, kind, layout):
    shape = SHAPES[sizes]
    if kind == "batch norm" and shape[0] == 1:
        pytest.skip("batch statistics of one sample")
    x = lying(shape, layout, torch.float32 if layout != "strided" else torch.bfloat16)
    gate = standard_gate(shape[1], 33 if sizes == "rows" else shape[1], shape[1], kind)
    check_threads(x, gate, {"shrink": OPERATORS["shrink"]}, AVERAGES if sizes == "rows" else ["channel"])


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("op", OPERATORS)
def test_deterministic_algorithms_are_all_there_is(kernels, request, op, kind):
    """No error, and the same bits; torch then fills fresh memory with NaN, none of which is left in a result."""
    x = varied((5, 6, 70))
    gate = Scaled() if kind == "any" else standard_gate(6, 5, 6, kind)
    expected = everything(OPERATORS[op], x, gate)
    request.getfixturevalue("deterministic")
    assert torch.empty(9).isnan().all()
    assert same(everything(OPERATORS[op], x, gate), expected)


@native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("kind", ["any", "norm", "batch norm"])
def test_outputs_from_kept_memory_are_written_whole(kind, layout, deterministic):
    """Large outputs come from csrc/cpu/arena.h, which torch does not fill: NaN that a freed output leaves must go."""
    shape = (18, 33, 1025)  # 2.3 MiB; smaller outputs are torch's own
    x, gate = lying(shape, layout), Scaled() if kind == "any" else standard_gate(33, 5, 33, kind)
    with dk.use_backend("cpu", strict=True):
        first = everything(OPERATORS["shrink"], x, gate)
        expected = [t.clone() for t in first]
        at = {t.data_ptr() for t in first[:2]}  # y and dx
        for t in first[:2]:
            t.fill_(float("nan"))
        del first, t
        again = everything(OPERATORS["shrink"], x, gate)
    assert {t.data_ptr() for t in again[:2]} == at and same(again, expected)


# ---- memory that runs out --------------------------------------------------------------------------------------------

OUT_OF_MEMORY = """
import os, resource, torch, drsn_kernels as dk
from drsn_kernels import backends
from drsn_kernels.backends import cpu
torch.set_num_threads(2)
cpu._cpu.set_cache_limit(0)
x = torch.randn(512, 64, 9)
last = x.transpose(1, 2).contiguous().transpose(1, 2)
tall = torch.randn(4096, 9, 64).transpose(1, 2)
gate = dk.Shrinkage(64).fc
wide = dk.Shrinkage(8, rd_channels=128).fc  # most of the memory is the kernel's own

def step(x, gate):
    x = x.detach().requires_grad_()
    y = dk.shrink(x, gate)
    return [y.detach(), *torch.autograd.grad(y, x, torch.ones(1).expand_as(y))]

calls = {
    "soft_threshold": lambda: [dk.soft_threshold(x, 0.5)],
    "abs_mean": lambda: [dk.abs_mean(tall)],
    "any gate": lambda: step(last, torch.sigmoid),
    "fused gate": lambda: step(x, gate),
    "wide gate": lambda: step(x.view(4096, 8, 9), wide),
}
none = resource.RLIM_INFINITY
with dk.use_backend("cpu", strict=True):
    for name, call in calls.items():
        expected, failed = call(), 0
        for extra in range(0, 24 << 20, 768 << 10):  # each allocation of the call has its turn to be the one that fails
            used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + extra, none))
            try:
                call()
                break
            except (MemoryError, RuntimeError):
                failed += 1
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (none, none))
            assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True)), name
        else:
            raise SystemExit(f"{name} does not fit in 24 MiB")
        print(name, failed, flush=True)
"""


@pytest.mark.slow
@native
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by RLIMIT_AS")
def test_running_out_of_memory_leaves_the_process_usable():
    """An exception, not the end of the process, whichever allocation fails; afterwards the same bits as before."""
    done = python(OUT_OF_MEMORY, MALLOC_MMAP_THRESHOLD_="65536")  # or freed memory would serve
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    failures = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(failures) == 5 and min(failures) >= 1, done.stdout


# ---- settings --------------------------------------------------------------------------------------------------------

VARIABLE = "the environment variable"
BAD_SETTINGS = [
    *(
        ("DRSN_BACKEND", value, f"{VARIABLE} DRSN_BACKEND must be one of auto, cpu, triton, torch, got {value!r}")
        for value in ("cudnn", "", "CPU")
    ),
    *(
        ("DRSN_CACHE_MIB", value, f"{VARIABLE} DRSN_CACHE_MIB takes a whole number of MiB, got {value!r}")
        for value in ("many", "", "-1", "1.5", "64 MiB")
    ),
]


@pytest.mark.parametrize("name, value, message", BAD_SETTINGS, ids=[f"{n}={v}" for n, v, _ in BAD_SETTINGS])
def test_a_malformed_environment_variable_is_one_sentence(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        backends._checked(value, f"{VARIABLE} {name}") if name == "DRSN_BACKEND" else cpu_memory.cache_limit()
    assert str(error.value) == message


REMOVED = f'{VARIABLE} DRSN_BACKEND names "cuda", which is no longer a backend: on a GPU "triton" has the kernels'


@pytest.mark.parametrize("name, value, message", [("DRSN_BACKEND", "cuda", REMOVED), BAD_SETTINGS[-1]])
def test_and_comes_at_import(name, value, message):
    done = python("import drsn_kernels", **{name: value})
    assert done.returncode == 1 and done.stderr.rstrip().split("\n")[-1] == f"ValueError: {message}"


@native
@pytest.mark.parametrize(
    "mib, kept",
    [("1", 0), pytest.param("0", 0, marks=pytest.mark.slow), pytest.param("64", 2 << 20, marks=pytest.mark.slow)],
)
def test_settings_are_taken_at_import(mib, kept):
    """The backend, and how much memory of a freed output of 2 MiB is kept."""
    code = (
        "import torch, drsn_kernels as dk; from drsn_kernels.backends import choice, cpu; print(choice.backend)\n"
        "with dk.use_backend('cpu'): dk.soft_threshold(torch.randn(8, 64, 1024), 0.5); print(cpu._cpu.cached_bytes())"
    )
    done = python(code, DRSN_BACKEND="torch", DRSN_CACHE_MIB=mib)
    assert done.stdout.split() == ["torch", str(kept)], done.stderr


@native
def test_a_cache_of_any_size_is_taken(monkeypatch):
    monkeypatch.setenv("DRSN_CACHE_MIB", "9" * 30)
    try:
        cpu._cpu.set_cache_limit(cpu_memory.cache_limit())
    finally:
        cpu._cpu.set_cache_limit(cpu_memory.CACHE_BYTES)


def test_installing_with_a_malformed_choice_is_refused():
    setup = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "setup.py")
    env = {**os.environ, "DRSN_NATIVE": "yes"}
    done = subprocess.run([sys.executable, setup, "--name"], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1 and done.stderr == "DRSN_NATIVE must be auto, 0 or 1, got 'yes'\n"
