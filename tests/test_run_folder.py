"""The lock of a folder: with real processes, that end in every way, and start others."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from minirl_edu.run.folder import LOCK_FILE, FolderInUse, lock_folder

pytest.importorskip("fcntl")
LIGHT = """
import sys
from unittest.mock import MagicMock
sys.modules |= {name: MagicMock() for name in ("accelerate", "minirl_edu.config")}  # seconds to import, of no use here
"""
HOLD = """
import sys, time
from minirl_edu.run.folder import lock_folder
lock = lock_folder(sys.argv[1])
print("held", flush=True)
and_then
time.sleep(60)
"""
# Not even a program that is meant to inherit what it can.
START = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
print(child.pid, flush=True)
"""
FORK = """
import os
if (child := os.fork()):
    print(child, flush=True)
"""
FORK_AND_END = """
import os
if (child := os.fork()):
    os.waitpid(child, 0)
    print(child, flush=True)
else:
    sys.exit()
"""
COUNT = """
import os, sys
from minirl_edu.run.folder import FolderInUse, lock_folder
folder, done = sys.argv[1], 0
print("ready", flush=True)
sys.stdin.read()
while done < 300:
    try:
        with lock_folder(folder):
            busy = os.open(folder + "/busy", os.O_CREAT | os.O_EXCL)  # fails if anybody else is here
            os.close(busy)
            os.unlink(folder + "/busy")
            done += 1
    except FolderInUse:
        pass
"""


@pytest.fixture
def hold(tmp_path: Path) -> Any:
    """Start a process that holds `tmp_path`."""
    processes = []

    def start(and_then: str = "") -> subprocess.Popen[str]:
        processes.append(process := run(HOLD.replace("and_then", and_then), tmp_path))
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def run(script: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LIGHT + script, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def free_for_others(folder: Path) -> bool:
    """Whether another process could have the folder."""
    script = "import sys; from minirl_edu.run.folder import lock_folder; lock_folder(sys.argv[1])"
    process = subprocess.run([sys.executable, "-c", LIGHT + script, str(folder)], capture_output=True, text=True)
    assert process.returncode == 0 or "FolderInUse" in process.stderr, process.stderr
    return process.returncode == 0


def test_the_second_is_told_who_is_there(tmp_path, hold):
    started = time.time()
    (tmp_path / LOCK_FILE).write_text("of a run that was killed" * 20)
    process = hold()
    with pytest.raises(FileExistsError) as refused:  # what a command shows as one line
        lock_folder(tmp_path)
    assert isinstance(refused.value, FolderInUse)
    said = str(refused.value)
    host = socket.gethostname()
    assert said.startswith(f"{tmp_path}: in use by process {process.pid} on {host} since 20")
    assert said.endswith("; wait until it has ended, or choose another folder")
    since = json.loads((tmp_path / LOCK_FILE).read_text())["since"]  # the loser has left it as it was
    assert since in said
    assert abs(time.mktime(time.strptime(since[:19], "%Y-%m-%d %H:%M:%S")) - started) < 60
    (tmp_path / LOCK_FILE).write_text("")  # as in the moment before the winner signs
    with pytest.raises(FolderInUse, match="in use by another process"):
        lock_folder(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_is_free_as_soon_as_its_process_has_ended(tmp_path, hold, how):
    process = hold()
    process.send_signal(how)
    process.wait()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_closing_frees_it_and_leaves_nothing(tmp_path):
    lock = lock_folder(tmp_path / "run")
    assert not free_for_others(tmp_path / "run")
    lock.close()
    assert not (tmp_path / "run").exists()  # made for nothing
    lock.close()  # twice is harmless
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run/metrics.jsonl").touch()
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]
    (tmp_path / "empty").mkdir()
    lock_folder(tmp_path / "empty").close()
    assert (tmp_path / "empty").exists()  # somebody else's
    forgotten = lock_folder(tmp_path)
    del forgotten
    assert free_for_others(tmp_path)


def test_the_latest_caller_in_a_process_has_it(tmp_path):
    first = lock_folder(tmp_path)
    second = lock_folder(tmp_path / ".")
    first.close()
    assert not free_for_others(tmp_path)
    second.close()
    assert free_for_others(tmp_path)


@pytest.mark.parametrize("child", ["started", "forked", "forked and ended"])
def test_no_child_keeps_it_or_frees_it(tmp_path, hold, child):
    """Workers of vLLM and verifiers may outlive a killed run for a moment, or end before their run does."""
    process = hold({"started": START, "forked": FORK, "forked and ended": FORK_AND_END}[child])
    try:
        assert not free_for_others(tmp_path)
        number = int(process.stdout.readline())
        assert not free_for_others(tmp_path)
        process.kill()
        process.wait()
        assert psutil.pid_exists(number) == (child != "forked and ended")
        assert free_for_others(tmp_path)
    finally:
        if child != "forked and ended":
            os.kill(number, signal.SIGKILL)


def test_a_lock_of_a_file_that_was_removed_is_none(tmp_path, hold, monkeypatch):
    """The last holder goes, and another one comes, just before we lock the file that we have opened."""
    import fcntl

    flock, came = fcntl.flock, []

    def too_late(*arguments: Any) -> None:
        if not came:
            (tmp_path / LOCK_FILE).unlink()
            came.append(hold())
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(FolderInUse) as refused:
        lock_folder(tmp_path)
    assert f"in use by process {came[0].pid} on" in str(refused.value)


def test_of_many_at_once_one_has_it(tmp_path):
    """They make and remove the folder in turn, and the file in it, which is where such a lock can go wrong."""
    processes = [run(COUNT, tmp_path / "run") for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0] * 4
    for process in processes:
        process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_link_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keys")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(precious)
    with pytest.raises(OSError, match=LOCK_FILE):
        lock_folder(tmp_path / "run")
    assert precious.read_text() == "keys"
    with pytest.raises(FileExistsError, match="precious"):
        lock_folder(precious)


def test_where_there_are_no_locks_nothing_is_in_the_way(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as network:
        network.setattr(fcntl, "flock", refuse)
        with lock_folder(tmp_path / "run"):
            assert os.listdir(tmp_path / "run") == []
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    with lock_folder(tmp_path / "other"):
        assert (tmp_path / "other").is_dir()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_costs_no_more_than_the_name(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with lock_folder(tmp_path):
        assert not free_for_others(tmp_path)
    assert free_for_others(tmp_path)
