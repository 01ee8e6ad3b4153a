"""`python -m drsn_kernels info`: versions, and each backend available or not, with the reason and what to do."""

import importlib.metadata
import os
import platform

from ._extras import EXTRAS, install, package

NO_GPU = "none visible to torch"
# Packages that parts of drsn_kernels need: what pip takes, by name.
OPTIONAL = {package(one): one for extra in EXTRAS.values() for one in extra}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def collect() -> dict:
    """Everything `info` prints, as a dict that JSON can hold. Works where the package itself does not import."""
    report: dict = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "optional": {name: _version(name) for name in OPTIONAL},
    }
    try:
        import torch
    except ImportError as error:
        report["torch"] = f"missing ({error})"
        return report
    report["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"
    report["gpu"] = _gpu(torch)
    try:
        import drsn_kernels
        from drsn_kernels import backends
    except Exception as error:  # the report has to come out above all when the import is what is broken
        report["drsn_kernels"] = f"does not import: {type(error).__name__}: {error}"
        return report
    report["drsn_kernels"] = f"{drsn_kernels.__version__} in {os.path.dirname(drsn_kernels.__file__)}"
    report["backends"] = {name: backend.describe() for name, backend in backends.BACKENDS.items()}
    report["launcher"] = backends.BACKENDS["triton"].launcher()
    report["choice"] = f"DRSN_BACKEND={os.environ.get('DRSN_BACKEND', 'auto')}"
    return report


def _gpu(torch) -> str:
    if not torch.cuda.is_available():
        return NO_GPU
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def show(report: dict) -> None:
    """Print a report of :func:`collect`: names, and what belongs to each in a column beside them."""
    lines = [(key, report[key]) for key in ("drsn_kernels", "torch", "python", "system", "cpu", "gpu") if key in report]
    if "backends" in report:
        lines.append(("backends", f"chosen by device, dtype and layout; {report['choice']}"))
        lines += [(f"  {name}", text) for name, text in report["backends"].items()]
        if report["gpu"] != NO_GPU:
            lines.append(("GPU launcher", report["launcher"]))
    lines.append(("optional packages", ""))
    for name, version in report["optional"].items():
        lines.append((f"  {name}", version or f"missing: {install([OPTIONAL[name]])}"))
    width = max(len(name) for name, _ in lines if name != "optional packages") + 2
    for name, text in lines:
        print(f"{name:{width}s}{text}".rstrip())
