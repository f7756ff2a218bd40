import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from submit_cases import ANSWER, FALLBACK, STAND_IN, answers_in, link_packages, named_tar, save_tiny_model, stand_in

from wireframe.cli import main
from wireframe.errors import WireframeError
from wireframe.kernels import native
from wireframe.shard_writer import ShardWriter
from wireframe.submit.process import command
from wireframe.submit.supervisor import submit
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=600)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("submit") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """As on the harness: a public tar with broken scenes between good ones, a private one that breaks off."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "private_x").mkdir()
    (folder / "a_public").mkdir()
    good = [make_scene(0, index, TINY) for index in range(4)]
    with ShardWriter(folder / "a_public" / "1.tar") as writer:
        writer.write(good[0])
        writer.write({**good[1], "colmap": b"broken"})
        writer.write({**good[1], "order_id": "no-views", "pose_only_in_colmap": [True] * len(good[1]["image_ids"])})
        writer.write(good[2])
    with ShardWriter(folder / "private_x" / "0.tar") as writer:
        # The first scene of this id cannot be answered, so this one counts.
        writer.write(good[1])
        writer.write(good[3])
        writer.write({**good[3], "order_id": "cut"})
    whole = (folder / "private_x" / "0.tar").read_bytes()
    cut = whole.index(b"cut.gestalt")
    (folder / "private_x" / "0.tar").write_bytes(whole[: cut + 700])
    return folder


ORDER = ["synth-0-000000", "synth-0-000001", "no-views", "synth-0-000002", "synth-0-000003", "cut"]


@pytest.fixture(scope="module")
def predicted(data, model, tmp_path_factory):
    """What ``wireframe predict`` says of each tar, the later tar first: of an id that comes again, the good scene."""
    found = {}
    for tar in ("a_public/1.tar", "private_x/0.tar"):
        out = tmp_path_factory.mktemp("predict") / "p.json"
        main(["predict", str(data / tar), str(out), "--model", str(model), "--workers", "1", "--quiet"])
        entries = json.loads(out.read_bytes())
        found |= {e.pop("order_id"): e for e in entries}
    return found


def test_a_run_as_on_the_harness_answers_every_scene_as_predict_does(data, model, predicted, tmp_path, capfd):
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
    good = [name for name in ORDER if name.startswith("synth")]
    assert all(found[name] == predicted[name] != FALLBACK for name in good)
    assert found["no-views"] == FALLBACK
    # A tar that breaks off is not all there, and says so; its last scene has whole members, and an answer of its own.
    assert done.returncode == 1 and "private_x/0.tar: unexpected end of data" in done.stderr
    assert "fall-back for no-views: scene 'no-views': no usable view" in done.stderr
    assert "1 scenes have an order_id that was there before" in done.stderr and "Traceback" not in done.stderr
    assert "6 scenes in" in done.stdout


def test_the_file_of_fall_backs_is_whole_before_anything_is_loaded(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["x", "y", "x", "z"])
    # A process that does nothing but to look at the file as it starts.
    look = f"""
