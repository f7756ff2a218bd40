"""wireframe: 3D building wireframes from multi-view scans (the S23DR 2026 learned baseline, exact and fast).

``import wireframe`` needs NumPy and torch alone; each public name loads its module on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path

__version__ = "0.1.0"

# An uninstalled checkout keeps kernels/, train/ and bench/ beside the package; an installed one inside it.
_ROOT = Path(__file__).resolve().parent.parent
if not (Path(__file__).resolve().parent / "kernels").is_dir() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT))

_PUBLIC = {
    "Scene": "scene",
    "SceneError": "errors",
    "WireframeError": "errors",
    "read_scene": "scene",
    "LabelledPoints": "fusion",
    "label_points": "fusion",
    "fuse_views": "fusion",
    "SampledScene": "sampling",
    "sample_points": "sampling",
    "read_sample": "samples",
    "Perceiver": "perceiver",
    "PerceiverConfig": "perceiver",
    "Prediction": "perceiver",
    "Wireframe": "graph",
    "predict_wireframe": "predict",
    "Score": "scoring",
    "score": "scoring",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'wireframe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wireframe.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
