"""experiments/: tables, plots and the page, from rows."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind the installed package

from experiments import paired, pictures, report, results, run, timing  # noqa: E402
from experiments.results import Result, Run  # noqa: E402
from experiments.tasks import TASKS, Condition  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

A = Run("vibration", "resnet", Condition("pink", -5.0), 0, 40)
B = Run("image", "drsn-cw", Condition("pasted"), 1, 40)


def test_tables():
    done = {}
    for snr, values in ((-5.0, (0.5, 0.6, 0.7)), (-3.0, (0.8,)), (0.0, (0.9,)), (3.0, (1.0,)), (5.0, (1.0,))):
        for seed, value in enumerate(values):
            done[Run("vibration", "drsn-cw", Condition("pink", snr), seed, 40)] = Result(value, 1.0)
    done[Run("vibration", "resnet", Condition("pink", 0.0), 0, 40)] = Result(0.25, 1.0)
    done[Run("vibration", "resnet", Condition("pink", 3.0), 0, 2)] = Result(0.99, 1.0)  # other epochs stay out
    text = report.tables(report.cells(done), "vibration")
    pink = text[text.index("| pink |") :].splitlines()
    assert pink[0] == "| pink | -5 dB | -3 dB | 0 dB | 3 dB | 5 dB | mean |"
    mean = statistics.mean((60.0, 80.0, 90.0, 100.0, 100.0))
    assert pink[6] == f"| DRSN-CW | 60.0 ± 10.0 (3) | 80.0 (1) | 90.0 (1) | 100.0 (1) | 100.0 (1) | {mean:.1f} |"
    assert pink[3] == "| ResNet |  |  | 25.0 (1) |  |  |  |"
    assert "99.0" not in text

    image = report.tables(report.cells({B: Result(0.75, 1.0)}), "image").splitlines()
    assert image[0] == "| noise | uniform | pasted | mean |" and image[6] == "| DRSN-CW |  | 75.0 (1) |  |"


def fixed_runs() -> dict[Run, Result]:
    """Three seeds of the ResNet and of the DRSN-CW, two of it with another bias of its gates."""
    done, condition = {}, Condition("gaussian", -5.0)
    for model, bias, accuracies in (
        ("drsn-cw", -2.0, (0.52, 0.60)), ("drsn-cw", None, (0.53, 0.63, 0.70)), ("resnet", None, (0.50, 0.61, 0.69))
    ):  # fmt: skip
        for seed, value in enumerate(accuracies):
            run_ = Run("cwru", model, condition, seed, TASKS["cwru"].epochs, "fixed", bias)
            done[run_] = Result(value, 1.0, value + 0.1, (value / 2, value))
    return done


def test_networks_are_compared_within_a_seed():
    scipy_stats = pytest.importorskip("scipy.stats")
    done = fixed_runs()
    lines = paired.table(report.cells(done), "cwru").splitlines()
    middle = scipy_stats.ttest_rel((53, 63, 70), (50, 61, 69)).confidence_interval(0.95)
    assert lines[2:] == [
        "| gaussian -5 dB | ResNet | 3 | 60.0 ± 9.5 | 70.0 ± 9.5 |  |  |",
        f"|  | DRSN-CW | 3 | 62.0 ± 8.5 | 72.0 ± 8.5 | +2.0 ({middle.low:+.1f} to {middle.high:+.1f}) | 3 of 3 |",
        "|  | DRSN-CW, gate bias -2 | 2 | 56.0 ± 5.7 | 66.0 ± 5.7 | +0.5 (-18.6 to +19.6) | 1 of 2 |",
    ]
    with_bias = paired.gates(report.cells(done)).splitlines()
    assert with_bias[2:] == [
        "| cwru | gaussian -5 dB | DRSN-CW, gate bias -2 | 2 | 58.0 ± 7.1 | 56.0 ± 5.7 | -2.0 (-14.7 to +10.7) |"
    ]
    warm_up = {replace(key, gate="warm-up"): value for key, value in done.items() if key.network == "drsn-cw"}
    tried = report.cells(done | warm_up)
    assert paired.table(tried, "cwru").splitlines() == lines  # what gates.py does stands in the other table
    assert "DRSN-CW, gate warm-up | 3 | 62.0 ± 8.5 | 62.0 ± 8.5 | +0.0" in paired.gates(tried)
    one = {key: value for key, value in done.items() if key.seed == 0}  # no interval, and no error
    assert paired.table(report.cells(one), "cwru").splitlines()[3].endswith("| 53.0 | 63.0 | +3.0 | 1 of 1 |")


def test_pictures_of_seeds(tmp_path, monkeypatch):
    """What is drawn: the means of the curves, and the differences with their intervals."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: saved.append((path.name, self)))
    cells = report.cells(fixed_runs())
    paired.curves(tmp_path / "curves.png", cells, "cwru")
    paired.gains(tmp_path / "gains.png", cells)
    (_, curves), (_, gains) = saved
    (axis,) = curves.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert drawn == {
        "ResNet": pytest.approx([30, 60]), "DRSN-CW": pytest.approx([31, 62]),
        "DRSN-CW, gate bias -2": pytest.approx([28, 56]),
    }  # fmt: skip
    (axis,) = gains.axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["cwru, gaussian -5 dB: DRSN-CW", "cwru, gaussian -5 dB: DRSN-CW, gate bias -2"]
    assert [float(x) for line in axis.get_lines() for x in line.get_xdata() if line.get_marker() == "o"] == (
        pytest.approx([2.0, 0.5])
    )
    assert list(axis.get_lines()[0].get_xdata()) == pytest.approx(paired.interval([3.0, 2.0, 1.0]))


