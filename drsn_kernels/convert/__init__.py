"""convert and revert: the fused operators inside models that exist already."""

import contextlib
import re
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx, nn

from ..batch_norm import _NORMS, BatchNormReLU, FusedSequential
from ..modules import Shrinkage, SqueezeExcite
from ..ops import checks
from ..untouched import untouched
from .advice import advise
from .conditions import class_of
from .norms import Norms, fused_in, is_chain, of_chain, of_forward, runs_norms
from .plans import Converted, converted_class, install, remove
from .probe import Finding, configuration, examine
from .reasons import first_line


@dataclass(frozen=True)
class Row:
    """One module that was examined, under all its names."""

    names: tuple[str, ...]
    module: str  # its class
    outcome: str  # "converted", "left alone", "written inline"; of batch norms "norms fused", "norms left alone"
    detail: str  # what runs now, or why it is left alone, or the lines to change
    difference: float | None = None  # the largest on the probes in float64, relative: y, gradients, statistics
    own_difference: float | None = None  # of y in the module's own dtype; of norms all of these


@dataclass(frozen=True)
class Report:
    """What convert did, printed as a table; rows with the same class and text, but for numbers, are printed as one."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def _with(self, outcome: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.outcome == outcome)

    @property
    def converted(self) -> tuple[Row, ...]:
        return self._with("converted")

    @property
    def left_alone(self) -> tuple[Row, ...]:
        return self._with("left alone")

    @property
    def inline(self) -> tuple[Row, ...]:
        return self._with("written inline")

    @property
    def norms(self) -> tuple[Row, ...]:
        """Modules whose batch normalisations run as one with the ReLU behind them."""
        return self._with("norms fused")

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.outcome, row.module, re.sub(r"\d+", "0", row.detail)), []).append(row)
        lines = [("outcome", "class", "modules", "off in float64", "off in its dtype", "")]
        for (outcome, module, _), rows in groups.items():
            names = [" = ".join(name or "(the model)" for name in row.names) for row in rows]
            shown = ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
            apart = (_number(r.difference for r in rows), _number(r.own_difference for r in rows))
            lines.append((outcome, module, shown, *apart, rows[0].detail))
        if len(lines) == 1:
            lines = [("no module was examined: all are torch's, drsn_kernels' own or converted already",)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join([*("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines), *self.notes])

    __repr__ = __str__


def _number(values) -> str:
    known = [v for v in values if v is not None]
    return f"{max(known):.1g}" if known else "-"


def convert(model: nn.Module, *, norms: bool = True) -> Report:
    """Make every module of `model` that computes shrinkage, squeeze-and-excitation, or batch normalisation followed by
    ReLU, use the fused operators.

    In place. A module is found by what it computes, never by its name: its forward is run on a copy with random
    numbers, in train and in eval mode, and where its output is ``sign(x) * max(|x| - tau, 0)`` and tau follows from the
    mean of \\|x\\| (or of x) over the spatial dimensions by code of its own, that code is kept and the rest is replaced
    by :func:`drsn_kernels.shrink`; where it is x times a factor for each plane that follows from the mean of x, by
    :func:`drsn_kernels.squeeze_excite`. Outputs, gradients, statistics and attributes that it sets must agree to
    rounding in both modes, in float64 where the module runs in it; else it is left alone, and the report says why. A
    gate that is one module is called as it is, hooks included; a standard gate may be fused, as in
    :func:`drsn_kernels.shrink`.

    The object stays the same and gets another class, a subclass of its own: names, aliases, hooks on it and on its
    children, parameters, buffers, optimizers, state_dict keys, isinstance, train and eval, deepcopy and pickle (the
    reader needs drsn_kernels) go on as before, and :func:`revert` gives it its class back. Probing leaves no trace: it
    needs memory for one module at a time in float64. Modules of one class that only their numbers tell apart are
    examined once.

    Parameters, buffers and children are looked up at every call. The module's own forward still runs where a call has
    more arguments than x or another number of dimensions than was probed, and for as long as anything else that it
    reads is not what it was at conversion (attributes of it and of its children, at any depth of dicts, lists and
    objects; attributes of classes; globals), or a hook listens to a child that the fused form does not call. A forward
    that does more than to compute (it keeps something in a dict, counts, prints, sets autocast or gradients) is left
    alone. Do not call convert while another thread runs a model: torch.fx, which traces, reroutes module calls
    meanwhile.

    A BatchNorm1d, 2d, 3d or SyncBatchNorm and the ReLU or LeakyReLU behind it become one operator
    (:func:`drsn_kernels.batch_norm_relu`) in every nn.Sequential, and in every module whose forward, traced on the same
    probes, gives the norm's result to the activation (a module, a function, a method, in place) and to nothing else.
    Each pair is looked up at every call, with its mode and momentum: where either has a hook, another class or a
    forward of its own, the two are called. What torch.compile, export, fx and jit see is the module's own forward.

    Args:
        model: any module; also one that is a shrinkage module itself.
        norms: False leaves batch normalisations outside of shrinkage modules as they are.

    Returns:
        A report: ``rows``, and of those ``converted``, ``left_alone`` and ``inline`` (blocks that write the operator
        among other code: the lines, and the call to put there), and ``norms`` (modules whose batch normalisations run
        fused, and which). ``print(report)`` is a table.

    Raises:
        TypeError: model is not an nn.Module.

    Equivalent to, for each module that is found::

        def forward(self, x):  # instead of its own
            return dk.shrink(x, self.gate, average="channel")  # or "sample", None, and its own code as the gate
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    checks.flag(norms=norms)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    findings: dict[nn.Module, Finding] = {}
    with untouched([model]), torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as plain:
        for device in filter(torch.amp.is_autocast_available, devices):
            plain.enter_context(torch.autocast(device, enabled=False))
        plain.enter_context(warnings.catch_warnings())  # a warning that is given once is the user's
        warnings.simplefilter("ignore")
        # probes are small: on two busy cores one thread took 5 s for 34 layers, two that wait for each other 24
        plain.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        bar = plain.enter_context(_bar(sum(1 for module in names if _is_users(module))))
        search = _Search(bar, norms)
        search.look_at(model)
    findings, of_norms = search.findings, search.norms
    for found, refused in ((findings, Finding), (of_norms, Norms)):
        for module, finding in found.items():
            try:
                if finding.plans:
                    install(module, finding.plans)
            except TypeError as error:  # a class that does not let its objects change theirs
                found[module] = refused(why=f"its class cannot be extended: {error}")
    rows = []
    for module, found in findings.items():
        row = partial(Row, tuple(names[module]), type(module).__name__)
        if found.plans:
            plans = ", ".join(dict.fromkeys(str(fused.plan) for fused in found.plans.values()))
            rows.append(row("converted", plans, found.difference, found.own_difference))
        elif found.advice:
            rows.append(row("written inline", found.advice))
        elif not any(isinstance(m, _OURS) and not runs_norms(m) for m in module.modules()):
            rows.append(row("left alone", found.why))
    for module, found in of_norms.items():
        row = partial(Row, tuple(names[module]), type(module).__name__)
        if found.plans:
            rows.append(row("norms fused", found.detail, own_difference=found.own_difference))
        else:
            rows.append(row("norms left alone", found.why))
    return Report(tuple(rows), (*_notes(names), *search.counted(model)))


