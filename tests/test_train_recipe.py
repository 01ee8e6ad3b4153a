"""The training recipe is the paper's, and an epoch follows from its generator."""

import math

import pytest
import torch
from oracle import seeded
from torch import nn

from drsn_kernels.models import parameter_groups, resnet
from drsn_kernels.train import RandomNoise, Recipe, accuracy, epoch_batches, predict, train_epoch, train_epochs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_recipe_is_the_papers():
    model = resnet(1, 2, stages=((4, 1, 2),))
    optimizer = Recipe().optimizer(model)
    schedule = Recipe().schedule(optimizer)
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    groups = parameter_groups(model, 1e-4)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]
    for ours, wanted in zip(optimizer.param_groups, groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in wanted["params"]]
    rates = []
    for _ in range(Recipe().epochs):
        rates.append(round(optimizer.param_groups[0]["lr"], 6))
        optimizer.step()
        schedule.step()
    assert rates == [0.1] * 40 + [0.01] * 40 + [0.001] * 20
    optimizer = Recipe(epochs=1).optimizer(model)
    Recipe(epochs=1).schedule(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"batch": 1}, "batch must be a whole number of at least 2, got 1"),
        ({"batch": 2.5}, "batch must be a whole number of at least 2, got 2.5"),
        ({"lr": -1}, "lr must be a number of at least 0, got -1"),
        ({"lr": math.nan}, "lr must be a number of at least 0, got nan"),
        ({"momentum": "much"}, "momentum must be a number of at least 0, got 'much'"),
    ],
)
def test_recipe_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_noise_has_an_snr_of_its_own_for_every_sample():
    x = torch.randn(500, 1, 64, generator=seeded())
    noise = RandomNoise("laplace", (-5.0, 5.0))(x, seeded(1)) - x
    snr = 10 * torch.log10(x.square().mean((1, 2)) / noise.square().mean((1, 2)))
    assert snr.min() >= -5.001 and snr.max() <= 5.001 and abs(snr.mean()) < 0.5 and abs(snr.std() - 10 / 12**0.5) < 0.3
    fixed = RandomNoise("pink", (3.0, 3.0))(x, seeded(1)) - x
    torch.testing.assert_close(10 * torch.log10(x.square().mean((1, 2)) / fixed.square().mean((1, 2))),
                               torch.full((500,), 3.0), atol=1e-3, rtol=0)  # fmt: skip
    for arguments, message in (
        (("brown",), "kind must be one of .*, got 'brown'"),
        ((["pink"],), "kind must be one of "),
        *((("pink", snr), "snr_db must be") for snr in ((1, 0), 3, (0, 1, 2), ("a", "b"), None)),
    ):
        with pytest.raises(ValueError, match=message):
            RandomNoise(*arguments)


def test_an_epoch_holds_every_sample_once_and_follows_from_its_generator():
    x, y = torch.arange(300.0).reshape(300, 1), torch.arange(300)
    generator = seeded()
    noise = lambda x, generator: x + 1000 * torch.rand(len(x), 1, generator=generator)  # noqa: E731
    first = epoch_batches(x, y, 100, generator=generator, noise=noise)
    second = epoch_batches(x, y, 100, generator=generator, noise=noise)
    for batches in (first, second):
        assert torch.equal(torch.cat([y for _, y in batches]).sort().values, y)
        assert all(((inputs[:, 0] - targets) >= 0).all() for inputs, targets in batches)
    assert not torch.equal(first[0][1], second[0][1])
    again = epoch_batches(x, y, 100, generator=seeded(), noise=noise)
    assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
    sizes = lambda n, batch: [len(y) for _, y in epoch_batches(x[:n], y[:n], batch, generator=generator)]  # noqa: E731
    assert sizes(11, 2) == [2] * 5 and sizes(10, 3) == [3] * 3 and sizes(11, 3) == [3, 3, 3, 2]
    assert sizes(12, 5) == [5, 5] and sizes(13, 5) == [5, 5, 3] and sizes(1, 5) == [1]
    assert sizes(249, 100) == [100, 100] and sizes(250, 100) == [100, 100, 50] and sizes(30, 100) == [30]


