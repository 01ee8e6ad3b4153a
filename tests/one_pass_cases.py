"""Steps for csrc/cuda/one_pass.cu in the emulation, and what they give in float64."""

import dataclasses
from typing import NamedTuple

import oracle
import pytest
import torch

from drsn_kernels import layout as layouts
from drsn_kernels.backends.eager import eager
from drsn_kernels.backends.gpu import one_pass_cu
from drsn_kernels.backends.step import GateShape, Step, Want
from drsn_kernels.gates import standard_gate

F32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    shape: tuple[int, int, int] = (5, 8, 64)  # N, C, L
    hidden: int = 8
    kind: str = "norm"
    one: bool = False  # one alpha a sample
    average: str | None = "channel"
    residual: bool = True
    tau: bool = True  # returned, and its gradient given
    dtype: torch.dtype = F32
    cluster: int = 1
    stages: int = 3
    clusters: int = 2  # of the grid

    def __str__(self) -> str:
        changed = (f"{name}={v}" for name, v in self._asdict().items() if v != self._field_defaults[name])
        return ",".join(changed).replace(" ", "").replace("torch.", "") or "plain"


class Problem:
    """A case's tensors and launches, and what they give in float64."""

    def __init__(self, case: Case):
        torch.manual_seed(1)
        n, c, _ = case.shape
        self.case = case
        gate = oracle.standard_gate(c, case.hidden, 1 if case.one else c, case.kind).eval()
        x, residual, self.g = (oracle.varied(case.shape, case.dtype) for _ in range(3))
        self.x, self.residual = x, residual if case.residual else None
        self.parts, self.layout = standard_gate(gate, x), layouts.layout_of(x)
        self.step = Step(
            "shrink", self.layout, x.stride(), x.dtype, x.device, case.average, outputs=len(self.parts.w2),
            gate=GateShape.of(self.parts), residual=None if self.residual is None else residual.stride(), keep=True,
            want=Want(True, True, case.tau),
        )  # fmt: skip
        tau_shape = n, 1 if self.step.one_tau else c
        self.tau_grad = torch.randn(tau_shape) if case.tau else None

        gate, leaf = oracle.cast_gate(gate, torch.float64), x.double().requires_grad_()
        pooled = oracle.abs_mean(leaf)
        v = gate[:-3](pooled)  # before the ReLU
        z = gate[-3:-1](v)
        alpha = gate[-1](z)
        tau = alpha * {"channel": pooled, "sample": pooled.mean(1, keepdim=True), None: 1.0}[case.average]
        by_channel = tau.expand(n, c)
        y = oracle.soft_threshold(leaf, by_channel)
        g, tau_grad = self.g.double(), torch.zeros(tau_shape).double() if self.tau_grad is None else self.tau_grad
        dx, dz, dv = torch.autograd.grad([y, tau], [leaf, z, v], [g, tau_grad.double()])
        state = torch.cat([gate[0](pooled).flatten(), alpha.flatten()])
        y = y if self.residual is None else y + residual.double()
        forward = {"y": y, "pooled": pooled, "state": state, "tau": tau}
        self.forward = {name: t.detach() for name, t in forward.items()}
        self.backward = {"dx": dx, "dz": dz, "dv": dv}

    def planned(self, launch: one_pass_cu.Launch, **changed: int) -> one_pass_cu.OnePassCuPlan:
        """The launch's plan, on a device that holds few blocks."""
        return dataclasses.replace(launch.plan, programs=self.case.cluster * self.case.clusters, **changed)

    def prepare(self, prepare, strides) -> one_pass_cu.Launch:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one_pass_cu, "CLUSTERS", (self.case.cluster,))
            patch.setattr(one_pass_cu, "STAGES", self.case.stages)
            launch = prepare(self.step, strides)
        assert not isinstance(launch, str), launch
        assert launch.plan.stages == self.case.stages
        return launch

    def run_forward(self, emulation, keep: bool = True, **changed: int) -> dict[str, torch.Tensor]:
        """y, and what is kept: pooled, state, tau, planes. changed: of the plan."""
        launch = self.prepare(one_pass_cu.prepare_forward, self.x.stride())
        out = {name: torch.full_like(t, torch.nan, dtype=F32) for name, t in self.forward.items()}
        out["y"] = out["y"].to(self.case.dtype)
        out["planes"] = torch.full((3, self.layout.words), 0x55555555, dtype=torch.int32)
        if not keep:
            out = {"y": out["y"]}
        elif not self.case.tau:
            del out["tau"]
        p = self.parts
        arguments = launch.arguments(
            x=self.x, residual=self.residual, w1=p.w1, b1=p.b1, mean=p.mean, var=p.var, gamma=p.gamma, beta=p.beta,
            w2=p.w2, b2=p.b2, **out,
        )  # fmt: skip
        emulation.run(launch.kernel, self.planned(launch, **changed), arguments)
        return out

    def run_backward(self, emulation, kept: dict[str, torch.Tensor], **changed: int) -> dict[str, torch.Tensor]:
        launch = self.prepare(one_pass_cu.prepare_backward, self.g.stride())
        out = {name: torch.full_like(t, torch.nan, dtype=F32) for name, t in self.backward.items()}
        out["dx"] = out["dx"].to(self.case.dtype)
        p = self.parts
        arguments = launch.arguments(
            g=self.g, planes=kept["planes"], tau_grad=self.tau_grad, pooled=kept["pooled"], state=kept["state"],
            w1=p.w1, mean=p.mean, var=p.var, gamma=p.gamma, beta=p.beta, w2=p.w2, **out,
        )  # fmt: skip
        emulation.run(launch.kernel, self.planned(launch, **changed), arguments)
        return out

    def check_forward(self, found: dict[str, torch.Tensor]) -> None:
        for name in found.keys() - {"planes"}:
            close(found[name], self.forward[name])
        if "planes" in found:
            tau = found["tau"] if "tau" in found else self.forward["tau"].float()
            wanted = eager.map(self.x, self.layout, tau, keep=3)[1]
            assert torch.equal(found["planes"], wanted.bits)

    def check_backward(self, found: dict[str, torch.Tensor]) -> None:
        for name, wanted in self.backward.items():
            close(found[name], wanted)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 2**-8 if found.dtype == BF16 else 1e-5
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=1e-5)
