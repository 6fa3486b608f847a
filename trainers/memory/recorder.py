"""Recorder: what lives after each operation of a pass, by what it is for; Saved: what a forward pass keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.models.gpt import GPT

KINDS = ("gradients", "activations", "logits", "working")
"""what living bytes are for: `.grad` of parameters; what the layers keep for the backward pass; the head and the loss
with their gradients; and what lives only while a layer computes"""
GRADIENTS, ACTIVATIONS, LOGITS, WORKING = range(len(KINDS))

Place = Literal["below", "first", "middle", "last", "above"]


@dataclass
class Trace:
    """Living bytes after each operation of one pass."""

    living: np.ndarray
    """(moments, kinds, 2): what does not depend on the rows, and for each row"""
    places: list[tuple[Place, bool]]
    """of each moment: where in the depth, and whether in the backward pass"""
    middle: dict[str, np.ndarray]
    """(kinds, 2): living bytes where the forward passes of the middle layer and of the next one begin, and the same of
    the backward passes of the middle layer and of the one below"""

    def growth(self) -> tuple[np.ndarray, np.ndarray]:
        """(kinds, 2) twice: what the middle layer's forward leaves, and what its backward leaves of that."""
        up = self.middle["next up"] - self.middle["up"]
        if "down" not in self.middle:
            return up, up
        return up, up + self.middle["next down"] - self.middle["down"]


class Recorder(TorchDispatchMode):
    """Watches every operation: which storages live after it, and in which part of the pass."""

    def __init__(self, model: GPT):
        super().__init__()
        self.saved = Saved(model)
        self._model = model
        standing = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers(), *standing)}
        self._place: Place = "below"
        self._backward = False
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        """storage -> its life, its number"""
        self._kinds: list[int] = []
        self._sizes: list[int] = []
        """of each storage by number"""
        self._places: list[tuple[Place, bool]] = []
        """of each moment"""
        self._changes: list[tuple[int, int, int]] = []
        """moment, storage number, 1 where it came or -1 where it went"""
        self._inside: list[tuple[int, int]] = []
        """moment, bytes that the operation took besides"""
        self._marks: dict[str, int] = {}
        self._hooks: list[Any] = []
        self._gradients: dict[int, int] = {}
        """storage number of what became a gradient -> the moment when it did"""
        for parameter in (each for each in model.parameters() if each.requires_grad):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._accumulated))
        self._mark_layers()

    def _mark_layers(self) -> None:
        blocks = list(self._model.blocks)
        middle = len(blocks) // 2

        def before(index: int) -> Callable[..., None]:
            def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                if self._backward:
                    return  # activation checkpointing runs it again
                self._place = _place(index, len(blocks))
                if index in (middle, middle + 1):
                    self._mark("up" if index == middle else "next up")
                if index == 0 and inputs[0].requires_grad:
                    inputs[0].register_hook(lambda gradient: self._enter_backward(-1, len(blocks), middle))

            return enter

        def after(index: int) -> Callable[..., None]:
            def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                if self._backward:
                    return
                if index == len(blocks) - 1:
                    self._place = "above"
                if output.requires_grad:
                    output.register_hook(lambda gradient: self._enter_backward(index, len(blocks), middle))

            return leave

        for index, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(before(index)))
            self._hooks.append(block.register_forward_hook(after(index)))

    def _enter_backward(self, index: int, layers: int, middle: int) -> None:
        if index in (middle, middle - 1):
            self._mark("down" if index == middle else "next down")
        self._place = _place(index, layers) if index >= 0 else "below"

    def turn(self) -> None:
        """The forward pass is over."""
        self._backward, self._place = True, "above"

    def _mark(self, name: str) -> None:
        self._sweep()
        self._marks.setdefault(name, len(self._places))
        self._places.append((self._place, self._backward))

    # ---- operations -------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)  # a question, half of all that comes here
        self._sweep()
        out = func(*args, **(kwargs or {}))
        kind = self._kind()
        for tensor in _tensors(out):
            self._meet(tensor, kind)
        if inside := _inside(func, out):
            self._inside.append((len(self._places), inside))
        self._places.append((self._place, self._backward))
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler to keep it away

    def _kind(self) -> int:
        if self._place == "above":
            return LOGITS
        return WORKING if self._backward else ACTIVATIONS

    def _meet(self, tensor: Tensor, kind: int) -> None:
        key = _key(tensor)
        if key in self._own or key in self._alive:
            return
        storage = tensor.untyped_storage()
        number = len(self._kinds)
        self._alive[key] = (StorageWeakRef(storage), number)
        self._kinds.append(kind)
        self._sizes.append(storage.nbytes())
        self._changes.append((len(self._places), number, 1))

    def _sweep(self) -> None:
        # StorageWeakRef.expired, without two calls of Python for each of a hundred storages at each operation
        expired = torch.UntypedStorage._expired
        for key in [key for key, (life, _) in self._alive.items() if expired(life.cdata)]:
            self._changes.append((len(self._places), self._alive.pop(key)[1], -1))

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if known := self._alive.get(_key(parameter.grad)):
            self._gradients[known[1]] = len(self._places)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def trace(self, rows: int, *, standing: bool = False) -> Trace:
        """What was seen, for batches of `rows` rows; with `standing`, as if the gradients had been there before.

        Then they stand from the beginning, and what became one lives as a working tensor until it is added.
        """
        living = np.zeros((len(self._places) + 1, len(KINDS), 2))
        for moment, number, sign in self._changes:
            kind = GRADIENTS if number in self._gradients else self._kinds[number]
            if standing and kind == GRADIENTS:
                size = split(self._sizes[number], rows)
                living[moment, WORKING] += sign * size
                living[self._gradients[number], WORKING] -= sign * size
                living[0, GRADIENTS] += sign * size
            else:
                living[moment, kind] += sign * split(self._sizes[number], rows)
        living = living.cumsum(0)[:-1]
        for moment, n_bytes in self._inside:
            living[moment, WORKING] += split(n_bytes, rows)
        return Trace(living, self._places, {name: living[moment] for name, moment in self._marks.items()})


