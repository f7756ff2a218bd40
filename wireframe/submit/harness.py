"""What the challenge's harness gives and wants: ``params.json``, a folder of tars, ``submission.json``.

The harness starts ``python script.py`` in the folder of the submission, without a network, lets it run for
``time_limit`` seconds, kills it, and takes the ``submission.json`` that is there.
"""

from __future__ import annotations

import importlib.util
import json
import queue
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from wireframe import child
from wireframe.errors import ConfigError, MissingPackageError, ShardError, one_line
from wireframe.files import read_at_most

SUBMISSION = "submission.json"
MAX_PARAMS_BYTES = 1 << 20


class Params(NamedTuple):
    """dataset: a dataset's id on the hub; time_limit: seconds; output_path: a folder for submission.json, or a file
    whose name ends in .json. None where the file does not say."""

    dataset: str | None = None
    time_limit: float | None = None
    output_path: str | None = None


def read_params(file: Path) -> Params:
    """The harness's parameters; keys that are not known are passed over.

    Raises:
        ConfigError: the file cannot be read, is no JSON object, or a value is of another kind.
    """
    try:
        data = read_at_most(file, MAX_PARAMS_BYTES)
        if data is None:
            raise ConfigError(f"{file}: larger than {MAX_PARAMS_BYTES} bytes")
        values = json.loads(data)
    except OSError as problem:
        raise ConfigError(f"{file}: {problem.strerror}; give another with --params") from None
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{file}: not a JSON file ({one_line(problem)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object of {', '.join(Params._fields)}")
    found = {name: values[name] for name in Params._fields if values.get(name) is not None}
    for name, value in found.items():
        try:
            found[name] = seconds(value) if name == "time_limit" else value
            if name != "time_limit" and not isinstance(value, str):
                raise ValueError("must be a text")
        except ValueError as problem:
            raise ConfigError(f"{file}: {name} {problem}, not {one_line(repr(value), 60)}") from None
    return Params(**found)


def seconds(value: float | str) -> float:
    """A time limit, out of JSON or of a command line. Raises ValueError."""
    try:
        if not isinstance(value, bool) and 0 < float(value) < 1e9:
            return float(value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise ValueError("must be seconds above 0")


# argparse names the type of a bad value by this.
seconds.__name__ = "number of seconds"


def find_tars(data: Path) -> list[str]:
    """The tars of a data folder: those below a folder (or of a name) that matches ``*public*``, then ``*private*``.

    Where neither is there, all tars; each group sorted by path. A single tar stands for itself.

    Raises:
        ShardError: there is none.
    """
    from wireframe.shards import list_shards

    found = list_shards(data)
    if not data.is_dir():
        return found
    parts = {tar: Path(tar).relative_to(data).parts for tar in found}
    groups = [[t for t in found if any(fnmatch(p, like) for p in parts[t])] for like in ("*public*", "*private*")]
    return list(dict.fromkeys(groups[0] + groups[1])) or found


def download(dataset: str, data: Path, limit: float) -> None:
    """Fetches a dataset's tars from the hub into ``data``, as many as come within so many seconds.

    Raises:
        MissingPackageError: huggingface_hub is not installed. ShardError: the hub refuses or cannot be reached.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingPackageError(f"fetching {dataset} needs huggingface_hub: pip install huggingface-hub")
    # The hub's client knows no deadline, and its threads outlive a call that is given up; a process can be ended.
    client = child.Child(child.command(f"from {__name__} import fetch; fetch({dataset!r}, {str(data)!r})"))
    try:
        problem = client.receive(limit)
    except queue.Empty:
        problem = None
    finally:
        client.end()
    if problem is not None:
        raise ShardError(f"{dataset} cannot be fetched ({problem})")


def fetch(dataset: str, data: str) -> None:
    """What the process of ``download`` does; says why it could not."""
    requests, answers = child.pipes()
    child.end_with(requests)
    try:
        from huggingface_hub import snapshot_download

        snapshot_download(dataset, repo_type="dataset", local_dir=data, allow_patterns=["*.tar", "*.tar.gz", "*.tgz"])
    except Exception as problem:  # The hub's client raises HTTP errors of several packages.
        print(json.dumps(one_line(problem)), file=answers, flush=True)


def output_file(output_path: str | None) -> Path:
    """The file that ``output_path`` means: itself where its name ends in .json, else submission.json in it."""
    folder = Path(output_path or ".")
    return folder if folder.suffix == ".json" and not folder.is_dir() else folder / SUBMISSION
