"""View fusion: every point is projected into every view and gets the label most views agree on.

The steps are the operations of ``wireframe.kernels.ops``; ``depth.py`` and ``voting.py`` are their readable references.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from wireframe.scene import Scene

if TYPE_CHECKING:
    from wireframe.scene_batch import SceneBatch

SOURCE_COLMAP, SOURCE_DEPTH = 0, 1


@dataclasses.dataclass(frozen=True)
class LabelledPoints:
    """Points with their fused labels; ``order_id`` and the ground truth travel with them.

    Attributes:
        xyz: float32 [P, 3] world metres.
        source: uint8 [P], 0 COLMAP, 1 depth.
        keep: bool [P], survives fusion (support >= 1 and at least one visible vote).
        visible_src: uint8 [P], 0 none, 1 gestalt, 2 ADE.
        visible_id: int16 [P], class id in that table, -1 none.
        behind_gest_id: int16 [P], gestalt id behind occluders, -1 none.
        support: uint8 [P], views in which the point lies in the house.
        n_views_voted: uint8 [P], visible votes.
        vote_frac: float32 [P], share of the visible votes that agree with the winner, 0 without votes.
        group_id: int8 [P], priority tier 0-4, -1 excluded.
        class_id: uint8 [P], index into ``classes.POINT_CLASSES``.
        order_id, vertices [V, 3] float32, edges [E, 2] int64, edge_classes [E] int64: of the scene.
    """

    xyz: np.ndarray
    source: np.ndarray
    keep: np.ndarray
    visible_src: np.ndarray
    visible_id: np.ndarray
    behind_gest_id: np.ndarray
    support: np.ndarray
    n_views_voted: np.ndarray
    vote_frac: np.ndarray
    group_id: np.ndarray
    class_id: np.ndarray
    order_id: str
    vertices: np.ndarray
    edges: np.ndarray
    edge_classes: np.ndarray

    POINT_ARRAYS = (
        "xyz", "source", "keep", "visible_src", "visible_id", "behind_gest_id", "support", "n_views_voted",
        "vote_frac", "group_id", "class_id",
    )

    def __len__(self) -> int:
        return self.xyz.shape[0]

    def select(self, index: np.ndarray) -> LabelledPoints:
        """The points at ``index`` (boolean mask or positions)."""
        index = np.asarray(index)
        # Taking by position is several times as fast as by a mask, which NumPy goes through row by row.
        positions = np.flatnonzero(index) if index.dtype == bool else index
        return dataclasses.replace(
            self, **{name: getattr(self, name).take(positions, axis=0) for name in self.POINT_ARRAYS}
        )


def fuse_views(
    scene: Scene,
    depth_points_per_view: int = 20000,
    seed: int = 0,
    *,
    zbuffer: float | None = None,
    impl: str = "auto",
    threads: int | None = None,
) -> LabelledPoints:
    """COLMAP points, then depth points of every view, labelled; survivors only.

    Args:
        scene: a scene as ``read_scene`` gives it.
        depth_points_per_view: depth pixels drawn per view (20,000 at inference, 8,000 for training data).
        seed: with the scene's id and the view's position, the key of the draw.
        zbuffer: None, or the relative tolerance of a visibility test in the vote (see ``ops.vote_labels``).
        impl: "auto", "native" or "reference"; all give the same bits.
        threads: of the native implementation; None = torch's number.

    Returns:
        LabelledPoints with ``keep`` True everywhere.

    Raises:
        ValueError: a negative count. ImplementationError: an explicit ``impl`` that cannot run.
    """
    from wireframe.kernels import ops
    from wireframe.scene_batch import SceneBatch

    how = {"impl": impl, "threads": threads}
    batch = SceneBatch.from_scenes([scene])
    mask, limits = ops.house_mask(batch, **how), ops.clip_limits(batch, **how)
    drawn, counts = ops.depth_points(batch, mask, limits, depth_points_per_view, seed, **how)
    # NumPy, not torch.cat: torch's thread pool would have to wake up for it, and a forked child of its would hang.
    xyz = np.concatenate([scene.points, *(points[:count] for points, count in zip(drawn.numpy(), counts.tolist()))])
    source = np.full(len(xyz), SOURCE_DEPTH, dtype=np.uint8)
    source[: len(scene.points)] = SOURCE_COLMAP
    return _labelled(xyz, source, batch, scene, zbuffer, how, survivors_only=True)


def label_points(
    xyz: np.ndarray,  # [P, 3]
    scene: Scene,
    *,
    zbuffer: float | None = None,
    impl: str = "auto",
    threads: int | None = None,
) -> LabelledPoints:
    """Fused labels of arbitrary world points.

    Args:
        xyz: float32 [P, 3] world metres.
        scene: the scene whose views vote.
        zbuffer, impl, threads: as in ``fuse_views``.

    Returns:
        LabelledPoints of all P points (source 0); where ``keep`` is False the arrays hold what the votes gave.

    Raises:
        ValueError: ``xyz`` is not [P, 3]. ImplementationError: an explicit ``impl`` that cannot run.
    """
    from wireframe.scene_batch import SceneBatch

    xyz = np.array(xyz, dtype=np.float32)
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"xyz must be [P, 3], got {list(xyz.shape)}")
    batch = SceneBatch.from_scenes([scene], depth=False)
    source = np.full(len(xyz), SOURCE_COLMAP, dtype=np.uint8)
    return _labelled(xyz, source, batch, scene, zbuffer, {"impl": impl, "threads": threads})


def _labelled(
    xyz: np.ndarray,
    source: np.ndarray,
    batch: SceneBatch,
    scene: Scene,
    zbuffer: float | None,
    how: dict,
    survivors_only: bool = False,
) -> LabelledPoints:
    import torch

    from wireframe.kernels import ops

    votes = ops.vote_labels(batch, torch.from_numpy(xyz), torch.tensor([0, len(xyz)]), zbuffer=zbuffer, **how)
    group_id, class_id = ops.point_tiers(votes.visible_src, votes.visible_id, votes.behind, **how)
    points = LabelledPoints(
        xyz=xyz,
        source=source,
        keep=(votes.support.numpy() >= 1) & (votes.n_views_voted.numpy() >= 1),
        visible_src=votes.visible_src.numpy(),
        visible_id=votes.visible_id.numpy(),
        behind_gest_id=votes.behind.numpy(),
        support=votes.support.numpy(),
        n_views_voted=votes.n_views_voted.numpy(),
        vote_frac=votes.vote_frac.numpy(),
        group_id=group_id.numpy(),
        class_id=class_id.numpy(),
        order_id=scene.order_id,
        vertices=scene.vertices,
        edges=scene.edges,
        edge_classes=scene.edge_classes,
    )
    return points.select(points.keep) if survivors_only else points
