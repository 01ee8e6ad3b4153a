"""`python -m drsn_kernels`, or `drsn`: help, options that contradict each other, full disks, and what `info` says."""

import errno
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_files import idx
from oracle import seeded
from repository import ROOT

import drsn_kernels as dk
from drsn_kernels import __main__, _extras, info
from drsn_kernels.__main__ import COMMANDS, main
from drsn_kernels.train import files

HELP = [[], *([name] for name in COMMANDS)]


def printed(capsys, *arguments):
    """What argparse prints before it ends the process with status 0."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


def pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 has none")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# ---- help ------------------------------------------------------------------------------------------------------------


def test_version(capsys):
    assert printed(capsys, "--version") == f"drsn_kernels {dk.__version__}\n"
    assert f"\nversion: {dk.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_without_a_command_the_help_comes(capsys):
    assert main([]) == 2
    error = capsys.readouterr().err
    assert all(f"\n    {name} " in error for name in COMMANDS) and "COMMAND --help" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_description_and_examples(name, capsys):
    text = printed(capsys, name, "--help")
    assert COMMANDS[name].description in text and len(COMMANDS[name].examples) >= 2
    for example, what in COMMANDS[name].examples:
        assert f"{__main__.program()} {example} " in text and f"# {what}\n" in text
        options = __main__._parser().parse_args(__main__.train_arguments.join_snr(shlex.split(example)))
        assert options.command == name
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("started, program", [("/usr/bin/drsn", "drsn"), ("C:\\drsn.exe", None), ("-m", None),
                                              ("/x/drsn_kernels/__main__.py", "python -m drsn_kernels")])  # fmt: skip
@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_names_the_program_as_it_was_started(monkeypatch, capsys, arguments, started, program):
    monkeypatch.setattr(sys, "argv", [started])
    text = printed(capsys, *arguments, "--help")
    assert text.startswith(f"usage: {program or 'python -m drsn_kernels'} ")
    assert ("python -m" in text) == (program != "drsn")


@pytest.mark.slow
def test_the_script_is_the_same_program():
    module, _, function = pyproject()["scripts"]["drsn"].partition(":")
    assert getattr(importlib.import_module(module), function) is main
    script = Path(sys.executable).with_name("drsn")
    if script.exists():  # beside an installed package
        done = subprocess.run([script, "--version"], capture_output=True, text=True)
        assert done.stdout == f"drsn_kernels {dk.__version__}\n", done.stderr


# ---- optional packages -----------------------------------------------------------------------------------------------


def test_the_extras_are_those_of_pyproject():
    extras = pyproject()["optional-dependencies"]
    assert {name: extras[name] for name in _extras.EXTRAS} == {k: list(v) for k, v in _extras.EXTRAS.items()}


@pytest.mark.parametrize("module, extra, command", [
    ("scipy.signal", "train", "pip install scipy h5py"),
    ("sklearn.datasets", "train", "pip install scipy h5py scikit-learn"),
    ("triton", "triton", 'pip install "triton>=3.5"'),
])  # fmt: skip
def test_a_missing_package_is_named_with_what_else_is_missing(monkeypatch, module, extra, command):
    there = {"numpy", "matplotlib", "tqdm", "sklearn"}
    monkeypatch.setattr(_extras.importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as refused:
        _extras.require(module, extra)
    assert str(refused.value).startswith(f"{module} is needed here and could not be imported (")
    assert str(refused.value).endswith(f": {command}") and "\n" not in str(refused.value)


def test_no_text_says_that_the_name_is_on_an_index():
    """Before it is published, somebody else's package may be there."""
    places = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "examples").iterdir()]
    places += Path(dk.__file__).parent.rglob("*.py")
    texts = {place: place.read_text("utf-8").replace('"', "").replace("'", "") for place in places if place.is_file()}
    said = [str(place) for place, text in texts.items() if "pip install drsn" in text]
    assert len(places) > 50 and said == []


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_has_one_column(capsys, monkeypatch):
    monkeypatch.setattr(info, "_version", lambda name: None if name == "timm" else "1.0")
    report = info.collect() | {"gpu": "a GPU"}
    info.show(report)
    lines = capsys.readouterr().out.splitlines()
    lines.remove("optional packages")
    column = lines[0].index(report["drsn_kernels"])
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines), lines
    assert len(lines) == 8 + len(report["backends"]) + len(report["optional"])
    assert [line[column:] for line in lines if line.startswith("  timm ")] == ["missing: pip install timm"]
    info.show(report | {"gpu": info.NO_GPU})
    assert "launcher" not in capsys.readouterr().out  # of what is not launched


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """_extras.py in a package of its own, in a folder without anything else."""
    package = tmp_path / "copied_package"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(_extras.__file__, package)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("copied_package._extras"), package
    for name in [name for name in sys.modules if name.startswith("copied_package")]:
        del sys.modules[name]


def test_why_nothing_is_compiled(copied, monkeypatch):
    extras, package = copied
    error = ImportError("undefined symbol: f")
    assert extras.unbuilt("_cpu", error).endswith("has no compiled drsn_kernels._cpu: reinstall it")
    (package.parent / "setup.py").touch()
    installed = "in another folder the installed package is used"
    assert installed in extras.unbuilt("_cpu", error)  # the tests' own
    monkeypatch.setattr(extras.importlib.metadata, "distributions", lambda name: [])
    assert extras.unbuilt("_cpu", error).endswith(f"to compile it: pip install -e {package.parent}")
    (package / "_build.py").write_text("MISSING = 'there is no compiler'")
    assert extras.unbuilt("_cpu", error) == "there is no compiler"
    del sys.modules["copied_package._build"]
    (package / "_build.py").write_text("MISSING = None  # and this a line longer than before")
    assert "drsn_kernels._launch was not built; " in extras.unbuilt("_launch", error)
    (package / "_cpu.cpython-311.so").touch()
    assert extras.unbuilt("_cpu", error) == "the compiled drsn_kernels._cpu does not load: undefined symbol: f"


