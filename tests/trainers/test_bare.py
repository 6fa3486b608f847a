"""`python -m trainers`: the same run goes on, another one is refused, and every ending is told."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.trainers.crash import ending as left
from trainers.__main__ import main
from trainers.config import RunConfig
from trainers.config_io import build_config, dump_yaml, fingerprint_fields, override
from trainers.errors import ConfigError
from trainers.identity import only_more_budget, refuse_rewritten_past
from trainers.presets import preset

TWO = preset("fundamentallm/two-phase")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("trainers.context.RunFolder.stop_on_signals", lambda self: None)  # pytest keeps its handlers
    (tmp_path / "text.txt").write_text("".join(f"{n} bottles of beer on the wall.\n" for n in range(60)))
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml(tiny(tmp_path / "text.txt")))
    return path


def tiny(text: Path) -> RunConfig:
    return build_config(
        {
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 32},
            "data": {"sources": [{"corpus": str(text)}]},
            "batch": {"sequences": 4},
            "budget": {"steps": 2},
            "schedule": {"kind": "constant"},
            "samples": {"count": 0},
        }
    )


def bare(config: Path, *overrides: str, run: str = "run") -> int:
    return main([str(config), *overrides, "--run-dir", str(config.parent / run)])


def ending(config: Path) -> dict[str, object]:
    return dict(json.loads((config.parent / "run" / "outcome.json").read_text()))


def test_another_configuration_is_refused_and_more_budget_goes_on(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bare(config) == 0
    before = (config.parent / "run" / "config.yaml").read_text()
    assert bare(config, "optim.lr=0.5", "budget.steps=9") == 2
    said = capsys.readouterr().err
    assert "optim.lr: 0.0003 -> 0.5" in said and "Traceback" not in said
    assert (config.parent / "run" / "config.yaml").read_text() == before and ending(config)["state"] == "finished"
    assert bare(config, "budget.steps=1") == 2
    assert bare(config, "budget.steps=4", "checkpoint.every_steps=1") == 0
    assert ending(config)["step"] == 4
    (config.parent / "text.txt").write_text("another text of the same name\n" * 60)
    assert bare(config, "budget.steps=4") == 2
    assert "data.hashes.0" in capsys.readouterr().err


def test_a_budget_that_rewrites_the_past_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bare(config, "schedule.kind=cosine") == 0
    assert bare(config, "schedule.kind=cosine", "budget.steps=4") == 2
    assert "cannot be raised" in capsys.readouterr().err


def test_an_ending_that_failed_is_told(config: Path) -> None:
    absurd = ["optim.lr=1e30", "optim.clip_norm=null", "optim.on_nonfinite=raise", "budget.steps=20"]
    assert bare(config, *absurd) == 3
    assert ending(config)["state"] == "failed" and "training_failed" in str(ending(config)["reason"])
    assert bare(config, "batch.sequences=5000", run="small") == 2
    told = json.loads((config.parent / "small" / "outcome.json").read_text())
    assert told["state"] == "failed" and told["reason"].startswith("bad_input: ")


def test_weights_of_another_architecture_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bare(config) == 0
    start = f"init_from={config.parent / 'run'}"
    assert bare(config, start, "model.n_layers=2", run="new") == 2
    assert "model.n_layers: 1 there, 2 here" in capsys.readouterr().err
    assert not (config.parent / "new").exists()
    assert bare(config, start, run="new") == 0


def test_a_run_that_has_begun_needs_the_one_it_came_from_no_more(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its weights nor its tokenizer: the bits are those of a run whose source stayed."""
    assert bare(config) == 0
    start, source = f"init_from={config.parent / 'run'}", config.parent / "run"
    assert bare(config, start, "budget.steps=6", "checkpoint.every_steps=3", run="whole") == 0
    assert bare(config, start, "budget.steps=3", "checkpoint.every_steps=3", run="child") == 0
    assert bare(config, "budget.steps=5") == 0  # the source trains on: its newest weights are others now
    assert bare(config, start, "budget.steps=4", "checkpoint.every_steps=3", run="child") == 0
    shutil.rmtree(source)
    shutil.rmtree(config.parent / ".cache")
    assert bare(config, start, "budget.steps=6", "checkpoint.every_steps=3", run="child") == 0
    child, whole = (left(config.parent / name, 0) for name in ("child", "whole"))
    assert child.tensors == whole.tensors
    assert bare(config, "budget.steps=6", run="scratch") == 0
    assert left(config.parent / "scratch", 0).tensors != whole.tensors
    capsys.readouterr()
    assert bare(config, start, run="never-begun") == 2
    assert "no sound checkpoint" in capsys.readouterr().err


