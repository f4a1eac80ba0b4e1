"""A constitution: written principles by which answers are criticised, revised and compared (Bai et al. 2022,
arXiv 2212.08073)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from polm.config import Settings, read_yaml, validate

SHIPPED = Path(__file__).with_name("constitution.yaml")


class Principle(Settings):
    """`critique` and `revision` are requests to whoever wrote the last answer; `compare` says what makes one of two
    answers the better one."""

    name: str = Field(min_length=1)
    critique: str = Field(min_length=1)
    revision: str = Field(min_length=1)
    compare: str = Field(min_length=1)


class Constitution(Settings):
    name: str = Field(min_length=1)
    principles: tuple[Principle, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_names(self) -> Constitution:
        names = [principle.name for principle in self.principles]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the principle {twice[0]!r} is there twice; give each a name of its own")
        return self

    def draw(self, seed: int, index: int, round_number: int = 0) -> Principle:
        """The principle of a record (by its index) in a round: each is as likely, and any seed gives other ones."""
        rng = np.random.default_rng((seed, index, round_number))
        return self.principles[int(rng.integers(len(self.principles)))]


def load_constitution(file: str | Path | None) -> Constitution:
    """A constitution from a YAML file (`name`, and `principles` with `name`, `critique`, `revision`, `compare`), or
    the one that polm brings. Raises RecipeError with file, line and field."""
    path = SHIPPED if file is None else Path(file)
    values, lines = read_yaml(path)
    return validate(Constitution, values, str(path), lines)
