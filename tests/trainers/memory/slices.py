"""What the processes of test_slices.py run: a model under each engine, weighed at rest and in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.trainers.contract import LARGER, ROWS, engine_for, group, held_bytes, take_whole_step
from trainers.engines import Engine

ENGINES = ("ddp", "fsdp", "zero 0", "zero 1", "zero 2", "zero 3")


def weighed(rank: int, folder: Path) -> None:
    """Of each engine after two steps: what stands, and what an evaluation adds to it."""
    found: dict[str, Any] = {}
    with group(rank, 2, folder):
        for kind in ENGINES:
            engine = engine_for(kind, 2, batch={"sequences": ROWS}, model=LARGER)
            for step in range(2):
                take_whole_step(engine, step, rank, 2)
            found[kind] = {**held_bytes(engine), "masters": masters(engine), "evaluation": evaluation_bytes(engine)}
            engine.close()
    (folder / f"slices-{rank}.json").write_text(json.dumps(found))


def local(tensor: Tensor) -> Tensor:
    """This rank's slice."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def masters(engine: Engine) -> int:
    """Bytes of what the optimizer updates, where that is not what the model computes with."""
    own = {local(parameter).untyped_storage().data_ptr() for parameter in engine.module.parameters()}
    slices = [local(tensor) for tensor in engine.optimizer.state]
    return sum(each.numel() * 4 for each in slices if each.untyped_storage().data_ptr() not in own)


def evaluation_bytes(engine: Engine) -> int:
    """Of the weights that the module for evaluations has beside the slices."""
    own = {local(parameter).untyped_storage().data_ptr() for parameter in engine.module.parameters()}
    with engine.whole() as module:
        there = {parameter.untyped_storage().data_ptr(): parameter.numel() * 4 for parameter in module.parameters()}
    return sum(size for address, size in there.items() if address not in own)
