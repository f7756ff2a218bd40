"""The shipped demo model and what the demo needs of its training set."""

from pathlib import Path

_FOLDER = Path(__file__).parent

# model.safetensors + config.json; trained by train/demo.sh on synthetic scenes alone.
DEMO_MODEL = _FOLDER / "demo_model"
# Training wireframes for the two dummies: the mean one and the nearest one.
DEMO_DUMMIES = DEMO_MODEL / "dummies.npz"
