"""Runs of a dozen steps on a few hundred characters, for the tests of continuation and of the non-finite policy."""

from __future__ import annotations

import random
from pathlib import Path

from tests.trainers.data.hub_server import HubServer, jsonl, parquet
from trainers.config import RunConfig
from trainers.config_io import build_config

STEPS = 12
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs"]


def write_text(folder: Path) -> Path:
    """Some 600 characters: 17 rows of 32 in the training split, so that an epoch is 4 steps of 4 rows."""
    rng = random.Random(0)
    path = folder / "small.txt"
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(170)))
    return path


def config_for(text: Path, **changes: object) -> RunConfig:
    """One layer of width 16 with dropout: every state there is, in milliseconds."""
    base: dict[str, object] = {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 32, "dropout": 0.1},
        "data": {"sources": [{"corpus": str(text)}]},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "budget": {"steps": STEPS},
        "optim": {"lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 3},
        "evaluation": {"every_steps": 5, "every_epochs": None},
        "checkpoint": {"every_steps": 3, "keep_last_n": 2},
        "logging": {"every_steps": 1},
        "samples": {"count": 1, "prompt_tokens": 4, "new_tokens": 4},
    }
    return build_config({**base, **changes})


def two_phases(text: Path, **changes: object) -> RunConfig:
    """The same dozen steps in two halves; the optimizer is handed over, the dropout is not."""
    half = {"budget": {"steps": STEPS // 2}}
    phases = [
        {"name": "first", **half},
        {"name": "second", **half, "hand_over": "optimizer", "model": {"dropout": 0.0}},
    ]
    return config_for(text, budget=None, phases=phases, **changes)


def stateful(text: Path, **changes: object) -> RunConfig:
    """Rows that go on where they ended, for `Plan(build="noisy_memory")`."""
    data = {"sources": [{"corpus": str(text)}], "order": "streams", "sequence_length": 8}
    return config_for(text, data=data, samples={"count": 0}, **changes)


def streamed_mixture(hub: HubServer, folder: Path, **changes: object) -> RunConfig:
    """A Hub dataset that trains while it downloads, mixed with a packed file."""
    rng = random.Random(1)
    stories = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 40))) for _ in range(300)]
    hub.repositories |= {
        "me/stories": {"train-0.parquet": parquet(stories[:150]), "train-1.parquet": parquet(stories[150:])}
    }
    local = folder / "local.jsonl"
    local.write_bytes(jsonl(stories[:60]))
    data = {
        "sources": [
            {"corpus": "hf:me/stories", "streaming": True, "weight": 1.0},
            {"corpus": str(local), "weight": 1.0},
        ],
        "validation": {"method": "hash", "fraction": 0.1},
        "stream_block": 8,
        "stream_validation_documents": 5,
    }
    return config_for(local, tokenizer={"kind": "bytes"}, data=data, **changes)


def worsening(text: Path, **changes: object) -> RunConfig:
    """A rate that only worsens the model, so that early stopping ends it after `patience` evaluations."""
    return config_for(
        text,
        budget={"steps": 60},
        optim={"lr": 3.0, "clip_norm": None},
        evaluation={"every_steps": 2, "every_epochs": None},
        early_stopping={"patience": 3},
        **changes,
    )
