"""Model families: rollouts in, `MultimodalBatch` out.

`rollout_rows` and `token_tensors` serve every adapter. `ImageAdapter` is what families with image placeholders share:
chat messages to prompt ids, one placeholder an image expanded to as many as the image has features, and the check that
the two agree. A family then says two things: the tensors of an image, and how many placeholder tokens they fill.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from mm_grpo import MultimodalAdapter, MultimodalBatch


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts to rows, for every adapter


@dataclass
class Row:
    """One sequence to train on: the ids that the server saw and sampled, in order."""

    ids: list[int]
    loss_mask: list[int]  # 1 on sampled tokens
    logprobs: list[float]  # the server's, 0 elsewhere
    messages: list[Any]  # the prompt of its last turn: every image that the ids speak of
    reward: float
    group: int  # the example's id
    rollout: int  # index into outputs["outputs"]
    is_truncated: bool


def rollout_rows(outputs, placeholder_ids: Sequence[int] = ()) -> list[Row]:
    """The rows of these rollouts, on the server's own ids.

    A later turn continues a row where its prompt starts with the row's ids so far; where it does not (the chat template
    wrote history anew), it starts a new row of the same rollout. Rollouts that failed, whose reward is not finite or
    that sampled a placeholder are left out with a warning.

    Raises:
        ValueError: a turn without token ids or logprobs (names the server's option), or no rollout is left at all.
    """
    rows: list[Row] = []
    dropped: list[str] = []
    for i, rollout in enumerate(outputs["outputs"]):
        reason = _why_unusable(rollout, placeholder_ids)
        if reason:
            dropped.append(f"rollout {i} (example {rollout['example_id']}): {reason}")
            continue
        first = len(rows)
        for turn, step in enumerate(rollout["trajectory"]):
            tokens = step["tokens"]
            if tokens is None:
                raise ValueError(
                    f"rollout {i}, turn {turn}: tokens: the server sent no token ids or logprobs. The request must ask for "
                    "return_token_ids and logprobs, and the server must know them (vLLM >= 0.10.2)"
                )
            prompt, sampled, logprobs = tokens["prompt_ids"], tokens["completion_ids"], tokens["completion_logprobs"]
            if len(sampled) != len(logprobs):
                raise ValueError(f"rollout {i}, turn {turn}: completion_logprobs: expected {len(sampled)}, got {len(logprobs)}")
            if len(rows) > first and prompt[: len(rows[-1].ids)] == rows[-1].ids:
                row = rows[-1]
                row.is_truncated |= bool(step["is_truncated"])
            else:
                row = Row([], [], [], [], float(rollout["reward"]), rollout["example_id"], i, bool(step["is_truncated"]))
                rows.append(row)
            given = len(prompt) - len(row.ids)
            row.ids = [*prompt, *sampled]
            row.loss_mask += [0] * given + [1] * len(sampled)
            row.logprobs += [0.0] * given + list(logprobs)
            row.messages = step["prompt"]
    if dropped:
        warnings.warn(f"{len(dropped)} of {len(outputs['outputs'])} rollouts cannot be trained on. First: {dropped[0]}")
    if not rows:
        raise ValueError(f"no rollout can be trained on ({len(dropped)} came). First: {dropped[0] if dropped else 'none came'}")
    return rows


def _why_unusable(rollout, placeholder_ids: Sequence[int]) -> str | None:
    error = rollout.get("error")
    if error:
        return f"error: {error.get('error_chain_repr', error) if isinstance(error, dict) else error}"
    if not rollout["trajectory"]:
        return "nothing was sampled (prompt longer than the server's limit, or the environment stopped before the first turn)"
    if rollout["reward"] is None or not math.isfinite(rollout["reward"]):
        return f"reward={rollout['reward']}: must be finite; look at the environment's rubric"
    sampled = {i for step in rollout["trajectory"] if step["tokens"] for i in step["tokens"]["completion_ids"]}
    if sampled & set(placeholder_ids):
        return (
            f"the policy sampled the media placeholder {sorted(sampled & set(placeholder_ids))}, which has no image; "
            "the server should apply the request's logit_bias"
        )
    if not sampled and all(step["tokens"] for step in rollout["trajectory"]):
        return "nothing was sampled"
    return None


def token_tensors(rows: Sequence[Row], pad_id: int = 0) -> dict[str, Tensor]:
    """The tensors of a `MultimodalBatch` that are about tokens, padded on the right. Masks come from lengths: the
    padding token may be the stop token, and the stop token is trained on."""
    L = max(len(row.ids) for row in rows)

    def padded(values: list[list], fill, dtype) -> Tensor:
        return torch.tensor([v + [fill] * (L - len(v)) for v in values], dtype=dtype)  # (B, L)

    return dict(
        input_ids=padded([row.ids for row in rows], pad_id, torch.long),
        attention_mask=padded([[1] * len(row.ids) for row in rows], 0, torch.long),
        loss_mask=padded([row.loss_mask for row in rows], 0, torch.long),
        behavior_logprobs=padded([row.logprobs for row in rows], 0.0, torch.float32),
        rewards=torch.tensor([row.reward for row in rows], dtype=torch.float32),
        group_ids=torch.tensor([row.group for row in rows], dtype=torch.long),
        rollout_ids=torch.tensor([row.rollout for row in rows], dtype=torch.long),
        is_truncated=torch.tensor([row.is_truncated for row in rows]),
    )


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
    return [part["image_url"]["url"] for _, parts in message_parts(messages) for part in parts if part["type"] == "image_url"]


def load_image(url: str) -> Image.Image:
    """The image of a base64 `data:` URI, as RGB.

    Turned as its EXIF data says and laid on white where it is transparent, as vLLM does it: trainer and server must see
    the same pixels.

    Raises:
        ValueError: any other URL, or bytes that are no image.
    """
    header, comma, data = url.partition(",")
    if not (comma and header.startswith("data:image/") and header.endswith(";base64")):
        raise ValueError(f"image_url={url[:60]!r}: must be a data:image/...;base64 URI (files and web addresses are not read)")
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


# ---------------------------------------------------------------------------------------------------------------------
# Families with image placeholders


@dataclass
class ImageInput:
    """One image as the model takes it."""

    tensors: dict[str, Tensor]  # by argument name of the forward, each with the image's rows along dim 0
    num_tokens: int  # placeholders that it fills


@dataclass
class Prompt:
    """A chat prompt, encoded: placeholders expanded."""

    ids: list[int]
    images: list[ImageInput] = field(default_factory=list)


class ImageAdapter(MultimodalAdapter):
    """What families share whose prompts hold one placeholder token for each feature of an image.

    Args:
        tokenizer: with the family's chat template.
        image_processor, model_config: of the same checkpoint; None: loaded from where the tokenizer came from.
    """

    image_token: str  # the placeholder, as the chat template writes it
    placeholder_tokens: tuple[str, ...]  # every token that stands for media

    def __init__(self, tokenizer, image_processor=None, model_config=None) -> None:
        super().__init__(tokenizer)
        self.image_processor = image_processor or AutoImageProcessor.from_pretrained(tokenizer.name_or_path)
        self.model_config = model_config or AutoConfig.from_pretrained(tokenizer.name_or_path)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"tokenizer: has no {self.image_token!r}; is this the right adapter for the checkpoint?")
        # server and trainer ask for a step's images one after the other: the second time they are there
        self.load_input = functools.lru_cache(maxsize=64)(lambda url: self.image_input(load_image(url)))
        ids = (tokenizer.convert_tokens_to_ids(token) for token in self.placeholder_tokens)
        self.placeholder_ids = sorted(i for i in ids if i not in (None, tokenizer.unk_token_id))

    # -- what a family says

    def image_input(self, image: Image.Image) -> ImageInput:
        """The tensors of one RGB image, and how many placeholders they fill."""
        raise NotImplementedError

    def token_inputs(self, is_image: Tensor) -> dict[str, Tensor]:
        """Per-token tensors of the forward, from (B, L) bool that is True on the placeholders of images."""
        return {}

    # -- rollouts to batch

    def build_batch(self, outputs) -> MultimodalBatch:
        rows = rollout_rows(outputs, self.placeholder_ids)
        seen: dict[str, ImageInput] = {}  # rows of a group show the same images: store each once
        images: list[list[ImageInput]] = []
        for row in rows:
            urls = image_urls(row.messages)
            seen |= {url: self.load_input(url) for url in urls if url not in seen}
            images.append([seen[url] for url in urls])
            self._check_placeholders(row, images[-1])
        tensors = token_tensors(rows, self.tokenizer.pad_token_id or 0)
        media, spans = pack_images(images)
        is_image = (tensors["input_ids"] == self.image_token_id) & (tensors["attention_mask"] == 1)
        return MultimodalBatch(
            **tensors,
            pixel_values=media.pop("pixel_values", None),
            extra_model_kwargs={**media, **self.token_inputs(is_image)},
            media_spans=spans,
        )

    def _check_placeholders(self, row: Row, images: list[ImageInput]) -> None:
        """An image that does not reach the model is an error, never a quiet zero; a placeholder without image too."""
        held, expected = row.ids.count(self.image_token_id), [image.num_tokens for image in images]
        if held != sum(expected):
            raise ValueError(
                f"rollout {row.rollout}: the server's prompt holds {held} {self.image_token} tokens, its {len(images)} images "
                f"have {sum(expected)} features {expected}. Either the chat template lost an image, or server and trainer "
                "resize differently: give both the same image size limits (vLLM: --mm-processor-kwargs)"
            )

    # -- messages to prompts, for the server in this process

    def encode_prompt(self, messages: Sequence[Any]) -> Prompt:
        """Chat messages to prompt ids, with as many placeholders as each image has features.

        Raises:
            ValueError: an image that cannot be read, or a chat template that does not write one placeholder an image.
        """
        plain = []
        for role, parts in message_parts(messages):
            for part in parts:
                if part["type"] not in ("text", "image_url"):
                    raise ValueError(f"messages: content of type {part['type']!r} is not supported, only text and image_url")
            images = [{"type": "image"} if part["type"] == "image_url" else {"type": "text", "text": part["text"]} for part in parts]
            # templates that know no lists get plain strings where there is nothing but text
            only_text = all(part["type"] == "text" for part in images)
            plain.append({"role": role, "content": "".join(part["text"] for part in images) if only_text else images})
        text = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        images = [self.load_input(url) for url in image_urls(messages)]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_token_id) != len(images):
            raise ValueError(
                f"messages: {len(images)} images, but the chat template wrote {ids.count(self.image_token_id)} {self.image_token} "
                "(an image in a role that the template drops, or the token in a message's text)"
            )
        remaining = iter(images)
        expanded: list[int] = []
        for i in ids:
            expanded += [i] * next(remaining).num_tokens if i == self.image_token_id else [i]
        return Prompt(expanded, images)

    def prompt_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Keyword arguments of the forward for these prompts, padded on the left: their last tokens stand in line."""
        P = max(len(prompt.ids) for prompt in prompts)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (P - len(prompt.ids)) + prompt.ids for prompt in prompts])  # (K, P)
        mask = torch.tensor([[0] * (P - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
        media, _ = pack_images([prompt.images for prompt in prompts], share=False)
        is_image = (ids == self.image_token_id) & (mask == 1)
        return {"input_ids": ids, "attention_mask": mask, **media, **self.token_inputs(is_image)}

    def save_pretrained(self, folder) -> None:
        super().save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def pack_images(
    images: Sequence[Sequence[ImageInput]], share: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows' images as tensors for the forward, and which rows of them belong to whom.

    Args:
        images: for each row its images. With `share`, rows with the same images (the same objects) own the same span.

    Returns:
        (media, spans): name -> tensor with all images along dim 0, and name -> (B, 2). Both empty without any image.
    """
    names = list(dict.fromkeys(name for row in images for image in row for name in image.tensors))
    media, spans = {}, {}
    for name in names:
        stored: dict[Any, tuple[int, int]] = {}
        pieces: list[Tensor] = []
        total, owned = 0, []
        for i, row in enumerate(images):
            key = tuple(id(image) for image in row) if share else i
            if key not in stored:
                start = total
                for image in row:
                    pieces.append(image.tensors[name])
                    total += len(image.tensors[name])
                stored[key] = (start, total)
            owned.append(stored[key])
        media[name], spans[name] = torch.cat(pieces), torch.tensor(owned)
    return media, spans


class QwenVLAdapter(ImageAdapter):
    """Qwen2-VL and Qwen2.5-VL: flat patches of any image size, `image_grid_thw`, and token types for M-RoPE."""

    image_token = "<|image_pad|>"
    placeholder_tokens = ("<|image_pad|>", "<|video_pad|>")

    def image_input(self, image: Image.Image) -> ImageInput:
        tensors = self.image_processor(images=[image], return_tensors="pt")
        patches = int(tensors["image_grid_thw"].prod())
        named = {name: tensors[name] for name in ("pixel_values", "image_grid_thw")}
        return ImageInput(named, patches // self.image_processor.merge_size**2)

    def token_inputs(self, is_image: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": is_image.long()}  # without it some versions fall back to 1-D positions, silently


class LlavaAdapter(ImageAdapter):
    """LLaVA 1.5: square crops of one size, (1, C, H, W) an image."""

    image_token = "<image>"
    placeholder_tokens = ("<image>",)

    def image_input(self, image: Image.Image) -> ImageInput:
        pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        patch = self.model_config.vision_config.patch_size
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        keeps_class_token = self.model_config.vision_feature_select_strategy == "full"
        return ImageInput({"pixel_values": pixels}, patches + keeps_class_token)

    def server_parameter_name(self, name: str) -> str:
        # Transformers 5 has dropped a level of CLIP's module names that vLLM 0.32 still has
        return re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", super().server_parameter_name(name))


ADAPTERS = {"qwen": QwenVLAdapter, "llava": LlavaAdapter}
