"""Models of a gigabyte of training memory, and one training of them in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainers.config import RunConfig
from trainers.config_io import override
from trainers.memory.resident import status_bytes
from trainers.presets import PRESETS

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives back what is freed, so that a peak does not depend on what was there before"""
VOCABULARY = 60  # characters of the text; the models' tables are larger

SIZES = {
    "gpt-25M": (
        *("model.d_model=512", "model.n_layers=8", "model.n_heads=8", "model.context_length=256"),
        *("model.vocab_size=2048", "model.norm=layernorm", "model.dropout=0.1"),
    ),
    "gpt-38M": (
        *("model.d_model=512", "model.n_layers=12", "model.n_heads=8", "model.context_length=512"),
        *("model.vocab_size=4096", "model.dropout=0"),
    ),
    "gpt-57M": (
        *("model.d_model=768", "model.n_layers=8", "model.n_heads=12", "model.context_length=256"),
        *("model.vocab_size=1024", "model.dropout=0"),
    ),
    "llama-30M": (
        *("model.d_model=384", "model.n_layers=16", "model.n_heads=6", "model.context_length=512"),
        *("model.vocab_size=8192", "model.dropout=0", "model.positions=rope_interleaved", "model.activation=swiglu"),
        *("model.bias=false", "model.final_norm=rmsnorm"),
    ),
    "deepnorm-22M": (
        *("model.d_model=384", "model.n_layers=12", "model.n_heads=6", "model.context_length=256"),
        *("model.vocab_size=1024", "model.dropout=0", "model.norm=deepnorm", "model.norm_position=post"),
    ),
}


def sized(size: str, text: Path, *settings: str) -> RunConfig:
    """A model of SIZES on `text`, on the CPU; it evaluates and saves only when it is asked to."""
    quiet = ("evaluation.every_epochs=null", "evaluation.max_tokens=1024", "samples.count=0")
    quiet += ("checkpoint.every_minutes=null", "checkpoint.save_best=false", "device=cpu")
    source = f'data.sources=[{{"corpus": "{text}"}}]'
    return override(PRESETS["fundamentallm/small"](), [*SIZES[size], *quiet, source, *settings])


def text_of_characters(folder: Path) -> Path:
    """A text of VOCABULARY different characters, long enough for every cell."""
    path = folder / "text.txt"
    alphabet = "".join(chr(0x41 + index) for index in range(VOCABULARY))
    path.write_text("".join(alphabet[(index * 7 + index // 11) % VOCABULARY] for index in range(400_000)))
    return path


def said_by(module: str, *arguments: str) -> Any:
    """The JSON of the last line that `python -m MODULE` prints in a fresh process with MALLOC set."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def status(field: str) -> int:
    """Bytes of this process by a field of /proc/self/status, such as VmRSS or VmHWM."""
    found = status_bytes(field)
    assert found is not None, "this is measured on Linux"
    return found
