"""`orchestrate plan` and `train --dry-run`: a plan from the configuration and a bounded look at the text.

Starts no Ray, trains no tokenizer and writes nothing. Refuses what training would refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.plan import RunPlan
from trainers.config import RunConfig

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
