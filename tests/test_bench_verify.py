"""The check before a row: what is wrong is refused, what is right is not, and no tie leaves it to rounding."""

from dataclasses import replace

import pytest
import repository  # noqa: F401 - benchmarks/
import torch

from benchmarks import run
from benchmarks.calls import _Calls, build, module
from benchmarks.cases import Case
from benchmarks.checks import MARGIN, Judge
from benchmarks.rows import ENVIRONMENT
from benchmarks.run import Settings
from drsn_kernels.demo.timing import Call

ABOUT = {name: "" for name in ENVIRONMENT}
ONCE = Settings(rounds=1, compile="none")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0)


def test_a_wrong_provider_is_refused(monkeypatch):
    def wrong(change):
        def built(*arguments, **options):
            calls, port, exact = build(*arguments, **options)
            right = calls["torch"].run
            return calls | {"torch": replace(calls["torch"], run=lambda: change(list(right())))}, port, exact

        return built

    def changed(index, by):
        def change(outputs):
            outputs[index] = by(outputs[index])
            return tuple(outputs)

        return change

    def explode(outputs):
        raise RuntimeError("out of luck")

    case = Case("shrink_train", "F", (4, 6, 40))
    for change, said in (
        (changed(0, lambda y: y * 1.001), "y differs"),
        (changed(1, torch.zeros_like), "dx differs"),
        (changed(2, lambda dw: dw.neg()), "gradients differs"),
        (changed(0, lambda y: y * float("nan")), "y differs"),
        (explode, "raised RuntimeError: out of luck"),
    ):
        rows, refused = run.measure(case, ONCE, ABOUT, built=wrong(change))
        assert list(refused) == ["torch"] and refused["torch"].startswith(said)
        assert "torch" not in {one["provider"] for one in rows} and len(rows) >= 3


@pytest.mark.parametrize("shape", [(64, 64, 64), (128, 4, 512)])
@pytest.mark.parametrize("which", range(6), ids=["w1", "b1", "gamma", "beta", "w2", "b2"])
def test_a_parameters_gradient_that_is_one_percent_wrong_is_refused(shape, which):
    case = Case("shrink_train", "C", shape)
    _, port, exact = build(case, [], "cpu")
    judge = Judge(case, port, exact)
    outputs = list(port.once())
    assert judge.objection(Call(lambda: outputs)) is None
    whole = torch.cat([t.flatten() for t in outputs[2:]]).norm()
    if which == 1:  # exactly 0 but for rounding: wrong by a share of all
        outputs[3] = outputs[3] + 0.01 * whole / len(outputs[3]) ** 0.5
    else:
        outputs[2 + which] = outputs[2 + which] * 1.01
    assert judge.objection(Call(lambda: outputs)).startswith("gradients differs")


@pytest.mark.parametrize("op", ["shrink_train", "shrink_eval", "shrink_any_gate", "soft_threshold"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_is_checked_in_float32_is_near_a_tie(op, seed):
    case = Case(op, "C", (64, 64, 64))
    torch.manual_seed(seed)
    shared, port = _Calls(case, "cpu"), module(case, "port")
    shared.clear_of_ties(port)
    least = []
    for part in port.double().modules():
        if isinstance(part, torch.nn.ReLU):
            part.register_forward_pre_hook(lambda _, inputs: least.append(inputs[0].abs().min().item()))
    size = shared.x.double().abs()
    average = size.mean(2)
    tau = port.tau if op == "soft_threshold" else average * port.fc(average)
    assert (size - tau[..., None]).abs().min() > MARGIN and torch.equal(shared.x, shared.leaf)
    assert len(least) == (op in ("shrink_train", "shrink_eval")) and min(least, default=1) > MARGIN