def test_train_epoch_is_sgd_on_the_mean_loss():
    x, y = torch.randn(10, 3, generator=seeded()), torch.arange(10) % 2
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    recipe = Recipe(batch=4)
    mean = train_epoch(model, recipe.optimizer(model), x, y, 4, generator=seeded())
    optimizer = torch.optim.SGD(parameter_groups(other), lr=0.1, momentum=0.9)
    losses = []
    for inputs, targets in epoch_batches(x, y, 4, generator=seeded()):
        losses.append(nn.functional.cross_entropy(other(inputs), targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert len(losses) == 3 and mean == pytest.approx(sum(float(loss.detach()) for loss in losses) / 3)
    assert torch.equal(model.weight, other.weight)
    with torch.no_grad():
        wanted = model(x).argmax(1)
    assert torch.equal(predict(model, x, batch=3), wanted) and accuracy(model, x, wanted) == 1.0


def test_train_epochs_is_the_recipe():
    x, y = torch.randn(10, 3, generator=seeded()), torch.arange(10) % 2
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    recipe, generator = Recipe(epochs=5, batch=4), seeded()
    noise = RandomNoise("gaussian", (0.0, 5.0))
    losses = list(train_epochs(recipe, model, x, y, generator=seeded(), noise=noise))
    optimizer = recipe.optimizer(other)
    schedule = recipe.schedule(optimizer)
    wanted = []
    for _ in range(5):
        wanted.append(train_epoch(other, optimizer, x, y, 4, generator=generator, noise=noise))
        schedule.step()
    assert losses == wanted and torch.equal(model.weight, other.weight)


# ---- arrays of NumPy, and what does not belong together --------------------------------------------------------------


def windows(count=24):
    """Two tones as NumPy has them, and their labels."""
    np = pytest.importorskip("numpy")
    y = np.arange(count) % 2
    phase = np.random.default_rng(0).uniform(0, 6, (count, 1))
    return np.sin(np.where(y == 0, 0.3, 1.5)[:, None] * np.arange(32) + phase)[:, None], y


def tiny():
    torch.manual_seed(0)
    return resnet(1, 2, stages=((4, 1, 2),))


@pytest.mark.parametrize(
    "kind", ["float64", "float16", "longdouble", "int32", "uint8", "Fortran", "reversed", "read-only", "big-endian"]
)
def test_arrays_train_as_the_tensors_of_their_values(kind):
    x, y = windows()
    kinds = {"Fortran": x.copy("F"), "reversed": x[::-1], "big-endian": x.astype(">f8"), "read-only": x.copy()}
    kinds["read-only"].flags.writeable = False
    x = kinds[kind] if kind in kinds else (100 * x + 100).astype(kind)
    y = {"int32": y.astype("int32"), "uint8": y.astype(bool), "float64": y.astype("float64")}.get(kind, y)
    exact = torch.tensor(x.astype("float64").tolist()).float(), torch.tensor(y.tolist()).long()
    results = []
    for inputs, targets in ((x, y), exact):
        model = tiny()
        losses = list(train_epochs(Recipe(2, 8), model, inputs, targets, generator=seeded()))
        results.append((losses, predict(model, inputs).tolist(), accuracy(model, inputs, targets)))
    assert results[0] == results[1]


def test_a_model_in_float64_computes_in_float64():
    x, y = windows()
    model = tiny().double()
    list(train_epochs(Recipe(1, 8), model, x.astype("float32"), y, generator=seeded()))
    assert predict(model, x).dtype == torch.int64 and model.fc.weight.dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_in_which_it_was(training):
    x, y = windows()
    model = tiny().train(training)
    model.stages.train(not training)  # a part in the other mode
    before = [module.training for module in model.modules()]
    epochs = train_epochs(Recipe(2, 8), model, x, y)
    next(epochs)
    for call in (lambda: predict(model, x), lambda: accuracy(model, x, y), lambda: list(epochs)):
        assert [module.training for module in model.modules()] == before
        call()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="x must have shape"):
        predict(model, x[:, 0])
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, y: (x, y[:-1]), ValueError, "x and y must hold as many samples, got 24 in x and 23 labels in y"),
        (lambda x, y: (x[:-1], y), ValueError, "x and y must hold as many samples, got 23 in x and 24 labels in y"),
        (lambda x, y: (x, y[:, None]), ValueError, r"y must hold the index .* of shape \(N,\), got \(24, 1\)"),
        (lambda x, y: (x, y / 2), ValueError, "y must hold whole numbers, the indices of classes, got 0.5"),
        (lambda x, y: (x, y - 1), ValueError, "y must hold indices of classes from 0, got -1"),
        (lambda x, y: (x, y + 1), ValueError, "y must hold indices of classes below 2, the model's outputs, got 2"),
        (lambda x, y: (x, y.astype(str)), TypeError, r"y must hold real numbers, got an array of <U21: number"),
        (lambda x, y: (x, y.tolist()), TypeError, "y must be a tensor or a NumPy array, got list"),
        (lambda x, y: (x.tolist(), y), TypeError, "x must be a tensor or a NumPy array, got list"),
        (lambda x, y: (x.astype(object), y), TypeError, "x must hold real numbers, got an array of object"),
        (lambda x, y: (x + 1j, y), TypeError, "x must hold real numbers, got an array of complex128"),
        (lambda x, y: (torch.tensor(x) + 1j, y), TypeError, "x must hold real numbers, got torch.complex128"),
        (lambda x, y: (x[:, 0, 0], y), ValueError, r"x must hold samples \(N, \*shape\), got shape \(24,\)"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "x must hold samples to train on, got none"),
        (lambda x, y: (x[:, 0], y), ValueError, r"x must have shape \(N, 1, length\), got"),
    ],
)
def test_what_does_not_belong_together_is_said_at_the_call(change, error, message):
    x, y = change(*windows())
    model = tiny()
    with pytest.raises(error, match=message) as raised:
        train_epochs(Recipe(1, 8), model, x, y)
    assert "\n" not in str(raised.value)
    if "outputs" not in message and "none" not in message:
        with pytest.raises(error, match=message):
            accuracy(model, x, y)


