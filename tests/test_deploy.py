"""Compiled once for many shapes, exported, run by onnxruntime, and used in workers and forks."""

import importlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from workers import Shrunk, step, step_of_a_fork

import drsn_kernels as dk
from drsn_kernels.models import DRSN

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def network(dims: int = 1, attention: str = "cw") -> DRSN:
    model = DRSN(2, 3, stages=((6, 1, 2),), stem=(4, 1), dims=dims, attention=attention)
    for buffer in model.buffers():  # statistics that are not the initial ones
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.double().eval()


def signals(batch: int, *lengths: int) -> torch.Tensor:
    return torch.randn(batch, 2, *lengths, dtype=torch.float64)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def results(run, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = run(x)
    if not model.training:
        return [y]
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.mark.slow
@pytest.mark.parametrize("backend, training", [("auto", True), ("cpu", False)])
def test_one_graph_for_every_batch_and_length(backend, training):
    """In float64: for float32 torch takes another convolution from batches of 16 on, and another graph for it."""
    model = network().train(training)
    with dk.use_backend(backend), torch.set_grad_enabled(training):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for shape in [(4, 40), (5, 40), (16, 40), (2, 57), (7, 128)]:
            x = signals(*shape)
            for ours, plain in zip(results(compiled, model, x), results(model, model, x), strict=True):
                torch.testing.assert_close(ours, plain)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend, training", [pytest.param("auto", False, marks=pytest.mark.slow), ("cpu", True)])
def test_automatic_dynamic_shapes_take_two_graphs(backend, training):
    """The default of torch.compile: a graph for the first batch size, and one for all others."""
    model = network(dims=2).train(training)
    with dk.use_backend(backend), torch.set_grad_enabled(training):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for batch in [4, 6, 16, 3, 2]:
            x = signals(batch, 12, 10)
            torch.testing.assert_close(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] == 2


# ---- torch.export ----------------------------------------------------------------------------------------------------


def dynamic(dims: int, batch: str = "batch") -> dict:
    sizes = ["length"] if dims == 1 else ["height", "width"]
    return {0: torch.export.Dim(batch, min=2), **{i + 2: torch.export.Dim(s, min=8) for i, s in enumerate(sizes)}}


@pytest.mark.parametrize("dims, attention, training", [(1, "cw", False), (1, "cs", True), (2, "cw", True)])
def test_an_exported_network_holds_aten_ops_and_runs_without_the_package(dims, attention, training):
    """Saved and loaded; in training its running statistics move as the module's do."""
    model = network(dims, attention).train(training)
    exported = torch.export.export(model, (signals(4, *[24] * dims),), dynamic_shapes=(dynamic(dims),))
    file = io.BytesIO()
    torch.export.save(exported, file)
    assert b"drsn_kernels::" not in file.getvalue()
    file.seek(0)
    loaded = torch.export.load(file)
    targets = {n.target for n in loaded.graph.nodes if n.op == "call_function"}
    assert {t.namespace for t in targets if hasattr(t, "namespace")} == {"aten"}
    runs = loaded.module()
    for shape in [(2, 31, 20), (7, 24, 50)]:
        x = signals(*shape[: dims + 1])
        with torch.no_grad():
            torch.testing.assert_close(runs(x), model(x))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(runs.get_buffer(name), buffer)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnxruntime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"needs {name}")
    return pytest.importorskip("onnxruntime", reason="needs onnxruntime")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dims, attention", [(1, "cs"), pytest.param(2, "cw", marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_same_numbers(onnxruntime, dims, attention):
    """float32, any batch and length; nothing in the file but ONNX's own operators."""
    model = network(dims, attention).float()
    x = signals(4, *[24] * dims).float()
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(dynamic(dims),), verbose=False)
    file = program.model_proto
    assert {node.domain for node in file.graph.node} == {""} and not file.functions
    assert {opset.domain for opset in file.opset_import} == {""}
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert taken.shape[0] == "batch" and len(taken.shape) == 2 + dims
    for shape in [(4, 24, 24), (9, 31, 40), (2, 64, 16)]:
        x = signals(*shape[: dims + 1]).float()
        (y,) = session.run(None, {taken.name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


# ---- workers and forks -----------------------------------------------------------------------------------------------

FORK = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")


@pytest.mark.parametrize(
    "backend, method",
    [
        pytest.param("cpu", "fork", marks=FORK),
        pytest.param("torch", "fork", marks=[FORK, pytest.mark.slow]),
        pytest.param("cpu", "spawn", marks=pytest.mark.slow),
    ],
)
def test_operators_in_the_workers_of_a_data_loader(method, backend):
    data = Shrunk(backend)
    with torch.no_grad():
        expected = [data[i][1] for i in range(len(data))]
    loader = DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context=method)
    found = list(loader)
    assert len(found) == len(data)
    for index, y, there in found:
        assert there.all() and torch.equal(y[0], expected[index])


@FORK
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_fork_after_use(backend):
    """The parent has used several threads, and its backward engine; a child goes on with one thread."""
    torch.set_num_threads(2)
    module, x = dk.Shrinkage(6), torch.randn(64, 6, 3000)
    with dk.use_backend(backend, strict=True):
        module.eval()  # or each step would move the running statistics
        expected = step(module, x)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=step_of_a_fork, args=(queue, module, x))
        process.start()
        found = queue.get(timeout=600)
        process.join()
        assert process.exitcode == 0
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), exact)
        again = step(module, x)  # and the parent goes on
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


# ---- what the documentation shows ------------------------------------------------------------------------------------


LAUNCHED = "init_process_group"  # by torchrun
ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/use.md", "docs/networks_and_training.md")


def blocks() -> list:
    """The Python of each section, page by page; compiler, exporters and torchrun take their time."""
    slow = re.compile(rf"torch\.compile\(|export\(|{LAUNCHED}")
    found = []
    for page in PAGES:
        text, heading, count = (ROOT / page).read_text(encoding="utf-8"), page, 0
        for title, code in re.findall(r"^#+ (.+?)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            heading, count = (title, count) if title else (heading, count + 1)
            if code and heading != "Your own data":  # a session: test_docs.py
                marks = [pytest.mark.slow, pytest.mark.rotated(2)] if slow.search(code) else []
                found.append(pytest.param(code, id=f"{page}: {heading}", marks=marks))
        assert count == text.count("```python") > 0, page
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize("code", blocks())
def test_what_the_documentation_shows_runs(code, tmp_path):
    if 'device="cuda"' in code and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for module in ("onnxruntime", "onnxscript", "timm"):
        if f"import {module}" in code or (module == "onnxscript" and "onnx.export" in code):
            try:
                importlib.import_module(module)
            except Exception as error:  # a torchvision built for another torch fails with a RuntimeError
                pytest.skip(f"{module} cannot be imported ({type(error).__name__}: {error})")
    (tmp_path / "script.py").write_text(code)
    command, environment = [sys.executable, "script.py"], dict(os.environ)
    if LAUNCHED in code:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        # a host name need not resolve, and two ranks want a device each
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert LAUNCHED not in code or "2 ranks" in ran.stdout
