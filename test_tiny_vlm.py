"""Tests of the tiny checkpoints: they come back from a folder as published ones do, and their seed fixes them.

    pytest test_tiny_vlm.py

Loaded through Transformers' auto classes, as a user would load them.
"""

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from adapters import ADAPTERS
from conftest import make_tiny, message, picture
from tiny_vlm import FAMILIES, make_tiny_vlm

PROMPTS = [
    message(picture(0), "red"),
    message(picture(1), "what is the second colour ?"),
    message(picture(2), picture(3)),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_checkpoint_comes_back_from_its_folder_through_the_auto_classes(family, tmp_path):
    model, adapter = make_tiny(family, seed=4)
    model.save_pretrained(tmp_path)
    adapter.save_pretrained(tmp_path)
    loaded, tokenizer = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    again = ADAPTERS[family](tokenizer)  # image processor and config come from where the tokenizer came from
    assert type(loaded) is type(model)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is type(again.image_processor)
    inputs, reloaded = (a.prompt_inputs([a.encode_prompt(messages) for messages in PROMPTS]) for a in (adapter, again))
    torch.testing.assert_close(reloaded, inputs, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**reloaded).logits, model(**inputs).logits, rtol=0, atol=0)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert again.placeholder_ids == adapter.placeholder_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_tiny_its_seed_fixes_it_and_nobody_elses_random_numbers_change(family):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, other = (make_tiny_vlm(family, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert 200_000 <= sum(p.numel() for p in one.parameters()) <= 400_000
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.data_ptr() != one.get_input_embeddings().weight.data_ptr()
