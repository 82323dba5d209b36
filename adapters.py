"""Model families: rollouts in, `MultimodalBatch` out.

`ProcessorAdapter` serves every family that Transformers has a processor for: it reads the chat template, makes tensors
of pictures, sound and video, and expands each placeholder to as many tokens as the medium has features. So the family's
name appears nowhere: what the processor gives goes to the model's forward, and the server's placeholders must be as
many as the processor's.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForMultimodalLM, LlavaProcessor, Qwen2VLProcessor

from checkpoint import load_processor, without_video
from lora import base_of
from media import MediaRules, load_part, media_parts, message_parts, pack_media, plain_messages
from mm_grpo import MultimodalAdapter, MultimodalBatch, MultimodalRLConfig
from rows import Row, Unusable, rollout_rows, token_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from verifiers.types import GenerateOutputs

KEPT_BYTES = 2**28  # of encoded prompts with their media: the server asks for them, then the batch, then the next epoch
TEXT_FORMS = (str, lambda text: [{"type": "text", "text": text}])  # some templates know strings only, some parts


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
        return 1000 + 40 * len(self.ids) + sum(tensor.nbytes for tensor in tensors)


class ProcessorAdapter(MultimodalAdapter):
    """Any family, through its processor.

    Args:
        processor: a Transformers processor with a chat template (`load_processor`).
        model_config: of the same checkpoint; names further placeholders, and how many ids its output head has.
        processor_kwargs: for each call of the processor, such as `{"max_pixels": 401408}`. The server must be given the
            same (vLLM: --mm-processor-kwargs).
        media_rules: `MediaRules`: how large media may be, and where from; None: no files, no web addresses.
        on_control_tokens: "warn" or "error", where a server made control tokens of a text that spells them.

    Raises:
        ValueError: the processor has no chat template, or one that loses what a user says.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        model_config: PreTrainedConfig | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        media_rules: MediaRules | None = None,
        on_control_tokens: str = "warn",
    ):
        super().__init__(processor.tokenizer)
        self.processor, self.processor_kwargs = processor, dict(processor_kwargs or {})
        self.text_config = model_config and model_config.get_text_config()
        self.media_rules, self.on_control_tokens, self.warned = media_rules or MediaRules(), on_control_tokens, False
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
        head = range(self.text_config.vocab_size if self.text_config else 0)
        unnamed = set(head) - set(self.tokenizer.get_vocab().values())  # it may be padded: these ids have no token
        self.placeholder_ids = sorted({*placeholder_ids(processor, model_config), *marked, *unnamed})

    def _shows_text(self, form: Callable[[str], Any]) -> bool:
        """Whether the chat template shows a text of this form as it was written."""
        message = {"role": "user", "content": form("?")}
        try:
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
            made = f"{self._named(found)} in the prompt and tensors {list(tensors)}"
            refused = f"the chat template or {type(self.processor).__name__} does not take such media there"
            raise ValueError(f"messages: {kinds}, but {made}: {refused}")
        media = self.media.setdefault(json_key(parts), Media(tensors, found)) if parts else None
        if media is not None and media.placeholders != found:
            raise ValueError("messages: at one of the media's addresses stands now what is of another size")
        return Prompt(ids, media)

    def _conversation(self, messages: list[dict]) -> list[dict]:
        """The messages as Transformers' templates take them, media loaded."""
        conversation = []
        for message, (_, parts) in zip(messages, message_parts(messages)):
            if all(part["type"] == "text" for part in parts):
                content = self.text_form("".join(part["text"] for part in parts))
            else:
                content = [load_part(part, self.sampling_rate, self.media_rules) for part in parts]
            conversation.append({**message, "content": content})
            if message.get("tool_calls"):
                conversation[-1]["tool_calls"] = [with_parsed_arguments(call) for call in message["tool_calls"]]
        return conversation

    def _call_processor(self, conversation: list[dict], tools: list[dict] | None = None) -> dict[str, Tensor]:
        said = json.dumps([conversation, tools], ensure_ascii=False, default=lambda medium: None)
        control = (json.dumps(token, ensure_ascii=False)[1:-1] for token in self.tokenizer.added_tokens_encoder)
        parts = [part for message in conversation for part in message["content"] if isinstance(part, dict)]
        counts = [len(part["video"]) for part in parts if part["type"] == "video"]  # frames, one a second as in vLLM
        metadata = [dict(total_num_frames=n, fps=1.0, duration=float(n), frames_indices=list(range(n))) for n in counts]
        frames = {"do_sample_frames": False, "video_metadata": [metadata]} if metadata else {}
        options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        options["sanitize_control_tokens"] = any(token in said for token in control)  # some processors cannot always
        # the template writes what begins a prompt, and the frames of a video are those that were chosen
        options["processor_kwargs"] = {"add_special_tokens": False, **frames, **self.processor_kwargs}
        inputs = self.processor.apply_chat_template(conversation, tools=tools, **options)
        return dict(inputs.to(torch.float32))  # what is not floating point stays (some give bfloat16)

    # -- rollouts to batch

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        rows = rollout_rows(outputs, self.placeholder_ids, getattr(self.text_config, "vocab_size", None), self._media)
        tensors = token_tensors(rows, self.tokenizer.pad_token_id or 0)
        media, spans = pack_media([row.media and row.media.tensors for row in rows], self.processor)
        pixels = media.pop("pixel_values", None)
        media |= self.token_inputs(tensors["input_ids"], tensors["attention_mask"])
        return MultimodalBatch(**tensors, pixel_values=pixels, extra_model_kwargs=media, media_spans=spans)

    def _media(self, row: Row, rollout: dict) -> Media | None:
        """All media of a row, in one call: some processors tile a picture otherwise where a prompt has several. What
        does not reach the model makes the row Unusable, never a quiet zero; a placeholder without a medium too."""
        self._check_control_tokens(row, rollout)
        try:
            parts = media_parts(row.messages)
            media = self.media.get(json_key(parts)) if parts else None  # the server in this process has asked for them
            if parts and media is None:
                media = self.encode_prompt([{"role": "user", "content": parts}]).media
        except Exception as error:  # whatever a processor raises for what it does not take
            raise Unusable("media", f"{type(error).__name__}: {error}") from error
        held, expected = self.placeholders(row.ids), media.placeholders if media else Counter()
        if held != expected:
            counts = f"prompt holds {self._named(held)}, its {len(parts)} media have {self._named(expected)} features"
            why = "Either the chat template lost a medium, or server and trainer resize differently"
            fix = f"give both the same processor_kwargs, here {self.processor_kwargs} (vLLM: --mm-processor-kwargs)"
            raise Unusable("media", f"the server's {counts}. {why}: {fix}")
        return media

    def _check_control_tokens(self, row: Row, rollout: dict) -> None:
        """What spells a control token is text in this process; a vLLM server makes the token of it. Seen by counting:
        its prompt holds more of that token than the chat template writes with a blank in place of what spells it."""
        control = "|".join(re.escape(t.content) for t in self.tokenizer.added_tokens_decoder.values() if t.special)
        try:
            said = json.dumps(plain_messages(row.messages), ensure_ascii=False)
            spelled = self.tokenizer.convert_tokens_to_ids(sorted(set(re.findall(control, said))))
            tools = [{"type": "function", "function": tool} for tool in plain_messages(rollout.get("tool_defs") or ())]
            own = self.encode_prompt(json.loads(re.sub(control, " ", said)), tools or None).ids if spelled else []
        except Exception:  # what cannot be written here cannot be compared
            return
        forged = Counter({i: n for i in spelled if (n := row.ids[: row.prompt_length].count(i) - own.count(i)) > 0})
        made = f"the server made control tokens of text that spells them, {self._named(forged)}"
        rule = "turns and media can be forged. Take them out of the environment's texts"
        said = f"example {rollout.get('example_id')}: {made}: {rule}"
        if forged and self.on_control_tokens == "error":
            raise ValueError(said)
        if forged and not self.warned:
            self.warned = True
            warnings.warn(said)

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
        P, pad = max(len(prompt.ids) for prompt in prompts), self.tokenizer.pad_token_id or 0
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
    function = call.get("function", call)  # verifiers' own has no dict around it
    arguments = function.get("arguments") or "{}"
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": parsed}}


