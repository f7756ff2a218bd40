"""The shipped models, both trained on synthetic scenes alone: model.safetensors, config.json, graph.json."""

from pathlib import Path

# What commands take without --model: for scenes as hard as the challenge's, by train/real.sh.
MODEL = Path(__file__).parent / "model"
# For the easy scenes of `wireframe demo`, by train/demo.sh.
DEMO_MODEL = Path(__file__).parent / "demo_model"
# In the folder of a model that train/export.py wrote: what the mean and the nearest dummy know of its training scenes.
DUMMIES = "dummies.npz"
