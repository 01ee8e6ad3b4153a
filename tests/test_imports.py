"""What the modules of the package import, read from their source: no circle, and every floor stands on those below it.

Python's own import of the packages that a module lies in is left out: the root package imports nearly everything.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import drsn_kernels as dk

FOLDER = Path(dk.__file__).parent
ROOT = "drsn_kernels"
# The upper floors, the lowest first; what is not named, the operators and all below them, is the ground floor.
FLOORS = (
    {"modules"},
    {"models", "convert", "explain", "noise", "data", "info", "warmup"},
    {"train"},
    {"demo"},
    {"__main__"},
)
BESIDE = {"benchmarks", "tests", "experiments"}
ANSWERS_ALWAYS = f"{ROOT}.info"  # its report has to come out where the import of the package is what is broken


def name_of(path: Path) -> str:
    parts = [ROOT, *path.relative_to(FOLDER).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(FOLDER.rglob("*.py"))}


def statements(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import that may run, and whether it is inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        elif not (isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"):
            yield from statements(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def named(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that a statement imports, by their whole names."""
    if isinstance(node, ast.Import):
        yield from (one.name for one in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + (MODULES[module].name == "__init__.py")]
        base = ".".join([*parts, *filter(None, [node.module])])
    for one in node.names:
        inner = f"{base}.{one.name}"
        # what a package's own file does not bind is a submodule of it, such as a compiled one
        yield inner if inner in MODULES or (base == ROOT and one.name not in bound(ROOT)) else base


@cache
def bound(module: str) -> set[str]:
    """The names that a module has by its own statements."""
    names = set()
    for node in tree(module).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(one.asname or one.name).split(".")[0] for one in node.names}
        else:
            names |= {target.id for target in ast.walk(node) if isinstance(target, ast.Name)}
            names |= {getattr(node, "name", "")}
    return names


def imports(module: str, inside: bool) -> set[str]:
    """What a module imports by statements outside of functions, or inside of them."""
    return {name for node, within in statements(tree(module)) if within is inside for name in named(module, node)}


@cache  # reading every module takes a second, which collecting the tests need not
def at_once() -> dict[str, set[str]]:
    return {module: imports(module, False) & set(MODULES) - {module} for module in MODULES}


@cache
def later() -> dict[str, set[str]]:
    return {module: imports(module, True) & set(MODULES) - {module} for module in MODULES}


def loaded(module: str) -> set[str]:
    """What an import of the module brings, itself included."""
    found, waiting = set(), [module]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += at_once()[one]
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One way through the graph that comes back to where it began; empty if there is none."""
    way: list[str] = []
    done: set[str] = set()

    def walk(node: str) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        way.append(node)
        found = next(filter(None, map(walk, sorted(graph[node]))), [])
        way.pop()
        done.add(node)
        return found

    return next(filter(None, map(walk, sorted(graph))), [])


def room(module: str) -> str:
    """The file or folder in the package that a module is, or lies in."""
    return module.split(".")[1] if "." in module else ROOT


def floor(module: str) -> int:
    return next((number for number, rooms in enumerate(FLOORS, start=1) if room(module) in rooms), 0)


def test_the_reading_sees_every_kind_of_import():
    assert at_once()[ROOT] >= {f"{ROOT}.{name}" for name in ("backends", "modules", "convert", "ops.shrink")}
    assert f"{ROOT}.train" not in at_once()[ROOT]  # for type checkers only
    assert f"{ROOT}.ops.dispatch" in at_once()[f"{ROOT}.ops.shrink"] and f"{ROOT}.demo" in later()[f"{ROOT}.__main__"]
    assert "torch" in imports(f"{ROOT}.modules", False) and "tqdm" in imports(f"{ROOT}.demo.learning", True)
    assert f"{ROOT}._cpu" in imports(f"{ROOT}.backends.cpu_extension", False)  # compiled, imports nothing
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and circle({"a": {"b"}, "b": set()}) == []


def test_no_circle_of_modules():
    assert circle(at_once()) == []


def test_no_circle_of_rooms():
    rooms: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module, found in at_once().items():
        rooms[room(module)] |= {room(name) for name in found} - {room(module)}
    assert circle(rooms) == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    higher = [name for name in at_once()[module] | later()[module] if floor(name) > floor(module)]
    assert module == ROOT or higher == []


@pytest.mark.parametrize("module", MODULES)
def test_an_import_inside_a_function_is_of_something_that_is_not_loaded_anyway(module):
    """A room that few need, such as the demo, or a heavy package: not a way around a circle."""
    there = loaded(ROOT) | loaded(module)
    assert module == ANSWERS_ALWAYS or later()[module] & there == set()
    assert module == ANSWERS_ALWAYS or "torch" not in imports(module, True)


@pytest.mark.parametrize("module", MODULES)
def test_the_package_does_not_need_what_lies_beside_it(module):
    assert {name.split(".")[0] for inside in (False, True) for name in imports(module, inside)} & BESIDE == set()
