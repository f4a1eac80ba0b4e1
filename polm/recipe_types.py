"""Types of the numbers in recipes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
UpToOne = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
Number = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NOT_SEMANTIC: dict[str, Any] = {"semantic": False}
