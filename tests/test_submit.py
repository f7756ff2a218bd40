import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from raw_data import tar_bytes
from submit_cases import (
    ANSWER,
    FALLBACK,
    STAND_IN,
    answers_in,
    link_packages,
    long_name_chain,
    named_tar,
    save_tiny_model,
    stand_in,
)

from wireframe import child
from wireframe.cli import main
from wireframe.errors import ShardError, WireframeError
from wireframe.shard_writer import ShardWriter
from wireframe.submit.supervisor import submit
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=600)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("submit") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """As on the harness: a hostile tar, a public one with broken scenes between good ones, a private one cut off."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "private_x").mkdir()
    (folder / "a_public").mkdir()
    good = [make_scene(0, index, TINY) for index in range(4)]
    (folder / "a_public" / "0.tar").write_bytes(b"".join([
        long_name_chain(600, "chained.order_id.txt"), os.urandom(1 << 16), tar_bytes([("lost.order_id.txt", b"lost")]),
    ]))  # fmt: skip
    with ShardWriter(folder / "a_public" / "1.tar") as writer:
        writer.write(good[0])
        writer.write({**good[1], "colmap": b"broken"})
        writer.write({**good[1], "order_id": "no-views", "pose_only_in_colmap": [True] * len(good[1]["image_ids"])})
        writer.write(good[2])
    with ShardWriter(folder / "private_x" / "0.tar") as writer:
        # The first scene of an id counts.
        writer.write({**good[3], "order_id": good[0]["order_id"]})
        writer.write(good[3])
        writer.write({**good[3], "order_id": "cut"})
    whole = (folder / "private_x" / "0.tar").read_bytes()
    cut = whole.index(b"cut.gestalt")
    (folder / "private_x" / "0.tar").write_bytes(whole[: cut + 700])
    return folder


GOOD = ["synth-0-000000", "synth-0-000002", "synth-0-000003"]
ORDER = ["chained", "lost", GOOD[0], "synth-0-000001", "no-views", *GOOD[1:], "cut"]


@pytest.fixture(scope="module")
def predicted(data, model, tmp_path_factory):
    """What ``wireframe predict`` says of the two tars of real scenes, of an id that comes again the first."""
    found = {}
    for tar in ("private_x/0.tar", "a_public/1.tar"):
        out = tmp_path_factory.mktemp("predict") / "p.json"
        main(["predict", str(data / tar), str(out), "--model", str(model), "--workers", "1", "--quiet"])
        found |= {entry.pop("order_id"): entry for entry in json.loads(out.read_bytes())}
    return found


def test_a_run_as_on_the_harness_answers_every_scene_as_predict_does(data, model, predicted, tmp_path):
    (tmp_path / "params.json").write_text(
        json.dumps({"dataset": "a/b", "competition_id": "c/d", "time_limit": 600, "output_path": str(tmp_path / "out")})
    )
    os.symlink(data, tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-m", "wireframe", "submit", "--model", str(model), "--workers", "2", "--quiet"],
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = answers_in(tmp_path / "out" / "submission.json")
    assert list(found) == ORDER
    assert all(found[name] == predicted[name] != FALLBACK for name in GOOD)
    assert all(found[name] == FALLBACK for name in ORDER if name not in GOOD)
    # A tar that breaks off is not all there, and says so.
    assert done.returncode == 1 and "private_x/0.tar: truncated" in done.stderr
    assert "a_public/0.tar: corrupt header" in done.stderr and "Traceback" not in done.stderr
    assert "fall-back for no-views: scene 'no-views': no usable view" in done.stderr
    assert "8 scenes in" in done.stdout and "5 have the fall-back" in done.stdout


def test_a_file_is_there_from_the_first_tar_on_and_whole_before_anything_is_loaded(tmp_path, monkeypatch):
    out, seen = tmp_path / "s.json", []

    def tars():
        yield named_tar(tmp_path / "a.tar", ["x"])
        seen.append(answers_in(out))
        yield named_tar(tmp_path / "b.tar", ["y", "x", "z"])

    def launch(*_):
        seen.append(answers_in(out))
        raise OSError(errno.ENOENT, "not here")

    monkeypatch.setattr(child, "Child", launch)
    with pytest.raises(WireframeError, match="cannot be started: not here"):
        submit(tars(), out)
    assert seen == [{"x": FALLBACK}, {"x": FALLBACK, "y": FALLBACK, "z": FALLBACK}]


def test_a_model_that_cannot_be_loaded_is_named_and_the_fall_backs_stay(tmp_path):
    with pytest.raises(WireframeError, match="no model here"):
        submit([named_tar(tmp_path / "a.tar", ["x"])], tmp_path / "s.json", start=stand_in(
            "import sys; sys.stdin.readline(); print('{\"fatal\": \"no model here\"}')"))
    assert answers_in(tmp_path / "s.json") == {"x": FALLBACK}


def test_a_process_that_never_comes_to_a_scene_is_tried_twice_and_named(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["x"])
    start = stand_in(f"open({str(tmp_path / 'tries')!r}, 'a').write('.'); raise SystemExit(7)")
    with pytest.raises(WireframeError, match="exit code 7"):
        submit([tar], tmp_path / "s.json", start=start)
    assert (tmp_path / "tries").read_text() == ".." and answers_in(tmp_path / "s.json") == {"x": FALLBACK}


@pytest.mark.parametrize("workers", [1, 4])
def test_crashes_bad_answers_and_failures_cost_their_own_scene_alone(tmp_path, workers):
    # With several workers each crash comes while the scenes behind it are begun already.
    keys = ["once-crash-1", "a", "b", "c", "crash-1", "bad-1", "nan-1", "loose-1", "mute-1", "crash-2", "d", "e"]
    tar = named_tar(tmp_path / "a.tar", keys)
    result = submit([tar], tmp_path / "s.json", workers=workers, start=stand_in())
    found = answers_in(tmp_path / "s.json")
    assert list(found) == keys
    good = {"once-crash-1", "a", "b", "c", "d", "e"}
    assert {key for key in keys if found[key] == ANSWER} == good
    reasons = dict(result.failures)
    assert set(reasons) == set(keys) - good and result.scenes == len(keys)
    assert "signal 11" in reasons["crash-1"] and "exit code 0" in reasons["mute-1"]
    assert reasons["bad-1"] == "it is bad" and "finite" in reasons["nan-1"] and "[0, 2]" in reasons["loose-1"]


FAILS_ONCE = """
import os
import wireframe.submit.worker as worker
def prepared(job):
    def predict(send):
        for number, _ in job["scenes"]:
            send(begun=number)
            if not os.path.exists(MARK):
                open(MARK, "w").close()
                raise RuntimeError("can't start new thread")
            send(answer=number, vertices=[[0, 0, 0], [1, 0, 0]], edges=[[0, 1]])
    return predict
