"""The figures in README.md and docs/ that stored runs hold, written there between markers; result tables and plots.

    python -m benchmarks.pages        after a run was stored under docs/benchmarks, docs/experiments or docs/demo

A page says `<!-- numbers: NAME -->` and `<!-- end of numbers -->`, and NAME is a function here. For each run under
docs/benchmarks it also writes results.md and the plots, and summary.png over the runs that count. tests/test_pages.py
fails where a page, or a results.md, is not what the stored runs give.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from .installed import ROOT, ensure_installed

ensure_installed()
sys.path.append(str(ROOT))  # experiments, behind the installed package

from drsn_kernels.demo.speed import PAPER_RATIO  # noqa: E402
from experiments import paired, report  # noqa: E402
from experiments.results import read  # noqa: E402
from experiments.tasks import Condition  # noqa: E402

from . import plots  # noqa: E402
from .cases import NETWORKS  # noqa: E402
from .report import figures  # noqa: E402
from .rows import write_markdown  # noqa: E402
from .stored import (  # noqa: E402
    EVAL,
    EVAL16,
    NORM,
    NORMS,
    REPLACED,
    RUNS,
    TRAIN,
    TRAIN16,
    current,
    gains,
    gpus,
    holds,
    host,
    kept,
    large,
    mean,
    names,
    number,
    over_floor,
    over_resnet,
    rows_of,
    run,
    short,
    table,
)

DOCS = ROOT / "docs"
PLOTTED = {("shrink_train", "both"), ("shrink_eval", "forward")}  # and networks, where there are several
WIDE = 512  # channels from which a gate's products outweigh its streams
RECOGNISED = {
    "simulated bearings, -5 dB": ("bearings", Condition("gaussian", -5.0)),
    "CWRU, -5 dB": ("cwru", Condition("gaussian", -5.0)),
    "CWRU, another load, -5 dB": ("cwru-load", Condition("gaussian", -5.0)),
    "spoken digits in a street, -10 dB": ("speech", Condition("street", -10.0)),
}
MARKED = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end of numbers -->)", re.S)

# ---- README.md -------------------------------------------------------------------------------------------------------


def bought() -> list[str]:
    """What a DRSN costs over its ResNet: the paper, the ports, and here."""

    def percent(ratio: float) -> str:
        return f"{100 * (ratio - 1):.0f} %"

    gpu = next(name for name in current() if name in gpus() and over_resnet(name, "triton"))
    ports = [percent(over_resnet(name, "port")) for name in (NORMS, gpu)]
    norms = over_resnet(gpu, "triton", resnet="resnet-fused")
    before = f" ({norms:.2f})" if norms else " (measured before batch normalisation was fused as well)"
    return [
        f"The paper pays {100 * (PAPER_RATIO - 1):.1f} % more training time than its ResNet takes, the popular PyTorch"
        f" ports {ports[0]} on a CPU and {ports[1]} on an {short(gpu)}.",
        f"Here a step takes {over_resnet(NORMS, 'cpu'):.2f} of the time of PyTorch's ResNet on a CPU"
        f" ({over_resnet(NORMS, 'cpu', resnet='resnet-fused'):.2f} of one with this package's batch normalisation), and"
        f" {over_resnet(gpu, 'triton'):.2f} on an {short(gpu)}{before}. A shrinkage keeps"
        f" {kept('cpu', 'cpu'):.1f} bytes an element for the backward pass instead of {kept('cpu', 'port'):.0f}.",
    ]


def status() -> list[str]:
    """A line for each GPU that it ran on."""
    lines = []
    for name in gpus():
        commit, steps = run(name)[0]["commit"], {"float32 training": TRAIN, "bfloat16": TRAIN16, "eval": EVAL}
        found = {label: gains(name, "best-compiled", want).values() for label, want in steps.items()}
        speeds = [
            f"{number(statistics.geometric_mean(ratios))} in {label}" for label, ratios in found.items() if ratios
        ]
        note = f", {REPLACED[commit]}" if commit in REPLACED else ""
        about = f"commit {commit}, {holds(name)}{note}"
        link = f"[{short(name)}](docs/benchmarks/{name}/results.md)"
        lines.append(f"- {link} ({about})" + (f": over torch.compile {', '.join(speeds)}." if speeds else ""))
    return lines


def measured() -> list[str]:
    """How many times as fast, for each run that counts; every row the same way."""
    runs = current()

    def line(label: str, value: Callable[[str], str]) -> list[str]:
        return [label, *map(value, runs)]

    def faster(other: str, want: Callable[[dict], bool]) -> Callable[[str], str]:
        return lambda name: mean(gains(name, other, want).values())

    def wide(one: dict) -> bool:
        return (TRAIN(one) or TRAIN16(one)) and one["shape"][1] >= WIDE

    def networks(provider: str) -> Callable[[str], str]:
        def value(name: str) -> str:
            found = over_resnet(name, table(name).ours if provider == "ours" else provider)
            if found is None:
                return ""
            older = provider == "ours" and over_resnet(name, "resnet-fused") is None
            return number(1 / found) + (", PyTorch's norms" if older else "")

        return value

    return rows_of(
        ["more is better", *map(short, runs)],
        [
            line("speed over the popular port, training step, float32", faster("port", TRAIN)),
            line("batch normalisation and ReLU over PyTorch's, training step", faster("best", NORM)),
            line("over torch.compile, training step, float32", faster("best-compiled", TRAIN)),
            line("over torch.compile, bfloat16", faster("best-compiled", TRAIN16)),
            line(f"over torch.compile, {WIDE} channels and more", faster("best-compiled", wide)),
            line("over torch.compile, forward in eval, float32", faster("best-compiled", EVAL)),
            line("over a copy, forward in eval, 16 MiB and more",
                 lambda name: mean(gains(name, "floor", large(EVAL)).values())),
            line("over the ResNet, training step of the paper's network", networks("ours")),
            line(f"the popular port's over the ResNet (the paper's: {1 / PAPER_RATIO:.2f})", networks("port")),
            *([f"points of test accuracy over the ResNet's, {label}", points, *[""] * (len(runs) - 1)]
              for label, points in recognised().items()),
        ],
    )  # fmt: skip


def accuracy() -> list[str]:
    """The demo's test accuracy of the DRSN-CW and of the same network without thresholds, on its two data sets."""
    lines = []
    for name, label in {"simulated": "simulated bearings", "cwru": "CWRU bearings"}.items():
        models = json.loads((DOCS / "demo" / f"{name}-results.json").read_text("utf-8"))["learning"]["models"]
        without, ours = (100 * models[model]["mean_accuracy"] for model in ("resnet", "drsn-cw"))
        lines.append([label, f"{without:.1f}", f"{ours:.1f}", f"{ours - without:+.1f}"])
    return rows_of(["test accuracy, %, one seed", "ResNet", "DRSN-CW", "points gained"], lines)


