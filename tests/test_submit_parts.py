import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time

import pytest
from raw_data import hub_members, raw_row, tar_bytes
from submit_cases import ANSWER, FALLBACK, answers_in

from wireframe.cli import main
from wireframe.errors import ConfigError, MissingPackageError, ShardError
from wireframe.raw_rows import build_row
from wireframe.shards import iter_samples
from wireframe.submit.answers import Answers, fault
from wireframe.submit.harness import Params, download, find_tars, output_file, process_started, read_params
from wireframe.submit.tar_index import index_tar, open_tar, read_members


def members_of(names):
    return [member for name in names for member in hub_members(raw_row(2, order_id=name)).items()]


def written(path, data):
    path.write_bytes(data)
    return str(path)


def ids(index):
    return [scene.order_id for scene in index.scenes]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_index_has_the_scenes_and_the_bytes_that_reading_gives(tmp_path, form, mode):
    members = [("READ.ME", b"x"), *members_of(["a", "b" * 70]), ("b.notes.md", b"x"), *members_of(["c"])]
    members.insert(5, ("a.order_id.txt", b"the real id of a"))
    members += [("d.json", json.dumps({"order_id": "id of d", "image_ids": ["1"]}).encode())]
    path = written(tmp_path / "a.tar", tar_bytes(members, form, mode))
    index = index_tar(path)
    assert index.problem is None
    samples = [(s.key, [pair for pair in s.members if pair[0].column]) for s in iter_samples(path)]
    with open_tar(path) as file:
        assert [(scene.key, read_members(file, scene)) for scene in index.scenes] == samples
    rows = [build_row(key, members) for key, members in samples]
    assert ids(index) == [row["order_id"] for row in rows] == ["the real id of a", "b" * 70, "c", "id of d"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_scene_that_a_tar_breaks_off_in_is_listed_with_its_whole_members(tmp_path, mode):
    whole = tar_bytes(members_of(["a", "b"]))
    cut = whole[: whole.index(b"b.K.npy") + 600]
    path = written(tmp_path / "a.tar", gzip.compress(cut)[:-9] if mode == "w:gz" else cut)
    index = index_tar(path)
    assert ids(index) == ["a", "b"] and index.problem is not None and path in index.problem
    if mode == "w":
        with open_tar(path) as file:
            columns = {name.column for name, _ in read_members(file, index.scenes[1])}
        assert "gestalt" in columns and "K" not in columns


def test_scenes_behind_a_damaged_header_are_found(tmp_path):
    whole = bytearray(tar_bytes(members_of(["a", "b", "c"])))
    place = whole.index(b"b.ade.img_1.png")
    whole[place : place + 512] = os.urandom(512)
    index = index_tar(written(tmp_path / "a.tar", whole))
    assert ids(index) == ["a", "b", "c"] and "are no header" in index.problem
    assert len(index.scenes[1].members) == len(index.scenes[2].members) - 1


@pytest.mark.parametrize(
    "data, words",
    [(b"", "empty file"), (b"text" * 500, "not a tar"), (os.urandom(1 << 16), "not a tar"), (b"\x1f\x8b", "end")],
)
def test_what_is_no_tar_has_no_scenes_and_a_reason(tmp_path, data, words):
    index = index_tar(written(tmp_path / "a.tar", data))
    assert index.scenes == [] and words in index.problem
    with pytest.raises(ShardError, match="cannot be opened"):
        index_tar(str(tmp_path / "nowhere.tar"))


def test_hostile_headers_end_the_list_and_not_the_run(tmp_path):
    header = bytearray(tarfile.TarInfo("x.ade.1.png").tobuf(tarfile.GNU_FORMAT))
    # A negative size in base 256.
    header[124:136] = b"\xff" + (-1024 % 256**11).to_bytes(11, "big")
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    header[148:156] = b"%06o\0 " % total
    path = written(tmp_path / "a.tar", tar_bytes(members_of(["a"]))[:-10240] + bytes(header) + bytes(1024))
    assert ids(index_tar(path))[0] == "a"
    huge = tarfile.TarInfo("a.ade.1.png")
    huge.size = 1 << 40
    index = index_tar(written(tmp_path / "b.tar", huge.tobuf()))
    assert ids(index) == ["a"] and index.scenes[0].members == () and "unexpected end" in index.problem


def test_a_name_that_is_no_order_id_leaves_the_key(tmp_path):
    members = [("a.order_id.txt", b"  "), ("b.order_id.json", b"[1"), ("c.order_id.txt", b"x" * 5000)]
    assert ids(index_tar(written(tmp_path / "a.tar", tar_bytes(members)))) == ["a", "b", "c"]


GOOD = [[0.0, 0, 0], [1, 2.5, -3]]


@pytest.mark.parametrize(
    "vertices, edges, words",
    [
        (GOOD[:1], [[0, 0]], "2 to"),
        ([[0, 0, 0]] * 10_001, [[0, 1]], "2 to"),
        (None, [[0, 1]], "2 to"),
        ([[0, 0, 0], [0, 0]], [[0, 1]], "three finite"),
        ([[0, 0, 0], [0, 0, float("nan")]], [[0, 1]], "three finite"),
        ([[0, 0, 0], [0, 0, float("inf")]], [[0, 1]], "three finite"),
        ([[0, 0, 0], [0, 0, 10**400]], [[0, 1]], "three finite"),
        ([[0, 0, 0], [0, 0, True]], [[0, 1]], "three finite"),
        ([[0, 0, 0], [0, 0, "1"]], [[0, 1]], "three finite"),
        (GOOD, [], "1 to"),
        (GOOD, [[0, 1, 1]], "two whole"),
        (GOOD, [[0, 1.0]], "two whole"),
        (GOOD, [[0, True]], "two whole"),
        (GOOD, [[0, 2]], "does not join"),
        (GOOD, [[-1, 0]], "does not join"),
        (GOOD, [[1, 1]], "does not join"),
    ],
)
def test_an_answer_that_is_not_of_the_schema_is_refused_and_the_entry_stays(tmp_path, vertices, edges, words):
    answers = Answers(tmp_path / "s.json", ["a"])
    assert words in answers.give("a", vertices, edges) and not answers.has("a")
    answers.write()
    assert answers_in(tmp_path / "s.json") == {"a": FALLBACK}
    assert fault(GOOD, [[0, 1]]) is None


def test_answers_are_written_at_a_bounded_rate_and_only_when_something_changed(tmp_path):
    answers = Answers(tmp_path / "new" / "s.json", ["b", "a", "b"])
    assert len(answers) == 2 and answers.due() <= time.monotonic()
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
        Answers(tmp_path, ["a"])


def test_params_give_what_the_harness_says_and_pass_over_the_rest(tmp_path):
    file = tmp_path / "params.json"
    file.write_text('{"dataset": "a/b", "competition_id": "c/d", "time_limit": 7200, "output_path": "/x", "token": 3}')
    assert read_params(file) == Params("a/b", "c/d", 7200.0, "/x")
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
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ShardError, match=r"there is no data at .* and a/b cannot be fetched") as error:
        download("a/b", tmp_path / "data")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match="pip install huggingface-hub"):
        download("a/b", tmp_path / "data")


