"""Files as drsn_kernels.data reads them."""

import struct
import wave
from collections.abc import Sequence
from pathlib import Path

import torch

RATE = 8000


def write_wav(path: Path, signal: Sequence[int], rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    """signal: whole numbers in the range of the width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {1: "B", 2: "h", 4: "i"}[width]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(struct.pack(f"<{len(signal)}{kind}", *signal))
    return path


PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # codes of formats


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def wav(
    content: bytes, bits: int, *, code: int = PCM, channels: int = 1, extensible: bool = False, before: bytes = b""
) -> bytes:
    """A .wav file of these samples, with either header; `before`: chunks between the header and the samples."""
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", EXTENSIBLE if extensible else code, channels, RATE, RATE * block, block, bits)
    if extensible:
        guid = struct.pack("<I", code) + bytes.fromhex("00001000800000aa00389b71")
        head += struct.pack("<HHI", 22, bits, 4) + guid
    body = b"WAVE" + chunk(b"fmt ", head) + before + chunk(b"data", content)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def sound(hertz: float, samples: int = 400) -> list[int]:
    return (20_000 * torch.sin(2 * torch.pi * hertz / RATE * torch.arange(samples))).round().int().tolist()


def idx(tensor: torch.Tensor) -> bytes:
    """A file of MNIST's format with these bytes."""
    shape = struct.pack(f">{tensor.dim()}I", *tensor.shape)
    return bytes((0, 0, 8, tensor.dim())) + shape + bytes(tensor.flatten().tolist())
