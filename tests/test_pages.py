"""benchmarks/pages.py: pages and result tables say what the stored runs hold."""

import re

import pytest
import repository  # noqa: F401 - benchmarks/ from the repository

from benchmarks import pages, plots, stored
from benchmarks.rows import write_json


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_a_page_says_what_the_runs_hold(page):
    text = page.read_text("utf-8")
    assert pages.filled(text) == text, "run: python -m benchmarks.pages"


def test_every_block_is_on_a_page():
    used = {name for page in pages.pages() for _, name, _ in pages.MARKED.findall(page.read_text("utf-8"))}
    assert used == set(pages.BLOCKS)


@pytest.mark.parametrize("name", pages.names())
def test_the_table_of_a_run_is_up_to_date(name, tmp_path):
    stored = pages.RUNS / name / "results.md"
    written = pages.results(name, tmp_path / "results.md")
    assert stored.read_text("utf-8") == written.read_text("utf-8"), "run: python -m benchmarks.pages"


def test_a_number_that_drifts_is_put_right():
    text = (pages.ROOT / "README.md").read_text("utf-8")
    block = re.search(r"<!-- numbers: measured -->.*?<!-- end of numbers -->", text, re.S)[0]
    row = next(line for line in block.splitlines() if line.startswith("| over torch.compile"))
    other = text.replace(row, re.sub(r"\d+(\.\d+)?", "77", row))
    assert other != text and pages.filled(other) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- numbers: nothing -->\n<!-- end of numbers -->", "numbers takes one of bought, status"),
        ("<!-- numbers: measured -->\n| 1 |", "each <!-- numbers: NAME --> must have one"),
        ("<!-- end of numbers -->", "each <!-- numbers: NAME --> must have one"),
    ],
)
def test_markers_that_are_wrong(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pages.filled(text)


def row(case: str, provider: str, seconds: float, group: str = "A", op: str = "shrink_train") -> dict:
    return {
        "case": case, "provider": provider, "seconds": [seconds] * 3, "group": group, "op": op, "mode": "both",
        "dtype": "fp32", "shape": [2, 64, 8], "channels_last": False, "device": "a device", "clock": "wall",
    }  # fmt: skip


def test_a_replaced_run_gives_no_figure_of_today(monkeypatch):
    assert "nvidia-h200" in pages.current()
    monkeypatch.setitem(pages.REPLACED, pages.run("nvidia-h200")[0]["commit"], "older")
    assert "nvidia-h200" not in pages.current() and "nvidia-h200" in pages.gpus()


def test_a_run_of_a_few_cases_leaves_its_other_cells_empty(monkeypatch, tmp_path):
    for name in ("cpu", "cpu-norms", "nvidia-h200"):
        (tmp_path / name).symlink_to(stored.RUNS / name)
    rows = [one | {"device": "NVIDIA B200"} for one in pages.run("nvidia-h200") if one["op"] == "abs_mean"]
    write_json(tmp_path / "nvidia-b200" / "results.json", rows, "a command")
    monkeypatch.setattr(stored, "RUNS", tmp_path)
    assert pages.names() == ["cpu", "cpu-norms", "nvidia-b200", "nvidia-h200"]
    for name, block in pages.BLOCKS.items():
        assert block(), name
    assert "B200" in pages.measured()[0] and "nvidia-b200" in "".join(pages.status())
    stored.run.cache_clear()
    stored.table.cache_clear()


def test_plots_show_each_case_once_for_each_provider(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="draws")
    rows = [row("a", "floor", 1), row("a", "cpu", 2), row("a", "port", 8), row("a", "best-compiled", 3)]
    rows += [row("b", "floor", 1, "C"), row("b", "cpu", 4, "C"), row("b", "best-compiled", 2, "C")]
    rows += [row("c", "floor", 1, op="abs_mean"), row("c", "cpu", 2, op="abs_mean")]
    drawn = {}
    strips = plots._strips
    monkeypatch.setattr(plots, "_strips", lambda axes, dots: (drawn.setdefault(len(drawn), dots), strips(axes, dots)))
    assert [path.name for path in plots.draw(rows, tmp_path)] == [
        "shrink_train-both-fp32.png",
        "abs_mean-both-fp32.png",
    ]
    assert drawn[0] == {"A  core 1-D": {"port": [8], "best-compiled": [3], "ours": [2]},
                        "C  launch-bound": {"best-compiled": [2], "ours": [4]}}  # fmt: skip
    assert drawn[1] == {"A  core 1-D": {"ours": [1.5]}, "C  launch-bound": {"ours": [0.5]}}
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS) and set(plots.COLOURS) == set(plots.NAMES)


def test_the_summary_has_a_panel_for_each_run(tmp_path):
    pytest.importorskip("matplotlib", reason="draws")
    path = plots.summary({name: pages.run(name) for name in pages.current()}, tmp_path / "summary.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000
