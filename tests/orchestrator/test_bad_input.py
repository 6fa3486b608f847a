"""Laws of bad input, through the command line itself: exit code 2, one message that says what to do, nothing left.

Every case ends before Ray would start. What a corpus, a tokenizer or a YAML file alone must refuse is tested in their
own rooms; here it is what a person typed that must come to one clear end.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import launch
from orchestrator.cli import BAD_INPUT, DONE, STOPPED, main
from tests.orchestrator.refusals import TEXT, ReachedRay, refused, without_ray
from trainers.config_io import build_config, dump_yaml, fingerprint, fingerprint_fields, override
from trainers.data.prepare import data_hashes
from trainers.presets import PRESETS

PROJECT = Path(__file__).parents[2]
TINY = ["train", "fundamentallm/tiny", "--data"]
Setup = Callable[[Path], object]


@pytest.fixture(autouse=True)
def before_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(launch, tmp_path, monkeypatch)


def half_made(folder: Path) -> list[str]:
    """Files below `folder` that are no whole entry of the shared cache (whose locks are empty files that stay)."""
    whole = {"tokenizers", "packed", "hashes"}
    files = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    return [str(f) for f in files if f.parts[:1] != (".cache",) or f.parts[1] not in whole or ".tmp-" in str(f)]


def bytes_in(name: str, content: bytes) -> Setup:
    return lambda folder: (folder / name).write_bytes(content)


# ---- texts ----------------------------------------------------------------------------------------------

CUT = gzip.compress(os.urandom(3000))[:1500]
TEXTS: dict[str, tuple[str, Setup, str]] = {
    "missing": ("txet.txt", lambda folder: None, "Did you mean text.txt"),
    "empty": ("a.txt", bytes_in("a.txt", b""), "empty"),
    "a mark and no text": ("a.txt", bytes_in("a.txt", b"\xef\xbb\xbf"), "no text"),
    "three bytes": ("a.txt", bytes_in("a.txt", b"abc"), "at least 286"),
    "binary": ("a.txt", bytes_in("a.txt", b"\x89PNG\0\0" * 999), "binary"),
    "Latin-1": ("a.txt", bytes_in("a.txt", "é".encode("latin1") * 999), "iconv"),
    "cut gzip": ("a.txt.gz", bytes_in("a.txt.gz", CUT), "truncated"),
    "no gzip": ("a.txt.gz", bytes_in("a.txt.gz", TEXT.encode()), "not valid gzip"),
    "broken JSONL": ("a.jsonl", bytes_in("a.jsonl", b'{"text": "x"}\n{"text":\n'), "line 2"),
    "JSONL of other fields": ("a.jsonl", bytes_in("a.jsonl", b'{"body": "x"}\n'), "text_field"),
    "JSONL without an end": ("a.jsonl", bytes_in("a.jsonl", b"[" * 200_000), "one object a line"),
    "a FIFO": ("pipe", lambda folder: os.mkfifo(folder / "pipe"), "regular file"),
    "an endless device": ("/dev/zero", lambda folder: None, "regular file"),
    "a link to itself": ("me.txt", lambda folder: (folder / "me.txt").symlink_to("me.txt"), "symbolic links"),
    "a folder of loops": (
        "loop",
        lambda folder: ((folder / "loop").mkdir(), (folder / "loop" / "on").symlink_to(folder / "loop")),
        "no file in this folder",
    ),
    "a folder of FIFOs": (
        "pipes",
        lambda folder: ((folder / "pipes").mkdir(), os.mkfifo(folder / "pipes" / "a.txt")),
        "no file in this folder",
    ),
    "a name too long": ("x" * 5000, lambda folder: None, "5,0"),
    "a name with a NUL": ("a\0b", lambda folder: None, "no corpus"),
    "a name that is no UTF-8": (os.fsdecode(b"\xff.txt"), lambda folder: None, "UTF-8"),
    "no Hub name": ("hf:", lambda folder: None, "hf:OWNER/NAME"),
    "the folder of the runs": (".", lambda folder: None, "--runs-dir"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_bad_text_is_refused_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, setup, expected = TEXTS[case]
    setup(tmp_path)
    message = refused([*TINY, corpus, "--name", "mine"], capsys)
    assert expected in message and len(message) < 1500
    assert half_made(tmp_path / "runs") == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.txt", TEXT.replace("\n", "\r\n").encode()),
        ("one line.txt", b"lorem ipsum " * 20_000),
        ("ünï😀.txt", "héllo 😀 wörld, 日本\n".encode() * 500),
        ("one letter.txt", b"a" * 5000),
    ],
)
def test_an_odd_text_is_taken(name: str, content: bytes) -> None:
    """The negative control: the table above is not refused for some other reason, and what is odd is no error."""
    Path(name).write_bytes(content)
    with pytest.raises(ReachedRay):
        main([*TINY, name])


# ---- settings -------------------------------------------------------------------------------------------

SETTINGS = {
    "too deep to build": (["model.n_layers=100000000"], "1000"),
    "too wide for 64 bits": (["model.d_model=1000000000"], "1000000"),
    "too large for this machine": (["model.d_model=1000000"], "of memory"),
    "fewer rows than ids": (["model.vocab_size=3"], "model.vocab_size (3)"),
    "SentencePiece of no room": (["tokenizer.kind=sentencepiece_bpe", "tokenizer.vocab_size=3"], "261"),
    "SentencePiece of little room": (["tokenizer.kind=sentencepiece_unigram", "tokenizer.vocab_size=270"], "at least"),
    "BPE beyond all memory": (["tokenizer.kind=bpe", f"tokenizer.vocab_size={2**62}"], "tokenizer.vocab_size"),
    "a tokenizer from a device": (["tokenizer.kind=sentencepiece_bpe", "tokenizer.path=/dev/zero"], "/dev/zero"),
    "a tokenizer that is text": (["tokenizer.kind=bpe", "tokenizer.path=text.txt"], "text.txt"),
    "an unknown score": (["early_stopping.metric=val/los"], "val/loss"),
    "scores that overflow": (["samples.temperature=1e-320"], "samples.temperature"),
    "no GPU": (["--device", "cuda"], "device=cpu"),
    "workers do not divide": (["--workers", "3"], "6 or 9"),
    "no source": (["data.sources=[]"], "data.sources"),
    "nothing left to train on": (["data.validation.fraction=0.9999999"], "data.validation.fraction"),
    "one document by hash": (["data.validation.method=hash"], "method=tail"),
    "a context longer than the text": (["model.context_length=100000"], "data.sequence_length"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_setting_is_refused_before_ray(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = SETTINGS[case]
    if "cuda" in arguments and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    assert expected in refused([*TINY, "text.txt", "--name", "mine", *arguments], capsys)
    assert half_made(tmp_path / "runs") == []


YAMLS = {
    "an alias bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "aliases",
    ),
    "itself": ("a: &a [*a]\n", "itself"),
    "a nested duplicate": ("model:\n  d_model: 8\n  d_model: 16\n", "line 2"),
    "a weight for one of two": (
        "data: {sources: [{corpus: text.txt, weight: 1.0}, {corpus: python-stdlib}]}\n",
        "Missing on: python-stdlib",
    ),
    "a stream with a tail": ("data: {sources: [{corpus: 'hf:a/b', streaming: true}]}\n", "method=hash"),
    "a file that streams": (
        "data: {sources: [{corpus: text.txt, streaming: true}], validation: {method: hash}}\nbudget: {steps: 3}\n",
        "leave streaming out",
    ),
    "a preset that leads out": ("preset: ../../evil\ndata: {sources: [{corpus: text.txt}]}\n", "run name"),
    "no end": ("#" * 3_000_000, "characters"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_a_bad_file_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = YAMLS[case]
    (tmp_path / "mine.yaml").write_text(text)
    assert expected in refused(["train", "mine.yaml"], capsys)
    assert half_made(tmp_path / "runs") == []


def test_a_small_learning_rate_in_yaml_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("optim: {lr: 1e-4}\n")
    assert main(["show", "mine.yaml", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["optim"]["lr"] == 1e-4


# ---- runs that are there --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a finished run of it, as the driver leaves one but for MLflow."""
    from trainers.context import LocalContext
    from trainers.loop import train

    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text(TEXT)
    changes = [f"data.sources.0.corpus={text}", "budget.steps=4", "checkpoint.every_steps=2", "samples.count=0"]
    config = override(PRESETS["fundamentallm/tiny"](), [*changes, "schedule.kind=constant"])
    ctx = LocalContext(folder / "runs" / "tiny")
    train(config, ctx)
    ctx.close()
    (ctx.run_dir / "config.yaml").write_text(dump_yaml(config))
    hashes = data_hashes(config)
    identity = {
        "name": "tiny",
        "fingerprint": fingerprint(config, hashes),
        "fields": fingerprint_fields(config, hashes),
        "mlflow_ended": True,
    }
    (ctx.run_dir / "identity.json").write_text(json.dumps(identity))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, its text where this test may change it."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "tiny"
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path)))
    return folder


