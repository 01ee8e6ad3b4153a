"""What the user's functions say: their source as syntax trees, and the globals that their code names."""

import ast
import dis
import functools
import linecache
import types
from collections.abc import Iterator
from typing import NamedTuple


@functools.lru_cache(maxsize=64)
def _tree(file: str, lines: tuple[str, ...]) -> ast.Module | None:
    try:
        return ast.parse("".join(lines))
    except SyntaxError:
        return None


def function_of(code: types.CodeType) -> ast.FunctionDef | None:
    """None for lambdas, and where there is no source."""
    tree = _tree(code.co_filename, tuple(linecache.getlines(code.co_filename)))
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            if min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno:
                return node
    return None


class Write(NamedTuple):
    """root.a.b = ..., root[i] = ..., del root.a: an assignment that may go beyond the function."""

    root: str | None  # None: no variable, a call say
    attribute: str | None  # of root.attribute = ...
    text: str


def writes_of(code: types.CodeType) -> dict[int, list[Write]]:
    """By line."""
    found: dict[int, list[Write]] = {}
    tree = function_of(code) or ast.Module([], [])
    heads = {
        node.lineno for node in ast.walk(tree) if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try))
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and getattr(node, "lineno", None) in heads:
            continue  # if self.keeps: self.kept = ... in one line: whether it is carried out, the line does not tell
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            root: ast.expr = node
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            direct = isinstance(node, ast.Attribute) and node.value is root
            name = root.id if isinstance(root, ast.Name) else None
            write = Write(name, node.attr if direct else None, ast.unparse(node))
            found.setdefault(node.lineno, []).append(write)
    return found


_BETWEEN = {"COPY", "DUP_TOP", "PUSH_NULL", "CACHE", "PRECALL", "RESUME", "EXTENDED_ARG"}


def names_in(code: types.CodeType) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each global that code names, with the attributes asked of it: a.b.c; what it assigns, and what it imports."""
    chain: list[str] = []
    for i in dis.get_instructions(code):
        if i.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR") and chain:
            chain.append(i.argval)
        elif i.opname not in _BETWEEN:
            if chain:
                yield "read", tuple(chain)
            chain = [i.argval] if i.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
            if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                yield "assigns the global", (i.argval,)
            elif i.opname == "IMPORT_NAME":
                yield "imports", (i.argval,)
    if chain:
        yield "read", tuple(chain)