def test_report_fills_the_page_between_its_markers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    results.append(tmp_path / "results.csv", A, Result(0.875, 1.0))
    results.append(tmp_path / "results.csv", B, Result(0.75, 1.0))
    for run_, result in fixed_runs().items():
        results.append(tmp_path / "results.csv", run_, result)
    page = tmp_path / "README.md"
    names = ("vibration", "cwru", "gates")
    page.write_text("before\n" + "".join(f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in names) + "after\n")
    paper = tmp_path / "paper.csv"
    paper.write_text("panel,noise,snr_db,method,accuracy_pct\ntest,pink,-5,ResNet,60.5\ntrain,pink,-5,ResNet,99\n")
    assert report.read_paper(paper) == {("resnet", "pink"): {-5.0: 60.5}}
    for _ in range(2):
        assert report.main(["--out", str(tmp_path), "--paper", str(paper)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- vibration -->\n| gaussian |") and "old" not in text
    assert text.endswith("<!-- end gates -->\nafter\n") and text.count("| ResNet | 87.5 (1) |") == 1
    assert "| gaussian -5 dB | ResNet | 3 | 60.0 ± 9.5 |" in text and text.count("| cwru | gaussian -5 dB |") == 1
    assert "| DRSN-CW |  | 75.0 (1) |  |" in capsys.readouterr().out
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {"vibration.png", "cwru-curves.png", "gains.png"}


def test_runs_of_other_epochs_leave_the_page_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, page = tmp_path / "results.csv", tmp_path / "README.md"
    page.write_text("".join(f"<!-- {task} -->\nold\n<!-- end {task} -->\n" for task in ("vibration", "image")))
    results.append(path, A, Result(0.875, 1.0))
    results.append(path, Run("vibration", "resnet", Condition("gaussian", 0.0), 0, 100), Result(0.95, 1.0))
    assert report.main(["--out", str(tmp_path)]) == 0
    text = page.read_text()
    assert "| ResNet | 87.5 (1) |" in text and "95.0" not in text
    assert "<!-- image -->\nNo runs yet.\n" in text and "old" not in text
    assert report.main(["--out", str(tmp_path), "--epochs", "100"]) == 0
    assert "95.0 (1)" in page.read_text() and "87.5" not in page.read_text()
    assert "<!-- image -->\nNo runs of 100 epochs yet.\n" in page.read_text()
    before = page.read_text()
    assert report.main(["--out", str(tmp_path), "--epochs", "7"]) == 1
    assert "results.csv has no runs of 7 epochs yet" in capsys.readouterr().err and page.read_text() == before


def test_a_command_reports_the_runs_of_its_epochs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for epochs, accuracy in ((3, 0.25), (40, 0.5)):
        simulated = Run("simulated", "resnet", Condition("pink", 0.0), 0, epochs)
        results.append(tmp_path / "results.csv", simulated, Result(accuracy, 1.0))
    command = ["--simulated", "--task", "simulated", "--out", str(tmp_path), "--epochs", "3", "--minutes", "0"]
    assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "25.0 (1)" in printed and "50.0" not in printed
    assert run.main([*command, "--paper", str(tmp_path / "none.csv")]) == 1  # before anything is trained
    assert "none.csv" in capsys.readouterr().err


def test_the_page_holds_what_the_stored_runs_give():
    pytest.importorskip("scipy")
    page = (ROOT / "docs" / "experiments" / "README.md").read_text(encoding="utf-8")
    found = report.blocks(report.cells(results.read(ROOT / "docs" / "experiments" / "results.csv")))
    numbers = json.loads((ROOT / "docs" / "pictures" / "numbers.json").read_text(encoding="utf-8"))
    assert found.keys() >= {"vibration", "speech", "image"}
    for name, text in (found | pictures.tables(numbers)).items():
        assert f"<!-- {name} -->\n{text}\n<!-- end {name} -->" in page, name


def test_the_papers_values_are_in_every_plot(tmp_path, monkeypatch):
    """docs/experiments/paper.csv: four networks, three noises, -5 to 5 dB; the means of the 33 settings."""
    paper = report.read_paper(report.PAPER)
    assert all(sorted(values) == list(range(-5, 6)) for values in paper.values())
    means = {"convnet": 77.6, "resnet": 86.3, "drsn-cs": 88.6, "drsn-cw": 89.6}
    for model, mean in means.items():
        values = [v for noise in ("gaussian", "laplace", "pink") for v in paper[model, noise].values()]
        assert abs(statistics.mean(values) - mean) < 0.15
    assert len(paper) == 12
    results.append(tmp_path / "results.csv", A, Result(0.875, 1.0))
    drawn = []
    monkeypatch.setattr(report, "plot", lambda path, cells, task, paper: drawn.append((task, paper)))
    assert report.main(["--out", str(tmp_path)]) == 0 and run.parse(["--simulated"]).paper == report.PAPER
    assert drawn == [("vibration", paper)]


def test_report_errors(tmp_path, capsys):
    assert report.main(["--out", str(tmp_path)]) == 1
    assert "has no runs yet" in capsys.readouterr().err
    paper = tmp_path / "paper.csv"
    paper.write_text("panel,noise\ntest,pink\n")
    with pytest.raises(ValueError, match="paper.csv must have the columns panel,noise,snr_db,method,accuracy_pct"):
        report.read_paper(paper)
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="must have <!-- vibration --> and <!-- end vibration --> once"):
        report.insert(tmp_path / "page.md", "vibration", "text")


@pytest.mark.slow
def test_timing_table():
    rows = [line.split(" | ") for line in timing.measure(rounds=1, batch=4, length=64).splitlines()[2:]]
    names = [(paired.LABELS[m], form if len(forms) > 1 else "") for m, forms in timing.FORMS.items() for form in forms]
    assert [(row[0].strip("| "), row[1].strip()) for row in rows] == names
    assert rows[0][3] == "1.00 (1.00 to 1.00)" and all(float(row[2]) > 0 for row in rows)
