"""The advice for code that stands amid a block, taken literally: its lines changed to its statement, the block computes
the same."""

import importlib.util
import re
import textwrap

import pytest
import torch

import drsn_kernels as dk

HEAD = """
import torch
import drsn_kernels as dk
from torch import nn
from torch.nn import functional as F


def soft(x, tau):
    return torch.sign(x) * torch.relu(torch.abs(x) - tau)


class Block(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.conv = nn.Conv1d(c, c, 3, 1, 1)
        self.gap = nn.AdaptiveAvgPool1d(1)
        layers = nn.Linear(c, c), nn.BatchNorm1d(c), nn.ReLU(inplace=True), nn.Linear(c, c), nn.Sigmoid()
        self.fc = nn.Sequential(*layers)
        self.one = nn.Sequential(nn.Linear(c, c), nn.ReLU(inplace=True), nn.Linear(c, 1), nn.Sigmoid())
        convolutions = nn.Conv1d(c, c // 2, 1), nn.ReLU(), nn.Conv1d(c // 2, c, 1)
        self.att = nn.Sequential(nn.AdaptiveAvgPool1d(1), *convolutions, nn.Sigmoid())
        self.fc1, self.bn, self.fc2 = nn.Linear(c, c), nn.BatchNorm1d(c), nn.Linear(c, c)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def threshold(self, x):
        a = x.abs().mean(2)
        return (a * self.fc(a)).unsqueeze(2)

    def forward(self, x):
"""
SHRINK, SOFT = "dk.shrink(", "dk.soft_threshold("
FORMS = {
    "popular": ("""
        identity = x
        x = self.conv(x)
        x_raw = x
        x = torch.abs(x)
        x_abs = x
        x = self.gap(x)
        x = torch.flatten(x, 1)
        average = x
        x = self.fc(x)
        x = torch.mul(average, x)
        x = x.unsqueeze(2)
        sub = x_abs - x
        zeros = sub - sub
        n_sub = torch.max(sub, zeros)
        x = torch.mul(torch.sign(x_raw), n_sub)
        return x + identity
        """, SHRINK),
    "hybrid, average shared": ("""
        y = self.conv(x)
        a = F.adaptive_avg_pool1d(y.abs(), 1).flatten(1)
        tau = (torch.mean(a, dim=1, keepdim=True) * self.fc(a)).unsqueeze(2)
        return torch.sign(y) * torch.clamp(y.abs() - tau, min=0) + x
        """, SHRINK),
    "one neuron": ("""
        y = self.conv(x)
        a = y.abs().mean(dim=2)
        tau = self.one(a) * a.mean(1, keepdim=True)
        y = y.sign() * F.relu(y.abs() - tau[:, :, None])
        return F.relu(y + x)
        """, SHRINK),
    "no average": ("""
        y = self.conv(x)
        tau = self.fc(y.abs().flatten(2).mean(2)).view(-1, 8, 1)
        return F.relu(y - tau) - F.relu(-y - tau) + x
        """, SHRINK),
    "separate layers": ("""
        out = self.conv(x)
        b, c, _ = out.shape
        a = out.abs().reshape(b, c, -1).mean(-1)
        z = F.relu(self.bn(self.fc1(a)))
        z = torch.sigmoid(self.fc2(z))
        tau = (a * z).reshape(b, c, 1)
        out = out.sign() * (out.abs() - tau).relu()
        out = out + x
        return out
        """, SHRINK),
    "convolutions as the gate": ("""
        y = self.conv(x)
        magnitude = torch.abs(y)
        tau = self.att(magnitude) * self.gap(magnitude)
        y = torch.sign(y) * torch.relu(magnitude - tau)
        return y + x
        """, SOFT),
    "learnable scale": ("""
        y = self.conv(x)
        a = torch.abs(y).mean(2)
        tau = (self.scale * self.fc(a) * a).unsqueeze(2)
        y = torch.sign(y) * torch.maximum(y.abs() - tau, torch.zeros_like(y))
        return y + x
        """, SOFT),
    "signed pooling": ("""
        y = self.conv(x)
        a = y.mean(-1)
        alpha = self.fc(a)
        tau = (a * alpha).unsqueeze(2)
        y = torch.sign(y) * torch.relu(y.abs() - tau)
        return y + x
        """, SOFT),
    "tau kept on self": ("""
        y = self.conv(x)
        a = y.abs().mean(-1)
        tau = (a * self.fc(a)).unsqueeze(2)
        self.last_tau = tau.detach()
        y = torch.sign(y) * torch.relu(y.abs() - tau)
        return y + x
        """, SOFT),
    "the average is used again": ("""
        y = self.conv(x)
        a = y.abs().mean(-1)
        tau = (a * self.fc(a)).unsqueeze(2)
        y = torch.sign(y) * torch.relu(y.abs() - tau)
        return y + x + a.unsqueeze(2)
        """, SHRINK),
    "the threshold is used again": ("""
        y = self.conv(x)
        a = y.abs().mean(-1)
        tau = (a * self.fc(a)).unsqueeze(2)
        y = torch.sign(y) * torch.relu(y.abs() - tau)
        return y + x * tau
        """, SOFT),
    "in one expression": ("""
        y = self.conv(x)
        a = y.abs().mean(2)
        return self.conv(
            torch.sign(y) * torch.relu(y.abs() - (a * self.fc(a)).unsqueeze(2))
        ) + x
        """, SHRINK),
    "functions of the file and of the class": ("""
        y = self.conv(x)
        tau = self.threshold(y)
        y = soft(y, tau)
        return y + x
        """, SHRINK),
    "in place": ("""
        y = self.conv(x)
        z = y.abs()
        tau = self.fc(z.mean(2)) * z.mean(2)
        z -= tau.unsqueeze(2)
        z = z.clamp_(min=0).mul_(y.sign())
        return z + x
        """, SHRINK),
    "over several lines, with comments": ("""
        y = self.conv(x)
        # the average

        a = torch.mean(
            torch.abs(y),
            dim=2,
        )
        tau = torch.mul(  # the threshold
            a, self.fc(a)
        ).unsqueeze(2)
        y = torch.sign(y) * (
            torch.relu(torch.abs(y) - tau)
        )
        return y + x
        """, SHRINK),
    "other lines between": ("""
        y = self.conv(x)
        a = y.abs().mean(2)
        shortcut = self.conv(x) * 2
        tau = (a * self.fc(a)).unsqueeze(2)
        other = shortcut + 1
        y = torch.where(y.abs() > tau, y.sign() * (y.abs() - tau), torch.zeros_like(y))
        return y + other
        """, SHRINK),
    "in a branch": ("""
        y = self.conv(x)
        if y.dim() == 3:
            a = y.abs().mean(2)
            tau = (a * self.fc(a)).unsqueeze(2)
            y = torch.sign(y) * torch.relu(y.abs() - tau)
        return y + x
        """, SHRINK),
}  # fmt: skip


