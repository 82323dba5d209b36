"""Media out of chat messages, what they may be and where they may come from; which rows of a tensor are whose.

`load_image` and `load_audio` are the only doors through which bytes that others have made become pixels and samples.
Whatever they do not take is a ValueError that names the rule.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import re
import warnings
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from checks import expect

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow knows 40 more, and starts a program for EPS
MAX_ASPECT = 200  # as Qwen's processors have it; of 1 x 2,000 pixels LLaVA's makes 336 x 672,000
MAX_BYTES = 2**26  # of a file: 16 million pixels of 32 bits
FETCH_SECONDS = 10.0  # for a web address, from its name to the last byte
Tensors = dict[str, Tensor]  # by argument name of the forward
FRAME_PIXELS = 224 * 224  # what a video's frame counts at least, as processors enlarge small ones


@dataclass(frozen=True)
class MediaRules:
    """How large media may be, where they may come from beside the messages. Raises ValueError: no such folder."""

    max_image_pixels: int = 16_000_000  # of a picture, or of a video's frames together
    allowed_local_media_path: str | None = None  # the folder below which file:// addresses are read
    allowed_media_domains: tuple[str, ...] | str | None = ()  # exact hosts of web addresses; a text has commas

    def __post_init__(self) -> None:
        folder, domains = self.allowed_local_media_path, self.allowed_media_domains or ()
        exists = folder is None or (folder and Path(folder).is_dir())
        expect("allowed_local_media_path", exists, "a folder that exists", repr(folder))
        domains = domains.split(",") if isinstance(domains, str) else domains
        object.__setattr__(self, "allowed_media_domains", tuple(name.strip().lower() for name in domains))


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
    told = [(message["role"], message.get("content") or "") for message in plain_messages(messages)]
    return [(role, [{"type": "text", "text": said}] if isinstance(said, str) else said) for role, said in told]


def media_parts(messages: Sequence[Any]) -> list[dict]:
    """The parts of these messages that are not text, in order."""
    return [part for _, parts in message_parts(messages) for part in parts if part["type"] != "text"]


def load_part(part: dict, sampling_rate: int | None, rules: MediaRules = MediaRules()) -> dict:
    """A content part of OpenAI's shape as Transformers' chat templates take it, the medium itself in it.

    Args:
        part: text, image_url, input_audio or video_url.
        sampling_rate: of the sound that the model takes, in Hz; None: it takes none.

    Raises:
        ValueError: another type, or a medium that cannot be read or is refused.
    """
    kind = part["type"]
    if kind == "text":
        return part
    if kind == "image_url":
        return {"type": "image", "image": load_image(part["image_url"]["url"], rules)}
    if kind == "input_audio" and sampling_rate is not None:
        return {"type": "audio", "audio": load_audio(part["input_audio"], sampling_rate)}
    if kind == "video_url":
        return {"type": "video", "video": load_video(part["video_url"]["url"], rules)}
    takes = "text, image_url, video_url" + (", input_audio" if sampling_rate is not None else "")
    raise ValueError(f"messages: content of type {kind!r} is not supported by this model's processor, only {takes}")


def image_urls(messages: Sequence[Any]) -> list[str]:
    """The URLs of the messages' images, in order."""
    return [part["image_url"]["url"] for part in media_parts(messages) if part["type"] == "image_url"]


def load_image(url: str, rules: MediaRules = MediaRules(), frames: int = 1) -> Image.Image:
    """The image of a base64 `data:` URI, or at an address that the rules let in, as RGB.

    Turned as its EXIF data says and laid on white where it is transparent, as vLLM does it: trainer and server must see
    the same pixels. It may be one of so many frames, whose pixels count together.

    Raises:
        ValueError: the address is of another kind, or the rules do not let it in; it is no such file, or too large a
            one; a web address does not answer in time; a format that is not in FORMATS, or a damaged file; too many
            pixels, too long a side, several frames; more than 8 bits a channel.
        MemoryError: there is not enough to decode it.
    """
    try:
        return decoded(file_bytes(url, rules), rules.max_image_pixels, frames)
    except MemoryError:  # is about the machine
        raise
    except Exception as error:  # whatever a decoder or the network raises
        shown = re.sub("//[^/]*@", "//", url.partition(",")[0] if url.startswith("data:") else url)[:60]
        why = f"expected within {FETCH_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
        raise ValueError(f"image_url={shown!r}: cannot be read as an image ({why})") from None


