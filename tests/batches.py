"""Small random batches of sampled points for the tests of the model."""

from __future__ import annotations

import torch


def random_batch(scenes: int = 2, points: int = 96, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sampled points [scenes, points] with the dtypes of a sampled row; the last quarter of scene 0 is masked."""
    g = torch.Generator().manual_seed(seed)
    shape = (scenes, points)

    def integers(low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g).to(dtype)

    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, -(points // 4):] = False
    return {
        "xyz_norm": torch.randn(scenes, points, 3, generator=g) * 0.3,
        "class_id": integers(0, 13, torch.uint8),
        "source": integers(0, 2, torch.uint8),
        "mask": mask,
        "behind": integers(-1, 28, torch.int16),
        "n_views_voted": integers(1, 9, torch.uint8),
        "vote_frac": torch.rand(shape, generator=g),
        "scale": torch.ones(scenes),
    }


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Give every parameter a value of its own, so that no branch of the model is silent."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if name.endswith("log_scale"):
                parameter += 0.3 * noise
            elif "norm" in name or name.endswith("input_proj.3.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter += 0.1 * noise
            elif "emb" in name or "offsets" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)


TINY = dict(hidden=32, ff=48, latent_tokens=12, latent_layers=3, decoder_layers=2, cross_attn_interval=2, num_heads=4,
            kv_heads_cross=2, kv_heads_self=1, segments=6, behind_emb_dim=4)
