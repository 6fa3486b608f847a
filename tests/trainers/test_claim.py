"""One writer at a time, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainers.claim import CLAIM, GENERATION, WRITE_LOCK, Claim, Guard, holder
from trainers.errors import Superseded, UserError
from trainers.record import MetricsRecord, read_rows

# A driver that claims, tells its generation, and lives until it is killed. Its child is a worker that outlives it.
DRIVER = """
import subprocess, sys, time
from pathlib import Path
from trainers.claim import Claim
run_dir = Path(sys.argv[1])
claim = Claim.acquire(run_dir)
if sys.argv[2]:
    subprocess.Popen([sys.executable, "-c", sys.argv[2], str(run_dir), str(claim.generation)])
print(claim.generation, flush=True)
time.sleep(60)
"""
APPENDER = """
import sys, time
from pathlib import Path
from trainers.claim import Guard
from trainers.errors import Superseded
from trainers.record import MetricsRecord
run_dir, generation = Path(sys.argv[1]), int(sys.argv[2])
record = MetricsRecord(run_dir / "metrics.jsonl", Guard.begin_attempt(run_dir, generation), resume_step=0)
for step in range(1, 10**6):
    try:
        record.append(step, step, "main", {"train/loss": 1.0})
    except Superseded:
        (run_dir / "superseded").write_text(str(step))
        break
    time.sleep(0.001)
"""
COMMITTER = """
import sys, time, torch
from pathlib import Path
from trainers.checkpoint import CheckpointStore
from trainers.claim import Guard
from trainers.errors import Superseded
run_dir, generation = Path(sys.argv[1]), int(sys.argv[2])
store = CheckpointStore(run_dir / "checkpoints", Guard.begin_attempt(run_dir, generation))
for step in range(1, 10**6):
    try:
        store.save(step, {"model": {"w": torch.full((4,), float(step))}}, {}, wait=True)
    except Superseded:
        (run_dir / "superseded").write_text(str(step))
        break
"""


def start_driver(run_dir: Path, worker: str = "") -> tuple[subprocess.Popen[str], int]:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(run_dir), worker], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    return driver, int(driver.stdout.readline())


def kill(driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGKILL)


def wait_for(path: Path, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_generation_rises_over_twenty_killed_drivers(tmp_path: Path) -> None:
    generations = []
    for _ in range(20):
        driver, generation = start_driver(tmp_path)
        kill(driver)
        driver.wait()
        generations.append(generation)
    assert generations == list(range(1, 21))


def test_live_holder_is_refused_with_pid_and_host(tmp_path: Path) -> None:
    driver, _ = start_driver(tmp_path)
    try:
        found = holder(tmp_path)
        assert found is not None and found.alive and found.pid == driver.pid
        with pytest.raises(UserError, match=f"process {driver.pid} on {os.uname().nodename}"):
            Claim.acquire(tmp_path)
    finally:
        kill(driver)
        driver.wait()
    found = holder(tmp_path)
    assert found is not None and found.alive is False


def test_same_process_cannot_claim_twice(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path), pytest.raises(UserError, match="in use by"):
        Claim.acquire(tmp_path)


@pytest.mark.parametrize("worker", [APPENDER, COMMITTER], ids=["append", "commit"])
def test_a_killed_drivers_worker_writes_nothing_after_the_next_claim(tmp_path: Path, worker: str) -> None:
    driver, generation = start_driver(tmp_path, worker)
    wait_for(tmp_path / ("metrics.jsonl" if worker is APPENDER else "checkpoints/latest"), 60)
    kill(driver)  # not reaped: while the kernel still takes it down, we are there already
    killed = time.monotonic()
    said: list[str] = []
    claim = Claim.acquire(tmp_path, say=said.append)
    at_claim = written(tmp_path)
    assert claim.generation == generation + 1
    assert at_claim, "the worker had written something before"
    assert time.monotonic() - killed < 30
    wait_for(tmp_path / "superseded")
    driver.wait()
    assert written(tmp_path) == at_claim
    # Negative control: under the new claim the same writes do go through.
    record = MetricsRecord(tmp_path / "metrics.jsonl", Guard.begin_attempt(tmp_path, claim.generation), resume_step=0)
    record.append(10**7, 1, "main", {"train/loss": 1.0})
    record.close()
    assert written(tmp_path) != at_claim


def written(run_dir: Path) -> tuple[list[str], int]:
    rows = sum(1 for _ in read_rows(run_dir / "metrics.jsonl"))
    folder = run_dir / "checkpoints"
    return sorted(entry.name for entry in folder.glob("step-*")) if folder.exists() else [], rows


def test_without_the_check_the_old_worker_does_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the guard itself."""
    with Claim.acquire(tmp_path) as claim:
        old = Guard.begin_attempt(tmp_path, claim.generation)
        record = MetricsRecord(tmp_path / "metrics.jsonl", old, resume_step=0)
    with Claim.acquire(tmp_path):
        record.append(1, 1, "main", {"train/loss": 1.0})
        with pytest.raises(Superseded):
            record.close()
        assert written(tmp_path)[1] == 0
        monkeypatch.setattr(Guard, "_require_current", lambda self: None)
        record = MetricsRecord(tmp_path / "metrics.jsonl", old, resume_step=0)
        record.append(1, 1, "main", {"train/loss": 1.0})
        record.close()
        assert written(tmp_path)[1] == 1


