"""The reference is what the docstrings say, and every claim of docs/support.md names a test that exists."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import drsn_kernels as dk

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def reference_maker():
    spec = importlib.util.spec_from_file_location("docs_api", DOCS / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    assert (DOCS / "api.md").read_text(encoding="utf-8") == reference_maker().reference(), "run: python docs/api.py"


def test_the_reference_has_every_public_name():
    named = {name for names in reference_maker().SECTIONS.values() for name in names}
    assert set(dk.__all__) - {"__version__", "models", "noise"} == {name for name in named if "." not in name}


def defined_in(file: str) -> set[str]:
    path = Path(__file__).with_name(file)
    return {n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}


def sections() -> dict[str, tuple[list[list[str]], dict[str, str]]]:
    """For each table of support.md: its rows, and the tests by letter."""
    text = (DOCS / "support.md").read_text(encoding="utf-8")
    found = {}
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.split("\n") if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
        found[part.split("\n")[0]] = rows, dict(re.findall(r"\((\w)\) `(test_\w+\.py::test_\w+)`", part))
    return found


@pytest.mark.parametrize("section", sections())
def test_every_cell_of_the_support_matrix_names_a_test(section):
    rows, tests = sections()[section]
    used = set()
    for row in rows:
        backed = row[-1:] if len(row) == 3 else row[1:]  # tables of three columns have one for the tests
        for cell in backed:
            letters = re.findall(r"\((\w)\)", cell)
            assert letters, f"{row[0]}: {cell!r} names no test"
            used |= set(letters)
    assert rows and used == set(tests), f"letters without a test, or tests without a cell: {used ^ set(tests)}"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_the_tests_and_pages_that_a_page_names_exist(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for file, name in re.findall(r"(test_\w+\.py)::(\w+)", text):
        assert name in defined_in(file), f"{file}::{name}"
    for file in re.findall(r"tests/(\w+\.py)", text):
        assert Path(__file__).with_name(file).exists(), file
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DOCS / link).exists(), link
