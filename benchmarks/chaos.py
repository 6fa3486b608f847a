"""make chaos: kills, corrupts and fills up at many seeded places; what happened stays in results/chaos.json.

    python -m benchmarks.chaos                       every case not done yet (hours), then the table
    python -m benchmarks.chaos --only F1 --count 3   the first three cases of one fault
    python -m benchmarks.chaos --only F4 --again     cases that are done already, too

May be stopped and started again at any time, and two of them may play different faults side by side. The faults are
numbered as in the project's fault plan; the laws are those of the tests, played by the same code
(tests/orchestrator/episodes.py).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, machine
from tests.orchestrator.episodes import goodput, kill_driver, kill_workers, lock_store, stop
from tests.orchestrator.faults import SNAPSHOTS, STEPS, Place, assert_same, assert_told_once, undisturbed
from tests.orchestrator.sweep_episodes import (
    RANDOM,
    SweepLeft,
    SweepPlace,
    any_moment,
    assert_as_undisturbed,
    interrupt_sweep,
    kill_sweep_driver,
    kill_sweep_trial,
    undisturbed_sweep,
)
from tests.trainers.crash import Ending
from trainers.__main__ import STOPPED

PROJECT = Path(__file__).parents[1]
RECORD = RESULTS / "chaos.json"
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
EXIT_S = 10.0  # from a signal to the end of the command


@dataclass(frozen=True)
class Case:
    """One play of one fault, as chaos.json keeps it."""

    fault: str
    seed: int
    passed: bool
    plays: int
    """how many single cases it stands for (the crash points of one save, the cases of a test)"""
    seconds: float
    date: str
    problem: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    what: str
    count: int
    """seeds of the full programme"""
    play: Callable[[Bench, int], dict[str, Any]]
    """raises where a law is broken; `plays` among what it measured counts for so many cases"""


class Bench:
    """Where the cases happen, with the undisturbed runs to compare with, each made when it is first needed."""

    def __init__(self, folder: Path):
        self.place = Place(folder)
        self._whole: dict[int, Ending] = {}
        (folder / "sweeps").mkdir()
        self.sweeps = SweepPlace(folder / "sweeps")
        self.sweeps.commands = self.place.commands  # closed with them
        self._whole_sweep: SweepLeft | None = None

    def whole(self, workers: int) -> Ending:
        if workers not in self._whole:
            self._whole[workers] = undisturbed(self.place, f"undisturbed-{workers}", workers)
        return self._whole[workers]

    def whole_sweep(self) -> SweepLeft:
        """Four random trials, two at a time."""
        if self._whole_sweep is None:
            self._whole_sweep = undisturbed_sweep(self.sweeps)
        return self._whole_sweep


# ---- through Ray -----------------------------------------------------------------------------------------------------


def worker_killed(bench: Bench, seed: int) -> dict[str, Any]:
    rng = random.Random(f"F1 {seed}")
    kills = [(rng.randrange(1, STEPS - 60), rng.randrange(2))]
    return {"kills": kills} | kill_workers(bench.place, f"f1-{seed}", kills, bench.whole(2))


def driver_killed(bench: Bench, seed: int) -> dict[str, Any]:
    rng = random.Random(f"F2 {seed}")
    step, workers = rng.randrange(1, STEPS - 60), 1 + seed % 2
    return {"step": step, "workers": workers} | kill_driver(
        bench.place, f"f2-{seed}", step, bench.whole(workers), workers=workers
    )


def signalled(bench: Bench, seed: int) -> dict[str, Any]:
    """Stopped by a signal, and continued by the same command."""
    rng = random.Random(f"F4 {seed}")
    step, workers, how = rng.randrange(1, STEPS // 4), 1 + seed // 3 % 2, SIGNALS[seed % 3]
    arguments = ["--workers", str(workers)]
    command, measured = stop(bench.place, f"f4-{seed}", arguments, step, how)
    bench.place.run(f"f4-{seed}", *arguments).expect(0)
    assert_same(command.run_dir, bench.whole(workers))
    assert_told_once(bench.place.runs, command.run_dir)
    assert measured["signal_to_exit_s"] <= EXIT_S, f"{measured['signal_to_exit_s']} s from {how} to the end"
    return {"signal": how, "workers": workers} | measured


def ray_files_torn(bench: Bench, seed: int) -> dict[str, Any]:
    how = tuple(SNAPSHOTS)[seed % len(SNAPSHOTS)]
    step = random.Random(f"F7 {seed}").randrange(45, STEPS - 60)
    return {"step": step, "how": how} | kill_driver(
        bench.place, f"f7-{seed}", step, bench.whole(1), workers=1, spoil=how
    )


def store_locked(bench: Bench, seed: int) -> dict[str, Any]:
    """Until training is over; or for longer than the command has patience, so that the next one must deliver."""
    whole = bench.whole(1)
    return lock_store(bench.place, bench.place.start(f"f9-{seed}"), whole, until_the_end=bool(seed % 2))


def sweep_stopped(bench: Bench, seed: int) -> dict[str, Any]:
    """Ctrl-C, and continued by the same command."""
    name, (trial, step) = f"f14-stop-{seed}", any_moment(random.Random(f"F14 stop {seed}"), bench.whole_sweep())
    measured = interrupt_sweep(bench.sweeps, name, RANDOM, trial, step)
    return {"trial": trial, "step": step} | measured | gone_on(bench, name)


def sweep_driver_killed(bench: Bench, seed: int) -> dict[str, Any]:
    name, (trial, step) = f"f14-driver-{seed}", any_moment(random.Random(f"F14 driver {seed}"), bench.whole_sweep())
    measured = kill_sweep_driver(bench.sweeps, name, RANDOM, trial, step)
    return {"trial": trial, "step": step} | measured | gone_on(bench, name)


def trial_killed(bench: Bench, seed: int) -> dict[str, Any]:
    name, (trial, step) = f"f14-trial-{seed}", any_moment(random.Random(f"F14 trial {seed}"), bench.whole_sweep())
    command, measured = kill_sweep_trial(bench.sweeps, name, RANDOM, trial, step)
    command.expect(0)
    assert_as_undisturbed(bench.sweeps, command, bench.whole_sweep())
    return {"trial": trial} | measured


def gone_on(bench: Bench, name: str) -> dict[str, Any]:
    """The same command again: the sweep as if nothing had been."""
    command = bench.sweeps.run_sweep(name, *RANDOM)
    assert_as_undisturbed(bench.sweeps, command, bench.whole_sweep())
    return {}


def kills_every_30_s(bench: Bench, seed: int) -> dict[str, Any]:
    return goodput(bench.place, f"goodput-{seed}", steps=1200, every_s=30.0, kills=3)


# ---- on the bare loop and the writer: the tests' own cases -----------------------------------------------------------


def crash_points(bench: Bench, seed: int) -> dict[str, Any]:
    """Every crash point of one save, over other checkpoints for each seed."""
    from tests.trainers.test_crash_points import Bench as Disks
    from tests.trainers.test_crash_points import of
    from trainers.claim import Claim, Guard

    earlier, keep = (([1], 1), ([1, 2, 3], 2), ([], 3))[seed]
    new = max(earlier, default=0) + 1
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with Claim.acquire(root / "run") as claim:
            disks = Disks(root, Guard.begin_attempt(root / "run", claim.generation))
            before, operations = disks.record(earlier, new, keep=keep)
            allowed = {*map(of, earlier), of(new)} | ({None} if not earlier else set())
            broken = disks.violation(before, operations, allowed, new, keep=keep)
            assert broken is None, broken
            return {"plays": disks.checked, "kept": keep, "operations": len(operations)}


def tests(*nodes: str) -> Callable[[Bench, int], dict[str, Any]]:
    """The cases of these tests, counted."""

    def play(bench: Bench, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *nodes]
            ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=3600, check=False)
            assert report.exists(), ended.stdout + ended.stderr
            suite = next(ElementTree.parse(report).iter("testsuite"))
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        plays = counts["tests"] - counts["skipped"]
        assert not counts["failures"] and not counts["errors"], ended.stdout[-2000:]
        assert plays, f"nothing was played: {' '.join(nodes)} selects no test that runs here\n{ended.stdout[-2000:]}"
        return {"plays": plays, "tests": list(nodes)}

    return play


CHECKPOINT, TRAIN = "tests/trainers/test_checkpoint.py", "tests/orchestrator/test_train.py"
FAULTS = {
    "F1": Fault("kill -9 of a worker at a random step", 20, worker_killed),
    "F2": Fault("kill -9 of the driver, the same command at once", 10, driver_killed),
    "F4": Fault("SIGINT, SIGTERM, SIGUSR1 at random steps", 20, signalled),
    "F5": Fault("every crash point of the checkpoint writer", 3, crash_points),
    "F6": Fault(
        "a flipped bit, a truncated or deleted file of the newest checkpoint",
        1,
        tests(f"{CHECKPOINT}::test_any_damage_is_found_and_the_one_before_is_used"),
    ),
    "F7": Fault("torn, empty and foreign files of Ray", 10, ray_files_torn),
    "F8": Fault(
        "ENOSPC, EDQUOT, EIO at 20 positions",
        1,
        tests(f"{CHECKPOINT}::test_a_refused_write_leaves_the_run_alive_and_the_last_checkpoint_intact"),
    ),
    "F9": Fault("MLflow's store locked", 4, store_locked),
    "F11": Fault(
        "NaN and infinity in loss and gradients, 1 and 2 workers",
        1,
        tests("tests/trainers/test_engine.py", "tests/trainers/test_engine_distributed.py", "-k", "finite or bad"),
    ),
    "F14-stop": Fault("Ctrl-C in a sweep, the same command afterwards", 10, sweep_stopped),
    "F14-driver": Fault("kill -9 of a sweep's driver, the same command afterwards", 10, sweep_driver_killed),
    "F14-trial": Fault("kill -9 of a sweep's trial", 10, trial_killed),
    "F19": Fault("names that lead elsewhere", 1, tests(f"{TRAIN}", "-k", "leads_nowhere or linked_folder")),
    "F22": Fault(
        "bad data",
        1,
        tests(f"{TRAIN}", "tests/trainers/data/test_corpora.py", "-k", "bad_text or test_corpora"),
    ),
    "goodput": Fault("a kill -9 of a worker every 30 s", 1, kills_every_30_s),
}


# ---- the programme --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Play what is asked for; 1 where a law was broken, 75 where it was stopped and can go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="these faults")
    parser.add_argument("--count", type=int, default=None, help="at most so many seeds of each")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    options = parser.parse_args(arguments)
    cases = read_record()
    try:
        with bench() as place:
            for name in options.only:
                for seed in range(min(FAULTS[name].count, options.count or sys.maxsize)):
                    if options.again or (name, seed) not in cases or not cases[name, seed].passed:
                        cases = kept(play(place, name, seed))
    except KeyboardInterrupt:
        print("stopped; what was played is kept, and the same command goes on with the next", flush=True)
        return STOPPED
    print(table(cases))
    return 0 if all(case.passed for (name, _), case in cases.items() if name in options.only) else 1


@contextmanager
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        place = Bench(Path(folder))
        try:
            yield place
        finally:
            place.place.close()


def play(bench: Bench, name: str, seed: int) -> Case:
    """One case, whatever comes of it: a law that broke, or anything that nobody foresaw."""
    started, problem, measured = time.monotonic(), None, {}
    try:
        try:
            measured = FAULTS[name].play(bench, seed)
        finally:
            bench.place.close()
    except Exception as error:  # the hours of cases behind this one shall be played too
        problem = "\n".join([f"{type(error).__name__}: {str(error)[-3000:]}", traceback.format_exc()[-1500:]])
    plays = measured.pop("plays", 1)
    seconds = round(time.monotonic() - started, 1)
    print(f"{name} {seed}: {'passed' if problem is None else 'FAILED'} in {seconds:g} s {measured}", flush=True)
    return Case(name, seed, problem is None, plays, seconds, time.strftime("%Y-%m-%d %H:%M"), problem, measured)


def read_record() -> dict[tuple[str, int], Case]:
    """By fault and seed; the last play of each."""
    if not RECORD.exists():
        return {}
    cases = [Case(**case) for case in json.loads(RECORD.read_text())["cases"]]
    return {(case.fault, case.seed): case for case in cases}


def kept(case: Case) -> dict[tuple[str, int], Case]:
    """The record with this case in it; a programme of other faults may write to it at the same time."""
    RECORD.parent.mkdir(exist_ok=True)
    folder = os.open(RECORD.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        cases = read_record() | {(case.fault, case.seed): case}
        write_record(cases)
    finally:
        os.close(folder)
    return cases


def write_record(cases: dict[tuple[str, int], Case]) -> None:
    order = sorted(cases, key=lambda key: (list(FAULTS).index(key[0]), key[1]))
    content = {"machine": machine(), "cases": [asdict(cases[key]) for key in order]}
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, RECORD)


def table(cases: dict[tuple[str, int], Case]) -> str:
    """A line a fault: how many passed of how many played, and of how many the full programme has."""
    lines = [f"{'fault':10} {'passed':>12} {'of':>4}  {'single cases':>12}  what"]
    for name, fault in FAULTS.items():
        played = [case for (fault_name, _), case in cases.items() if fault_name == name]
        passed = f"{sum(case.passed for case in played)} of {len(played)}"
        single = sum(case.plays for case in played if case.passed)
        lines.append(f"{name:10} {passed:>12} {fault.count:>4}  {single:>12,}  {fault.what}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
