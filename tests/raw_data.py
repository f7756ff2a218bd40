"""Small raw rows, COLMAP ZIPs and tars for the tests, made without the package's own writers."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import numpy as np
from PIL import Image

from wireframe.classes import ADE_NAMES, GESTALT_NAMES, ids_to_colors

HEIGHT, WIDTH = 24, 32


def colmap_zip(text: str | None = None, name: str = "points3D.txt", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A COLMAP ZIP with the points (0, 0, 5), (1, 2, 3) and (-1, 0.5, 4), or with ``text``."""
    if text is None:
        text = ("# 3D point list\n1 0 0 5 10 20 30 0.5 1 2 3 4\n2 1 2 3 1 2 3 0.1\n"
                "\n7 -1.0 5e-1 4.0 0 0 0 1 9 9 9 9 9 9\n")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("cameras.txt", "1 PINHOLE 32 24 30 30 16 12\n")
        archive.writestr("images.txt", "")
        archive.writestr(name, text)
    return buffer.getvalue()


def label_maps(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random ade and gestalt ids [H, W] (no ADE class that shares its colour) and their colours."""
    rng = np.random.default_rng(seed)
    ade = rng.integers(0, len(ADE_NAMES), (HEIGHT, WIDTH)).astype(np.uint8)
    # road;route has the colour of skyscraper.
    ade[ade == ADE_NAMES.index("road;route")] = 0
    gestalt = rng.integers(0, len(GESTALT_NAMES), (HEIGHT, WIDTH)).astype(np.uint8)
    return ade, gestalt, ids_to_colors(ade, "ade"), ids_to_colors(gestalt, "gestalt")


def raw_row(views: int = 3, order_id: str = "house1", seed: int = 0) -> dict:
    """A row of good views as ``datasets`` gives it: PIL images and nested lists."""
    maps = [label_maps(seed * 100 + index) for index in range(views)]
    angle = [0.3 * index for index in range(views)]
    return {
        "order_id": order_id,
        "image_ids": [f"img_{index}" for index in range(views)],
        "ade": [Image.fromarray(m[2]) for m in maps],
        "gestalt": [Image.fromarray(m[3]) for m in maps],
        "depth": [Image.fromarray(np.full((HEIGHT, WIDTH), 1000 + index, dtype=np.uint16)) for index in range(views)],
        "K": [[[30.0, 0.0, 16.0], [0.0, 31.0, 12.0], [0.0, 0.0, 1.0]] for _ in range(views)],
        "R": [[[float(np.cos(a)), 0.0, float(np.sin(a))], [0.0, 1.0, 0.0],
               [-float(np.sin(a)), 0.0, float(np.cos(a))]] for a in angle],
        "t": [[[0.1], [0.2], [5.0 + index]] for index in range(views)],
        "pose_only_in_colmap": [False] * views,
        "wf_vertices": [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
        "wf_edges": [[0, 1], [1, 2]],
        "wf_classifications": [2, 6],
        "colmap": colmap_zip(),
    }


def png(image) -> bytes:
    """PNG bytes of a PIL image or an array."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def npy(array) -> bytes:
    """.npy bytes of an array."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT,
              mode: str = "w") -> bytes:
    """A tar of the members in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def hub_members(row: dict, arrays: bool = True) -> dict[str, bytes]:
    """The members of a row in the documented grouping ``key.column.imageid.ext``; cameras as one array for all views
    with the order in image_ids, or one file a view and no image_ids."""
    key = row["order_id"]
    members = {f"{key}.image_ids.json": json.dumps(row["image_ids"]).encode()} if arrays else {}
    for column in ("ade", "gestalt", "depth"):
        for image_id, image in zip(row["image_ids"], row[column]):
            if image is not None:
                members[f"{key}.{column}.{image_id}.png"] = png(image)
    for column in ("K", "R", "t"):
        if arrays:
            members[f"{key}.{column}.npy"] = npy(np.asarray(row[column], dtype=np.float64))
        else:
            for image_id, value in zip(row["image_ids"], row[column]):
                members[f"{key}.{column}.{image_id}.json"] = json.dumps(value).encode()
    members[f"{key}.wf_vertices.npy"] = npy(row["wf_vertices"])
    members[f"{key}.wf_edges.npy"] = npy(row["wf_edges"])
    members[f"{key}.wf_classifications.json"] = json.dumps(row["wf_classifications"]).encode()
    members[f"{key}.colmap.zip"] = row["colmap"]
    return members


def assert_same_scene(left, right) -> None:
    """Two scenes are equal in every array."""
    assert left.order_id == right.order_id
    assert left.dropped == right.dropped
    for name in ("points", "vertices", "edges", "edge_classes"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert [v.image_id for v in left.views] == [v.image_id for v in right.views]
    for a, b in zip(left.views, right.views):
        assert a.index == b.index
        for name in ("K", "R", "t", "ade", "gestalt"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.depth is None) == (b.depth is None)
        if a.depth is not None:
            np.testing.assert_array_equal(a.depth, b.depth)