def file_bytes(url: str, rules: MediaRules) -> bytes:
    """The file at this URL; raises whatever keeps it from being read."""
    header, _, data = url.partition(",")
    if header.startswith("data:image/") and header.endswith(";base64"):
        return from_base64(data)
    address, folder = httpx.URL(url), rules.allowed_local_media_path
    known = "data:image/...;base64,..., file:///... or https://..."
    expect("URL", address.scheme in ("file", "http", "https"), known, repr(address.scheme))
    if address.scheme != "file":
        with ThreadPoolExecutor(1) as thread:  # the caller's may be running an event loop
            return thread.submit(asyncio.run, fetch(address, rules.allowed_media_domains)).result()
    path = Path(address.path).resolve()
    below = folder is not None and not address.host and path.is_relative_to(Path(folder).resolve())
    expect("path", below, f"one below allowed_local_media_path={folder!r}", repr(address.host + address.path[:60]))
    size = path.stat().st_size if path.is_file() else None  # a pipe might never end
    expect("size", size is not None and size <= MAX_BYTES, f"a file of at most {MAX_BYTES} bytes", size)
    return path.read_bytes()


def from_base64(text: str) -> bytes:
    """The bytes of this text; raises ValueError, for line breaks too, which vLLM refuses."""
    fits = len(text) <= MAX_BYTES * 4 / 3 and not re.search(r"\s", text)
    expect("base64", fits, f"at most {MAX_BYTES} bytes, no spaces, no line breaks", f"{len(text)} letters")
    return base64.b64decode(text, validate=True)


async def fetch(address: httpx.URL, hosts: Sequence[str]) -> bytes:
    """The body at a web address; raises whatever keeps it from coming whole, in time and without a redirect."""
    host, headers = address.raw_host.decode(), {"Host": address.netloc.decode(), "Accept-Encoding": "identity"}
    listed = host in hosts and not address.userinfo
    expect("host", listed, f"one of allowed_media_domains={hosts}, and no password", repr(host))
    async with asyncio.timeout(FETCH_SECONDS), httpx.AsyncClient(trust_env=False, timeout=None) as client:
        found = [place[0] for *_, place in await asyncio.get_running_loop().getaddrinfo(host, None)]
        public = all(ip == host or ipaddress.ip_address(ip).is_global for ip in found)
        expect(host, public, "a public address (or list the private one itself in allowed_media_domains)", set(found))
        # The connection is to the address that was looked at: asked for the name again, it might be another one
        pinned, name = address.copy_with(host=found[0]), {"sni_hostname": host}
        async with client.stream("GET", pinned, headers=headers, extensions=name) as response:
            coding, body = response.headers.get("Content-Encoding", "identity"), bytearray()
            expect("status", response.status_code == 200, "200 (redirects are not followed)", response.status_code)
            expect("Content-Encoding", coding == "identity", "none, as a few bytes may unpack to any number", coding)
            async for chunk in response.aiter_raw():
                body += chunk
                expect("body", len(body) <= MAX_BYTES, f"at most {MAX_BYTES} bytes", "more")
            return bytes(body)


