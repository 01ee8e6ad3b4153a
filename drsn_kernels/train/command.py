"""`python -m drsn_kernels train`: a task's data, a network, the paper's recipe, and a folder of results."""

import argparse
import contextlib
import json
import logging
import math
import shlex
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from .. import info
from .._extras import program, require, sentence
from ..data import Dataset, load_cwru, load_digits, load_idx, load_own, load_speech, simulate_bearing
from ..models import network
from . import files
from .arguments import DEFAULTS, OWN
from .ranks import Ranks, join, leave
from .recipe import RandomNoise, Recipe, least_batch, predict
from .run import CHECKPOINT, Run, Stopped
from .saved import describe

CONFIG, RESULTS = "config.json", "results.json"
_log = logging.getLogger("drsn_kernels")
FEW_STEPS = 100
DIMS = {"vibration": 1, "own": 1, "speech": 2, "image": 2}  # of what the network sees


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _resume(out: Path) -> str:
    return f"{program()} train --resume --out {shlex.quote(str(out))}"


def _settings(options: argparse.Namespace) -> tuple[dict, dict | None]:
    """What the run is, as JSON holds it; and the config.json of the run that is continued."""
    given = {name: getattr(options, name) for name in DEFAULTS if hasattr(options, name)}
    if given.get("data") is not None:
        given["data"] = str(given["data"].resolve())
    given = json.loads(json.dumps(given))
    path = options.out / CONFIG
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {options.out}")
    if not options.resume:
        if path.exists():
            raise ValueError(
                f"--out {options.out} already holds a run: continue it with --resume, or name another folder"
            )
        if (options.out / CHECKPOINT).exists():
            raise ValueError(
                f"--out {options.out} already holds a {CHECKPOINT} without its {CONFIG}: name another folder"
            )
        defaults = json.loads(json.dumps(DEFAULTS))
        if given.get("task") == "own" and "snr" not in given:  # signals as they are, unless noise is asked for
            defaults["noise"] = "none"
        return defaults | given, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # older runs have none of these
        stored = OWN | {"noise_protocol": DEFAULTS["noise_protocol"]} | config["settings"]
        settings = {name: stored[name] for name in DEFAULTS}
        config["data"]["crc32"]
    except FileNotFoundError:
        raise ValueError(f"--resume needs a run in --out, but {options.out} has no {CONFIG}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    for name, value in given.items():
        if name != "data" and value != settings[name]:  # the folder may have moved; its contents are compared
            raise ValueError(
                f"--resume continues a run with {_flag(name)} {settings[name]}, got {value}: leave the option out, "
                "or start another run"
            )
    return settings | given, config


def _check(settings: dict, options: argparse.Namespace) -> None:
    """Options that do not go together; before any data are read."""
    task, folder = settings["task"], settings["data"]
    if settings["noise"] == "none" and hasattr(options, "snr"):
        raise ValueError("--snr is the level of --noise, got --noise none: leave one of the two out")
    if settings["noise"] == "none" and settings["noise_protocol"] != DEFAULTS["noise_protocol"]:
        raise ValueError(f"--noise-protocol {settings['noise_protocol']} needs noise, got --noise none")
    if settings["without_normal"] and task == "vibration" and folder is None:
        raise ValueError("--without-normal leaves out Normal_*.mat of --data FOLDER, got no --data")
    if task == "speech" and folder is None:
        raise ValueError("--task speech needs --data FOLDER with recordings named LABEL_SPEAKER_TAKE.wav")
    if task == "own" and folder is None:
        raise ValueError("--task own needs --data, a folder with a subfolder for each class, or a table .npz or .csv")
    tasks = {"test_speakers": "speech", "without_normal": "vibration", **dict.fromkeys(OWN, "own")}
    cwru = ("length", "stride") if task == "vibration" and folder is not None else ()
    for name, belongs in tasks.items():
        if settings[name] not in (DEFAULTS[name], []) and task != belongs and name not in cwru:
            also = " or, with --data, --task vibration" if name in ("length", "stride") else ""
            found = f"--task {task}" + (" without --data" if also and task == "vibration" else "")
            raise ValueError(f"{_flag(name)} belongs to --task {belongs}{also}, got {found}")
    if not 0 <= settings["seed"] < 2**63:
        raise ValueError(f"--seed must be a whole number from 0 to 2^63 - 1, got {settings['seed']}")
    for module in ("numpy", "matplotlib"):
        require(module, "train")


def _graph(asked: bool | None, ranks: Ranks) -> bool:
    """Whether steps are replayed as a CUDA graph: where they can be, unless --graph or --no-graph says."""
    cuda = ranks.device.type == "cuda"
    if asked and not cuda:
        raise ValueError(f"--graph needs a CUDA device, got --device {ranks.device}")
    if asked and ranks.world > 1:
        raise ValueError(f"--graph takes one process, got {ranks.world}: leave it out under torchrun")
    return cuda and ranks.world == 1 if asked is None else asked


def _load(settings: dict) -> Dataset:
    task, folder = settings["task"], settings["data"]
    if task == "speech":
        return load_speech(folder, test_speakers=settings["test_speakers"])
    if task == "own":
        return load_own(folder, **{name: settings[name] for name in OWN})
    if task == "image":
        return load_digits() if folder is None else load_idx(folder)
    if folder is None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the last bits of a product of spectra, and so the checksum, depend on their number
        try:
            return simulate_bearing(generator=torch.Generator().manual_seed(settings["seed"]))
        finally:
            torch.set_num_threads(threads)
    windows = {name: settings[name] for name in ("length", "stride") if settings[name] is not None}
    return load_cwru(folder, normal=not settings["without_normal"], **windows)


def _checksum(data: Dataset) -> int:
    """Of every value: what a folder held when the run began."""
    checksum = 0
    for tensor in (data.train_x, data.train_y, data.test_x, data.test_y):
        checksum = zlib.crc32(tensor.contiguous().numpy(), checksum)
    return checksum


def _check_silence(data: Dataset, settings: dict) -> None:
    """No sample may be zero throughout where noise has an SNR."""
    for part, x in (("training", data.train_x), ("test", data.test_x)):
        silent = ~x.flatten(1).any(1)
        if silent.any():
            source = "" if settings["data"] is None else f" of --data {settings['data']}"
            raise ValueError(
                f"--noise {settings['noise']} needs samples that are not zero throughout, but {part} sample "
                f"{int(silent.nonzero()[0])}{source} is: leave it out, or train with --noise none"
            )


def _describe(data: Dataset) -> dict:
    return {
        "description": data.description,
        "notes": list(data.notes),
        "classes": list(data.class_names),
        "train_samples": len(data.train_x),
        "test_samples": len(data.test_x),
        "crc32": _checksum(data),
    }


def _begin(out: Path, config: dict | None, ranks: Ranks) -> None:
    """Make the folder, by the first process, and write the config.json of a new run; all end where that fails."""
    reason = None
    if ranks.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()  # a run that is continued would find out after an epoch
            if config is not None:
                files.write_json(out / CONFIG, config)
        except OSError as error:
            reason = f"--out {out} cannot be written: {error.strerror}" if error.strerror else str(error)
    if ranks.highest([int(reason is not None)])[0]:
        raise OSError(reason or f"--out {out} cannot be written by the first process")


def _results(run: Run, settings: dict, parameters: int) -> dict:
    """What results.json holds."""
    data, classes = run.data, len(run.data.class_names)
    predicted = predict(run.model, run.test_x)
    confusion = torch.bincount(data.test_y * classes + predicted, minlength=classes**2).reshape(classes, classes)
    counts = confusion.sum(1).tolist()
    return {
        "settings": settings,
        "parameters": parameters,
        "processes": run.ranks.world,
        "epochs": len(run.history),
        "train_loss": run.history[-1]["train_loss"],
        "train_accuracy": run.history[-1]["train_acc"],
        "test_accuracy": int(confusion.trace()) / len(data.test_y),
        "recall": {
            name: right / count if count else None
            for name, right, count in zip(data.class_names, confusion.diagonal().tolist(), counts, strict=True)
        },
        "confusion": confusion.tolist(),  # a row for each true class, a column for each predicted one
        "seconds": sum(row["seconds"] for row in run.history),
        "samples_per_s": sum(row["samples_per_s"] for row in run.history) / len(run.history),
    }


def _draw(out: Path, history: list[dict], confusion: list[list[int]], class_names: tuple[str, ...]) -> list[str]:
    """The names of the pictures that were drawn. One that fails is a warning: the results are on the disk."""
    pictures = {
        "curves.png": lambda path: files.draw_curves(path, history),
        "confusion.png": lambda path: files.draw_confusion(path, torch.tensor(confusion), class_names),
    }
    drawn = []
    for name, draw in pictures.items():
        try:
            drawn.append(draw(out / name).name)
        except Exception as error:  # of matplotlib, of fonts, of the disk
            _log.warning("%s could not be drawn: %s: %s", out / name, type(error).__name__, error)
    return drawn


def _few_steps(samples: int, recipe: Recipe) -> str:
    """What to do where a run has too few steps to get anywhere; else empty."""
    steps = recipe.epochs * max(samples // recipe.batch, 1)
    if steps >= FEW_STEPS:
        return ""
    smaller = max(8, 2 ** int(math.log2(max(samples / 8, 1))))  # of eight steps an epoch
    batch = f" or --batch {smaller}" if smaller < recipe.batch else ""
    return f"Only {steps} {'step' if steps == 1 else 'steps'} in all: more --epochs{batch} would learn more"


def _train(options: argparse.Namespace, ranks: Ranks) -> None:
    settings, config = _settings(options)
    _check(settings, options)
    graph = _graph(options.graph, ranks)
    recipe = Recipe(settings["epochs"], settings["batch"], settings["lr"])
    noise = None if settings["noise"] == "none" else RandomNoise(settings["noise"], tuple(settings["snr"]))
    if not options.save_minutes >= 0:
        raise ValueError(f"--save-minutes must be at least 0, got {options.save_minutes}")
    data = _load(settings)
    smallest = min(least_batch(recipe.batch), len(data.train_x), len(data.test_x))
    if smallest < ranks.world:
        raise ValueError(
            f"every process needs a sample of each batch: {ranks.world} are too many for {smallest} samples"
        )
    found = _describe(data)
    if config is not None and found["crc32"] != config["data"]["crc32"]:
        source = f"--task {settings['task']}" if settings["data"] is None else f"--data {settings['data']}"
        raise ValueError(f"{source} does not give the data that the run in {options.out} was started with")
    if noise is not None:
        _check_silence(data, settings)

    torch.manual_seed(settings["seed"])
    dims, channels, classes = DIMS[settings["task"]], data.train_x.shape[1], len(data.class_names)
    shape = {"dims": dims, "in_channels": channels, "classes": classes}
    net = network(settings["model"], **shape).to(ranks.device)
    parameters = sum(p.numel() for p in net.parameters())
    test_x = data.test_x
    if noise is not None:  # the same at every epoch, and for every model
        test_x = noise(test_x, torch.Generator().manual_seed(settings["seed"] + 1))
    if settings["noise_protocol"] == "fixed":  # a run that is continued draws the same
        generator = torch.Generator().manual_seed(settings["seed"] + 2)
        data, noise = replace(data, train_x=noise(data.train_x, generator)), None
    # Last, so that what is wrong with the options leaves no folder behind.
    ranks.wait()  # all have looked whether there is a run
    new = config is None
    if new:
        config = {"settings": settings, "data": found, "processes": ranks.world, "environment": info.collect()}
    _begin(options.out, config if new else None, ranks)
    run = Run(
        net, data, recipe, noise=noise, test_x=test_x, seed=settings["seed"], out=options.out, ranks=ranks,
        save_seconds=60 * options.save_minutes, graph=graph,
        about=describe(settings["task"], settings["model"], shape, data, recipe.epochs),
    )  # fmt: skip
    if ranks.first:
        low, high = settings["snr"]
        snr = "" if settings["noise"] == "none" else f" at {low:g} dB" if low == high else f" at {low:g} to {high:g} dB"
        once = ", the same in every epoch" if settings["noise_protocol"] == "fixed" else ""
        processes = "" if ranks.world == 1 else f", {ranks.world} processes"
        replayed = ", its steps as a CUDA graph" if graph else ""
        print(
            "\n".join([data.description, *filter(None, [data.preview]), ""])
            + f"{settings['model']} with {parameters:,} parameters on {ranks.device}"
            f"{processes}{replayed}; noise: {settings['noise']}{snr}{once}",
            flush=True,
        )
        if (advice := _few_steps(len(data.train_x), recipe)) and new:
            print(advice, flush=True)
        if not new and len(run.history) < recipe.epochs:
            print(f"continuing in epoch {len(run.history) + 1} after {run.step} steps", flush=True)
    try:
        run.train()
        if ranks.first:
            results = _results(run, settings, parameters)
            files.write_json(options.out / RESULTS, results)  # before the pictures, whatever comes of them
    except OSError as error:  # of the disk
        raise OSError(f"{sentence(error)}; mend that, then continue with: {_resume(options.out)}") from error
    if ranks.first:
        pictures = _draw(options.out, run.history, results["confusion"], data.class_names)
        print(
            f"Test accuracy {100 * results['test_accuracy']:.2f} % after {results['epochs']} epochs and "
            f"{results['seconds']:.0f} s. Written to {options.out}: "
            f"{', '.join([CONFIG, 'log.csv', RESULTS, *pictures, CHECKPOINT])}"
        )


def command(options: argparse.Namespace) -> int:
    """Run the options of arguments.py; the exit status: 0, or 128 and the signal's number if one ended the run.

    Raises:
        ImportError, OSError, ValueError: an option, a file or a package, said in one sentence, before any training.
    """
    ranks = join(options.device)
    if not ranks.first:  # what is left out of the data is said once
        _log.setLevel(logging.ERROR)
    # The sentence once: the other processes come to the same end.
    alike = contextlib.nullcontext() if ranks.first else contextlib.suppress(ImportError, OSError, ValueError)
    try:
        with alike:
            _train(options, ranks)
            return 0
        return 1
    except Stopped as stopped:
        if ranks.first:
            print(f"\nstopped by {stopped}; to continue exactly from here: {_resume(options.out)}", flush=True)
        return 128 + stopped.number
    finally:
        leave()
