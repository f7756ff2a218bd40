"""A house: its roof wireframe (the ground truth) and the panels that make it visible."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wireframe.classes import EDGE_ID, EDGE_NAMES, GESTALT_ID
from wireframe.errors import ConfigError
from wireframe.synth import additions, shapes
from wireframe.synth.config import SynthConfig
from wireframe.synth.gables import many_gables
from wireframe.synth.panels import Panel, Place, roof_panels, wall_panels
from wireframe.synth.roofs import Roof

_ATTEMPTS = 200
# Quarter turns that bring the sides of the largest a and of the largest b to where a garage is put.
_FAR_A, _FAR_B = 2, 1
# What a sampled row can hold: scenes of more edges are left out of training.
MAX_EDGES = 64
_SHAPES = {**shapes.SHAPES, "many_gables": many_gables}
_SIDINGS = ("horizontal_siding", "vertical_siding", "brick", "concrete", "other_wall")


@dataclass(frozen=True)
class Building:
    """One house in world coordinates (metres, y up, the ground at y = 0).

    The roof wireframe: ``vertices`` float64 [V, 3], ``edges`` int64 [E, 2], ``edge_classes`` int64 [E]
    (``classes.EDGE_ID``), ``vertex_classes`` int64 [V] (gestalt ids of the corners) and ``faces``, planar, as
    tuples of vertex indices. ``ground_lines`` float64 [G, 2, 3] are the feet of the walls, ``panels`` all
    that is visible; ``radius`` (metres) bounds the roof around ``centre`` [3].
    """

    roof_type: str
    vertices: np.ndarray
    edges: np.ndarray
    edge_classes: np.ndarray
    vertex_classes: np.ndarray
    faces: tuple[tuple[int, ...], ...]
    ground_lines: np.ndarray
    panels: tuple[Panel, ...]
    centre: np.ndarray
    radius: float


def make_building(rng: np.random.Generator, config: SynthConfig = SynthConfig()) -> Building:
    """Draws a house whose vertices keep ``config.min_vertex_distance`` from one another.

    Raises:
        ConfigError: no house of the configured types keeps that distance.
    """
    weights = np.asarray(config.roof_weights, dtype=np.float64)
    kind = config.roof_types[int(rng.choice(len(weights), p=weights / weights.sum()))]
    for _ in range(_ATTEMPTS):
        building = _draw(rng, config, kind)
        if len(building.edges) <= MAX_EDGES and _nearest_pair(building.vertices) >= config.min_vertex_distance:
            return building
    raise ConfigError(f"no {kind} roof keeps min_vertex_distance = {config.min_vertex_distance} m: lower it")


def _draw(rng: np.random.Generator, config: SynthConfig, kind: str) -> Building:
    eave = float(rng.uniform(5.0, 6.0) if rng.random() < config.two_storey_prob else rng.uniform(2.7, 3.3))
    overhang = float(rng.uniform(0.25, 0.5))
    main = _SHAPES[kind](rng, config, eave, overhang)
    roofs = [main]
    wants_garage, wants_porch = rng.random() < config.garage_prob, rng.random() < config.porch_prob
    if wants_garage and eave > 4.5:
        roofs.append(shapes.garage(rng, main, eave, overhang))
    if wants_porch and min(p[1] for p in main.footprint) > 0:
        roofs.append(shapes.porch(rng, main, eave, overhang))
    if config.annexes_range[1]:
        roofs += _annexes(rng, main, eave, overhang, config)
    roofs = [roof for roof in roofs if roof is not None]
    dormers: list[additions.Dormer] = []
    if config.dormers_range[1]:
        dormers = _dormers(rng, main, roofs[1:], config)
    place = _draw_place(rng, main)
    siding = _SIDINGS[int(rng.integers(len(_SIDINGS)))]
    panels: list[Panel] = []
    feet: list[np.ndarray] = []
    for number, roof in enumerate(roofs):
        panels += roof_panels(roof, place)
        more, lines = wall_panels(rng, roof, place, siding, is_main=number == 0)
        panels += more
        feet += lines
    for found in dormers:
        panels += additions.dormer_panels(found, place, siding)
    return _assemble(kind, [*roofs, *(found.roof for found in dormers)], place, panels, feet)


def _annexes(rng: np.random.Generator, main: Roof, eave: float, overhang: float,
             config: SynthConfig) -> list[Roof | None]:
    """Annexes on two sides of the house, which neither the garage (0) nor the porch (the side b = 0) takes."""
    number = int(rng.integers(config.annexes_range[0], config.annexes_range[1] + 1))
    sides = rng.permutation([_FAR_A, _FAR_B])[:number]
    if eave < 4.5:
        return []
    return [additions.annex(rng, main, eave, overhang, int(side)) for side in sides]


def _dormers(rng: np.random.Generator, main: Roof, others: list[Roof],
             config: SynthConfig) -> list[additions.Dormer]:
    low, high = config.dormers_range
    found: list[additions.Dormer] = []
    for _ in range(int(rng.integers(low, high + 1))):
        more = additions.dormer(rng, main, [*others, *(one.roof for one in found)], config.min_vertex_distance)
        if more is not None and not any(_overlap(more.roof, one.roof) for one in found):
            found.append(more)
    return found


def _overlap(p: Roof, q: Roof) -> bool:
    """Whether the boxes around two roofs overlap in the plan."""
    (a, b) = (np.array([(point[0], point[2]) for point in roof.points]) for roof in (p, q))
    return bool((np.maximum(a.min(axis=0), b.min(axis=0)) < np.minimum(a.max(axis=0), b.max(axis=0))).all())


def _draw_place(rng: np.random.Generator, main: Roof) -> Place:
    yaw = float(rng.uniform(0, 2 * math.pi))
    shift = rng.uniform(-2, 2, size=2)
    middle = [(min(p[k] for p in main.footprint) + max(p[k] for p in main.footprint)) / 2 for k in (0, 1)]
    return Place(math.cos(yaw), math.sin(yaw), middle[0], middle[1], float(shift[0]), float(shift[1]))


def _assemble(kind: str, roofs: list[Roof], place: Place, panels: list[Panel],
              feet: list[np.ndarray]) -> Building:
    points: list[tuple[float, float, float]] = []
    named: list[tuple[int, int, str]] = []
    faces: list[tuple[int, ...]] = []
    for roof in roofs:
        base = len(points)
        points += roof.points
        named += [(i + base, j + base, name) for i, j, name in roof.edges()]
        faces += [tuple(i + base for i in face) for face in roof.faces]
    vertices = place.world(points)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    low[1] = 0.0
    centre = (low + high) / 2
    reach = vertices - centre
    return Building(
        roof_type=kind,
        vertices=vertices,
        edges=np.array([(i, j) for i, j, _ in named], dtype=np.int64),
        edge_classes=np.array([EDGE_ID[name] for _, _, name in named], dtype=np.int64),
        vertex_classes=_corner_classes(len(points), named),
        faces=tuple(faces),
        ground_lines=np.array(feet, dtype=np.float64).reshape(-1, 2, 3),
        panels=tuple(panels),
        centre=centre,
        radius=float(np.sqrt((reach * reach).sum(axis=1)).max()),
    )


def _corner_classes(count: int, edges: list[tuple[int, int, str]]) -> np.ndarray:
    """Gestalt classes: a flashing end at a wall, else an eave's end off the ridges, else an apex."""
    met: list[set[str]] = [set() for _ in range(count)]
    for i, j, name in edges:
        met[i].add(name)
        met[j].add(name)
    names = []
    for seen in met:
        if "flashing" in seen or "step_flashing" in seen:
            names.append("flashing_end_point")
        elif "eave" in seen and "ridge" not in seen:
            names.append("eave_end_point")
        else:
            names.append("apex")
    return np.array([GESTALT_ID[name] for name in names], dtype=np.int64)


def _nearest_pair(vertices: np.ndarray) -> float:
    gap = vertices[:, None, :] - vertices[None, :, :]
    distance = np.sqrt((gap * gap).sum(axis=-1))
    return float(distance[np.triu_indices(len(vertices), 1)].min())


def edge_gestalt(edge_class: int) -> int:
    """The gestalt class that an edge class is painted in."""
    return GESTALT_ID[EDGE_NAMES[edge_class]]