def in_each(name: str, text: str) -> Setup:
    """Writes `text` over the file `name` of every checkpoint."""
    return lambda run: [(step / name).write_text(text) for step in (run / "checkpoints").glob("step-*")]


def instead(name: str, text: str) -> Setup:
    return lambda run: (run / name).write_text(text)


def a_folder_for(name: str) -> Setup:
    return lambda run: ((run / name).unlink(), (run / name).mkdir())


def unfinished(damage: Setup) -> Setup:
    return lambda run: ((run / "outcome.json").unlink(), damage(run))


def cosine(run: Path) -> None:
    """As if it had been trained with a schedule that ends with the budget."""
    config = override(
        build_config(__import__("yaml").safe_load((run / "config.yaml").read_text())), ["schedule.kind=cosine"]
    )
    hashes = data_hashes(config)
    (run / "config.yaml").write_text(dump_yaml(config))
    identity = {"fingerprint": fingerprint(config, hashes), "fields": fingerprint_fields(config, hashes)}
    (run / "identity.json").write_text(json.dumps(identity))


TRAIN, GENERATE = ["train", "tiny"], ["generate", "tiny", "--prompt", "It"]
DAMAGE: dict[str, tuple[Setup, list[str], str]] = {
    "identity is torn": (instead("identity.json", '{"finger'), TRAIN, "identity.json"),
    "identity is nested": (instead("identity.json", "[" * 100_000), TRAIN, "identity.json"),
    "identity is of other kinds": (instead("identity.json", '{"fingerprint": 1, "fields": 3}'), TRAIN, "identity.json"),
    "identity is a folder": (a_folder_for("identity.json"), TRAIN, "identity.json"),
    "outcome is a folder": (a_folder_for("outcome.json"), TRAIN, "outcome.json"),
    "configuration is torn": (instead("config.yaml", "model: {d_model: "), TRAIN, "config.yaml"),
    "configuration is gone": (lambda run: (run / "config.yaml").unlink(), GENERATE, "config.yaml"),
    "claim is a folder": (unfinished(a_folder_for("claim")), TRAIN, "claim"),
    "claim is a link": (
        unfinished(lambda run: ((run / "claim").unlink(), (run / "claim").symlink_to("nowhere"))),
        TRAIN,
        "claim",
    ),
    "no folder for checkpoints": (
        unfinished(lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("x"))),
        TRAIN,
        "is no folder",
    ),
    "tokenizer is gone": (lambda run: shutil.rmtree(run / "tokenizer"), GENERATE, "tokenizer"),
    "tokenizer is of another kind": (instead("tokenizer/characters.json", '{"a": [1]}'), GENERATE, "characters.json"),
    "tokenizer was changed": (
        instead("tokenizer/characters.json", '{"char_to_id": {"a": 4}}'),
        GENERATE,
        "changed after it was saved",
    ),
    "every checkpoint is torn": (in_each("model.safetensors", "x"), GENERATE, "no sound checkpoint"),
    "every manifest is nested": (in_each("manifest.json", "[" * 100_000), GENERATE, "no sound checkpoint"),
    "checkpoints are a file": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("x")),
        GENERATE,
        "no checkpoint",
    ),
    "the text has changed": (
        lambda run: (run.parents[1] / "text.txt").write_text(TEXT + "More."),
        TRAIN,
        "data.hashes.0",
    ),
    "the text is gone": (lambda run: (run.parents[1] / "text.txt").unlink(), TRAIN, "text.txt"),
    "another setting": (lambda run: None, [*TRAIN, "optim.lr=0.5"], "optim.lr: 0.003 -> 0.5"),
    "a smaller budget": (lambda run: None, [*TRAIN, "budget.steps=3"], "budget.steps: 4 -> 3"),
    "more steps of a cosine": (cosine, [*TRAIN, "budget.steps=+5"], "schedule.kind=cosine"),
    "another architecture": (
        lambda run: None,
        [*TINY, "text.txt", "--init-from", "tiny", "model.n_layers=3"],
        "model.n_layers: 1 there, 3 here",
    ),
    "another tokenizer": (
        lambda run: None,
        [*TINY, "text.txt", "--init-from", "tiny", "tokenizer.kind=bytes"],
        "tokenizer.kind=characters",
    ),
    "no sound weights": (
        in_each("state.json", "{"),
        [*TINY, "text.txt", "--init-from", "tiny"],
        "no sound checkpoint",
    ),
    "a penalty that overflows": (lambda run: None, [*GENERATE, "--repetition-penalty", "1e-300"], "repetition_penalty"),
    "a temperature that overflows": (lambda run: None, [*GENERATE, "--temperature", "1e-320"], "temperature"),
    "prompts without an end": (lambda run: None, ["generate", "tiny", "--prompts-file", "/dev/zero"], "/dev/zero"),
    "no text to score": (lambda run: None, ["evaluate", "tiny", ""], "DATA is empty"),
    "a device to score": (lambda run: None, ["evaluate", "tiny", "/dev/zero"], "/dev/zero"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_refused_and_loses_nothing(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, arguments, expected = DAMAGE[case]
    damage(run)
    before = sorted(run.rglob("*"))
    assert expected in refused(arguments, capsys)
    assert sorted(set(before) ^ set(run.rglob("*"))) in ([], [run / ".generation"])
    assert [path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == ["tiny"]


HARMLESS: dict[str, Setup] = {
    "nothing": lambda run: None,
    "a torn outcome": instead("outcome.json", '{"state": "fin'),
    "a foreign outcome": instead("outcome.json", '{"state": "splendid"}'),
    "a nested outcome": instead("outcome.json", "[" * 100_000),
    "a torn claim": instead("claim", '{"gen'),
    "a nested claim": instead("claim", "[" * 3000),
    "a torn record": instead("metrics.jsonl", '{"step": 1}\n{"step": 2, "tr'),
    "a nested record": instead("metrics.jsonl", "[" * 100_000 + "\n"),
    "a foreign record": instead(
        "metrics.jsonl", '{"step": "x"}\n[1]\n{"step": 2, "train/loss": "oops", "time_ms": []}\n'
    ),
    "a foreign pointer": instead("checkpoints/latest", "../../etc\n"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_can_be_read_round_is_read_round(case: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A documented tolerance: the checkpoints are what counts, and the run goes on from them."""
    HARMLESS[case](run)
    (run / "outcome.json").unlink() if "outcome" not in case else None
    with pytest.raises(ReachedRay):
        main(TRAIN)
    assert "Traceback" not in capsys.readouterr().err
    assert main(["status", "tiny"]) == DONE
    assert main([*GENERATE, "--max-tokens", "3"]) == DONE


def test_characters_a_model_does_not_know_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.txt").write_text("日本語😀" * 100)
    assert main(["evaluate", "tiny", "other.txt", "--json"]) == DONE
    out, err = capsys.readouterr()
    assert "400 characters" in err and "unknown" in err
    assert json.loads(out)["metrics"]["val/loss"] > 0
    assert main(["evaluate", "tiny", "text.txt", "--json"]) == DONE
    assert "unknown" not in capsys.readouterr().err


def test_rows_that_are_no_rows_do_not_stop_the_way_to_mlflow() -> None:
    from orchestrator.store_values import is_row, numbers_of

    assert is_row({"step": 1, "time_ms": 2}) and not is_row({"step": 1}) and not is_row({"step": 1, "time_ms": "x"})
    assert numbers_of({"step": 1, "time_ms": 2, "a": "oops", "b": 10**400, "c": 0.5}) == {"c": 0.5}


# ---- Ctrl-C -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "by"), [(signal.SIGINT, "by Ctrl-C."), (signal.SIGTERM, "by SIGTERM.")])
def test_a_signal_while_text_is_packed_leaves_at_once(
    number: int, by: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = launch.prepare

    def signalled(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        return packed(*arguments, **named)

    monkeypatch.setattr(launch, "prepare", signalled)
    before = sorted(path for path in run.rglob("*") if path.name != ".generation")
    for arguments in ([*TINY, "text.txt", "--name", "mine"], ["train", "tiny", "budget.steps=+2"]):
        assert main(arguments) == STOPPED
        assert by in capsys.readouterr().err
    assert not (tmp_path / "runs" / "mine").exists(), "something half-made was left behind"
    assert sorted(path for path in run.rglob("*") if path.name != ".generation") == before
    monkeypatch.setattr(launch, "prepare", packed)
    with pytest.raises(ReachedRay):
        main([*TINY, "text.txt", "--name", "mine"])


# ---- streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("show fundamentallm/tiny >&-", DONE),
        ("runs <&- >&- 2>&-", DONE),
        ("train nope 2>&-", BAD_INPUT),
        ("train nope 2>/dev/full", BAD_INPUT),
        ("show fundamentallm/tiny >/dev/full", BAD_INPUT),
        ("show fundamentallm/tiny preset=日", DONE),
    ],
)
def test_streams_that_are_closed_full_or_ascii_change_no_exit_code(command: str, code: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "ascii"}
    line = f"{sys.executable} -m orchestrator {command}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "internal" not in done.stderr


# ---- permissions ----------------------------------------------------------------------------------------

PRIVILEGED = hasattr(os, "geteuid") and os.geteuid() == 0
DROP = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--no-new-privs"] if PRIVILEGED else []


@pytest.mark.skipif(bool(DROP) and not shutil.which("setpriv"), reason="root may write everywhere")
@pytest.mark.parametrize("what", ["runs folder", "text"])
def test_no_permission_is_one_message(what: str, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "secret.txt").write_text(TEXT)
    (tmp_path / "locked").chmod(0o555)
    (tmp_path / "secret.txt").chmod(0)
    arguments = (
        ["--data", "text.txt", "--runs-dir", "locked/runs"] if what == "runs folder" else ["--data", "secret.txt"]
    )
    command = [*DROP, sys.executable, "-m", "orchestrator", "train", "fundamentallm/tiny", *arguments]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    (tmp_path / "locked").chmod(0o755)
    assert done.returncode == BAD_INPUT
    assert "no permission" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "locked").iterdir())