def recognised() -> dict[str, str]:
    """Points of test accuracy of the DRSN-CW over the ResNet in docs/experiments, with intervals over seeds."""
    cells = report.cells(read(DOCS / "experiments" / "results.csv"))
    found = {}
    for label, (task, condition) in RECOGNISED.items():
        ours, without = (cells[task, condition, model] for model in ("drsn-cw", "resnet"))
        found[label] = f"{paired.over(ours, without)[0]}, {len(ours.keys() & without.keys())} seeds"
    return found


# ---- docs/use.md -----------------------------------------------------------------------------------------------------


def slower() -> list[str]:
    """The cases of Shrinkage in which torch.compile is faster than ours, or ours gains less than 5 %."""
    lines = []
    for name in current():
        own = table(name)
        for case, rows in own.cases.items():
            if {"best-compiled", own.ours} <= set(rows) and rows[own.ours]["op"] in ("shrink_train", "shrink_eval"):
                gain = gains(name, "best-compiled", lambda one, case=case: one["case"] == case)[case]
                if gain < 1.05:
                    times = [f"{1e3 * rows[provider]['median_ms']:.0f}" for provider in (own.ours, "best-compiled")]
                    lines.append([short(name), f"`{case}`", *times, f"{gain:.2f}"])
    return rows_of(["run", "case", "ours, us", "torch.compile, us", "times as fast"], lines)


# ---- docs/inside/architecture.md -------------------------------------------------------------------------------------


