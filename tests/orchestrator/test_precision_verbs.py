"""generate, evaluate and merge under each precision, on runs that were really trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import BAD_INPUT, DONE, main
from trainers.config_io import dump_yaml, override

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

WIDTH = ["optim.min_8bit_size=256", "optim.lr=1e-2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an int8 run, and adapters over the base on another text, which is left in `other.txt`."""
    from search_spaces.precisions import PRECISIONS

    folder = tmp_path_factory.mktemp("precision")
    text, other = folder / "text.txt", folder / "other.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(1000)))
    other.write_text("".join(f"the wall of {n} beers: on, off, on, off; {n * n}.\n" for n in range(1000)))
    words = {
        name: [f"{path}={value}" for path, value in precision.sets.items()] for name, precision in PRECISIONS.items()
    }
    train_run(folder / "runs" / "base", text, ["budget.steps=60"])
    train_run(folder / "runs" / "small", text, ["budget.steps=20", *words["int8"]])
    initial = f"init_from={folder / 'runs' / 'base'}"
    train_run(folder / "runs" / "tuned", other, ["budget.steps=40", initial, *words["int4"]])
    return folder / "runs"


def train_run(run_dir: Path, text: Path, changes: list[str]) -> None:
    from trainers.__main__ import identify
    from trainers.context import LocalContext
    from trainers.loop import train
    from trainers.presets import PRESETS

    plain = [f"data.sources.0.corpus={text}", "evaluation.every_steps=1000", "samples.count=0", "device=cpu"]
    config = override(PRESETS["fundamentallm/tiny"](), [*plain, *WIDTH, *changes])
    context = LocalContext(run_dir)
    try:
        (run_dir / "config.yaml").write_text(dump_yaml(config))
        (run_dir / "identity.json").write_text(json.dumps(identify(config, run_dir)))
        assert train(config, context).state == "finished"
    finally:
        context.close()


def perplexity(capsys: pytest.CaptureFixture[str], runs: Path, run: str, *arguments: str) -> float:
    text = str(runs.parent / "other.txt")
    assert main(["evaluate", run, text, "--runs-dir", str(runs), "--device", "cpu", "--json", *arguments]) == DONE
    return float(json.loads(capsys.readouterr().out)["metrics"]["val/perplexity"])


def text_of(capsys: pytest.CaptureFixture[str], runs: Path, run: str) -> Any:
    command = ["generate", run, "--runs-dir", str(runs), "--device", "cpu", "--json", "--prompt", "the wall"]
    assert main([*command, "--max-tokens", "40", "--greedy"]) == DONE
    return json.loads(capsys.readouterr().out)["texts"]


