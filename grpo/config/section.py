"""What every section of a recipe is: frozen and strict, and the kinds of numbers that settings share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @property
    def changed(self) -> set[str]:
        """The settings that are not at their default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
