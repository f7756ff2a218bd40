"""Tars of raw scenes."""

from __future__ import annotations

from wireframe.shard_writer import ShardWriter

__all__ = ["ShardWriter"]