def test_a_new_attempt_shuts_out_the_one_before(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim:
        first = Guard.begin_attempt(tmp_path, claim.generation)
        peer = Guard.join(tmp_path, first.generation, first.attempt)
        first.check()
        peer.check()
        second = Guard.begin_attempt(tmp_path, claim.generation)
        assert second.attempt == first.attempt + 1
        for shut_out in (first, peer):
            with pytest.raises(Superseded):
                shut_out.check()
        with pytest.raises(Superseded):
            Guard.join(tmp_path, first.generation, first.attempt)
        second.check()


def test_guard_of_another_generation_is_refused(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim, pytest.raises(Superseded):
        Guard.begin_attempt(tmp_path, claim.generation + 1)


def test_release_shuts_its_guards_out_and_frees_the_run(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim:
        guard = Guard.begin_attempt(tmp_path, claim.generation)
    assert holder(tmp_path) is None
    with pytest.raises(Superseded):
        guard.check()
    with Claim.acquire(tmp_path, wait_s=0) as again:
        assert again.generation == claim.generation + 1


def test_a_claim_waits_for_the_body_of_held(tmp_path: Path) -> None:
    claim = Claim.acquire(tmp_path)
    guard = Guard.begin_attempt(tmp_path, claim.generation)
    claim._lock.close()  # as the kernel does when the driver dies
    events: list[str] = []

    def reclaim() -> None:
        Claim.acquire(tmp_path, say=events.append)
        events.append("claimed")

    with guard.held():
        newcomer = threading.Thread(target=reclaim)
        newcomer.start()
        time.sleep(0.1)
        assert "claimed" not in events
        events.append("body ended")
    newcomer.join()
    assert events.index("body ended") < events.index("claimed")


def test_a_lock_held_by_nobody_known_is_waited_for_once_said(tmp_path: Path) -> None:
    claim = Claim.acquire(tmp_path)
    record = json.loads((tmp_path / CLAIM).read_text())
    (tmp_path / CLAIM).write_text(json.dumps({**record, "host": "elsewhere"}))
    said: list[str] = []
    with pytest.raises(UserError, match="elsewhere"):
        Claim.acquire(tmp_path, wait_s=0.4, say=said.append)
    assert len(said) == 1 and "waiting up to 0.4 s" in said[0]
    claim.release()


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 512, b"{", b"[]", b'{"generation": -1}', b"\xff\xfe", b'{"generation"']
)
def test_a_torn_claim_file_does_not_turn_the_generation_back(tmp_path: Path, damage: bytes) -> None:
    for _ in range(3):
        Claim.acquire(tmp_path).release()
    (tmp_path / CLAIM).write_bytes(damage)
    with Claim.acquire(tmp_path) as claim:
        assert claim.generation == 4


def test_checkpoints_remember_the_generation_when_both_files_are_lost(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / "step-00000001" / "manifest.json").write_text('{"format": 1, "generation": 7}')
    (folder / ".tmp-step-00000002-9.1.1").mkdir()
    with Claim.acquire(tmp_path) as claim:
        assert claim.generation == 10
    # Negative control: the side file is what is asked otherwise.
    (tmp_path / CLAIM).unlink()
    (tmp_path / GENERATION).unlink()
    (folder / ".tmp-step-00000002-9.1.1").rmdir()
    with Claim.acquire(tmp_path) as claim:
        assert claim.generation == 8


def test_a_folder_made_anew_is_not_the_old_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    claim = Claim.acquire(run_dir)
    guard = Guard.begin_attempt(run_dir, claim.generation)
    for name in (CLAIM, GENERATION, WRITE_LOCK):
        (run_dir / name).unlink()
    with pytest.raises(Superseded):
        guard.check()


def test_forked_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    claim = Claim.acquire(tmp_path)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read_end, 1)
        os._exit(0)
    claim._lock.close()  # as at the parent's death; the child lives on
    Claim.acquire(tmp_path, wait_s=0).release()
    os.write(write_end, b"x")
    os.waitpid(child, 0)


@pytest.mark.parametrize("name", [CLAIM, ".write-lock", ".generation"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    """Opening a FIFO to write would wait for a reader for ever."""
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(UserError, match="no regular file"):
        Claim.acquire(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    Claim.acquire(tmp_path / "run").release()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_clear_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be claimed"):
        Claim.acquire(tmp_path / "run")


def test_a_file_in_the_way_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be claimed"):
        Claim.acquire(tmp_path / "run")