def split(n_bytes: int, rows: int) -> np.ndarray:
    """(2,): fixed bytes and bytes for each row, of a tensor where `rows` divides no other dimension."""
    return np.array([0.0, n_bytes / rows] if n_bytes % rows == 0 else [float(n_bytes), 0.0])


class Saved:
    """Bytes that the forward pass keeps, as saved-tensor hooks see them; each storage once, weights aside."""

    def __init__(self, model: GPT):
        self._own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        middle = len(model.blocks) // 2
        self._period = list(model.blocks[middle : middle + 2])
        """the middle layer and the next: from where one begins to where the other does, a layer keeps what it keeps"""
        self._layers = len(model.blocks)
        self._seen: set[int] = set()
        """addresses, which stay their tensors' own: the graph holds what is saved until the backward pass"""
        self._sizes: list[int] = []
        self._at_middle: list[int] = []

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Everything saved inside is counted."""
        hooks = [
            block.register_forward_pre_hook(lambda *_: self._at_middle.append(len(self._sizes)))
            for block in self._period
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._own and key not in self._seen:
            self._seen.add(key)
            self._sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    def bytes(self, rows: int) -> np.ndarray:
        """(2, 2): outside the layers, and of one layer; fixed and a row."""
        begin, end = (*self._at_middle, len(self._sizes))[:2]
        each = [split(size, rows) for size in self._sizes]
        a_layer = sum(each[begin:end], np.zeros(2))
        return np.stack([sum(each, np.zeros(2)) - self._layers * a_layer, a_layer])


def _place(index: int, layers: int) -> Place:
    if index == layers - 1:
        return "last"
    return "first" if index == 0 else "middle"


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for each in out:
            yield from _tensors(each)


def _inside(func: Any, out: Any) -> int:
    """Bytes that a kernel takes beside its result (aten/src/ATen/native/SoftMax.cpp: the softmax, and a mask)."""
    if func is torch.ops.aten._safe_softmax.default:
        return out.untyped_storage().nbytes() + out.numel()
    return 0