def test_text_unknown_to_the_initial_tokenizer_is_told_and_too_much_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bare(config) == 0
    start, known = f"init_from={config.parent / 'run'}", (config.parent / "text.txt").read_text()

    def begin(name: str, text: str) -> int:
        (config.parent / f"{name}.txt").write_text(text)
        return bare(config, start, f"data.sources=[{{corpus: '{config.parent / name}.txt'}}]", run=name)

    def told(name: str) -> bool:
        events = config.parent / name / "logs" / "events.jsonl"
        return events.exists() and "unknown to the tokenizer" in events.read_text()

    assert begin("same", known) == 0 and not told("same")
    assert begin("few", known.replace("beer", "bier ä")) == 0 and told("few")
    capsys.readouterr()
    assert begin("many", known.replace("e", "ä")) == 2
    said = capsys.readouterr().err
    assert "unknown to the tokenizer" in said and "%" in said and "from scratch" in said


def test_early_stopping_is_not_undone_by_a_larger_budget(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = ["optim.lr=3.0", "optim.clip_norm=null", "evaluation.every_epochs=null", "evaluation.every_steps=1"]
    worse += ["early_stopping.patience=2", "schedule.kind=constant"]
    assert bare(config, *worse, "budget.steps=40") == 0
    assert ending(config)["reason"] == "early_stopping"
    assert bare(config, *worse, "budget.steps=80") == 2
    assert "early stopping" in capsys.readouterr().err
    assert ending(config)["reason"] == "early_stopping"
    assert bare(config, *worse, "budget.steps=40") == 0  # the same command is no other


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"seed: \xff", "not UTF-8"), (b"sede: 3", "Did you mean"), (None, "cannot be read"), (b"workers: 2", None)],
)
def test_a_bad_file_is_one_error(
    content: bytes | None, said: str | None, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if said is None:
        assert bare(config, "workers=2") == 2
        said = "torchrun"
    else:
        config.unlink() if content is None else config.write_bytes(content)
        assert bare(config) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said.lower() in err.lower() and "Traceback" not in err
    assert not (config.parent / "run").exists()


def test_a_folder_that_cannot_be_made_is_one_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "run").write_text("a file")
    assert bare(config) == 2
    assert "cannot be claimed" in capsys.readouterr().err


def test_the_words_of_the_guide_are_understood(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (
        "model: {d_model: 16, num_layers: 1, num_heads: 2, max_seq_len: 32}\ntraining: {max_steps: 1, batch_size: 4}\n"
    )
    text = f"data.sources=[{{corpus: '{config.parent / 'text.txt'}'}}]"
    config.write_text(guide)
    assert bare(config, text) == 0
    config.write_text(guide.replace("max_steps", "max_setps"))
    assert bare(config, text) == 2
    assert "Did you mean `training.max_steps`" in capsys.readouterr().err


# ---- the law itself -----------------------------------------------------------------------------------------


def test_only_a_larger_budget_in_the_same_unit_is_the_same_run() -> None:
    config = preset("fundamentallm/small")  # 2 epochs

    def same(config: RunConfig, *changes: str) -> bool:
        return only_more_budget(fingerprint_fields(config, ()), fingerprint_fields(override(config, list(changes)), ()))

    assert same(config, "budget.epochs=3") and same(TWO, "phases.code.budget.steps=900")
    for changes in (["budget.epochs=1"], ["budget.steps=10000"], ["budget.epochs=3", "seed=1"]):
        assert not same(config, *changes)


def test_only_the_last_phase_may_grow_and_only_under_a_schedule_that_does_not_look_ahead() -> None:
    def refuse(*changes: str) -> None:
        old, new = override(TWO, list(changes[:-1])), override(TWO, list(changes))
        refuse_rewritten_past(new, fingerprint_fields(old, ()), fingerprint_fields(new, ()))

    with pytest.raises(ConfigError, match="only the last phase"):
        refuse("phases.prose.budget.steps=90000")
    with pytest.raises(ConfigError, match=r"schedule\.kind=cosine"):
        refuse("phases.code.schedule.kind=cosine", "phases.code.budget.steps=90000")
    refuse("phases.code.schedule.kind=constant", "phases.code.budget.steps=90000")


def test_a_process_may_train_any_number_of_times(config: Path) -> None:
    """Nothing stays open after a run, and nothing waits for the collector of cycles: corpora and weights go at once.

    A process's first run imports torch's compiler, and that import (torch.fx.wrap) keeps the frames of its callers.
    """
    assert bare(config, run="first") == 0
    gc.collect()
    gc.disable()
    try:
        assert bare(config) == 0
        assert not opened_below(config.parent)
    finally:
        gc.enable()
    with config.open():
        assert opened_below(config.parent) == [str(config)]  # the negative control


def opened_below(folder: Path) -> list[str]:
    """The files in `folder` that this process has open."""
    links = Path("/proc/self/fd").iterdir()
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    return [target for target in targets if target.startswith(str(folder))]
