"""Media out of chat messages, what they may be and where they may come from; which rows of a tensor are whose.

`load_image` and `load_audio` are the only doors through which bytes that others have made become pixels and samples.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def plain_messages(messages: Sequence[Any]) -> list[dict]:
    """Chat messages as dicts, whether they are dicts or verifiers' own objects, without fields that are None."""

    def plain(value: Any) -> Any:
        value = value.model_dump() if hasattr(value, "model_dump") else value
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items() if inner is not None}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return [plain(message) for message in messages]


def message_parts(messages: Sequence[Any]) -> list[tuple[str, list[dict]]]:
    """(role, content parts) of each chat message; a string is one part, a text."""
    result = []
    for message in plain_messages(messages):
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        result.append((message["role"], parts))
    return result


def media_parts(messages: Sequence[Any]) -> list[dict]:
    """The parts of these messages that are not text, in order."""
    return [part for _, parts in message_parts(messages) for part in parts if part["type"] != "text"]


def load_part(part: dict, sampling_rate: int | None) -> dict:
    """A content part of OpenAI's shape as Transformers' chat templates take it, the medium itself in it.

    Args:
        part: text, image_url, input_audio or video_url.
        sampling_rate: of the sound that the model takes, in Hz; None: it takes none.

    Raises:
        ValueError: another type, or a medium that cannot be read.
    """
    kind = part["type"]
    if kind == "text":
        return part
    if kind == "image_url":
        return {"type": "image", "image": load_image(part["image_url"]["url"])}
    if kind == "input_audio" and sampling_rate is not None:
        return {"type": "audio", "audio": load_audio(part["input_audio"], sampling_rate)}
    if kind == "video_url":
        return {"type": "video", "video": load_video(part["video_url"]["url"])}
    takes = "text, image_url, video_url" + (", input_audio" if sampling_rate is not None else "")
    raise ValueError(f"messages: content of type {kind!r} is not supported by this model's processor, only {takes}")


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


def load_video(url: str) -> np.ndarray:
    """The frames of a `data:video/jpeg;base64,FRAME,FRAME,...` URI, vLLM's form for them; (frames, H, W, 3) bytes.

    Raises:
        ValueError: any other URL (files of a video need a decoder), or a frame that is no image or of another size.
    """
    header, _, frames = url.partition(",")
    if header != "data:video/jpeg;base64":
        raise ValueError(f"video_url={url[:60]!r}: must be frames, as data:video/jpeg;base64,FRAME,FRAME,...")
    images = [load_image(f"data:image/jpeg;base64,{frame}") for frame in frames.split(",")]
    if len({image.size for image in images}) > 1:
        raise ValueError(f"video_url={url[:60]!r}: its frames are of sizes {sorted({image.size for image in images})}")
    return np.stack([np.asarray(image) for image in images])


def video_metadata(frames: np.ndarray) -> dict[str, Any]:
    """When the frames of a video stand, as processors ask for it: one a second, as vLLM takes it."""
    count = len(frames)
    return {"total_num_frames": count, "fps": 1.0, "duration": float(count), "frames_indices": list(range(count))}


def load_audio(source: dict, sampling_rate: int) -> np.ndarray:
    """The sound of an `input_audio` part, one channel, as float32 in [-1, 1).

    Args:
        source: `data` (base64) and `format`; WAV with 16 bits a sample is read.
        sampling_rate: in Hz. Another one is refused and not converted: trainer and server must hear the same.

    Raises:
        ValueError: another format or rate, or bytes that are no sound.
    """
    try:
        with wave.open(io.BytesIO(base64.b64decode(source["data"], validate=True))) as sound:
            rate, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            samples = sound.readframes(sound.getnframes())
        if len(samples) % (width * channels):
            raise wave.Error("it ends within a sample")
    except (binascii.Error, EOFError, RuntimeError, TypeError, wave.Error) as error:
        raise ValueError(f"input_audio: cannot be read as WAV ({error}); other formats are not read") from None
    if (rate, width) != (sampling_rate, 2) or not samples:
        raise ValueError(
            f"input_audio: {len(samples)} bytes of {8 * width} bits a sample at {rate} Hz; the model takes 16 bits at "
            f"{sampling_rate} Hz: convert it in the environment"
        )
    return np.frombuffer(samples, "<i2").reshape(-1, channels).mean(-1, dtype=np.float32) / 2**15


def pack_media(
    media_of_row: Sequence[dict[str, Tensor] | None], processor: Any = None, share: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows' media as tensors for the forward, and which rows of them belong to whom.

    Where other dimensions than the first differ from row to row (tiles, heights, seconds), they are padded with zeros,
    as the processors' own batching does: the models crop, mask or leave out what is padding.

    Args:
        media_of_row: each row's tensors by argument name; with `share`, rows with the same object own the same span.
        processor: made them; names the masks that its parts make.

    Returns:
        (media, spans): name -> tensor with all media along dim 0, and name -> (B, 2). Both empty without any medium.

    Raises:
        ValueError: padding that nothing would say is padding.
    """
    names = dict.fromkeys(name for media in media_of_row if media for name in media)
    packed, spans = {}, {}
    for name in names:
        stored: dict[int, tuple[int, int]] = {}
        pieces: list[Tensor] = []
        total, owned = 0, []
        for row, media in enumerate(media_of_row):
            key = id(media) if share else row
            if key not in stored:
                piece = media.get(name) if media else None
                pieces += [] if piece is None else [piece]
                stored[key] = (total, total + (0 if piece is None else len(piece)))
                total = stored[key][1]
            owned.append(stored[key])
        if processor is not None and len({piece.shape[1:] for piece in pieces}) > 1:
            expect_mask(name, media_of_row, processor)
        packed[name], spans[name] = torch.cat(padded_alike(pieces)), torch.tensor(owned)
    return packed, spans


def expect_mask(name: str, media_of_row: Sequence[dict[str, Tensor] | None], processor: Any) -> None:
    """Raises ValueError where a tensor of this name came without the mask that the processor's part for it makes: some
    leave it out of a prompt with one medium, which needs none by itself; the model would see what pads it here."""
    parts = [getattr(processor, part, None) for part in processor.get_attributes() if part != "tokenizer"]
    names = next((part.model_input_names for part in parts if part and name in part.model_input_names), ())
    masks = {other for other in names if other.endswith("mask") and other not in (name, "attention_mask")}
    for media in media_of_row:
        if media and name in media and masks - media.keys():
            raise ValueError(
                f"{name}: media of different sizes cannot be in one batch: {type(processor).__name__} leaves "
                f"{', '.join(sorted(masks - media.keys()))} out of a prompt with one medium, and what pads it would be "
                "seen. Let the environment give all media the same size, or every prompt several"
            )


def padded_alike(pieces: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, zeros behind them in every dimension but the first up to the longest."""
    longest = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces))]
    missing = [[n - size for n, size in zip(longest, piece.shape[1:])] for piece in pieces]
    # F.pad counts from the last dimension: (before, after) of each
    return [
        torch.nn.functional.pad(piece, [n for size in reversed(after) for n in (0, size)]) if any(after) else piece
        for piece, after in zip(pieces, missing)
    ]


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
