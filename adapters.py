"""Model families: rollouts in, `MultimodalBatch` out.

`rollout_rows` and `token_tensors` serve every adapter. `ImageAdapter` is what families with image placeholders share:
chat messages to prompt ids, one placeholder an image expanded to as many as the image has features, and the check that
the two agree. A family then says two things: the tensors of an image, and how many placeholder tokens they fill.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from media import image_urls, load_image, message_parts
from mm_grpo import MultimodalAdapter, MultimodalBatch

PROCESSED_BYTES = 2**28  # of processed images that are kept: the server asks for them, then the batch

# ---------------------------------------------------------------------------------------------------------------------
# Rollouts to rows, for every adapter


@dataclass
class Row:
    """One sequence to train on: the ids that the server saw and sampled, in order."""

    reward: float
    group: int  # the example's id
    rollout: int  # index into outputs["outputs"]
    ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)  # 1 on sampled tokens
    logprobs: list[float] = field(default_factory=list)  # the server's, 0 elsewhere
    messages: list[Any] = field(default_factory=list)  # the prompt of its last turn: it holds all images of these ids
    is_truncated: bool = False


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
        row: Row | None = None
        for turn, step in enumerate(rollout["trajectory"]):
            tokens = step["tokens"]
            if tokens is None:
                raise ValueError(
                    f"rollout {i}, turn {turn}: tokens: the server sent no token ids or logprobs. The request must ask "
                    "for return_token_ids and logprobs, and the server must know them (vLLM >= 0.10.2)"
                )
            prompt, sampled, logprobs = tokens["prompt_ids"], tokens["completion_ids"], tokens["completion_logprobs"]
            if len(sampled) != len(logprobs):
                raise ValueError(
                    f"rollout {i}, turn {turn}: completion_logprobs: expected {len(sampled)}, got {len(logprobs)}"
                )
            if row is None or prompt[: len(row.ids)] != row.ids:
                row = Row(reward=float(rollout["reward"]), group=rollout["example_id"], rollout=i)
                rows.append(row)
            row.is_truncated |= bool(step["is_truncated"])
            given = len(prompt) - len(row.ids)
            row.ids = [*prompt, *sampled]
            row.loss_mask += [0] * given + [1] * len(sampled)
            row.logprobs += [0.0] * given + list(logprobs)
            row.messages = step["prompt"]
    if dropped:
        warnings.warn(f"{len(dropped)} of {len(outputs['outputs'])} rollouts cannot be trained on. First: {dropped[0]}")
    if not rows:
        raise ValueError(
            f"no rollout can be trained on ({len(dropped)} came). First: {dropped[0] if dropped else 'none came'}"
        )
    return rows


def _why_unusable(rollout, placeholder_ids: Sequence[int]) -> str | None:
    error = rollout.get("error")
    if error:
        return f"error: {error.get('error_chain_repr', error) if isinstance(error, dict) else error}"
    if not rollout["trajectory"]:
        return "nothing was sampled (prompt longer than the server's limit, or the environment stopped before a turn)"
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


# ---------------------------------------------------------------------------------------------------------------------
# Families with image placeholders


@dataclass
class ProcessedImage:
    """One image as the model takes it."""

    tensors: dict[str, Tensor]  # by argument name of the forward, each with the image's rows along dim 0
    num_tokens: int  # placeholders that it fills

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class Prompt:
    """A chat prompt, encoded: placeholders expanded."""

    ids: list[int]
    images: list[ProcessedImage] = field(default_factory=list)


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
        self.kept: dict[bytes, ProcessedImage] = {}  # by their URL's hash, the oldest first
        self.kept_bytes = 0
        ids = (tokenizer.convert_tokens_to_ids(token) for token in self.placeholder_tokens)
        self.placeholder_ids = sorted(i for i in ids if i not in (None, tokenizer.unk_token_id))

    # -- what a family says

    def process_image(self, image: Image.Image) -> ProcessedImage:
        """The tensors of one RGB image, and how many placeholders they fill."""
        raise NotImplementedError

    def token_inputs(self, is_image: Tensor) -> dict[str, Tensor]:
        """Per-token tensors of the forward, from (B, L) bool that is True on the placeholders of images."""
        return {}

    # -- rollouts to batch

    def processed(self, url: str) -> ProcessedImage:
        """The image of this URL; kept for a while: the server asks for a step's images, and then the trainer."""
        key = hashlib.sha256(url.encode()).digest()
        if key not in self.kept:
            self.kept[key] = self.process_image(load_image(url))
            self.kept_bytes += self.kept[key].nbytes
            while self.kept_bytes > PROCESSED_BYTES and len(self.kept) > 1:
                self.kept_bytes -= self.kept.pop(next(iter(self.kept))).nbytes
        return self.kept[key]

    def build_batch(self, outputs) -> MultimodalBatch:
        rows = rollout_rows(outputs, self.placeholder_ids)
        seen: dict[str, ProcessedImage] = {}  # rows of a group show the same images: store each once
        images_of_row: list[list[ProcessedImage]] = []
        for row in rows:
            urls = image_urls(row.messages)
            seen |= {url: self.processed(url) for url in urls if url not in seen}
            images_of_row.append([seen[url] for url in urls])
            self._check_placeholders(row, images_of_row[-1])
        tensors = token_tensors(rows, self.tokenizer.pad_token_id or 0)
        media, spans = pack_images(images_of_row)
        is_image = (tensors["input_ids"] == self.image_token_id) & (tensors["attention_mask"] == 1)
        return MultimodalBatch(
            **tensors,
            pixel_values=media.pop("pixel_values", None),
            extra_model_kwargs={**media, **self.token_inputs(is_image)},
            media_spans=spans,
        )

    def _check_placeholders(self, row: Row, images: list[ProcessedImage]) -> None:
        """An image that does not reach the model is an error, never a quiet zero; a placeholder without image too."""
        held, expected = row.ids.count(self.image_token_id), [image.num_tokens for image in images]
        if held != sum(expected):
            raise ValueError(
                f"rollout {row.rollout}: the server's prompt holds {held} {self.image_token} tokens, its "
                f"{len(images)} images have {sum(expected)} features {expected}. Either the chat template lost an "
                "image, or server and trainer resize differently: give both the same image size limits (vLLM: "
                "--mm-processor-kwargs)"
            )

    # -- messages to prompts, for the server in this process

    def encode_prompt(self, messages: Sequence[Any]) -> Prompt:
        """Chat messages to prompt ids, with as many placeholders as each image has features.

        Raises:
            ValueError: an image that cannot be read, or a chat template that does not write one placeholder an image.
        """
        template_messages = []
        for role, parts in message_parts(messages):
            for part in parts:
                if part["type"] not in ("text", "image_url"):
                    raise ValueError(
                        f"messages: content of type {part['type']!r} is not supported, only text and image_url"
                    )
            content = [
                {"type": "image"} if part["type"] == "image_url" else {"type": "text", "text": part["text"]}
                for part in parts
            ]
            if all(part["type"] == "text" for part in content):  # some templates know plain strings only
                content = "".join(part["text"] for part in content)
            template_messages.append({"role": role, "content": content})
        text = self.tokenizer.apply_chat_template(template_messages, add_generation_prompt=True, tokenize=False)
        images = [self.processed(url) for url in image_urls(messages)]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_token_id) != len(images):
            raise ValueError(
                f"messages: {len(images)} images, but the chat template wrote {ids.count(self.image_token_id)} "
                f"{self.image_token} (an image in a role that the template drops, or the token in a message's text)"
            )
        remaining = iter(images)
        expanded: list[int] = []
        for i in ids:
            repeats = next(remaining).num_tokens if i == self.image_token_id else 1
            expanded += [i] * repeats
        return Prompt(expanded, images)

    def prompt_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Keyword arguments of the forward for these prompts, padded on the left: their last tokens share a column."""
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
    images_of_row: Sequence[Sequence[ProcessedImage]], share: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows' images as tensors for the forward, and which rows of them belong to whom.

    Args:
        images_of_row: with `share`, rows with the same images (the same objects) own the same span.

    Returns:
        (media, spans): name -> tensor with all images along dim 0, and name -> (B, 2). Both empty without any image.
    """
    names = list(dict.fromkeys(name for images in images_of_row for image in images for name in image.tensors))
    media, spans = {}, {}
    for name in names:
        stored: dict[Any, tuple[int, int]] = {}
        pieces: list[Tensor] = []
        total, owned = 0, []
        for row, images in enumerate(images_of_row):
            key = tuple(id(image) for image in images) if share else row
            if key not in stored:
                start = total
                for image in images:
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

    def process_image(self, image: Image.Image) -> ProcessedImage:
        tensors = self.image_processor(images=[image], return_tensors="pt")
        patches = int(tensors["image_grid_thw"].prod())
        named = {name: tensors[name] for name in ("pixel_values", "image_grid_thw")}
        return ProcessedImage(named, patches // self.image_processor.merge_size**2)

    def token_inputs(self, is_image: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": is_image.long()}  # without it some versions fall back to 1-D positions, silently


class LlavaAdapter(ImageAdapter):
    """LLaVA 1.5: square crops of one size, (1, C, H, W) an image."""

    image_token = "<image>"
    placeholder_tokens = ("<image>",)

    def process_image(self, image: Image.Image) -> ProcessedImage:
        pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        patch = self.model_config.vision_config.patch_size
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        keeps_class_token = self.model_config.vision_feature_select_strategy == "full"
        return ProcessedImage({"pixel_values": pixels}, patches + keeps_class_token)


ADAPTERS = {"qwen": QwenVLAdapter, "llava": LlavaAdapter}


def load_model(family: str, checkpoint: str | None, seed: int = 0) -> tuple[nn.Module, Any, MultimodalAdapter]:
    """(model, tokenizer, adapter) of a checkpoint, a name or a folder; None: of a tiny model with random weights."""
    if checkpoint is None:
        from tiny_vlm import make_tiny_vlm, use_one_thread

        use_one_thread()
        model, tokenizer, image_processor = make_tiny_vlm(family, seed=seed)
        return model, tokenizer, ADAPTERS[family](tokenizer, image_processor, model.config)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return model, tokenizer, ADAPTERS[family](tokenizer)
