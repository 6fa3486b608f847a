"""Laws of what a trial is: equal tokens whatever the batch, refusals in one sentence, a command that makes it again."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import launch, target
from orchestrator.ending import show_closing
from orchestrator.experiment import Request, settle
from orchestrator.signals import StopSignals
from orchestrator.sweeps import full_training, slots
from orchestrator.sweeps.driver import GPU_NOTED_S, SweepDriver, milestones_of
from orchestrator.sweeps.full_training import full_run, train_winner
from orchestrator.sweeps.history import Exploit, History, Trial
from orchestrator.sweeps.rehearsal import expected_tokens
from orchestrator.sweeps.settings import SweepSettings, build_settings
from orchestrator.sweeps.slots import device_of, slots_of
from orchestrator.sweeps.sweep import Sweep, SweepRequest, tokens_of_phases, total_steps_of, write_sweep
from orchestrator.sweeps.table import SweepDisplay
from orchestrator.sweeps.trials import SAVED_MINUTES, in_tokens, run_of
from orchestrator.sweeps.winner import check_can_train, command_of, course_of, lineage_of, winning_run
from orchestrator.target import Flags
from orchestrator.verbs.sweeps import seconds_of
from search_spaces.catalog import CATALOG, catalogued
from search_spaces.space import Axis, Choice, Float, Space
from trainers import devices
from trainers.claim import Claim
from trainers.config import RunConfig
from trainers.config_io import build_config, dump_yaml, override
from trainers.errors import ConfigError, TrainingFailed, UserError
from trainers.presets import PRESETS

SPACE = Space((Axis("optim.lr", Float(1e-4, 1e-1, log=True)), Axis("batch.sequences", Choice((4, 8, 16)))))
STEPS, BATCH, ROW, WARMUP = 60, 8, 32, 12
TOKENS = STEPS * BATCH * ROW
GIVEN = build_config(
    {
        "preset": "fundamentallm/tiny",
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": ROW},
        "batch": {"sequences": BATCH},
        "budget": {"steps": STEPS},
        "optim": {"lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": WARMUP},
        "early_stopping": {"patience": 3},
        "samples": {"count": 1},
    }
)
BASE = in_tokens(GIVEN, [TOKENS])


def settings(*, tokens: int = TOKENS, **changes: Any) -> SweepSettings:
    return build_settings({"trials": 4, **changes}, SPACE.to_json(), tokens)


def steps_of_phases(config: RunConfig) -> list[int]:
    """As many as the training takes: a budget in tokens is rounded up to whole steps."""
    return [math.ceil((phase.budget.tokens or 0) / config.tokens_per_step) for phase in config.resolved_phases()]


# ---- equal tokens ------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 200), warmup=st.integers(0, STEPS))
def test_every_batch_size_trains_on_equal_tokens(batch: int, warmup: int) -> None:
    """And warms up over equal tokens; within a step."""
    base = override(BASE, [f"schedule.warmup_steps={warmup}"])
    run = run_of(base, {"batch.sequences": batch}, settings())
    trained = total_steps_of(run) * run.tokens_per_step
    assert TOKENS <= trained < TOKENS + run.tokens_per_step
    warmed = run.schedule.warmup_steps * run.tokens_per_step
    assert abs(warmed - warmup * base.tokens_per_step) <= max(run.tokens_per_step - 1, run.tokens_per_step / 2)
    assert (run.schedule.warmup_steps == 0) == (warmup == 0)


def test_counted_in_steps_they_would_not() -> None:
    """Negative control."""
    run = override(GIVEN, ["batch.sequences=16"])
    assert run.budget is not None and run.budget.steps == STEPS
    assert run.budget.steps * run.tokens_per_step == 2 * TOKENS


def test_the_interval_of_a_step_schedule_covers_equal_tokens() -> None:
    base = override(BASE, ["schedule.kind=step", "schedule.step_unit=steps", "schedule.step_size=10"])
    run = run_of(base, {"batch.sequences": 16}, settings())
    assert run.schedule.step_size * run.tokens_per_step == 10 * base.tokens_per_step
    in_epochs = override(base, ["schedule.step_unit=epochs"])
    assert run_of(in_epochs, {"batch.sequences": 16}, settings()).schedule.step_size == 10


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("own budgets", []),
        ("one budget for both", ["phases.code.budget=null", "phases.prose.budget=null", "budget.steps=700"]),
        ("one of its own", ["phases.code.budget=null", "budget.steps=30"]),
        ("epochs", ["phases.code.budget.epochs=2", "phases.prose.budget.epochs=1"]),
    ],
)
def test_budgets_of_several_phases_become_tokens(name: str, changes: list[str]) -> None:
    """Whatever they were counted in, and whether a phase has its own."""
    given_config = override(PRESETS["fundamentallm/two-phase"](), changes)
    inherited = any(phase.budget is None for phase in given_config.phases)
    tokens = [700 * 512, 700 * 512] if inherited else [30 * 512, 50 * 512]
    base = in_tokens(given_config, tokens)
    assert [phase.budget.tokens for phase in base.resolved_phases()] == tokens
    assert all(phase.budget.steps is phase.budget.epochs is None for phase in base.resolved_phases())
    assert [p.model_copy(update={"budget": None}) for p in base.phases] == [
        p.model_copy(update={"budget": None}) for p in given_config.phases
    ]
    doubled = run_of(base, {"batch.sequences": 16}, settings())
    assert [2 * steps for steps in steps_of_phases(doubled)] == steps_of_phases(base)


def test_warm_ups_of_phases_cover_equal_tokens() -> None:
    base = in_tokens(PRESETS["fundamentallm/two-phase"](), [800 * 512, 800 * 512])
    run = run_of(base, {"batch.sequences": 32}, settings())
    assert [phase.schedule.warmup_steps for phase in run.resolved_phases()] == [25, round(50 / 4)]


# ---- what follows from the point ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 2.0), ("sqrt", math.sqrt(2))])
def test_the_rate_follows_the_batch_as_asked(rule: str, factor: float) -> None:
    point = {"optim.lr": 3e-3, "batch.sequences": 16}
    assert run_of(BASE, point, settings(lr_rule=rule)).optim.lr == pytest.approx(3e-3 * factor, rel=1e-15)
    alike = {"optim.lr": 3e-3, "batch.sequences": BATCH}
    assert run_of(BASE, alike, settings(lr_rule=rule)).optim.lr == 3e-3
    phases = in_tokens(PRESETS["fundamentallm/two-phase"](), [51200, 51200])
    rates = [p.optim.lr for p in run_of(phases, {"batch.sequences": 16}, settings(lr_rule=rule)).resolved_phases()]
    assert rates == pytest.approx([1e-3 * factor, 5e-4 * factor], rel=1e-15)


def test_seeds_differ_and_nothing_else_does() -> None:
    runs = [run_of(BASE, {"optim.lr": 1e-3}, settings(seeds=3), seed_index=index) for index in range(3)]
    assert [run.seed for run in runs] == [BASE.seed, BASE.seed + 1, BASE.seed + 2]
    assert len({run.model_copy(update={"seed": 0}).model_dump_json() for run in runs}) == 1


@given(batch=st.integers(1, 100), workers=st.integers(1, 4), limit=st.one_of(st.none(), st.integers(1, 100)))
def test_the_micro_batch_divides_and_fits(batch: int, workers: int, limit: int | None) -> None:
    base = override(BASE, [f"batch.sequences={4 * workers}", f"workers={workers}"])
    point = {"batch.sequences": batch * workers}
    run = run_of(base, point, settings(), micro_limit=limit)
    assert run.accumulation * run.micro_sequences * workers == batch * workers
    if limit is not None:
        assert run.batch.micro_sequences is not None and run.batch.micro_sequences <= limit
        assert not any(batch % size == 0 for size in range(run.batch.micro_sequences + 1, min(limit, batch) + 1))


def test_a_batch_that_workers_cannot_share_makes_no_run() -> None:
    with pytest.raises(ConfigError, match="workers"):
        run_of(override(BASE, ["workers=2"]), {"batch.sequences": 3}, settings())


def test_every_trial_is_judged_and_saved_alike() -> None:
    """At equal tokens, never stopped by its own patience, and it diverges for good."""
    for batch in (4, 16):
        run = run_of(BASE, {"batch.sequences": batch}, settings(evaluations=5))
        assert run.evaluation.every_tokens == math.ceil(TOKENS / 5)
        assert (run.early_stopping.patience, run.optim.on_nonfinite, run.samples.count) == (0, "raise", 0)


def test_a_trial_saves_by_the_clock_whatever_its_preset_says() -> None:
    """A trial of seconds saves at its end alone, and a kill costs a long one a minute."""
    often = override(BASE, ["checkpoint.every_steps=1", "checkpoint.at_evaluations=true"])
    for base in (BASE, often, override(BASE, ["checkpoint.every_minutes=null"])):
        saving = run_of(base, {}, settings()).checkpoint
        assert (saving.every_steps, saving.every_epochs, saving.at_evaluations) == (None, None, False)
        assert (saving.every_minutes, saving.keep_last_n, saving.save_best) == (SAVED_MINUTES, 1, False)
    sooner = run_of(override(BASE, ["checkpoint.every_minutes=0.1"]), {}, settings()).checkpoint
    assert sooner.every_minutes == 0.1


# ---- settings -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no trials": ({"trials": 0}, "--trials"),
    "no seeds": ({"seeds": 0}, "--seeds"),
    "no evaluations": ({"evaluations": 0}, "--evaluations"),
    "one of one": ({"reduction": 1}, "--reduction"),
    "an unknown metric": ({"objectives": ({"metric": "val/f1"},)}, "never reported"),
    "an unknown way": ({"objectives": ({"metric": "val/loss", "mode": "best"},)}, "--objective"),
    "two objectives for one": ({"objectives": ({}, {"metric": "val/accuracy"})}, "one objective"),
    "one objective for several": ({"searcher": "multi"}, "several objectives"),
    "a seed below 0": ({"seed": -1}, "--search-seed"),
    "no objective": ({"objectives": ()}, "--objective"),
    "a population of several seeds": ({"scheduler": "pbt", "seeds": 2}, "pbt"),
    "a population on a grid": ({"scheduler": "pbt", "searcher": "grid"}, "pbt"),
    "grace beyond the budget": ({"grace": TOKENS + 1}, "grace"),
    "an unknown searcher": ({"searcher": "bayes"}, "--searcher"),
    "threads": ({"cpus_per_trial": 0}, "--cpus-per-trial"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused_in_one_sentence(case: str) -> None:
    changes, part = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        settings(**changes)
    assert part in str(refusal.value)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")


def test_settings_survive_json() -> None:
    several = settings(searcher="multi", objectives=({}, {"metric": "val/accuracy", "mode": "max"}))
    for each in (settings(), several):
        assert SweepSettings.model_validate_json(each.model_dump_json()) == each


@given(tokens=st.integers(1, 10**7), evaluations=st.integers(1, 40))
def test_milestones_rise_to_the_budget(tokens: int, evaluations: int) -> None:
    """At each multiple of the reporting interval, and at the budget, where a run is evaluated too."""
    asked = settings(tokens=tokens, evaluations=evaluations)
    milestones = milestones_of(asked)
    assert milestones == sorted(set(milestones)) and milestones[-1] == tokens
    assert len(milestones) <= evaluations
    assert all(milestone % asked.report_every == 0 for milestone in milestones[:-1])
    assert milestones_of(settings(tokens=tokens, scheduler="none")) == [tokens]


def ideal_halving(trials: int, grace: int, reduction: int, budget: int) -> int:
    """Tokens of synchronous successive halving, counted trial by trial."""
    total, rung, before, left = 0, grace, 0, trials
    while rung < budget:
        total += left * (rung - before)
        before, rung, left = rung, rung * reduction, left // reduction
    return total + left * (budget - before)


def test_expected_tokens_are_those_of_halving() -> None:
    for trials, reduction, tokens, evaluations in ((9, 3, 900, 9), (27, 3, 2700, 9), (8, 2, 800, 8)):
        asked = settings(trials=trials, reduction=reduction, tokens=tokens, evaluations=evaluations)
        assert expected_tokens(asked) == ideal_halving(trials, tokens // evaluations, reduction, tokens)
        whole = settings(trials=trials, tokens=tokens, scheduler="none", seeds=2)
        assert expected_tokens(whole) == 2 * trials * tokens


@pytest.mark.parametrize(
    ("text", "seconds"), [("45", 45), ("45s", 45), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("1h1m1s", 3661)]
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "soon", "5 m", "1m1h", "5d", "m", "inf", "1e3"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--max-time"):
        seconds_of(text)


# ---- slots --------------------------------------------------------------------------------------------------


def sweep_of(base: RunConfig = BASE, *, device: Any = "cpu", folder: Path = Path("runs/s"), **changes: Any) -> Sweep:
    return Sweep("s", folder, Path("runs"), base, settings(**changes), SPACE, {}, (), device)


def cluster(*cpus: float, gpus: float = 0) -> Any:
    """`cpus`: of each node; the GPUs are the first one's."""
    nodes = [{"NodeID": str(index), "Alive": True, "Resources": {"CPU": each}} for index, each in enumerate(cpus)]
    total = {"CPU": sum(cpus), **({"GPU": gpus} if gpus else {})}
    return SimpleNamespace(
        cluster_resources=lambda: total,
        nodes=lambda: nodes,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "0"),
    )


