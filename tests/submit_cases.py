"""Tars, models and stand-ins for the predicting process, for the tests of ``wireframe submit``."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tarfile
from pathlib import Path

import torch
from raw_data import tar_bytes

from wireframe.graph import GraphConfig
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.pretrained import save_graph

FALLBACK = {"wf_vertices": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "wf_edges": [[0, 1]]}
ANSWER = {"wf_vertices": [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], "wf_edges": [[0, 1]]}

# Speaks like ``wireframe.submit.worker``, reading ahead with several workers, but needs no torch. What it does with a
# scene is the first word of its key; "once" before it: only the first time, which a file beside the tar remembers.
STAND_IN = """
import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
def say(**event):
    print(json.dumps(event), flush=True)
say(ready=True)
good = {"vertices": [[0.0] * 3, [1.0, 0.0, 0.0]], "edges": [[0, 1]]}
ahead = 1 if job["workers"] == 1 else 4
begun = 0
for turn, (number, (shard, key, *rest)) in enumerate(job["scenes"]):
    for other, scene in job["scenes"][begun:turn + ahead]:
        say(begun=other)
        begun += 1
        if scene[1].startswith("crash"):
            # As a reader would: scenes before this one may be begun and without an answer.
            os.kill(os.getpid(), signal.SIGSEGV)
    what, *words = key.split("-")
    if what == "once":
        seen = os.path.join(os.path.dirname(shard), key + ".seen")
        what = "good" if os.path.exists(seen) else words[0]
        open(seen, "w").close()
    if what == "crash":
        # "once", that is.
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "hang":
        time.sleep(600)
    elif what == "slow":
        time.sleep(0.2)
    elif what == "mute":
        os._exit(0)
    if what == "bad":
        say(failure=number, reason="it is bad")
    elif what == "nan":
        say(answer=number, vertices=[[float("nan")] * 3, [0.0] * 3], edges=[[0, 1]])
    elif what == "loose":
        say(answer=number, vertices=good["vertices"], edges=[[0, 2]])
    else:
        say(answer=number, **good)
"""


def stand_in(source: str = STAND_IN) -> list[str]:
    """A command for ``submit(start=...)``."""
    return [sys.executable, "-S", "-c", source]


def named_tar(path: Path, keys: list[str]) -> str:
    """A tar of scenes of which nothing but the name is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes([(f"{key}.image_ids.json", b"[]") for key in keys]))
    return str(path)


def long_name_chain(count: int, name: str) -> bytes:
    """A tar of one empty file, the last of so many long names before it being this one."""
    info = tarfile.TarInfo("x")
    plain = info.tobuf(tarfile.GNU_FORMAT)
    info.name = name + "x" * 100
    # Its header for a long name, its name, the header of the file.
    long = info.tobuf(tarfile.GNU_FORMAT)[:1024].replace(b"x" * 100, bytes(100))
    return long * count + plain + bytes(1024)


def answers_in(path: Path) -> dict[str, dict]:
    """The answers of a submission by id, in its order, after a check that it is of the challenge's schema."""
    entries = json.loads(path.read_bytes(), parse_constant=lambda name: 1 / 0)
    assert all(list(entry) == ["order_id", "wf_vertices", "wf_edges"] for entry in entries)
    found = {entry.pop("order_id"): entry for entry in entries}
    assert len(found) == len(entries)
    for entry in entries:
        assert len(entry["wf_vertices"]) >= 2 and all(len(vertex) == 3 for vertex in entry["wf_vertices"])
        assert entry["wf_edges"] and all(len(set(edge)) == 2 for edge in entry["wf_edges"])
        assert all(0 <= end < len(entry["wf_vertices"]) for edge in entry["wf_edges"] for end in edge)
    return found


def save_tiny_model(folder: Path) -> Path:
    """A small model whose output depends on its input, with a graph that keeps every segment."""
    config = PerceiverConfig(hidden=32, ff=32, latent_tokens=8, latent_layers=2, decoder_layers=1, num_points=64)
    model = Perceiver(config).eval()
    # Branches start at zero: without this every scene would get the same segments.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    save_graph(GraphConfig(confidence=0.0), folder)
    return folder


def link_packages(folder: Path, names: list[str]) -> Path:
    """A folder with these installed distributions and what they require, and nothing else, as links."""
    folder.mkdir()
    missing, seen = list(names), set()
    while missing:
        name = missing.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for top in {Path(file).parts[0] for file in found.files or () if Path(file).parts[0] not in ("..", ".")}:
            if not (folder / top).exists() and not top.endswith(".pth"):
                (folder / top).symlink_to(found.locate_file(top))
        required = [text for text in found.requires or () if "extra ==" not in text]
        missing += [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in required]
    return folder
