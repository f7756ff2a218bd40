import io
import json

import numpy as np
import pytest

from view_cases import wires
from wireframe import mesh_formats
from wireframe.cli import main
from wireframe.errors import MissingPackageError
from wireframe.graph import empty_wireframe
from wireframe.mesh_formats import file_name, write_meshes
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.shards import ShardWriter
from wireframe.synth import SynthConfig, make_scene

trimesh = pytest.importorskip("trimesh")
TRIANGLE = wires([[0, 0, 0], [3, 0, 0], [0, 4, 1]], [[0, 1], [1, 2]])


@pytest.mark.parametrize("file_format", ["obj", "ply"])
def test_a_mesh_is_tubes_along_the_edges_and_balls_at_their_ends(tmp_path, file_format):
    written = write_meshes(tmp_path / "new", [("a", TRIANGLE)], file_format)
    assert written.files == [tmp_path / "new" / f"a.{file_format}"] and written.empty == []
    mesh = trimesh.load(written.files[0], force="mesh", process=False)
    assert np.allclose(mesh.bounds, [[-0.096, -0.096, -0.096], [3.096, 4.096, 1.096]], atol=0.01)
    samples = np.concatenate([mesh.vertices, mesh.triangles_center])
    ends = TRIANGLE.vertices[TRIANGLE.edges].astype(float)
    gaps = np.stack([_distances(samples, *pair) for pair in ends])
    assert gaps.min(axis=0).max() < 0.1
    # Both edges have their tube: two parts, and three balls.
    assert mesh.body_count == 5 and mesh.is_watertight and mesh.volume > 0
    again = write_meshes(tmp_path / "again", [("a", TRIANGLE)], file_format)
    assert again.files[0].read_bytes() == written.files[0].read_bytes()


def _distances(points, start, end):
    along = np.clip((points - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return np.linalg.norm(points - start - along[:, None] * (end - start), axis=1)


def test_scenes_without_a_wireframe_get_no_file_and_are_named(tmp_path):
    strange = wires([[np.nan, 0, 0], [0, 0, 0], [1, 0, 0]], [[0, 1], [1, 2], [1, 7]])
    written = write_meshes(tmp_path, [("none", empty_wireframe()), ("odd", strange)], "ply")
    assert written.empty == ["none"] and [path.name for path in written.files] == ["odd.ply"]
    mesh = trimesh.load(io.BytesIO(written.files[0].read_bytes()), file_type="ply")
    assert np.isfinite(mesh.vertices).all() and mesh.body_count == 3


def test_ids_become_plain_file_names_that_differ():
    ids = ["../../x", "a/b", "a\\b", "..", "con", "COM1", "A", "a", "x" * 300, "\ud800", "", "a b", "-rf", "nul.x"]
    names = [file_name(order_id) for order_id in ids]
    assert len({name.lower() for name in names}) == len(ids)
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") and len(name) < 120
        assert name not in (".", "..", "con") and not name.startswith(".")
    assert file_name("synth-0-000001") == "synth-0-000001"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    with ShardWriter(folder / "a.tar") as writer:
        for index in range(2):
            writer.write(make_scene(0, index, SynthConfig(width=96, height=72, colmap_points=600)))
    config = PerceiverConfig(hidden=32, ff=32, latent_tokens=8, latent_layers=1, num_points=64)
    Perceiver(config).save_pretrained(folder / "model")
    return folder


def test_predict_writes_meshes_beside_the_exact_wireframes(workspace, tmp_path, capsys):
    arguments = ["predict", str(workspace / "a.tar"), "--model", str(workspace / "model"), "--quiet"]
    arguments += ["--threshold", "0"]
    assert main([*arguments, str(tmp_path / "out"), "--format", "obj"]) == 0
    assert "2 meshes (.obj)" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "plain.json")]) == 0
    assert (tmp_path / "out" / "wireframes.json").read_bytes() == (tmp_path / "plain.json").read_bytes()
    for entry in json.loads((tmp_path / "plain.json").read_text()):
        mesh = trimesh.load(tmp_path / "out" / f"{entry['order_id']}.obj", force="mesh")
        low, high = np.min(entry["wf_vertices"], axis=0), np.max(entry["wf_vertices"], axis=0)
        assert np.allclose(mesh.bounds, [low - 0.096, high + 0.096], atol=0.03)
    assert main([*arguments, str(tmp_path / "none"), "--format", "ply", "--threshold", "1"]) == 0
    assert "2 scenes have no wireframe" in capsys.readouterr().out


def test_without_trimesh_one_line_says_so_before_any_work(workspace, tmp_path, monkeypatch, capsys):
    def absent():
        raise MissingPackageError("meshes need trimesh: pip install trimesh")

    monkeypatch.setattr(mesh_formats, "require_trimesh", absent)
    assert main(["predict", str(workspace / "a.tar"), str(tmp_path / "out"), "--format", "obj", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "pip install trimesh" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
