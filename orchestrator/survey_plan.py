"""`orchestrate plan` and `train --dry-run`: a plan from the configuration and a bounded look at the text.

Starts no Ray, trains no tokenizer and writes nothing. Refuses what training would refuse.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.console import count, pairs, size
from orchestrator.plan import RunPlan
from trainers.config import Phase, RunConfig
from trainers.errors import UserError

if TYPE_CHECKING:
    from trainers.data.prepare import DataSurvey


@dataclass(frozen=True)
class PlanReport:
    """Everything the plan shows."""

    config: RunConfig
    plan: RunPlan
    survey: DataSurvey
    device: str
    runs_dir: Path
