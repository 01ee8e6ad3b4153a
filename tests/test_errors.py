"""Wrong arguments: the exception, a message with the argument, what it got and what it takes, and nothing changed."""

import copy
import re
from functools import partial

import pytest
import torch
from oracle import smooth_gate
from torch import nn

import drsn_kernels as dk
from drsn_kernels.backends import BACKENDS, cpu
from drsn_kernels.layout import layout_of


def features(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


BAD_FEATURES = [
    (lambda: features(4), ValueError, r"x must have shape \(N, C, \*spatial\).*got \(4,\)"),
    (lambda: features(4, 5), ValueError, r"x must have shape \(N, C, \*spatial\).*got \(4, 5\)"),
    (lambda: torch.tensor(1.0), ValueError, r"x must .*got \(\)"),
    *(
        (lambda dtype=dtype: torch.ones(2, 3, 4, dtype=dtype), TypeError, f"x must be a floating-point.*, got {dtype}")
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ),
    (lambda: [[[1.0]]], TypeError, "x must be a floating-point tensor, got list"),
    (lambda: None, TypeError, "x must be a floating-point tensor, got NoneType"),
]


@pytest.mark.parametrize("make, error, message", BAD_FEATURES, ids=[message for _, _, message in BAD_FEATURES])
def test_features(kernels, make, error, message):
    with pytest.raises(error, match=message):
        kernels.abs_mean(make())
    for op in (kernels.shrink, kernels.squeeze_excite):
        with pytest.raises(error, match=message):
            op(make(), pytest.fail)  # the gate does not run


@pytest.mark.parametrize("make, error, message", BAD_FEATURES[3:], ids=[message for _, _, message in BAD_FEATURES[3:]])
def test_soft_threshold_features(kernels, make, error, message):
    with pytest.raises(error, match=message):
        kernels.soft_threshold(make(), 0.5)


BAD_TAU = [
    (lambda: torch.ones(2, 2), ValueError, r"tau .*\(2, 1\) or \(2, 3\).*got \(2, 2\)"),
    (lambda: torch.ones(1, 3), ValueError, r"tau .*\(2, 1\) or \(2, 3\).*got \(1, 3\)"),
    (lambda: torch.ones(3, 4), ValueError, r"tau .*got \(3, 4\)"),
    (lambda: torch.ones(3), ValueError, r"tau must .*got \(3,\)"),
    (lambda: torch.ones(2, 3, 5), ValueError, r"tau must .*got \(2, 3, 5\)"),
    (lambda: torch.ones(2, 3, 1, 1), ValueError, r"tau must .*got \(2, 3, 1, 1\)"),
    (lambda: torch.ones(2, 3, 0), ValueError, r"tau must .*got \(2, 3, 0\)"),
    (lambda: torch.ones(2, 3, dtype=torch.int32), TypeError, r"tau must .*got torch.int32"),
    (lambda: torch.ones(2, 3, dtype=torch.complex64), TypeError, r"tau must .*got torch.complex64"),
    (lambda: torch.ones(2, 3, device="meta"), ValueError, r"tau must be on x's device {device}, got meta"),
    (lambda: "0.5", TypeError, "tau must be a number or a tensor, got str"),
    (lambda: None, TypeError, "tau must be a number or a tensor, got NoneType"),
    (lambda: True, TypeError, "tau must be a number or a tensor, got bool"),
    (lambda: 1j, TypeError, "tau must be a number or a tensor, got complex"),
    (lambda: [0.5], TypeError, "tau must be a number or a tensor, got list"),
]


@pytest.mark.parametrize("make, error, message", BAD_TAU, ids=[message for _, _, message in BAD_TAU])
def test_tau(kernels, make, error, message):
    x = features(2, 3, 4)
    before = x.clone()
    with pytest.raises(error, match=message.format(device=x.device)):
        kernels.soft_threshold(x, make())
    assert torch.equal(x, before)


SHAPE = (2, 3, 16)
BAD_ARGUMENTS = {
    "average": (lambda: {"average": "mean"}, ValueError, "average must be 'channel', 'sample' or None, got 'mean'"),
    "average of another type": (lambda: {"average": True}, ValueError, "average must be .*got True"),
    "residual's shape": (
        lambda: {"residual": torch.ones(2, 3, 15)},
        ValueError,
        r"residual must have x's shape \(2, 3, 16\), got \(2, 3, 15\)",
    ),
    "residual's rank": (lambda: {"residual": torch.ones(2, 3, 16, 1)}, ValueError, r"residual .*got \(2, 3, 16, 1\)"),
    "residual that would broadcast": (
        lambda: {"residual": torch.ones(1, 3, 16)},
        ValueError,
        r"residual .*got \(1, 3, 16\)",
    ),
    "residual's device": (
        lambda: {"residual": torch.ones(SHAPE, device="meta")},
        ValueError,
        "residual must be on x's device {device}, got meta",
    ),
    "residual's type": (lambda: {"residual": 1.0}, TypeError, "residual must be a tensor.*got float"),
    "complex residual": (
        lambda: {"residual": torch.ones(SHAPE, dtype=torch.complex64)},
        TypeError,
        "residual must .*got torch.complex64",
    ),
    "residual does not fit in place": (
        lambda: {"residual": torch.ones(SHAPE, dtype=torch.float64), "inplace": True},
        ValueError,
        "inplace=True .*torch.float32.*torch.float64",
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_arguments_are_checked_before_anything_runs(kernels, case, inplace):
    arguments, error, message = BAD_ARGUMENTS[case]
    arguments = arguments()
    gate = smooth_gate(3, norm=True)
    state, x = copy.deepcopy(gate.state_dict()), features(SHAPE)
    before = x.clone()
    with pytest.raises(error, match=message.format(device=x.device)):
        kernels.shrink(x, gate, **{"inplace": inplace, **arguments})
    if arguments.keys() == {"residual"}:
        with pytest.raises(error, match=message.format(device=x.device)):
            kernels.squeeze_excite(x, gate, **arguments)
    assert torch.equal(x, before)
    assert all(torch.equal(v, state[k]) for k, v in gate.state_dict().items()), "the gate has run"


def test_a_gate_that_cannot_be_called(kernels):
    for gate in (None, 0.5, "sigmoid", torch.ones(2, 3), nn.Linear(3, 3).weight):
        for op in (kernels.shrink, kernels.squeeze_excite):
            with pytest.raises(TypeError, match=f"gate must be a callable .*got {type(gate).__name__}"):
                op(features(SHAPE), gate)


BAD_GATES = {
    "(N,)": (lambda a: a[:, 0], ValueError, r"gate must return .*\(2, 3\) or \(2, 1\), got \(2,\)"),
    "(C,)": (lambda a: a[0], ValueError, r"gate must return .*got \(3,\)"),
    "(1, C)": (lambda a: a[:1], ValueError, r"gate must return .*got \(1, 3\)"),
    "(N, 2)": (lambda a: a[:, :2], ValueError, r"gate must return .*got \(2, 2\)"),
    "(N, C, 1)": (lambda a: a[..., None], ValueError, r"gate must return .*got \(2, 3, 1\)"),
    "0-dim": (lambda a: a.sum(), ValueError, r"gate must return .*got \(\)"),
    "None": (lambda a: None, TypeError, "gate must return a tensor .*got NoneType"),
    "tuple": (lambda a: (a, a), TypeError, "gate must return a tensor .*got tuple"),
    "number": (lambda a: 0.5, TypeError, "gate must return a tensor .*got float"),
    "integer": (lambda a: a.long(), TypeError, "gate must return a floating-point tensor, got torch.int64"),
    "complex": (
        lambda a: a.to(torch.complex64),
        TypeError,
        "gate must return a floating-point tensor, got torch.complex64",
    ),
    "device": (lambda a: a.to("meta"), ValueError, "gate must return a tensor on x's device {device}, got meta"),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("inplace", [False, True, None], ids=["new", "inplace", "squeeze_excite"])
@pytest.mark.parametrize("case", BAD_GATES)
def test_gate_output(kernels, case, inplace, requires_grad):
    gate, error, message = BAD_GATES[case]
    leaf = features(SHAPE).requires_grad_(requires_grad)
    x = leaf * 1
    with pytest.raises(error, match=message.format(device=x.device)):
        kernels.squeeze_excite(x, gate) if inplace is None else kernels.shrink(x, gate, inplace=inplace)
    assert torch.equal(x, leaf)


def test_the_errors_of_a_gate_pass_through(kernels):
    x = features(SHAPE)
    before = x.clone()
    with pytest.raises(ZeroDivisionError):
        kernels.shrink(x, lambda a: 1 / 0, inplace=True)
    for error in (RuntimeError("the size that I want"), ValueError("no"), torch.OutOfMemoryError("size mismatch")):

        def fails(a, error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            kernels.shrink(x, fails)
        assert raised.value is error
    assert torch.equal(x, before)


WITHIN = "gate must take averages (2, 3) of x (2, 3, 16), and return (2, 3) or (2, 1): "
FAULTS_WITHIN = {
    "another width": (lambda: nn.Linear(4, 4), "x must have 4 channels, as many as the gate takes, got shape"),
    "and behind others": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv1d(4, 4, 1))),
        "x must have 4 channels, as many as the gate takes, got shape",
    ),
    "the second layer": (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(4, 3)), WITHIN),
    "its normalisation": (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)), WITHIN),
    "of layers": (lambda: nn.LayerNorm(4), WITHIN),
    "of groups": (lambda: nn.GroupNorm(2, 4), WITHIN),
    "an image's layer": (lambda: nn.Conv2d(3, 3, 1), WITHIN),
    "an image's normalisation": (lambda: nn.BatchNorm2d(3), WITHIN),
    "an operator": (lambda: lambda a: a + torch.ones(4), WITHIN),
    "a view": (lambda: lambda a: a.view(2, 4), WITHIN),
    "a product": (lambda: lambda a: a @ torch.ones(4, 3), WITHIN),
}