def test_slots_are_what_the_cluster_holds() -> None:
    request = SweepRequest(Path("runs"))
    assert slots_of(cluster(8), sweep_of(), request).count == 8
    assert slots_of(cluster(8), sweep_of(cpus_per_trial=3), request).count == 2
    assert slots_of(cluster(8), sweep_of(), replace(request, concurrent=3)).count == 3
    assert slots_of(cluster(8), sweep_of(), replace(request, concurrent=30)).count == 8
    quarter = slots_of(cluster(16, gpus=2), sweep_of(device="cuda"), replace(request, gpus_per_trial=0.25))
    assert (quarter.count, quarter.resources) == (8, {"CPU": 1, "GPU": 0.25})
    assert slots_of(cluster(16, gpus=2), sweep_of(device="cuda"), request).count == 2
    pair = slots_of(cluster(8), sweep_of(override(BASE, ["workers=2"])), request)
    assert (pair.count, pair.share["cpus"], pair.resources.get("CPU", 0)) == (4, 1, 0)
    assert slots_of(cluster(4, 4, 3), sweep_of(cpus_per_trial=3), request).count == 3
    assert slots_of(cluster(5, 5), sweep_of(cpus_per_trial=3), request).count == 2  # of the sum there would be 3
    pair = slots_of(cluster(4, 3, 3), sweep_of(override(BASE, ["workers=2"]), cpus_per_trial=3), request)
    assert (pair.count, pair.share["cpus"]) == (1, 3)