@pytest.mark.slow
def test_info_in_the_source_tree():
    if not (ROOT / "drsn_kernels").exists() or (ROOT / "drsn_kernels" / "_build.py").exists():
        pytest.skip("the source tree is not here, or compiled in place")
    done = subprocess.run([sys.executable, "-m", "drsn_kernels", "info"], capture_output=True, text=True, cwd=ROOT)
    (cpu,) = [line for line in done.stdout.splitlines() if line.startswith("  cpu ")]
    assert "not available: this is the source tree, where nothing is compiled; in another folder" in cpu, done.stderr
    assert "circular" not in done.stdout


# ---- options that contradict each other ------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ("train --noise none --snr 5", "--snr is the level of --noise, got --noise none: leave one of the two out"),
    ("train --without-normal", "--without-normal leaves out Normal_*.mat of --data FOLDER, got no --data"),
    ("train --task image --without-normal", "--without-normal belongs to --task vibration, got --task image"),
    ("train --test-speakers a,b", "--test-speakers belongs to --task speech, got --task vibration"),
    ("train --device cpu --graph", "--graph needs a CUDA device, got --device cpu"),
    ("train --device cpu:1", "--device must be cpu, cuda or cuda:INDEX, got 'cpu:1'"),
    ("train --resume", "--resume needs a run in --out, but out has no config.json"),
    ("demo --seed -1", "seed must be a whole number from 0 to 2^62 - 1, got -1"),
    ("demo --epochs 0 --quick", "epochs must be at least 1, got 0"),
])  # fmt: skip
def test_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, *rest = options.split()
    assert main([command, *rest, "--out", "out"]) == 1
    assert f"error: {message}" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_device_of_one_for_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--device", "cpu:0"]) == 1
    assert "--device must be cpu for 2 processes, each takes its own, got 'cpu:0'" in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in ("demo", "train"):
        assert main([command, "--out", str(tmp_path / "file")]) == 1
        assert f"out must be a folder, got the file {tmp_path / 'file'}\n" in capsys.readouterr().err


# ---- a full disk, a folder that takes nothing ------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, capsys, monkeypatch, one_thread):
    """`train` on seven images, two epochs; what it printed, or with `refused` the one sentence it ended with."""
    pytest.importorskip("matplotlib", reason="the command asks for it")
    monkeypatch.setattr("drsn_kernels.train.command._draw", lambda *results: [])  # half a second each time
    for part, count in (("train", 7), ("t10k", 3)):
        pixels = torch.randint(1, 256, (count, 8, 8), generator=seeded(count))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(torch.arange(count) % 2))
    new = ["--task", "image", "--data", str(tmp_path), "--model", "resnet", "--epochs", "2"]

    def train(out, *options, refused=False):
        options = options or new
        status = main(["train", "--out", str(out), "--device", "cpu", *options])
        said = capsys.readouterr()
        assert status == refused, said.err
        assert not refused or (said.err.startswith("error: ") and said.err.count("\n") == 1), said.err
        return said.err if refused else said.out

    return train


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["network"]


# What is written, in order; a run's folder holds a row for each of them that is whole.
WRITTEN = ("config.json", "checkpoint.pt", "log.csv", "checkpoint.pt", "log.csv", "results.json")


@pytest.mark.parametrize("number", range(len(WRITTEN)))
def test_a_full_disk_loses_nothing(number, tmp_path, train, monkeypatch):
    """At each file that a run writes, in turn; then there is room again."""
    whole, out = tmp_path / "whole", tmp_path / "a run"
    train(whole)
    real, count = os.fsync, iter(range(100))

    def fsync(descriptor):
        if next(count) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        error = train(out, refused=True)
    kept = ", what was there is kept" if number in (3, 4) else ""
    assert f"error: {out / WRITTEN[number]} cannot be written{kept}: No space left on device" in error
    assert not list(out.glob(".*"))
    if number == 0:
        train(out)
    else:
        again = error.rpartition("continue with: ")[2]
        assert shlex.split(again) == [*__main__.program().split(), "train", "--resume", "--out", str(out)]
        train(out, "--resume")
    torch.testing.assert_close(weights(out), weights(whole), rtol=0, atol=0)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("write", [files.write_checkpoint, files.write_json], ids=["checkpoint", "json"])
def test_the_systems_own_error_is_said(tmp_path, write):
    path = tmp_path / "file"
    write(path, {"x": 1})
    before = path.read_bytes()
    (tmp_path / ".file.part").symlink_to("/dev/full")
    content = {"x": torch.ones(100_000)} if write is files.write_checkpoint else {"x": "1" * 100_000}
    with pytest.raises(OSError, match="file cannot be written, what was there is kept: No space left on device$"):
        write(path, content)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("options", [(), ("--resume",)], ids=["new", "resumed"])
def test_a_folder_that_takes_nothing_is_said_before_training(options, tmp_path, train, monkeypatch):
    out = tmp_path / "out"
    if options:
        train(out)

    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{dir}/tmp123")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("drsn_kernels.train.run.train_step", lambda *arguments: pytest.fail("trained"))
    assert train(out, *options, refused=True) == f"error: --out {out} cannot be written: Read-only file system\n"


def test_a_file_that_is_not_there_is_named_without_a_number(capsys):
    def fail():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x.csv")

    assert _extras.exit_status(fail) == 1 and capsys.readouterr().err == "error: x.csv: No such file or directory\n"
