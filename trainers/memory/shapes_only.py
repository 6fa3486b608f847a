"""ShapesOnly: tensors of the CPU without their memory, as torch's FakeTensorMode has them but for the compiler.

FakeTensorMode serves the compiler: it imports it, and keeps a cache of operations whose keys cost more than most of
them. What is needed here is its idea alone: a tensor that says it lies on the CPU, so that torch chooses the CPU's
kernels, autocast and derivatives, and that computes on the meta device. tests/trainers/memory holds the two against
each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")


class ShapeTensor(Tensor):
    """A tensor of the meta device under the name of the CPU; the two share one storage, as views of it do."""

    shape_of: Tensor

    @staticmethod
    def __new__(cls, shape_of: Tensor) -> ShapeTensor:
        made: ShapeTensor = Tensor._make_subclass(
            cls, shape_of, shape_of.requires_grad, dispatch_device=True, device_for_backend_keys=CPU
        )
        made.shape_of = shape_of
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class ShapesOnly(TorchDispatchMode):
    """Inside, tensors that are made have no memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler to keep it away


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return CPU
    given: dict[int, ShapeTensor] = {}
    inner = _inner(args, given)
    named = {key: _inner(value, given) for key, value in kwargs.items()}
    if named.get("device") is not None or (not given and _takes_device(func)):
        named["device"] = META
    return _outer(func(*inner, **named), given)


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _inner(value: Any, given: dict[int, ShapeTensor]) -> Any:
    """What the meta device computes with; `given` learns whose it is."""
    if isinstance(value, ShapeTensor):
        given[id(value.shape_of)] = value
        return value.shape_of
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, (list, tuple)):
        return type(value)(_inner(each, given) for each in value)
    return value


def _outer(value: Any, given: dict[int, ShapeTensor]) -> Any:
    """The results; what was changed in place is the tensor that was given."""
    if isinstance(value, Tensor):
        known = given.get(id(value))
        return ShapeTensor(value) if known is None else known
    if isinstance(value, (list, tuple)):
        return type(value)(_outer(each, given) for each in value)
    return value
