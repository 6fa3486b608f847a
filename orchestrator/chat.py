"""An interactive session with a trained model: every line is a prompt, `/set` changes how it writes.

Knows nothing of torch: it is given a function that writes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.display import plain
from trainers.errors import UserError

Settings = dict[str, Any]
Write = Callable[[str, Mapping[str, Any]], Iterator[str]]
"""write(prompt, settings) yields the text piece by piece; UserError for a setting that breaks a rule"""

HELP = """\
Type the beginning of a text and press Enter; the model goes on with it. It continues, it does not converse.
  /more                  go on where the last text ended
  /set                   show the settings
  /set temperature=0.5   change them: {names}
  /set top_k=none        switch one off; stop takes a text, with \\n for a line break
  /history               what was written so far
  /help                  this
  /quit                  leave (or Ctrl-D); Ctrl-C ends the present text\
"""


class Chat:
    """One session. `settings` are the values to begin with; each text after the first draws from the next seed."""

    def __init__(self, write: Write, settings: Settings, *, terminal: bool):
        self._write = write
        self._settings = dict(settings)
        self._terminal = terminal
        self._history: list[tuple[str, str]] = []

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if self._terminal:
            self._say("Type the beginning of a text, /help for help, /quit to leave.")
        while (line := self._read()) is not None:
            if not line.strip():
                continue
            if not line.startswith("/"):
                self._answer(line)
            elif not self._command(line.strip()):
                return

    def _read(self) -> str | None:
        """A line, or None where the input ends. Ctrl-C at an empty prompt is a slip: it says how to leave."""
        while True:
            try:
                return input("> " if self._terminal else "")
            except EOFError:
                if self._terminal:
                    self._say("")
                return None
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D leaves.")

    def _command(self, line: str) -> bool:
        """Do what a line that begins with a slash asks; False to leave."""
        verb, _, rest = line.partition(" ")
        match verb:
            case "/quit" | "/exit" | "/q":
                return False
            case "/help" | "/?":
                self._say(HELP.format(names=", ".join(self._settings)))
            case "/history":
                self._show_history()
            case "/more":
                self._more()
            case "/set":
                self._set(rest.strip())
            case _:
                self._say(f"There is no {plain(verb)}. /help lists what there is. (A text cannot begin with a slash.)")
        return True

    def _answer(self, prompt: str) -> None:
        pieces: list[str] = []
        self._put(prompt)
        try:
            for piece in self._write(prompt, self._settings):
                pieces.append(piece)
                self._put(piece)
        except UserError as error:
            self._say(f"\n{error}")
            return
        except KeyboardInterrupt:
            self._put(" ...")
        self._say("")
        self._history.append((prompt, "".join(pieces)))
        if "seed" in self._settings:
            self._settings["seed"] += 1

    def _more(self) -> None:
        if not self._history:
            self._say("There is no text yet to go on with.")
            return
        self._answer("".join(self._history[-1]))

    def _show_history(self) -> None:
        if not self._history:
            self._say("Nothing yet.")
        for number, (prompt, text) in enumerate(self._history, start=1):
            self._say(f"[{number}] {safe(prompt + text)}")

    def _set(self, text: str) -> None:
        if text:
            try:
                name, value = setting(text, self._settings)
            except UserError as error:
                self._say(str(error))
                return
            self._settings[name] = value
        self._say("  ".join(f"{name}={shown(value)}" for name, value in self._settings.items()))

    def _put(self, text: str) -> None:
        sys.stdout.write(safe(text) if self._terminal else text)
        sys.stdout.flush()

    def _say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def setting(text: str, settings: Mapping[str, Any]) -> tuple[str, Any]:
    """`temperature=0.5` -> ('temperature', 0.5). UserError for an unknown name or a value of the wrong kind."""
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if name not in settings or not equals:
        from orchestrator.runs import suggestion

        raise UserError(f"/set NAME=VALUE, not {text!r}.{suggestion(name, list(settings))}")
    off = value.lower() in ("none", "off", "null", "")
    if name == "stop":
        return name, () if off else (*_unescaped(value),)
    if off:
        neutral = {"top_k": None, "top_p": None, "repetition_penalty": 1.0}
        if name not in neutral:
            raise UserError(f"{name} cannot be switched off.")
        return name, neutral[name]
    try:
        number: int | float = int(value) if name in ("max_tokens", "top_k", "seed") else float(value)
    except ValueError:
        kind = "a whole number" if name in ("max_tokens", "top_k", "seed") else "a number"
        raise UserError(f"{name} takes {kind}, not {value!r}.") from None
    return name, _checked(name, number)


def _checked(name: str, number: int | float) -> int | float:
    """The rules of GenerateConfig that can be told without torch, so that a bad setting is refused when it is made."""
    rules = {
        "max_tokens": number >= 1,
        "temperature": 0 < number < math.inf,
        "top_k": number >= 1,
        "top_p": 0 < number <= 1,
        "repetition_penalty": 0 < number < math.inf,
        "seed": 0 <= number < 2**63,
    }
    if not rules[name]:
        bounds = {"max_tokens": "at least 1", "top_k": "at least 1", "top_p": "above 0 and at most 1"}
        raise UserError(
            f"{name} must be {bounds.get(name, 'above 0' if name != 'seed' else '0 or more')}, not {number}."
        )
    return number


def shown(value: Any) -> str:
    """A setting as `/set` takes it."""
    if value is None or value == ():
        return "none"
    return "|".join(text.replace("\n", "\\n") for text in value) if isinstance(value, tuple) else f"{value}"


def _unescaped(value: str) -> tuple[str, ...]:
    return (value.replace("\\n", "\n").replace("\\t", "\t"),)


def safe(text: str) -> str:
    """Text for a terminal: line breaks and tabs stay, every other control character becomes visible."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
