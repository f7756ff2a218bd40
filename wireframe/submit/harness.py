"""What the challenge's harness gives and wants: ``params.json``, a folder of tars, ``submission.json``.

The harness starts ``python script.py`` in the folder of the submission, without a network, lets it run for
``time_limit`` seconds, kills it, and takes the ``submission.json`` that is there.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from wireframe.errors import ConfigError, MissingPackageError, ShardError, one_line
from wireframe.shards import list_shards

SUBMISSION = "submission.json"
MAX_PARAMS_BYTES = 1 << 20
# A process that is older was not started for this submission, or its clock is not ours.
_OLDEST = 86400.0


class Params(NamedTuple):
    """dataset: a dataset's id on the hub; time_limit: seconds; output_path: a folder for submission.json, or a file
    whose name ends in .json. None where the file does not say."""

    dataset: str | None = None
    competition_id: str | None = None
    time_limit: float | None = None
    output_path: str | None = None


def read_params(file: Path) -> Params:
    """The harness's parameters; keys that are not known are passed over.

    Raises:
        ConfigError: the file cannot be read, is no JSON object, or a value is of another kind.
    """
    try:
        if file.stat().st_size > MAX_PARAMS_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_PARAMS_BYTES} bytes")
        values = json.loads(file.read_bytes())
    except OSError as problem:
        raise ConfigError(f"{file}: {problem.strerror}; give another with --params") from None
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{file}: not a JSON file ({one_line(problem)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object of {', '.join(Params._fields)}")
    found = {name: values.get(name) for name in Params._fields}
    for name, value in found.items():
        if name != "time_limit" and value is not None and not isinstance(value, str):
            raise ConfigError(f"{file}: {name} must be a text, not {one_line(repr(value), 60)}")
    if found["time_limit"] is not None:
        found["time_limit"] = _seconds(file, found["time_limit"])
    return Params(**found)


def _seconds(file: Path, value: Any) -> float:
    try:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and 0 < float(value) < 1e9:
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{file}: time_limit must be seconds, not {one_line(repr(value), 60)}")


def default_data() -> Path:
    """The folder ``data`` of the system's temporary directory."""
    return Path(tempfile.gettempdir()) / "data"


def find_tars(data: Path) -> list[str]:
    """The tars of a data folder: those below a folder (or of a name) that matches ``*public*``, then ``*private*``.

    Where neither is there, all tars; each group sorted by path. A single tar stands for itself.

    Raises:
        ShardError: there is none.
    """
    found = list_shards(data)
    if not data.is_dir():
        return found
    groups = [
        [tar for tar in found if any(fnmatch(part, pattern) for part in Path(tar).relative_to(data).parts)]
        for pattern in ("*public*", "*private*")
    ]
    return list(dict.fromkeys(tar for group in groups for tar in group)) or found


def download(dataset: str, data: Path) -> None:
    """Fetches a dataset's tars from the hub into ``data``.

    Raises:
        MissingPackageError: huggingface_hub is not installed. ShardError: the hub refuses or cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            f"there is no data at {data}, and fetching {dataset} needs huggingface_hub: pip install huggingface-hub"
        ) from None
    try:
        snapshot_download(dataset, repo_type="dataset", local_dir=data, allow_patterns=["*.tar", "*.tar.gz", "*.tgz"])
    except Exception as problem:  # The hub's client raises HTTP errors of several packages.
        raise ShardError(f"there is no data at {data}, and {dataset} cannot be fetched ({one_line(problem)})") from None


def has_tars(data: Path) -> bool:
    """Whether a folder is there with a tar in it."""
    try:
        return bool(list_shards(data))
    except ShardError:
        return False


def output_file(output_path: str | None) -> Path:
    """The file that ``output_path`` means: itself where its name ends in .json, else submission.json in it."""
    folder = Path(output_path or ".")
    return folder if folder.suffix == ".json" and not folder.is_dir() else folder / SUBMISSION


def process_started() -> float:
    """The moment, of ``time.monotonic``, at which this process was started; now, where the system does not say."""
    now = time.monotonic()
    try:
        # Field 22 of proc(5)'s stat: clock ticks since boot. Field 2, the name, may hold anything but ends in ")".
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if 0 <= age < _OLDEST else now
