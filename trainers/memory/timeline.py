"""What training allocates, moment by moment, read off a small build whose tensors have no memory.

A model of the real width, sequence length and vocabulary but at most three layers runs one step under torch's
FakeTensorMode: every operation of forward and backward happens, with the shapes, types and kernels of the CPU, and
none of the memory. After each operation the living bytes are written down by what they are for.

Layers are alike, so one layer more adds the same at each moment. Rows are alike too, and their number is a prime that
divides no other dimension, so a tensor is either in proportion to the rows or does not depend on them. `Timeline` so
knows every depth and every number of rows. tests/trainers/memory holds both laws against runs at full depth and
against hooks on real tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trainers import int8_linear
from trainers.config import ModelConfig, PrecisionConfig
from trainers.data.types import Batch
from trainers.models.gpt import GPT
from trainers.objectives import Objective
from trainers.precision import autocast
from trainers.weights import prepare_weights

KINDS = ("gradients", "activations", "logits", "working")
"""what living bytes are for: `.grad` of parameters; what the layers keep for the backward pass; the head and the loss
with their gradients; and what lives only while a layer computes"""
GRADIENTS, ACTIVATIONS, LOGITS, WORKING = range(len(KINDS))
DEPTH = 3  # layers of the small build: the first, one like all in the middle, the last
PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097)

Place = Literal["below", "first", "middle", "last", "above"]
Kernels = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Moments:
    """One pass at every number of rows and layers."""

    fixed: np.ndarray
    """(moments, kinds): bytes that do not depend on the rows, in the small build"""
    a_row: np.ndarray
    """(moments, kinds): bytes for each row"""
    slopes: np.ndarray
    """(slopes, moments, kinds, 2): what a further layer adds at most, fixed and a row; either end of the depth"""

    def at(self, rows: int, more_layers: int) -> np.ndarray:
        """(moments, kinds): living bytes with `more_layers` beyond the small build; the heavier end at each moment."""
        base = self.fixed + self.a_row * rows
        further = self.slopes[..., 0] + self.slopes[..., 1] * rows
        ends = base + more_layers * further
        heavier = ends.sum(-1).argmax(0)
        return cast(np.ndarray, ends[heavier, np.arange(len(base))])


@dataclass(frozen=True)
class Timeline:
    """Memory of one micro-batch and of one evaluated batch, for every number of rows and of layers."""

    layers: int
    """of the small build"""
    first: Moments
    """the first micro-batch of a step: gradients come into being"""
    later: Moments
    """a later one: gradients are there"""
    scoring: Moments
    """an evaluated batch: nothing is kept"""
    saved: np.ndarray
    """(2, 2): bytes that saved-tensor hooks saw: of all but the layers, of one layer; fixed and a row"""

    def peak(self, rows: int, layers: int, *, accumulates: bool) -> np.ndarray:
        """(kinds,): living bytes at the heaviest moment of a micro-batch of `rows` rows."""
        return _heaviest((self.later if accumulates else self.first).at(rows, layers - self.layers))

    def scoring_peak(self, rows: int, layers: int) -> np.ndarray:
        """(kinds,): living bytes at the heaviest moment of an evaluated batch."""
        return _heaviest(self.scoring.at(rows, layers - self.layers))

    def saved_bytes(self, rows: int, layers: int) -> int:
        """What the forward pass keeps for the backward pass, weights aside."""
        outside, a_layer = self.saved[:, 0] + self.saved[:, 1] * rows
        return round(float(outside + layers * a_layer))


def _heaviest(moments: np.ndarray) -> np.ndarray:
    return cast(np.ndarray, moments[moments.sum(1).argmax()])


def read_timeline(
    config: ModelConfig,
    vocab_size: int,
    *,
    sequence_length: int,
    precision: PrecisionConfig,
    objective: Objective,
    kernels: Kernels = "cpu",
    depth: int = DEPTH,
) -> Timeline:
    """The Timeline of a model, without allocating it. Takes a second, and no more for larger models.

    `depth`: layers of the small build.
    """
    depth = min(depth, config.n_layers)
    small = config.model_copy(update={"n_layers": depth})
    rows = rows_to_tell_apart(small, vocab_size, sequence_length)
    with FakeTensorMode(), without_collection(), ExitStack() as stack:
        if kernels == "cuda":
            stack.enter_context(cuda_kernels())
        build = SmallBuild(small, vocab_size, sequence_length, precision, objective)
        found = build.passes(rows)
    first, later, scoring = (_moments(trace, depth) for trace in found.traces)
    later = _with_standing_gradients(later, build.layer_gradients)
    return Timeline(depth, first, later, scoring, found.saved)


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside: when it comes would decide what lives."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def rows_to_tell_apart(config: ModelConfig, vocab_size: int, sequence_length: int) -> int:
    """A number of rows that no other dimension of a tensor is a multiple of."""
    others = (vocab_size, sequence_length, config.d_model, config.n_heads, config.ffn_width, config.context_length)
    return next(prime for prime in PRIMES if all(other % prime for other in others))


def _moments(trace: Trace, depth: int) -> Moments:
    slopes = np.zeros((2, *trace.living.shape))
    if depth >= DEPTH:
        up, through = trace.growth()
        for moment, (place, backward) in enumerate(trace.places):
            slopes[:, moment] = _slopes(place, backward, up, through)
    return Moments(trace.living[..., 0], trace.living[..., 1], slopes)


def _slopes(place: Place, backward: bool, up: np.ndarray, through: np.ndarray) -> np.ndarray:
    """What a further layer in the middle adds at a moment: at the near end of the depth and at the far one.

    up: what a layer's forward leaves; through: what is left of it when its backward is over.
    """
    nothing = np.zeros_like(up)
    if not backward:
        return np.stack({"below": (nothing, nothing), "first": (nothing, nothing), "middle": (nothing, up)}.get(
            place, (up, up)
        ))  # fmt: skip
    return np.stack({"above": (up, up), "last": (up, up), "middle": (up, through)}.get(place, (through, through)))


def _with_standing_gradients(moments: Moments, layer_gradients: int) -> Moments:
    """A later micro-batch begins with the gradients of every layer."""
    slopes = moments.slopes.copy()
    slopes[:, :, GRADIENTS, 0] += layer_gradients
    return Moments(moments.fixed, moments.a_row, slopes)


# ---- the small build ------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Passes:
    """What was seen of the small build."""

    traces: tuple[Trace, Trace, Trace]
    """first micro-batch, later one, evaluated batch"""
    saved: np.ndarray
    """(2, 2): saved bytes outside the layers, and of one layer; fixed and a row"""


class SmallBuild:
    """A model of few layers without memory; to be made and used under FakeTensorMode."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, length: int, precision: PrecisionConfig, objective: Objective
    ):
        self.model = GPT(config, vocab_size)
        shape_weights(self.model, precision)
        self.length, self.precision, self.objective = length, precision, objective
        layer = self.model.blocks[len(self.model.blocks) // 2]
        self.layer_gradients = sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)

    def passes(self, rows: int) -> Passes:
        """A micro-batch and an evaluated batch of `rows` rows."""
        self.model.train()
        trained = self._record(rows, self._train)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        scored = self._record(rows, self._score)
        traces = trained.trace(rows), trained.trace(rows, standing=True), scored.trace(rows)
        return Passes(traces, trained.saved.bytes(rows))

    def _record(self, rows: int, work: Callable[[Batch, Recorder], None]) -> Recorder:
        tokens = torch.zeros((rows, self.length), dtype=torch.long)
        batch = Batch(tokens=tokens, targets=torch.zeros_like(tokens), n_targets=rows * self.length, starts=None)
        recorder = Recorder(self.model)
        with recorder:
            work(batch, recorder)
        recorder.close()
        return recorder

    def _train(self, batch: Batch, recorder: Recorder) -> None:
        with autocast(self.precision, torch.device("cpu")):
            with recorder.saved.seen():
                loss = self.objective.loss(self.model, batch, None)
            total = loss.total / batch.n_targets
            recorder.turn()
            with torch.autocast("cpu", enabled=False):
                torch.autograd.backward(total, total.detach() * 0.0 + 1.0)

    def _score(self, batch: Batch, recorder: Recorder) -> None:
        with torch.no_grad(), autocast(self.precision, torch.device("cpu")):
            self.objective.scores(self.model, batch, None)


