"""A training step as one CUDA graph: its launches cost the host one call, however many kernels they are.

A graph repeats what was captured: kernels, addresses, and numbers that were passed by value. So a call is replayed only
if all of that is as it was (`_key`); any other call runs as it is. No call is made for the graph's sake: those before a
capture, which it needs to have been made, are steps of training like the others, and nothing of them is undone.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

WARMUP = 3  # calls alike in a row before the capture: kernels are compiled and chosen, the optimizer makes its state
PATIENCE = 32  # calls in a row without a graph, after which it is said
PLAIN = (bool, int, float, str, type(None))

log = logging.getLogger("drsn_kernels")


def graphed(step: Callable, optimizer: torch.optim.Optimizer) -> Callable:
    """A training step that is replayed as a CUDA graph: call the result in the place of `step`.

    Every call is one step of training, with the weights of `step` itself up to rounding. Three calls alike run as they
    are; the fourth is captured and from then on replayed. A call that is not alike, such as the last, smaller batch of
    an epoch, runs as it is, and the graph stays for the next. Alike are calls with the same shapes and dtypes, the same
    plain values, and the same numbers in the optimizer's groups: after a learning rate has changed, three calls run as
    they are and the fourth is captured again. A schedule that changes it at every step needs it in a tensor on the
    device, which a graph reads: ``SGD(..., lr=torch.tensor(0.1, device="cuda"), fused=True)``,
    ``AdamW(..., lr=torch.tensor(1e-3, device="cuda"), capturable=True)``.

    Example::

        def step(x, y):
            with torch.autocast("cuda", torch.bfloat16):  # inside, if at all
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss
        step = dk.graphed(step, optimizer)
        for x, y in batches:
            loss = step(x, y)

    Args:
        step: zero_grad, forward, loss, backward and update. It takes tensors, which come to it on the parameters'
            device, and plain values; it returns a tensor, a tuple of tensors or None. Nothing in it may wait for the
            device (`.item()`, `print` of a tensor), and the Python in it does not run when it is replayed, so that
            `schedule.step()` stands outside, and whether the model trains is decided before. With a GradScaler the
            optimizer needs ``fused=True``.
        optimizer: SGD, or one with ``capturable=True``. All its parameters are on one CUDA device.

    Returns:
        A callable of the same arguments. What it returns is detached, and the caller's to keep. Batches may lie on the
        CPU; a replay copies them through pinned memory.

    Raises:
        ValueError: the optimizer is none of these, or there are several processes: DistributedDataParallel has to be
            trained without a graph. By a call: it is made inside autocast, whose cached weights a graph would repeat.
        TypeError: by a call: an argument or a result of another type.
        RuntimeError: by a call: the step cannot be captured. It has not been made then.
    """
    return GraphedStep(step, optimizer)


class GraphedStep:
    """What :func:`graphed` returns."""

    def __init__(self, step: Callable, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.device = device_of(optimizer)
        _check(optimizer)
        self.step, self.optimizer = step, optimizer
        self.capture: Capture | None = None
        self.captured: tuple | None = None  # its key
        self.last: tuple | None = None  # the key of the last call without a graph
        self.alike = self.without = 0  # calls with that key in a row; calls without a graph in a row

    def __call__(self, *arguments):
        for number, argument in enumerate(arguments, start=1):
            if not isinstance(argument, (torch.Tensor, *PLAIN)):
                found = type(argument).__name__
                raise TypeError(f"a graphed step takes tensors and plain values, got {found} as argument {number}")
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("autocast must be entered inside the graphed step, got a call from within it")
        key = self._key(arguments)
        if key != self.captured:
            self.alike = self.alike + 1 if key == self.last else 1
            self.last = key
            if self.alike <= WARMUP:
                return self._as_it_is(arguments)
            self._record(arguments)
            self.captured = key
        self.last, self.without = None, 0
        return self.capture.replay(arguments)

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _key(self, arguments: tuple) -> tuple:
        """What a graph holds by value: of the arguments, of the optimizer's groups, and addresses.

        load_state_dict gives an optimizer another `state`, whose tensors lie elsewhere.
        """
        alike = [(a.shape, a.dtype, a.device) if _is(a) else (type(a), a) for a in arguments]  # 1 == True == 1.0
        groups = [v for group in self.optimizer.param_groups for name, v in group.items() if name != "params"]
        # A graph reads what lies on the device; a tensor elsewhere becomes a number in it.
        numbers = [(v.data_ptr() if v.device == self.device else v.item()) if _is(v) else v for v in groups]
        parameters = self._parameters()
        addresses = [p.data_ptr() for p in parameters]
        trained = [p.requires_grad for p in parameters]
        return alike, numbers, addresses, trained, id(self.optimizer.state)

    def _as_it_is(self, arguments: tuple):
        self.without += 1
        if self.without == PATIENCE:
            log.warning(
                f"graphed: {PATIENCE} steps in a row ran without a CUDA graph, because shapes or the optimizer's "
                "numbers change from step to step; a learning rate that does belongs in a tensor on the device"
            )
        if self.capture is not None:
            self.capture.left = True
        with aside(self.device):
            return _each(torch.Tensor.detach, self.step(*_on(self.device, arguments)))

    def _record(self, arguments: tuple) -> None:
        self.capture = self.captured = None  # frees its memory before there is another
        try:
            self.capture = Capture(self.step, arguments, self.optimizer, self.device)
        except RuntimeError as error:
            for p in self._parameters():
                p.grad = None  # what was not computed
            first = error.__context__ or error  # the end of a capture that has failed is an error of its own
            raise RuntimeError(
                "the step cannot be captured as a CUDA graph and has not been made; nothing in it may wait for the "
                f"device, as .item() does and a GradScaler whose optimizer is not fused: {str(first).splitlines()[0]}"
            ) from error


class Capture:
    """The graph of one call, with the tensors that it reads and writes."""

    def __init__(self, step: Callable, arguments: tuple, optimizer: torch.optim.Optimizer, device: torch.device):
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.state, self.device = optimizer.state, device  # the state is kept so that its id is no other's
        self.arguments = _on(device, arguments, copy=True)
        # From pinned memory, which the host may write to again when the copy before has been made: it does not wait for
        # the step that it launched last, and is one batch ahead of the device at most.
        self.pinned = [torch.empty_like(a, pin_memory=True) if _is_sent(a, device) else None for a in arguments]
        self.copied = torch.cuda.Event(blocking=True) if any(map(_is, self.pinned)) else None
        self.graph, self.results = capture(lambda: _each(torch.Tensor.detach, step(*self.arguments)), device)
        self.grads = [p.grad for p in self.parameters]
        self.left = False  # whether a call has run without it since, and left gradients of its own

    @torch.no_grad()
    def replay(self, arguments: tuple):
        if self.copied is not None:
            self.copied.synchronize()
        for own, pinned, given in zip(self.arguments, self.pinned, arguments, strict=True):
            if _is(own):
                own.copy_(given if pinned is None else pinned.copy_(given), non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))
        if self.left:
            for p, grad in zip(self.parameters, self.grads, strict=True):
                p.grad = grad
            self.left = False
        self.graph.replay()
        return _each(torch.Tensor.clone, self.results)


def _is(argument: object) -> bool:
    return isinstance(argument, torch.Tensor)


def _is_sent(argument: object, device: torch.device) -> bool:
    return _is(argument) and argument.device.type == "cpu" != device.type


def _on(device: torch.device, arguments: tuple, copy: bool = False) -> list:
    return [a.detach().to(device, copy=copy) if _is(a) else a for a in arguments]


def _each(function: Callable, results: object) -> object:
    if results is None:
        return None
    if _is(results):
        return function(results)
    if isinstance(results, tuple) and all(map(_is, results)):
        return tuple(map(function, results))
    raise TypeError(f"a graphed step must return a tensor, a tuple of tensors or None, got {type(results).__name__}")


def _check(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"graphed takes a step of one process, got a process group of {dist.get_world_size()}: call the step itself"
        )
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD):
            if _is(group["lr"]) and not group.get("fused"):
                raise ValueError("SGD must be made with fused=True for a graph that reads lr from a tensor")
        elif "capturable" not in group:
            raise ValueError(f"optimizer must be SGD, or take capturable=True, got {name}: it counts steps on the host")
        elif not group["capturable"]:
            raise ValueError(f"{name} must be made with capturable=True: else it counts steps on the host")


# ---- what is asked of CUDA; the tests have it on the CPU too, with a graph that records operators --------------------


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"optimizer must have its parameters on one CUDA device for a graph, got them on {found}")
    return devices.pop()


@functools.cache
def _streams(device: torch.device) -> tuple["torch.cuda.Stream", "torch.cuda.Stream"]:
    """For the calls before a capture, and for captures: cuBLAS keeps memory for every stream that it was used on, and
    what a graph uses of it has to come from the graph's own pool."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Not on the default stream, as torch asks of the calls before a capture; in order with the caller's stream."""
    current, (stream, _) = torch.cuda.current_stream(device), _streams(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def capture(run: Callable[[], object], device: torch.device) -> tuple["torch.cuda.CUDAGraph", object]:
    """The graph of run(), which is not replayed yet, and what run() returned."""
    graph, (_, stream) = torch.cuda.CUDAGraph(), _streams(device)
    # thread_local: a thread that pins a DataLoader's batches may call CUDA meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = run()
    return graph, results
