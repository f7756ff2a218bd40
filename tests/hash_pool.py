"""Scores at once, for tests that are not about the metric: its processes take seconds to start."""

import hashlib
from concurrent.futures import Future

from wireframe.scoring import Outcome, Score


class HashPool:
    """In place of ``ScorePool``: scores that are a function of prediction and truth."""

    def __init__(self, workers):
        self.workers = workers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, predicted, truth):
        digest = hashlib.sha256(predicted.vertices.tobytes() + predicted.edges.tobytes() + truth.vertices.tobytes())
        future = Future()
        future.set_result(Outcome(Score(*(byte / 255 for byte in digest.digest()[:3])), None))
        return future
