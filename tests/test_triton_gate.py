"""The standard gate's own launches, interpreted, from A to tau and back, against the formula in float64.

Without a feature map around them: test_triton.py and test_backend_gpu.py have that. `oracle.close` allows twice the
error of the same formula in torch's float32, and a few units of the last place.
"""

import copy
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import steps
import torch
from oracle import AVERAGES, close, standard_gate
from torch import nn
from triton_child import child

from drsn_kernels import gates
from drsn_kernels.backends import gpu
from drsn_kernels.reference import threshold

pytestmark = pytest.mark.skipif(
    not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted (no CUDA device)"
)
if gpu.missing() is None:
    import gate_alone
    import triton.language as tl

    from drsn_kernels.backends.gpu import gate_passes, plans, tuned
    from drsn_kernels.backends.gpu.launch import Prepared

KINDS = ["plain", "norm", "batch norm"]


class Run:
    """tau, dA, the parameters' gradients and the running statistics of one step, by the launches or by a formula."""

    def __init__(self, n, c, hidden, outputs, kind, average, dtype=torch.float32, parts=1, own=True, keep=True):
        self.average, self.parts, self.kind, self.keep = average, parts, kind, keep
        self.gate = standard_gate(c, hidden, outputs, kind).to(dtype)
        self.partial = torch.rand(parts, n, c, dtype=dtype) * (0.5 + torch.rand(n, 1, dtype=dtype))
        one_tau = outputs == 1 and average != "channel"
        self.dtau = torch.randn(parts, n, c, dtype=dtype)
        self.tau_grad = torch.randn(n, 1 if one_tau else c, dtype=dtype) if own else None
        self.step = steps.shrink(
            (n, c, 8), dtype, hidden=hidden, outputs=outputs, norm=kind != "plain", training=kind == "batch norm",
            average=average, grad=keep,
        )  # fmt: skip

    def launched(self, want_dA: bool = True) -> dict[str, torch.Tensor | None]:
        step, dtype = self.step, self.partial.dtype
        n, c = self.partial.shape[1:]
        running = [t.clone() for t in self.gate.buffers()]
        parts = gates.standard_gate(self.gate, torch.empty(n, c, 1, dtype=dtype))
        assert not isinstance(parts, str), parts
        if running:
            parts = parts._replace(mean=running[0], var=running[1], batches=running[2])

        def new(size):
            return torch.full(size, float("nan"), dtype=dtype)  # what is not written shows

        state, tau = new((step.state,)).fill_(float("nan")), new((n, 1 if step.one_tau else c))
        pooled = self.partial[0].clone() if self.parts == 1 else new((n, c))
        with torch.no_grad():
            gate_alone.forward(step, parts, pooled[None] if self.parts == 1 else self.partial, pooled, state, tau)
            if not self.keep:
                return {"tau": tau}
            dA, grads = gate_alone.backward(step, parts, pooled, state, self.dtau, self.tau_grad, want_dA)
        names = ("w1", "b1", "gamma", "beta", "w2", "b2")
        found = {"tau": tau, "dA": dA, **dict(zip(names, grads, strict=True))}
        if running:
            found |= {"running mean": running[0], "running var": running[1]}
            assert running[2] == (self.kind == "batch norm")
        return {name: value for name, value in found.items() if value is not None}

    def formula(self, dtype: torch.dtype, constant: bool = False, signs: bool = False) -> dict[str, torch.Tensor]:
        """constant: the batch's statistics are; signs: those of the gradients that come in are drawn anew."""
        gate, pooled = copy.deepcopy(self.gate).to(dtype), self.partial.to(dtype).sum(0).requires_grad_()
        if constant and self.kind == "batch norm":
            gate[1].momentum = 1.0
            gate(pooled)
            gate.eval()
        tau = threshold(gate(pooled), pooled, self.average)
        gradients = [self.dtau.to(dtype).sum(0), None if self.tau_grad is None else self.tau_grad.to(dtype)]
        if signs:
            gradients = [None if g is None else g * (torch.randint(2, g.shape) * 2 - 1) for g in gradients]
        loss = (tau.expand_as(pooled) * gradients[0]).sum()
        if gradients[1] is not None:
            loss = loss + (tau * gradients[1]).sum()
        named = dict(zip(("w1", "b1", "w2", "b2"), (*gate[0].parameters(), *gate[-2].parameters()), strict=True))
        found = {"tau": tau.detach()}
        if self.kind != "plain":
            named |= {"gamma": gate[1].weight, "beta": gate[1].bias}
            found |= {"running mean": gate[1].running_mean, "running var": gate[1].running_var}
        found |= dict(zip(("dA", *named), torch.autograd.grad(loss, (pooled, *named.values())), strict=True))
        return found

    def check(self, **options) -> None:
        found, exact, plain = self.launched(**options), self.formula(torch.float64), self.formula(self.partial.dtype)
        if not options.get("want_dA", True):
            exact.pop("dA")
        if not self.keep:
            exact = {"tau": exact["tau"]}
        assert found.keys() == exact.keys()
        drawn = functools.cache(lambda: [self.formula(torch.float64, constant=True, signs=True) for _ in range(8)])
        for name, value in found.items():
            close(value, exact[name], plain[name], f"{name} of {self.step.gate}", functools.partial(terms, name, drawn))


