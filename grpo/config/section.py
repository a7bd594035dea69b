"""The base class of a recipe's sections, which are frozen and strict, and the number types that settings share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# No sensible setting exceeds these bounds. A typo can, and it would otherwise be found in the middle of a run.
MANY = 1_000_000
LARGE = 1e6

Positive = Annotated[int, Field(gt=0, le=MANY)]
NonNegative = Annotated[int, Field(ge=0, le=MANY)]
Tokens = Annotated[int, Field(gt=0, le=10 * MANY)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0, le=LARGE)]
AtLeast0 = Annotated[float, Field(ge=0, le=LARGE)]

LONGEST_PATH, LONGEST_NAME = 900, 255
"""Maximum number of bytes of a path, with room for the files in a run's folder (macOS allows 1,024 in total), and of
one part of a path."""


def _nameable(name: str) -> str:
    if len(name.encode()) > LONGEST_PATH or max(len(part.encode()) for part in name.split("/")) > LONGEST_NAME:
        raise PydanticCustomError(
            "not_a_name",
            "expected a name that a file can have (at most {longest} bytes in all, and {part} between two slashes)",
            {"longest": LONGEST_PATH, "part": LONGEST_NAME},
        )
    return name


Name = Annotated[str, Field(min_length=1), AfterValidator(_nameable)]
"""The name of a file or folder, or a name that may turn out to be a file or folder."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @property
    def changed(self) -> set[str]:
        """The settings that are not at their default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
