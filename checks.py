"""Errors that name the field, what was expected and what it got."""

from __future__ import annotations

import contextlib
import json
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor


def expect(name: str, holds: Any, expected: str, got: Any) -> None:
    """Raise ValueError where `holds` (a bool, or a tensor of one) is not true."""
    if not bool(holds):
        raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_shape(name: str, tensor: Any, *shape: int | str) -> None:
    """A tensor of this shape; a letter stands for any size."""
    text = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    expect(name, isinstance(tensor, Tensor), f"a tensor of shape {text}", type(tensor).__name__)
    fits = all(isinstance(size, str) or size == actual for size, actual in zip(shape, tensor.shape))
    expect(name, fits and tensor.ndim == len(shape), f"shape {text}", tuple(tensor.shape))


def expect_media(media: dict[str, Any], media_spans: dict[str, Any], B: int) -> None:
    """Every medium is a tensor with a row for each of B sequences, or one whose rows `media_spans` gives to them."""
    for name in media_spans.keys() - media.keys():
        expect(f"media_spans[{name!r}]", False, f"the name of a tensor, one of {sorted(media)}", repr(name))
    for name, tensor in media.items():
        expect(name, isinstance(tensor, Tensor), "a tensor", type(tensor).__name__)
        rows, spans = len(tensor) if tensor.ndim else None, media_spans.get(name)
        if spans is None:
            by_row = f"{B} rows along dim 0 (one a sequence), or an entry in media_spans"
            expect(name, rows == B, by_row, tuple(tensor.shape))
        else:
            name = f"media_spans[{name!r}]"
            expect_shape(name, spans, B, 2)
            inside = (spans[:, 0] >= 0) & (spans[:, 0] <= spans[:, 1]) & (spans[:, 1] <= rows)
            expect(name, inside.all(), f"0 <= start <= stop <= {rows} rows of the tensor", spans.tolist())


def check_setting(config: Any, name: str, holds: bool, rule: str) -> None:
    """Raise ValueError with the setting's name, its value and the rule, where the rule does not hold."""
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r}: {rule}")


def json_object(config: Any, name: str) -> dict:
    """The setting as a dict: it may be one, JSON text of one, or None for an empty one."""
    value = getattr(config, name)
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    value = {} if value is None else value
    check_setting(config, name, isinstance(value, dict), "must be a JSON object")
    return value


def check_types(config: Any) -> None:
    """Each field of a dataclass must be what its annotation says, bounds included (`Annotated[int, Field(ge=1)]`)."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        try:
            TypeAdapter(kind).validate_python(getattr(config, name), strict=True)
        except ValidationError as error:
            check_setting(config, name, False, error.errors()[0]["msg"].replace("Input should", "must"))
