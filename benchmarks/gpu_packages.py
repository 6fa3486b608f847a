"""What bitsandbytes, peft and DeepSpeed add on a GPU, where they are installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_arithmetic import INT8_BAND
from benchmarks.gpu_check import Skipped
from benchmarks.gpu_rig import STEPS, Rig, apart, at_least, take_step, within
from benchmarks.gpu_state import FOREVER, trained
from benchmarks.measure import Figure
from trainers.census import take_census
from trainers.engines import Engine
from trainers.manifest import newest
from trainers.record import series

LEAST_SHARE = 0.27  # of the bytes of 32-bit optimizer state, what 8-bit state may take of large tensors
BASE_STEPS, TUNED_STEPS = 12, 24


def needs(*packages: str) -> None:
    """Raises Skipped where one of them is not installed; imports none."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")


def eight_bit_state(rig: Rig) -> list[Figure]:
    """bitsandbytes' 8-bit AdamW trains within 3% of fp32 and keeps at most 0.27 of the bytes."""
    needs("bitsandbytes")
    plain = rig.engine(rig.config())
    whole = _state_bytes(plain)
    engine = rig.engine(rig.config("precision.optimizer_state=int8", "optim.min_8bit_size=0"))
    losses = [float(take_step(engine, rig.batch(step))[0]) for step in range(STEPS)]
    share = _state_bytes(engine) / whole
    return [
        within("losses, largest relative difference to fp32", apart(losses, rig.plain), INT8_BAND),
        within("share of the bytes of 32-bit state", share, LEAST_SHARE),
    ]


def _state_bytes(engine: Engine) -> int:
    return sum(take_census(engine.module, engine.optimizer, {}, engine.masters()).bytes["optimizer"].values())


def four_bit_base(rig: Rig) -> list[Figure]:
    """Adapters over a frozen 4-bit base of a finished run are trained and saved alone, and improve it."""
    needs("bitsandbytes", "peft")
    base, tuned = rig.folder / "base", rig.folder / "tuned"
    trained(rig.config(f"budget.steps={BASE_STEPS}"), base, rig, FOREVER)
    words = ("precision.compute=bf16", "precision.weights=nf4", "precision.adapter_rank=8", f"init_from={base}")
    done = trained(rig.config(f"budget.steps={TUNED_STEPS}", "optim.lr=0.01", *words), tuned, rig, FOREVER)
    losses = [series(run / "metrics.jsonl", "val/loss")[-1][1] for run in (base, tuned)]
    return [
        at_least("steps taken", done, TUNED_STEPS),
        within("loss on the held-out text, with adapters / the base's", losses[1] / losses[0], 1.0),
        within("tensors saved that are no adapter's", _no_adapters(tuned), 0),
    ]


def _no_adapters(run: Path) -> int:
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    return sum("lora_" not in name for name in checkpoint.load("model"))


def zero_stages(rig: Rig) -> list[Figure]:
    """DeepSpeed has, at every ZeRO stage, the losses of torch."""
    needs("deepspeed")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    steps = 4 if rig.tiny else 10
    figures = []
    for stage in (0, 1, 2, 3):
        losses = rig.losses(rig.config("engine=deepspeed", f"deepspeed.zero_stage={stage}"), steps)
        difference = apart(losses, rig.plain[:steps])
        figures.append(within(f"ZeRO-{stage}: losses, largest relative difference", difference, 1e-4))
    return figures


PACKAGED: tuple[Callable[[Rig], list[Figure]], ...] = (eight_bit_state, four_bit_base, zero_stages)
