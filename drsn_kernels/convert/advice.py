"""Where a module computes the operator amid other code: the lines to change, and the statement to put there.

A trace knows for each operation the line of the user's that made it, and which variables held which values then. The
statements whose work the call does go; the one that returns y gets the call in place of the expression that computes
it. A statement stays where anything else uses what it computes.
"""

import ast
import copy
from collections.abc import Collection
from typing import NamedTuple

from torch import fx, nn

from .dropped import check_dropped, check_sign, check_zero
from .family import Found, Match, behind, match_inside, plans_for
from .plans import GatePlan
from .probe import Shape, dtype_for, gives, random
from .reasons import Unexplained, place
from .sources import function_of
from .tracing import Trace, private_copy


def advise(module: nn.Module, shape: Shape) -> str | None:
    """In one sentence, or None: the operator is not in it."""
    dtype = dtype_for(module, shape)
    try:
        trace, match, found = _examined(module, shape, dtype, False)
        _, trained, found_trained = _examined(module, shape, dtype, True)
    except Unexplained:
        return None
    for node, in_training in ((match.y, trained.y), (match.t, trained.t)):  # in the same lines in both modes
        if [f.line for f in node.meta["frames"]] != [f.line for f in in_training.meta["frames"]]:
            return None
    kept = {node for _, node in trace.effects}
    if found is not None and found_trained is not None and found.plan == found_trained.plan:
        change = _change(trace, match, found, kept)
        if change is not None:
            return f"change {change}"
    change = _change(trace, match, None, kept)
    if change is not None:
        return f"the threshold stays as it is computed; change {change}"
    frame = match.y.meta["frames"][-1]
    where = place(frame.code.co_filename, frame.line)
    return f"write dk.soft_threshold(x, tau) for the soft thresholding that ends in {where}"


def _examined(module: nn.Module, shape: Shape, dtype, training: bool) -> tuple[Trace, Match, Found | None]:
    """The operator in it, and a gate that can be named, if that is all there is to the threshold."""
    trace = Trace(private_copy(module, dtype).train(training), random(shape(0), module, dtype))
    match = match_inside(trace)
    if match is None:
        raise Unexplained("it is not in it")
    check_sign(trace, match)
    check_zero(trace, match)
    found = None
    effects, trace.effects = trace.effects, []
    try:
        for candidate in plans_for(trace, match):
            if gives(candidate.plan, private_copy(module, dtype).train(training), match):
                check_dropped(trace, match, candidate)
                found = candidate if isinstance(candidate.plan, GatePlan) else None
                break
    except Unexplained:
        pass
    trace.effects = effects
    return trace, match, found