def decoded(file: bytes, limit: int, frames: int) -> Image.Image:
    """The image of this file as RGB; raises whatever Pillow raises, and ValueError above the limit of pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
        try:
            image = Image.open(io.BytesIO(file), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"expected {', '.join(FORMATS)}, undamaged") from None
    size, long, short = f"{image.width} x {image.height}", max(image.size), min(image.size)
    expect("pixels", frames * long * short <= limit, f"at most max_image_pixels={limit}", f"{frames} x {size}")
    expect("sides", long <= MAX_ASPECT * short, f"at most {MAX_ASPECT} times as long as the other", size)
    # Pillow would make white of all values above 255
    expect("mode", not image.mode.startswith(("I", "F")), "8 bit (convert it in the environment)", image.mode)
    animated = getattr(image, "is_animated", False) and image.format != "MPO"  # a camera's JPEG and its preview
    expect("frames", not animated, "one", "an animation")
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block turns nothing
        if isinstance(error, MemoryError):
            raise
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_video(url: str, rules: MediaRules = MediaRules()) -> np.ndarray:
    """The frames of a `data:video/jpeg;base64,FRAME,FRAME,...` URI, vLLM's form for them; (frames, H, W, 3) bytes.

    Raises:
        ValueError: any other URL (a file needs a decoder), a frame that is no image, other sizes, too many pixels.
    """
    header, _, frames = url.partition(",")
    if header != "data:video/jpeg;base64":
        raise ValueError(f"video_url={header[:60]!r}: must be frames, as data:video/jpeg;base64,FRAME,FRAME,...")
    count, limit = frames.count(",") + 1, rules.max_image_pixels
    expect("video_url", count * FRAME_PIXELS <= limit, f"at most max_image_pixels={limit}", f"{count} x 224 x 224")
    images = [load_image(f"data:image/jpeg;base64,{frame}", rules, count) for frame in frames.split(",")]
    if len(sizes := {image.size for image in images}) > 1:
        raise ValueError(f"video_url={header!r}: its frames are of sizes {sorted(sizes)}")
    return np.stack([np.asarray(image) for image in images])


def load_audio(source: dict, sampling_rate: int) -> np.ndarray:
    """The sound of an `input_audio` part, one channel, as float32 in [-1, 1).

    Args:
        source: `data` (base64) and `format`; WAV with 16 bits a sample is read.
        sampling_rate: in Hz. Another one is refused and not converted: trainer and server must hear the same.

    Raises:
        ValueError: another format or rate, too many bytes, or bytes that are no sound.
    """
    try:
        with wave.open(io.BytesIO(from_base64(source["data"]))) as sound:
            rate, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            samples = sound.readframes(sound.getnframes())
        if len(samples) % (width * channels):
            raise wave.Error("it ends within a sample")
    except (EOFError, RuntimeError, TypeError, ValueError, wave.Error) as error:
        raise ValueError(f"input_audio: cannot be read as WAV ({error}); other formats are not read") from None
    if (rate, width) != (sampling_rate, 2) or not samples:
        found = f"{len(samples)} bytes of {8 * width} bits a sample at {rate} Hz"
        takes = f"the model takes 16 bits at {sampling_rate} Hz"
        raise ValueError(f"input_audio: {found}; {takes}: convert it in the environment")
    return np.frombuffer(samples, "<i2").reshape(-1, channels).mean(-1, dtype=np.float32) / 2**15


def pack_media(media_of_row: Sequence[Tensors | None], processor=None, share: bool = True) -> tuple[Tensors, Tensors]:
    """The rows' media as tensors for the forward, and which rows of them belong to whom.

    Where other dimensions than the first differ from row to row (tiles, heights, seconds), they are padded with zeros,
    as the processors' own batching does: the models crop, mask or leave out what is padding.

    Args:
        media_of_row: each row's tensors; with `share`, rows with the same object own the same span.
        processor: made them; names the masks that its parts make.

    Returns:
        (media, spans): name -> tensor with all media along dim 0, and name -> (B, 2). Both empty without any medium.

    Raises:
        ValueError: padding that nothing would say is padding.
    """
    names = dict.fromkeys(name for media in media_of_row if media for name in media)
    keys = [id(media) if share else row for row, media in enumerate(media_of_row)]
    packed, spans = {}, {}
    for name in names:
        pieces, stored, total = [], {}, 0  # where each key's rows are
        for key, media in dict(zip(keys, media_of_row)).items():
            piece = [media[name]] if media and name in media else []
            pieces += piece
            stored[key] = (total, total := total + sum(map(len, piece)))
        if processor is not None and len({piece.shape[1:] for piece in pieces}) > 1:
            expect_mask(name, media_of_row, processor)
        packed[name], spans[name] = torch.cat(padded_alike(pieces)), torch.tensor([stored[key] for key in keys])
    return packed, spans


def expect_mask(name: str, media_of_row: Sequence[Tensors | None], processor) -> None:
    """Raises ValueError where a tensor of this name came without the mask that the processor's part for it makes: some
    leave it out of a prompt with one medium, which needs none by itself; the model would see what pads it here."""
    parts = [getattr(processor, part, None) for part in processor.get_attributes() if part != "tokenizer"]
    names = next((part.model_input_names for part in parts if part and name in part.model_input_names), ())
    masks = {other for other in names if other.endswith("mask") and other not in (name, "attention_mask")}
    lacking = [masks - media.keys() for media in media_of_row if media and name in media and masks - media.keys()]
    if lacking:
        unsaid = f"{type(processor).__name__} leaves {', '.join(sorted(lacking[0]))} out of a prompt with one medium"
        rule = "Let the environment give all media the same size, or every prompt several"
        raise ValueError(f"{name}: media of different sizes in one batch: {unsaid}, so padding would be seen. {rule}")


def padded_alike(pieces: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, zeros behind them in every dimension but the first up to the longest."""
    longest = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces))]
    missing = [[n - size for n, size in zip(longest, piece.shape[1:])] for piece in pieces]
    # F.pad counts from the last dimension: (before, after) of each
    amounts = [[n for size in reversed(after) for n in (0, size)] for after in missing]
    return [torch.nn.functional.pad(piece, each) if any(each) else piece for piece, each in zip(pieces, amounts)]


def take_spans(tensor: Tensor, spans: Sequence[Sequence[int]]) -> Tensor:
    """The rows [start, stop) of a tensor for each span, one after the other; differentiable."""
    if spans and all(before[1] == after[0] for before, after in pairwise(spans)):  # in a row: no copy
        return tensor[spans[0][0] : spans[-1][1]]
    return torch.cat([tensor[:0], *(tensor[start:stop] for start, stop in spans)])


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
