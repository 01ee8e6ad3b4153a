"""A trained network from its checkpoint alone: what the checkpoint says of itself, and how it becomes a model again."""

from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..data import Dataset, LogMel, Windows
from ..models import network
from . import files
from .run import CHECKPOINT


class RunInfo(NamedTuple):
    """What a run knows of its network and its data.

    Attributes:
        task: "vibration", "own", "speech" or "image".
        model: the network's name, such as "drsn-cw".
        options: dims, in_channels and classes: ``drsn_kernels.models.network(model, **options)`` is the bare network.
        class_names: one for each output of the model.
        shape: of one input of the model: (channels, length), of images (channels, height, width).
        sampling_rate: Hz, of the windows; None where the data have none.
        windows: how a recording becomes windows: length, stride, channels and normalisation
            (:class:`drsn_kernels.data.Windows`); None for images.
        epochs: how many the run is to have.
        trained: how many it had at this checkpoint.
    """

    task: str
    model: str
    options: dict
    class_names: tuple[str, ...]
    shape: tuple[int, ...]
    sampling_rate: float | None
    windows: Windows | None
    epochs: int
    trained: int


class Normalise(nn.Module):
    """Windows (N, C, length) as they were in training.

    Args:
        mean, std: of each channel; or None for zero mean and unit variance of every channel of every window, where a
            constant one becomes zeros.
    """

    def __init__(self, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if values is None else torch.tensor(values).unsqueeze(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mean is not None:
            return (x - self.mean) / self.std
        # In operations that ONNX has too, frexp is none of them.
        tiny = torch.finfo(x.dtype).tiny
        constant = (x == x[..., :1]).all(-1, keepdim=True)  # its mean may round
        x = (x - x.mean(-1, keepdim=True)).masked_fill(constant, 0)
        x = x / x.abs().amax(-1, keepdim=True).clamp_min(tiny)
        return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(tiny)


def describe(task: str, model: str, options: dict, data: Dataset, epochs: int) -> dict:
    """What a checkpoint says of its run, in plain values; :func:`load` builds the model from it."""
    transform = {"hop": data.transform.hop, "mels": data.transform.mels} if isinstance(data.transform, LogMel) else None
    return {
        "task": task,
        "model": model,
        "options": options,
        "class_names": list(data.class_names),
        "shape": list(data.train_x.shape[1:]),
        "sampling_rate": data.sampling_rate,
        "windows": None if data.windows is None else asdict(data.windows),
        "transform": transform,
        "epochs": epochs,
    }


def checkpoint_of(run: str | Path) -> Path:
    """The checkpoint of a run's folder, or the file itself."""
    path = Path(run)
    if path.is_dir():
        path = path / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"run must be a folder with {CHECKPOINT}, or such a file, got {run}")
    return path


def load(run: str | Path) -> tuple[nn.Module, RunInfo]:
    """The model of a training run, ready to predict, and what the run knows of it.

    Args:
        run: the folder that `python -m drsn_kernels train` left, or its checkpoint.pt, wherever that lies and
            whatever it is called now.

    Returns:
        model: in eval mode, on the CPU. It takes windows as they are in the files, (N, channels, length) at
        ``info.sampling_rate``, and returns logits (N, classes): it normalises them itself, and for speech makes the
        spectrogram. ``model.network`` is the network alone. A model of images takes (N, channels, height, width) in
        [0, 1].

        info: a :class:`RunInfo`.

    Raises:
        FileNotFoundError: no such run.
        ValueError: no checkpoint, a damaged one, or one of a version that did not write what its network is.

    Example::

        model, info = load("run")
        classes = [info.class_names[i] for i in predict(model, windows)]  # windows: (N, channels, length)
    """
    path = checkpoint_of(run)
    state = files.read_checkpoint(path)
    if not isinstance(state, dict) or "network" not in state:
        raise ValueError(f"{path} is no checkpoint of python -m drsn_kernels train")
    about = state.get("about")
    if about is None:
        raise ValueError(
            f"{path} is of a version that did not write into it what its network is: train it again, or build the "
            "network with drsn_kernels.models.network and load torch.load(PATH)['network'] into it"
        )
    try:
        windows = None if about["windows"] is None else Windows(**about["windows"])
        transform: nn.Module = nn.Identity()
        if about["transform"] is not None:
            transform = LogMel(about["sampling_rate"], **about["transform"])
        transform.load_state_dict(state["transform"])
        net = network(about["model"], **about["options"])
        net.load_state_dict(state["network"])
        names = ("task", "model", "options", "sampling_rate", "epochs")
        info = RunInfo(
            class_names=tuple(about["class_names"]), shape=tuple(about["shape"]), windows=windows,
            trained=state["epoch"], **{name: about[name] for name in names},
        )  # fmt: skip
    except Exception as error:  # of another version: what is missing fails in as many ways as there are parts
        reason = str(error).split("\n")[0].rstrip(":")
        raise ValueError(
            f"{path} does not hold what a run of this version writes: {type(error).__name__}: {reason}"
        ) from error
    normalise = nn.Identity() if windows is None else Normalise(windows.mean, windows.std)
    parts = OrderedDict(normalise=normalise, transform=transform, network=net)
    return nn.Sequential(parts).eval(), info
