"""Laws of the report: it says what stands in MLflow, the same in every form, and nothing in it can do harm."""

from __future__ import annotations

import json
import os
import shlex
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import BAD_INPUT, DONE, main
from orchestrator.sweeps.comparison import as_good, cost, difference_noise, noise, pareto_front, stopped, trade_off
from orchestrator.sweeps.history import PENALTY
from orchestrator.sweeps.report import closing_lines, facts, markdown, print_closing
from orchestrator.sweeps.report_html import page, write_page
from orchestrator.sweeps.results import PointResult, SweepResults, TrialResult
from orchestrator.sweeps.stored import read_sweep
from orchestrator.sweeps.words import stopped_words, value_words
from orchestrator.tracking import Store, TrackedRun, open_store
from tests.orchestrator.sweep_examples import example, point, sweep
from trainers.errors import UserError

EVIL = "<script>alert('x')</script>\x1b[31m|`]"
COMMAND = "orchestrate train fundamentallm/small 'optim.lr=0.002' batch.sequences=16"
POINTS = (  # learning rate, batch, reason, the value of each seed, evaluations
    (0.001, 8, "completed", (2.00, 2.04), 3),
    (0.002, 16, "completed", (1.90, 1.96), 3),
    (0.0001, 8, "asha", (3.10, 3.30), 1),
    (0.004, 16, "completed", (1.93, 1.94), 3),
    (0.0002, 8, "asha", (2.70, 2.70), 2),
    (10.0, 16, "nonfinite", (9.9, 9.8), 1),
)


# ---- a store ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DEFAULT_ARTIFACT_ROOT", "ORCHESTRATE_RUNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished sweep of two seeds, a running one, a broken one and a run that is no sweep."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    folder = tmp_path_factory.mktemp("runs")
    store = open_store(folder)
    parent = begin_sweep(store, "first-sweep", taken_out=[["precision=fp16", EVIL]])
    for number, (lr, batch, reason, values, evaluations) in enumerate(POINTS):
        for seed, value in enumerate(values):
            run = begin_trial(store, parent, "first-sweep", number, seed, {"optim.lr": lr, "batch.sequences": batch})
            send(run, value, evaluations, told=PENALTY if reason == "nonfinite" else statistics.fmean(values))
            run.finish("FINISHED" if reason == "completed" else "KILLED", reason)
    parent.log_metrics([{"step": 6, "time_ms": 9, "sweep/best": 1.93, "sweep/wall_s": 66.0, "sweep/train_s": 120.0}])
    parent.set_tags({"sweep.best": "t0001", "sweep.command": COMMAND})
    parent.finish("FINISHED", "completed")

    going = begin_sweep(store, "going")
    done = begin_trial(store, going, "going", 0, 0, {"optim.lr": 0.001, "data.note": EVIL})
    send(done, 2.0, 3, told=2.0)
    done.finish("FINISHED", "completed")
    send(begin_trial(store, going, "going", 1, 0, {"optim.lr": 0.002, "data.note": "plain"}), 1.5, 1, told=None)

    broken = store.open_run("laws", "broken", run_id=None, tags={"kind": "sweep", "sweep.settings": "{torn"}, params={})
    tags = {"kind": "trial", "trial.params": "[1", "trial.point": "x"}
    store.open_run("laws", "broken/odd", run_id=None, tags=tags, params={}, parent_run_id=broken.run_id)
    store.open_run("laws", "lone", run_id=None, tags={}, params={}).finish("FINISHED", "completed")
    return folder


def begin_sweep(store: Store, name: str, taken_out: list | None = None) -> TrackedRun:
    settings = {"searcher": "tpe", "scheduler": "asha", "trials": 6, "seeds": 2, "space": [], "space_name": "lr_batch"}
    tags = {
        "kind": "sweep", "preset": "fundamentallm/small", "sweep.slots": "2",
        "sweep.settings": json.dumps(settings), "sweep.taken_out": json.dumps(taken_out or []),
    }  # fmt: skip
    return store.open_run("laws", name, run_id=None, tags=tags, params={"optim": {"lr": 0.003}})


def begin_trial(store: Store, parent: TrackedRun, sweep: str, number: int, seed: int, params: dict) -> TrackedRun:
    tags = {
        "kind": "trial", "trial": f"t{number:04d}-s{seed}", "trial.point": str(number), "trial.seed_index": str(seed),
        "trial.params": json.dumps(params), "precision": "fp32", "run_path": f"/runs/{sweep}/t{number:04d}-s{seed}",
    }  # fmt: skip
    name = f"{sweep}/t{number:04d}-s{seed}"
    run = store.open_run("laws", name, run_id=None, tags=tags, params=params, parent_run_id=parent.run_id)
    phase = {"phase": "code", "kind": "trial"}
    store.open_run("laws", f"{name}/code", run_id=None, tags=phase, params={}, parent_run_id=run.run_id)
    return run


