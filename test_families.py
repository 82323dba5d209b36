"""Tests of every family of docs/models.md: tiny models of the real classes, the one `ProcessorAdapter`.

    pytest test_families.py

What a batch holds is held against the family's own processor and the model's own forward of each row alone; the rest is
the table's columns: a prompt that is run once, rollouts in this process. (vLLM's column: test_vllm_families.py.)
"""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import verifiers as vf
from datasets import Dataset
from transformers import AutoProcessor

import conftest
import vllm_server
from adapters import ProcessorAdapter
from checkpoint import published_weights, save_checkpoint
from conftest import message, not_installed, picture
from media import load_image, load_video
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig, Policy, score
from recompute import checkpoint_layers
from shared_prefix import find_shared_prompts, micro_batches
from test_multimodal_inputs import (
    ONE,
    TWO,
    Picture,
    Sample,
    build,
    messages,
    rollout,
    url_of,
    values_and_gradients,
)
from tiny_families import FAMILIES
from tiny_vlm import make_tiny

SEEING = [name for name in FAMILIES if FAMILIES[name].modality == "image" and not not_installed(name)]
WITH_BYTES = [name for name in SEEING if not FAMILIES[name].words_only]
# two pictures of different sizes, none, one, one with other proportions; twice each, as a group has them
ROWS = [Sample(TWO), Sample(()), Sample(ONE, (3,)), Sample((Picture(90, 40, seed=4),), (5, 6, 7, 8))]
GROUPS = [*ROWS, *(Sample(row.pictures, (2, 9), row.question) for row in ROWS)]
# Going on from a shared prompt hides a later picture's tokens from each other, or it cannot be told which are its own
PLAIN_IN_TURNS = ("gemma3", "idefics3", "smolvlm")
SAME = dict(rtol=0, atol=1e-5)  # float32 sums in another order; another picture moves logprobs by far more (tested)


@pytest.fixture(scope="module")
def made():
    """(model, adapter) of a family, made once; tests must leave the weights as they are."""
    kept = {}

    def make(family):
        if family not in kept:
            model, processor = make_tiny(family)
            kept[family] = model, ProcessorAdapter(processor, model.config)
        return kept[family]

    return make


def alone(model, adapter, sample, ids):
    """(T,) logprobs of a row by itself: the processor's own call, the model's own forward."""
    content = [{"type": "image", "image": load_image(picture.url())} for picture in sample.pictures]
    content = [*content, {"type": "text", "text": sample.question}]
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    conversation = [{"role": "user", "content": content if sample.pictures else adapter.text_form(sample.question)}]
    inputs = dict(adapter.processor.apply_chat_template(conversation, **how).to(torch.float32))
    P, L = inputs["input_ids"].shape[1], len(ids)
    assert inputs["input_ids"][0].tolist() == ids[:P].tolist()
    for name in ("input_ids", "attention_mask", *adapter.token_types):  # what is sampled is text, and seen
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, L - P), value=int(name == "attention_mask"))
    inputs["input_ids"] = ids[None]
    logprobs = model(**inputs).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None])[:, 0].float()


@torch.no_grad()
@pytest.mark.parametrize("family", SEEING)
def test_a_batch_gives_each_row_the_logprobs_of_the_row_alone(family, made):
    model, adapter = made(family)
    batch = build(adapter, ROWS)
    logprobs, _ = score(model, batch)
    for row, sample in enumerate(ROWS):
        length = int(batch.attention_mask[row].sum())
        expected = alone(model, adapter, sample, batch.input_ids[row, :length])
        torch.testing.assert_close(logprobs[row, : length - 1], expected, **SAME)


@torch.no_grad()
@pytest.mark.parametrize("family", SEEING)
def test_another_picture_is_another_answer(family, made):
    """Or the comparisons of this file would pass with pictures lost or exchanged."""
    model, adapter = made(family)
    batch = build(adapter, [Sample(ONE), Sample((Picture(60, 60, seed=9),))])
    logprobs, _ = score(model, batch)
    trained = batch.loss_mask[:, 1:] == 1
    assert (logprobs[0][trained[0]] - logprobs[1][trained[1]]).abs().max() > 100 * SAME["atol"]


