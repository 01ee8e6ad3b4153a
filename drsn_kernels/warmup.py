"""Compile ahead of time the Triton kernels that a model will need: `python -m drsn_kernels warmup`.

A model's first training step compiles every kernel that it launches, some 0.2 s to 1 s each. Triton keeps what it has
compiled on disk (TRITON_CACHE_DIR, ~/.triton/cache if unset), so a run of this beforehand, at installation or when a
container is built, leaves only the loading. No kernel is compiled for one batch size; but the batch size has a say in
whether a fused gate runs in one launch, so give the one in use. The length of the rows, the dtype, the layout and the
size of a fused gate matter.

Without a GPU, `target` compiles for one that is elsewhere. Triton 3.7 finds a kernel on disk by a hash of: its own
version and files, the kernel's source and the line it starts at, the argument types and alignments, the compiler
options, the target, the version of ptxas, and the environment variables that change the compiler. All of these are the
same on the machine with the GPU if both have the same wheel of Triton, the same version of this package and, for the
alignments, tensors as torch allocates them; where one differs, the kernel is compiled anew there, which costs time and
nothing else. Two things are to know. The cache's index holds absolute paths, so a cache that is copied must lie in a
folder of the same name. And where a plan depends on the number of multiprocessors or on the L2 cache, it is made for an
H100 here. That a GPU has loaded such a cache is not tested: it was compared by these hashes only.
"""

import contextlib
import importlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ._extras import require
from .backends import gpu, use_backend
from .untouched import untouched

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Compiled(NamedTuple):
    """A kernel that the run needed."""

    name: str
    target: str  # cuda:90
    seconds: float  # to compile, or to read from disk
    cached: bool  # it was in Triton's disk cache already


def warmup(
    model: nn.Module,
    *inputs: Sequence[int],
    dtype: torch.dtype = torch.float32,
    train: bool = True,
    autocast: bool = False,
    channels_last: bool = False,
    target: str | None = None,
) -> list[Compiled]:
    r"""Run `model` on random inputs, so that Triton compiles the kernels it needs, and tell which those were.

    For each input: one training step (forward, and backward of a random gradient) and one forward in eval mode without
    gradients. The model is left as it was: its mode, its buffers (running statistics) and its parameters' `.grad` are
    put back, and torch's random number generators too. It must be where it is to run: on the GPU, or with `target` on
    the CPU. There, results are uninitialised memory, as no kernel of this package runs: a model that looks at its
    activations (asserts, takes branches) may not come through.

    Args:
        inputs: sizes of the model's input, batch first; each is a run of its own.
        dtype: of the input; the model's parameters must have it too.
        train: False leaves out the training step.
        autocast: run under torch.autocast to `dtype`; input and model are float32 then.
        channels_last: give 4-D and 5-D inputs in channels_last order.
        target: compile for this GPU instead of the current one: "cuda:80", "cuda:90", "cuda:100" or "hip:gfx942".

    Returns:
        What was compiled, in order. Kernels that this process has used before are not in it.

    Raises:
        ImportError: Triton is not installed. RuntimeError: there is no CUDA device and no target, TRITON_INTERPRET=1
        is set, the model is not where it is to run, or it failed on an input (its own error is the cause).
        ValueError: no input, sizes that are not positive integers, channels_last for an input without it, autocast to
        float32, unknown target.
    """
    require("triton", "triton")
    if gpu.interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 makes Triton interpret kernels instead of compiling them; unset it")
    if not inputs:
        raise ValueError("give the sizes of at least one input")
    for sizes in inputs:
        _check_sizes(sizes, channels_last)
    if autocast and dtype == torch.float32:
        raise ValueError("autocast needs dtype bfloat16 or float16")
    device = _device(model, target)
    found: list[Compiled] = []
    with contextlib.ExitStack() as stack:
        if target is not None:
            from .backends.gpu.lowering import lowering

            stack.enter_context(lowering(target))
        stack.enter_context(use_backend("triton"))
        stack.enter_context(_listening(found))
        stack.enter_context(untouched([model]))
        for sizes in inputs:
            x = torch.randn(tuple(sizes), device=device, dtype=torch.float32 if autocast else dtype)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
            try:
                with torch.autocast(device.type, dtype, enabled=autocast):
                    if train:
                        _training_step(model, x)
                    with torch.no_grad():
                        model.eval()(x)
            except Exception as error:  # a model may raise anything
                raise RuntimeError(f"the model failed on an input of {tuple(sizes)}: {_said(error)}") from error
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return found


def _check_sizes(sizes: Sequence[int], channels_last: bool) -> None:
    good = isinstance(sizes, Sequence) and not isinstance(sizes, str)
    if not good or not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"an input must be positive sizes such as (128, 1, 2048), got {sizes!r}")
    if channels_last and len(sizes) not in (4, 5):
        raise ValueError(f"channels_last needs an input of 4 or 5 dimensions, got {tuple(sizes)}")