def terms(name: str, drawn: Callable) -> torch.Tensor:
    """How large the terms of a sum were before they cancelled: each other, or because batch statistics follow them."""
    return max(found[name].abs().max() for found in drawn())


# C, H and O are 1, odd, the length of a tile (16, 32), one more, and several tiles; N too.
# The last ones have launches of their own for dz, and slices that are all there.
WIDTHS = [(1, 1), (3, 5), (16, 16), (17, 4), (20, 40), (32, 33), (70, 64), (64, 70), (8, 65), (130, 20), (256, 128)]
BATCHES = [2, 5, 32, 33, 70]


@pytest.mark.sampled(14)
@pytest.mark.parametrize("n", BATCHES)
@pytest.mark.parametrize("one", [False, True], ids=["an alpha a channel", "one alpha"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_every_width(width, kind, one, n):
    channels, hidden = width
    Run(n, channels, hidden, 1 if one else channels, kind, "channel").check()


@pytest.mark.sampled(14)
@pytest.mark.parametrize("own", [True, False], ids=["", "tau is not returned"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("one", [False, True], ids=["an alpha a channel", "one alpha"])
def test_every_average(one, average, parts, own):
    for kind, c, h in (("batch norm", 36, 20), ("plain", 7, 18), ("norm", 140, 6)):
        Run(37, c, h, 1 if one else c, kind, average, parts=parts, own=own).check()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_nothing_is_kept(kind, average):
    """Then the first launch of a wide gate makes relu(v)."""
    for n, c, h, parts in ((1, 7, 5, 1), (40, 36, 70, 3), (33, 130, 128, 1)):
        for outputs in (1, c):
            Run(n, c, h, outputs, kind, average, parts=parts, keep=False).check()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    Run(40, 35, 33, 35, kind, "channel", torch.float64, parts=2).check()
    Run(40, 20, 6, 1, kind, "sample", torch.float64).check()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_gradients_alone(kind):
    Run(40, 35, 33, 35, kind, "channel").check(want_dA=False)
    Run(40, 140, 33, 140, kind, "channel").check(want_dA=False)
    Run(40, 35, 33, 1, kind, "sample").check(want_dA=False)


def test_statistics_merged_by_a_launch_of_their_own(monkeypatch):
    """Of many units, of many tiles, and by several turns of each loop."""
    monkeypatch.setattr(tuned, "MOST_GROUPS", 2)
    for name, value in (("GATE_MERGED", 64), ("MERGED", 16)):  # two tiles at a time
        monkeypatch.setattr(tuned, name, value)
    for n, c, h in ((170, 6, 40), (50, 6, 40), (40, 6, 70), (16, 6, 70)):
        run = Run(n, c, h, c, "batch norm", "channel")
        merges = [gate_passes._merge(run.step, gate_passes.gate_plan(run.step), kind) for kind in (True, False)]
        assert [merge is not None for merge in merges] == [n > 64 or (h > 64 and n > 32)] * 2
        run.check()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_shared_out(kind, monkeypatch):
    monkeypatch.setattr(tuned, "GATE_WALK", 64)
    run = Run(140, 18, 40, 18, kind, "channel")
    assert gate_passes.gate_plan(run.step).shares == 3
    run.check()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "c"), [(1024, 16), pytest.param(8192, 3, marks=pytest.mark.slow)], ids=str)
def test_as_accurate_as_torch_on_large_batches(n, c):
    """Averages far from 0 against their spread, so that anything but a merge of centred sums would cancel."""
    run = Run(n, c, 2 * c, c, "batch norm", "channel")
    run.partial += 8
    run.check()


@pytest.mark.slow
def test_the_same_bits_every_time():
    run = Run(100, 40, 70, 40, "batch norm", "channel")
    first, again = run.launched(), run.launched()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_nan_stays():
    run = Run(40, 6, 5, 6, "norm", "channel")
    run.partial[0, 3, 2] = float("nan")
    found = run.launched()
    assert found["tau"][3].isnan().all() and found["tau"].isnan().sum() == 6


def test_the_papers_network_takes_two_launches_each_way_at_most():
    for kind in KINDS:
        for n, c in ((2, 1), (128, 16), (128, 32)):
            step = Run(n, c, c, c, kind, "channel").step
            forward, backward = gate_passes.prepare_gate(step, 1), gate_passes.prepare_gate_grad(step, 1, True)
            names = [[one.name for one in way if isinstance(one, Prepared)] for way in (forward, backward)]
            ahead = ["hidden_kernel", "alpha_kernel"] if kind == "batch norm" else ["whole_gate_kernel"]
            assert names == [ahead, ["hidden_grad_kernel", "linear_grad_kernel"]]


def test_a_schedule_of_momentum_compiles_nothing():
    for hidden, launch in ((16, "alpha"), (70, "normalise")):
        step = Run(40, 16, hidden, 16, "batch norm", "channel").step
        gates_of = [gate_passes.prepare_gate(step._replace(gate=step.gate._replace(momentum=m)), 1) for m in (0.1, 0.3)]
        one, other = (getattr(gate, launch) for gate in gates_of)
        assert {name for name in one.values if one.values[name] != other.values[name]} == {"factor", "rest"}
        parameters = inspect.signature(one.fn.fn).parameters
        assert not any(parameters[name].annotation is tl.constexpr for name in ("factor", "rest"))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("average", ["channel", "sample", None])
@pytest.mark.parametrize("width", [(64, 64, 64), (5, 64, 1), (33, 1, 33)], ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_whole_gate_is_that_of_two_launches(kind, width, average):
    """Up to the order of sums; with what is kept of it, in parts and not."""
    c, h, o = width
    for n, parts, keep in ((17, 1, True), (40, 3, True), (1, 2, False)):
        run = Run(n, c, h, o, kind, average, parts=parts, keep=keep)
        assert isinstance(gate_passes.prepare_gate(run.step, parts), gate_passes.WholeGate)
        run.check()
        whole = run.launched()
        with tuned.using(WHOLE_GATE=0):
            for name, value in run.launched().items():
                torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_tiles_follow_from_the_widths_alone():
    for c, h, o in ((1, 1, 1), (16, 16, 16), (64, 16, 64), (512, 512, 512), (512, 32, 1)):
        found = [plans.gate(n, c, h, o, sms) for n in (1, 2, 33, 4096, 65536) for sms in (1, 132)]
        sums = {(p.over_channels, p.over_units, p.apart, p.align, p.at_a_time) for p in found}
        tiles = {(p.samples, p.channels, p.units) for p in found}
        assert len(tiles) == len(sums) == 1


def test_a_share_takes_whole_steps_and_every_sample_once():
    for n in (1, 63, 64, 513, 5000, 65536):
        for c, h in ((16, 16), (512, 512)):
            plan = plans.gate(n, c, h, c, 132)
            assert plan.share % plan.step == 0
            assert (plan.shares - 1) * plan.share < n <= plan.shares * plan.share


def test_gradients_agree_with_the_modules_own():
    """The formula above is written with the same modules; this asks torch's autograd through them once, as users do."""
    gate = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4), nn.Sigmoid())
    run = Run(12, 4, 3, 4, "batch norm", "channel", own=False)
    run.gate = gate
    found = run.launched()
    pooled = run.partial[0].clone().requires_grad_()
    (gate(pooled) * pooled).backward(run.dtau[0])
    torch.testing.assert_close(found["dA"], pooled.grad)
    torch.testing.assert_close(found["w1"], gate[0].weight.grad)


# ---- as compiled -----------------------------------------------------------------------------------------------------

LOWERED = Path(__file__).resolve().parent / "lowered_gate.py"
TARGETS = ["cuda:90", *(pytest.param(target, marks=pytest.mark.slow) for target in ("cuda:80", "cuda:100"))]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_as_compiled(target, tmp_path, triton_cache):
    """Nothing spills, programs fit, rows load 16 bytes wide; products are fma, though nothing else is contracted, or
    on tensor cores."""
    done = child(str(LOWERED), target, cwd=tmp_path, cache=triton_cache)
    assert done.returncode == 0, done.stderr[-8000:]
    found = json.loads(done.stdout)
    for name, launches in found.items():
        wide, normed = name.startswith("wide"), name == "wide"
        ahead = ["hidden_kernel", *["normalise_kernel"] * normed, "alpha_kernel"]
        assert [launch["kernel"] for launch in launches] == [
            *(["whole_gate_kernel"] if name == "odd" else ahead),
            *["logit_grad_kernel"] * wide, "hidden_grad_kernel", *["normalise_grad_kernel"] * normed,
            "linear_grad_kernel", *(["add_shares_kernel"] if name == "medium" else []),
        ], name  # fmt: skip
        for launch in launches:
            assert launch["stack"] == 0 and launch["occupancy"] >= 1, (name, launch)
            assert launch["shared"] <= launch["limit"] and launch["unattributed"] == 0, (name, launch)
        forward, backward = launches[0], next(one for one in launches if one["kernel"] == "hidden_grad_kernel")
        assert forward["fma"] == 0 and forward["tensor cores"] == (name != "float64"), name
        samples, units, depth = backward["tile"]
        by_fma = name not in ("one", "float64") and not wide
        assert backward["fma"] == by_fma * samples * units * depth // backward["threads"], name
        assert backward["tensor cores"] == launches[-1]["tensor cores"] == wide, name
    for name in ("paper", "medium", "odd", "float64"):
        for launch in found[name]:
            # what a program reads is waited for once; of linear_grad's two branches the second also for each step
            assert launch["waits"] <= 1 + 2 * (launch["kernel"] == "linear_grad_kernel"), (name, launch)
    first, last = found["wide"][0], found["wide"][-1]
    assert first["loads"]["w1"] == last["loads"]["dz"] == [16]
    assert first["loads"]["partial"] == last["loads"]["dv"] == [16]
