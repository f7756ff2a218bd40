"""What is installed, how it pairs, and which implementation each operation uses here and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess

import wireframe

# torch's minor release -> the triton it is built with and tested against.
TRITON_OF_TORCH = {
    "2.8": "3.4", "2.9": "3.5", "2.10": "3.6", "2.11": "3.6", "2.12": "3.7", "2.13": "3.7",
}  # fmt: skip

_PACKAGES = (
    "numpy", "pillow", "pyarrow", "safetensors", "huggingface-hub", "matplotlib", "tqdm", "hoho2025", "datasets",
    "pycolmap",
)  # fmt: skip
_OPTIONAL = {
    "hoho2025": "no scores and no handcrafted rival: pip install hoho2025",
    "datasets": "not needed; load_dataset is another way to open prepared shards",
    "pycolmap": "not needed; used by the tests",
}


def describe_machine() -> str:
    """The report of ``wireframe doctor`` as text, one fact a line."""
    return "\n".join([*_versions(), "", *_accelerator(), "", *_modules(), "", "operations:", *_operations()])


def _versions() -> list[str]:
    lines = [
        f"wireframe {wireframe.__version__}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores",
    ]
    for name in _PACKAGES:
        found = _version(name)
        if found is None and name in _OPTIONAL:
            lines.append(f"{name}: not installed ({_OPTIONAL[name]})")
        else:
            lines.append(f"{name} {found or 'not installed: pip install ' + name}")
    return lines


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _accelerator() -> list[str]:
    import torch

    lines = [f"torch {torch.__version__}", _triton_line(torch.__version__, _version("triton"))]
    built = torch.version.cuda
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        lines.append(f"CUDA {built} in torch; device 0 is {name} (sm_{major}{minor})")
    elif built:
        lines.append(f"CUDA {built} in torch, but no usable device: everything runs on the CPU")
    else:
        lines.append("torch is a CPU build: everything runs on the CPU")
    lines.append(_nvcc_line())
    return lines


def _triton_line(torch_version: str, triton_version: str | None) -> str:
    minor = ".".join(torch_version.split(".")[:2])
    wanted = TRITON_OF_TORCH.get(minor)
    if triton_version is None:
        return "triton: not installed (needed on a GPU only)"
    if wanted is None:
        return f"triton {triton_version}: torch {minor} is outside the tested range 2.8-2.13"
    if triton_version.startswith(wanted + "."):
        return f"triton {triton_version}: the one torch {minor} is built with"
    return f"triton {triton_version}: torch {minor} is built with {wanted}; pip install 'triton=={wanted}.*'"


def _nvcc_line() -> str:
    home = os.environ.get("CUDA_HOME")
    path = (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")
    if path is None:
        return "nvcc: not found (needed to build wireframe._C_cuda only)"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        return f"nvcc: {path} does not run ({problem})"
    found = re.search(r"release (\d+\.\d+)", text)
    release = found.group(1) if found else "of unknown release"
    return f"nvcc {release}: builds wireframe._C_cuda, whatever torch's CUDA is"


def _modules() -> list[str]:
    from wireframe.kernels import native

    return [native.describe(name) for name in native.NAMES]


def _operations() -> list[str]:
    import torch

    from wireframe.kernels import dispatch

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [f"  {line}" for op in dispatch.BUILT for line in dispatch.why(op, devices)]
