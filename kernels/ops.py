"""The public operations: one import for callers, one file per operation behind it."""

from wireframe.kernels.qk_norm_attention import qk_norm_attention
from wireframe.kernels.segment_matching import segment_cost, segment_matching
from wireframe.kernels.sinkhorn import sinkhorn

__all__ = ["qk_norm_attention", "segment_cost", "segment_matching", "sinkhorn"]
