"""What every part of a configuration is made of: frozen, strict values, and numbers with bounds."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """Base of every part: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, (list, tuple)):
            refused = any(isinstance(item, bool) for item in value)
        else:
            refused = isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation)
        if refused:
            raise ValueError(f"true and false mean nothing here, got {value}.")
        return value


def exactly_one(part: Frozen, path: str, names: tuple[str, ...]) -> None:
    """ValueError unless exactly one of the fields `names` is set."""
    given = [name for name in names if getattr(part, name) is not None]
    if len(given) != 1:
        got = ", ".join(f"{name}={getattr(part, name)}" for name in given) or "none"
        raise ValueError(f"{path}: set exactly one of {', '.join(names)}; got {got}.")