def test_a_function_of_layers_of_another_dtype_is_told_what_it_gets(kernels):
    x, layer = features(SHAPE), nn.Linear(SHAPE[1], SHAPE[1]).bfloat16()
    for op in (kernels.shrink, kernels.squeeze_excite):
        with pytest.raises(ValueError, match=r"gate got averages A in torch.float32; .* on A.to\(dtype\): mat1"):
            op(x, lambda a: layer(a))
        assert op(x, layer.forward).shape == x.shape  # a module's method gets them in its dtype


@pytest.mark.parametrize("case", FAULTS_WITHIN)
def test_a_shape_that_does_not_fit_inside_the_gate(kernels, case):
    """What was given and what is accepted, before torch's own words; torch's error is the cause."""
    make, said = FAULTS_WITHIN[case]
    x, gate = features(SHAPE), make()
    before = x.clone()
    for op in (kernels.shrink, kernels.squeeze_excite, partial(kernels.shrink, average="sample", inplace=True)):
        with pytest.raises(ValueError, match=re.escape(said)) as raised:
            op(x, gate)
        assert str(raised.value).endswith(f": {str(raised.value.__cause__).partition(chr(10))[0]}")
        assert "\n" not in str(raised.value)
    assert torch.equal(x, before)


def test_inplace_on_a_leaf_that_requires_grad(kernels):
    x = features(SHAPE).requires_grad_()
    before, gate = x.detach().clone(), smooth_gate(3)
    with pytest.raises(ValueError, match="inplace=True cannot overwrite x, a leaf tensor that requires grad"):
        kernels.shrink(x, gate, inplace=True)
    assert torch.equal(x, before)
    with torch.no_grad():  # as torch allows x.relu_() there
        assert kernels.shrink(x, gate, inplace=True) is x


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_inplace_on_an_expanded_tensor(kernels, dim):
    shape = [2, 3, 16]
    shape[dim] = 1
    x = features(*shape).expand(2, 3, 16)
    before = x.clone()
    with pytest.raises(ValueError, match="inplace=True cannot overwrite x, an expanded tensor"):
        kernels.shrink(x, torch.sigmoid, inplace=True)
    assert torch.equal(x, before)


