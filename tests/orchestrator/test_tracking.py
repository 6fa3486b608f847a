"""Laws of the MLflow room: what stands in the store is true, complete, private, and there once."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.provenance import describe_environment, flatten, git_state
from orchestrator.redaction import redact, redact_mapping
from orchestrator.tracking import Store, TrackedRun, TrackingRefused, close_orphan, open_store
from tests.orchestrator.faults import history
from trainers.errors import UserError

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("no_store_named")


def begin(store: Store, run_id: str | None = None, **more: object) -> TrackedRun:
    arguments: dict = {"tags": {"fingerprint": "ab"}, "params": {"optim": {"lr": 0.001}}} | more
    return store.open_run("laws", "first", run_id=run_id, **arguments)


def rows(count: int, time_ms: int = 1_700_000_000_000) -> list[dict]:
    return [
        {"step": s, "tokens": 8 * s, "time_ms": time_ms + s, "phase": "main", "train/loss": 1 / s}
        for s in range(1, count + 1)
    ]


# ---- exactly once -----------------------------------------------------------------------------------------------


def test_sending_rows_twice_stores_them_once(store: Store) -> None:
    run = begin(store)
    run.log_metrics(rows(1200))
    run.log_metrics(rows(1200))
    assert history(run, "train/loss") == [(s, 1 / s) for s in range(1, 1201)]
    assert history(run, "tokens") == [(s, 8 * s) for s in range(1, 1201)]


def test_the_law_above_rests_on_the_rows_first_time(store: Store) -> None:
    run = begin(store)
    run.log_metrics(rows(3))
    run.log_metrics(rows(3, time_ms=1_700_000_001_000))
    assert len(history(run, "train/loss")) == 6


def test_nan_and_infinity_are_kept_and_words_are_not_metrics(store: Store) -> None:
    run = begin(store)
    row = {"step": 1, "time_ms": 5, "phase": "main", "a": float("nan"), "b": float("inf"), "c@d": 2, "word": "x"}
    run.log_metrics([row])
    run.log_metrics([row])
    metrics = store.client.get_run(run.run_id).data.metrics
    assert metrics["a"] != metrics["a"] and metrics["b"] > 1e308 and metrics["c_d"] == 2
    assert set(metrics) == {"a", "b", "c_d"}
    assert len(history(run, "a")) == len(history(run, "b")) == 1


# ---- one run ----------------------------------------------------------------------------------------------------


def test_reattaching_keeps_the_run_and_says_running_again(store: Store) -> None:
    run = begin(store)
    run.finish("KILLED", "SIGTERM")
    again = begin(store, run.run_id)
    assert again.attached and again.run_id == run.run_id and again.experiment_id == run.experiment_id
    assert store.client.get_run(run.run_id).info.status == "RUNNING"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_as_told(store: Store, status: str) -> None:
    run = begin(store)
    run.finish(status, "because")  # type: ignore[arg-type]
    found = store.client.get_run(run.run_id)
    assert found.info.status == status and found.data.tags["stop_reason"] == "because"


def test_a_changed_param_becomes_a_tag_and_raises_nothing(store: Store) -> None:
    run = begin(store, params={"budget": {"steps": 100}, "seed": 1})
    begin(store, run.run_id, params={"budget": {"steps": 600}, "seed": 1, "new": None})
    data = store.client.get_run(run.run_id).data
    assert data.params == {"budget.steps": "100", "seed": "1", "new": "null"}
    assert data.tags["param_update.budget.steps"] == "600" and "param_update.seed" not in data.tags
    begin(store, run.run_id, params={"budget": {"steps": 100}, "seed": 1})
    assert store.client.get_run(run.run_id).data.tags["param_update.budget.steps"] == "100"


def test_params_beyond_the_limits_are_kept_as_far_as_mlflow_can(store: Store) -> None:
    run = begin(store, params={f"p{n}": n for n in range(250)} | {"long": "x" * 9000, "strange?key": 1})
    params = store.client.get_run(run.run_id).data.params
    assert len(params) == 252 and params["p249"] == "249" and params["strange_key"] == "1"
    assert len(params["long"]) == 6000 and "9000 characters" in params["long"]


def test_a_run_id_of_another_store_begins_a_new_run(store: Store) -> None:
    run = begin(store, "0" * 32)
    assert not run.attached and run.run_id != "0" * 32


def test_a_driver_that_died_before_noting_the_id_leaves_no_second_run(store: Store) -> None:
    tags = {"fingerprint": "ab", "run_path": "/runs/it's one"}
    lost = begin(store, tags=tags)
    assert begin(store, tags=tags).run_id == lost.run_id
    assert begin(store, tags=tags | {"run_path": "/runs/other"}).run_id != lost.run_id
    lost.log_metrics(rows(1))  # used: the folder was deleted and this is another training
    assert begin(store, tags=tags).run_id != lost.run_id


def test_phases_are_nested_and_found_again(store: Store) -> None:
    parent = begin(store)
    child = store.open_run("laws", "prose", run_id=None, tags={}, params={}, parent_run_id=parent.run_id)
    again = store.open_run("laws", "prose", run_id=None, tags={}, params={}, parent_run_id=parent.run_id)
    other = store.open_run("laws", "code", run_id=None, tags={}, params={}, parent_run_id=parent.run_id)
    assert again.run_id == child.run_id != other.run_id
    assert store.client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_an_orphan_is_closed_with_its_phases_and_an_ended_run_is_left_alone(store: Store) -> None:
    parent = begin(store)
    done = store.open_run("laws", "prose", run_id=None, tags={}, params={}, parent_run_id=parent.run_id)
    done.finish("FINISHED", "completed")
    left = store.open_run("laws", "code", run_id=None, tags={}, params={}, parent_run_id=parent.run_id)
    assert close_orphan(store, parent.run_id, "the driver was killed")
    states = [store.client.get_run(run.run_id).info.status for run in (parent, done, left)]
    assert states == ["KILLED", "FINISHED", "KILLED"]
    assert not close_orphan(store, parent.run_id, "again")


def test_a_run_deleted_in_the_store_refuses_and_reattaching_restores_it(store: Store) -> None:
    run = begin(store)
    store.client.delete_run(run.run_id)
    with pytest.raises(TrackingRefused):
        run.log_metrics(rows(1))
    begin(store, run.run_id).log_metrics(rows(1))


def test_checkpoints_are_links(store: Store, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000300"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text('{"step": 300}')
    run = begin(store)
    run.log_link("latest", checkpoint)
    assert store.client.get_run(run.run_id).data.tags["checkpoint.latest"] == str(checkpoint)
    (file,) = (tmp_path / "mlartifacts").glob("*/artifacts/checkpoints/latest.json")
    link = json.loads(file.read_text())
    assert link["step"] == 300 and len(link["manifest_sha256"]) == 64


# ---- the store --------------------------------------------------------------------------------------------------


def test_a_new_store_is_private_and_the_terminal_stays_quiet(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.tracking import open_store\n"
        "assert 'mlflow' not in sys.modules\n"
        "run = open_store(Path(sys.argv[1])).open_run('e', 'r', run_id=None, tags={}, params={'a': 1})\n"
        "run.finish('FINISHED', 'completed')"
    )
    runs = tmp_path / "runs of 100%"
    command = [sys.executable, "-c", code, str(runs)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert said == [(b"", b"")] * 2 and [process.returncode for process in both] == [0, 0]
    assert stat.S_IMODE((runs / "mlflow.db").stat().st_mode) == 0o600
    with sqlite3.connect(runs / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchone() == (2,)
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'e'").fetchone() == (1,)
    assert not (ROOT / "mlruns").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2secret@127.0.0.1:9/",
        "postgresql://me:hunter2secret@127.0.0.1:9/db",
        "nonsense://me:hunter2secret@nowhere/",
        "./mlruns",
        "file:///tmp/mlruns",
        "sqlite:////proc/nowhere/mlflow.db",
    ],
)
def test_a_store_out_of_reach_is_one_clear_message(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError) as caught:
        open_store(tmp_path)
    message = str(caught.value)
    assert "MLFLOW_TRACKING_URI" in message and "hunter2secret" not in message and "\n" not in message


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("these are not the tables you are looking for" * 50)
    with pytest.raises(UserError, match="not a database"):
        open_store(tmp_path)


def test_the_environment_names_store_and_experiment(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    elsewhere = open_store(tmp_path / "elsewhere")
    run = begin(elsewhere)
    assert elsewhere.uri == store.uri and not (tmp_path / "elsewhere").exists()
    assert store.client.get_experiment(run.experiment_id).name == "mine"
    assert run.run_id in run.url_hint() and str(tmp_path) in run.url_hint()


# ---- secrets and provenance -------------------------------------------------------------------------------------

PLANTED = {
    "hub": "hf_" + "aB3" * 11,
    "github": "ghp_" + "x1Y2" * 9,
    "aws": "AKIA" + "ABCD1234" * 2,
    "url": "https://me:opensesame99@example.org/data",
    "header": "Authorization: Bearer abcdef0123456789",
    "query": "https://example.org/x?token=abcdef0123456789&a=1",
}


def test_planted_secrets_reach_neither_params_nor_tags(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    planted = PLANTED | {"password": "swordfish-77", "environment": "it was correct horse battery, I think"}
    run = begin(store, tags=planted, params={"data": planted})
    run.set_tags({"error": f"failed: {PLANTED}"})
    run.finish("FAILED", f"cannot read {PLANTED['url']} with {PLANTED['hub']}")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        everything = "\n".join(database.iterdump())
    for secret in ("aB3aB3", "x1Y2", "ABCD1234", "opensesame99", "abcdef0123456789", "swordfish-77", "horse battery"):
        assert secret not in everything
    assert "example.org" in everything  # the control: what is not secret is there


def test_words_of_a_configuration_are_not_mistaken_for_secrets() -> None:
    honest = {
        "tokenizer.kind": "bpe", "batch.tokens": "512", "samples.prompt_tokens": "32", "evaluation.max_tokens": "null",
        "fingerprint": "5f" * 32, "data.sources.0.corpus": "hf:roneneldan/TinyStories", "git.commit": "a1" * 20,
        "text_field": "hf_short", "note": "the basic idea; a token = one character",
    }  # fmt: skip
    assert redact_mapping(honest) == honest
    assert redact("a@b.org wrote to https://x.org/y@z") == "a@b.org wrote to https://x.org/y@z"


def test_flatten_speaks_the_language_of_the_overrides() -> None:
    config = {
        "optim": {"betas": (0.9, 0.95), "clip_norm": None},
        "deterministic": True,
        "phases": ({"name": "prose", "budget": {"steps": 5}}, {"name": "code", "budget": None}),
        "data": {"sources": [{"corpus": "a.txt"}, {"corpus": "b.txt"}]},
        "empty": (),
    }
    assert flatten(config) == {
        "optim.betas": "[0.9, 0.95]", "optim.clip_norm": "null", "deterministic": "true", "empty": "[]",
        "phases.prose.name": "prose", "phases.prose.budget.steps": "5", "phases.code.name": "code",
        "phases.code.budget": "null", "data.sources.0.corpus": "a.txt", "data.sources.1.corpus": "b.txt",
    }  # fmt: skip


def test_git_state_knows_a_dirty_checkout_and_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) == {}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null"})
    clean = git_state(tmp_path)
    assert len(clean["git.commit"]) == 40 and clean["git.dirty"] == "false"
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == clean | {"git.dirty": "true"}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {}
    assert "version.torch" in describe_environment(tmp_path) and "python" in describe_environment(tmp_path)