@pytest.mark.parametrize(
    ("gpus", "options", "device"),
    [(0, {}, "cpu"), (2, {}, "cuda"), (1, {"gpus_per_trial": 0.25}, "cuda"), (1, {"gpus_per_trial": 2.0}, "cpu")],
)
def test_auto_is_what_there_is_where_the_trials_run(
    gpus: int, options: dict[str, Any], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the cluster that is joined, whatever this machine has; a sweep that was begun stays what it was."""
    asked: list[int] = []

    @contextmanager
    def joined(workers: int, **_: Any) -> Iterator[Any]:
        asked.append(workers)
        yield cluster(8, gpus=gpus)

    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    monkeypatch.setattr(slots, "ray_cluster", joined)
    monkeypatch.setattr(devices, "resolve_device", lambda name: pytest.fail("this machine was asked"))
    request = SweepRequest(tmp_path, name="begun", **options)
    assert device_of(BASE, request) == device and asked == [1]
    assert device_of(override(BASE, ["device=cuda"]), request) == "cuda"
    (tmp_path / "begun").mkdir()
    write_sweep(sweep_of(folder=tmp_path / "begun", device="mps"))
    assert device_of(BASE, request) == "mps" and asked == [1]
    assert device_of(BASE, replace(request, fresh=True)) == device and asked == [1, 1]


def test_without_a_cluster_auto_is_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the above."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(slots, "ray_cluster", lambda *_, **__: pytest.fail("a cluster was asked"))
    monkeypatch.setattr(devices, "resolve_device", lambda name: SimpleNamespace(type="cuda"))
    assert device_of(BASE, SweepRequest(tmp_path)) == "cuda"


@pytest.mark.parametrize(
    ("cpus", "gpus", "changes", "way_out"),
    [
        ([2], 0, {"cpus_per_trial": 64}, "--cpus-per-trial"),
        ([2], 0, {"workers": 3}, "--workers"),
        ([4, 4], 0, {"cpus_per_trial": 8}, "on 2 nodes, the largest of which has 4.*--cpus-per-trial"),
        ([4, 4, 4, 4], 0, {"workers": 5, "cpus_per_trial": 3}, "--workers"),  # 16 CPUs for 15, and four nodes
        ([2], 0, {"gpus_per_trial": 0.25}, "--device cpu"),
        ([8], 2, {"device": "cuda", "gpus_per_trial": 3}, "--gpus-per-trial"),
        ([8], 2, {"device": "cuda", "workers": 2, "gpus_per_trial": 0.5}, "--gpus-per-trial"),
    ],
)
def test_a_trial_that_can_never_fit_is_refused(
    cpus: list[int], gpus: int, changes: dict[str, Any], way_out: str
) -> None:
    changes = dict(changes)
    base = override(BASE, [f"workers={changes.pop('workers', 1)}", "batch.sequences=30"])
    request = SweepRequest(Path("runs"), gpus_per_trial=changes.pop("gpus_per_trial", None))
    with pytest.raises(UserError, match=way_out):
        slots_of(cluster(*cpus, gpus=gpus), sweep_of(base, **changes), request)


# ---- the winning command ------------------------------------------------------------------------------------

FREE = ("seed", "evaluation", "early_stopping", "checkpoint", "samples")


def pasted(command: str, folder: Path) -> RunConfig:
    """What the command line makes of the winning command."""
    words = shlex.split(command)
    assert words[:2] == ["orchestrate", "train"]
    return target.resolve(words[2:], Flags(), folder / "runs").config


def trains(config: RunConfig) -> dict[str, Any]:
    """Everything that decides what a training gives, without how it is watched."""
    values = config.model_dump(mode="json", exclude=set(FREE))
    for part in [values, *values["phases"]]:
        if part["optim"] is not None:
            part["optim"]["on_nonfinite"] = None
    return values


@pytest.mark.parametrize("space", CATALOG)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_winning_command_makes_the_trial_again(preset: str, space: str, tmp_path: Path) -> None:
    """With the sweep's own text, model and budget; on every preset that takes the space."""
    typed = override(PRESETS[preset](), ["data.sources.0.corpus=/texts/my text.txt", "model.dropout=0.05"])
    if space == "task_weights":
        typed = override(typed, ['data.sources=[{"corpus": "a", "weight": 1.0}, {"corpus": "b", "weight": 2.0}]'])
    try:
        found = catalogued(space, typed, "cpu").space
    except ConfigError:
        pytest.skip("does not take this space")
    phases = typed.resolved_phases()
    base = in_tokens(typed, [100 * typed.tokens_per_step] * len(phases))
    asked = SweepSettings(space=found.to_json(), trials=4, tokens=100, lr_rule="sqrt")
    sweep = Sweep("s", tmp_path / "runs/s", tmp_path / "runs", base, asked, found, {}, (), "cpu", micro_limit=2)
    for point in list(found.grid(2))[-3:]:
        trial = History().ask(0, point)
        again = pasted(command_of(sweep, trial), tmp_path)
        assert trains(again) == trains(run_of(base, point, asked, micro_limit=2))
        assert again == winning_run(sweep, trial)
        assert all(getattr(again, name) == getattr(base, name) for name in FREE)


def test_the_winning_command_of_a_configuration_of_ones_own(tmp_path: Path) -> None:
    """It names the sweep's own file, since no preset leads there."""
    base = build_config({**BASE.model_dump(mode="json"), "preset": "custom"})
    sweep = sweep_of(base, folder=tmp_path / "runs" / "s")
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "config.yaml").write_text(dump_yaml(base))
    trial = History().ask(0, {"optim.lr": 2e-2, "batch.sequences": 16})
    assert trains(pasted(command_of(sweep, trial), tmp_path)) == trains(run_of(base, trial.params, sweep.settings))
    assert trains(pasted(f"orchestrate train {sweep.folder / 'config.yaml'}", tmp_path)) != trains(
        run_of(base, trial.params, sweep.settings)
    )