@pytest.mark.parametrize("family", SEEING)
def test_a_prompt_that_is_run_once_changes_no_logprob_and_no_gradient(family, made):
    """Nor do activations that are made again in the backward."""
    model, adapter = made(family)
    batch = build(adapter, GROUPS)
    shared_prompts = find_shared_prompts(model, batch, adapter.placeholder_ids)
    assert len(shared_prompts.lengths) == len(ROWS)
    plain, plain_gradients = values_and_gradients(model, adapter, batch, None)
    for recompute in (False, True):
        checkpoint_layers(model, recompute)
        prompts = find_shared_prompts(model, batch, adapter.placeholder_ids) if recompute else shared_prompts
        shared, gradients = values_and_gradients(model, adapter, batch, prompts)
        torch.testing.assert_close(shared, plain, rtol=0, atol=2e-5)  # SAME, magnified by a temperature of 0.7
        assert gradients.keys() == plain_gradients.keys()
        total = torch.stack([gradient.norm() for gradient in plain_gradients.values()]).norm()
        for name, gradient in plain_gradients.items():
            assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * total, name
    checkpoint_layers(model, False)


# Where it cannot be told which media are the prompt's: they are stored in one row, or in tiles of runs that differ
NOT_TOLD = ("smolvlm", "idefics3", "llama4")
TALKING = [name for name in SEEING if name != "llava_onevision"]  # which tiles a picture otherwise beside another one


@pytest.mark.parametrize("family", TALKING)
def test_a_picture_behind_a_prompt_that_is_run_once_is_exact_or_left_to_the_plain_forward(family, made):
    """Whether it is exact is found out apart from prompts without one: Gemma 3 hides a picture's later tokens from its
    earlier ones where it goes on from a cache, so its rows of one turn share their prompt and those of two do not."""
    model, adapter = made(family)
    turns = [[Sample(ONE, (1, 2)), Sample(ONE, (seed, 5))] for seed in (3, 4)]
    two = adapter.build_batch({"outputs": [rollout(adapter, *both) for both in turns], "metadata": {}})
    one = build(adapter, [Sample(ONE, (1, 2)), Sample(ONE, (3, 4, 5))])
    policy, everything = Policy(model, 0.7, adapter.placeholder_ids), torch.ones(2, dtype=torch.bool)
    config = MultimodalRLConfig()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shares = [micro_batches(policy, batch, everything, config)[0].prompts for batch in (one, two, one)]
    exact = family not in (*NOT_TOLD, "gemma3")
    assert [prompts is not None for prompts in shares] == [True, exact, True]
    assert any("cannot be run once for several" in str(each.message) for each in said) == (family == "gemma3")
    if exact:
        ways = (None, find_shared_prompts(model, two, adapter.placeholder_ids))
        (plain, before), (shared, after) = (values_and_gradients(model, adapter, two, way) for way in ways)
        torch.testing.assert_close(shared, plain, rtol=0, atol=2e-5)  # SAME, magnified by a temperature of 0.7
        total = torch.stack([gradient.norm() for gradient in before.values()]).norm()
        assert all((after[n] - g).norm() <= 1e-4 * g.norm() + 1e-6 * total for n, g in before.items())


@pytest.mark.parametrize("family", SEEING)
def test_a_family_trains_in_this_process_without_a_line_of_code(family, tmp_path):
    """On shapes-env, with two pictures a prompt: on-policy at every first update, nothing dropped, pixels matter."""
    model, processor = make_tiny(family)
    small = dict(rollouts_per_step=16, rollouts_per_example=4, micro_batch_tokens=300, max_tokens=3, eval_examples=0)
    config = MultimodalRLConfig(output_dir=str(tmp_path / "run"), learning_rate=1e-3, **small)
    adapter = ProcessorAdapter(processor, model.config)
    trainer = MultimodalGRPOTrainer(model, processor.tokenizer, adapter, config)
    trainer.set_environment("shapes-env", num_train_examples=16, num_eval_examples=4, images_per_prompt=2)
    for _ in range(2):
        metrics = trainer.step()
        assert 1 - 1e-4 <= metrics["ratio_min"] <= metrics["ratio_max"] <= 1 + 1e-4
        assert metrics["rollouts_dropped"] == 0 and metrics["shared_prefix_fraction"] == 1
    batch = adapter.build_batch(trainer.rollouts.collect())
    batch.pixel_values.requires_grad_()
    logprobs, _ = score(model, batch)
    (logprobs * batch.loss_mask[:, 1:]).sum().backward()
    for start, stop in batch.media_spans["pixel_values"].unique(dim=0).tolist():
        assert batch.pixel_values.grad[start:stop].abs().sum() > 0, "pictures without gradient"
    # a picture in each of two turns: what stands before the first reply still runs once
    trainer.set_environment("shapes-env", num_train_examples=16, num_eval_examples=4, turns=2)
    metrics = trainer.step()
    assert 1 - 1e-4 <= metrics["ratio_min"] <= metrics["ratio_max"] <= 1 + 1e-4
    assert metrics["rollouts_dropped"] == 0 and metrics["num_turns"] == 2
    assert metrics["shared_prefix_fraction"] == (family not in PLAIN_IN_TURNS)