def shape_weights(model: GPT, precision: PrecisionConfig) -> None:
    """Give `model` the layers that `precision` computes with; a 4-bit base computes in the shapes of a plain one."""
    if not precision.adapter_rank:
        prepare_weights(model, precision)
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in [*model.blocks.modules()]:
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, Adapted(layer, precision.adapter_rank))


class Adapted(nn.Module):
    """A frozen linear layer under a LoRA adapter, operation by operation as peft has it, which cannot be built here."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out: Tensor = self.base(x)
        return out + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0


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
        self._sweep()
        out = func(*args, **(kwargs or {}))
        kind = self._kind()
        for tensor in _tensors(out):
            self._meet(tensor, kind)
        if inside := _inside(func, out):
            self._inside.append((len(self._places), inside))
        self._places.append((self._place, self._backward))
        return out

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


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """CUDA's ways in place of the CPU's: dropout keeps a mask of bytes, attention never its weights, int8 products sum
    integers.

    So that a machine without a GPU can plan for one. Names of modules are exchanged for the while: a TorchFunctionMode
    is not active where activation checkpointing runs a layer again.
    """
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def masked(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **{**kwargs, "dropout_p": 0.0})

    def integers(left: Tensor, right: Tensor) -> Tensor:
        return torch._int_mm(left, right.t()).float()

    product = int8_linear.int8_product
    F.dropout, F.scaled_dot_product_attention = masked, fused  # type: ignore[assignment]
    int8_linear.int8_product = integers
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention
        int8_linear.int8_product = product