worker._prepared = prepared
worker.main()
"""


def test_an_exception_beside_the_scenes_costs_none_of_them(tmp_path):
    start = child.command(f"MARK = {str(tmp_path / 'mark')!r}\n{FAILS_ONCE}")
    result = submit([named_tar(tmp_path / "a.tar", ["a", "b", "c"])], tmp_path / "s.json", start=start)
    assert not result.failures and (tmp_path / "mark").exists()
    assert len(answers_in(tmp_path / "s.json")) == 3


def test_a_process_that_hangs_while_it_starts_is_replaced(tmp_path):
    tar, seen = named_tar(tmp_path / "a.tar", ["a", "b"]), tmp_path / "seen"
    hangs_once = f"""
import os, time
if not os.path.exists({str(seen)!r}):
    open({str(seen)!r}, "w").close()
    time.sleep(600)
"""
    began = time.monotonic()
    # A quarter of the time that is left is longer than start_patience.
    result = submit([tar], tmp_path / "s.json", budget=16.0, start_patience=0.5, start=stand_in(hangs_once + STAND_IN))
    assert not result.failures and seen.exists() and 3.0 < time.monotonic() - began < 12.0


def test_where_no_process_was_ready_in_time_the_reason_says_so(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["a"])
    result = submit([tar], tmp_path / "s.json", budget=2.0, start=stand_in("import time; time.sleep(600)"))
    ((_, reason),) = result.failures
    assert reason == "no time was left for it, before the predicting process was ready"
    with pytest.raises(WireframeError, match=r"does not come to a scene: not ready in 0\.\d seconds"):
        submit(
            [tar], tmp_path / "s.json", budget=3.0, start_patience=0.5, start=stand_in("import time; time.sleep(600)")
        )


def test_a_scene_that_hangs_is_tried_again_alone_and_costs_its_patience_twice(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["once-hang-1", "a", "b", "c", "d", "hang-1", "e"])
    start = time.monotonic()
    counted = f"open({str(tmp_path / 'starts')!r}, 'a').write('.')\n{STAND_IN}"
    result = submit([tar], tmp_path / "s.json", patience=1.0, workers=2, start=stand_in(counted))
    assert 3.0 <= time.monotonic() - start < 12
    # All; the four begun, one by one; the three left; of these the first that hangs again, and the other one.
    assert (tmp_path / "starts").read_text() == "....."
    found = answers_in(tmp_path / "s.json")
    assert [key for key in found if found[key] != ANSWER] == ["hang-1"]
    assert dict(result.failures) == {"hang-1": "no answer in 1.0 seconds"}


def test_hanging_scenes_leave_three_quarters_of_the_time_each(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["hang-1", "hang-2", "a"])
    start = time.monotonic()
    submit([tar], tmp_path / "s.json", budget=8.0, start=stand_in())
    assert time.monotonic() - start < 8
    assert answers_in(tmp_path / "s.json")["a"] == ANSWER


def test_a_budget_that_is_too_small_is_kept_and_every_scene_has_an_answer(tmp_path):
    keys = [f"slow-{index}" for index in range(50)]
    start = time.monotonic()
    result = submit([named_tar(tmp_path / "a.tar", keys)], tmp_path / "s.json", budget=4.0, start=stand_in())
    assert time.monotonic() - start < 4.0
    found = answers_in(tmp_path / "s.json")
    done = [key for key in keys if found[key] == ANSWER]
    assert list(found) == keys and done == keys[: len(done)] and 1 <= len(done) < 20
    # Near the end a quarter of the time left is less than a scene takes.
    assert all(reason.startswith(("no time was left for it", "no answer in 0.")) for _, reason in result.failures)


def test_a_tar_without_end_takes_its_share_of_the_time_and_no_more(tmp_path):
    # Behind its one scene 10 GB of zeros, in 10 MB.
    zeros = gzip.compress(bytes(32 << 20))
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(tar_bytes([("first.image_ids.json", b"[]")])) + zeros * 320)
    tars = [str(tmp_path / "0.tar.gz"), named_tar(tmp_path / "1.tar", ["a"])]
    start = time.monotonic()
    result = submit(tars, tmp_path / "s.json", budget=4.0, start=stand_in())
    assert 0.9 <= time.monotonic() - start < 4.0
    assert answers_in(tmp_path / "s.json") == {"first": ANSWER, "a": ANSWER}
    assert len(result.damage) == 1 and "0.tar.gz: " in result.damage[0] and "no time was left" in result.damage[0]


def test_the_budget_counts_from_the_moment_that_is_given(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["hang-1"])
    start = time.monotonic()
    result = submit([tar], tmp_path / "s.json", budget=62, started=start - 54, start=stand_in())
    assert [scene.order_id for scene in result.failures] == ["hang-1"] and time.monotonic() - start < 8
    with pytest.raises(ShardError, match=r"a\.tar: .*no time was left"):
        submit([tar], tmp_path / "s.json", budget=10, started=start - 10, start=stand_in())


SUPERVISOR = """
import sys
import wireframe.submit.answers
wireframe.submit.answers.WRITE_EVERY = 0.1
from wireframe.submit.supervisor import submit
submit([sys.argv[1]], sys.argv[2], start=sys.argv[3:])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_in_the_middle_leaves_a_whole_file_with_the_answers_so_far(tmp_path, how):
    keys, out = [f"slow-{index}" for index in range(100)], tmp_path / "s.json"
    run = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, named_tar(tmp_path / "a.tar", keys), str(out), *stand_in()],
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    end = time.monotonic() + 60
    while not (out.exists() and ANSWER in answers_in(out).values()):
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    run.send_signal(how)
    assert run.wait() == -how
    found = answers_in(out)
    assert list(found) == keys
    assert found["slow-0"] == ANSWER and found["slow-99"] == FALLBACK
    # What the kill left beside it does no harm and goes with the next write.
    submit([str(tmp_path / "a.tar")], out, budget=0.5, start=stand_in())
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "s.json"]