class QwenVLAdapter(ProcessorAdapter):
    """Qwen2-VL and Qwen2.5-VL, pictures only, from the processor's parts.

    Args:
        tokenizer: with the family's chat template.
        image_processor, model_config: of the same checkpoint; None: loaded from where the tokenizer came from.
    """

    def __init__(self, tokenizer, image_processor=None, model_config=None, **options) -> None:
        image_processor = image_processor or AutoImageProcessor.from_pretrained(tokenizer.name_or_path)
        config = model_config or AutoConfig.from_pretrained(tokenizer.name_or_path)
        processor = without_video(Qwen2VLProcessor)(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        super().__init__(processor, config, **options)


class LlavaAdapter(ProcessorAdapter):
    """LLaVA 1.5, from the processor's parts; arguments as above."""

    def __init__(self, tokenizer, image_processor=None, model_config=None, **options) -> None:
        image_processor = image_processor or AutoImageProcessor.from_pretrained(tokenizer.name_or_path)
        config = model_config or AutoConfig.from_pretrained(tokenizer.name_or_path)
        parts = dict(image_processor=image_processor, tokenizer=tokenizer, chat_template=tokenizer.chat_template)
        parts["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        # one token more: CLIP's class token, which the default strategy leaves out
        sizes = dict(patch_size=config.vision_config.patch_size, num_additional_image_tokens=1)
        super().__init__(LlavaProcessor(**parts, **sizes), config, **options)


ADAPTERS = {"auto": ProcessorAdapter, "qwen": QwenVLAdapter, "llava": LlavaAdapter}


def load_model(
    family: str, checkpoint: str | None, config: MultimodalRLConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ProcessorAdapter]:
    """(model, tokenizer, adapter) of a checkpoint, a name or a folder; None: of a tiny model with random weights. Its
    weights are what `param_dtype` says; a model that is made otherwise and given to the trainer stays as it is.

    Raises:
        ValueError: no such folder, or weights that lack tensors.
    """
    dtype = getattr(torch, config.param_dtype)
    rules = MediaRules(config.max_image_pixels, config.allowed_local_media_path, config.allowed_media_domains)
    if checkpoint is None:
        from tiny_vlm import make_tiny, use_one_thread

        use_one_thread()
        model, processor = make_tiny("qwen" if family == "auto" else family, seed=config.seed)
        for weight in model.parameters():  # not `model.to`, which rounds the frequencies of the positions too
            weight.data = weight.data.to(dtype)
    else:
        if Path(checkpoint).is_absolute() and not Path(checkpoint).exists():
            raise ValueError(f"model={checkpoint!r}: there is no such folder")
        base_of(checkpoint)  # an adapter's, if it is there
        options = dict(dtype=dtype, output_loading_info=True)
        model, found = AutoModelForMultimodalLM.from_pretrained(checkpoint, **options)
        if missing := sorted(found["missing_keys"]):  # they would be trained on from random numbers
            raise ValueError(f"model={checkpoint!r}: its weights lack {len(missing)} tensors: {', '.join(missing[:5])}")
        processor = load_processor(checkpoint)
    parts = (processor,) if family == "auto" else (processor.tokenizer, processor.image_processor)
    options = dict(processor_kwargs=config.processor_kwargs, on_control_tokens=config.on_control_tokens)
    adapter = ADAPTERS[family](*parts, model.config, media_rules=rules, **options)
    return model, adapter.tokenizer, adapter
