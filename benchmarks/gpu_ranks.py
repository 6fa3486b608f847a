"""Several ranks, a GPU each: data parallelism and FSDP2 against one rank."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.gpu_check import Skipped
from benchmarks.gpu_rig import Rig, apart, split, take_step, within
from benchmarks.measure import Figure

KINDS = ("ddp", "fsdp")
RANKS, STEPS = 2, 10
SAME = 1e-4  # in fp32: sums in another order, through ten updates


def several_ranks(rig: Rig) -> list[Figure]:
    """Two ranks, with DDP and with FSDP2, have the losses of one."""
    if rig.cuda and torch.cuda.device_count() < RANKS:
        raise Skipped(f"there is one GPU, and {RANKS} ranks need one each")
    folder = rig.folder / "ranks"
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    spawn(_rank, args=(rig.device.type, str(rig.folder), rig.tiny), nprocs=RANKS)
    figures = []
    for kind in KINDS:
        losses = json.loads((folder / f"{kind}.json").read_text())
        figures.append(within(f"{kind}: losses, largest relative difference", apart(losses, rig.plain[:STEPS]), SAME))
    return figures


def _rank(rank: int, device: str, folder: str, tiny: bool) -> None:
    """One process: writes the losses of each kind, where it is the first."""
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    rig = Rig(place, Path(folder), tiny)
    with _group(rank, rig):
        for kind in KINDS:
            losses = _losses(rig, kind, rank)
            if rank == 0:
                (rig.folder / "ranks" / f"{kind}.json").write_text(json.dumps(losses))


def _losses(rig: Rig, kind: str, rank: int) -> list[float]:
    engine = rig.engine(rig.config(f"workers={RANKS}", f"parallel={kind}"), world_size=RANKS)
    parts = []
    for step in range(STEPS):
        own = split(rig.batch(step), rig.shape.rows // RANKS)[rank]
        parts.append(take_step(engine, own, ranks=RANKS)[0])
    summed = torch.stack(parts).cpu()
    dist.all_reduce(summed)
    engine.close()
    return [float(loss) for loss in summed]


@contextmanager
def _group(rank: int, rig: Rig) -> Iterator[None]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    if rig.cuda:
        torch.cuda.set_device(rig.device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if rig.cuda else "gloo"
    meeting = f"file://{rig.folder}/ranks/rendezvous"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


RANKED: tuple[Callable[[Rig], list[Figure]], ...] = (several_ranks,)
