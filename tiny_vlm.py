"""Tiny checkpoints of real multimodal architectures, with random weights, made offline in a second.

    model, processor = make_tiny("gemma3", seed=0)
    python tiny_vlm.py gemma3 FOLDER        # saved, as `from_pretrained` and `vllm serve` read it

The classes are Transformers' own (`Gemma3ForConditionalGeneration`, `Gemma3Processor`, its image processor); only the
sizes are small: about 0.3 M parameters, a vocabulary of words and bytes. What trains and tests on these trains and
tests on the real checkpoints' code. What families differ in is a table of facts, `FAMILIES`: a row each. A name that is
not there is looked up in `tiny_families.py`, where the tests have their own (Gemma 3 is one). Output heads are untied
and heads are 32 wide, so that vLLM can serve the saved checkpoint too.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torchvision_available

from checkpoint import save_checkpoint, without_video

INIT_STD = 0.06  # of the weights: the default of 0.02 is too small for a width of 64: logits start nearly uniform
WORDS = (
    "red green blue yellow purple orange circle square triangle star a an the of and in is it no not picture pictures "
    "image first second third left right big small colour shape Which which do you see Name name What Look now with "
    "one two both same different system user assistant : , . ?"
).split()

# Every family's published template in this form; what it writes around a turn and for a medium is in the family's row.
TEMPLATE = (
    "$begin{% for message in messages %}$turn"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == '$modality' %}$placeholder"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}$end{% endfor %}"
    "{% if add_generation_prompt %}$answer{% endif %}"
)
# LLaVA's pictures are in front of the text, wherever they were.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Family(NamedTuple):
    """What a family has of its own. In its facts, a string that is one of its tokens stands for the token's id, and a
    name of `sizes` (see `make_tiny`) for that number."""

    model_type: str  # Transformers' name
    placeholder: str  # what its template writes for a medium
    tokens: str  # special ones, by blanks; name=token where its processor asks the tokenizer for a token of that name
    tower: dict[str, Any]  # config of what sees or hears
    text: dict[str, Any] = {}  # config of the language model
    config: dict[str, Any] = {}  # of the whole
    media: dict[str, Any] = {}  # arguments of the image processor, or of the feature extractor
    processor: dict[str, Any] = {}  # arguments of the processor
    begin: str = ""  # of a prompt
    turn: str = "<|im_start|>ROLE\n"
    end: str = "<|im_end|>\n"  # of a turn
    role: str = "{{ message['role'] }}"  # who speaks in `turn`
    assistant: str = "assistant"  # the policy, in these words
    template: str = TEMPLATE
    eos: str = "<|im_end|>"
    pad: str = "<|endoftext|>"
    layers: tuple[str, ...] = ()  # kinds of the language model's layers, over and over
    modality: str = "image"
    words_only: bool = False  # a vocabulary without bytes
    newlines: int = 0  # up to so many in a row are a token
    image_processor: str = ""  # its class, and the processor's, where Transformers' tables have none or another
    processor_class: str = ""


# fmt: off
CHATML = "<|endoftext|> <|im_start|> <|im_end|> "
FAMILIES = {
    "qwen": Family("qwen2_vl", "<|vision_start|><|image_pad|><|vision_end|>",
        CHATML + "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>",
        tower=dict(depth=1, embed_dim=64, hidden_size="hidden_size", num_heads=2, mlp_ratio=2), words_only=True,
        text=dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}),
        config=dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
                    vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
                    bos_token_id=None, eos_token_id="<|im_end|>", pad_token_id="<|endoftext|>"),
        media=dict(min_pixels=28 * 28, max_pixels=112 * 112), image_processor="Qwen2VLImageProcessorPil"),
    "llava": Family("llava", "<image>", "<pad> </s> <image> USER: ASSISTANT:", text=dict(model_type="llama"),
        tower=dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                   num_attention_heads=2, patch_size=28, image_size="image_size", projection_dim=64),
        config=dict(image_token_index="<image>", image_seq_length="image_tokens", vision_feature_layer=-1),
        media=dict(size={"shortest_edge": "image_size"}, crop_size={"height": "image_size", "width": "image_size"}),
        processor=dict(patch_size=28, vision_feature_select_strategy="default",
                       num_additional_image_tokens=1),  # its class
        template=LLAVA_TEMPLATE, eos="</s>", pad="<pad>", words_only=True, image_processor="CLIPImageProcessorPil"),
    "qwen2_audio": Family("qwen2_audio", "<|audio_bos|><|AUDIO|><|audio_eos|>\n",
        CHATML + "audio_token=<|AUDIO|> audio_bos_token=<|audio_bos|> audio_eos_token=<|audio_eos|>",
        tower=dict(num_mel_bins=16, d_model=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=128,
                   max_source_positions=25, initializer_range=0.3),  # with INIT_STD no run of GRPO learned to hear
        text=dict(model_type="qwen2"), config=dict(audio_token_index="<|AUDIO|>"), modality="audio",
        media=dict(feature_size=16, hop_length=640, n_fft=1024, chunk_length=2)),
}
# fmt: on


def known_families() -> dict[str, Family]:
    """FAMILIES and those that only the tests make, of `tiny_families.py`."""
    from tiny_families import FAMILIES as known  # which imports this file

    return known


def use_one_thread() -> None:
    """For models of this size: two threads are no faster, and many times slower on a machine that is busy."""
    torch.set_num_threads(1)


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A word is a token. What is no word is its bytes, or `<unk>` where the family has words only."""
    named = {token: name for name, _, token in (entry.rpartition("=") for entry in family.tokens.split())}
    special = list(named)
    if family.words_only:
        names = {"unk_token": "<unk>"}
        vocabulary = {token: i for i, token in enumerate([*special, "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:  # as GPT-2's, learned from the words alone, so that each becomes a token, with a blank in front and without
        names = {name: token for token, name in named.items() if name}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator((blank + word for word in WORDS for blank in ("", " ")), trainer)
        tokenizer.add_tokens(["\n" * (n + 1) for n in range(family.newlines)])
    names |= {"eos_token": family.eos, "pad_token": family.pad}
    names["additional_special_tokens"] = [token for token in special if token not in (family.eos, family.pad)]
    turn, answer = (family.turn.replace("ROLE", name) for name in (family.role, family.assistant))
    template = string.Template(family.template).substitute(family._asdict(), turn=turn, answer=answer)
    how = dict(chat_template=template, model_max_length=1024, clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **how)


def make_config(family: Family, tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], facts) -> PreTrainedConfig:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # untied before the model is made: weights that were tied then would be saved without a head
    always = dict(max_position_embeddings=1024, initializer_range=INIT_STD, tie_word_embeddings=False)
    text = dict(**text, **always, **facts(family.text), **special)
    if family.layers:
        text["layer_types"] = [family.layers[i % len(family.layers)] for i in range(text["num_hidden_layers"])]
    tower = {"image": "vision_config", "audio": "audio_config"}[family.modality]
    parts = {"text_config": text, tower: {"initializer_range": INIT_STD, **facts(family.tower)}}
    return AutoConfig.for_model(family.model_type, **parts, **facts(family.config), tie_word_embeddings=False)


def make_processor(family: Family, tokenizer: PreTrainedTokenizerFast, config, facts) -> ProcessorMixin:
    """The family's own. Without torchvision: with Pillow, and without its part for video."""
    kind = getattr(transformers, family.processor_class or transformers.PROCESSOR_MAPPING[type(config)].__name__)
    if "video_processor" in kind.get_attributes() and not is_torchvision_available():
        kind = without_video(kind)
    class_of = {
        "image_processor": lambda: image_processor_class(family, config),
        "video_processor": lambda: transformers.VIDEO_PROCESSOR_MAPPING[type(config)]["torchvision"],
        "feature_extractor": lambda: transformers.FEATURE_EXTRACTOR_MAPPING[type(config)],
    }
    parts = {name: class_of[name]()(**facts(family.media)) for name in kind.get_attributes() if name in class_of}
    return kind(**parts, tokenizer=tokenizer, chat_template=tokenizer.chat_template, **facts(family.processor))


def image_processor_class(family: Family, config) -> type:
    name, pil = family.image_processor, not is_torchvision_available()
    if name:
        return getattr(transformers, name + "Pil" if pil and not name.endswith("Pil") else name)
    kinds = transformers.IMAGE_PROCESSOR_MAPPING[type(config)]
    if pil and "pil" not in kinds:
        raise ImportError(f"{family.model_type}: its image processor needs torchvision")
    return kinds["pil" if pil else "torchvision"]


def make_tiny(
    family: str, seed: int = 0, hidden_size: int = 64, num_layers: int = 2, image_size: int = 56
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a tiny multimodal model of a real family with random weights.

    Args:
        family: a key of FAMILIES, or of `known_families()`.
        seed: of the weights; the caller's random state is left as it was.
        hidden_size: width of the language model, a multiple of 32 (heads are 32 wide).
        num_layers: of the language model.
        image_size: edge of a picture, or of its tiles, in pixels, a multiple of 28 (Qwen and others take any size).

    Returns:
        (model, processor), as `from_pretrained` gives them for a published checkpoint.
    """
    families = FAMILIES if family in FAMILIES else known_families()
    if family not in families:
        raise ValueError(f"family={family!r}: must be one of {list(families)}")
    if hidden_size % 32:
        raise ValueError(f"hidden_size={hidden_size}: must be a multiple of 32")
    row, heads = families[family], hidden_size // 32
    tokenizer = make_tokenizer(row)
    half, edge = image_size // 2, image_size // 28
    sizes = dict(hidden_size=hidden_size, image_size=image_size, half_image_size=half, twice_image_size=2 * image_size)
    sizes.update(edge_tokens=edge, image_tokens=edge**2, tile_tokens=(half // 28) ** 2, vocab_size=len(tokenizer))
    numbers = {**tokenizer.get_vocab(), **sizes}

    def facts(value):
        if isinstance(value, dict):
            return {key: facts(item) for key, item in value.items()}
        if isinstance(value, list):
            return [facts(item) for item in value]
        return numbers.get(value, value) if isinstance(value, str) else value

    text = dict(vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size)
    text |= dict(num_hidden_layers=num_layers, num_attention_heads=heads, num_key_value_heads=heads)
    config = make_config(row, tokenizer, text, facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config)
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():  # such as Gemma 3's projection: it would be blind
                torch.nn.init.normal_(weight, std=INIT_STD)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), make_processor(row, tokenizer, config, facts)


def make_tiny_vlm(
    family: str, seed: int = 0, hidden_size: int = 64, num_layers: int = 2, image_size: int = 56
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, BaseImageProcessor]:
    """`make_tiny`, its processor in parts: (model, tokenizer, image_processor)."""
    model, processor = make_tiny(family, seed, hidden_size, num_layers, image_size)
    return model, processor.tokenizer, processor.image_processor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=known_families())
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    save_checkpoint(options.folder, *make_tiny(options.family, seed=options.seed))


if __name__ == "__main__":
    main()
