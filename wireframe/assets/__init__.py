"""The shipped demo model."""

from pathlib import Path

# model.safetensors, config.json, graph.json; trained by train/demo.sh on synthetic scenes alone.
DEMO_MODEL = Path(__file__).parent / "demo_model"
# In the folder of a model that train/export.py wrote: what the mean and the nearest dummy know of its training scenes.
DUMMIES = "dummies.npz"
