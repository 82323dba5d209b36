"""The table of every family that the tests make, `tiny_vlm.py`'s own among them: part of the harness, as `conftest.py`.

    from tiny_families import FAMILIES
    python tiny_vlm.py gemma3 FOLDER        # one of these, saved

What a row says: `tiny_vlm.Family`.
"""

import tiny_vlm
from tiny_vlm import CHATML, Family

QWEN2, LLAVA, AUDIO = (tiny_vlm.FAMILIES[name] for name in ("qwen", "llava", "qwen2_audio"))


def grid(name: str, rows: int) -> str:
    return " ".join(name.format(i, j) for i in range(1, rows + 1) for j in range(1, rows + 1))


# fmt: off
SQUARE = {"height": "image_size", "width": "image_size"}
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
PINPOINTS = [["image_size", "twice_image_size"], ["twice_image_size", "image_size"], ["twice_image_size"] * 2]
MROPE = QWEN2.text["rope_parameters"]
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
# Towers: a token stands for 28 x 28 pixels, one patch or 2 x 2 of 14 x 14 merged.
TOWER = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
WHOLE = {**TOWER, "image_size": "image_size"}
SIGLIP = {**WHOLE, "model_type": "siglip_vision_model", "vision_use_head": False}
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
    placeholder=QWEN2.placeholder, tokens=QWEN2.tokens,
    config={name: QWEN2.config[name] for name in ("image_token_id", "video_token_id",
                                                  "vision_start_token_id", "vision_end_token_id")},
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

FAMILIES = {
    **tiny_vlm.FAMILIES,
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
    "llava_next": Family("llava_next", "<image>\n", CHATML + "image_token=<image>", LLAVA.tower, text=LLAVA.text,
        config=dict(image_token_index="<image>", vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS),
        media=dict(size={"shortest_edge": "image_size"}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS),
        processor=LLAVA.processor),
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
        role="{{ 'model' if message['role'] == 'assistant' else message['role'] }}", eos="<end_of_turn>", pad="<pad>",
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
    # a window of 30 s, 3000 frames, as vLLM demands
    "qwen2_audio_long": AUDIO._replace(tower={**AUDIO.tower, "max_source_positions": 1500},
        media={**AUDIO.media, "chunk_length": 120}),
}
# fmt: on