def send(run: TrackedRun, value: float, evaluations: int, told: float | None) -> None:
    rows = []
    for at in range(1, evaluations + 1):
        loss, tokens = value + 0.5 * (evaluations - at), 1000 * at
        row = {"step": at, "time_ms": at, "tokens": tokens, "perf/tokens_per_s": 100.0 * at, "mem/peak_gib": 0.25}
        rows += [row | {"val/loss": loss}, {"step": tokens, "time_ms": at, "by_tokens/val/loss": loss}]
    last = {"step": evaluations, "time_ms": evaluations, "sweep/train_s": 10.0}
    run.log_metrics([*rows, last if told is None else last | {"sweep/objective": told}])


@pytest.fixture(scope="module")
def first(runs: Path) -> SweepResults:
    return read_sweep(runs, "first-sweep")


def means(reason: str | None = None) -> dict[str, float]:
    return {
        f"t{number:04d}": statistics.fmean(values)
        for number, (_, _, why, values, _) in enumerate(POINTS)
        if why != "nonfinite" and reason in (None, why)
    }


# ---- what is read -----------------------------------------------------------------------------------------------


def test_the_ranking_is_the_told_values_sorted(first: SweepResults) -> None:
    assert {point.name: point.mean for point in first.ranked} == means()
    assert [point.name for point in first.ranked] == sorted(means(), key=means().__getitem__)
    assert [point.name for point in first.unranked] == ["t0005"] and first.unranked[0].mean is None
    upwards = SweepResults(**{**vars_of(first), "objectives": (first.objective.model_copy(update={"mode": "max"}),)})
    assert [point.name for point in upwards.ranked] == sorted(means(), key=means().__getitem__, reverse=True)


def vars_of(results: SweepResults) -> dict:
    return {name: getattr(results, name) for name in SweepResults.__dataclass_fields__}


def test_the_spread_is_the_sample_standard_deviation_over_the_seeds(first: SweepResults) -> None:
    for result, (_, _, reason, values, _) in zip(first.points, POINTS, strict=True):
        expected = None if reason == "nonfinite" else statistics.stdev(values)
        assert result.spread == (None if expected is None else pytest.approx(expected, abs=1e-12))
    assert point(0, {"optim.lr": 1e-3}).spread is None  # one seed says nothing about noise


def test_everything_else_is_there_once(first: SweepResults) -> None:
    assert [len(result.trials) for result in first.points] == [2] * 6  # the phases below are no trials
    winner = first.winner
    assert winner is not None and winner.name == "t0001" and winner.params == {"optim.lr": 0.002, "batch.sequences": 16}
    assert winner.curve == ((1000, pytest.approx(2.93)), (2000, pytest.approx(2.43)), (3000, pytest.approx(1.93)))
    assert winner.tokens_per_s == 200.0 and winner.peak_gib == 0.25 and winner.tokens == 3000
    assert first.command == COMMAND and first.taken_out[0][0] == "precision=fp16" and first.notes == ()
    assert (first.state, first.preset, first.slots) == ("finished", "fundamentallm/small", 2)
    spent = cost(first)
    assert (spent.train_s, spent.wall_s, spent.overhead) == (120.0, 66.0, pytest.approx(1.1))


def test_what_was_stopped_is_counted_by_reason_and_rung(first: SweepResults) -> None:
    found = [(group.reason, group.tokens, [result.name for result in group.points]) for group in stopped(first)]
    assert found == [("asha", 1000, ["t0002"]), ("asha", 2000, ["t0004"]), ("nonfinite", 0, ["t0005"])]


def test_a_difference_within_the_noise_is_called_so_and_a_greater_one_is_not(first: SweepResults) -> None:
    found = noise(first)
    assert found is not None and found.second.name == "t0003" and found.within
    assert found.difference == pytest.approx(0.005)
    assert found.noise == pytest.approx(2 * (0.0018 / 2 + 0.00005 / 2) ** 0.5)
    assert [result.name for result in as_good(first)] == ["t0003"]  # t0000 lies 0.09 behind
    distant = difference_noise(first.points[0], first.points[1])
    assert distant is not None and distant < 0.09
    alone = noise(example(9))
    assert alone is not None and alone.noise is None and not alone.within