def test_adapters_improve_a_4_bit_base_on_text_that_it_never_saw(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, quantised = perplexity(capsys, runs, "base"), perplexity(capsys, runs, "base", "--precision", "int4")
    tuned = perplexity(capsys, runs, "tuned")
    assert quantised != base and abs(quantised / base - 1) < 0.3
    assert tuned < 0.7 * quantised
    assert perplexity(capsys, runs, "tuned", "--precision", "fp32") != tuned  # over the unquantised base


def test_the_merged_run_is_the_adapted_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "tuned", "--name", "whole", "--runs-dir", str(runs), "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["merged_from"] == "tuned"
    adapted, merged = perplexity(capsys, runs, "tuned"), perplexity(capsys, runs, "whole")
    assert merged == pytest.approx(adapted, rel=5e-3)  # both compute in bf16
    assert abs(perplexity(capsys, runs, "base") / adapted - 1) > 0.2
    assert text_of(capsys, runs, "whole") == text_of(capsys, runs, "tuned") != text_of(capsys, runs, "base")
    assert main(["show", "fundamentallm/tiny", "--init-from", "whole", "--runs-dir", str(runs)]) == DONE
    assert main(["runs", "--runs-dir", str(runs)]) == DONE
    assert "whole" in capsys.readouterr().out
    assert main(["merge", "tuned", "--name", "whole", "--runs-dir", str(runs)]) == BAD_INPUT
    assert "another --name" in capsys.readouterr().err


def test_a_merged_run_is_a_start_and_not_to_be_gone_on_with(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import launch

    monkeypatch.delattr(launch, "ray_cluster")  # refused before anything starts
    assert main(["merge", "tuned", "--name", "start", "--runs-dir", str(runs)]) == DONE
    assert main(["train", "start", "schedule.kind=constant", "--runs-dir", str(runs)]) == BAD_INPUT
    assert "--init-from start" not in capsys.readouterr().err  # another configuration is told as for any run
    assert main(["train", "start", "budget.steps=+50", "--runs-dir", str(runs)]) == BAD_INPUT
    told = capsys.readouterr().err
    assert "no optimizer state to go on with" in told and "--init-from start" in told


def test_what_is_merged_from_paged_8_bit_training_can_be_opened(runs: Path) -> None:
    from orchestrator.merging import PLAIN, plain_config
    from trainers.config import OptimConfig, RunConfig
    from trainers.config_io import build_config, read_yaml
    from trainers.errors import ConfigError

    tuned = build_config(read_yaml(runs / "tuned" / "config.yaml"))
    paged = override(tuned, ["precision.optimizer_state=int8", "optim.paged=true"])
    own = {"name": "own", "optim": OptimConfig(paged=True).model_dump(), "budget": {"steps": 3}}
    phased = RunConfig.model_validate(paged.model_dump() | {"phases": [own, {"name": "other"}]})
    for config in (paged, phased):
        plain = plain_config(config)
        assert build_config(plain.model_dump(mode="json")) == plain
        assert not any(phase.optim.paged for phase in plain.resolved_phases())
        assert plain.precision.adapter_rank == 0 and plain.precision.weights == "native"
        only_words = config.model_copy(update={"precision": config.precision.model_copy(update=PLAIN)})
        with pytest.raises(ConfigError, match=r"optim\.paged"):  # the negative control
            build_config(only_words.model_dump(mode="json"))


def test_a_run_without_adapters_has_nothing_to_merge(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "base", "--name", "other", "--runs-dir", str(runs)]) == BAD_INPUT
    assert "no adapters" in capsys.readouterr().err and not (runs / "other").exists()


def test_adapters_do_not_need_the_run_they_came_from(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "tuned", tmp_path / "runs" / "tuned")
    shutil.copy(runs.parent / "other.txt", tmp_path / "other.txt")
    assert perplexity(capsys, tmp_path / "runs", "tuned") == perplexity(capsys, runs, "tuned")
    shutil.rmtree(tmp_path / "runs" / "tuned" / "base")
    command = ["evaluate", "tuned", str(tmp_path / "other.txt"), "--runs-dir", str(tmp_path / "runs")]
    assert main(command) == BAD_INPUT
    assert "the weights under the adapters are lost" in capsys.readouterr().err


def test_an_int8_run_writes_and_is_scored_as_it_was_trained(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert text_of(capsys, runs, "small")[0]["text"]
    as_trained, plain = perplexity(capsys, runs, "small"), perplexity(capsys, runs, "small", "--precision", "bf16")
    assert as_trained != plain and as_trained == pytest.approx(plain, rel=0.03)


def test_int8_products_over_adapters_are_refused_in_a_sentence(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(runs.parent / "other.txt")
    command = ["evaluate", "tuned", text, "--runs-dir", str(runs), "--device", "cpu", "--precision", "int8"]
    assert main(command) == BAD_INPUT
    said = capsys.readouterr().err
    assert "orchestrate merge tuned" in said and "Traceback" not in said
    assert perplexity(capsys, runs, "base", "--precision", "int8")  # whole weights are fine


def test_an_8_bit_optimizer_is_not_needed_to_open_what_it_trained(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers import compatibility

    monkeypatch.setattr(compatibility, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    assert perplexity(capsys, runs, "small") and perplexity(capsys, runs, "base", "--precision", "int8")
    command = ["evaluate", "base", str(runs.parent / "other.txt"), "--runs-dir", str(runs), "--device", "cpu"]
    assert main([*command, "--precision", "int4"]) == BAD_INPUT  # 4-bit weights do need it
    assert "pip install bitsandbytes" in capsys.readouterr().err


def test_int4_without_a_run_to_start_from_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in ("train", "show", "plan"):
        assert (
            main([verb, "fundamentallm/tiny", "--precision", "int4", "--runs-dir", str(tmp_path / "runs")]) == BAD_INPUT
        )
        said = capsys.readouterr().err
        assert "needs --init-from RUN" in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("bitsandbytes", ["--precision", "int8"]), ("bitsandbytes", ["optim.name=lion"])],
)
def test_a_package_that_is_not_installed_is_told_before_training(
    package: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainers import compatibility

    monkeypatch.setattr(compatibility, "find_spec", lambda name: None if name == package else object())
    command = ["train", "fundamentallm/tiny", *arguments, "--runs-dir", str(tmp_path / "runs")]
    assert main(command) == BAD_INPUT
    said = capsys.readouterr().err
    assert f"pip install {package}" in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()
