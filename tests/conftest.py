"""What every test file shares: poisoned memory, the list of backends that all tests run on, and the markers."""

import contextlib
import functools
import gc
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# Before anything imports Triton: its kernels then run on CPU tensors, one program after another.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Instrumented kernels in the place of the installed ones (test_sanitize.py).
if instrumented := os.environ.get("DRSN_TEST_EXTENSION"):
    spec = importlib.util.spec_from_file_location("drsn_kernels._cpu", instrumented)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

import other_device
from ranks import Ranks

import drsn_kernels as dk
from drsn_kernels.backends import cpu, gpu
from drsn_kernels.backends.eager import eager

try:
    from drsn_kernels import _build  # noqa: F401  written at installation
except ImportError as error:
    raise pytest.UsageError(
        f"the tests run on an installed drsn_kernels, not on the source tree ({dk.__file__}); "
        "install it and start pytest so that the repository is not first in sys.path (pytest, or python -P -m pytest)"
    ) from error


if gpu.missing() is None and gpu.interpreting():
    import triton_interpreter

    triton_interpreter.install()
    from drsn_kernels.backends.gpu import tuned

    # Time in the interpreter is programs, and beyond some size elements: large tiles here, the plans' own sizes in
    # test_triton.py. By 1 << 16 small tensors took 1.15 times as long, by 1 << 12 large ones.
    tuned.TILE, tuned.CHANNELS = 1 << 14, 1 << 15


@dataclass(frozen=True)
class Variant:
    """One way of running the operators: a backend, an instruction set of it, a compiler around it, a device.

    A test makes its tensors, modules and generators on the variant's device. That is the default device inside `use`,
    so only generators name it: torch.Generator(kernels.device).
    """

    name: str
    backend: str
    isa: str | None = None
    compiled: bool = False
    device: str = "cpu"
    sample: int = 1  # make test runs one case in so many, make test-all the rest

    def __str__(self) -> str:
        return self.name

    def unavailable(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.backend == "cpu" and cpu._cpu is None:
            return f"no compiled CPU kernels: {cpu.MISSING}"
        if self.backend == "triton":
            if gpu.missing() is not None:
                return gpu.missing()
            if self.device == "cpu" and not gpu.interpreting():
                return "this process has Triton for the GPU"
        if self.isa is not None and self.isa not in cpu._cpu.available_isas():
            return f"this CPU or build has no {self.isa}"
        return None

    @property
    def interpreted(self) -> bool:
        """Whether a program takes milliseconds: tests then leave out what only adds programs."""
        return self.backend == "triton" and self.device == "cpu"

    @contextlib.contextmanager
    def use(self) -> Iterator["Variant"]:
        """Every call inside runs on this variant; where it cannot, that is an error and not a silent fallback."""
        isa = cpu._cpu.isa() if self.isa else None
        try:
            if self.isa:
                cpu._cpu.set_isa(self.isa)
            with self._on_device(), dk.use_backend(self.backend, strict=self.backend != "auto"):
                yield self
        finally:
            if isa:
                cpu._cpu.set_isa(isa)

    def _on_device(self) -> contextlib.AbstractContextManager:
        if self.device == "cpu":
            return contextlib.nullcontext()
        return other_device.use() if self.device == other_device.NAME else torch.device(self.device)

    def _call(self, op: Callable) -> Callable:
        if self.compiled:
            return torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=False)
        return op

    @functools.cached_property
    def abs_mean(self) -> Callable:
        return self._call(dk.abs_mean)

    @functools.cached_property
    def soft_threshold(self) -> Callable:
        return self._call(dk.soft_threshold)

    @functools.cached_property
    def shrink(self) -> Callable:
        return self._call(dk.shrink)

    @functools.cached_property
    def squeeze_excite(self) -> Callable:
        return self._call(dk.squeeze_excite)

    @functools.cached_property
    def batch_norm_relu(self) -> Callable:
        return self._call(dk.batch_norm_relu)