@pytest.mark.parametrize("named", [True, False], ids=["another folder", "control: the default"])
def test_the_winning_command_names_the_runs_folder_where_it_was_named(named: bool, tmp_path: Path) -> None:
    """Pasted without it, a run begun by another `--runs-dir` would stand among others."""
    folder = tmp_path / "some where"
    sweep = replace(sweep_of(folder=folder / "s"), typed_runs_dir=folder if named else None)
    trial = History().ask(0, {"optim.lr": 2e-2, "batch.sequences": 16})
    words = shlex.split(command_of(sweep, trial))
    assert (words[-2:] == ["--runs-dir", str(folder)]) is named
    assert ("--runs-dir" in words) is named


def members(*lineages: list[Exploit]) -> History:
    """A population of which each member was asked for with the rate of its number and took over from others."""
    history = History()
    for number in range(len(lineages)):
        history.ask(number, {"optim.lr": float(number)})
    for exploit in sorted((each for lineage in lineages for each in lineage), key=lambda each: each.tokens):
        history.exploit(exploit)
    return history


def took(trial: int, parent: int, tokens: int, rate: float) -> Exploit:
    return Exploit(trial, parent, tokens, {"optim.lr": rate})


def test_the_winner_of_a_population_is_its_weights() -> None:
    """Those of the folder in which it ended; never a training from scratch with the last settings."""
    history = members([took(0, 1, 100, 0.5), took(0, 2, 200, 0.25)], [took(1, 2, 200, 9.0)], [])
    winner = history.trials[0]
    sweep = sweep_of(scheduler="pbt", searcher="random", evaluations=4)
    assert shlex.split(command_of(sweep, winner)) == ["orchestrate", "generate", "s/t0000-x2"]
    assert command_of(sweep_of(), History().ask(0, {"optim.lr": 1e-3})).startswith("orchestrate train")  # control
    told = lineage_of(sweep, history, winner)
    assert "t0002 with optim.lr=2.0, then t0000 from 200 tokens with optim.lr=0.25" in told and "s/t0000-x2" in told


