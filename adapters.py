"""Model families: rollouts in, `MultimodalBatch` out.

`rollout_rows` and `token_tensors` serve every adapter. `ProcessorAdapter` serves every family that Transformers has a
processor for: the processor reads the chat template, makes tensors of pictures, sound and video, and expands each
placeholder to as many tokens as the medium has features. So the family's name appears nowhere: what the processor gives
goes to the model's forward, and the server's placeholders must be as many as the processor's.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForMultimodalLM,
    LlavaProcessor,
    Qwen2VLProcessor,
)

from checkpoint import load_processor, without_video
from media import (
    load_part,
    media_parts,
    message_parts,
    pack_media,
    plain_messages,
    video_metadata,
)
from mm_grpo import MultimodalAdapter, MultimodalBatch

KEPT_BYTES = 2**28  # of encoded prompts with their media: the server asks for them, then the batch, then the next epoch
TEXT_FORMS = (str, lambda text: [{"type": "text", "text": text}])  # some templates know strings only, some parts

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
# Every family that Transformers has a processor for


@dataclass
class Media:
    """All media of a prompt, processed together."""

    tensors: dict[str, Tensor]  # by argument name of the forward
    placeholders: Counter[int]  # how many of each placeholder they fill


@dataclass(frozen=True)
class Prompt:
    """A chat prompt as the model takes it: placeholders expanded, media processed."""

    ids: list[int]
    media: Media | None = None  # prompts with the same media share the object

    @property
    def nbytes(self) -> int:
        tensors = self.media.tensors.values() if self.media else ()
        return 8 * len(self.ids) + sum(tensor.nbytes for tensor in tensors)


class ProcessorAdapter(MultimodalAdapter):
    """Any family, through its processor.

    Args:
        processor: a Transformers processor with a chat template (`load_processor`).
        model_config: of the same checkpoint; names further placeholders.
        processor_kwargs: for each call of the processor, such as `{"max_pixels": 401408}`. The server must be given the
            same (vLLM: --mm-processor-kwargs).

    Raises:
        ValueError: the processor has no chat template, or one that loses what a user says.
    """

    def __init__(self, processor, model_config=None, processor_kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__(processor.tokenizer)
        self.processor, self.processor_kwargs = processor, dict(processor_kwargs or {})
        ears = [getattr(processor, name, None) for name in ("feature_extractor", "audio_processor")]
        self.sampling_rate = next((one.sampling_rate for one in ears if one is not None), None)  # of sound, in Hz
        self.kept: dict[str, Prompt] = {}  # by their messages, the oldest first
        self.kept_bytes = 0
        self.media: WeakValueDictionary[str, Media] = WeakValueDictionary()  # of the prompts that are kept
        self.text_form = next((form for form in TEXT_FORMS if self._shows_text(form)), None)
        if self.text_form is None:
            raise ValueError(f"{type(processor).__name__}: it has no chat_template that shows a user's text; set one")
        probe = self._call_processor([{"role": "user", "content": self.text_form("?")}])
        self.token_types = [name for name in probe if name.endswith("token_type_ids")]  # say which tokens are media
        every = torch.arange(len(self.tokenizer))[None]
        marked = {i for types in self.token_inputs(every, every >= 0).values() for i in types.nonzero()[:, 1].tolist()}
        self.placeholder_ids = sorted({*placeholder_ids(processor, model_config), *marked})

    def _shows_text(self, form: Callable[[str], Any]) -> bool:
        """Whether the chat template shows a text of this form as it was written."""
        try:
            message = {"role": "user", "content": form("?")}
            shown = self.processor.apply_chat_template([message], add_generation_prompt=True)
        except Exception:  # whatever a template raises for what it does not take
            return False
        return "?" in shown and "'text'" not in shown

    # -- messages to prompts: for the server in this process, and for the media of a row

    def encode_prompt(self, messages: Sequence[Any], tools: list[dict] | None = None) -> Prompt:
        """Chat messages to prompt ids and media tensors; kept for a while, as a group's requests ask for the same.

        Args:
            messages: of OpenAI's shape, dicts or verifiers' own objects. Text that spells a control token stays text.
            tools: the functions that the template may offer, of OpenAI's shape.

        Raises:
            ValueError: a medium that cannot be read, or that the chat template or the processor does not take.
        """
        messages = plain_messages(messages)
        key = json_key([messages, tools])
        if key not in self.kept:
            prompt = self.kept[key] = self._encode(messages, tools)
            self.kept_bytes += prompt.nbytes
            while self.kept_bytes > KEPT_BYTES and len(self.kept) > 1:
                self.kept_bytes -= self.kept.pop(next(iter(self.kept))).nbytes
        return self.kept[key]

    def _encode(self, messages: list[dict], tools: list[dict] | None) -> Prompt:
        inputs = self._call_processor(self._conversation(messages), tools)
        ids = inputs.pop("input_ids")[0].tolist()
        tensors = {name: inputs[name] for name in inputs if name not in ("attention_mask", *self.token_types)}
        parts, found = media_parts(messages), self.placeholders(ids)
        if bool(parts) != bool(tensors) or bool(parts) < bool(found):
            kinds = ", ".join(part["type"] for part in parts) or "no media"
            raise ValueError(
                f"messages: {kinds}, but {self._named(found)} in the prompt and tensors {list(tensors)}: the chat "
                f"template or {type(self.processor).__name__} does not take such media there"
            )
        return Prompt(ids, self.media.setdefault(json_key(parts), Media(tensors, found)) if parts else None)

    def _conversation(self, messages: list[dict]) -> list[dict]:
        """The messages as Transformers' templates take them, media loaded."""
        conversation = []
        for message, (_, parts) in zip(messages, message_parts(messages)):
            if all(part["type"] == "text" for part in parts):
                content = self.text_form("".join(part["text"] for part in parts))
            else:
                content = [load_part(part, self.sampling_rate) for part in parts]
            calls = {"tool_calls": [with_parsed_arguments(call) for call in message.get("tool_calls") or ()]}
            conversation.append({**message, "content": content, **(calls if calls["tool_calls"] else {})})
        return conversation

    def _call_processor(self, conversation: list[dict], tools: list[dict] | None = None) -> dict[str, Tensor]:
        said = json.dumps([conversation, tools], ensure_ascii=False, default=lambda medium: None)
        control = (json.dumps(token, ensure_ascii=False)[1:-1] for token in self.tokenizer.added_tokens_encoder)
        parts = [part for message in conversation for part in message["content"] if isinstance(part, dict)]
        metadata = [video_metadata(part["video"]) for part in parts if part["type"] == "video"]
        frames = {"do_sample_frames": False, "video_metadata": [metadata]} if metadata else {}
        inputs = self.processor.apply_chat_template(
            conversation,
            tools=tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=any(token in said for token in control),  # some processors cannot always
            # the template writes what begins a prompt, and the frames of a video are those that were chosen
            processor_kwargs={"add_special_tokens": False, **frames, **self.processor_kwargs},
        )
        return dict(inputs.to(torch.float32))  # what is not floating point stays (some give bfloat16)

    # -- rollouts to batch

    def build_batch(self, outputs) -> MultimodalBatch:
        rows = rollout_rows(outputs, self.placeholder_ids)
        media_of_row = [self._media(row) for row in rows]
        tensors = token_tensors(rows, self.tokenizer.pad_token_id or 0)
        media, spans = pack_media([media and media.tensors for media in media_of_row], self.processor)
        return MultimodalBatch(
            **tensors,
            pixel_values=media.pop("pixel_values", None),
            extra_model_kwargs={**media, **self.token_inputs(tensors["input_ids"], tensors["attention_mask"])},
            media_spans=spans,
        )

    def _media(self, row: Row) -> Media | None:
        """All media of a row, in one call: some processors tile a picture otherwise where a prompt has several.

        A medium that does not reach the model is an error, never a quiet zero; a placeholder without one too.
        """
        parts = media_parts(row.messages)
        media = self.media.get(json_key(parts)) if parts else None  # the server in this process has asked for them
        if parts and media is None:
            media = self.encode_prompt([{"role": "user", "content": parts}]).media
        held, expected = self.placeholders(row.ids), media.placeholders if media else Counter()
        if held != expected:
            raise ValueError(
                f"rollout {row.rollout}: the server's prompt holds {self._named(held)}, its {len(parts)} media have "
                f"{self._named(expected)} features. Either the chat template lost a medium, or server and trainer "
                f"resize differently: give both the same processor_kwargs, here {self.processor_kwargs} (vLLM: "
                "--mm-processor-kwargs)"
            )
        return media

    def placeholders(self, ids: Sequence[int]) -> Counter[int]:
        """How many of each placeholder these ids hold."""
        never_sampled = set(self.placeholder_ids)
        return Counter(i for i in ids if i in never_sampled)

    def _named(self, counts: Counter[int]) -> str:
        return " + ".join(f"{n} {self.tokenizer.convert_ids_to_tokens(i)}" for i, n in sorted(counts.items())) or "0"

    def token_inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Which tokens are media, under the names that the forward has for it: (B, L), as the ids are."""
        each = {name: getattr(self.processor, f"create_{name}", None) for name in self.token_types}
        default = self.processor.create_mm_token_type_ids
        return {name: torch.tensor((own or default)(ids.tolist())) * mask for name, own in each.items()}

    def prompt_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Keyword arguments of the forward for these prompts, padded on the left: their last tokens share a column."""
        P = max(len(prompt.ids) for prompt in prompts)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (P - len(prompt.ids)) + prompt.ids for prompt in prompts])  # (K, P)
        mask = torch.tensor([[0] * (P - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
        media, _ = pack_media([prompt.media and prompt.media.tensors for prompt in prompts], self.processor, False)
        return {"input_ids": ids, "attention_mask": mask, **media, **self.token_inputs(ids, mask)}

    def save_pretrained(self, folder) -> None:
        self.processor.save_pretrained(folder)
        if not hasattr(self.processor, "video_processor") and hasattr(self.processor, "image_processor"):
            self.processor.image_processor.save_pretrained(folder)  # where others look for a video part without its own


def placeholder_ids(processor, model_config=None) -> list[int]:
    """The tokens that stand for media, as the processor and the config name them."""
    named = [*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids]
    for kind in ("image", "video", "audio"):
        named += [getattr(model_config, f"{kind}_token_{spelling}", None) for spelling in ("id", "index")]
    named += [i for name, ids in vars(model_config or object).items() if name.endswith("_token_ids") for i in ids or ()]
    return sorted({i for i in named if i is not None and i >= 0})


def json_key(value: Any) -> str:
    """A short key of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_parsed_arguments(call: dict) -> dict:
    """A tool call as chat templates take it: its arguments a dict, where OpenAI's shape has a string of JSON."""
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": parsed}}


# ---------------------------------------------------------------------------------------------------------------------
# Families by name, and what is loaded for them


class QwenVLAdapter(ProcessorAdapter):
    """Qwen2-VL and Qwen2.5-VL, pictures only, from the processor's parts.

    Args:
        tokenizer: with the family's chat template.
        image_processor, model_config: of the same checkpoint; None: loaded from where the tokenizer came from.
    """

    def __init__(self, tokenizer, image_processor=None, model_config=None, **options) -> None:
        image_processor, config = of_checkpoint(tokenizer.name_or_path, image_processor, model_config)
        processor = without_video(Qwen2VLProcessor)(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        super().__init__(processor, config, **options)


class LlavaAdapter(ProcessorAdapter):
    """LLaVA 1.5, from the processor's parts; arguments as above."""

    def __init__(self, tokenizer, image_processor=None, model_config=None, **options) -> None:
        image_processor, config = of_checkpoint(tokenizer.name_or_path, image_processor, model_config)
        processor = LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,  # CLIP's class token, which the default strategy leaves out
            chat_template=tokenizer.chat_template,
        )
        super().__init__(processor, config, **options)


def of_checkpoint(name: str, image_processor, model_config):
    """(image processor, config): these, or loaded from the checkpoint of this name."""
    image_processor = image_processor or AutoImageProcessor.from_pretrained(name)
    return image_processor, model_config or AutoConfig.from_pretrained(name)


ADAPTERS = {"auto": ProcessorAdapter, "qwen": QwenVLAdapter, "llava": LlavaAdapter}


def load_model(
    family: str, checkpoint: str | None, seed: int = 0, processor_kwargs: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Any, MultimodalAdapter]:
    """(model, tokenizer, adapter) of a checkpoint, a name or a folder; None: of a tiny model with random weights."""
    if checkpoint is None:
        from tiny_vlm import make_tiny, use_one_thread

        use_one_thread()
        model, processor = make_tiny("qwen" if family == "auto" else family, seed=seed)
    else:
        model = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=torch.float32)
        processor = load_processor(checkpoint)
    parts = (processor,) if family == "auto" else (processor.tokenizer, processor.image_processor)
    adapter = ADAPTERS[family](*parts, model.config, processor_kwargs=processor_kwargs)
    return model, adapter.tokenizer, adapter
