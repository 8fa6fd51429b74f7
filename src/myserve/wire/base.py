"""The root of everything that comes over the wire."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class WireModel(BaseModel):
    """Types as JSON has them: "1" is no number, 1.0 no integer, true neither, NaN nothing."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)
