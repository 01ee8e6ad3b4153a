"""The pages: what is generated is up to date, and every link, heading, test and file that a page names is there."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import drsn_kernels as dk

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def pages() -> list[Path]:
    """Every page, of the results one writes itself too."""
    found = [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        *DOCS.rglob("*.md"),
        *ROOT.glob(".github/**/*.md"),
    ]
    return sorted(page for page in found if page.is_file())


def generator(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- generated pages -------------------------------------------------------------------------------------------------


def test_the_reference_is_up_to_date():
    assert (DOCS / "api.md").read_text(encoding="utf-8") == generator("api").reference(), "run: python docs/api.py"


def test_the_reference_has_every_public_name():
    named = {name for names in generator("api").SECTIONS.values() for name in names}
    assert set(dk.__all__) - {"__version__", "data", "models", "noise", "train"} == {
        name for name in named if "." not in name
    }


def test_the_support_matrix_is_up_to_date():
    assert (DOCS / "support.md").read_text(encoding="utf-8") == generator("support").support(), (
        "run: python docs/support.py"
    )


def test_every_line_of_the_support_matrix_names_a_test():
    lines = [line for line in (DOCS / "support.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    heads = [line for line in lines if line.endswith("| tests |")]
    assert len(lines) - len(heads) > 40
    for line in set(lines) - set(heads):
        assert re.search(r"`test_\w+\.py::test_\w+` \|$", line), line


# ---- what a page names -----------------------------------------------------------------------------------------------


@cache
def defined_in(file: str) -> set[str]:
    path = Path(__file__).with_name(file)
    return {n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}


@cache
def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing(page: Path, text: str) -> list[str]:
    """What the text of a page names and is not there."""
    text, found = FENCE.sub("", text), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(link)
        elif anchor and anchor not in anchors(target):
            found.append(link)
    for file, name in re.findall(r"(test_\w+\.py)::(\w+)", text):
        if not Path(__file__).with_name(file).exists() or name not in defined_in(file):
            found.append(f"{file}::{name}")
    plain = re.sub(r"\]\([^)]*\)", "", text)
    for path in re.findall(r"(?<![\w/.])((?:tests|docs|benchmarks|experiments|csrc|examples)/[\w./-]*\.\w+)\b", plain):
        if not (ROOT / path).exists() and "NAME" not in path:
            found.append(path)
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    assert missing(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](use.md#nowhere)", "use.md#nowhere"),
        ("[a](#no-such-heading)", "#no-such-heading"),
        ("![a](benchmarks/nothing.png)", "benchmarks/nothing.png"),
        ("`test_docs.py::test_nothing`", "test_docs.py::test_nothing"),
        ("tests/test_nothing.py says so", "tests/test_nothing.py"),
    ],
)
def test_what_is_not_there_is_found(text, wrong):
    assert missing(DOCS / "README.md", text) == [wrong]
    assert missing(DOCS / "README.md", "[a](use.md#torchexport) tests/test_docs.py [b](https://nowhere.invalid)") == []


def test_the_index_names_every_page_of_the_folder():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in set(DOCS.rglob("*.md")) - {DOCS / "README.md"}:
        assert f"({page.relative_to(DOCS).as_posix()})" in index, page


def test_the_site_has_every_page():
    """mkdocs.yml; the tables of stored runs are linked to from Measurements."""
    listed = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert listed == {page for page in pages if not page.startswith("benchmarks/")}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 70


def test_an_empty_line_does_not_end_a_block_of_code():
    doc = "Text. Equivalent to::\n\n    a = 1\n\n    if a:\n        b = 2\n\nMore text."
    assert generator("api").markdown(doc) == (
        "Text. Equivalent to:\n\n```python\na = 1\n\nif a:\n    b = 2\n```\n\nMore text."
    )


@pytest.mark.slow
def test_own_data_goes_as_the_page_shows_it(tmp_path):
    """Numpy's recordings, a trained run, predictions and ONNX; then the run as a model."""
    for module in ("matplotlib", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason="the session exports and draws")
    page = (DOCS / "networks_and_training.md").read_text(encoding="utf-8")
    session = page.split("## Your own data")[1].split("\n## ")[0]
    said = []
    for language, code in re.findall(r"^```(python|)\n(.*?)^```$", session, re.M | re.S):
        commands = [shlex.split(line)[1:] for line in code.splitlines() if line.startswith("python -m drsn_kernels ")]
        for arguments in [["-c", code]] if language else commands:
            ran = subprocess.run([sys.executable, "-P", *arguments], cwd=tmp_path, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            said.append(ran.stdout)
    assert len(said) == 5 and "healthy" in said[1] and "worn" in said[-1] + said[2]
    first, *rest = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert first == "file,start,class,probability" and rest[-1].startswith("new/a.csv,,worn,")
    assert (tmp_path / "model.onnx").is_file()
