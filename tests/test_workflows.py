"""The workflows in .github: what must hold in their text, and, where they are installed, what the linters say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GPU = (ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def code(path: Path) -> str:
    """Without comments: what is said about a trigger in words is no trigger."""
    return re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8"))


def jobs(path: Path) -> dict[str, str]:
    """The text of each job, by name."""
    _, _, body = code(path).partition("\njobs:\n")
    parts = re.split(r"^  ([\w-]+):\n", body, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands(path: Path) -> list[str]:
    """The lines of every `run:`, on one line or in a block."""
    found = re.findall(r"^ +run: (?!\|)(.+)$", code(path), flags=re.M)
    for indent, block in re.findall(r"^( +)run: \|\n((?:\1  .*\n|\n)+)", code(path), flags=re.M):
        found += [line.strip() for line in block.splitlines() if line.startswith(indent)]
    return found


def test_the_parsing_sees_everything():
    assert [path.name for path in FILES] == ["ci.yml", "gpu.yml", "wheels.yml"]
    assert [list(jobs(path)) for path in FILES] == [["lint", "test", "wheel", "long"], ["gpu"], ["wheels", "sdist"]]
    runs = [line for path in FILES for line in commands(path)]
    assert len(runs) >= sum(code(path).count(" run: ") for path in FILES)
    assert "make lint" in runs and any("-m benchmarks.gpu_suite" in line for line in runs)


@each
def test_a_fork_gets_no_rights(path):
    text = code(path)
    assert "pull_request_target" not in text and "workflow_run" not in text and "secrets." not in text
    assert "\npermissions: {}\n" in text and "write" not in re.sub(r"\bwrite_\w+", "", text)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")


@each
def test_every_job_has_an_end_and_every_workflow_a_group(path):
    assert "\nconcurrency:" in code(path)
    for name, text in jobs(path).items():
        assert "    timeout-minutes: " in text, name


@each
def test_actions_are_pinned_by_commit_with_the_version_beside_it(path):
    uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@each
def test_no_expression_of_an_event_reaches_a_shell(path):
    """What a pull request's author writes would become part of the command."""
    assert not [line for line in commands(path) if "${{" in line]


def test_only_jobs_that_guard_against_forks_run_on_a_runner_of_the_users():
    (guard,) = re.findall(r"^    if: >-\n((?:      .*\n)+)", GPU, flags=re.M)
    condition = " ".join(guard.split())
    assert condition.startswith("github.event_name != 'pull_request' || (")
    assert "(github.event.pull_request.head.repo.full_name == github.repository && contains(" in condition
    assert condition.count("||") == 2 and condition.endswith("))")  # the second one within the last parentheses
    own = [(path.name, name) for path in FILES for name, text in jobs(path).items() if "self-hosted" in text]
    assert own == [("gpu.yml", "gpu")]


def test_the_gpu_workflow_fails_without_a_gpu_and_keeps_its_report():
    """test_gpu_suite.py::test_without_a_gpu: the one command says so by its exit code."""
    (suite,) = [line for line in commands(ROOT / ".github" / "workflows" / "gpu.yml") if "benchmarks." in line]
    assert "benchmarks.gpu_suite" in suite and "|| true" not in GPU and "continue-on-error" not in GPU
    (folder,) = re.findall(r"--out (\S+)", suite)
    upload = GPU[GPU.index("actions/upload-artifact@") - 80 :]
    assert "if: ${{ always() }}" in upload and f"path: {folder}\n" in upload


@each
def test_what_a_workflow_calls_exists(path):
    targets = re.findall(r"^([\w-]+):", MAKEFILE, flags=re.M)
    for line in commands(path):
        for called in re.findall(r"\bmake ([\w-]+)", line):
            assert called in targets, line
        for module in re.findall(r"-m (benchmarks\.\w+|drsn_kernels)\b", line):
            place = ROOT / module.replace(".", "/")
            # in a wheel's own test the package's sources have been taken away
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file() or "clean/bin" in line, line
        for file in re.findall(r"\btests/\w+\.py", line):
            assert (ROOT / file).is_file(), line
    for file in re.findall(r"constraints: (\S+?),? }", code(path)):
        assert (ROOT / file).is_file(), file


def test_ci_runs_what_the_local_ci_runs():
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    runs = commands(FILES[0])
    for target in re.findall(r"make ([\w-]+)", re.sub(r"#.*|echo.*", "", local)):
        assert any(re.match(rf"make {target}\b", line) for line in runs), target


def linter(name: str) -> str:
    """The program beside this Python, where `make lint` puts it."""
    program = Path(sys.executable).with_name(name)
    if not program.is_file():
        pytest.skip(f"{name} is not installed; make lint installs it")
    return str(program)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, FILES)),
        ("check-jsonschema", "--builtin-schema", "vendor.dependabot", str(ROOT / ".github" / "dependabot.yml")),
        ("zizmor", "--offline", str(ROOT / ".github")),
    ],
    ids=["workflows", "dependabot", "zizmor"],
)
def test_linters(command):
    done = subprocess.run([linter(command[0]), *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- CONTRIBUTING.md -------------------------------------------------------------------------------------------------


def test_what_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.M))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]+)`", text):
        assert (ROOT / path).exists(), path
    named = 0
    for item in re.split(r"\n\n|\n(?=\d\. |\* )", text):
        quoted = re.findall(r"`([^`\n]+)`", item)
        files = [ROOT / word for word in quoted if re.fullmatch(r"(\w+/)+\w+\.\w+", word)]
        if not files or item.startswith("|"):
            continue
        beside = [word for word in quoted if re.fullmatch(r"\w+\.py", word)]
        files += [ROOT / word if (ROOT / word).exists() else files[-1].parent / word for word in beside]
        sources = "".join(file.read_text(encoding="utf-8") for file in files)
        for word in quoted:  # a name is found in one of the files that stand in the same item
            if re.fullmatch(r"[A-Za-z_]\w*|[A-Z]\w*\.\w+", word):
                assert re.search(rf"\b{word.split('.')[-1]}\b", sources), f"{word}: {item}"
                named += 1
    assert named > 20