def test_the_course_of_weights_is_that_of_those_they_were_taken_from() -> None:
    """At the time they were taken: what the parent did afterwards is not in them."""
    history = members([took(0, 1, 200, 0.5)], [took(1, 2, 100, 0.75), took(1, 3, 300, 9.0)], [took(2, 3, 200, 8.0)], [])
    assert course_of(history, history.trials[0]) == [
        (0, "t0002", {"optim.lr": 2.0}),
        (100, "t0001", {"optim.lr": 0.75}),
        (200, "t0000", {"optim.lr": 0.5}),
    ]
    assert course_of(history, history.trials[3]) == [(0, "t0003", {"optim.lr": 3.0})]
    assert [leg[1] for leg in course_of(history, history.trials[1])] == ["t0003", "t0001"]  # control: by now


def test_what_won_a_population_is_not_trained_from_scratch() -> None:
    for scheduler in ("none", "asha", "median"):
        check_can_train(scheduler)
    with pytest.raises(ConfigError, match="--then-train trains from scratch"):
        check_can_train("pbt")


# ---- after the search, and its budgets ------------------------------------------------------------------------


def prepared(*tokens: int) -> Any:
    """What the driver knows of a text of so many tokens for each phase."""
    return SimpleNamespace(phases=[SimpleNamespace(sources=[SimpleNamespace(tokens=range(each))]) for each in tokens])


