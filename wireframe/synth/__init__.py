"""Synthetic scenes in the raw row layout: houses whose wireframe is known, seen by posed cameras."""

from __future__ import annotations

from wireframe.synth.building import Building, make_building
from wireframe.synth.config import ROOF_TYPES, SynthConfig
from wireframe.synth.scene import make_scene
from wireframe.synth.write import write_shards

__all__ = ["ROOF_TYPES", "Building", "SynthConfig", "make_building", "make_scene", "write_shards"]
