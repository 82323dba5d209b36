"""Tests of the tiny checkpoints: each family's processor and model fit each other, come back from a folder as published
ones do, and a seed fixes them.

    pytest test_tiny_vlm.py

Loaded through Transformers' auto classes, as a user would load them.
"""

import functools
import hashlib
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoTokenizer

import tiny_vlm
from adapters import ProcessorAdapter, load_model
from checkpoint import save_checkpoint
from conftest import DEMONSTRATIONS, message, not_installed, picture
from media import load_image
from mm_grpo import MultimodalRLConfig
from shapes_env import png_data_uri
from tiny_families import FAMILIES
from tiny_vlm import WORDS, make_tiny, make_tiny_vlm
from tones_env import wav

CLOSE = 1e-5  # between two float32 forwards with sums in another order; a wrong token or pixel moves logits by 1e-2


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    if missing := not_installed(request.param):
        pytest.skip(f"Transformers' classes of this family need {missing}")
    return request.param


@functools.cache
def made(family: str):
    """(model, adapter); tests leave the weights as they are."""
    model, processor = make_tiny(family, seed=4)
    return model, ProcessorAdapter(processor, model.config)


@pytest.fixture
def tiny(family):
    return made(family)


def resized(seed: int, width: int, height: int) -> dict:
    """A picture of another size, which processors resize, cut or tile."""
    image = load_image(picture(seed)["image_url"]["url"]).resize((width, height))
    return {"type": "image_url", "image_url": {"url": png_data_uri(image)}}


def sound(pitch: int, seconds: float) -> dict:
    """A content part of a message: a tone of `pitch` Hz."""
    tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(16_000 * seconds)) / 16_000)
    return {"type": "input_audio", "input_audio": {"data": wav(tone, 16_000), "format": "wav"}}


def chats(family: str) -> list[list[dict]]:
    """Prompts with no medium, one and two, of other sizes."""
    if FAMILIES[family].modality == "audio":
        media = [sound(300, 1.0), sound(500, 0.4), sound(700, 1.7), sound(400, 0.6)]
    else:
        media = [picture(0), resized(1, 100, 60), resized(2, 60, 112), picture(3)]
    system = [{"role": "system", "content": "Look now"}]
    return [
        message("Name a colour ."),
        message(media[0], "red ?"),
        system + message(media[1], "and", media[2], "which is not é ?"),
        message(media[3], media[0]) + [{"role": "assistant", "content": "red circle"}, *message("no , look !")],
    ]


def test_a_tiny_checkpoint_comes_back_from_its_folder_through_the_auto_classes(tiny, family, tmp_path):
    model, adapter = tiny
    save_checkpoint(tmp_path / "tiny", model, adapter)
    # as `--model FOLDER` does
    loaded, tokenizer, again = load_model("auto", str(tmp_path / "tiny"), MultimodalRLConfig())
    assert tokenizer is again.tokenizer and type(loaded) is type(model)
    assert type(again.processor).__name__ == type(adapter.processor).__name__
    assert again.placeholder_ids == adapter.placeholder_ids
    assert loaded.generation_config.eos_token_id == again.tokenizer.eos_token_id
    prompts, reloaded = ([a.encode_prompt(chat) for chat in chats(family)] for a in (adapter, again))
    assert [prompt.ids for prompt in reloaded] == [prompt.ids for prompt in prompts]
    inputs = adapter.prompt_inputs(prompts)
    if not FAMILIES[family].image_processor.endswith("Pil"):  # which comes back on torchvision, where that is
        torch.testing.assert_close(again.prompt_inputs(reloaded), inputs, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_a_tiny_model_is_tiny_its_head_untied_its_seed_fixes_it_and_nobody_elses_random_numbers_change(family):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, other = (make_tiny(family, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert 150_000 <= sum(p.numel() for p in one.parameters()) <= 600_000
    for (name, weight), again in zip(one.named_parameters(), same.parameters()):
        assert torch.equal(weight, again), name
    head = one.get_output_embeddings().weight
    assert not torch.equal(head, other.get_output_embeddings().weight)
    assert head.data_ptr() != one.get_input_embeddings().weight.data_ptr()
    assert not one.config.tie_word_embeddings and not one.config.get_text_config().tie_word_embeddings


def test_a_model_may_be_wider_deeper_and_see_larger_pictures(tiny, family):
    model, processor = make_tiny(family, hidden_size=96, num_layers=3, image_size=112)
    adapter = ProcessorAdapter(processor, model.config)
    assert model.get_input_embeddings().weight.shape[1] == 96
    with torch.no_grad():
        assert model(**adapter.prompt_inputs([adapter.encode_prompt(chats(family)[1])])).logits.isfinite().all()


def test_each_word_is_a_token_and_every_character_has_tokens(family):
    tokenizer = made(family)[1].tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert [word for word in WORDS if len(encode(word)) != 1] == []
    assert len(encode("red circle")) == 2
    assert tokenizer.decode(encode("red circle")).split() == ["red", "circle"]
    if not FAMILIES[family].words_only:
        text = "\n é☃\t<b> 10 red-Circles\n\n"
        assert tokenizer.decode(encode(text)) == text


# Of tokenizer and template (sha256), and of the weights (sum of cubes), before there was a table of families
FIXED = {"qwen": ("529e468de26a2168", 511.523332152), "llava": ("c202291587cd3095", 704.020488580)}


@pytest.mark.parametrize("family", FIXED)
def test_the_models_of_the_readme_are_what_they_were(family):
    """Its curves were drawn with these: other weights or ids, and they are no longer what the command prints."""
    model, tokenizer, _ = make_tiny_vlm(family, seed=3)
    words = hashlib.sha256((tokenizer.backend_tokenizer.to_str() + tokenizer.chat_template).encode()).hexdigest()[:16]
    cubes = sum(parameter.double().pow(3).sum().item() for parameter in model.parameters())
    near = pytest.approx(FIXED[family][1], rel=1e-6)  # rounding differs by machine
    assert (words, cubes) == (FIXED[family][0], near)


def test_what_the_readme_makes_needs_no_file_of_the_tests(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiny_families", None)
    assert set(tiny_vlm.FAMILIES) == {*DEMONSTRATIONS, "qwen2_audio"}
    for name in tiny_vlm.FAMILIES:
        make_tiny(name)
    with pytest.raises(ImportError, match="tiny_families"):
        make_tiny("gemma3")


def test_an_unknown_family_and_a_width_of_no_whole_heads_are_named():
    with pytest.raises(ValueError, match="family='gpt2': must be one of"):
        make_tiny("gpt2")
    with pytest.raises(ValueError, match="hidden_size=40: must be a multiple of 32"):
        make_tiny("qwen", hidden_size=40)


def test_the_command_saves_a_checkpoint(tmp_path):
    tiny_vlm.main(["gemma3", str(tmp_path / "tiny"), "--seed", "2"])
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, make_tiny("gemma3", seed=2)[0].lm_head.weight)
    assert "<start_of_image>" in AutoTokenizer.from_pretrained(tmp_path / "tiny").chat_template