def test_the_winner_trains_on_the_presets_own_budget(tmp_path: Path) -> None:
    """However short the trials were; its warm-up covers the tokens that the preset's does. A file that keeps the
    preset's name has budgets of its own."""
    typed = override(PRESETS["fundamentallm/small"](), ["budget.steps=60", "evaluation.max_tokens=4096"])
    preset = PRESETS["fundamentallm/small"]()
    data = prepared(100_000)
    base = in_tokens(typed, tokens_of_phases(typed, data))
    trial = History().ask(0, {"optim.lr": 2e-3, "batch.sequences": 32})
    sweep = sweep_of(base, folder=tmp_path)
    full = full_run(sweep, trial, typed, preset, data)
    [trained] = [phase.budget.tokens for phase in full.resolved_phases()]
    assert [trained] == tokens_of_phases(preset, data)
    assert trained != tokens_of_phases(typed, data)[0]
    assert (full.optim.lr, full.batch.sequences, full.seed) == (2e-3, 32, preset.seed)
    assert full.evaluation == typed.evaluation and full.checkpoint == preset.checkpoint
    assert full.schedule.warmup_steps * full.tokens_per_step == preset.schedule.warmup_steps * preset.tokens_per_step
    (tmp_path / "mine.yaml").write_text(dump_yaml(override(preset, ["budget.steps=20000"])))
    mine = target.resolve([str(tmp_path / "mine.yaml"), "budget.steps=60"], Flags(), tmp_path)
    assert mine.loaded is not None and mine.loaded.preset == mine.config.preset == "fundamentallm/small"
    [trained] = [phase.budget.tokens for phase in full_run(sweep, trial, typed, mine.loaded, data).resolved_phases()]
    assert trained == 20000 * preset.tokens_per_step