def block(path, source: str, name: str):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Block()


def follow(source: str, advice: str) -> str:
    """The source with the lines of the advice changed to its statement."""
    ranges, statement = re.fullmatch(r".*change [^:]*:([\d, -]+) to (.*)", advice).groups()
    lines, taken = source.split("\n"), []
    for part in ranges.split(", "):
        first, _, last = part.partition("-")
        taken += range(int(first), int(last or first) + 1)
    last = int(re.findall(r"\d+", ranges.split(", ")[-1])[0])
    head = lines[last - 1]
    lines[last - 1] = head[: len(head) - len(head.lstrip())] + statement
    return "\n".join(line for i, line in enumerate(lines, 1) if i not in taken or i == last)


def test_zeros_of_sizes_are_told_of_zeros_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = f"""{HEAD}        a = x.abs().mean(2)
        tau = (self.fc(a) * a).unsqueeze(2)
        zeros = torch.zeros(x.size(0), x.size(1), x.size(2)).to(x.device)
        return torch.sign(x) * torch.max(x.abs() - tau, zeros)
"""
    report = dk.convert(torch.nn.Sequential(block(tmp_path / "own.py", source, "own")))
    (row,) = report.left_alone
    assert "cannot be followed beyond own.py:" in row.detail and row.detail.endswith("; write torch.zeros_like(x)")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", FORMS)
def test_the_advice_taken_literally_computes_the_same(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body, call = FORMS[form]
    source = HEAD + textwrap.indent(textwrap.dedent(body).strip("\n"), " " * 8) + "\n"
    own = block(tmp_path / "own.py", source, "own")
    report = dk.convert(own)
    (row,) = report.inline
    assert call in row.detail and ("threshold stays" in row.detail) == (call == SOFT), row.detail
    changed = follow(source, row.detail)
    assert "sign" not in changed.partition("def forward")[2], changed
    ours = block(tmp_path / "ours.py", changed, "ours")
    assert not dk.convert(ours).inline
    ours.load_state_dict(own.state_dict())
    for training in (True, False):
        outcomes = []
        for module in (own.double().train(training), ours.double().train(training)):
            x = torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
            y = module(x)
            y.square().sum().backward()
            grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            outcomes.append({"y": y, "dx": x.grad, **grads, **{n: b.clone() for n, b in module.named_buffers()}})
            module.zero_grad(set_to_none=True)
        assert outcomes[0].keys() == outcomes[1].keys()
        for name, expected in outcomes[0].items():
            torch.testing.assert_close(
                outcomes[1][name], expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert hasattr(own, "last_tau") == hasattr(ours, "last_tau")
