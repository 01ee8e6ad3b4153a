"""torch.jit.script: the modules, converted models and whole networks, in plain PyTorch, with the same numbers."""

import io

import port_models as ports
import pytest
import torch
from torch import nn

import drsn_kernels as dk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own: of torch.jit


def same(module: nn.Module, scripted: nn.Module, *inputs: torch.Tensor) -> None:
    """Results and gradients; saved and loaded too."""
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    wanted = [*module.parameters()]
    y = module(*inputs)
    g = torch.randn_like(y)
    gradients = torch.autograd.grad(y, wanted, g) if wanted else ()
    for one in (scripted, torch.jit.load(file)):
        again = one(*inputs)
        assert again.dtype == y.dtype
        torch.testing.assert_close(again, y)
        if wanted:
            for a, b in zip(torch.autograd.grad(again, list(one.parameters()), g), gradients, strict=True):
                torch.testing.assert_close(a, b)


MODULES = {
    "channel": lambda: dk.Shrinkage(6),
    "sample": lambda: dk.Shrinkage(6, average="sample", reduction=2, activation=nn.GELU),
    "None": lambda: dk.Shrinkage(6, average=None, norm=False),
    "leaky": lambda: dk.Shrinkage(6, slope=0.2),
    "hard": lambda: dk.Shrinkage(6, threshold="hard", slope=0),
    "squeeze_excite": lambda: dk.SqueezeExcite(6, reduction=2),
    "a fixed tau": lambda: dk.SoftThreshold(0.5),
    "learnable taus": lambda: dk.SoftThreshold([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], learnable=True),
}


@pytest.mark.parametrize("shape", [(4, 6, 40), (3, 6, 5, 7)], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, shape):
    module, x = MODULES[name]().double().eval(), torch.randn(shape, dtype=torch.float64)
    scripted = torch.jit.script(module)
    same(module, scripted, x)
    if not isinstance(module, dk.SoftThreshold):
        same(module, scripted, x, torch.randn_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    for module in (dk.Shrinkage(6), dk.SqueezeExcite(6)):
        module, x = module.to(dtype).eval(), torch.randn(4, 6, 40).to(dtype)
        scripted = torch.jit.script(module)
        for residual in (None, torch.randn(4, 6, 40).to(dtype), torch.randn(4, 6, 40, dtype=torch.float64)):
            y, again = module(x, residual), scripted(x, residual)
            assert y.dtype == again.dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(again, y, rtol=eps, atol=4 * eps)


def test_a_converted_model_is_scripted_as_the_user_wrote_it():
    model, x = nn.Sequential(nn.Conv1d(2, 6, 3), ports.Popular1d(6)).double().eval(), torch.randn(3, 2, 30).double()
    own = torch.jit.script(model)
    report = dk.convert(model)
    assert len(report.converted) == 1
    scripted = torch.jit.script(model)
    assert getattr(scripted, "1").code == getattr(own, "1").code
    same(model, scripted, x)
    with dk.record_tau(model) as taus:  # and stays converted
        model(x)
    assert list(taus) == ["1"]
    dk.revert(model)
    same(model, scripted, x)