def test_every_phase_of_the_winner_has_the_presets_budget(tmp_path: Path) -> None:
    typed = override(
        PRESETS["fundamentallm/two-phase"](), ["phases.prose.budget.steps=8", "phases.code.budget.steps=8"]
    )
    base = in_tokens(typed, [8 * 512, 8 * 512])
    trial = History().ask(0, {"batch.sequences": 16})
    own = PRESETS["fundamentallm/two-phase"]()
    full = full_run(sweep_of(base, folder=tmp_path), trial, typed, own, prepared(10_000, 10_000))
    assert [phase.budget.tokens for phase in full.resolved_phases()] == [800 * 512, 800 * 512]


def test_gpu_hours_are_what_was_held(tmp_path: Path) -> None:
    """By all trials at work, over all commands of a sweep; not what is held now since the beginning."""
    sweep = sweep_of(folder=tmp_path)
    write_sweep(sweep, gpu_s=1800.0)
    desk: Any = SimpleNamespace(tokens=0)
    with Claim.acquire(tmp_path) as claim:

        def spent(limit: float) -> str | None:
            request = SweepRequest(tmp_path, max_gpu_hours=limit)
            driver = SweepDriver(sweep, prepared(1), request, claim, StopSignals(), SweepDisplay(json=True))
            for held, seconds in ((0.25 * 4, 3600), (0.25, 3600), (0.0, 7200)):
                driver._looked = time.monotonic() - seconds
                driver._count_gpu_time(held)
            return driver._spent(desk)

        assert spent(1.76) is None
        used_up = spent(1.74)
    assert used_up is not None and "--max-gpu-hours is used up (1.75)" in used_up