@pytest.mark.parametrize("state", ["completed", "asha", "nonfinite", "oom", "error"])
@pytest.mark.parametrize("value", [1e-9, 2.5e6, 4e8, 1e29])
def test_how_a_trial_ended_says_whether_its_value_counts(state: str, value: float) -> None:
    """And not how large it is: a GPU trains a million tokens a second, and a perplexity may be anything."""
    trial = TrialResult("t0000", 0, 0, state, objectives=(value, 1.0))
    assert trial.told == (() if state in ("nonfinite", "oom", "error") else (value, 1.0))


def test_a_sweep_that_goes_on_is_told_as_it_stands(runs: Path) -> None:
    going = read_sweep(runs, "going")
    assert going.running and [result.state for result in going.points] == ["completed", "running"]
    assert [result.name for result in going.ranked] == ["t0000"]  # not yet told: not ranked, though it looks better
    assert "has not ended" in markdown(going) and "has not ended" in page(going, [])


def test_missing_and_torn_values_become_notes(runs: Path) -> None:
    broken = read_sweep(runs, "broken")
    assert len(broken.points) == 1 and broken.winner is None
    assert any("sweep.settings" in note for note in broken.notes) and any("trial.params" in n for n in broken.notes)
    assert "There is no best setting" in markdown(broken) or "there is no best setting" in markdown(broken)


def test_a_loss_beyond_any_axis_is_no_value(tmp_path: Path) -> None:
    """Matplotlib cannot draw to 1e308, which the perplexity of a loss that diverges comes to."""
    store = open_store(tmp_path)
    parent = begin_sweep(store, "steep")
    for number, value in enumerate((1e308, 2.0)):
        run = begin_trial(store, parent, "steep", number, 0, {"optim.lr": 0.1 / (number + 1)})
        send(run, value, 3, told=value)
        run.finish("FINISHED", "completed")
    found = read_sweep(tmp_path, "steep")
    write_page(found, tmp_path / "page.html")
    assert found.winner is not None and found.winner.params == {"optim.lr": 0.05}


def test_one_trial_is_told_in_the_singular() -> None:
    results = sweep([point(0, {}, state="user"), point(1, {}, state="completed")])
    assert stopped_words(results) == ["1 trial was interrupted: the same command goes on: t0000."]


# ---- the Pareto front -------------------------------------------------------------------------------------------

ROWS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=14)


def dominated(row: tuple, by: tuple) -> bool:
    return row != by and all(b <= a for a, b in zip(row, by, strict=True))


def front_holds(rows: list[tuple], front: list[int]) -> bool:
    """No dominated row stands in it, and every row that is not dominated does."""
    return all((place in front) != any(dominated(row, other) for other in rows) for place, row in enumerate(rows))


@given(ROWS)
def test_the_front_is_what_nothing_dominates(rows: list[tuple]) -> None:
    assert front_holds(rows, pareto_front(rows))