def revert(model: nn.Module) -> list[str]:
    """Undo :func:`convert`: every converted module of `model` gets its class and forward back. In place.

    Returns:
        The names of the modules that were reverted, each object once.

    Raises:
        TypeError: model is not an nn.Module. ValueError: a converted module's class was changed since (by
        parametrizations or fully_shard, say). Nothing has been reverted then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    converted = [(name, m) for name, m in model.named_modules() if isinstance(m, Converted)]
    for name, m in converted:
        if type(m) is not converted_class(m._drsn_class):
            raise ValueError(f"cannot revert {name or 'the model'}: its class was changed to {type(m).__name__} since")
    for _, m in converted:
        remove(m)
    return [name for name, _ in converted]


_OURS = (Converted, Shrinkage, SqueezeExcite)
_MODELS = f"{__package__.split('.')[0]}.models"  # built on the fused operators


def _is_users(module: nn.Module) -> bool:
    ours = (*_OURS, FusedSequential, BatchNormReLU)
    return not isinstance(module, ours) and not type(module).__module__.startswith(("torch.", _MODELS))


def _bar(modules: int):
    """Shown from the first second on, on a terminal and where there is tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext()
    return tqdm(desc="drsn_kernels.convert", total=modules, unit=" modules", delay=1.0, leave=False, disable=None)


