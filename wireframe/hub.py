"""The Hugging Face hub as a file system, for sources named ``hf://...``; huggingface_hub is imported on first use."""

from __future__ import annotations

from typing import Any

from wireframe.errors import MissingPackageError, ShardError, one_line

PREFIX = "hf://"


def is_hub(source: str) -> bool:
    """Whether a source is on the hub."""
    return source.startswith(PREFIX)


def hub_files() -> Any:
    """The hub as a file system (fsspec).

    Raises:
        MissingPackageError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise MissingPackageError("hf:// paths need huggingface_hub: pip install huggingface-hub") from None
    return HfFileSystem()


def list_hub(source: str, extensions: tuple[str, ...]) -> list[str]:
    """The files of a hub source, as ``hf://`` paths, unsorted.

    Args:
        source: a file (given back whatever its name), a folder (searched to any depth) or a glob.
        extensions: how the names of the other files end.

    Raises:
        ShardError: the hub refuses or cannot be reached.
        MissingPackageError: huggingface_hub is not installed.
    """
    files = hub_files()
    try:
        if not any(character in source for character in "*?["):
            if files.isfile(source):
                return [source]
            source = source.rstrip("/") + "/**"
        return [PREFIX + path for path in files.glob(source) if path.endswith(extensions)]
    except Exception as error:  # The hub's client raises HTTP errors of several packages.
        raise ShardError(f"{source}: cannot be listed ({one_line(error)})") from None
