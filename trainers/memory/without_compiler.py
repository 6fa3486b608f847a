"""Dispatch modes and activation checkpointing without torch's compiler, which they import to keep it away."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

NAME = "torch._dynamo"
Work = TypeVar("Work", bound=Callable[..., Any])


class _Settings(ModuleType):
    """In place of torch._dynamo: `config` is loaded from where it is; nothing is compiled, so nothing need be kept from
    it."""

    def __init__(self, path: list[str]):
        super().__init__(NAME)
        self.__path__ = path
        self.left_alone: list[Any] = []

    def disable(self, work: Work, recursive: bool = True, *, wrapping: bool = True) -> Work:
        self.left_alone.append(work)
        return work


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, whoever imports torch._dynamo gets its settings alone: all of it takes as long to import as torch itself.

    Outside everything is as before, and nothing stands in for a compiler that is there already. Not for two threads
    at once.
    """
    if NAME in sys.modules:
        yield
        return
    spec = find_spec(NAME)
    assert spec is not None and spec.submodule_search_locations is not None
    settings = _Settings(list(spec.submodule_search_locations))
    sys.modules[NAME] = settings
    try:
        import_module(f"{NAME}.config")
        yield
    finally:
        for name in [each for each in sys.modules if each == NAME or each.startswith(f"{NAME}.")]:
            del sys.modules[name]
        vars(sys.modules["torch"]).pop("_dynamo", None)
        for work in settings.left_alone:
            vars(work).pop("__dynamo_disable", None)  # where torch notes down what is to be called instead
