"""Everything that makes a synthetic scene easy or hard, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from wireframe.errors import ConfigError, one_line

ROOF_TYPES = ("gable", "hip", "l_shaped", "cross_gable", "shed", "flat", "many_gables")

# Pixel sizes are stated for this image width and scale with the real one.
_REFERENCE_WIDTH = 768
_MAX_FALSE = 100


@dataclass(frozen=True)
class SynthConfig:
    """Size and difficulty of synthetic scenes; lengths in metres, pixel sizes for an image 768 wide.

    ``*_range`` are inclusive (low, high) bounds, ``*_prob`` and ``*_share`` lie in [0, 1], ``*_sigma`` are
    standard deviations. The same values, seed and index give the same scene.

    Raises:
        ConfigError: a value that no scene can be made with.
    """

    width: int = 768
    height: int = 576
    views_range: tuple[int, int] = (4, 12)
    # Few views are likelier than many by this power of a uniform number; 1 for none likelier.
    views_skew: float = 1.0
    pose_only_prob: float = 0.15
    # Every mistake of the maps and of the cloud is multiplied by a number of the scene: log-normal, mean 1.
    severity_sigma: float = 0.0
    # Scenes in which nearly everything went wrong: six times as severe as the others; the mean stays 1.
    failure_prob: float = 0.0

    # The building.
    roof_types: tuple[str, ...] = ROOF_TYPES[:6]
    roof_weights: tuple[float, ...] = (0.26, 0.22, 0.2, 0.2, 0.06, 0.06)
    two_storey_prob: float = 0.45
    garage_prob: float = 0.5
    porch_prob: float = 0.3
    pitch_range: tuple[float, float] = (0.35, 0.95)
    # How many are tried; some find no place.
    annexes_range: tuple[int, int] = (0, 0)
    dormers_range: tuple[int, int] = (0, 0)
    min_vertex_distance: float = 0.9

    # How far the ground truth is off: each coordinate, the scale of the scene, a gross error of single corners.
    truth_sigma: float = 0.0
    truth_scale_sigma: float = 0.0
    truth_gross_prob: float = 0.0
    truth_gross_range: tuple[float, float] = (0.5, 1.5)

    # The cameras: eye level or lifted on a pole or drone; distance as a multiple of what fits the house.
    eye_level_share: float = 0.4
    lifted_height_range: tuple[float, float] = (3.5, 13.0)
    focal_range: tuple[float, float] = (0.7, 1.1)
    distance_range: tuple[float, float] = (0.85, 1.4)
    aim_sigma: float = 0.4
    roll_sigma: float = 0.02
    # The part of the ring around the house that has cameras.
    ring_range: tuple[float, float] = (1.0, 1.0)

    # What stands in front of the house.
    trees_range: tuple[int, int] = (0, 4)
    bushes_range: tuple[int, int] = (0, 5)
    fence_prob: float = 0.25

    # The label maps.
    stroke_px: float = 6.0
    corner_px: float = 3.5
    stroke_drop_prob: float = 0.03
    corner_drop_prob: float = 0.05
    # A stroke with a gap; a stroke or corner of another class; strokes and corners that are not there, a view.
    stroke_cut_prob: float = 0.0
    # Small things are missed more often: a stroke of n pixels with probability exp(-n / this).
    small_miss_px: float = 0.0
    class_swap_prob: float = 0.0
    false_strokes: float = 0.0
    false_corners: float = 0.0
    label_jitter_px: float = 0.0
    gestalt_blank_prob: float = 0.0
    ade_patches: float = 0.0
    ade_shift_px: float = 0.0
    ade_wrong_prob: float = 0.0

    # Monocular depth.
    depth_missing_prob: float = 0.42
    depth_none_prob: float = 0.05
    depth_scale_range: tuple[float, float] = (1.1, 1.3)
    depth_unscaled_prob: float = 0.25
    depth_sigma: float = 0.015
    depth_far: float = 60.0
    sky_is_zero_prob: float = 0.5

    # The COLMAP reconstruction.
    colmap_points: int = 40000
    colmap_sigma: float = 0.03
    colmap_edge_share: float = 0.3
    colmap_corner_share: float = 0.03
    colmap_background_share: float = 0.25
    colmap_outlier_share: float = 0.02
    # Cells that hold no point, and how unequal (log-normal) the others are; 0 for an even cloud.
    colmap_cell: float = 0.6
    colmap_hole_share: float = 0.0
    colmap_clump_sigma: float = 0.0
    # Points that lie off the surface by a wide normal error, and points on what stands far behind the house. As with
    # the other shares of the cloud, points that no two views see are lost: the most of the backdrop.
    colmap_tail_share: float = 0.0
    colmap_tail_sigma: float = 0.4
    colmap_backdrop_share: float = 0.0
    colmap_pixel_sigma: float = 0.4
    track_drop_prob: float = 0.3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_kind(field.name, value, field.default)
            if field.name.endswith(("_prob", "_share")) and not 0 <= value <= 1:
                raise ConfigError(f"{field.name} is {value}: give a number from 0 to 1")
            if field.name.endswith("_range") and not (len(value) == 2 and 0 <= value[0] <= value[1]):
                raise ConfigError(f"{field.name} is {value}: give (low, high) with 0 <= low <= high")
            if field.name.endswith(("_sigma", "_px")) and not value >= 0:
                raise ConfigError(f"{field.name} is {value}: give a number >= 0")
        self._check_counts()

    def _check_counts(self) -> None:
        if not 32 <= self.width <= 8192 or not 32 <= self.height <= 8192:
            raise ConfigError(f"image size {self.width} x {self.height}: both sides must be from 32 to 8192")
        if self.views_range[0] < 2 or self.views_range[1] > 99:
            raise ConfigError(f"views_range is {self.views_range}: COLMAP tracks need 2 views, names hold 99")
        unknown = [name for name in self.roof_types if name not in ROOF_TYPES]
        if unknown or not self.roof_types:
            raise ConfigError(f"roof_types is {self.roof_types}: choose from {', '.join(ROOF_TYPES)}")
        weights = self.roof_weights
        if len(weights) != len(self.roof_types) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ConfigError(f"roof_weights is {weights}: give one weight >= 0 for each of roof_types, not all 0")
        for name in ("focal_range", "distance_range", "ring_range"):
            if getattr(self, name)[0] <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be > 0")
        for name in ("depth_far", "colmap_cell", "views_skew"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: give a number > 0")
        for name in ("false_strokes", "false_corners", "ade_patches"):
            if not 0 <= getattr(self, name) <= _MAX_FALSE:
                raise ConfigError(f"{name} is {getattr(self, name)}: give a mean number from 0 to {_MAX_FALSE}")
        if self.colmap_points < 0:
            raise ConfigError(f"colmap_points is {self.colmap_points}: must be >= 0")

    @classmethod
    def training(cls, **changes: object) -> SynthConfig:
        """The small preset (320 x 240, 8,000 COLMAP points) that a training run can make as it goes."""
        return cls(**{"width": 320, "height": 240, "colmap_points": 8000, **changes})

    @classmethod
    def real(cls, **changes: object) -> SynthConfig:
        """Scenes as hard as the challenge's real ones (``python -m wireframe.bench.calibration`` measures it)."""
        return cls(**{**_REAL, **changes})

    @classmethod
    def only(cls, roof_type: str, **changes: object) -> SynthConfig:
        """The default preset with one roof type."""
        return cls(**{"roof_types": (roof_type,), "roof_weights": (1.0,), **changes})

    def changed(self, settings: Iterable[str] = (), **changes: object) -> SynthConfig:
        """A copy with ``key=value`` settings (values in JSON, or plain text for a string) and keyword changes.

        A single string for a tuple of strings counts as that tuple: ``roof_types=gable``.

        Raises:
            ConfigError: an unknown key, or an impossible value.
        """
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator or key not in known:
                raise ConfigError(f"unknown setting {setting!r}: give key=value with one of {', '.join(known)}")
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = text
            if isinstance(value, str) and isinstance(known[key], tuple) and isinstance(known[key][0], str):
                value = (value,)
            changes[key] = tuple(value) if isinstance(value, list) else value
        return dataclasses.replace(self, **changes)

    def at_severity(self, severity: float) -> SynthConfig:
        """The configuration with every mistake of the maps and the cloud ``severity`` times as large or as likely.

        A probability p becomes 1 - (1 - p)^severity; lengths and mean numbers are multiplied.
        """
        changes: dict[str, float] = {}
        for name in _SEVERE:
            value = getattr(self, name)
            if name.endswith(("_prob", "_share")):
                changes[name] = 1 - (1 - value) ** severity
            else:
                changes[name] = min(value * severity, _MAX_FALSE)
        return dataclasses.replace(self, **changes)

    @property
    def mistakes_besides_misses(self) -> bool:
        """Whether the label maps have mistakes other than what they miss."""
        return any(getattr(self, name) for name in _LABEL_MISTAKES)

    def pixels(self, size: float) -> float:
        """A size stated for the reference width, in pixels of this width."""
        return size * self.width / _REFERENCE_WIDTH


