"""`orchestrate generate`: texts for prompts, or an interactive session."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.console import err, print_json
from trainers.errors import UserError

if TYPE_CHECKING:
    from orchestrator.trained import Trained
    from trainers.generate import GenerateConfig

MAX_PROMPTS = 100_000
MAX_PROMPT_BYTES = 1 << 26  # of a file: a device file has no end


@dataclass(frozen=True)
class Wish:
    """What the command line asked for."""

    run: str
    runs_dir: Path
    prompts: tuple[str, ...] | None
    prompts_file: str | None
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    stop: tuple[str, ...]
    seed: int
    greedy: bool
    interactive: bool
    checkpoint: str | None
    device: str
    json: bool


def write_texts(wish: Wish) -> int:
    """Generate as wished; the exit code. Raises UserError before a model is loaded, where that can be told."""
    prompts = read_prompts(wish)
    from orchestrator.runs import existing_run

    existing_run(wish.runs_dir, wish.run)  # a misspelt name is told before torch is imported
    from orchestrator.trained import open_trained

    settings = generation_settings(wish)
    trained = open_trained(wish.runs_dir, wish.run, checkpoint=wish.checkpoint, device=wish.device)
    if prompts is None:
        return _session(trained, wish)
    if wish.json:
        print_json(_document(wish, trained, prompts, _all_texts(trained, prompts, settings)))
    elif len(prompts) == 1:
        _stream_one(trained, prompts[0], settings)
    else:
        texts = _all_texts(trained, prompts, settings)
        shown = _for_output()
        sys.stdout.write(
            "\n---\n".join(shown(prompt + text) for prompt, text in zip(prompts, texts, strict=True)) + "\n"
        )
    return 0


def read_prompts(wish: Wish) -> list[str] | None:
    """The prompts asked for; None for a session. Raises UserError for wishes that exclude each other."""
    if wish.prompts is not None and wish.prompts_file is not None:
        raise UserError("--prompt and --prompts-file exclude each other: give one of them.")
    if wish.interactive and (wish.prompts is not None or wish.prompts_file is not None or wish.json):
        raise UserError("--interactive asks for its prompts as it goes: leave out --prompt, --prompts-file and --json.")
    if wish.greedy and (wish.top_k not in (None, 1) or wish.top_p is not None):
        raise UserError("--greedy always takes the likeliest token: leave out --top-k and --top-p.")
    if wish.prompts is not None:
        return list(wish.prompts)
    if wish.prompts_file is not None:
        return _prompts_in(wish.prompts_file)
    if wish.interactive or (not wish.json and sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    return [""]


def _prompts_in(name: str) -> list[str]:
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise UserError(f"--prompts-file {name} is longer than {MAX_PROMPT_BYTES:,} bytes. Split it.")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompts-file {name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file {name} is not UTF-8 text (byte {error.start}).") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise UserError(
            f"--prompts-file {name} has {len(prompts):,} prompts (lines with text); 1 to {MAX_PROMPTS:,} go."
        )
    return prompts


def generation_settings(wish: Wish) -> GenerateConfig:
    """The rules of the text to write. Raises UserError for a value that breaks one."""
    return _settings_of(_values(wish))


def _values(wish: Wish) -> dict[str, Any]:
    return {
        "max_tokens": wish.max_tokens,
        "temperature": wish.temperature,
        "top_k": 1 if wish.greedy else wish.top_k,
        "top_p": wish.top_p,
        "repetition_penalty": wish.repetition_penalty,
        "stop": wish.stop,
        "seed": wish.seed,
    }


def _settings_of(values: Mapping[str, Any]) -> GenerateConfig:
    from trainers.generate import GenerateConfig

    if values["seed"] < 0:
        raise UserError(f"seed must be 0 or more, not {values['seed']}.")
    return GenerateConfig(**values)


def _all_texts(trained: Trained, prompts: list[str], settings: GenerateConfig) -> list[str]:
    from trainers.generate import generate

    return generate(trained.model, trained.tokenizer, prompts, settings)


def _stream_one(trained: Trained, prompt: str, settings: GenerateConfig) -> None:
    """A prompt with its text, piece by piece as it comes."""
    from trainers.generate import stream

    shown = _for_output()
    sys.stdout.write(shown(prompt))
    sys.stdout.flush()
    for piece in stream(trained.model, trained.tokenizer, prompt, settings):
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _for_output() -> Callable[[str], str]:
    """Generated text may hold any character: a terminal gets only harmless ones, a file or pipe all of them."""
    from orchestrator.chat import safe

    return safe if sys.stdout.isatty() else str


def _session(trained: Trained, wish: Wish) -> int:
    from orchestrator.chat import Chat
    from trainers.generate import stream

    def write(prompt: str, values: Mapping[str, Any]) -> Iterator[str]:
        return stream(trained.model, trained.tokenizer, prompt, _settings_of(values))

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline  # noqa: F401  line editing and history for input()

        err().print(f"{wish.run} at step {trained.step} ({trained.checkpoint.name}), on {trained.device}", style="dim")
    Chat(write, _values(wish), terminal=terminal).run()
    return 0


def _document(wish: Wish, trained: Trained, prompts: list[str], texts: list[str]) -> dict[str, Any]:
    return {
        "run": wish.run,
        "step": trained.step,
        "checkpoint": str(trained.checkpoint),
        "settings": _values(wish),
        "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)],
    }
