import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import wireframe
from wireframe import classes

ROOT = Path(__file__).resolve().parent.parent


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, *arguments, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


def test_the_core_imports_with_numpy_and_torch_alone():
    done = run(
        """
        import importlib.abc, sys
        sys.path.insert(0, ".")
        allowed = {"wireframe", "numpy", "torch", "triton"}
        heavy = {"PIL", "pyarrow", "safetensors", "huggingface_hub", "scipy", "tqdm", "matplotlib", "hoho2025",
                 "datasets", "pycolmap", "trimesh", "plotly", "cv2", "pandas"}
        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in heavy:
                    raise ImportError(name)
        sys.meta_path.insert(0, Refuse())
        import wireframe
        for name in wireframe.__all__:
            getattr(wireframe, name)
        import wireframe.kernels.ops, wireframe.train.loss, wireframe.cli, wireframe.synth, wireframe.evaluate
        wireframe.Perceiver()
        """
    )
    assert done.returncode == 0, done.stderr


def test_import_wireframe_is_light():
    done = run("import sys; sys.path.insert(0, '.'); import wireframe; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("folder", ["kernels", "train", "bench"])
def test_the_folders_refuse_their_bare_names(folder):
    done = run(f"import sys; sys.path.insert(0, '.'); import {folder}")
    assert done.returncode == 1 and "ImportError" in done.stderr and f"wireframe.{folder}" in done.stderr


def test_every_public_name_is_there_and_unknown_ones_are_not():
    assert all(hasattr(wireframe, name) for name in wireframe.__all__)
    assert set(wireframe.__all__) <= set(dir(wireframe))
    assert callable(wireframe.score)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wireframe.nonsense


def test_class_tables_equal_those_of_the_challenge():
    mappings = pytest.importorskip("hoho2025.color_mappings")
    assert list(classes.GESTALT_COLORS.items()) == [(n, tuple(c)) for n, c in mappings.gestalt_color_mapping.items()]
    assert list(classes.ADE_COLORS.items()) == [(n, tuple(c)) for n, c in mappings.ade20k_color_mapping.items()]
    assert dict(classes.EDGE_ID) == mappings.EDGE_CLASSES


def test_a_colour_that_two_classes_share_is_the_later_one_and_an_unknown_colour_is_unknown():
    import numpy as np

    image = np.array([[[140, 140, 140], [1, 2, 3]]], dtype=np.uint8)
    ids = classes.colors_to_ids(image, "ade")
    assert ids.tolist() == [[classes.ADE_ID["skyscraper"], classes.UNKNOWN]]


def test_no_file_is_too_long_to_be_about_one_thing():
    files = [p for folder in ("wireframe", "kernels", "train", "bench", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    assert [str(p) for p in files if len(p.read_text().splitlines()) > 450] == []