@pytest.mark.parametrize("family", WITH_BYTES)
def test_text_that_spells_a_control_token_never_becomes_one(family, made):
    """A placeholder without a picture, a forged turn: whatever a user or a policy writes stays text, or is refused by
    the processors that count placeholders in the text."""
    _, adapter = made(family)
    tokenizer = adapter.tokenizer
    control = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(adapter.placeholder_ids)]
    plain = adapter.encode_prompt(messages(Sample(ONE, question="What is red ?"))).ids
    for token, one in zip(control, tokenizer.convert_tokens_to_ids(control)):
        try:
            forged = adapter.encode_prompt(messages(Sample(ONE, question=f"What is {token} ?"))).ids
        except ValueError:
            continue
        assert forged.count(one) == plain.count(one) and len(forged) > len(plain)


@pytest.mark.parametrize("family", SEEING)
def test_a_medium_that_the_server_lost_or_counted_otherwise_is_an_error_with_both_counts(family, made):
    _, adapter = made(family)
    for change in ("lost", "another size"):
        one = rollout(adapter, Sample(TWO))
        turn = one["trajectory"][0]
        held = adapter.placeholders(turn["tokens"]["prompt_ids"])
        placeholder, count = held.most_common(1)[0]
        if change == "lost":
            turn["prompt"][0]["content"].pop(0)
        else:
            turn["tokens"]["prompt_ids"].remove(placeholder)
            count -= 1
        said = rf"rollout 0 .*: the server's prompt holds .*{count} .*, its \d media have .*mm-processor-kwargs"
        with pytest.raises(ValueError, match=said):
            adapter.build_batch({"outputs": [one], "metadata": {}})


def test_rows_that_see_the_pictures_of_others_end_the_run():
    """As those of Molmo 2 do: its processor numbers the patches of a prompt from 0, and each row of a batch saw the
    first one's. Prompts were run one by one for it, with a warning, and the numbers stayed wrong."""
    model, processor = make_tiny("llava")
    adapter = ProcessorAdapter(processor, model.config)

    class First(type(model.model)):
        def forward(self, pixel_values=None, **inputs):
            pixels = pixel_values if pixel_values is None else pixel_values[:1].expand_as(pixel_values)
            return super().forward(pixel_values=pixels, **inputs)

    model.model.__class__ = First
    samples = [Sample((Picture(seed=seed),), (seed, 3, 5)) for seed in (1, 1, 2, 2)]  # prompts of one length
    batch, everything = build(adapter, samples), torch.ones(4, dtype=torch.bool)
    policy = Policy(model, 1.0, adapter.placeholder_ids)
    with pytest.raises(ValueError, match=r"depend on the rows beside it .*\['pixel_values'\] cannot be joined"):
        micro_batches(policy, batch, everything, MultimodalRLConfig())


@pytest.mark.skipif(not find_spec("torchvision"), reason="without torchvision nothing asks for a video part")
def test_a_checkpoint_saved_without_a_video_part_loads_where_there_must_be_one(tmp_path):
    """vLLM did not start on the checkpoints of QwenVLAdapter."""
    model, adapter = conftest.make_tiny("qwen")
    save_checkpoint(tmp_path / "checkpoint", model, adapter)
    assert AutoProcessor.from_pretrained(tmp_path / "checkpoint").video_processor is not None