def _device(model: nn.Module, target: str | None) -> torch.device:
    """Where the model is; an error where it cannot be warmed up there."""
    first = next((t for t in (*model.parameters(), *model.buffers())), None)
    if target is not None:
        if first is not None and first.device.type != "cpu":
            raise RuntimeError(f"with a target the model must be on the CPU, it is on {first.device}")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device; name the GPU to compile for, such as target cuda:90")
    if first is not None and not first.is_cuda:
        raise RuntimeError(f"the model must be on the CUDA device, it is on {first.device}")
    return first.device if first is not None else torch.device("cuda", torch.cuda.current_device())


def _training_step(model: nn.Module, x: torch.Tensor) -> None:
    # a block by itself sees activations, which need a gradient; autograd.grad leaves the parameters' .grad alone
    x = x.requires_grad_()
    outputs = [t for t in _tensors(model.train()(x)) if t.requires_grad]
    if outputs:
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        torch.autograd.grad(outputs, wanted, [torch.randn_like(t) for t in outputs], allow_unused=True)


def _tensors(out: object) -> Iterator[torch.Tensor]:
    """The tensors in what a model returns: a tensor, or containers of them."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for part in out:
            yield from _tensors(part)
    elif isinstance(out, dict):
        for part in out.values():
            yield from _tensors(part)


@contextlib.contextmanager
def _listening(found: list[Compiled]) -> Iterator[None]:
    """Append every kernel that Triton compiles or reads from its disk cache."""
    from triton import knobs

    before = knobs.compilation.listener

    def listen(**event) -> None:
        target = event["metadata"]["target"]
        seconds = event["times"].total / 1e6
        found.append(Compiled(event["src"].name, f"{target.backend}:{target.arch}", seconds, event["cache_hit"]))
        if before is not None:
            before(**event)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_sizes(text: str) -> tuple[int, ...]:
    """ "128,1,2048" -> (128, 1, 2048); ValueError otherwise."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--input must be positive sizes separated by commas, such as 128,1,2048; got {text!r}")
    return sizes


def load_model(name: str) -> nn.Module:
    """The model that "package.module:factory" names: a callable without arguments, an nn.Module class or a module.

    Raises:
        ValueError: nothing of that name, or it makes no nn.Module. RuntimeError: the factory raised.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"the model must be named as package.module:factory, got {name!r}")
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"cannot import {module_name}: {_said(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {attribute}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{name} must be an nn.Module or make one, it is {type(found).__name__}")
        found = _called(name, found)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{name} made {type(found).__name__}, not an nn.Module")
    return found


def _called(name: str, factory: Callable) -> object:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(f"{name} must be callable without arguments: {error}") from error
    except ValueError:
        pass  # a builtin that tells no signature
    try:
        return factory()
    except Exception as error:
        raise RuntimeError(f"{name} raised {_said(error)}") from error


def _said(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def command(
    name: str,
    inputs: Sequence[str],
    dtype: str = "float32",
    eval_only: bool = False,
    autocast: bool = False,
    channels_last: bool = False,
    target: str | None = None,
) -> list[Compiled]:
    """`python -m drsn_kernels warmup`: build the model, warm it up, and print each kernel.

    Raises:
        What :func:`warmup` and :func:`load_model` raise.
    """
    start = time.perf_counter()
    require("triton", "triton")
    sizes = [parse_sizes(text) for text in inputs]
    for one in sizes:
        _check_sizes(one, channels_last)
    if target is None and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device; name the GPU to compile for, such as --target cuda:90")
    model = load_model(name).to(device="cpu" if target else "cuda", dtype=None if autocast else DTYPES[dtype])
    if channels_last:
        model = model.to(memory_format=torch.channels_last if len(sizes[0]) == 4 else torch.channels_last_3d)
    found = warmup(
        model, *sizes, dtype=DTYPES[dtype], train=not eval_only, autocast=autocast, channels_last=channels_last,
        target=target,
    )  # fmt: skip
    _show(found, time.perf_counter() - start)
    return found


def _show(found: list[Compiled], seconds: float) -> None:
    from triton import knobs

    for one in found:
        how = "in the cache already" if one.cached else f"{one.seconds:.2f} s"
        print(f"{one.name:24s}{one.target:12s}{how}")
    new = sum(not one.cached for one in found)
    if not found:
        print("the model launched no Triton kernel: has it a drsn_kernels.Shrinkage, and does Triton take its dtype?")
    print(f"{len(found)} kernels, {new} of them compiled now, in {seconds:.1f} s; Triton's cache is {knobs.cache.dir}")