import json, shutil, sys
sys.stdin.readline()
shutil.copy({str(tmp_path / "s.json")!r}, {str(tmp_path / "seen.json")!r})
print(json.dumps({{"fatal": "no model here"}}), flush=True)
"""
    with pytest.raises(WireframeError, match="no model here"):
        submit([tar], tmp_path / "s.json", start=stand_in(look))
    assert answers_in(tmp_path / "seen.json") == {"x": FALLBACK, "y": FALLBACK, "z": FALLBACK}
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "seen.json").read_bytes()


def test_a_process_that_never_starts_is_tried_twice_and_named(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["x"])
    start = stand_in(f"open({str(tmp_path / 'tries')!r}, 'a').write('.'); raise SystemExit(7)")
    with pytest.raises(WireframeError, match="exit code 7"):
        submit([tar], tmp_path / "s.json", start=start)
    assert (tmp_path / "tries").read_text() == ".." and answers_in(tmp_path / "s.json") == {"x": FALLBACK}


def test_crashes_bad_answers_and_failures_cost_their_own_scene_alone(tmp_path):
    keys = ["a", "crash-1", "b", "fragile-1", "bad-1", "nan-1", "loose-1", "mute-1", "c"]
    result = submit([named_tar(tmp_path / "a.tar", keys)], tmp_path / "s.json", start=stand_in())
    found = answers_in(tmp_path / "s.json")
    assert list(found) == keys
    good = {"a", "b", "fragile-1", "c"}
    assert {key for key in keys if found[key] == ANSWER} == good
    reasons = dict(result.failures)
    assert set(reasons) == set(keys) - good
    assert "signal 11" in reasons["crash-1"] and "exit code 0" in reasons["mute-1"]
    assert reasons["bad-1"] == "it is bad" and "finite" in reasons["nan-1"] and "[0, 2]" in reasons["loose-1"]


def test_a_scene_that_hangs_costs_its_patience_and_not_the_budget(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["a", "hang-1", "b", "hang-2", "c"])
    start = time.monotonic()
    counted = f"open({str(tmp_path / 'starts')!r}, 'a').write('.')\n{STAND_IN}"
    result = submit([tar], tmp_path / "s.json", patience=0.5, start=stand_in(counted))
    assert time.monotonic() - start < 8 and (tmp_path / "starts").read_text() == "..."
    found = answers_in(tmp_path / "s.json")
    assert [key for key in found if found[key] == ANSWER] == ["a", "b", "c"]
    assert all("not done after" in reason for _, reason in result.failures)


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
    assert {reason for _, reason in result.failures} == {"no time was left for it"}


def test_the_budget_counts_from_the_moment_that_is_given(tmp_path):
    tar = named_tar(tmp_path / "a.tar", ["a"])
    result = submit([tar], tmp_path / "s.json", budget=10, started=time.monotonic() - 10, start=stand_in())
    assert [scene.order_id for scene in result.failures] == ["a"]


def test_an_id_that_comes_again_has_one_entry_and_the_first_answer_there_is(tmp_path):
    tars = [named_tar(tmp_path / f"{n}.tar", keys) for n, keys in enumerate((["bad-1", "a"], ["a", "bad-1", "b"]))]
    result = submit(tars, tmp_path / "s.json", start=stand_in(
        STAND_IN.replace('what == "bad"', 'what == "bad" and shard.endswith("0.tar")')))
    assert answers_in(tmp_path / "s.json") == {"bad-1": ANSWER, "a": ANSWER, "b": ANSWER}
    assert result.repeated == 2 and not result.failures


SUPERVISOR = """
import sys
import wireframe.submit.answers
wireframe.submit.answers.WRITE_EVERY = 0.1
from wireframe.submit.supervisor import submit
from submit_cases import stand_in
print(submit([sys.argv[1]], sys.argv[2], start=stand_in()), flush=True)
"""


def started_run(folder, keys):
    """A submission in a process of its own, once the first answer stands in its file."""
    out = folder / "s.json"
    tests = os.path.dirname(__file__)
    arguments = [named_tar(folder / "a.tar", keys), str(out)]
    run = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *arguments], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(tests), tests])},
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (out.exists() and ANSWER in answers_in(out).values()):
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    return run, out


def test_a_kill_in_the_middle_leaves_a_whole_file_with_the_answers_so_far(tmp_path):
    keys = [f"slow-{index}" for index in range(100)]
    run, out = started_run(tmp_path, keys)
    run.kill()
    run.wait()
    found = answers_in(out)
    assert list(found) == keys
    assert found["slow-0"] == ANSWER and found["slow-99"] == FALLBACK
    # What the kill left beside it does no harm and goes with the next write.
    submit([str(tmp_path / "a.tar")], out, budget=0.01, start=stand_in())
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "s.json"]


def test_sigterm_writes_every_answer_there_is(tmp_path):
    run, out = started_run(tmp_path, ["a", "b", "hang-1", "c"])
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 0 and "stopped=True" in said and "stopped by SIGTERM" in said
    assert list(answers_in(out).values()) == [ANSWER, ANSWER, FALLBACK, FALLBACK]


PATCHED_WORKER = """
import json, os, sys, signal, time
sys.path[:] = json.loads(sys.argv[1])
import numpy as np
import wireframe.predict, wireframe.scene
from wireframe.graph import Wireframe
read_scene, wireframe_of = wireframe.scene.read_scene, wireframe.predict.wireframe_of
def reading(row):
    if row["order_id"].endswith("1"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if row["order_id"].endswith("2"):
        time.sleep(600)
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
        [str(tmp_path / "a.tar")], tmp_path / "s.json", model=model, workers=2, start=command(PATCHED_WORKER)
    )
    found = answers_in(tmp_path / "s.json")
    reasons = {name[-1]: reason for name, reason in result.failures}
    assert sorted(reasons) == ["1", "3", "4"], reasons
    assert "signal 11" in reasons["1"] and "finite" in reasons["3"] and "MemoryError: no room" in reasons["4"]
    assert [found[name] != FALLBACK for name in found] == [True, False, False, False]


def test_the_predicting_process_ends_when_its_parent_is_gone(model, tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(make_scene(0, 2, TINY))
    from wireframe.submit.tar_index import index_tar

    scenes = list(enumerate(index_tar(str(tmp_path / "a.tar")).scenes))
    job = {"model": str(model), "config": None, "threshold": None, "workers": 2, "compiled": True, "seconds": 600,
           "scenes": scenes}  # fmt: skip
    worker = subprocess.Popen(command(PATCHED_WORKER), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker.stdin.write(json.dumps(job).encode() + b"\n")
    worker.stdin.flush()
    said = [json.loads(worker.stdout.readline()) for _ in range(2)]
    assert said == [{"ready": True}, {"begun": 0}]
    worker.stdin.close()
    assert worker.wait(timeout=20) == 0
    worker.stdout.close()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    assert main(["submit", "--bundle", str(folder), "--model", str(model), "--threshold", "0"]) == 0
    return folder


def test_the_compiled_module_of_a_bundle_loads_there(bundle):
    ask = "import wireframe.kernels.native as n; print(n.__file__, n.problem())"
    done = subprocess.run([sys.executable, "-c", ask], cwd=bundle, capture_output=True, text=True, timeout=60)
    where, said = done.stdout.split(maxsplit=1)
    assert where.startswith(str(bundle))
    assert said.strip() == "None" if native.problem() is None else "not built" in said


def test_a_bundle_runs_alone_without_network_compiler_and_installed_package(bundle, data, predicted, tmp_path):
    (tmp_path / "tmp").mkdir()
    os.symlink(data, tmp_path / "tmp" / "data")
    out = tmp_path / "out" / "submission.json"
    params = {"dataset": "a/b", "competition_id": "c/d", "time_limit": 600, "output_path": str(out.parent)}
    (bundle / "params.json").write_text(json.dumps(params))
    # A module of another machine: what it would have done is done without it.
    for module in bundle.glob("wireframe/_C*"):
        module.write_bytes(b"no module")
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
    assert all(found[name] == predicted[name] for name in ORDER if name.startswith("synth"))


def test_a_bundle_is_never_written_over_something(bundle, model, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert main(["submit", "--bundle", str(tmp_path / "full"), "--model", str(model)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]
    assert main(["submit", "--bundle", str(tmp_path / "new"), "--budget", "5"]) == 2
    assert "--budget does not go with --bundle" in capsys.readouterr().err and not (tmp_path / "new").exists()
