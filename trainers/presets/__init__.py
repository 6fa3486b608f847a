"""Named configurations: functions that return a RunConfig, and PRESETS, the dict of them by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from trainers.config import RunConfig
from trainers.errors import ConfigError
from trainers.presets import codelm, fundamentallm, genesis

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "fundamentallm/tiny": fundamentallm.tiny,
    "fundamentallm/small": fundamentallm.small,
    "fundamentallm/medium": fundamentallm.medium,
    "fundamentallm/large": fundamentallm.large,
    "fundamentallm/two-phase": fundamentallm.two_phase,
    "codelm/tiny": codelm.tiny,
    "codelm/medium": codelm.medium,
    "codelm/large": codelm.large,
    "codelm/xlarge": codelm.xlarge,
    "genesis/microscope": genesis.microscope,
    "genesis/deep_narrow_40": genesis.deep_narrow_40,
    "genesis/deep_narrow_48": genesis.deep_narrow_48,
}


def preset(name: str) -> RunConfig:
    """The configuration called `name`. ConfigError, with the nearest name, where there is none."""
    if name not in PRESETS:
        ending = [known for known in PRESETS if known.rsplit("/", 1)[-1] == name]
        close = ending or difflib.get_close_matches(name, PRESETS, n=1)
        meant = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(f"there is no preset {name!r}. {meant}Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]()


def description(name: str) -> str:
    """One line on the preset called `name`: the first line of its function's docstring."""
    return (inspect.getdoc(PRESETS[name]) or "").partition("\n")[0]
