"""Pictures out of chat messages, what an image may be and where it may come from; which rows of a tensor are whose.

`load_image` is the only door through which bytes that others have made become pixels.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor


def message_parts(messages: Sequence[Any]) -> list[tuple[str, list[dict]]]:
    """(role, content parts) of each chat message, whether messages are dicts or verifiers' own objects."""

    def plain(value: Any) -> Any:
        return value.model_dump() if hasattr(value, "model_dump") else value

    result = []
    for message in map(plain, messages):
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [plain(part) for part in content]
        result.append((message["role"], parts))
    return result


def image_urls(messages: Sequence[Any]) -> list[str]:
    """The URLs of the messages' images, in order."""
    return [
        part["image_url"]["url"]
        for _, parts in message_parts(messages)
        for part in parts
        if part["type"] == "image_url"
    ]


def load_image(url: str) -> Image.Image:
    """The image of a base64 `data:` URI, as RGB.

    Turned as its EXIF data says and laid on white where it is transparent, as vLLM does it: trainer and server must see
    the same pixels.

    Raises:
        ValueError: any other URL, or bytes that are no image.
    """
    header, comma, data = url.partition(",")
    if not (comma and header.startswith("data:image/") and header.endswith(";base64")):
        raise ValueError(
            f"image_url={url[:60]!r}: must be a data:image/...;base64 URI (files and web addresses are not read)"
        )
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image_url={url[:60]!r}: cannot be read as an image ({error})") from None
    with contextlib.suppress(Exception):  # a damaged EXIF block turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def take_spans(tensor: Tensor, spans: Sequence[Sequence[int]]) -> Tensor:
    """The rows [start, stop) of a tensor for each span, one after the other; differentiable."""
    pieces: list[list[int]] = []
    for start, stop in spans:
        if pieces and pieces[-1][1] == start:  # it goes on where the last one ended
            pieces[-1][1] = stop
        else:
            pieces.append([start, stop])
    if len(pieces) == 1:  # no copy
        return tensor[slice(*pieces[0])]
    return torch.cat([tensor[:0], *(tensor[start:stop] for start, stop in pieces)])


def select_spans(tensor: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows of the tensor that these spans (n, 2) own, each distinct span once; where the n spans are in it)."""
    starts: dict[tuple[int, int], int] = {}  # old span -> where it starts in the new tensor
    moved, total = [], 0
    for start, stop in spans.tolist():
        if (start, stop) not in starts:
            starts[start, stop] = total
            total += stop - start
        moved.append((starts[start, stop], starts[start, stop] + stop - start))
    return take_spans(tensor, list(starts)), torch.tensor(moved, dtype=spans.dtype).reshape(-1, 2)
