"""What the commands share: optional packages, named clearly when they are missing; the program's name; errors."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

# The extras of pyproject.toml that a part of the package needs: what pip installs for each.
EXTRAS = {
    "demo": ("numpy", "matplotlib", "scipy", "tqdm"),
    "train": ("numpy", "matplotlib", "scipy", "h5py", "tqdm", "scikit-learn"),
    "triton": ("triton>=3.5",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "timm": ("timm",),
}
_IMPORTED_AS = {"scikit-learn": "sklearn"}


def package(requirement: str) -> str:
    """The name before the version: "triton" of "triton>=3.5"."""
    return requirement.split(">")[0]


def _module(requirement: str) -> str:
    return _IMPORTED_AS.get(package(requirement), package(requirement))


def install(requirements: Sequence[str]) -> str:
    """The command that brings them."""
    return "pip install " + " ".join(f'"{one}"' if ">" in one else one for one in requirements)


def installing(extra: str, module: str | None = None) -> str:
    """The command that brings what is missing of an extra, and `module`'s package whether it is there or not."""
    return install([r for r in EXTRAS[extra] if _module(r) == module or importlib.util.find_spec(_module(r)) is None])


def require(module: str, extra: str) -> ModuleType:
    """Import and return ``module``; if it is missing, raise ImportError with the command that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = installing(extra, module.split(".")[0])
        raise ImportError(f"{module} is needed here and could not be imported ({error}): {command}") from error


def unbuilt(extension: str, error: ImportError) -> str:
    """Why the compiled module drsn_kernels.EXTENSION could not be imported, and what to do, in one line."""
    folder = Path(__file__).parent
    if any(folder.glob(f"{extension}.*")):
        return f"the compiled drsn_kernels.{extension} does not load: {error}"
    try:
        from ._build import MISSING  # by setup.py, where the package was installed
    except ImportError:
        if not (folder.parent / "setup.py").exists():
            return f"this copy of the package in {folder} has no compiled drsn_kernels.{extension}: reinstall it"
        others = importlib.metadata.distributions(name="drsn_kernels")
        if any(Path(one.locate_file("drsn_kernels/_build.py")).exists() for one in others):
            return "this is the source tree, where nothing is compiled; in another folder the installed package is used"
        return f"this is the source tree, where nothing is compiled; to compile it: pip install -e {folder.parent}"
    return MISSING or f"drsn_kernels.{extension} was not built; reinstall with DRSN_NATIVE=1 to see why"


def program() -> str:
    """How this process was started, as the reader of a message would start it again."""
    return "drsn" if Path(sys.argv[0]).stem == "drsn" else "python -m drsn_kernels"


def sentence(error: BaseException) -> str:
    """What an error says; of one that the system raised for a file, the file and the reason without a number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def exit_status(run: Callable[[], int]) -> int:
    """What run() returns; where it raises what a user can mend, the error is a sentence on stderr."""
    try:
        return run()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