def test_a_wrapper_changes_no_published_name(made):
    """The tower's rule reads the model's config, which a wrapper such as DistributedDataParallel does not have."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model, _ = made("llava")
    names = [name for name, _ in published_weights(model)]
    assert [name for name, _ in published_weights(Wrapper(model))] == names
    assert any("vision_tower.vision_model." in name for name in names)


# ---------------------------------------------------------------- video

WATCHING = [name for name in SEEING if getattr(make_tiny(name)[1], "video_token", None) and find_spec("torchvision")]


def video(*seeds: int) -> dict:
    """A content part: frames, a circle of another colour in each."""
    frames = (picture(seed)["image_url"]["url"].partition(",")[2] for seed in seeds)
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(frames)}"}}


def watching(family: str):
    """(model, adapter) whose chat template also takes video, written as pictures are."""
    model, processor = make_tiny(family)
    shown = FAMILIES[family].placeholder.replace(processor.image_token, processor.video_token)
    shown = shown.replace("_of_image", "_of_video")  # GLM's begin and end
    text = "{% elif part['type'] == 'text' %}"
    taken = processor.chat_template.replace(text, f"{{% elif part['type'] == 'video' %}}{shown}{text}")
    processor.chat_template = taken
    return model, ProcessorAdapter(processor, model.config)


@pytest.mark.parametrize("family", WATCHING)
def test_video_of_frames_reaches_the_model_and_is_on_policy(family, tmp_path):
    """Videos in different prompts, a picture and text alone beside them, through verifiers. What a family's own forward
    does not take is left out: videos of different lengths (LLaVA-OneVision), a picture beside a video (GLM-4V)."""
    model, adapter = watching(family)
    second = video(2, 1, 0, 3) if family == "llava_onevision" else video(2, 1)
    prompts = [message(video(0, 1, 2, 3), "Which ?"), message(second), message("no"), message(picture(1), "red ?")]
    prompts = prompts[:3] if family.startswith("glm") else prompts
    with torch.no_grad():
        encoded = [adapter.encode_prompt(prompt) for prompt in prompts]
        batch = model(**adapter.prompt_inputs(encoded)).logits[:, -1]
        for prompt, logits in zip(encoded, batch):
            torch.testing.assert_close(logits, model(**adapter.prompt_inputs([prompt])).logits[0, -1], **SAME)
        other = adapter.encode_prompt(message(video(0, 3, 2, 1), "Which ?"))
        assert other.ids == encoded[0].ids  # nothing but the order of the frames differs
        assert (model(**adapter.prompt_inputs([other])).logits[0, -1] - batch[0]).abs().max() > 100 * SAME["atol"]
    small = dict(rollouts_per_step=16, rollouts_per_example=4, micro_batch_tokens=300, max_tokens=3, eval_examples=0)
    config = MultimodalRLConfig(output_dir=str(tmp_path / "run"), **small)
    rows = Dataset.from_list([{"prompt": prompt, "answer": "red"} for prompt in prompts])
    env = vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[lambda completion: 1.0]))
    metrics = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, config, env=env).step()
    assert 1 - 1e-4 <= metrics["ratio_min"] <= metrics["ratio_max"] <= 1 + 1e-4
    assert metrics["rollouts_dropped"] == 0 and metrics["shared_prefix_fraction"] == 1


@pytest.mark.parametrize("url", ["data:video/mp4;base64,AAAA", "https://example.org/a.mp4", "data:video/jpeg;base64,"])
def test_what_is_no_frames_is_an_error_that_says_what_is(url):
    with pytest.raises(ValueError, match="^(video|image)_url="):
        load_video(url)


def test_frames_of_different_sizes_are_refused():
    urls = [url_of(Picture(size, 40)) for size in (40, 56)]
    with pytest.raises(ValueError, match=r"its frames are of sizes \[\(40, 40\), \(56, 40\)\]"):
        load_video("data:video/jpeg;base64," + ",".join(url.partition(",")[2] for url in urls))


# ---------------------------------------------------------------- what Transformers' classes need


@pytest.mark.parametrize("installed", [False, True])
def test_pillow_beside_a_vllm_server_is_warned_about_where_torchvision_is_not_installed(
    installed, monkeypatch, recwarn
):
    monkeypatch.setattr(vllm_server, "is_torchvision_available", lambda: installed)
    _, adapter = conftest.make_tiny("qwen")  # whose pictures Pillow resizes
    vllm_server.VLLMServer._check_image_backend(SimpleNamespace(adapter=adapter))
    assert ["install torchvision" in str(warning.message).lower() for warning in recwarn] == [True] * (not installed)


def test_without_torchvision_everything_here_works_too():
    """It resizes pictures, and reads video. `--model` of a family that has a video processor failed."""
    tests = "import sys; sys.modules['torchvision'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    some = "qwen3_vl or llava_onevision or gemma3"
    chosen = ["test_families.py", "test_tiny_vlm.py", "-q", "-p", "no:cacheprovider"]
    chosen += ["-k", f"(trains or comes_back) and ({some})"]
    how = dict(cwd=Path(__file__).parent, env={**os.environ, "CI": ""}, capture_output=True, text=True, timeout=900)
    done = subprocess.run([sys.executable, "-c", tests, *chosen], **how)
    assert done.returncode == 0, done.stdout[-3000:]
