"""`python -m drsn_kernels warmup`: kernels compiled ahead of time, for a GPU that is not there, and its errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_child import child

from drsn_kernels import __main__, warmup
from drsn_kernels.backends import gpu

needs_triton = pytest.mark.skipif(gpu.missing() is not None, reason="no Triton, or too old")

# What a user's file may hold, put where `python -m` finds it.
NETWORKS = """
import torch
import drsn_kernels as dk
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.shrink = nn.Conv1d(1, 16, 3, padding=1), nn.BatchNorm1d(16), dk.Shrinkage(16)
    def forward(self, x):
        h = self.norm(self.conv(x))
        return {"y": self.shrink(h, residual=h), "pair": [h.mean(), 3]}

class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.shrink = nn.Conv2d(3, 32, 1), dk.Shrinkage(32)
    def forward(self, x):
        return self.shrink(self.conv(x))

class Needs(nn.Module):
    def __init__(self, channels):
        super().__init__()

def broken():
    raise KeyError("no weights\\nand a second line")

block = Block()
plain = lambda: nn.Linear(8, 8)
nothing = lambda: 3
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "networks.py").write_text(NETWORKS)
    return tmp_path


def command(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return child("-m", "drsn_kernels", "warmup", *arguments, cwd=folder, cache=folder, **env)


def kernels(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The words of each kernel's line."""
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()[:-1]]


@pytest.mark.slow
@needs_triton
def test_compiles_once_and_the_next_process_finds_it_on_disk(folder):
    arguments = ("networks:Block", "--input", "4,1,512", "--target", "cuda:90")
    first = command(folder, *arguments)
    lines = kernels(first)
    assert len(lines) >= 3 and {line[1] for line in lines} == {"cuda:90"}
    assert all(line[3] == "s" and float(line[2]) > 0 for line in lines)
    assert f"{len(lines)} kernels, {len(lines)} of them compiled now" in first.stdout
    again = command(folder, *arguments)
    assert [line[0] for line in kernels(again)] == [line[0] for line in lines]
    assert all("in the cache already" in line for line in again.stdout.splitlines()[:-1])
    other_batch = command(folder, "networks:Block", "--input", "9,1,512", "--target", "cuda:90")
    assert "0 of them compiled now" in other_batch.stdout
    other_length = command(folder, "networks:block", "--input", "4,1,512", "--input", "4,1,600", "--target", "cuda:90")
    assert "in the cache already" in other_length.stdout and " s\n" in other_length.stdout


@pytest.mark.slow
@needs_triton
def test_options(folder):
    def names(*options: str) -> list[str]:
        done = command(folder, "networks:Image", "--input", "2,3,14,14", "--target", "cuda:80", *options)
        return [line[0] for line in kernels(done)]

    full = names("--channels-last", "--dtype", "bfloat16", "--autocast")
    assert len(full) >= 3
    assert 0 < len(names("--eval-only", "--dtype", "float16")) < len(full)
    none = command(folder, "networks:plain", "--input", "2,8", "--target", "cuda:80")
    assert none.returncode == 0 and none.stdout.startswith("the model launched no Triton kernel")


KEEPS = """
import torch, networks
from drsn_kernels.warmup import warmup
model = networks.Block().train()
model.shrink.eval()
model.conv.weight.grad = torch.full_like(model.conv.weight, 2.0)
buffers = dict(model.named_buffers())
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
torch.manual_seed(3)
want = torch.rand(4)
torch.manual_seed(3)
found = warmup(model, (4, 1, 512), target="cuda:100")
assert torch.equal(torch.rand(4), want)
assert found and all(one.target == "cuda:100" and not one.cached for one in found), found
assert {one.name for one in found} and all(one.seconds > 0 for one in found)
assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
assert all(tensor is buffers[name] for name, tensor in model.named_buffers())
assert model.training and not model.shrink.training
assert (model.conv.weight.grad == 2).all() and model.norm.weight.grad is None
assert warmup(model, (4, 1, 512), target="cuda:100") == []  # this process has them
from triton import knobs
assert knobs.compilation.listener is None
"""


@pytest.mark.slow
@needs_triton
def test_the_model_stays_as_it_was(folder):
    done = child("-c", KEEPS, cwd=folder, cache=folder)
    assert done.returncode == 0, done.stderr


NORMED = """
import drsn_kernels as dk
from drsn_kernels.warmup import warmup

module = dk.BatchNormReLU(16)
found = [one.name for one in warmup(module, (64, 16, 1024), target="cuda:90")]
names = ["moments_kernel", "norm_kernel", "sums_kernel", "norm_grad_kernel", "norm_kernel"]  # the last is eval's
assert found == names, found
assert warmup(module, (80, 16, 1024), target="cuda:90") == []
assert [one.name for one in warmup(module, (8, 16, 1024), target="cuda:90")] == ["norm_kernel", "norm_grad_kernel"]
"""


@pytest.mark.slow
@needs_triton
def test_a_norm_is_compiled_for_other_batches_too(tmp_path, triton_cache):
    """And for a channel that fits one program, once more."""
    done = child("-c", NORMED, cwd=tmp_path, cache=triton_cache)
    assert done.returncode == 0, done.stderr


FIRST_STEP = """
import torch, networks, drsn_kernels as dk
from drsn_kernels import warmup
from drsn_kernels.backends.gpu.lowering import lowering

class Classifier(torch.nn.Sequential):
    def __init__(self):
        super().__init__(networks.Body(), torch.nn.Flatten(), torch.nn.LazyLinear(4))

model = Classifier()
x, target = torch.randn(6, 1, 512), torch.randint(4, (6,))
model(x)
compiled = warmup.warmup(model, (6, 1, 512), autocast={autocast}, dtype={dtype}, target="cuda:90")
assert len(compiled) >= 8 and "reduce_kernel" in {one.name for one in compiled}
optimizer, more = torch.optim.SGD(model.parameters(), lr=0.1), []
with lowering("cuda:90") as launches, dk.use_backend("triton", strict=True), warmup._listening(more):
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", {dtype}, enabled={autocast}):
            loss = torch.nn.functional.cross_entropy(model.train()(x), target)
        loss.backward()
        optimizer.step()
    with torch.no_grad(), torch.autocast("cpu", {dtype}, enabled={autocast}):
        model.eval()(x)
assert len(launches) > len(compiled) and more == [], more
"""


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_after_a_warmup_a_first_step_compiles_nothing(folder, triton_cache, dtype):
    body = "\nclass Body(Block):\n    def forward(self, x):\n        return super().forward(x)['y']\n"
    (folder / "networks.py").write_text(NETWORKS + body)
    code = FIRST_STEP.replace("{dtype}", f"torch.{dtype}").replace("{autocast}", str(dtype != "float32"))
    done = child("-c", code, cwd=folder, cache=triton_cache)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("networks:Block", "--input", "4,1,512", "--target", "cuda:75"), "target must be one of cuda:80, "),
        (("networks:Block", "--input", "4,0", "--target", "cuda:90"), "--input must be positive sizes "),
        (("networks:Block", "--input", "4,1,many", "--target", "cuda:90"), "--input must be positive sizes "),
        (("networks", "--input", "4,1,8", "--target", "cuda:90"), "named as package.module:factory, got 'networks'"),
        (("networks:Missing", "--input", "4,1,8", "--target", "cuda:90"), "networks has no Missing"),
        (("netwrks:Block", "--input", "4,1,8", "--target", "cuda:90"), "cannot import netwrks: ModuleNotFoundError"),
        (("networks:Needs", "--input", "4,1,8", "--target", "cuda:90"), "networks:Needs must be callable without arg"),
        (("networks:broken", "--input", "4,1,8", "--target", "cuda:90"), "networks:broken raised KeyError"),
        (("networks:nothing", "--input", "4,1,8", "--target", "cuda:90"), "networks:nothing made int, not an nn.Mod"),
        (("networks:number", "--input", "4,1,8", "--target", "cuda:90"), "networks:number must be an nn.Module or "),
        (("networks:Block", "--input", "4,3,8", "--target", "cuda:90"), "the model failed on an input of (4, 3, 8)"),
        (("networks:Block", "--input", "4,1,8", "--channels-last", "--target", "cuda:90"), "needs an input of 4 or 5"),
        (("networks:Block", "--input", "4,1,8", "--autocast", "--target", "cuda:90"), "autocast needs dtype bfloat16"),
    ],
)
def test_errors_are_one_sentence(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # none of these comes to compiling
    assert __main__.main(["warmup", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@needs_triton
def test_no_gpu_and_no_target(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["warmup", "networks:Block", "--input", "4,1,8"]) == 1
    assert "there is no CUDA device; name the GPU to compile for, such as --target cuda:90\n" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="there is no CUDA device"):
        warmup.warmup(torch.nn.Linear(2, 2), (2, 2))


@needs_triton
def test_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 makes Triton interpret"):
        warmup.warmup(torch.nn.Linear(2, 2), (2, 2), target="cuda:90")


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert __main__.main(["warmup", "networks:Block", "--input", "4,1,8", "--target", "cuda:90"]) == 1
    assert 'pip install "triton>=3.5"' in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu():
    from drsn_kernels.models import DRSN

    with pytest.raises(RuntimeError, match="the model must be on the CUDA device, it is on cpu"):
        warmup.warmup(DRSN(), (2, 1, 256))
    model = DRSN().cuda()
    found = warmup.warmup(model, (2, 1, 272))  # a length that no other test has
    assert all(one.target.startswith(("cuda:", "hip:")) for one in found)
    assert warmup.warmup(model, (5, 1, 272)) == []