PATCHED_WORKER = """
import os, signal, time
import numpy as np
import wireframe.predict, wireframe.scene
from wireframe.graph import Wireframe
read_scene, wireframe_of = wireframe.scene.read_scene, wireframe.predict.wireframe_of
def reading(row):
    if row["order_id"].endswith("1"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if row["order_id"].endswith("4"):
        raise MemoryError("no room")
    return read_scene(row)
def broken(found, sample, **how):
    predicted = wireframe_of(found, sample, **how)
    if sample.order_id.endswith("3"):
        return Wireframe(predicted.vertices * np.float32("nan"), predicted.edges)
    return predicted
wireframe.scene.read_scene, wireframe.predict.wireframe_of = reading, broken
from wireframe.submit.worker import main
main()
"""


def test_the_predicting_process_itself_under_a_crash_an_exception_and_a_nan(model, tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        for index in (0, 3, 4, 1):
            writer.write(make_scene(0, index, TINY))
    result = submit(
        [str(tmp_path / "a.tar")], tmp_path / "s.json", model=model, workers=2, start=child.command(PATCHED_WORKER)
    )
    found = answers_in(tmp_path / "s.json")
    reasons = {name[-1]: reason for name, reason in result.failures}
    assert sorted(reasons) == ["1", "3", "4"], reasons
    assert "signal 11" in reasons["1"] and "finite" in reasons["3"] and "MemoryError: no room" in reasons["4"]
    assert [found[name] != FALLBACK for name in found] == [True, False, False, False]


BUSY_WORKER = """
import time
import wireframe.submit.worker as worker
worker._prepared = lambda job: lambda send: time.sleep(600)
worker.main()
"""


def test_the_predicting_process_ends_when_its_parent_is_gone():
    busy = child.Child(child.command(BUSY_WORKER), first={"seconds": 600})
    assert busy.receive(60) == {"ready": True}
    busy.process.stdin.close()
    assert busy.process.wait(timeout=20) == 0
    busy.end()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    assert main(["submit", "--bundle", str(folder), "--model", str(model), "--threshold", "0"]) == 0
    return folder


def test_a_bundle_runs_alone_without_network_compiler_and_installed_package(bundle, data, predicted, tmp_path):
    (tmp_path / "tmp").mkdir()
    os.symlink(data, tmp_path / "tmp" / "data")
    out = tmp_path / "out" / "submission.json"
    params = {"dataset": "a/b", "competition_id": "c/d", "time_limit": 600, "output_path": str(out.parent)}
    (bundle / "params.json").write_text(json.dumps(params))
    assert not list(bundle.rglob("*.so"))
    needed = [line.split(">")[0] for line in (bundle / "requirements.txt").read_text().split()]
    packages = link_packages(tmp_path / "packages", needed)
    assert not (packages / "wireframe").exists() and not (packages / "huggingface_hub").exists()
    alone = [shutil.which("unshare") or "", "-rn"]
    alone = alone if alone[0] and subprocess.run([*alone, "true"], capture_output=True).returncode == 0 else []
    done = subprocess.run(
        [*alone, sys.executable, "-S", "script.py", "--workers", "1"], cwd=bundle, capture_output=True, text=True,
        timeout=120, env={"PYTHONPATH": str(packages), "TMPDIR": str(tmp_path / "tmp"), "PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = answers_in(out)
    assert list(found) == ORDER
    # By the reference in place of C++: the points are the same bits, the model's norms are rounded otherwise.
    for name in GOOD:
        assert found[name] != FALLBACK and found[name]["wf_edges"] == predicted[name]["wf_edges"]
        assert np.allclose(found[name]["wf_vertices"], predicted[name]["wf_vertices"], atol=1e-3)


def test_a_bundle_is_never_written_over_something(bundle, model, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert main(["submit", "--bundle", str(tmp_path / "full"), "--model", str(model)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]
    assert main(["submit", "--bundle", str(tmp_path / "new"), "--budget", "5"]) == 2
    assert "--budget does not count here: give it to the bundle's script.py" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