# A new backend joins the suite here, by one line.
KERNELS = [
    Variant("torch", "torch", sample=8),
    Variant("cpu-portable", "cpu", isa="portable", sample=8),
    Variant("cpu-avx2", "cpu", isa="avx2", sample=3),
    Variant("cpu-avx512", "cpu", isa="avx512", sample=3),
    Variant("triton", "triton", sample=24),  # interpreted
    Variant("other-device", "cpu", device=other_device.NAME, sample=8),
    Variant("triton-gpu", "triton", device="cuda"),
]
COMPILED = [
    Variant("compiled", "auto", compiled=True, sample=6),
    Variant("compiled-cpu", "cpu", compiled=True, sample=6),
]


def _variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    variant: Variant = request.param
    reason = variant.unavailable()
    if reason is not None:
        pytest.skip(reason)
    if variant.compiled:
        torch._dynamo.reset()
    with variant.use():
        yield variant


def _params(variants: list[Variant]) -> list:
    """Of GPUs and instruction sets only those that are there: the others would be thousands of skipped tests."""
    isas = cpu._cpu.available_isas() if cpu._cpu else []
    there = [v for v in variants if not isas or v.isa in (None, *isas)]
    there = [v for v in there if v.device != "cuda" or torch.cuda.is_available()]
    return [pytest.param(v, id=v.name, marks=[pytest.mark.gpu] if v.device == "cuda" else []) for v in there]


@pytest.fixture(params=_params(KERNELS + COMPILED))
def backend(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """Every variant, the compiled ones too."""
    yield from _variant(request)


@pytest.fixture(params=_params(KERNELS))
def kernels(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """Every variant that runs eagerly."""
    yield from _variant(request)


@pytest.fixture
def planes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend, which else keeps x, keeps planes as the others do."""
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels")  # which chooses the backend
    monkeypatch.setattr(eager, "saves", "memory")


@pytest.fixture(params=_params(COMPILED))
def compiled(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """Every variant under torch.compile."""
    yield from _variant(request)


@pytest.fixture(params=["cpu", "torch"])
def fusing(request: pytest.FixtureRequest) -> Iterator[str]:
    """The cpu backend fuses the gate, the torch backend calls it: nobody may see which."""
    if request.param == "cpu" and cpu._cpu is None:
        pytest.skip(f"no compiled CPU kernels: {cpu.MISSING}")
    with dk.use_backend(request.param, strict=True):
        yield request.param


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes of one gloo group: ranks.run(job, *arguments)."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of xdist's workers, empty at the start of a session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def triton_cache(session_folder: Path) -> Path:
    """Triton's disk cache of this session: what one process has compiled, the next one loads."""
    folder = session_folder / "triton"
    folder.mkdir(exist_ok=True)
    return folder


# ---- poisoned memory -------------------------------------------------------------------------------------------------

_clean_empty = torch.empty
_FACTORIES = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
_FACTORIES += [(torch, "empty_permuted"), (torch.Tensor, "new_empty_strided")]


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill a fresh tensor, gaps between its rows included: NaN, or a bit pattern that no result has."""
    storage = t.untyped_storage()
    if storage.nbytes():
        flat = _clean_empty(0, dtype=t.dtype, device=t.device).set_(storage)
        flat.fill_(float("nan") if t.is_floating_point() or t.is_complex() else 1 if t.dtype is torch.bool else 0x55)
    return t


def _poisoning(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def make(*args, **kwargs):
        t = factory(*args, **kwargs)
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(t) is not torch.Tensor
        if watched or t.layout != torch.strided or t.device.type == "meta" or t.is_quantized or kwargs.get("out") is t:
            return t
        with torch.no_grad():
            return poison(t)

    return make


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element which a kernel forgets to write is seen. Off: marker unpoisoned."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in _FACTORIES:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Seeded random numbers, and the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(isolated: None) -> None:
    """Tensors of a few KiB gain nothing from more threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


# ---- markers ---------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="no CUDA device, or none for Triton, is an error")
    parser.addoption(
        "--part", type=int, metavar="N", help="of what make test leaves out, an eighth of the interpreted cases and a "
        "quarter of the others, and of what is `rotated`: those of N, the next N has the next ones (default: all)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sampled(n): make test runs one case in n, make test-all parts of the rest")
    config.addinivalue_line("markers", "rotated(n): long; make test-all runs another one of n cases each day")
    config.addinivalue_line("markers", "unpoisoned: fresh memory is left as the allocator gives it")
    if workers := os.environ.pop("PYTEST_XDIST_WORKER_COUNT", None):  # together they use the cores once
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))
        del os.environ["PYTEST_XDIST_WORKER"]  # a pytest that a test starts is no worker
    if config.getoption("--require-gpu"):
        there = torch.cuda.is_available()
        missing = gpu.unsupported(torch.empty(0, device="cuda")) if there else "there is no CUDA device"
        if missing is not None:  # or every test would be skipped, and the run a success
            raise pytest.UsageError(f"--require-gpu: {missing}")


