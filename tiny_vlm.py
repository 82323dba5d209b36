"""Tiny checkpoints of real vision-language architectures, with random weights, made offline in a second.

    model, tokenizer, image_processor = make_tiny_vlm("qwen", seed=0)

The classes are Transformers' own (`Qwen2VLForConditionalGeneration`, `LlavaForConditionalGeneration`, their image
processors and chat templates); only the sizes are small: about 0.3 M parameters, a word-level vocabulary. What trains
and tests on these trains and tests on the real checkpoints' code. Output heads are untied and heads are 32 wide, so
that vLLM can serve the saved checkpoint too.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

INIT_STD = 0.06  # of the weights: the default of 0.02 is too small for a width of 64: logits start nearly uniform
WORDS = (
    "red green blue yellow purple orange circle square triangle star a an the of and in is it no not picture pictures "
    "image first second third left right big small colour shape Which which do you see Name name What Look now with "
    "one two both same different system user assistant : , . ?"
).split()
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
LLAVA_SPECIAL = ["<pad>", "</s>", "<image>", "USER:", "ASSISTANT:"]

# Both follow the families' published templates: one placeholder an image, in place (Qwen) or in front (LLaVA).
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def use_one_thread() -> None:
    """For models of this size: two threads are no faster, and many times slower on a machine that is busy."""
    torch.set_num_threads(1)


def make_tokenizer(special: list[str], template: str, eos: str, pad: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: words are split at white space, anything unknown is `<unk>`."""
    vocabulary = {word: i for i, word in enumerate([*special, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[token for token in special if token not in (eos, pad)],
        chat_template=template,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def qwen(text: dict, image_size: int):
    """(config, model class, tokenizer, image processor) of a Qwen2-VL around this language model."""
    tokenizer = make_tokenizer(QWEN_SPECIAL, QWEN_TEMPLATE, eos="<|im_end|>", pad="<|endoftext|>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL}
    special = dict(bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = dict(depth=1, embed_dim=64, hidden_size=text["hidden_size"], num_heads=2, mlp_ratio=2)
    config = Qwen2VLConfig(
        text_config=dict(vocab_size=len(tokenizer), rope_parameters=rope, **text, **special),
        vision_config=dict(initializer_range=INIT_STD, **vision),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        **special,
    )
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112)
    return config, Qwen2VLForConditionalGeneration, tokenizer, image_processor


def llava(text: dict, image_size: int):
    """(config, model class, tokenizer, image processor) of a LLaVA with a CLIP tower around this language model."""
    tokenizer = make_tokenizer(LLAVA_SPECIAL, LLAVA_TEMPLATE, eos="</s>", pad="<pad>")
    special = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=64)
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **text, **special),
        vision_config=CLIPVisionConfig(image_size=image_size, patch_size=28, initializer_range=INIT_STD, **vision),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 28) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    crop = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop)
    return config, LlavaForConditionalGeneration, tokenizer, image_processor


MAKERS = {"qwen": qwen, "llava": llava}
FAMILIES = tuple(MAKERS)


def make_tiny_vlm(family: str, seed: int = 0, hidden_size: int = 64, num_layers: int = 2, image_size: int = 56):
    """Make a tiny vision-language model of a real family with random weights.

    Args:
        family: "qwen" (Qwen2-VL) or "llava" (LLaVA with a CLIP tower).
        seed: of the weights; the caller's random state is left as it was.
        hidden_size: width of the language model, a multiple of 32 (heads are 32 wide).
        num_layers: of the language model.
        image_size: edge of a LLaVA picture in pixels, a multiple of 28 (Qwen takes any size).

    Returns:
        (model, tokenizer, image_processor), as `from_pretrained` gives them for a published checkpoint.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: must be one of {list(FAMILIES)}")
    if hidden_size % 32:
        raise ValueError(f"hidden_size={hidden_size}: must be a multiple of 32")
    text = dict(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
        initializer_range=INIT_STD,
    )
    config, model_class, tokenizer, image_processor = MAKERS[family](text, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer, image_processor
