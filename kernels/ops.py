"""The public operations: one import for callers, one file per subject behind it."""

from wireframe.kernels.adamw_step import adamw_step
from wireframe.kernels.dropout import dropout_add
from wireframe.kernels.dropout_reference import step_keys
from wireframe.kernels.label_colors import colors_to_ids
from wireframe.kernels.linear_gelu import linear_gelu
from wireframe.kernels.merge_vertices import merge_vertices
from wireframe.kernels.point_features import point_features
from wireframe.kernels.point_sampling import centre_and_scale, priority_sample
from wireframe.kernels.point_subsets import farthest_point_sample, voxel_sample
from wireframe.kernels.points3d import parse_points3d
from wireframe.kernels.qk_norm_attention import qk_norm_attention, qk_norm_attention_kvpacked
from wireframe.kernels.residual_norm import residual_norm, rms_norm
from wireframe.kernels.segment_cost import segment_cost
from wireframe.kernels.segment_matching import segment_matching
from wireframe.kernels.sinkhorn import sinkhorn
from wireframe.kernels.view_fusion import clip_limits, depth_points, house_mask, point_tiers, vote_labels

__all__ = [
    "adamw_step",
    "centre_and_scale",
    "clip_limits",
    "colors_to_ids",
    "depth_points",
    "dropout_add",
    "farthest_point_sample",
    "house_mask",
    "linear_gelu",
    "merge_vertices",
    "parse_points3d",
    "point_features",
    "point_tiers",
    "priority_sample",
    "qk_norm_attention",
    "qk_norm_attention_kvpacked",
    "residual_norm",
    "rms_norm",
    "segment_cost",
    "segment_matching",
    "sinkhorn",
    "step_keys",
    "vote_labels",
    "voxel_sample",
]
