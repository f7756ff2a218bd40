import gzip
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from raw_data import hub_members, raw_row, tar_bytes
from submit_cases import ANSWER, FALLBACK, answers_in, long_name_chain

from wireframe.cli import main
from wireframe.errors import ConfigError, MissingPackageError, ShardError
from wireframe.member_names import parse_name
from wireframe.raw_rows import build_row
from wireframe.shards import iter_samples
from wireframe.submissions import answer_fault
from wireframe.submit import tar_index
from wireframe.submit.answers import Answers
from wireframe.submit.harness import Params, download, find_tars, output_file, read_params
from wireframe.submit.tar_index import index_tar, open_tar, read_members


def members_of(names):
    return [member for name in names for member in hub_members(raw_row(2, order_id=name)).items()]


def written(path, data):
    path.write_bytes(data)
    return str(path)


def indexed(path, until=math.inf):
    """The scenes of a tar, and what is wrong with it."""
    damage = []
    scenes = list(index_tar(path, damage, until))
    assert len(damage) <= 1
    return scenes, "".join(damage)


def ids(scenes):
    return [scene.order_id for scene in scenes]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_index_has_the_scenes_and_the_bytes_that_reading_gives(tmp_path, form, mode):
    members = [("READ.ME", b"x"), *members_of(["a", "b" * 70]), ("b.notes.md", b"x"), *members_of(["c"])]
    members.insert(5, ("a.order_id.txt", b"the real id of a"))
    members += [("d.json", json.dumps({"order_id": "id of d", "image_ids": ["1"]}).encode())]
    path = written(tmp_path / "a.tar", tar_bytes(members, form, mode))
    scenes, problem = indexed(path)
    assert not problem
    samples = [(s.key, [pair for pair in s.members if pair[0].column]) for s in iter_samples(path)]
    with open_tar(path) as file:
        assert [(scene.key, read_members(file, scene)) for scene in scenes] == samples
    rows = [build_row(key, members) for key, members in samples]
    assert ids(scenes) == [row["order_id"] for row in rows] == ["the real id of a", "b" * 70, "c", "id of d"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_scene_that_a_tar_breaks_off_in_is_listed_with_its_whole_members(tmp_path, mode):
    whole = tar_bytes(members_of(["a", "b"]))
    cut = whole[: whole.index(b"b.K.npy") + 600]
    path = written(tmp_path / "a.tar", gzip.compress(cut)[:-9] if mode == "w:gz" else cut)
    scenes, problem = indexed(path)
    assert ids(scenes) == ["a", "b"] and problem.startswith(f"{path}: truncated")
    if mode == "w":
        with open_tar(path) as file:
            columns = {name.column for name, _ in read_members(file, scenes[1])}
        assert "gestalt" in columns and "K" not in columns


def test_scenes_behind_a_damaged_header_are_found(tmp_path):
    whole = bytearray(tar_bytes(members_of(["a", "b", "c"])))
    place = whole.index(b"b.ade.img_1.png")
    whole[place : place + 512] = os.urandom(512)
    scenes, problem = indexed(written(tmp_path / "a.tar", whole))
    assert ids(scenes) == ["a", "b", "c"] and "corrupt header" in problem and "after 'b.ade.img_0.png'" in problem
    assert len(scenes[1].members) == len(scenes[2].members) - 1


@pytest.mark.parametrize(
    "data, words",
    [(b"", "empty file"), (b"text" * 500, "not a tar"), (os.urandom(99_000), "not a tar"), (b"\x1f\x8b", "unreadable")],
)
def test_what_is_no_tar_has_no_scenes_and_a_reason(tmp_path, data, words):
    scenes, problem = indexed(written(tmp_path / "a.tar", data))
    assert scenes == [] and words in problem
    assert "nowhere.tar: cannot be opened (No such file" in indexed(str(tmp_path / "nowhere.tar"))[1]


def sealed(name, size_field, kind=b"0"):
    """A header with any bytes for its size, and a checksum that is right."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = size_field, kind
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    header[148:156] = b"%06o\0 " % total
    return bytes(header)


@pytest.mark.parametrize(
    "header, words",
    [
        (sealed("x.ade.1.png", b"\xff" + (-1024 % 256**11).to_bytes(11, "big")), "not octal"),
        (sealed("x.ade.1.png", b"\x80" + (1 << 87).to_bytes(11, "big")), "above the cap of 268435456"),
        (sealed("y", b"%011o\0" % (600 << 20), b"x"), "an extended header of 629145600 bytes"),
        (sealed("y", b"%011o\0" % 512, b"x") + b"12 size=9\n\n" + bytes(501), "corrupt PAX header"),
        (long_name_chain(600, "chained.order_id.txt")[:-1024], ""),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_hostile_headers_cost_no_scene_before_or_behind_them(tmp_path, header, words, packed):
    before, behind = (tar_bytes([(f"{name}.order_id.txt", name.encode())]) for name in "ab")
    whole = before[:1024] + header + behind
    scenes, problem = indexed(written(tmp_path / "a.tar", gzip.compress(whole) if packed else whole))
    assert [name for name in ids(scenes) if name in "ab"] == ["a", "b"]
    assert bool(problem) == bool(words) and words in problem


def test_an_extended_header_of_any_size_takes_little_memory(tmp_path):
    head, behind = sealed("y", b"%011o\0" % (16 << 20), b"x"), tar_bytes([("b.order_id.txt", b"b")])
    path = written(tmp_path / "a.tar", gzip.compress(head + b"9" * (16 << 20) + behind, 1))
    tracemalloc.start()
    try:
        assert ids(indexed(path)[0]) == ["b"]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_whatever_reading_a_tar_raises_is_damage_of_this_tar_alone(tmp_path, monkeypatch):
    def parse(path):
        if path.startswith("b"):
            raise RecursionError("too deep")
        return parse_name(path)

    monkeypatch.setattr(tar_index, "parse_name", parse)
    scenes, problem = indexed(written(tmp_path / "a.tar", tar_bytes(members_of(["a", "b"]))))
    assert ids(scenes) == ["a"] and "too deep" in problem


def test_caps_and_the_end_of_time_end_a_tar(tmp_path, monkeypatch):
    path = written(tmp_path / "a.tar", tar_bytes(members_of(["a", "b"])))
    assert indexed(path, time.monotonic() - 1) == ([], f"{path}: no time was left to read on")
    monkeypatch.setattr(tar_index, "MAX_SAMPLE_MEMBERS", 4)
    scenes, problem = indexed(path)
    assert [(scene.members, "more than 4 members" in scene.problem) for scene in scenes] == [([], True)] * 2
    monkeypatch.setattr(tar_index, "MAX_MEMBERS", 20)
    scenes, problem = indexed(path)
    assert ids(scenes) == ["a", "b"] and "more than 20 members" in problem


def test_a_name_that_is_no_order_id_leaves_the_key(tmp_path):
    archive = io.BytesIO()
    np.savez(archive, order_id="x")
    members = [
        ("a.order_id.txt", b"  "), ("b.order_id.json", b"[1"), ("c.order_id.txt", b"x" * 5000),
        # An archive is never unpacked for its id, whatever it calls itself.
        ("d.npz", archive.getvalue()), ("e.order_id.txt", archive.getvalue()), ("f.json", archive.getvalue()),
    ]  # fmt: skip
    assert ids(indexed(written(tmp_path / "a.tar", tar_bytes(members)))[0]) == list("abcdef")


GOOD = [[0.0, 0, 0], [1, 2.5, -3]]


@pytest.mark.parametrize(
    "vertices, edges, words",
    [
        (GOOD[:1], [[0, 0]], "two vertices"),
        ([[0, 0, 0]] * 10_001, [[0, 1]], "at most 10000"),
        (None, [[0, 1]], "must be a list"),
        ([[0, 0, 0], [0, 0]], [[0, 1]], "3 numbers"),
        ([[0, 0, 0], [0, 0, float("nan")]], [[0, 1]], "not finite"),
        ([[0, 0, 0], [0, 0, float("inf")]], [[0, 1]], "not finite"),
        ([[0, 0, 0], [0, 0, -1e39]], [[0, 1]], "not finite"),
        ([[0, 0, 0], [0, 0, 10**400]], [[0, 1]], "not finite"),
        ([[0, 0, 0], [0, 0, True]], [[0, 1]], "3 numbers"),
        ([[0, 0, 0], [0, 0, "1"]], [[0, 1]], "3 numbers"),
        (GOOD, [], "an edge"),
        (GOOD, [[0, 1, 1]], "2 whole numbers"),
        (GOOD, [[0, 1.0]], "2 whole numbers"),
        (GOOD, [[0, True]], "2 whole numbers"),
        (GOOD, [[0, 2]], "does not join"),
        (GOOD, [[-1, 0]], "does not join"),
        (GOOD, [[1, 1]], "does not join"),
    ],
)
def test_an_answer_that_is_not_of_the_schema_is_refused_and_the_entry_stays(tmp_path, vertices, edges, words):
    answers = Answers(tmp_path / "s.json")
    answers.add("a")
    assert words in answers.give("a", vertices, edges)
    answers.write()
    assert answers_in(tmp_path / "s.json") == {"a": FALLBACK}
    assert answer_fault(GOOD, [[0, 1]]) is None


def test_answers_are_written_at_a_bounded_rate_and_only_when_something_changed(tmp_path):
    answers = Answers(tmp_path / "new" / "s.json")
    assert answers.due() == float("inf")
    for name in ("b", "a"):
        answers.add(name)
    assert "a" in answers and "c" not in answers and answers.due() <= time.monotonic()
    answers.write()
    assert answers.due() == float("inf")
    stamp = os.stat(tmp_path / "new" / "s.json").st_mtime_ns, os.stat(tmp_path / "new" / "s.json").st_ino
    answers.write()
    assert (os.stat(answers.path).st_mtime_ns, os.stat(answers.path).st_ino) == stamp
    assert answers.give("a", ANSWER["wf_vertices"], ANSWER["wf_edges"]) is None
    assert 3 < answers.due() - time.monotonic() <= 6
    assert list(answers_in(answers.path).items()) == [("b", FALLBACK), ("a", FALLBACK)]
    answers.write()
    assert list(answers_in(answers.path).items()) == [("b", FALLBACK), ("a", ANSWER)]


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(OSError, match="is a folder"):
        Answers(tmp_path)


def test_params_give_what_the_harness_says_and_pass_over_the_rest(tmp_path):
    file = tmp_path / "params.json"
    file.write_text('{"dataset": "a/b", "competition_id": "c/d", "time_limit": 7200, "output_path": "/x", "token": 3}')
    assert read_params(file) == Params("a/b", 7200.0, "/x")
    file.write_text('{"time_limit": "60"}')
    assert read_params(file) == Params(time_limit=60.0)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not a JSON file"), ("[]", "expected a JSON object"), ('{"time_limit": -1}', "time_limit must be"),
        ('{"time_limit": true}', "time_limit"), ('{"time_limit": NaN}', "time_limit"), ('{"time_limit": []}', "time"),
        ('{"time_limit": 1e999}', "time_limit"), ('{"output_path": 3}', "output_path must be a text"),
        ('{"dataset": ["a"]}', "dataset must be a text"), ("[" * 100_000, "not a JSON file"),
    ],
)  # fmt: skip
def test_params_that_are_wrong_are_one_line(tmp_path, capsys, text, words):
    (tmp_path / "params.json").write_text(text)
    assert main(["submit", "--params", str(tmp_path / "params.json"), "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match="give another with --params"):
        read_params(tmp_path / "nowhere.json")


def test_the_output_path_is_a_folder_or_a_json_file(tmp_path):
    (tmp_path / "x.json").mkdir()
    paths = [None, "/a/b", "/a/b.json", str(tmp_path / "x.json")]
    expected = ["submission.json", "/a/b/submission.json", "/a/b.json", str(tmp_path / "x.json" / "submission.json")]
    assert [str(output_file(path)) for path in paths] == expected


def test_public_tars_come_before_private_ones_and_others_only_where_there_is_neither(tmp_path):
    names = ["2026_private/b.tar", "2026_private/a.tar.gz", "x/y-public/z/c.tar", "d.tar", "x/public.tgz"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [os.path.relpath(path, tmp_path) for path in find_tars(tmp_path)]
    assert found == ["x/public.tgz", "x/y-public/z/c.tar", "2026_private/a.tar.gz", "2026_private/b.tar"]
    assert find_tars(tmp_path / "d.tar") == [str(tmp_path / "d.tar")]
    for name in names:
        if name != "d.tar":
            (tmp_path / name).unlink()
    assert find_tars(tmp_path) == [str(tmp_path / "d.tar")]
    (tmp_path / "d.tar").unlink()
    with pytest.raises(ShardError, match="no tar"):
        find_tars(tmp_path)


def test_absent_data_without_a_hub_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ShardError, match="a/b cannot be fetched") as error:
        download("a/b", tmp_path / "data", 60)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match="pip install huggingface-hub"):
        download("a/b", tmp_path / "data", 60)


# Fetches one tar, and then for ever another one.
HUB = """
import io, tarfile, time
def snapshot_download(dataset, *, repo_type, local_dir, allow_patterns):
    assert (dataset, repo_type) == ("a/b", "dataset") and "*.tar" in allow_patterns
    with tarfile.open(local_dir + "/public.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("k.order_id.txt"))
    time.sleep(600)
"""


def test_absent_data_are_fetched_as_far_as_there_is_time(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "huggingface_hub.py").write_text(HUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("wireframe.submit.supervisor.WORKER", "import time; time.sleep(600)")
    (tmp_path / "params.json").write_text(json.dumps({"dataset": "a/b", "output_path": str(tmp_path)}))
    start = time.monotonic()
    assert main(["submit", "--params", str(tmp_path / "params.json"), "--budget", "6", "--quiet"]) == 1
    assert time.monotonic() - start < 6
    assert answers_in(tmp_path / "submission.json") == {"k": FALLBACK}
    assert "fall-back for k: no time was left for it" in capsys.readouterr().err


def test_the_supervisor_and_its_arguments_load_no_torch():
    ask = "import sys, wireframe.cli; from wireframe.submit import supervisor, harness; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_reading_a_scene_from_a_tar_that_changed_meanwhile_says_so(tmp_path):
    ((scene,), _) = indexed(written(tmp_path / "a.tar", tar_bytes(members_of(["a"]))))
    with open_tar(written(tmp_path / "a.tar", b"")) as file, pytest.raises(ShardError, match="no member of scene 'a'"):
        read_members(file, scene)
    with pytest.raises(ShardError, match="cannot be read at scene 'a'"):
        read_members(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(bytes(99))[:12])), scene)