class _Search:
    """What was found of a model's modules."""

    def __init__(self, bar, with_norms: bool) -> None:
        self.bar, self.with_norms = bar, with_norms
        self.findings: dict[nn.Module, Finding] = {}
        self.norms: dict[nn.Module, Norms] = {}
        self.all_norms: set[nn.Module] = set()  # outside of what is ours
        self._known: dict[Hashable, tuple[Finding, Norms | None]] = {}  # by configuration

    def look_at(self, module: nn.Module) -> None:
        """From the outside in: what is inside a converted module is its gate."""
        if module in self.findings or (isinstance(module, _OURS) and not runs_norms(module)):
            return
        found = None
        if _is_users(module):
            found, norms = self._examined(module)
            self.findings[module] = found
            if self.bar is not None:
                self.bar.update()
            if found.plans:
                return
            self._keep(module, norms)
        if is_chain(module) and not isinstance(module, Converted):
            self._keep(module, of_chain(module))
        before = self.with_norms
        if isinstance(module, fx.GraphModule):
            self._keep(module, Norms(why="its forward was written by torch.fx: convert before it is traced"))
            self.with_norms = False
        for child in module.children():
            if class_of(child) in _NORMS and not isinstance(module, FusedSequential):
                self.all_norms.add(child)
            self.look_at(child)
        self.with_norms = before
        if found is not None and found.amid:
            shapes, found.amid = found.amid, ()
            with contextlib.suppress(Exception):  # the user's code runs there too; without advice the reason stands
                found.advice = next(filter(None, (advise(module, shape) for shape in shapes)), "")

    def _keep(self, module: nn.Module, norms: Norms | None) -> None:
        if norms is not None and self.with_norms:
            self.norms[module] = norms

    def _examined(self, module: nn.Module) -> tuple[Finding, Norms | None]:
        key = configuration(module)
        if key is None or key not in self._known:
            try:
                found = examine(module)
            except Exception as error:  # the user's code runs there, on what it was not written for
                found = Finding(why=f"the probe fails: {first_line(error)}")
            norms = None
            if self.with_norms and not found.plans and not is_chain(module):
                try:
                    norms = of_forward(module, found)
                except Exception as error:
                    norms = Norms(why=f"the probe fails: {first_line(error)}")
            self._known[key] = found, norms
        return self._known[key]

    def counted(self, model: nn.Module) -> list[str]:
        fused = {norm for module in model.modules() for norm in fused_in(module)}
        share = f"{len(fused)} of {len(self.all_norms)} batch normalisations run as one with the ReLU behind them"
        return [share] if self.norms else []


def _notes(names: dict[nn.Module, list[str]]):
    for module, (name, *_) in names.items():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{what} is TorchScript and stays as it is: convert before torch.jit.trace"
        elif hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            yield f"{what} is compiled: what was converted in it is compiled again at its next call"
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            yield f"{what} wraps the model: what it wraps has been converted"
