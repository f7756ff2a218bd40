import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import wireframe
from wireframe.errors import ConfigError
from wireframe.files import atomic_write, check_target, only_process, sole_process

HOLDER = """
import sys, time
from wireframe.files import only_process
with only_process(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def holder(lock):
    """Another process that holds the lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(wireframe.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, env=environment)
    with process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(lock, holder):
    refused = pytest.raises(ConfigError, match=r"^another process trains into runs/a; [^\n]+$")
    with refused, sole_process(lock, "trains into runs/a"):
        pytest.fail("both run")
    with pytest.raises(BlockingIOError), only_process(lock, wait=False):
        pytest.fail("both run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with sole_process(lock, "trains into runs/a"):
        assert lock.exists()
    assert lock.exists()


def test_waiting_ends_when_the_other_process_does(lock, holder):
    began = time.monotonic()
    killer = threading.Timer(0.3, holder.kill)
    killer.start()
    with only_process(lock):
        waited = time.monotonic() - began
    killer.join()
    assert waited >= 0.3


def test_the_lock_is_free_again_after_an_error_and_for_a_forked_child_that_lives_on(lock):
    with pytest.raises(ZeroDivisionError), sole_process(lock, "works"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        raise ZeroDivisionError
    try:
        with sole_process(lock, "works"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_block_of_one_process_is_refused_too(lock):
    refused = pytest.raises(ConfigError, match="another process works")
    with sole_process(lock, "works"), refused, sole_process(lock, "works"):
        pytest.fail("both run")


def test_without_locks_in_the_file_system_all_go_on(lock, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_process(lock, "works"), only_process(lock):
        pass


def test_a_lock_that_cannot_be_made_is_an_error_of_the_system_and_one_within_is_its_own(lock):
    with pytest.raises(FileNotFoundError), sole_process(lock.parent / "none" / ".lock", "works"):
        pass
    with pytest.raises(BlockingIOError, match="within"), sole_process(lock, "works"):
        raise BlockingIOError("within")


def test_what_a_killed_writer_left_goes_with_the_next_write_and_that_of_a_living_one_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    strays = [f".log.jsonl.{gone.pid}.tmp", f".log.jsonl.{2**22 + 1}.tmp"]
    others = [
        f".log.jsonl.{os.getppid()}.tmp", ".log.jsonl.1.tmp", f".log2jsonl.{gone.pid}.tmp", f".other.{gone.pid}.tmp",
        ".log.jsonl.-1.tmp", ".log.jsonl.0.tmp", f".log.jsonl.{10**30}.tmp", f"log.jsonl.{gone.pid}.tmp",
    ]  # fmt: skip
    for name in strays + others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".log.jsonl.{2**22 + 2}.tmp").mkdir()
    with atomic_write(tmp_path / "log.jsonl") as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, f".log.jsonl.{2**22 + 2}.tmp", "log.jsonl"])


def test_a_folder_that_may_not_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(tmp_path))
    with pytest.raises(PermissionError, match="may not be written to"):
        check_target(tmp_path / "x")
