"""One distribution, one import name: kernels/, train/ and bench/ install inside the package ``wireframe``.

A top-level ``kernels`` would overwrite the Hugging Face package of that name, so the folders are mapped here.
The compiled modules are built by csrc/native_build.py.
"""

import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from native_build import INFO, NAMES, BuildNative

FOLDERS = ("kernels", "train", "bench")

version = re.search(r'__version__ = "([^"]+)"', Path("wireframe/__init__.py").read_text()).group(1)
mapped = [
    f"wireframe.{package}"
    for folder in FOLDERS
    for package in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
]


def listed(patterns):
    return [path.as_posix() for path in INFO["files"](Path("csrc"), patterns)]


setup(
    version=version,
    packages=[*find_packages(include=["wireframe", "wireframe.*"]), *mapped],
    package_dir={"wireframe": "wireframe", **{f"wireframe.{folder}": folder for folder in FOLDERS}},
    package_data={
        "wireframe": ["assets/**/*"], "wireframe.train": ["configs/*.json"], "wireframe.bench": ["*.sh", "suite/*"],
    },
    ext_modules=[
        Extension(f"wireframe.{name}", listed(INFO["SOURCES"][name]), depends=listed(INFO["HEADERS"][name]))
        for name in NAMES
    ],
    cmdclass={"build_ext": BuildNative},
)