def test_inplace_residual_that_shares_memory_with_x(kernels):
    """x itself is fine. Elsewhere in x's memory: the right sum, or an error as x.add_(x.mT) gives, and x unchanged."""
    x = features(SHAPE)
    expected = kernels.shrink(x.clone(), torch.sigmoid, residual=x.clone())
    assert torch.equal(kernels.shrink(x, torch.sigmoid, residual=x, inplace=True), expected)
    square = torch.randn(1, 3, 40, 40)
    expected = kernels.shrink(square.clone(), torch.sigmoid, residual=square.mT.clone())
    x = square.clone()
    try:
        y = kernels.shrink(x, torch.sigmoid, residual=x.mT, inplace=True)
    except (ValueError, RuntimeError) as error:
        assert "residual" in str(error) and torch.equal(x, square)
    else:
        assert torch.equal(y, expected)


@pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")
def test_memory_of_another_device_is_refused_by_the_backend_itself():
    """Whoever calls it: an address of another device would be read as this process's own memory."""
    x, tau, g = torch.randn(2, 3, 40), torch.rand(2, 3), torch.randn(2, 3, 40)
    elsewhere = {t: t.to("meta") for t in (x, tau, g)}
    on, layout = BACKENDS["cpu"], layout_of(x)
    _, planes = on.map(x, layout, tau, keep=3)
    refused = pytest.raises(ValueError, match=r"the cpu kernels take CPU tensors, got one of shape \(2, 3.* on meta")
    for run in (
        lambda: on.reduce(elsewhere[x], layout, keep=True),
        lambda: on.reduce(x, layout, kind="product", times=elsewhere[g]),
        lambda: on.map(elsewhere[x], layout, tau),
        lambda: on.map(x, layout, elsewhere[tau]),
        lambda: on.map(x, layout, tau, residual=elsewhere[x]),
        lambda: on.map(x, layout, tau, kind="scale", shift=elsewhere[tau]),
        lambda: on.grad(layout, x.dtype, planes, elsewhere[g], want_dtau=True),
        lambda: on.grad(layout, x.dtype, planes, g, dA=elsewhere[tau]),
    ):
        with refused:
            run()


