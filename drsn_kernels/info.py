"""`python -m drsn_kernels info`: versions, and each backend available or not, with the reason and what to do."""

import importlib
import importlib.metadata
import os
import platform

OPTIONAL = {"numpy": "demo", "scipy": "demo", "matplotlib": "demo", "tqdm": "demo", "triton": "triton"}
OPTIONAL |= {"scikit-learn": "train", "h5py": "train", "onnx": "export", "onnxruntime": "export"}
OPTIONAL |= {"onnxscript": "export", "timm": "timm"}


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
        return "none visible to torch"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def show(report: dict) -> None:
    for key in ("drsn_kernels", "torch", "python", "system", "cpu", "gpu"):
        if key in report:
            print(f"{key:14s}{report[key]}")
    if "backends" in report:
        print(f"backends      chosen by device, dtype and layout; {report['choice']}")
        for name, text in report["backends"].items():
            print(f"  {name:12s}{text}")
        print(f"GPU launcher  {report['launcher']}")
    print("optional packages")
    for name, version in report["optional"].items():
        print(f"  {name:12s}{version or f'missing, in the extra [{OPTIONAL[name]}]'}")
