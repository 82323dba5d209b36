"""Tiny checkpoints of real multimodal architectures, with random weights, made offline in a second.

    model, processor = make_tiny("gemma3", seed=0)
    python tiny_vlm.py gemma3 FOLDER        # saved, as `from_pretrained` and `vllm serve` read it

The classes are Transformers' own (`Gemma3ForConditionalGeneration`, `Gemma3Processor`, its image processor); only the
sizes are small: about 0.3 M parameters, a vocabulary of words and bytes. What trains and tests on these trains and
tests on the real checkpoints' code. What families differ in is a table of facts, `FAMILIES`: a row each. Output heads
are untied and heads are 32 wide, so that vLLM can serve the saved checkpoint too.
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
from transformers import (
    FEATURE_EXTRACTOR_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    VIDEO_PROCESSOR_MAPPING,
    AutoConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
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
    assistant: str = "assistant"  # its name in `turn`
    template: str = TEMPLATE
    eos: str = "<|im_end|>"
    pad: str = "<|endoftext|>"
    layers: tuple[str, ...] = ()  # kinds of the language model's layers, over and over
    modality: str = "image"
    words_only: bool = False  # a vocabulary without bytes
    newlines: int = 0  # up to so many in a row are a token
    image_processor: str = ""  # its class, and the processor's, where Transformers' tables have none or another
    processor_class: str = ""


def grid(name: str, rows: int) -> str:
    return " ".join(name.format(i, j) for i in range(1, rows + 1) for j in range(1, rows + 1))


# fmt: off
CHATML = "<|endoftext|> <|im_start|> <|im_end|> "
SQUARE = {"height": "image_size", "width": "image_size"}
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
PINPOINTS = [["image_size", "twice_image_size"], ["twice_image_size", "image_size"], ["twice_image_size"] * 2]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
# Towers: a token stands for 28 x 28 pixels, one patch or 2 x 2 of 14 x 14 merged.
TOWER = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
WHOLE = {**TOWER, "image_size": "image_size"}
SIGLIP = {**WHOLE, "model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = {**WHOLE, "model_type": "clip_vision_model", "patch_size": 28, "projection_dim": 64}
CLIP_TOKENS = dict(patch_size=28, vision_feature_select_strategy="default", num_additional_image_tokens=1)  # its class
PIXTRAL = {**TOWER, "model_type": "pixtral", "image_size": 112}
QWEN_TOWER = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size="hidden_size")
QWEN3_TOWER = {**QWEN_TOWER, "num_position_embeddings": 16}
DEEPSTACK = {**QWEN3_TOWER, "deepstack_visual_indexes": [0]}
WINDOWED = {**QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 56}
LINEAR, SLIDING = ("linear_attention", "full_attention"), ("sliding_attention", "full_attention")
LFM2 = dict(
    model_type="lfm2", block_auto_adjust_ff_dim=False,
    **dict.fromkeys(("conv_dim", "conv_dim_out", "block_dim"), "hidden_size"),  # as published ones say; vLLM reads them
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
HYBRID = dict(  # linear heads 64 wide: vLLM's on the CPU are 64 or 128, and bfloat16
    head_dim=32, linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=2, linear_num_value_heads=2,
    rope_parameters=dict(INTERLEAVED, mrope_section=[2, 1, 1], partial_rotary_factor=0.25),
)

QWEN = dict(
    placeholder="<|vision_start|><|image_pad|><|vision_end|>",
    tokens=CHATML + "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>",
    config=dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
                vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
)
QWEN3 = dict(**QWEN, media=dict(size=PIXELS, patch_size=16))  # 32 x 32 pixels a token
MERGED = dict(media=dict(size={"longest_edge": 112}, patch_size=14),
              processor=dict(patch_size=14, spatial_merge_size=2))
MISTRAL = dict(placeholder="[IMG]", tokens="<pad> </s> bos_token=<s> [INST] [/INST] image_token=[IMG] "
               "image_break_token=[IMG_BREAK] image_end_token=[IMG_END]",
               begin="<s>", turn="[INST]ROLE\n", end="[/INST]", eos="</s>", pad="<pad>")
COHERE_TOKENS = "<PAD> bos_token=<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> "
COHERE = dict(placeholder="<image>", begin="<BOS_TOKEN>", turn="<|START_OF_TURN_TOKEN|>ROLE\n",
              end="<|END_OF_TURN_TOKEN|>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>",
              text=dict(model_type="cohere2", head_dim=32, logit_scale=1.0, sliding_window=512),
              layers=SLIDING)
GLM = dict(
    placeholder="<|begin_of_image|><|image|><|end_of_image|>",
    tokens="<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|begin_of_image|> "
    "<|end_of_image|> <|begin_of_video|> <|end_of_video|> image_token=<|image|> video_token=<|video|>",
    config=dict(image_token_id="<|image|>", image_start_token_id="<|begin_of_image|>",
                image_end_token_id="<|end_of_image|>", video_token_id="<|video|>",
                video_start_token_id="<|begin_of_video|>", video_end_token_id="<|end_of_video|>"),
    text=dict(head_dim=32, attention_bias=True,  # as published: vLLM asks for it, Transformers does not
              rope_parameters=dict(MROPE, mrope_section=[2, 3, 3], partial_rotary_factor=0.5)),
    tower={**QWEN_TOWER, "image_size": 112}, begin="[gMASK]<sop>", turn="<|ROLE|>\n", end="", eos="<|user|>",
    media=dict(size={edge: 2 * pixels for edge, pixels in PIXELS.items()}),  # of two frames: a picture is one, twice
)
TILED = dict(
    placeholder="<image>",
    tokens=CHATML + "image_token=<image> fake_image_token=<fake_token_around_image> global_image_token=<global-img> "
    "end_of_utterance_token=<end_of_utterance> " + grid("<row_{}_col_{}>", 6),
    config=dict(image_token_id="<image>", scale_factor=2), text=dict(model_type="llama"),
    tower={**TOWER, "image_size": "half_image_size"},  # a token a tile, of which a picture has at most four and itself
    media=dict(size={"longest_edge": "image_size"}, max_image_size={"longest_edge": "half_image_size"}),
    processor=dict(image_seq_len="tile_tokens"), end="<end_of_utterance>\n", eos="<end_of_utterance>",
)

AUDIO_TOWER = dict(num_mel_bins=16, d_model=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=128,
                   max_source_positions=25, initializer_range=0.3)  # with INIT_STD no run of GRPO learned to hear
HEARING = dict(
    placeholder="<|audio_bos|><|AUDIO|><|audio_eos|>\n", text=dict(model_type="qwen2"), modality="audio",
    tokens=CHATML + "audio_token=<|AUDIO|> audio_bos_token=<|audio_bos|> audio_eos_token=<|audio_eos|>",
    config=dict(audio_token_index="<|AUDIO|>"),
)
FAMILIES = {
    "qwen": Family("qwen2_vl", QWEN["placeholder"], QWEN["tokens"],
        tower=dict(depth=1, embed_dim=64, hidden_size="hidden_size", num_heads=2, mlp_ratio=2),
        text=dict(rope_parameters=MROPE), words_only=True, image_processor="Qwen2VLImageProcessorPil",
        config=dict(QWEN["config"], bos_token_id=None, eos_token_id="<|im_end|>", pad_token_id="<|endoftext|>"),
        media=dict(min_pixels=28 * 28, max_pixels=112 * 112)),
    "llava": Family("llava", "<image>", "<pad> </s> <image> USER: ASSISTANT:", CLIP, text=dict(model_type="llama"),
        config=dict(image_token_index="<image>", image_seq_length="image_tokens", vision_feature_layer=-1),
        media=dict(size={"shortest_edge": "image_size"}, crop_size=SQUARE),
        processor=CLIP_TOKENS,
        template=LLAVA_TEMPLATE, eos="</s>", pad="<pad>", image_processor="CLIPImageProcessorPil", words_only=True),
    "qwen2_5_vl": Family("qwen2_5_vl", **QWEN, tower=WINDOWED, media=dict(size=PIXELS),
        text=dict(rope_parameters=MROPE)),
    "exaone4_5": Family("exaone4_5", **QWEN, text=dict(model_type="exaone4", head_dim=32, sliding_window=512),
        tower=dict(WINDOWED, num_key_value_heads=2), media=dict(size=PIXELS)),
    "qwen3_vl": Family("qwen3_vl", **QWEN3, tower=DEEPSTACK, text=dict(head_dim=32, rope_parameters=INTERLEAVED)),
    "qwen3_vl_moe": Family("qwen3_vl_moe", **QWEN3, tower=DEEPSTACK,
        text=dict(head_dim=32, rope_parameters=INTERLEAVED, **EXPERTS), image_processor="Qwen2VLImageProcessor"),
    "qwen3_5": Family("qwen3_5", **QWEN3, tower=QWEN3_TOWER, text=HYBRID, layers=LINEAR),
    "qwen3_5_moe": Family("qwen3_5_moe", **QWEN3, tower=QWEN3_TOWER, layers=LINEAR,
        text=dict(HYBRID, **EXPERTS, shared_expert_intermediate_size=64)),
    "llava_next": Family("llava_next", "<image>\n", CHATML + "image_token=<image>", CLIP, text=dict(model_type="llama"),
        config=dict(image_token_index="<image>", vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS),
        media=dict(size={"shortest_edge": "image_size"}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS),
        processor=CLIP_TOKENS),
    "llava_onevision": Family("llava_onevision", "<image>\n", CHATML + "image_token=<image> video_token=<video>",
        tower=dict(SIGLIP, patch_size=28), text=dict(model_type="qwen2"),
        config=dict(image_token_index="<image>", video_token_index="<video>", image_grid_pinpoints=PINPOINTS),
        media=dict(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        processor=dict(num_image_tokens="image_tokens", vision_feature_select_strategy="full")),
    "internvl": Family("internvl", "<IMG_CONTEXT>\n", CHATML + "start_image_token=<img> end_image_token=</img> "
        "context_image_token=<IMG_CONTEXT> video_token=<video>", text=dict(model_type="qwen2"),
        tower=dict(TOWER, image_size=["image_size"] * 2, patch_size=[14, 14]), media=dict(size=SQUARE, max_patches=4),
        config=dict(image_token_id="<IMG_CONTEXT>", image_seq_length="image_tokens"),
        processor=dict(image_seq_length="image_tokens")),
    "gemma3": Family("gemma3", "<start_of_image>", "<pad> bos_token=<bos> <start_of_turn> <end_of_turn> "
        "boi_token=<start_of_image> eoi_token=<end_of_image> image_token=<image_soft_token>", tower=SIGLIP,
        begin="<bos>", turn="<start_of_turn>ROLE\n", end="<end_of_turn>\n", assistant="model",
        eos="<end_of_turn>", pad="<pad>",
        config=dict(image_token_index="<image_soft_token>", boi_token_index="<start_of_image>",
                    eoi_token_index="<end_of_image>", mm_tokens_per_image="image_tokens"),
        text=dict(model_type="gemma3_text", head_dim=32, query_pre_attn_scalar=32, sliding_window=512),
        layers=SLIDING, media=dict(size=SQUARE), newlines=4,
        processor=dict(image_seq_length="image_tokens")),
    "smolvlm": Family("smolvlm", **TILED),
    "idefics3": Family("idefics3", **TILED),
    "mistral3": Family("mistral3", **MISTRAL, tower=PIXTRAL, text=dict(model_type="mistral", head_dim=32),
        config=dict(image_token_index="[IMG]", spatial_merge_size=2), **MERGED),
    "lighton_ocr": Family("lighton_ocr", **MISTRAL, tower=PIXTRAL, text=dict(model_type="qwen3", head_dim=32),
        config=dict(image_token_id="[IMG]", spatial_merge_size=2), **MERGED),
    "pixtral": Family("llava", **MISTRAL, text=dict(model_type="mistral", head_dim=32),
        tower=dict(PIXTRAL, patch_size=28),
        config=dict(image_token_index="[IMG]", vision_feature_layer=-1, vision_feature_select_strategy="full"),
        media=dict(size={"longest_edge": 112}, patch_size=28), processor=dict(patch_size=28),
        image_processor="PixtralImageProcessor", processor_class="PixtralProcessor"),
    "glm4v": Family("glm4v", **GLM),
    "glm46v": Family("glm46v", **GLM),
    "ernie4_5_vl_moe": Family("ernie4_5_vl_moe", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", CHATML +
        "image_token=<|IMAGE_PLACEHOLDER|> image_start_token=<|IMAGE_START|> image_end_token=<|IMAGE_END|> "
        "video_token=<|VIDEO|> video_start_token=<|VIDEO_START|> video_end_token=<|VIDEO_END|>",
        tower=dict(QWEN_TOWER, hidden_size=32, num_heads=1, patch_size=14),
        media=dict(size=PIXELS, draw_on_frames=False),
        text=dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=[64, 64],
                  rope_parameters=dict(MROPE, mrope_section=[6, 6, 4])),
        config=dict(image_token_id="<|IMAGE_PLACEHOLDER|>", image_start_token_id="<|IMAGE_START|>",
                    image_end_token_id="<|IMAGE_END|>", video_token_id="<|VIDEO|>",
                    video_start_token_id="<|VIDEO_START|>", video_end_token_id="<|VIDEO_END|>")),
    "ovis2": Family("ovis2", "<image>\n", CHATML + "image_token=<image> <IMG_ATOM> <IMG_START> <IMG_GRID> <IMG_COL> "
        "<IMG_ROW> <IMG_END>", tower=dict(WHOLE, vocab_size=64, patch_size=28), text=dict(model_type="qwen2"),
        config=dict(image_token_id="<IMG_ATOM>", hidden_size="hidden_size", vocab_size="vocab_size",
                    visual_indicator_token_ids=["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]),
        media=dict(size=SQUARE, max_patches=4), processor=dict(image_seq_length="image_tokens")),
    "llama4": Family("llama4", "<|image|>", CHATML + "<|image|> <|patch|> <|image_start|> <|image_end|> "
        "<|tile_x_separator|> <|tile_y_separator|>", tower=dict(WHOLE, intermediate_size=256,
            **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 64)),
        text=dict(head_dim=32, intermediate_size_mlp=128, num_local_experts=4, attention_chunk_size=512),
        config=dict(image_token_index="<|patch|>", boi_token_index="<|image_start|>", eoi_token_index="<|image_end|>"),
        media=dict(size=SQUARE, max_patches=4), processor=dict(patch_size=14)),
    "aya_vision": Family("aya_vision", **COHERE, tower=SIGLIP,
        config=dict(image_token_index="<|IMG_PATCH|>", downsample_factor=2),
        tokens=COHERE_TOKENS + "<image> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE "
        "TILE_GLOBAL", media=dict(size=SQUARE, max_patches=4),
        processor=dict(patch_size=14, downsample_factor=2, img_size="image_size")),
    "cohere2_vision": Family("cohere2_vision", **COHERE, tower=SIGLIP, tokens=COHERE_TOKENS + "image_token=<image> "
        "boi_token=<|START_OF_IMG|> eoi_token=<|END_OF_IMG|> img_line_break_token=<|IMG_LINE_BREAK|>",
        config=dict(image_token_id="<image>", downsample_factor=2, alignment_intermediate_size=64),
        media=dict(size=SQUARE, max_patches=4, patch_size="edge_tokens")),  # (sic)
    "lfm2_vl": Family("lfm2_vl", "<image>", CHATML + "image_token=<image> image_start_token=<|image_start|> "
        "image_end_token=<|image_end|> image_thumbnail_token=<|img_thumbnail|> " + grid("<|img_row_{}_col_{}|>", 4),
        tower=dict(TOWER, model_type="siglip2_vision_model", num_patches=16, vision_use_head=False),
        text=LFM2, layers=("conv", "full_attention"),
        config=dict(image_token_id="<image>", projector_hidden_size=64),
        media=dict(encoder_patch_size=14, tile_size="image_size", min_image_tokens=1, max_image_tokens=4, min_tiles=2,
                   max_tiles=4, max_num_patches=16)),
    "deepseek_vl": Family("deepseek_vl", "<image_placeholder>", CHATML + "image_token=<image_placeholder>",
        tower=dict(SIGLIP, patch_size=28), text=dict(model_type="llama"), media=dict(size=SQUARE),
        config=dict(image_token_id="<image_placeholder>"), processor=dict(num_image_tokens="image_tokens")),
    "qwen2_audio": Family("qwen2_audio", **HEARING, tower=AUDIO_TOWER,
        media=dict(feature_size=16, hop_length=640, n_fft=1024, chunk_length=2)),
    "qwen2_audio_long": Family("qwen2_audio", **HEARING, tower={**AUDIO_TOWER, "max_source_positions": 1500},
        media=dict(feature_size=16, hop_length=640, n_fft=1024, chunk_length=120)),  # 3000 frames, as vLLM demands
}
# fmt: on


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[token for token in special if token not in (family.eos, family.pad)],
        chat_template=make_template(family),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        **names,
    )


def make_template(family: Family) -> str:
    role = "{{ message['role'] }}"
    if family.assistant != "assistant":
        role = "{{ 'NAME' if message['role'] == 'assistant' else message['role'] }}".replace("NAME", family.assistant)
    turn, answer = (family.turn.replace("ROLE", name) for name in (role, family.assistant))
    return string.Template(family.template).substitute(family._asdict(), turn=turn, answer=answer)


def make_config(family: Family, tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], facts):
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if family.layers:
        text["layer_types"] = [family.layers[i % len(family.layers)] for i in range(text["num_hidden_layers"])]
    # untied before the model is made: weights that were tied then would be saved without a head
    text = dict(vocab_size=len(tokenizer), tie_word_embeddings=False, **text, **facts(family.text), **special)
    tower = {"image": "vision_config", "audio": "audio_config"}[family.modality]
    return AutoConfig.for_model(
        family.model_type,
        text_config=text,
        **{tower: {"initializer_range": INIT_STD, **facts(family.tower)}},
        **facts(family.config),
        tie_word_embeddings=False,
    )


def make_processor(family: Family, tokenizer: PreTrainedTokenizerFast, config, facts):
    """The family's own. Without torchvision: with Pillow, and without its part for video."""
    kind = getattr(transformers, family.processor_class or PROCESSOR_MAPPING[type(config)].__name__)
    if "video_processor" in kind.get_attributes() and not is_torchvision_available():
        kind = without_video(kind)
    parts = {"tokenizer": tokenizer}
    for name in kind.get_attributes():
        if name == "image_processor":
            parts[name] = image_processor_class(family, config)(**facts(family.media))
        elif name == "video_processor":
            parts[name] = VIDEO_PROCESSOR_MAPPING[type(config)]["torchvision"](**facts(family.media))
        elif name == "feature_extractor":
            parts[name] = FEATURE_EXTRACTOR_MAPPING[type(config)](**facts(family.media))
    return kind(**parts, chat_template=tokenizer.chat_template, **facts(family.processor))