class _Statement(NamedTuple):
    node: ast.stmt
    nodes: frozenset[fx.Node]  # the operations that it makes
    stores: frozenset[str]
    loads: frozenset[str]

    @property
    def goes_with_its_nodes(self) -> bool:
        """Nothing but names of this function is assigned."""
        if isinstance(self.node, ast.Expr):
            return bool(self.nodes)
        if not isinstance(self.node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            return False
        targets = self.node.targets if isinstance(self.node, ast.Assign) else [self.node.target]
        pure = self.nodes or not any(isinstance(n, (ast.Call, ast.Await)) for n in ast.walk(self.node))
        return bool(pure) and all(
            isinstance(n, (ast.Name, ast.Tuple, ast.List, ast.Starred, ast.Load, ast.Store))
            for t in targets
            for n in ast.walk(t)
        )


def _change(trace: Trace, match: Match, found: Found | None, kept: set[fx.Node]) -> str | None:
    """ "FILE:LINES to STATEMENT", with the gate's call or, without `found`, with the threshold as it is."""
    inside = behind(match.y) - behind(match.u)
    work = inside - (behind(match.t) if found is None else set())
    for level, frame in enumerate(match.y.meta["frames"]):
        if match.u not in frame.names.values() and match.u not in _names_before(work, level):
            continue
        if level and len({f.key for n in trace.nodes for f in n.meta["frames"] if f.code is frame.code}) > 1:
            continue  # a function that is called for something else too
        made = _Rewriting(trace, match, work, level)
        text = made.text(found, kept)
        if text is not None:
            return text
    return None


def _names_before(work: Collection[fx.Node], level: int) -> dict[str, fx.Node]:
    """Of the variables, when the first of these operations was made."""
    first = min((n for n in work if len(n.meta["frames"]) > level), key=lambda n: n.meta["number"], default=None)
    return first.meta["frames"][level].names if first is not None else {}


class _Rewriting:
    """Of the function that is `level` calls below the forward."""

    def __init__(self, trace: Trace, match: Match, work: set[fx.Node], level: int) -> None:
        self.match, self.work, self.level = match, work, level
        self.frame = match.y.meta["frames"][level]
        self.function = function_of(self.frame.code)
        self.module = next((n for n, v in self.frame.modules.items() if v is trace.watch.inner), None)
        self.statements: list[_Statement] = []
        if self.function is None:
            return
        own = [n for n in trace.nodes if self._here(n)]
        for node in _simple(self.function):
            made = frozenset(n for n in own if node.lineno <= n.meta["frames"][level].line <= node.end_lineno)
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            stores = frozenset(n.id for n in names if isinstance(n.ctx, ast.Store))
            loads = {n.id for n in names if isinstance(n.ctx, (ast.Load, ast.Del))}
            loads |= (
                {node.target.id} if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) else set()
            )
            self.statements.append(_Statement(node, made, stores, frozenset(loads)))

    def _here(self, node: fx.Node) -> bool:
        frames = node.meta["frames"]
        return len(frames) > self.level and frames[self.level].key == self.frame.key

    def text(self, found: Found | None, kept: set[fx.Node]) -> str | None:
        last = next((s for s in self.statements if self.match.y in s.nodes), None)
        if last is None or len({s.node.lineno for s in self.statements}) < len(self.statements):
            return None
        expression = self._expression(last.node, self.match.y)
        if expression is None:
            return None
        gone = self._gone(last, expression, kept)
        u = self._name_of(self.match.u, last, gone)
        if u is None:
            return None
        if found is None:
            tau = self._name_of(self.match.t, last, gone) or self._text_of(self.match.t, last.node)
            call = tau and f"dk.soft_threshold({u}, {tau})"
        else:
            stays = {n for s in self.statements if s not in gone and s is not last for n in s.nodes}
            call = (
                None
                if stays & {n for n in found.steps if n.op == "call_module"} or self.module is None
                else (f"dk.shrink({u}, {self._gate(found.plan)}, average={found.plan.average!r})")
            )
        if not call:
            return None
        lines = sorted(line for s in (*gone, last) for line in range(s.node.lineno, s.node.end_lineno + 1))
        taken = {
            line
            for s in self.statements
            if s not in gone and s is not last
            for line in range(s.node.lineno, s.node.end_lineno + 1)
        }
        return f"{place(self.frame.code.co_filename, _ranges(lines, taken))} to {_with(last.node, expression, call)}"

    def _gone(self, last: _Statement, expression: ast.AST, kept: set[fx.Node]) -> list[_Statement]:
        """The statements whose work the call does, and whose names nothing else uses."""
        block = next(b for b in _blocks(self.function) if last.node in b)
        before = [s for s in self.statements if s.node in block and s.node.lineno < last.node.lineno]
        first = min((s.node.lineno for s in before if s.nodes & self.work), default=last.node.lineno)
        gone = [
            s for s in before
            if s.node.lineno >= first and s.goes_with_its_nodes and s.nodes <= self.work and not s.nodes & kept
        ]  # fmt: skip
        within = {id(n) for n in ast.walk(expression)}
        outside = frozenset(
            n.id
            for n in ast.walk(last.node)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in within
        )
        while True:
            needed = set()
            for s in self.statements:
                if s in gone:
                    continue
                for name in outside if s is last else s.loads:
                    earlier = [d for d in self.statements if name in d.stores and d.node.lineno < s.node.lineno]
                    if earlier and earlier[-1] in gone:
                        needed.add(earlier[-1])
            if not needed:
                return gone
            gone = [s for s in gone if s not in needed]

    def _name_of(self, node: fx.Node, last: _Statement, gone: list[_Statement]) -> str | None:
        """A variable that holds this value where the call will stand."""
        first = min((s.node.lineno for s in gone), default=last.node.lineno)
        earliest = min((n for n in self.work if self._here(n)), key=lambda n: n.meta["number"])
        for names, since in ((self.frame.names, None), (earliest.meta["frames"][self.level].names, first)):
            for name, value in names.items():
                stores = [s for s in self.statements if name in s.stores and s.node.lineno < last.node.lineno]
                if since is None:
                    holds = not stores or stores[-1] not in gone
                else:
                    holds = all(s in gone for s in stores if s.node.lineno >= since)
                if value is node and holds:
                    return name
        return None

    def _text_of(self, node: fx.Node, statement: ast.stmt) -> str | None:
        found = self._expression(statement, node) if self._here(node) else None
        return ast.unparse(found) if isinstance(found, ast.expr) else None

    def _expression(self, statement: ast.stmt, node: fx.Node) -> ast.AST | None:
        """What in the statement computes the value of `node`."""
        where = node.meta["frames"][self.level].positions
        if where is None:  # before Python 3.11; the statement's only value then
            value = getattr(statement, "value", None)
            made = next(s.nodes for s in self.statements if s.node is statement)
            return (statement if isinstance(statement, ast.AugAssign) else value) if made <= self.work else None
        for part in ast.walk(statement):
            if isinstance(part, (ast.expr, ast.AugAssign)):
                if (part.lineno, part.end_lineno, part.col_offset, part.end_col_offset) == where:
                    return part
        return None

    def _gate(self, plan: GatePlan) -> str:
        if isinstance(plan.gate, str):
            return f"{self.module}.{plan.gate}"
        torch_nn = "nn" if self.frame.names_nn else "torch.nn"
        layers = (f"{self.module}.{p}" if isinstance(p, str) else f"{torch_nn}.{p.__name__}()" for p in plan.gate)
        return f"{torch_nn}.Sequential({', '.join(layers)})"


def _with(statement: ast.stmt, expression: ast.AST, call: str) -> str:
    if expression is statement:  # y *= ...
        return f"{ast.unparse(statement.target)} = {call}"
    expression.replaced = True
    copied = copy.deepcopy(statement)
    del expression.replaced

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return ast.parse(call, mode="eval").body if hasattr(node, "replaced") else self.generic_visit(node)

    return ast.unparse(Put().visit(copied)).replace("\n", " ")


def _blocks(function: ast.FunctionDef):
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block


def _simple(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements that hold no others, in their order; of the others the heads."""
    found = [s for block in _blocks(function) for s in block if not hasattr(s, "body")]
    return sorted(found, key=lambda s: s.lineno)


def _ranges(lines: list[int], taken: set[int]) -> str:
    """12-15, 18: over comments and blank lines, but over no line that is `taken`."""
    found: list[list[int]] = []
    for line in lines:
        if found and not taken & set(range(found[-1][1], line)):
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