def test_strict_raises_instead_of_falling_back():
    x, tau = features([2] * 9), torch.ones(2, 1)
    with dk.use_backend("cpu", strict=True), pytest.raises(RuntimeError, match="strict: .*9 dimensions"):
        dk.soft_threshold(x, tau)
    with dk.use_backend("cpu", strict=True), pytest.raises(RuntimeError, match="strict: .*meta"):
        dk.abs_mean(torch.empty(SHAPE, device="meta"))
    dk.soft_threshold(x, tau)


def test_a_fall_back_is_said_once(caplog):
    from drsn_kernels import backends

    backends._said.clear()
    with dk.use_backend("cpu"):
        for _ in range(3):
            dk.abs_mean(torch.empty(SHAPE, device="meta"))
    said = [r.message for r in caplog.records if r.name == "drsn_kernels"]
    assert len(said) == 1 and "meta" in said[0]


# ---- batch_norm_relu -------------------------------------------------------------------------------------------------

BAD_NORMS = {
    "momentum": ({"momentum": None}, TypeError, "momentum must be a number, got None"),
    "eps": ({"eps": "1"}, TypeError, "eps must be a number, got '1'"),
    "eps of 0": ({"eps": 0.0}, ValueError, "eps must be a positive number in training, got 0.0"),
    "training": ({"training": None}, TypeError, "training must be True or False, got None"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be 'relu', 'leaky' or None, got 'gelu'"),
    "slope": ({"activation": "leaky", "slope": None}, TypeError, "slope must be a number, got None"),
    "weight": ({"weight": 1.0}, TypeError, r"weight must be .* \(3,\) or None, got float"),
    "integer bias": ({"bias": torch.ones(3, dtype=torch.int64)}, TypeError, "bias must .*got torch.int64"),
    "weight's shape": (
        {"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\), one number a channel of x, got \(4,\)"
    ),
    "bias's device": ({"bias": torch.ones(3, device="meta")}, ValueError, "bias must be on x's device .*, got meta"),
    "one statistic": ({"running_var": None}, ValueError, "running_mean and running_var must be given together"),
    "no statistics": (
        {"running_mean": None, "running_var": None, "training": False}, ValueError,
        "batch_norm_relu needs running_mean and running_var, or training=True; got neither",
    ),
    "statistics that require grad": (
        {"running_var": torch.ones(3, requires_grad=True)}, ValueError, "running_var must not require grad"
    ),
    "num_batches_tracked": (
        {"num_batches_tracked": 3}, TypeError, "num_batches_tracked must be a tensor or None, got int"
    ),
    "num_batches_tracked's dtype": (
        {"num_batches_tracked": torch.tensor(0.0)}, ValueError, "num_batches_tracked must be one int64 .*torch.float32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NORMS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_batch_norm_arguments_are_checked_before_anything_runs(backend, case):
    arguments, error, message = BAD_NORMS[case]
    buffers = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}
    before = copy.deepcopy(buffers)
    with dk.use_backend(backend), pytest.raises(error, match=message):
        dk.batch_norm_relu(features(SHAPE), **{"training": True, **buffers, **arguments})
    assert all(torch.equal(t, before[name]) for name, t in buffers.items())


@pytest.mark.parametrize("make, error, message", BAD_FEATURES[3:], ids=[message for _, _, message in BAD_FEATURES[3:]])
def test_batch_norm_features(make, error, message):
    with pytest.raises(error, match=message):
        dk.batch_norm_relu(make(), training=True)
