"""What test_launcher.py asks of the launcher, in a process in which Triton compiles: prints JSON, by scenario."""

import importlib.util
import json
import os
import sys
import threading

import stub_driver
import torch

# The instrumented launcher in the place of the installed one (test_launcher.py).
if instrumented := os.environ.get("DRSN_TEST_LAUNCHER"):
    spec = importlib.util.spec_from_file_location("drsn_kernels._launch", instrumented)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

import drsn_kernels as dk
from drsn_kernels import _launch
from drsn_kernels.backends.gpu import launch, native, stream, tuned
from drsn_kernels.layout import layout_of

SHAPE = (8, 16, 128)
ERROR_INVALID_VALUE, ERROR_LAUNCH_FAILED = 1, 719


def parameter_bytes(kernel) -> list[int]:
    entry = native._ENTRY.search(kernel.asm["ptx"]).group(1)
    return [int(bits) // 8 for bits, _ in native._PARAMETER.findall(entry)]


def tell_sizes(stub: stub_driver.Stub, ran: launch.Pass) -> None:
    for sequence_and_kernels in ran._native._known.values():
        for kernel in sequence_and_kernels[1]:
            stub.sizes(kernel.function, parameter_bytes(kernel))


def both(stub, ran: launch.Pass, given: tuple) -> dict:
    """What the driver is given for a pass by Triton's launcher and by ours."""
    ran(given)  # through Triton, and learnt
    tell_sizes(stub, ran)
    with stub.recorded() as ours:
        taken = ran._native(given)
    native.enabled = False
    with stub.recorded() as tritons:
        ran(given)
    native.enabled = True
    return {"taken": taken, "ours": ours, "tritons": tritons}


# ---- passes ----------------------------------------------------------------------------------------------------------


def training(module, x, residual=None):
    def call():
        y = module(x) if residual is None else dk.shrink(x, module.fc, residual=residual)
        y.backward(torch.randn_like(y))

    return call


def odd(shape, dtype=torch.float32) -> torch.Tensor:
    """At no multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    return torch.randn(size + 1).to(dtype)[1:].view(shape)


def same_to_the_driver(stub, sample: bool) -> dict:
    """Every field of every launch, of passes of one and of several launches. sample: of a training step alone."""
    x = torch.randn(SHAPE)
    tau = torch.rand(8, 16)
    calls = {
        "train": training(dk.Shrinkage(16), x.clone().requires_grad_()),
        "train, residual": training(dk.Shrinkage(16), x.clone().requires_grad_(), torch.randn(SHAPE)),
        "eval": training(dk.Shrinkage(16).eval(), x.clone().requires_grad_()),
        "no norm, not aligned": training(dk.Shrinkage(16, norm=False), odd(SHAPE).requires_grad_()),
        "not aligned": training(dk.Shrinkage(16), odd(SHAPE).requires_grad_()),
        "norm": training(dk.BatchNormReLU(16), x.clone().requires_grad_()),
        "norm, in pieces": training(dk.BatchNormReLU(16, affine=False), torch.randn(64, 16, 1024, requires_grad=True)),
        "norm, channels_last": training(
            dk.BatchNormReLU(64), torch.randn(4, 28, 28, 64).permute(0, 3, 1, 2).requires_grad_()
        ),
        "abs_mean": lambda: dk.abs_mean(x),
        "soft_threshold": lambda: dk.soft_threshold(x.clone().requires_grad_(), tau).sum().backward(),
        "float64": lambda: dk.abs_mean(x.double()),
        "bfloat16": lambda: dk.soft_threshold(x.bfloat16(), tau),
    }
    found = {}
    for name, call in list(calls.items())[: 1 if sample else None]:
        for i, (ran, given) in enumerate(stub_driver.passes(call)):
            found[f"{name} {i}"] = both(stub, ran, given)
    return found


def apart(stub) -> dict:
    """A training step whose launches begin when the one before has ended."""
    x = torch.randn(SHAPE, requires_grad=True)
    with tuned.using(DEPENDENT=False):
        passes = stub_driver.passes(training(dk.Shrinkage(16), x))
        return {f"train {i}": both(stub, *each) for i, each in enumerate(passes)}


def counted(stub) -> dict:
    """Of a training step of Shrinkage once it is known, and of one on another batch: calls of Python functions of ours
    and of Triton's, of the extension, launches, and allocations besides y and dx."""
    module, x = dk.Shrinkage(16), torch.randn(SHAPE, requires_grad=True)
    parameters = list(module.parameters())
    g = torch.randn(SHAPE)

    def step():
        return torch.autograd.grad(module(x), (x, *parameters), g)

    step(), step()
    first = profiled(stub, step)
    x, g = torch.randn(9, *SHAPE[1:], requires_grad=True), torch.randn(9, *SHAPE[1:])
    return {"known": first, "new shape": profiled(stub, step)}


def profiled(stub, step) -> dict:
    counts = {"python": 0, "triton": 0, "extension": 0, "allocations": 0}

    def watch(frame, event, argument):
        if event == "call":
            name = frame.f_code.co_filename
            counts["python"] += "drsn_kernels" in name
            counts["triton"] += "triton" in name and "drsn_kernels" not in name
        elif event == "c_call":
            counts["extension"] += getattr(argument, "__name__", "") == "run"
            counts["allocations"] += getattr(argument, "__name__", "").startswith(("empty", "new_empty"))

    before = stub.library.stub_launches()
    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return counts | {"launches": stub.library.stub_launches() - before}


# ---- one launch, in every circumstance -------------------------------------------------------------------------------


def reduce_pass(x: torch.Tensor) -> tuple[launch.Pass, tuple]:
    prepared = stream.prepare_reduce(layout_of(x), x.stride(), None, x.dtype, x.device, "magnitude", False)
    return prepared._alone, (x, None, torch.empty(x.shape[:2]), None)


def hooks(stub) -> dict:
    from triton import knobs

    ran, given = reduce_pass(torch.randn(SHAPE))
    ran(given)
    seen, before = [], knobs.runtime.launch_enter_hook
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    taken = [ran._native(given)]
    if hasattr(before, "add"):
        before.add(hook)
        taken.append(ran._native(given)), ran(given)
        before.remove(hook)
    knobs.runtime.launch_exit_hook, exit_before = hook, knobs.runtime.launch_exit_hook
    taken.append(ran._native(given))
    knobs.runtime.launch_exit_hook = exit_before
    return {"taken": [*taken, ran._native(given)], "seen": seen}


def contexts(stub) -> dict:
    """A thread without a context gets the device's own; the stub launches nothing without one."""
    ran, given = reduce_pass(torch.randn(SHAPE))
    ran(given)
    before = stub.library.stub_primaries()
    found = []
    thread = threading.Thread(target=lambda: found.append(ran._native(given)))
    thread.start(), thread.join()
    other = _launch.Sequence(device=3, kernels=[], aligned=[])
    thread = threading.Thread(target=lambda: found.append(other.run(0, ())))
    thread.start(), thread.join()
    return {"taken": found, "retained": stub.library.stub_primaries() - before, "device": stub.library.stub_device()}


def streams(stub) -> list[str]:
    ran, given = reduce_pass(torch.randn(SHAPE))
    ran(given)
    lines = []
    for stream_of in (0, 0x77):
        stub.driver.stream = stream_of
        with stub.recorded() as own:
            assert ran._native(given)
        lines += own
    stub.driver.stream = 0
    return [line[line.index("stream") : line.index("extra")].strip() for line in lines]


def classes(stub) -> dict:
    """A pointer that is None or off 16 bytes is another Sequence; one of each is learnt once."""
    x = torch.randn(SHAPE)
    ran, given = reduce_pass(x)
    off = (odd(SHAPE), *given[1:])
    ran(given)
    taken = [ran._native(given), ran._native(off)]
    ran(off), ran(off), ran(given)
    return {"taken": [*taken, ran._native(off), ran._native(given)], "sequences": len(ran._native._run)}


def says(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def errors(stub) -> dict:
    module, x = dk.Shrinkage(16).eval(), torch.randn(SHAPE)
    trained = dk.Shrinkage(16)
    found = {}
    with torch.no_grad():
        module(x), trained(x), trained(x)
        stub.library.stub_fail(1, ERROR_INVALID_VALUE)
        found["second"] = says(lambda: trained(x))
        stub.library.stub_fail(0, ERROR_LAUNCH_FAILED)
        found["first"] = says(lambda: trained(x))
        stub.library.stub_fail(-1, 0)
        found["after"] = says(lambda: trained(x))
    ran, given = reduce_pass(x)
    ran(given)
    sequence, _ = next(iter(ran._native._known.values()))
    found["too few"] = says(lambda: sequence.run(0, given[:-1]))
    found["no tensor"] = says(lambda: sequence.run(0, (5, *given[1:])))
    return found


def first_failure(stub) -> dict:
    """A Sequence whose first launch ever fails is given up."""
    ran, given = reduce_pass(torch.randn(16, 4, 128).half())  # of no kernel that is known: Triton launches first
    ran(given)
    stub.library.stub_fail(0, ERROR_INVALID_VALUE)
    ran(given)
    launched = stub.library.stub_launches()
    stub.library.stub_fail(-1, 0)
    found = {"launched": launched, "refused": dict(native.refused), "taken": ran._native(given)}
    native.refused.clear()
    return found


def empty(stub) -> dict:
    """A grid of no programs is not launched, and what follows it is."""
    kernels = [(name, 0x10, grid, 32, 0, False, b"", []) for name, grid in (("a", 0), ("b", 5))]
    with stub.recorded() as lines:
        _launch.Sequence(0, kernels, []).run(0, ())
    stub.library.stub_fail(0, ERROR_INVALID_VALUE)
    try:
        return {"lines": lines, "first to launch": says(lambda: _launch.Sequence(0, kernels, []).run(0, ()))}
    finally:
        stub.library.stub_fail(-1, 0)


def refusals(stub) -> dict:
    """What differs from what is known is refused, with a reason, and Triton launches."""
    x = torch.randn(SHAPE)
    prepared = stream.prepare_reduce(layout_of(x), x.stride(), None, x.dtype, x.device, "magnitude", False)
    named = {"x": x, "times": None, "out": torch.empty(SHAPE[:2]), "planes": None}
    kernel = prepared._launch(named)
    found = {}

    class Other:
        def __init__(self, **changed):
            self.asm, self.metadata, self.run, self.src = kernel.asm, kernel.metadata, kernel.run, kernel.src
            self.function = kernel.function
            self.__dict__ |= changed

    ptx = kernel.asm["ptx"]
    meta = kernel.metadata
    changes = {
        "one parameter more": {"asm": {"ptx": ptx.replace("reduce_kernel(", "reduce_kernel(.param .u64 p,", 1)}},
        "another size": {"asm": {"ptx": ptx.replace(".param .u32", ".param .u64", 1)}},
        "an array": {"asm": {"ptx": ptx.replace(".param .u32", ".param .align 4 .b32 a[4], .param .u32", 1)}},
        "clusters": {"metadata": meta._replace(num_ctas=2)},
        "cooperative": {"metadata": meta._replace(launch_cooperative_grid=True)},
        "scratch": {"metadata": meta._replace(global_scratch_size=16)},
        "warps": {"metadata": meta._replace(num_warps=32)},
        "launcher": {"run": print},
        "no PTX": {"asm": {}},
        "no PTX entry": {"asm": {"ptx": ""}},
    }
    for name, changed in changes.items():
        alone = native.Sequences(prepared.pointers, x.device)
        native.refused.clear()
        alone.learn(tuple(named.values()), [(prepared, Other(**changed), {n: n for n in named})])
        found[name] = [native.refused.get("reduce_kernel"), alone(tuple(named.values()))]
    stub.library.stub_shared_limit(100)
    for what, kernel_of in {
        "shared": ("k", 0x10, 1, 32, 60000, False, b"", []),
        "threads": ("k", 0x10, 1, 2048, 0, False, b"", []),
        "patch": ("k", 0x10, 1, 32, 0, False, bytes(8), [(1, 0, 0)]),
        "base": ("k", 0x10, 1, 32, 0, False, bytes(8), [(0, 9, 0)]),
        "none": ("k", 0x10, 1, 32, 0, False, bytes(8), [(0, 0, 0)]),
        "parameters": ("k", 0x10, 1, 32, 0, False, bytes(8 * 97), []),
    }.items():
        try:
            _launch.Sequence(0, [kernel_of], [None])
            found[what] = None
        except ValueError as error:
            found[what] = str(error)
    stub.library.stub_shared_limit(232448)
    native.refused.clear()
    return found


def threads(stub) -> dict:
    """Several threads run one Sequence with tensors of their own: every launch has its caller's addresses."""
    ran, given = reduce_pass(torch.randn(SHAPE))
    ran(given)
    tell_sizes(stub, ran)
    own = [(torch.randn(SHAPE), None, torch.empty(SHAPE[:2]), None) for _ in range(4)]
    with stub.recorded() as lines:
        workers = [threading.Thread(target=lambda g=g: [ran._native(g) for _ in range(200)]) for g in own]
        [w.start() for w in workers], [w.join() for w in workers]
    address = lambda t: t.data_ptr().to_bytes(8, "little").hex()  # noqa: E731
    pairs = [(address(g[0]), address(g[2])) for g in own]
    per_pair = [sum(f" {a} {b} " in line for line in lines) for a, b in pairs]
    return {"lines": len(lines), "per thread": per_pair}


def off(stub) -> dict:
    ran, given = reduce_pass(torch.randn(SHAPE))
    ran(given)
    native.enabled = False
    found = [ran._native(given), native.missing(), native.describe()]
    native.enabled = True
    return {"taken": found[0], "missing": found[1], "describe": found[2], "on": native.describe()}


SCENARIOS = (
    counted, hooks, contexts, streams, classes, errors, first_failure, empty, refusals,
    threads, off,
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    sample = "--sample" in sys.argv[1:]  # what make test asks
    found = {}
    with stub_driver.stub_driver() as stub, dk.use_backend("triton", strict=True):
        found["same_to_the_driver"] = same_to_the_driver(stub, sample)
        if not sample:
            found["apart"] = apart(stub)
        for scenario in SCENARIOS:
            found[scenario.__name__] = scenario(stub)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