def in_graphs() -> list[str]:
    """A training step inside torch.compile: plain PyTorch, our opaque operations, and the eager call beside them."""
    lines = []
    for case, rows in table("cpu").cases.items():
        if {"ours-compiled", "cpu-compiled"} <= set(rows) and rows["cpu"]["op"] == "shrink_train":
            plain = rows["ours-compiled"]["median_ms"]
            others = [f"{rows[provider]['median_ms'] / plain:.2f}" for provider in ("cpu-compiled", "cpu")]
            lines.append([f"`{case}`", f"{plain:.2f}", *others])
    return rows_of(["case, CPU", "plain PyTorch, ms", "opaque over it", "eager, gate fused, over it"], lines)


# ---- docs/README.md --------------------------------------------------------------------------------------------------


def stored() -> list[str]:
    """Links to the tables of all runs."""
    return [", ".join(f"[{short(name)}](benchmarks/{name}/results.md)" for name in names()) + "."]


# ---- docs/inside/measurements.md -------------------------------------------------------------------------------------


def aims() -> list[str]:
    """The CPU runs' figures that have an aim; those of networks and norms by the run of these."""
    found = {one.name: one for one in figures(run("cpu")) if one.reached is not None}
    for one in figures(run(NORMS)):
        if one.reached is not None:
            # a figure of both runs is of other operators in each
            found[one.name if one.name.startswith(("paper network", "BatchNorm")) else f"{one.name}, norms"] = one
    lines = [
        [name + (f" ({one.note})" if one.note else ""), f"at {'least' if one.at_least else 'most'} {one.aim:g}",
         f"{one.value:.2f}", "yes" if one.reached else "**no**"]
        for name, one in found.items()
    ]  # fmt: skip
    return rows_of(["figure", "aim", "CPU", "reached"], lines)


def on_gpus() -> list[str]:
    """GPU time of Shrinkage, for each GPU run."""
    lines = []
    for name in gpus():
        for label, want in (("training, float32", TRAIN), ("training, bfloat16", TRAIN16),
                            ("eval, float32", EVAL), ("eval, bfloat16", EVAL16)):  # fmt: skip
            over = [mean(gains(name, other, want).values()) for other in ("best-compiled", "port")]
            count = str(len(gains(name, "floor", want)))
            lines.append([short(name), label, count, *over, mean(over_floor(name, want).values())])
    return rows_of(["run", "step", "cases", "torch.compile / ours", "popular port / ours", "ours / floor"], lines)


def gpu_aims() -> list[str]:
    """What the GPU kernels should reach, and what they do, for the GPU runs that count."""
    runs = [name for name in current() if name in gpus()]
    steps = {"training, float32": TRAIN, "training, bfloat16": TRAIN16, "eval, float32": EVAL, "eval, bfloat16": EVAL16}

    lines = []
    for label, want in steps.items():
        cells = []
        for name in runs:
            found = list(gains(name, "best-compiled", want).values())
            good = found and statistics.geometric_mean(found) >= 2 and min(found) >= 1.2
            cells.append(_verdict(mean(found), good))
        lines.append([f"torch.compile / ours, {label}", "at least 2, no case below 1.2", *cells])
    floors = {"training / a copy and a product": (1.6, (TRAIN, TRAIN16)), "eval / a copy": (1.35, (EVAL, EVAL16))}
    for label, (most, wants) in floors.items():
        cells = []
        for name in runs:
            found = [ratio for want in wants for ratio in over_floor(name, large(want)).values()]
            good = sum(ratio <= most for ratio in found)
            text = f"{good} of {len(found)} cases, worst {number(max(found))}" if found else ""
            cells.append(_verdict(text, good == len(found)))
        lines.append([f"{label}, 16 MiB and more", f"at most {most}", *cells])
    ratios = [over_resnet(name, "triton") for name in runs]
    cells = [_verdict(number(ratio), ratio <= 1.05) if ratio else "" for ratio in ratios]
    lines.append(["paper network / ResNet, as CUDA graphs", "at most 1.05", *cells])
    return rows_of(["figure", "aim", *map(short, runs)], lines)


def _verdict(text: str, reached: bool) -> str:
    """Of an aim; nothing where no such case was timed."""
    return text if reached or not text else f"{text}: **no**"