def test_the_law_of_the_front_can_fail() -> None:
    rows = [(0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    assert pareto_front(rows) == [0, 1, 3]
    assert front_holds(rows, [0, 1, 3])
    assert not front_holds(rows, [0, 1]) and not front_holds(rows, [0, 1, 2, 3])


def test_the_trade_off_weighs_completed_trials_alone() -> None:
    slow, fast = point(0, {"precision": "fp32"}), point(1, {"precision": "bf16"})
    early = point(2, {"precision": "bf16"}, state="asha")
    assert early.name not in [result.name for result in trade_off(sweep([slow, fast, early]))]
    assert "t0001" in [result.name for result in trade_off(sweep([slow, fast, early]))]


# ---- the forms --------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def evil_sweep() -> SweepResults:
    """Everything that is a text holds markup."""
    points = [point(n, {f"optim.{EVIL}": EVIL + str(n), "optim.lr": 10.0**-n}) for n in range(1, 3)]
    return sweep(
        points, name=EVIL, preset=EVIL, command=EVIL, stop_reason=EVIL, notes=(EVIL,), taken_out=((EVIL, EVIL),),
        settings={EVIL: EVIL, "searcher": EVIL, "space_name": EVIL},
    )  # fmt: skip


def test_nothing_from_the_store_is_markup_in_the_page() -> None:
    found = Reader(page(evil_sweep(), []))
    assert "script" not in found.tags and "img" not in found.tags
    assert found.text.count("<script>alert('x')</script>") > 10
    assert "script" in Reader(EVIL).tags  # the reader would have seen it


def test_the_page_stands_alone(first: SweepResults) -> None:
    from orchestrator.sweeps.figures import Picture

    picture = Picture("p", EVIL, EVIL, lambda results: None)
    found = Reader(page(first, [(picture, b"\x89PNG")]))
    assert [value for name, value in found.attributes if name in ("src", "href")] == ["data:image/png;base64,iVBORw=="]
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    assert "url(" not in page(first, []) and "@import" not in page(first, [])


def test_markdown_takes_markup_as_text() -> None:
    text = markdown(evil_sweep())
    outside = text.replace(f"```sh\n{EVIL}".replace("\x1b", " "), "")
    assert "<script>" not in outside and "&lt;script&gt;" in outside and "\x1b" not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_json_holds_what_was_read(first: SweepResults, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert main(["report", "first-sweep", "--runs-dir", str(runs), "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(facts(first)))
    assert [trial["objective"] for trial in told["trials"]] == [result.mean for result in first.ranked] + [None]
    assert told["best"]["trial"] == "t0001" and told["command"] == COMMAND and told["noise"]["within"] is True
    assert shlex.split(told["command"])[:2] == ["orchestrate", "train"]
    assert not (runs / "first-sweep").exists()  # no page unless asked for


def test_every_form_says_the_same(first: SweepResults) -> None:
    import io

    from rich.console import Console

    screen = Console(file=io.StringIO(), width=200)
    print_closing(first, screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    read = Reader(page(first, [])).text
    for fact in (
        "t0001",
        "1.930 ± 0.042",
        "within the noise",
        "asha stopped 1 trial at 1,000 tokens",
        "1.10 x the ideal",
    ):
        assert fact in shown and fact in read, fact
        assert fact in markdown(first).replace("\\", ""), fact
    assert COMMAND in shown.splitlines()
    assert closing_lines(first)


def test_the_verb_prints_the_table_and_writes_the_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "first-sweep", "--runs-dir", str(runs)]) == DONE
    out = capsys.readouterr().out
    written = runs / "first-sweep" / "report.html"
    assert str(written) in out and COMMAND in out
    found = Reader(written.read_text(encoding="utf-8"))
    assert found.tags.count("img") == 6
    assert [path.name for path in written.parent.iterdir()] == ["report.html"]
    written.unlink()
    written.parent.rmdir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["first-swep"], ["no sweep 'first-swep'", "Did you mean first-sweep?"]),
        (["zzz"], ["There are: ", "first-sweep", "going"]),
        (["lone"], ["a run in the MLflow store and no sweep"]),
        (["../x"], ["'../x': a run name is"]),
        (["first-sweep", "--json", "--markdown"], ["choose one"]),
        (["first-sweep", "--output", "."], ["is a folder"]),
        (["first-sweep", "--output", f"{__file__}/page.html"], ["cannot be written", "--output"]),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str], words: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments, "--runs-dir", str(runs)]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and all(word in captured.err.replace("\n", " ") for word in words), captured.err


def test_a_pipe_is_not_replaced_by_a_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["report", "first-sweep", "--output", str(pipe), "--runs-dir", str(runs)]) == BAD_INPUT
    assert "no regular file" in capsys.readouterr().err.replace("\n", " ") and pipe.is_fifo()


def test_a_folder_without_a_store_is_left_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are no sweeps"):
        read_sweep(tmp_path, "first")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "config.yaml").touch()
    with pytest.raises(UserError, match="is a run and no sweep: `orchestrate status lone`"):
        read_sweep(tmp_path, "lone")


def test_a_store_that_is_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        read_sweep(tmp_path, "first")


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (1.93, 0.0424, "1.930 ± 0.042"),
        (1.93, None, "1.9300"),
        (12345.6, 120.0, "12346 ± 120"),
        (2.0, 0.0, "2.0000 ± 0.0000"),
        (1.0, 1e-12, "1.00000000 ± 0.00000000"),
        (None, None, "-"),
    ],
)
def test_a_value_has_the_digits_its_spread_allows(mean: float | None, spread: float | None, text: str) -> None:
    assert value_words(mean, spread) == text


def test_a_point_is_what_the_worst_of_its_seeds_is() -> None:
    good, bad = point(0, {"optim.lr": 1e-3}).trials[0], point(0, {"optim.lr": 1e-3}, state="oom").trials[0]
    mixed = PointResult(0, (good, bad))
    assert mixed.failed and mixed.mean is None and mixed.spread is None
    assert PointResult(0, (good, good)).state == "completed"
