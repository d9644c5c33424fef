"""Labels of a data set column as one tensor, with the classes that they name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["class", "value", "multi"]


@dataclass
class LabelCode:
    """What the labels of a data set are: classes, values (regression) or sets of classes (multi-label).

    Learned from the training split, so that every split is encoded alike.

    Attributes:
        kind: ``"class"``, ``"value"`` or ``"multi"``.
        count: Number of classes; 1 for values.
        names: Class names in the order of their numbers; empty where the data set has numbers only.
    """

    kind: Kind
    count: int
    names: list[str] = field(default_factory=list)

    @classmethod
    def learn(cls, owner: str, column: str, values: Sequence[Any], names: Sequence[str] | None, given: int | None) -> LabelCode:
        """Find out what the training labels are.

        Args:
            owner: Name for error messages.
            column: Column name, for error messages.
            values: Labels of all training rows: int, str, float, or lists of 0 and 1 of one length.
            names: Class names if the data set declares them.
            given: Number of classes that the user named, or None.

        Raises:
            ValueError: For labels that are missing, of no kind known, or not the numbers 0 … K-1.
        """
        check_present(owner, column, values)
        first = values[0]
        if isinstance(first, (list, tuple)):
            return cls("multi", len(first), list(names or []))
        if isinstance(first, str):
            found = sorted(set(values))
            if given is not None and len(found) > given:
                raise ValueError(f"{owner}(num_classes={given}): column {column!r} has {len(found)} classes: {shown(found)}.")
            return cls("class", given or len(found), found)
        if isinstance(first, float):
            return cls("value", 1)
        if not isinstance(first, int):
            raise ValueError(
                f"{owner}: column {column!r} holds {type(first).__name__}; labels are int, str, float, or lists of 0 and 1."
            )
        whole = sorted({int(v) for v in values})
        count = given or (len(names) if names else whole[-1] + 1)
        if whole[0] < 0 or whole[-1] >= count:
            raise ValueError(
                f"{owner}: column {column!r} has labels from {whole[0]} to {whole[-1]}, out of range for {count} classes "
                f"(0 … {count - 1}). -1 often marks rows without a label: remove them, or renumber the labels from 0."
            )
        if not names and given is None and len(whole) != count:
            raise ValueError(
                f"{owner}: the labels in column {column!r} are not contiguous: {len(whole)} different numbers, "
                f"{shown(whole)}. Renumber them from 0, or pass num_classes={count} if some classes have no training row."
            )
        return cls("class", count, list(names or []))

    def encode(self, owner: str, column: str, values: Sequence[Any], split: str) -> Tensor:
        """Labels of a split: int64 ``(n,)`` classes, float32 ``(n,)`` values, or float32 ``(n, classes)``.

        Raises:
            ValueError: For a label that the training split does not allow, with its row.
        """
        check_present(owner, f"{column}, split {split}", values)
        if self.kind == "value":
            return torch.tensor([float(v) for v in values])
        if self.kind == "multi":
            for row, value in enumerate(values):
                if len(value) != self.count or any(v not in (0, 1) for v in value):
                    raise ValueError(
                        f"{owner}: row {row} of split {split!r} has the multi-label {list(value)!r}; it must be {self.count} "
                        "numbers that are 0 or 1, one per class."
                    )
            return torch.tensor([[float(v) for v in value] for value in values])
        numbers = {name: i for i, name in enumerate(self.names)} if isinstance(values[0], str) else None
        codes = [numbers.get(v, -1) if numbers is not None else int(v) for v in values]
        for row, code in enumerate(codes):
            if not 0 <= code < self.count:
                known = shown(self.names) if numbers is not None else f"0 … {self.count - 1}"
                raise ValueError(
                    f"{owner}: row {row} of split {split!r} has the label {values[row]!r} in column {column!r}, which is not "
                    f"among the training classes ({known})."
                )
        return torch.tensor(codes, dtype=torch.int64)


def check_present(owner: str, column: str, values: Sequence[Any]) -> None:
    """Raise if there are no labels, or one is missing."""
    if not len(values):
        raise ValueError(f"{owner}: there are no labels in column {column!r}: the split is empty.")
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is what an empty cell of a csv becomes
            raise ValueError(f"{owner}: row {row} has no label in column {column!r}: remove the row or give it one.")


def class_names(feature: Any) -> list[str] | None:
    """Names of a ``datasets.ClassLabel`` feature, also inside a list; None for others."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return [str(n) for n in names] if isinstance(names, list) else None


def shown(values: Sequence[Any], most: int = 10) -> str:
    """The first values of a list as text."""
    return ", ".join(map(str, values[:most])) + (" …" if len(values) > most else "")
