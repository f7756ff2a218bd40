"""One distribution, one import name: kernels/, train/ and bench/ install inside the package ``wireframe``.

A top-level ``kernels`` would overwrite the Hugging Face package of that name, so the folders are mapped here.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("kernels", "train", "bench")

version = re.search(r'__version__ = "([^"]+)"', Path("wireframe/__init__.py").read_text()).group(1)
mapped = [
    f"wireframe.{package}"
    for folder in FOLDERS
    for package in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
]

setup(
    version=version,
    packages=[*find_packages(include=["wireframe", "wireframe.*"]), *mapped],
    package_dir={"wireframe": "wireframe", **{f"wireframe.{folder}": folder for folder in FOLDERS}},
    package_data={"wireframe": ["assets/**/*"], "wireframe.train": ["configs/*.json"], "wireframe.bench": ["*.sh"]},
)