def test_gpu_hours_of_a_killed_driver_count(tmp_path: Path) -> None:
    """All but what it has held since it last noted them."""
    sweep = sweep_of(folder=tmp_path)
    write_sweep(sweep)
    with Claim.acquire(tmp_path) as claim:

        def driver() -> SweepDriver:
            return SweepDriver(
                sweep, prepared(1), SweepRequest(tmp_path), claim, StopSignals(), SweepDisplay(json=True)
            )

        killed = driver()
        for seconds in (600.0, 600.0, 1.0):  # of two GPUs; by the clock it notes once in a while
            killed._looked = time.monotonic() - seconds
            killed._gpu_noted -= seconds
            killed._count_gpu_time(2.0)
        assert 2400 <= driver()._gpu_s < 2400 + 2 * GPU_NOTED_S < 2 * killed._gpu_s
        killed._looked = killed._gpu_noted = time.monotonic() - 3600
        killed._count_gpu_time(0.0)  # nothing was held: nothing is written
        assert driver()._gpu_s < 2500


# ---- the winner at full budget ------------------------------------------------------------------------------


def test_a_sweep_and_the_training_of_its_winner_are_one_json_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However the training ends, and without it the document of the sweep is there all the same."""
    found = {"sweep": "s", "points": []}

    def trained(config: RunConfig, asked: Request) -> int:
        show_closing(settle(config, asked, ()), asked, 1.0, ())
        return 75

    def failed(config: RunConfig, asked: Request) -> int:
        raise TrainingFailed("it diverged")

    monkeypatch.setattr(full_training, "data_hashes", lambda *_: ())
    request = SweepRequest(tmp_path, json=True, then_train=GIVEN)
    told: list[Any] = []
    for way, raised, document in ((trained, None, found), (trained, None, None), (failed, TrainingFailed, found)):
        monkeypatch.setattr(launch, "train", way)
        with contextlib.nullcontext() if raised is None else pytest.raises(raised):
            code = train_winner(sweep_of(), Trial(3, {}), GIVEN, prepared(10_000), request, document)
            assert code == 75
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == {**found, "training": told[1]} and told[1]["name"] == "s-best"
    assert told[2] == found
    (tmp_path / "s-best").mkdir()
    (tmp_path / "s-best" / "identity.json").write_text(json.dumps({"fingerprint": "f", "fields": {}}))
    with pytest.raises(ConfigError, match="the sweep is done, and its winner, t0003, cannot train as s-best"):
        train_winner(sweep_of(), Trial(3, {}), GIVEN, prepared(10_000), request, found)
    assert json.loads(capsys.readouterr().out) == found


def test_the_document_waits_for_the_end_and_is_printed_whatever_that_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingFailed), SweepDisplay(json=True) as display:
        display.document = {"sweep": "s"}
        assert capsys.readouterr().out == ""
        raise TrainingFailed("no trial was completed")
    assert json.loads(capsys.readouterr().out) == {"sweep": "s"}
    with SweepDisplay(json=True) as display:
        pass
    assert capsys.readouterr().out == ""
