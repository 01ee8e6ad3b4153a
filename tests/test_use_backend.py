"""use_backend as a statement, a context manager and a decorator, as torch.set_grad_enabled is."""

import pytest
import torch

import drsn_kernels as dk
from drsn_kernels.backends import choice, eager


def now() -> tuple[str, bool]:
    return choice.backend, choice.strict


@pytest.fixture(autouse=True)
def auto():
    """The choice is the process's: as it was before, after each test."""
    before = now()
    dk.use_backend("auto")
    yield
    dk.use_backend(*before)


def test_a_statement_holds_from_its_call_on():
    dk.use_backend("torch", strict=True)
    assert now() == ("torch", True) and dk.explain(dk.abs_mean, torch.ones(1, 2, 3))[0].backend == "torch"
    dk.use_backend("cpu")
    assert now() == ("cpu", False)


def test_blocks_nest_and_restore():
    dk.use_backend("cpu")
    with dk.use_backend("torch", strict=True) as nothing:
        assert nothing is None and now() == ("torch", True)
        with dk.use_backend("auto"):
            assert now() == ("auto", False)
            dk.use_backend("cpu", strict=True)  # a statement in a block ends with it
            assert now() == ("cpu", True)
        assert now() == ("torch", True)
    assert now() == ("cpu", False)


def test_a_block_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), dk.use_backend("torch", strict=True):
        assert now() == ("torch", True)
        1 / 0  # noqa: B018
    assert now() == ("auto", False)


def test_one_object_for_several_blocks():
    on_torch = dk.use_backend("torch")
    assert now() == ("torch", False)
    for _ in range(2):
        with on_torch:
            assert now() == ("torch", False)
        assert now() == ("auto", False)


def test_a_decorated_function():
    @dk.use_backend("torch", strict=True)
    def run(depth: int) -> list:
        """Says so."""
        return [now(), *(run(depth - 1) if depth else [])]

    assert now() == ("auto", False) and (run.__name__, run.__doc__) == ("run", "Says so.")
    with dk.use_backend("cpu"):
        assert run(2) == [("torch", True)] * 3
        assert now() == ("cpu", False)


def test_a_decorated_generator_leaves_the_choice_alone_between_its_steps():
    @dk.use_backend("torch")
    def steps():
        for _ in range(2):
            yield now()

    running = steps()
    for backend in ("auto", "cpu"):
        with dk.use_backend(backend):
            assert next(running) == ("torch", False) and now() == (backend, False)
    assert list(running) == [] and now() == ("auto", False)


@pytest.mark.parametrize("name", ["cudnn", "gpu", "", None])
def test_it_takes_known_names(name):
    dk.use_backend("torch")
    with pytest.raises(ValueError, match=f"use_backend must be one of auto, .*, got {name!r}"):
        dk.use_backend(name)
    assert now() == ("torch", False)


def test_what_the_torch_backend_keeps():
    """x by default; planes for "memory", in the statement, the block and the decorated function."""
    x = torch.randn(4, 8, 999, requires_grad=True)

    def kept() -> int:
        return dk.explain(lambda: dk.shrink(x, torch.sigmoid))[0].saved

    planes = dk.use_backend("torch", save="memory")(kept)
    dk.use_backend("torch")
    with dk.use_backend("torch", save="memory"):
        assert kept() < 0.12 * x.nbytes and eager.saves == "memory"
        with dk.use_backend("torch"):
            assert kept() > x.nbytes
    assert kept() > x.nbytes and planes() < 0.12 * x.nbytes and eager.saves == "time"
    with pytest.raises(ValueError, match="save must be 'time' or 'memory', got 'bits'"):
        dk.use_backend("torch", save="bits")


def test_inside_a_compiled_function():
    """Traced, the block costs no graph break."""

    def run(x: torch.Tensor) -> torch.Tensor:
        with dk.use_backend("torch"):
            return dk.soft_threshold(x, 0.5) * 2

    x = torch.randn(2, 3, 40)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))
    assert now() == ("auto", False)


def test_what_it_cannot_decorate():
    async def later():
        pass

    for thing, kind in ((later, "an async function"), (type("Thing", (), {}), "a class")):
        with pytest.raises(TypeError, match=f"decorates functions and generators, got {kind}"):
            dk.use_backend("torch")(thing)
        assert now() == ("auto", False)