def test_absent_data_is_fetched_into_the_data_folder(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def snapshot(dataset, *, repo_type, local_dir, allow_patterns):
        assert (dataset, repo_type) == ("a/b", "dataset") and "*.tar" in allow_patterns
        (local_dir / "public").mkdir(parents=True)
        (local_dir / "public" / "1.tar").write_bytes(tar_bytes([("k.image_ids.json", b"[]")]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "params.json").write_text(json.dumps({"dataset": "a/b", "output_path": str(tmp_path)}))
    arguments = ["submit", "--params", str(tmp_path / "params.json"), "--budget", "0.001", "--quiet"]
    assert main(arguments) == 1
    assert answers_in(tmp_path / "submission.json") == {"k": FALLBACK}
    assert "fall-back for k: no time was left for it" in capsys.readouterr().err


def test_the_time_counts_from_the_start_of_the_process():
    # Not the time of the import, which a clock of this process's own would miss.
    ask = "import time; time.sleep(1); from wireframe.submit import harness; "
    ask += "print(time.monotonic() - harness.process_started())"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    assert 1.0 <= float(done.stdout) <= time.monotonic() - start + 0.05
    assert process_started() <= time.monotonic()


def test_the_supervisor_and_its_arguments_load_no_torch():
    ask = "import sys, wireframe.cli; from wireframe.submit import supervisor, harness; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_reading_a_scene_from_a_tar_that_changed_meanwhile_gives_what_is_there(tmp_path):
    path = written(tmp_path / "a.tar", tar_bytes(members_of(["a"])))
    (scene,) = index_tar(path).scenes
    with open_tar(written(tmp_path / "a.tar", b"")) as file:
        assert read_members(file, scene) == []
    with pytest.raises(ShardError, match="cannot be read at scene 'a'"):
        read_members(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(bytes(99))[:12])), scene)