_LABEL_MISTAKES = (
    "stroke_cut_prob", "small_miss_px", "class_swap_prob", "false_strokes", "false_corners", "label_jitter_px",
    "gestalt_blank_prob", "ade_patches", "ade_shift_px", "ade_wrong_prob",
)  # fmt: skip
# What grows with the severity of a scene.
_SEVERE = (
    "stroke_drop_prob", "corner_drop_prob", *_LABEL_MISTAKES, "colmap_sigma", "colmap_tail_share",
    "colmap_backdrop_share", "colmap_outlier_share", "colmap_hole_share",
)  # fmt: skip

_REAL = {
    "views_range": (4, 21),
    "views_skew": 2.5,
    "severity_sigma": 0.5,
    "failure_prob": 0.08,
    "roof_types": ROOF_TYPES,
    "roof_weights": (0.1, 0.06, 0.25, 0.38, 0.01, 0.02, 0.18),
    "two_storey_prob": 0.6,
    "garage_prob": 0.4,
    "porch_prob": 0.3,
    "annexes_range": (0, 1),
    "dormers_range": (1, 5),
    "truth_sigma": 0.015,
    "truth_scale_sigma": 0.005,
    "truth_gross_prob": 0.05,
    "eye_level_share": 0.4,
    "lifted_height_range": (3.0, 11.0),
    "distance_range": (0.75, 1.25),
    "aim_sigma": 0.7,
    "ring_range": (0.8, 1.0),
    "trees_range": (0, 4),
    "bushes_range": (0, 5),
    "fence_prob": 0.4,
    "stroke_px": 2.8,
    "corner_px": 3.0,
    "stroke_drop_prob": 0.025,
    "corner_drop_prob": 0.11,
    "stroke_cut_prob": 0.02,
    "small_miss_px": 22.0,
    "class_swap_prob": 0.03,
    "false_strokes": 0.7,
    "false_corners": 2.6,
    "label_jitter_px": 1.5,
    "gestalt_blank_prob": 0.07,
    "ade_patches": 14.0,
    "ade_wrong_prob": 0.7,
    "ade_shift_px": 5.0,
    "depth_scale_range": (0.8, 1.3),
    "depth_unscaled_prob": 0.0,
    "colmap_points": 35000,
    "colmap_sigma": 0.03,
    "colmap_edge_share": 0.25,
    "colmap_corner_share": 0.01,
    "colmap_background_share": 0.06,
    "colmap_outlier_share": 0.01,
    "colmap_hole_share": 0.62,
    "colmap_clump_sigma": 0.7,
    "colmap_tail_share": 0.06,
    "colmap_backdrop_share": 0.012,
}


def _check_kind(name: str, value: object, default: object) -> None:
    """Raises ConfigError where a value, or an element of it, is of another kind than the default's."""
    if isinstance(default, tuple):
        if not isinstance(value, tuple):
            raise ConfigError(f"{name} is {one_line(repr(value))}: give a list like {list(default)}")
        for element in value:
            _check_kind(name, element, default[0])
    elif isinstance(default, str):
        if not isinstance(value, str):
            raise ConfigError(f"{name} holds {one_line(repr(value))}: give text")
    elif isinstance(value, bool) or not isinstance(value, int if isinstance(default, int) else (int, float)):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ConfigError(f"{name} holds {one_line(repr(value))}: give {kind}")
    # Whole numbers beyond float64 count as infinite too.
    elif not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{name} holds {one_line(repr(value))}: give a finite number")
