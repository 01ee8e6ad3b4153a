"""Write api.md from the docstrings: python docs/api.py, with the package installed. tests/test_docs.py compares."""

import inspect
import re
import textwrap
from pathlib import Path

import drsn_kernels as dk

HEAD = """# API reference

Written from the docstrings by `docs/api.py`. x is (N, C, *spatial): one spatial dimension for signals, two for images,
and any other number; strides and memory format are free.

| x | y, dx | sums, averages A, tau | the gate receives A in |
|---|---|---|---|
| float32 | float32 | float32 | the dtype of its first floating-point parameter; without one, float32 |
| bfloat16, float16 | x's dtype | float32 | the same |
| float64 | float64 | float64 | the same; without one, float64 |

Under autocast the gate receives float32. Errors come before anything runs or is changed, in one sentence with the
argument, what was given and what is accepted. [What is supported](support.md) where, with its test;
[which way a call goes](use.md#which-way-a-call-goes); [when not to use it](use.md#when-not-to-use-it).
"""
SECTIONS = {
    "Operators": ["soft_threshold", "abs_mean", "shrink", "squeeze_excite", "batch_norm_relu"],
    "Modules": ["Shrinkage", "SoftThreshold", "SqueezeExcite", "BatchNormReLU", "FusedSequential", "record_tau"],
    "Models that exist": ["convert", "revert"],
    "Looking and choosing": ["explain", "use_backend"],
    "Networks": [
        "models.ResidualShrinkageUnit",
        "models.DRSN",
        "models.network",
        "models.paper_network",
        "models.cifar_network",
        "models.network18",
        "models.resnet",
        "models.senet",
        "models.convnet",
        "models.parameter_groups",
    ],
    "Noise and data": [
        "noise.add_noise",
        "data.Dataset",
        "data.Windows",
        "data.load_own",
        "data.simulate_bearing",
        "data.load_cwru",
        "data.load_speech",
        "data.LogMel",
        "data.load_idx",
        "data.load_digits",
    ],
    "Training": [
        "graphed",
        "train.Recipe",
        "train.RandomNoise",
        "train.train_epoch",
        "train.train_epochs",
        "train.epoch_batches",
        "train.train_step",
        "train.predict",
        "train.accuracy",
        "train.load",
        "train.RunInfo",
    ],
}
TAIL = """## Environment

| variable | takes | does |
|---|---|---|
| `DRSN_BACKEND` | `auto`, `cpu`, `triton`, `torch` | what `use_backend` would choose, from the start |
| `DRSN_CACHE_MIB` | a whole number | freed memory of large CPU outputs that is kept for the next ones; 0: none |
| `DRSN_LAUNCHER` | `1`, `0` | 0: Triton launches on the GPU, not csrc/launch ([launching](inside/gpu.md#launching)) |
| `DRSN_NATIVE` | `auto`, `1`, `0` | while installing: compile the C++ kernels if possible, or fail, or leave them out |

Without `DRSN_CACHE_MIB`, 512 MiB are kept, or a sixteenth of the memory if that is less. A value that is none of these
is an error at import, or at installation where it is read then, in one sentence.
"""


def signature(name: str, thing) -> str:
    text = str(inspect.signature(thing))
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"\b(?:torch|collections|drsn_kernels)\.(?:\w+\.)*(?=[A-Z])", "", text)
    text = text.removesuffix(" -> None") if inspect.isclass(thing) else text
    if len(text) + len(name) < 100:
        return f"dk.{name}{text}"
    arguments, _, result = text[1:].rpartition(")")
    parts = re.split(r", (?=\*|\w+:)", arguments)
    return f"dk.{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def markdown(doc: str) -> str:
    """Sections ("Args:") and literal blocks ("Equivalent to::") of a docstring as Markdown."""
    doc = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", doc).replace("``", "`")
    out: list[str] = []
    for block in re.split(r"\n\n", doc):
        lines = block.split("\n")
        if lines[0].startswith("    ") and out and out[-1].endswith("::"):
            out[-1] = out[-1][:-1] + "\n\n```python\n" + textwrap.dedent(block) + "\n```"
        elif lines[0].startswith("    ") and out and out[-1].endswith("\n```"):  # an empty line within the block
            out[-1] = out[-1].removesuffix("```") + "\n" + textwrap.dedent(block) + "\n```"
        elif re.fullmatch(r"\w[\w, ]*:", lines[0]):
            out.append(f"**{lines[0][:-1]}**\n\n" + items(lines[1:]))
        else:
            out.append("\n".join(line.strip() for line in lines))
    return "\n\n".join(out)


def items(lines: list[str]) -> str:
    """A list item for each "name: text" and what continues it; other text as it is."""
    text = re.sub(r"\. (?=\w+Error: )", ".\n    ", "\n".join(lines))  # one line with two exceptions
    found = [re.match(r"    ([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.*)", line) for line in text.split("\n")]
    margin = "  " if any(found) else ""
    return "\n".join(
        f"- `{item[1]}`: {item[2]}" if item else margin + line.strip()
        for item, line in zip(found, text.split("\n"), strict=True)
    )


def reference() -> str:
    from drsn_kernels import data, train  # noqa: F401  attributes of dk from here on

    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            thing = dk
            for attribute in name.split("."):
                thing = getattr(thing, attribute)
            doc = markdown(inspect.cleandoc(thing.__doc__))
            parts.append(f"### {name.split('.')[-1]}\n\n```python\n{signature(name, thing)}\n```\n\n{doc}\n")
    return "\n".join([*parts, TAIL])


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(reference(), encoding="utf-8")