def networks() -> list[str]:
    """Whole networks: a training step over that of the same network without shrinkage."""
    lines = []
    for name in names():
        for op in NETWORKS:
            if (ours := over_resnet(name, table(name).ours, op)) is not None:
                rows = next(rows for rows in table(name).cases.values() if rows["floor"]["op"] == op)
                fused = over_resnet(name, "resnet-fused", op)  # a ResNet with our normalisation
                cells = [f"{ratio:.2f}" for ratio in (ours, over_resnet(name, "port", op))]
                alike = fused and over_resnet(name, table(name).ours, op, "resnet-fused")
                cells += [f"{fused:.2f}", f"{alike:.2f}"] if fused else ["", ""]
                for provider in (table(name).ours, "port"):
                    over = rows[provider]["host_us"] / rows["floor"]["host_us"]
                    cells.append(f"{over:.2f}" if name in gpus() else "")
                lines.append([short(name), f"`{rows['floor']['case']}`", *cells])
    ratios = ["ours / ResNet", "port / ResNet", "ResNet, our norms / ResNet", "ours / that"]
    return rows_of(["run", "case", *ratios, "host time: ours", "port"], lines)


def hosts() -> list[str]:
    """Median host time of an eager call of Shrinkage in float32, for each GPU run."""
    lines = []
    for name in gpus():
        for label, want in (("training step", TRAIN), ("forward in eval", EVAL)):
            times = [host(name, provider, want) for provider in ("port", "best", "best-compiled", "triton")]
            if all(times):
                lines.append([short(name), label, *(f"{us:.0f}" for us in times)])
    return rows_of(["run", "step", "port, us", "best eager form", "torch.compile", "ours"], lines)


def runs() -> list[str]:
    """What was stored."""
    lines = []
    for name in names():
        one = run(name)[0]
        versions = [f"torch {one['torch']}"]
        versions += [f"Triton {one['triton']}", f"driver {one['driver']}"] if name in gpus() else []
        link = f"[{name}](../benchmarks/{name}/results.md)"
        note = REPLACED.get(one["commit"], "")
        lines.append([link, one["device"], ", ".join(versions), one["commit"], one["date"], holds(name), note])
    return rows_of(["run", "device", "versions", "commit", "date", "holds", ""], lines)


# ---- writing ---------------------------------------------------------------------------------------------------------

BLOCKS = {one.__name__: one for one in (bought, status, measured, accuracy, slower, in_graphs, aims, on_gpus, gpu_aims,
                                        networks, hosts, runs, stored)}  # fmt: skip


def pages() -> list[Path]:
    """Those that hold markers."""
    all_pages = ROOT / "README.md", *sorted(DOCS.rglob("*.md"))
    return [path for path in all_pages if "<!-- numbers:" in path.read_text("utf-8")]


def filled(text: str) -> str:
    """A page with its numbers as the stored runs give them.

    Raises:
        ValueError: a marker with a name that is not in BLOCKS, or without its end.
    """

    def fill(match: re.Match) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"numbers takes one of {', '.join(BLOCKS)}, got {match[2]}")
        return match[1] + "\n".join([*BLOCKS[match[2]](), match[3]])

    done, count = MARKED.subn(fill, text)
    if count != text.count("<!-- numbers: ") or count != text.count("<!-- end of numbers -->"):
        raise ValueError("each <!-- numbers: NAME --> must have one <!-- end of numbers --> behind it")
    return done


def results(name: str, out: Path) -> Path:
    """results.md of a stored run."""
    command = json.loads((RUNS / name / "results.json").read_text("utf-8"))["command"]
    return write_markdown(out, run(name), figures(run(name)), command)


def main() -> int:
    for page in pages():
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
        print(page.relative_to(ROOT))
    for name in names():
        results(name, RUNS / name / "results.md")
        for old in (RUNS / name).glob("*.png"):
            old.unlink()
        shown = [one for one in run(name) if (one["op"], one["mode"]) in PLOTTED]
        of_networks = [one for one in run(name) if one["op"] in NETWORKS]
        shown += of_networks if len({one["case"] for one in of_networks}) > 1 else []
        print(f"docs/benchmarks/{name}: results.md and {len(plots.draw(shown, RUNS / name))} plots")
    plots.summary({short(name): run(name) for name in current()}, RUNS / "summary.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
