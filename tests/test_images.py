import io
import threading

import numpy as np
import pytest
from PIL import Image, ImageFile
from raw_data import png

from wireframe.images import ImageError, label_rgb


def paused(data: bytes) -> tuple[Image.Image, threading.Event, threading.Event]:
    """An image whose decoding says that it has begun, then waits until it is released."""
    image = Image.open(io.BytesIO(data))
    begun, release, load = threading.Event(), threading.Event(), image.load

    def slow_load():
        begun.set()
        assert release.wait(60)
        return load()

    image.load = slow_load
    return image, begun, release


def test_a_thread_that_ends_first_does_not_let_truncated_images_through_in_another(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole, whole_begun, release_whole = paused(data)
    cut, cut_begun, release_cut = paused(data[: len(data) // 2])
    found = {}

    def read(name, image):
        try:
            found[name] = label_rgb(image)
        except ImageError as problem:
            found[name] = problem

    threads = [threading.Thread(target=read, args=pair) for pair in (("whole", whole), ("cut", cut))]
    threads[0].start()
    assert whole_begun.wait(60)
    threads[1].start()
    assert cut_begun.wait(60)
    release_whole.set()
    threads[0].join()
    release_cut.set()
    threads[1].join()
    assert found["whole"].shape == (64, 64, 3)
    assert isinstance(found["cut"], ImageError)
    # What another package set is there again.
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_switch_is_set_back_after_a_failure(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="undecodable"):
        label_rgb(b"no image")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