def pytest_collection_finish() -> None:
    """Thousands of collected tests are not looked through by every gc.collect(), 0.4 s each."""
    gc.collect()
    gc.freeze()


# Tests that one of xdist's processes takes one after the other: they build in the same folder, or need the memory. Its
# own groups are part of a test's id, which pytest 9.2 does not let it change: two builds at a time broke each other. Or
# they look at what one compilation finds, for which a second process would wait.
GROUPS = {
    "builds": ("test_install.py", "test_sanitize.py", "test_it_is_clean_under_sanitizers"),
    "large tensors": ("test_big.py",),
    "lowering": ("test_triton_lowering.py",),
    "overlap": ("test_dependent_launches.py",),
    "batch last": ("test_batch_last_is_the_network",),
}


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class InGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for group, names in GROUPS.items() if any(name in nodeid for name in names)), nodeid)

    return InGroups(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    with other_device.OnCpu():
        return (yield)


def pytest_report_header(config: pytest.Config) -> str:
    isas = ", ".join(cpu._cpu.available_isas()) if cpu._cpu else cpu.MISSING
    return f"drsn_kernels {dk.__version__} from {dk.__file__}, cpu kernels: {isas}, torch {torch.__version__}"


def _variants(item: pytest.Item) -> list[Variant]:
    return [value for value in item.callspec.params.values() if isinstance(value, Variant)]


def _sample(items: list[pytest.Item]) -> list[pytest.Item]:
    """All but one case in n are slow, and returned. Where n is given by `sampled` and parameters are crossed, so many
    fewer that each value of a parameter is left in a case, of a variant that is not interpreted.

    By name: the same cases in every process.
    """

    def rest(item: pytest.Item) -> int:
        rates = [variant.sample for variant in _variants(item)]
        rates += [mark.args[0] for mark in item.iter_markers("sampled")]
        return zlib.crc32(item.name.encode()) % max(rates, default=1)

    seen, left_out = set(), []
    for item in sorted(items, key=rest):
        values = set()
        if item.get_closest_marker("sampled") and len(item.callspec.params) > 1:
            of = item.path, item.originalname, item.get_closest_marker("gpu") is None
            given = item.callspec.params.items()
            values = {(*of, name, str(value)) for name, value in given if not isinstance(value, Variant)}
        if rest(item) and (values <= seen or any(variant.interpreted for variant in _variants(item))):
            item.add_marker(pytest.mark.slow)
            left_out.append(item)
        else:
            seen |= values
    return left_out


def _of_other_parts(items: list[pytest.Item], part: int) -> set[pytest.Item]:
    def parts(item: pytest.Item) -> int:
        if (mark := item.get_closest_marker("rotated")) is not None:
            return mark.args[0]
        return 8 if any(variant.interpreted for variant in _variants(item)) else 4

    return {item for item in items if (zlib.crc32(item.nodeid.encode()) - part) % parts(item)}


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    long = [item for item in items if item.get_closest_marker("rotated") and item.get_closest_marker("slow")]
    shorter = [item for item in items if hasattr(item, "callspec") and not item.get_closest_marker("slow")]
    left_out = _sample(shorter) + long
    if (part := config.getoption("--part")) is not None and (others := _of_other_parts(left_out, part)):
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]
    items.sort(key=lambda item: item.path.stem != "test_triton_lowering")  # a minute in one process, so it starts first
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
