"""`python -m drsn_kernels export`: the model of a run as an ONNX file."""

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from .._extras import require
from . import files
from .saved import RunInfo, load

TOLERANCE = 1e-3  # of the logits, in units of their largest


def to_onnx(model: nn.Module, info: RunInfo, path: Path) -> Path:
    """Write the model, which :func:`.saved.load` returned, as an ONNX file for any number of windows; returns the path.

    Its input ``x`` is float32 (batch, channels, length), windows as they are in the recordings, or images in [0, 1],
    its output ``logits`` (batch, classes). Class names and sampling rate stand in the file's metadata. Before it is put
    in place, onnxruntime runs it and has to give the model's numbers.

    Raises:
        ImportError: a package of the extra "export" is missing.
        RuntimeError: the export fails, or onnxruntime computes something else.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "export")
    onnxruntime = require("onnxruntime", "export")
    x = torch.rand(2, *info.shape, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporter about itself
            program = torch.onnx.export(
                model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
                input_names=["x"], output_names=["logits"],
            )  # fmt: skip
        content = program.model_proto
        for name, value in {"class_names": info.class_names, "sampling_rate": info.sampling_rate}.items():
            content.metadata_props.add(key=name, value=json.dumps(value))
        data = content.SerializeToString()
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        batches = [x[:1], torch.cat([x, 3 * x + 1, x[:1]])]
        found = [torch.from_numpy(session.run(None, {"x": batch.numpy()})[0]) for batch in batches]
    except Exception as error:  # of torch's exporter, of onnx, of onnxruntime: each has its own
        reason = str(error).split("\n")[0]
        raise RuntimeError(f"{info.model} was not exported: {type(error).__name__}: {reason}") from error
    with torch.no_grad():
        wanted = torch.cat([model(batch) for batch in batches])
    error = float((torch.cat(found) - wanted).abs().max() / wanted.abs().max().clamp_min(1))
    if not error < TOLERANCE:
        raise RuntimeError(f"onnxruntime computes something else than the model: logits differ by {error:.1e}")
    return files.replace(path, lambda file: file.write(data))


def command(options: argparse.Namespace) -> int:
    """Run the options of `export`; the exit status."""
    files.check_writable("--onnx", options.onnx)
    model, info = load(options.run)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of every package that it does not find
    to_onnx(model, info, options.onnx)
    sizes = ", ".join(map(str, info.shape))
    print(
        f"{info.model} as {options.onnx}: x (batch, {sizes}) -> logits (batch, {len(info.class_names)}) of "
        f"{', '.join(info.class_names)}; checked with onnxruntime"
    )
    return 0
