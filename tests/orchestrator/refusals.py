"""What the tests of bad input share: a driver that ends where Ray would start, and the one message that input gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.cli import BAD_INPUT, main

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 200


class ReachedRay(BaseException):
    """Raised where the driver would start Ray: the input was taken."""


def without_ray(driver: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a folder of its own with a good text, where `driver` ends before it would start Ray."""

    @contextmanager
    def reached(*_: Any, **__: Any) -> Iterator[None]:
        raise ReachedRay
        yield

    monkeypatch.setattr(driver, "ray_cluster", reached)
    monkeypatch.chdir(folder)
    for name in ("ORCHESTRATE_RUNS", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (folder / "text.txt").write_text(TEXT)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message that `arguments` get."""
    assert main(arguments) == BAD_INPUT, capsys.readouterr()
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "Traceback" not in err
    return err