def image_processor_class(family: Family, config) -> type:
    name, pil = family.image_processor, not is_torchvision_available()
    if name:
        return getattr(transformers, name + "Pil" if pil and not name.endswith("Pil") else name)
    kinds = IMAGE_PROCESSOR_MAPPING[type(config)]
    if pil and "pil" not in kinds:
        raise ImportError(f"{family.model_type}: its image processor needs torchvision")
    return kinds["pil" if pil else "torchvision"]


def make_tiny(family: str, seed: int = 0, hidden_size: int = 64, num_layers: int = 2, image_size: int = 56):
    """Make a tiny multimodal model of a real family with random weights.

    Args:
        family: a key of FAMILIES.
        seed: of the weights; the caller's random state is left as it was.
        hidden_size: width of the language model, a multiple of 32 (heads are 32 wide).
        num_layers: of the language model.
        image_size: edge of a picture, or of its tiles, in pixels, a multiple of 28 (Qwen and others take any size).

    Returns:
        (model, processor), as `from_pretrained` gives them for a published checkpoint.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: must be one of {list(FAMILIES)}")
    if hidden_size % 32:
        raise ValueError(f"hidden_size={hidden_size}: must be a multiple of 32")
    row = FAMILIES[family]
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

    text = dict(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
        initializer_range=INIT_STD,
    )
    config = make_config(row, tokenizer, text, facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config)
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():  # such as Gemma 3's projection: it would be blind
                torch.nn.init.normal_(weight, std=INIT_STD)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), make_processor(row, tokenizer, config, facts)


def make_tiny_vlm(family: str, seed: int = 0, hidden_size: int = 64, num_layers: int = 2, image_size: int = 56):
    """`make_tiny`, its processor in parts: (model, tokenizer, image_processor)."""
    model, processor = make_tiny(family, seed, hidden_size, num_layers, image_size)
    return model, processor.tokenizer, processor.image_processor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    save_checkpoint(options.folder, *make_tiny(options.family, seed=options.seed))


if __name__ == "__main__":
    main()