def test_nothing_to_train_on_and_noise_of_another_sort():
    model, (x, y) = tiny(), windows()
    optimizer = Recipe(1, 8).optimizer(model)
    with pytest.raises(ValueError, match="x must hold samples to train on, got none"):
        train_epoch(model, optimizer, x[:0], y[:0], 8)
    with pytest.raises(TypeError, match="noise must be a function of x and a generator, .* got 'pink'"):
        train_epochs(Recipe(1, 8), model, x, y, noise="pink")


def test_a_model_without_parameters_is_on_the_cpu():
    x, model = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), nn.Flatten()
    assert predict(model, x).tolist() == [1, 0] and accuracy(model, x, torch.tensor([1, 1])) == 0.5


def test_a_sample_that_is_not_finite_is_named():
    x, y = windows()
    x[5, 0, 3] = math.nan
    with pytest.raises(ValueError, match="x must hold finite numbers, but sample 5 holds NaN or Inf"):
        train_epochs(Recipe(1, 8), tiny(), x, y)


def test_prediction_refuses_what_training_refuses():
    model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3)), torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="below 3, the model's outputs, got 3"):
        accuracy(model, x, torch.arange(4))
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(model, x[:0], torch.arange(0))
    with pytest.raises(ValueError, match="batch must be a whole number"):
        predict(model, x, batch=0)
    with pytest.raises(ValueError, match="sample 2 holds NaN or Inf"):
        predict(model, x.index_fill(0, torch.tensor([2]), torch.inf))
