"""Tests of images on their way from chat messages into the model's forward, and of the gradient back to the pixels.

    pytest test_multimodal_inputs.py

A batch is held against the model's own forward of each row alone, without padding, spans or sharing, and against the
scores of Transformers' `generate`; the number of placeholders against the model's own vision tower. What no published
model takes (grayscale, audio, ...) goes to a small `nn.Module` of this file, in a trainer that knows nothing about it.
"""

import base64
import copy
import io
import re
import struct
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import adapters
from adapters import LlavaAdapter, ProcessorAdapter
from conftest import DEMONSTRATIONS, count_features, make_tiny, make_trainer, processed
from media import image_urls, load_image, take_spans
from mm_grpo import (
    MultimodalAdapter,
    MultimodalBatch,
    MultimodalGRPOTrainer,
    MultimodalRLConfig,
    group_advantages,
    grpo_loss,
    rollout_metrics,
    score,
    token_weights,
)
from shapes_env import png_data_uri
from shared_prefix import find_shared_prompts
from tiny_vlm import make_tiny_vlm

# Logprobs here are about -4, where float32 numbers lie 5e-7 apart, and batched matrix products sum in another order
# than unbatched ones: 1.2e-6 was the most seen in 500 draws. Another picture moves them by more than 1e-3 (see below).
SAME = dict(rtol=0, atol=1e-5)
MODES = ("RGB", "RGBA", "L", "P", "LA")
QUESTIONS = (
    "Which colour do you see ?",
    "Name the shape of the first picture and the colour of the second picture .",
    "",
)


# ---------------------------------------------------------------- pictures, rollouts, batches


@dataclass(frozen=True)
class Picture:
    """Noise on a random colour, so that two pictures differ as a whole; partly transparent where the mode allows it."""

    width: int = 40
    height: int = 40
    mode: str = "RGB"
    seed: int = 0

    def image(self) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        pixels = rng.integers(0, 256, 4) + rng.integers(-60, 60, (self.height, self.width, 4))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA").convert(self.mode)

    def url(self) -> str:
        return url_of(self)


@cache
def url_of(picture: Picture) -> str:
    return png_data_uri(picture.image())


@dataclass(frozen=True)
class Sample:
    """One turn: what was shown and asked, and what came back (indices into the ids that may be sampled)."""

    pictures: tuple[Picture, ...] = ()
    completion: tuple[int, ...] = (7, 11, 13)
    question: str = QUESTIONS[0]
    example_id: int = 0
    reward: float = 0.0


def messages(sample):
    parts = [{"type": "image_url", "image_url": {"url": picture.url()}} for picture in sample.pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": sample.question}]}]


def turn(adapter, prompt, prompt_ids, completion):
    allowed = [i for i in range(len(adapter.tokenizer)) if i not in adapter.placeholder_ids]
    sampled = [allowed[i % len(allowed)] for i in completion]
    tokens = {"prompt_ids": prompt_ids, "completion_ids": sampled, "completion_logprobs": [-1.5] * len(sampled)}
    return {"prompt": prompt, "tokens": tokens, "is_truncated": False}


def rollout(adapter, *turns):
    """A rollout as verifiers returns it; every later turn continues the token ids of the one before."""
    ids, history, trajectory = [], [], []
    for sample in turns:
        history = [*history, *messages(sample)]
        trajectory.append(turn(adapter, history, ids + adapter.encode_prompt(messages(sample)).ids, sample.completion))
        ids = trajectory[-1]["tokens"]["prompt_ids"] + trajectory[-1]["tokens"]["completion_ids"]
        history = [*history, {"role": "assistant", "content": "red"}]
    return {
        "example_id": turns[0].example_id,
        "reward": turns[0].reward,
        "metrics": {},
        "error": None,
        "is_truncated": False,
        "stop_condition": "max_turns_reached",
        "trajectory": trajectory,
    }


def build(adapter, samples, spoil=None):
    """The batch of these samples; `spoil(rollouts)` may change their rollouts first."""
    rollouts = [rollout(adapter, sample) for sample in samples]
    if spoil:
        spoil(rollouts)
    return adapter.build_batch({"outputs": rollouts, "metadata": {}})


def with_pixel_gradient(batch):
    return replace(batch, pixel_values=batch.pixel_values.clone().requires_grad_())


def sampled(batch, values):
    """The values (B, T) of the batch's sampled tokens, in one row after the other."""
    return values[batch.loss_mask[:, 1:] == 1]


sizes = st.integers(8, 120)
shown = st.lists(st.builds(Picture, sizes, sizes, st.sampled_from(MODES), st.integers(0, 99)), max_size=3).map(tuple)
completions = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
samples = st.builds(Sample, shown, completions, st.sampled_from(QUESTIONS), st.integers(0, 3))
ONE, OTHER, TWO = (
    (Picture(60, 60, seed=1),),
    (Picture(60, 60, seed=9),),
    (Picture(30, 90, seed=2), Picture(110, 100, "LA", seed=3)),
)
TALL, WIDE = (Picture(8, 120, seed=4),), (Picture(120, 8, "P", seed=5),)
MIXED = [Sample(TWO), Sample(()), Sample(ONE, (3,), QUESTIONS[1])]


@st.composite
def grouped(draw):
    """The rows of one to three groups, in any order: groups and completions of different lengths."""
    rows = []
    for example_id in range(draw(st.integers(1, 3))):
        prompt = draw(shown), draw(st.sampled_from(QUESTIONS))
        for completion in draw(st.lists(completions, min_size=1, max_size=4)):
            rows.append(Sample(prompt[0], completion, prompt[1], example_id))
    return draw(st.permutations(rows))


# ---------------------------------------------------------------- the batch's forward is the model's own


def assert_rows_equal_plain(model, adapter, batch, pictures_of_rows):
    """Each row scored in the batch, selected, and by the model's own forward: one row, its images processed at once."""
    in_batch = score(model, batch)
    for row, pictures in enumerate(pictures_of_rows):
        images = [load_image(picture.url()) for picture in pictures]
        media = processed(adapter, images) if images else {}
        ids = batch.input_ids[row, : int(batch.attention_mask[row].sum())]
        if "image_grid_thw" in media:
            media["mm_token_type_ids"] = (ids == adapter.processor.image_token_id).long()[None]
        logprobs = model(input_ids=ids[None], **media).logits[0, :-1].double().log_softmax(-1)  # (T, V)
        plain = logprobs.gather(-1, ids[1:, None])[:, 0].float(), -(logprobs.exp() * logprobs).sum(-1).float()
        for scored, selected, expected in zip(in_batch, score(model, batch.select([row])), plain):
            torch.testing.assert_close(scored[row, : len(ids) - 1], expected, **SAME)
            torch.testing.assert_close(selected[0, : len(ids) - 1], expected, **SAME)


@settings(max_examples=40)
@given(st.lists(samples, min_size=1, max_size=4))
@example([Sample(()), Sample((), (1,))])  # text alone: the vision arguments must be left out
@example(MIXED)  # 2, 0 and 1 images: as many images as rows, and not one a row
@example([Sample(TALL + WIDE), Sample(WIDE + TALL)])  # the same images in another order
@example([Sample(ONE), Sample(ONE + ONE)])  # one picture twice in a row
def test_a_batch_gives_each_row_the_logprobs_of_the_row_alone(tiny, rows):
    with torch.no_grad():
        assert_rows_equal_plain(*tiny, build(tiny[1], rows), [sample.pictures for sample in rows])


def padded_on_the_left(batch):
    padding = (batch.attention_mask == 0).sum(-1).tolist()

    def roll(tensor):
        if tensor.shape != batch.input_ids.shape:
            return tensor
        return torch.stack([row.roll(n) for row, n in zip(tensor, padding)])

    names = ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")
    by_token = {name: roll(getattr(batch, name)) for name in names}
    return replace(
        batch, **by_token, extra_model_kwargs={name: roll(t) for name, t in batch.extra_model_kwargs.items()}
    )


@torch.no_grad()
def test_padding_on_the_left_gives_what_padding_on_the_right_gives(tiny):
    model, adapter = tiny
    right = build(adapter, MIXED)
    left = padded_on_the_left(right)
    assert (left.attention_mask[:, -1] == 1).all()
    for there, here in zip(score(model, left), score(model, right)):
        torch.testing.assert_close(sampled(left, there), sampled(right, here), **SAME)


@torch.no_grad()
def test_images_of_later_turns_stand_at_their_own_placeholders(tiny):
    model, adapter = tiny
    rollouts = [rollout(adapter, Sample(ONE), Sample(TWO, (5, 6))), rollout(adapter, Sample(ONE))]
    batch = adapter.build_batch({"outputs": rollouts, "metadata": {}})
    assert batch.loss_mask.sum(-1).tolist() == [5, 3]
    assert_rows_equal_plain(model, adapter, batch, [ONE + TWO, ONE])


@torch.no_grad()
def test_another_picture_moves_the_logprobs_by_far_more_than_the_tolerance(tiny):
    """Else the comparisons of this file would pass with images lost or exchanged."""
    model, adapter = tiny
    batch = build(adapter, [Sample(ONE), Sample(OTHER), Sample(TWO), Sample(TWO[::-1])])
    logprobs = [values[mask == 1] for values, mask in zip(score(model, batch)[0], batch.loss_mask[:, 1:])]
    for a, b in ((0, 1), (2, 3)):
        assert (logprobs[a] - logprobs[b]).abs().max() > 100 * SAME["atol"]


@torch.no_grad()
@pytest.mark.parametrize("share", [False, True])
def test_score_agrees_with_the_scores_of_transformers_generate(tiny, share):
    """`generate` has its own cache and its own positions. Placeholders are forbidden to both."""
    model, adapter = tiny
    rollouts, expected = [], []
    for sample in MIXED:
        prompt = adapter.encode_prompt(messages(sample))
        greedy = dict(max_new_tokens=8, do_sample=False, suppress_tokens=adapter.placeholder_ids)
        reported = dict(output_scores=True, return_dict_in_generate=True)
        output = model.generate(**adapter.prompt_inputs([prompt]), **greedy, **reported)
        chosen = output.sequences[0, len(prompt.ids) :]
        logprobs = torch.cat(output.scores).double().log_softmax(-1)  # (C, V)
        expected += 2 * [logprobs.gather(-1, chosen[:, None])[:, 0].float()]
        rollouts += 2 * [rollout(adapter, sample)]  # a group of two
        rollouts[-1]["trajectory"][0]["tokens"] |= {
            "completion_ids": chosen.tolist(),
            "completion_logprobs": [-1.0] * len(chosen),
        }
    batch = adapter.build_batch({"outputs": rollouts, "metadata": {}})
    shared_prompts = find_shared_prompts(model, batch, adapter.placeholder_ids) if share else None
    assert share == (shared_prompts is not None)
    logprobs, _ = score(model, batch, 1.0, adapter.placeholder_ids, shared_prompts)
    for row, values in enumerate(expected):
        torch.testing.assert_close(logprobs[row][batch.loss_mask[row, 1:] == 1], values, **SAME)


# ---------------------------------------------------------------- a prompt that is run once


def values_and_gradients(model, adapter, batch, shared_prompts):
    """Logprobs and entropies of the trained tokens, and each parameter's gradient of a fixed random sum of them."""
    trained = batch.loss_mask[:, 1:] != 0
    values = torch.stack([v[trained] for v in score(model, batch, 0.7, adapter.placeholder_ids, shared_prompts)])
    if not values.requires_grad:
        return values, {}
    (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return values.detach(), gradients


def zero_in_exact_arithmetic(name):
    """A key's bias adds the same to all scores of a query, which the softmax removes: its gradient is rounding noise.
    Not where positions rotate the keys after the bias (the language models, Qwen's tower): there it counts."""
    return "vision_tower" in name and name.endswith("k_proj.bias")


@st.composite
def sharing(draw):
    """Groups of rows, and behind them one more row of a prompt that is there already."""
    rows = draw(grouped())
    return [*rows, replace(draw(st.sampled_from(rows)), completion=draw(completions))]


def drop_some(batch, rows, untrained, seed):
    """The batch with that share of its sampled tokens not trained. Each row keeps one, and the rows of the last row's
    prompt keep their first: what stands before it is what they share."""
    generator = torch.Generator().manual_seed(seed)
    loss_mask = batch.loss_mask * (torch.rand(batch.loss_mask.shape, generator=generator) >= untrained)
    for row, sample in enumerate(rows):
        of_last = (sample.pictures, sample.question) == (rows[-1].pictures, rows[-1].question)
        if of_last or not loss_mask[row].any():
            loss_mask[row, batch.loss_mask[row].argmax()] = 1
    return replace(batch, loss_mask=loss_mask)


@settings(max_examples=40)
@given(sharing(), st.integers(0, 99), st.sampled_from([0.0, 0.3]))
@example([Sample(TWO, (1,)), Sample(TWO, (2, 3, 4, 5))], 0, 0.0)  # nothing to run after the prompt in one of the rows
@example([Sample(ONE, (1,)), Sample(ONE, (2,))], 0, 0.0)  # in none
@example([Sample(ONE, (1, 2)), Sample((), (3,), QUESTIONS[1]), Sample(ONE, (4,))], 0, 0.0)  # one prompt has no image
@example([Sample((), (1, 2)), Sample((), (3,))], 0, 0.0)  # none has
@example([Sample(ONE, (1, 2)), Sample(OTHER, (1, 2)), Sample(ONE, (3,))], 0, 0.0)  # nothing but pixels differ
def test_running_a_shared_prompt_once_changes_no_logprob_entropy_or_gradient(tiny, rows, seed, untrained):
    """`untrained` is the share of completion tokens that are not trained on, as a tool's words between two turns."""
    model, adapter = tiny
    batch = drop_some(build(adapter, rows), rows, untrained, seed)
    shared_prompts = find_shared_prompts(model, batch, adapter.placeholder_ids)
    ids = [ids[: mask.argmax()].tolist() for ids, mask in zip(batch.input_ids, batch.loss_mask)]
    distinct = {(sample.pictures, *before) for sample, before in zip(rows, ids)}  # what stands before a trained token
    assert len(shared_prompts.lengths) == len(distinct) < len(rows)
    plain, plain_gradients = values_and_gradients(model, adapter, batch, None)
    shared, shared_gradients = values_and_gradients(model, adapter, batch, shared_prompts)
    with torch.no_grad():  # as the reference policy is scored
        frozen, _ = values_and_gradients(model, adapter, batch, shared_prompts)
    torch.testing.assert_close(shared, plain, rtol=0, atol=2e-5)  # SAME, magnified by the temperature of 0.7
    torch.testing.assert_close(frozen, shared, rtol=0, atol=0)
    assert shared_gradients.keys() == plain_gradients.keys()
    total = torch.stack([gradient.norm() for gradient in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():
        if not zero_in_exact_arithmetic(name):
            # float32 sums in another order. A gradient that nearly cancels is held to the rounding of its terms.
            difference = (shared_gradients[name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm() + 1e-7 * total, f"{name}: {difference / gradient.norm():.1e}"


def test_distinct_prompts_are_run_once_each_with_their_images(tiny):
    model, adapter = tiny
    rows = [
        Sample(ONE, (1,)),
        Sample(TWO, (1,)),
        Sample(ONE, (2, 3)),
        Sample(ONE, (4,), QUESTIONS[1]),
        Sample(TWO, (5,)),
    ]
    shared_prompts = find_shared_prompts(model, build(adapter, rows), adapter.placeholder_ids)
    assert shared_prompts.prompt_of_row.tolist() == [0, 1, 0, 2, 1]
    encoded = [adapter.encode_prompt(messages(sample)) for sample in rows]
    assert shared_prompts.lengths.tolist() == [len(encoded[row].ids) for row in (0, 1, 3)]
    expected, actual = adapter.prompt_inputs([encoded[0], encoded[1], encoded[3]]), shared_prompts.model_inputs()
    assert expected.keys() == actual.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


@torch.no_grad()
@pytest.mark.parametrize("share", [False, True])
def test_nothing_of_one_batch_is_left_when_another_is_scored(tiny, share):
    """Models with M-RoPE keep what they found out about the last prompt's images (`rope_deltas`)."""
    model, adapter = tiny
    batches = [
        build(adapter, 2 * rows) for rows in ([Sample(TWO + ONE)], [Sample(())], [Sample(TALL, (2, 3)), Sample(ONE)])
    ]
    shared_prompts = [
        find_shared_prompts(model, batch, adapter.placeholder_ids) if share else None for batch in batches
    ]
    first = [score(model, batch, shared=shared)[0] for batch, shared in zip(batches, shared_prompts)]
    for before, after in ((2, 0), (1, 2), (0, 1), (1, 0)):
        score(model, batches[before], shared=shared_prompts[before])
        assert torch.equal(score(model, batches[after], shared=shared_prompts[after])[0], first[after])


def stored_by_row(batch):
    name = "image_grid_thw" if "image_grid_thw" in batch.media_spans else "pixel_values"
    by_row = {name: take_spans(batch.media[name], batch.media_spans[name].tolist())}
    changed = by_row if name == "pixel_values" else {"extra_model_kwargs": batch.extra_model_kwargs | by_row}
    return replace(batch, media_spans={n: spans for n, spans in batch.media_spans.items() if n != name}, **changed)


def begins_within_a_picture(adapter):
    """Two rows whose first trained token is a placeholder: no picture is cut in two."""
    batch = build(adapter, 2 * [Sample(TWO)])
    held = (batch.input_ids == adapter.placeholder_ids[0]).int()
    batch.loss_mask = held * (held.cumsum(-1) == held.sum(-1, keepdim=True))
    return batch


CANNOT_SHARE = {  # (model, adapter, batch) -> batch
    "padded on the left": lambda model, adapter, batch: padded_on_the_left(batch),
    "a row not trained": lambda model, adapter, batch: replace(
        batch, loss_mask=batch.loss_mask * torch.tensor([[1], [0], [1]])
    ),
    "media stored by row": lambda model, adapter, batch: stored_by_row(batch),
    "a prompt that ends in an image": lambda model, adapter, batch: begins_within_a_picture(adapter),
    "no prompt twice": lambda model, adapter, batch: batch.select([0, 2]),
    "activation checkpointing": lambda model, adapter, batch: model.train().activation_checkpointing_enable() or batch,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CANNOT_SHARE)
def test_what_cannot_share_prompts_is_left_to_the_plain_forward(tiny, change):
    model, adapter = make_tiny("qwen" if "qwen" in tiny[0].config.model_type else "llava")  # one that may be changed
    batch = build(adapter, [Sample(ONE), Sample(ONE, (1, 2, 3, 4, 5)), Sample(OTHER, (1,))])
    assert find_shared_prompts(model, batch, adapter.placeholder_ids) is not None
    batch = CANNOT_SHARE[change](model, adapter, batch)
    assert find_shared_prompts(model, batch, adapter.placeholder_ids) is None


TURNS = {  # rollouts, a list of turns each; and how many distinct prompts they have
    "the same pictures in later turns": (2 * [[Sample(ONE, (1, 2)), Sample(OTHER, (3,))]], 1),
    "others in each row": ([[Sample(ONE, (1,)), Sample(later, (3, 4))] for later in (OTHER, TWO, ())], 1),
    "pictures in later turns alone": ([[Sample((), (1, 2)), Sample(ONE, (3,))], [Sample((), (4,)), Sample(TWO)]], 1),
    "of other sizes": (2 * [[Sample((Picture(90, 40), *ONE), (1,)), Sample((Picture(40, 120, seed=5),))]], 1),
    "rows of one turn beside them": ([[Sample(ONE), Sample(TWO)], [Sample(ONE, (1,))], *2 * [[Sample(OTHER)]]], 2),
    "three turns": (2 * [[Sample(ONE, (1,)), Sample(TWO, (2,)), Sample(OTHER, (3,))]], 1),
}


@pytest.mark.parametrize(("conversations", "distinct"), TURNS.values(), ids=TURNS)
def test_pictures_behind_a_shared_prompt_change_no_logprob_entropy_or_gradient(tiny, conversations, distinct):
    """What stands before the first sampled token runs once, with its own pictures; all later ones go with their rows.
    Each row's copy of the prompt's pictures is another one where its later pictures are."""
    model, adapter = tiny
    batch = adapter.build_batch({"outputs": [rollout(adapter, *turns) for turns in conversations], "metadata": {}})
    shared = find_shared_prompts(model, batch, adapter.placeholder_ids)
    assert len(shared.lengths) == distinct and shared.later is not None
    plain, plain_gradients = values_and_gradients(model, adapter, batch, None)
    values, gradients = values_and_gradients(model, adapter, batch, shared)
    torch.testing.assert_close(values, plain, rtol=0, atol=2e-5)  # SAME, magnified by the temperature of 0.7
    total = torch.stack([gradient.norm() for gradient in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():
        if not zero_in_exact_arithmetic(name):
            assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * total, name
    seen = []  # pictures that the vision tower is given, a pass each
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    count = lambda module, args, kwargs: seen.append(len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[0]))
    with tower.register_forward_pre_hook(count, with_kwargs=True), torch.no_grad():
        score(model, batch, 0.7, adapter.placeholder_ids, shared, chunked=True)
    first = sum(map(len, {turns[0].pictures for turns in conversations}))
    assert seen == [*[first] * bool(first), sum(len(turn.pictures) for turns in conversations for turn in turns[1:])]


def test_a_model_without_a_key_value_cache_shares_no_prompts():
    model, batch = format_case("flat patches")
    assert find_shared_prompts(model, batch.select([0, 0]), ()) is None


# ---------------------------------------------------------------- placeholders are features


def test_two_images_none_and_one_belong_to_the_rows_that_showed_them(tiny):
    _, adapter = tiny
    batch = build(adapter, MIXED)
    for name, spans in batch.media_spans.items():
        for sample, (start, stop) in zip(MIXED, spans.tolist()):
            own = processed(adapter, [load_image(p.url()) for p in sample.pictures]) if sample.pictures else {}
            assert torch.equal(batch.media[name][start:stop], own.get(name, batch.media[name][:0]))
    images = batch.media_spans.get("image_grid_thw", batch.media_spans["pixel_values"])
    assert images.diff(dim=-1).flatten().tolist() == [2, 0, 1]


CHANGES = {  # of a message's parts, or of the prompt's ids; rows of MIXED where it can happen: the second has no image
    "an image lost": (lambda parts, ids, placeholder: parts.pop(0), (0, 2)),
    "an image too many": (
        lambda parts, ids, placeholder: parts.insert(0, messages(Sample(WIDE))[0]["content"][0]),
        (0, 1, 2),
    ),
    "a placeholder lost": (lambda parts, ids, placeholder: ids.remove(placeholder), (0, 2)),
    "a placeholder too many": (lambda parts, ids, placeholder: ids.insert(1, placeholder), (0, 1, 2)),
}


def spoil(tiny, rollout, name):
    """Change the rollout; (placeholders in its prompt, features of its pictures) are then two numbers."""
    (model, adapter), turn = tiny, rollout["trajectory"][0]
    change, _ = CHANGES[name]
    change(turn["prompt"][0]["content"], turn["tokens"]["prompt_ids"], adapter.processor.image_token_id)
    images = [load_image(url) for url in image_urls(turn["prompt"])]
    features = count_features(model, processed(adapter, images)) if images else 0
    return turn["tokens"]["prompt_ids"].count(adapter.processor.image_token_id), features


@pytest.mark.parametrize(("change", "row"), [(name, row) for name, (_, rows) in CHANGES.items() for row in rows])
def test_a_row_whose_placeholders_are_not_its_images_features_is_left_out_with_both_counts(tiny, change, row):
    model, adapter = tiny
    held, features = spoil(tiny, rollout(adapter, MIXED[row]), change)
    assert held != features
    said = rf"1 of 3 .* rollout {row} .*: .* holds {held}[ ,].* {features}( |$).*features"
    with pytest.warns(UserWarning, match=said):
        batch = build(adapter, MIXED, lambda rollouts: spoil(tiny, rollouts[row], change))
    others = [i for i in range(3) if i != row]
    assert batch.rollout_ids.tolist() == others
    with torch.no_grad():
        assert_rows_equal_plain(model, adapter, batch, [MIXED[i].pictures for i in others])


def test_two_rows_whose_wrong_counts_cancel_are_both_left_out(tiny):
    _, adapter = tiny

    def spoil_both(rollouts):
        spoil(tiny, rollouts[0], "a placeholder lost")
        spoil(tiny, rollouts[2], "a placeholder too many")

    with pytest.warns(UserWarning, match="2 of 3 .* rollout 0 "):
        batch = build(adapter, MIXED, spoil_both)
    assert batch.rollout_ids.tolist() == [1]


def test_text_that_spells_a_control_token_never_becomes_one(tiny):
    """A placeholder without a picture, a forged end of a message. This tokenizer knows whole words alone, and has no
    other ids for them: refused. (One that knows letters spells them: test_families.py.)"""
    _, adapter = tiny
    for token in (adapter.processor.image_token, adapter.tokenizer.eos_token):
        with pytest.raises(ValueError, match="Can't sanitize"):
            adapter.encode_prompt(messages(Sample(ONE, question=f"What is {token} ?")))


def test_a_rollout_that_sampled_a_placeholder_is_dropped_and_the_others_keep_their_images(tiny):
    model, adapter = tiny

    def sample_a_placeholder(rollouts):
        rollouts[1]["trajectory"][0]["tokens"]["completion_ids"][0] = adapter.placeholder_ids[-1]

    with pytest.warns(UserWarning, match=r"1 of 4 .*rollout 1 .*sampled the media placeholder.*logit_bias"):
        batch = build(adapter, [Sample(TWO), Sample(ONE), Sample(()), Sample(TALL)], sample_a_placeholder)
    assert batch.rollout_ids.tolist() == [0, 2, 3]
    assert_rows_equal_plain(model, adapter, batch, [TWO, (), TALL])


# ---------------------------------------------------------------- conversations: a new picture in the second turn


@pytest.fixture(scope="module", params=[(family, count) for family in DEMONSTRATIONS for count in (1, 2)], ids=str)
def conversations(request):
    """(trainer, outputs, batch) of 32 rollouts of two turns, with one or two pictures in the first; tests must leave
    the weights as they are. The stop token is likelier than they say: some replies end with it, others are cut off."""
    family, images_per_prompt = request.param
    env = dict(turns=2, images_per_prompt=images_per_prompt, num_train_examples=8, num_eval_examples=1)
    small = dict(rollouts_per_step=32, rollouts_per_example=4, micro_batch_tokens=100, max_tokens=3)
    trainer = make_trainer(family, env, favoured="eos_token_id", by=2.5, **small)
    outputs = trainer.rollouts.collect()
    return trainer, outputs, trainer.adapter.build_batch(outputs)


def pictures_of(trainer, example_id):
    """The pictures of the first question and of the second, as the dataset has them."""
    row = trainer.env.get_dataset()[example_id]
    return [[load_image(url) for url in urls] for urls in (image_urls(row["prompt"]), [row["info"]["next_picture"]])]


def test_a_conversation_is_one_row_with_all_its_pictures_where_its_ids_go_on_and_two_rows_where_not(conversations):
    """The second prompt holds the first reply's text. Special tokens are left out of a text, so a reply with one of
    them before its end comes back as other ids than were sampled; every other reply must go on in its row."""
    trainer, outputs, batch = conversations
    adapter, kinds = trainer.adapter, Counter()
    for i, rollout in enumerate(outputs["outputs"]):
        one, two = pictures_of(trainer, rollout["example_id"])
        features = [count_features(trainer.model, processed(adapter, pictures)) for pictures in (one, two)]
        (prompt, reply), (later_prompt, later_reply) = (
            (turn["tokens"]["prompt_ids"], turn["tokens"]["completion_ids"]) for turn in rollout["trajectory"]
        )
        assert prompt.count(adapter.processor.image_token_id) == features[0]
        assert later_prompt[len(prompt) :].count(adapter.processor.image_token_id) == features[1]  # between the replies
        stopped = reply[-1] == adapter.tokenizer.eos_token_id
        goes_on = not set(reply[: len(reply) - stopped]) & set(adapter.tokenizer.all_special_ids)
        kinds["split" if not goes_on else "on from a stop" if stopped else "on from a cut"] += 1

        first = [*range(len(prompt), len(prompt) + len(reply))]  # where the sampled tokens stand
        second = [*range(len(later_prompt), len(later_prompt) + len(later_reply))]
        whole = (later_prompt + later_reply, first * goes_on + second, one + two)
        expected = [whole] if goes_on else [(prompt + reply, first, one), whole]
        rows = (batch.rollout_ids == i).nonzero().flatten().tolist()
        assert len(rows) == len(expected)
        for row, (ids, trained, pictures) in zip(rows, expected):
            assert batch.input_ids[row][batch.attention_mask[row] == 1].tolist() == ids
            assert batch.loss_mask[row].nonzero().flatten().tolist() == trained
            for name, spans in batch.media_spans.items():
                own = processed(adapter, pictures)[name]
                assert torch.equal(batch.media[name][slice(*spans[row].tolist())], own)
    assert len(kinds) == 3 and min(kinds.values()) > 1, kinds  # or this would prove little
    metrics = rollout_metrics(outputs, batch)
    assert metrics["rollouts_dropped"] == 0 and metrics["num_turns"] == 2


def test_both_turns_of_a_conversation_are_on_policy(conversations):
    """The server saw each turn by itself, behind a cache; the trainer scores both at once, in one row or in two."""
    trainer, outputs, batch = conversations
    with torch.no_grad():
        logprobs, _ = trainer.policy(batch)
    trained = batch.loss_mask[:, 1:] == 1
    # float32 sums in another order, off by some 1e-6; another picture moves logprobs by more than 1e-3 (tested above)
    torch.testing.assert_close(logprobs[trained], batch.behavior_logprobs[:, 1:][trained], rtol=0, atol=1e-4)
    said = [
        value
        for rollout in outputs["outputs"]
        for turn in rollout["trajectory"]
        for value in turn["tokens"]["completion_logprobs"]
    ]
    held = batch.behavior_logprobs[:, 1:][trained].tolist()
    assert sorted(held) == pytest.approx(sorted(said), rel=1e-6)  # each once, as float32
    other = MultimodalGRPOTrainer(copy.deepcopy(trainer.model), trainer.tokenizer, trainer.adapter, trainer.config)
    metrics = other.update(batch)
    assert 1 - 1e-4 <= metrics["ratio_min"] <= metrics["ratio_max"] <= 1 + 1e-4
    assert metrics["trained_tokens"] == len(said)


def test_the_first_reply_hears_of_the_first_pictures_alone_and_the_second_reply_of_all(conversations):
    trainer, outputs, batch = conversations
    batch = with_pixel_gradient(batch)
    i = next(i for i, rows in Counter(batch.rollout_ids.tolist()).items() if rows == 1)  # one whose row goes on
    row, rollout = batch.rollout_ids.tolist().index(i), outputs["outputs"][i]
    shown = pictures_of(trainer, rollout["example_id"])
    one, two = (len(processed(trainer.adapter, pictures)["pixel_values"]) for pictures in shown)
    start, stop = batch.media_spans["pixel_values"][row].tolist()
    assert stop - start == one + two
    logprobs, _ = score(trainer.model, batch.select([row]))
    lengths = [len(turn["tokens"]["completion_ids"]) for turn in rollout["trajectory"]]
    of_replies = logprobs[batch.loss_mask[[row], 1:] == 1].split(lengths)
    for of_reply, end in zip(of_replies, (start + one, stop)):
        (gradient,) = torch.autograd.grad(of_reply.sum(), batch.pixel_values, retain_graph=True)
        assert (gradient.flatten(1).abs().sum(-1) > 0).nonzero().flatten().tolist() == list(range(start, end))


# ---------------------------------------------------------------- the gradient back to the pixels


@pytest.mark.parametrize("share", [False, True])
def test_a_rows_loss_reaches_all_of_its_own_images_and_no_others(tiny, share):
    model, adapter = tiny
    rows = [*MIXED, Sample(TALL), Sample(TWO, (1, 2))]
    batch = with_pixel_gradient(build(adapter, rows))
    shared_prompts = find_shared_prompts(model, batch, adapter.placeholder_ids) if share else None
    for row, sample in enumerate(rows):
        logprobs, _ = score(model, batch, shared=shared_prompts)
        (gradient,) = torch.autograd.grad(logprobs[row][batch.loss_mask[row, 1:] == 1].sum(), batch.pixel_values)
        reached = gradient.flatten(1).abs().sum(-1) > 0  # (patches or images,)
        start, stop = batch.media_spans["pixel_values"][row].tolist()
        assert reached.nonzero().flatten().tolist() == list(range(start, stop))
        assert (stop > start) == bool(sample.pictures)


def test_rows_without_advantage_send_no_gradient_to_their_images(tiny):
    model, adapter = tiny
    rows = [Sample(ONE, (1, 2), reward=0.7), Sample(ONE, (3,), reward=0.7)]  # equal rewards: nothing to learn
    rows += [Sample(TWO, (1, 2), reward=0.1, example_id=1), Sample(TWO, (4, 5), reward=0.9, example_id=1)]
    batch = with_pixel_gradient(build(adapter, rows))
    logprobs, _ = score(model, batch)
    advantages = group_advantages(batch.rewards, batch.group_ids)
    loss, _ = grpo_loss(logprobs, logprobs.detach(), advantages, token_weights(batch.loss_mask[:, 1:], "dapo"))
    (gradient,) = torch.autograd.grad(loss, batch.pixel_values)
    spans = batch.media_spans["pixel_values"].tolist()
    assert (gradient[slice(*spans[0])] == 0).all()
    assert (gradient[slice(*spans[2])].flatten(1).abs().sum(-1) > 0).all()


def test_a_groups_images_are_stored_once_and_collect_the_gradient_of_all_its_rows(tiny):
    model, adapter = tiny
    rows = [Sample(TWO, (1, 2)), Sample(ONE, (9,)), Sample(TWO, (3, 4)), Sample(TWO, (5,))]
    batch, *alone = (with_pixel_gradient(build(adapter, some)) for some in (rows, *([row] for row in rows)))
    owned = batch.media_spans["pixel_values"].tolist()
    assert owned[0] == owned[2] == owned[3] != owned[1]
    assert len(batch.pixel_values) == len(alone[0].pixel_values) + len(alone[1].pixel_values)
    losses = [sampled(b, score(model, b)[0]).sum() for b in (batch, *alone)]
    torch.testing.assert_close(losses[0], sum(losses[1:]), rtol=1e-6, atol=0)
    gradient, *parts = (torch.autograd.grad(loss, b.pixel_values)[0] for loss, b in zip(losses, (batch, *alone)))
    total = parts[0] + parts[2] + parts[3]
    # float32 forwards of other batch sizes: each gradient is off by some 1e-6 of the largest
    torch.testing.assert_close(gradient[slice(*owned[0])], total, rtol=0, atol=1e-5 * total.abs().max().item())


# ---------------------------------------------------------------- MultimodalBatch


def small_batch(extra=None, **changes):
    """B = 3, L = 5; pixels by row, features by spans, kinds by token."""
    good = dict(
        input_ids=torch.arange(15).reshape(3, 5),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        loss_mask=torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]),
        behavior_logprobs=torch.zeros(3, 5),
        rewards=torch.tensor([0.0, 0.5, 1.0]),
        pixel_values=torch.rand(3, 1, 2, 2),
        extra_model_kwargs={"features": torch.rand(4, 6), "kinds": torch.arange(15).reshape(3, 5), **(extra or {})},
        group_ids=torch.tensor([0, 0, 1]),
        media_spans={"features": torch.tensor([[0, 2], [2, 2], [3, 4]])},
        rollout_ids=torch.tensor([0, 1, 2]),
        is_truncated=torch.tensor([False, False, True]),
    )
    return MultimodalBatch(**{**good, **changes})


def spans(*rows):
    return {"media_spans": {"features": torch.tensor(rows)}}


BY_TOKEN = ("attention_mask", "loss_mask", "behavior_logprobs")
BY_ROW = ("rewards", "group_ids", "rollout_ids", "is_truncated")
BAD = [  # what is wrong, and what the message must say: field, expected, actual
    *[({name: torch.zeros(3, 6)}, name, "(3, 5)", "(3, 6)") for name in BY_TOKEN],
    *[({name: torch.zeros(4)}, name, "(3,)", "(4,)") for name in BY_ROW],
    *[({name: torch.zeros(3, 1)}, name, "(3,)", "(3, 1)") for name in BY_ROW],
    *[
        ({name: [0, 1, 2]}, name, "a tensor", "list")
        for name in ("input_ids", "loss_mask", "rewards", "rollout_ids", "pixel_values")
    ],
    ({"attention_mask": None}, "attention_mask", "(3, 5)", "NoneType"),
    ({"input_ids": torch.arange(15)}, "input_ids", "(B, L)", "(15,)"),
    ({"input_ids": torch.zeros(3, 5, 1, dtype=torch.long)}, "input_ids", "(B, L)", "(3, 5, 1)"),
    ({"input_ids": torch.zeros(3, 5)}, "input_ids", "long", "float32"),
    ({"pixel_values": torch.zeros(2, 1, 2, 2)}, "pixel_values", "3 rows", "(2, 1, 2, 2)"),
    ({"pixel_values": torch.zeros(())}, "pixel_values", "3 rows", "()"),
    ({"extra": {"kinds": torch.zeros(4, 5)}}, "kinds", "3 rows", "(4, 5)"),
    ({"extra": {"kinds": "none"}}, "kinds", "a tensor", "str"),
    ({"extra": {"features": 4.0}}, "features", "a tensor", "float"),
    (spans([0, 1, 2], [0, 1, 2], [0, 1, 2]), "media_spans['features']", "(3, 2)", "(3, 3)"),
    (spans([0, 1], [0, 1]), "media_spans['features']", "(3, 2)", "(2, 2)"),
    (spans([0, 2], [2, 5], [3, 4]), "media_spans['features']", "<= 4 rows", "[2, 5]"),
    (spans([0, 2], [-1, 2], [3, 4]), "media_spans['features']", "0 <= start", "[-1, 2]"),
    (spans([0, 2], [2, 1], [3, 4]), "media_spans['features']", "start <= stop", "[2, 1]"),
    ({"media_spans": {"pictures": torch.zeros(3, 2)}}, "media_spans['pictures']", "features", "'pictures'"),
    ({"loss_mask": torch.tensor([[0, 1, 1, 1, 0]] * 3)}, "loss_mask", "0 on padding", "1 on a padded"),
    ({"loss_mask": torch.tensor([[1, 0, 0, 0, 0]] * 3)}, "loss_mask", "0 at position 0", "1 there"),
    ({"rewards": torch.tensor([0.0, float("inf"), 1.0])}, "rewards", "finite", "inf"),
    ({"behavior_logprobs": torch.full((3, 5), float("nan"))}, "behavior_logprobs", "finite", "NaN"),
]


@pytest.mark.parametrize("changes, field, expected, actual", BAD, ids=[f"{i}-{bad[1]}" for i, bad in enumerate(BAD)])
def test_an_impossible_batch_is_refused_by_field_expected_and_actual(changes, field, expected, actual):
    field, expected, actual = map(re.escape, (field, expected, actual))
    with pytest.raises(ValueError, match=rf"^{field}: expected .*{expected}.* got .*{actual}"):
        small_batch(**changes)


def all_tensors(batch):
    named = {f.name: getattr(batch, f.name) for f in fields(batch)}
    extra, spans = named.pop("extra_model_kwargs"), named.pop("media_spans")
    return {**named, **extra, **{f"spans of {name}": t for name, t in spans.items()}}


def test_to_moves_every_tensor_but_the_spans_and_len_counts_rows():
    """Spans are read by Python, row by row: on a GPU each look at one would wait for it."""
    batch = small_batch()
    elsewhere, here = batch.to(torch.device("meta")), batch.to("cpu")  # a device without data, and where they are
    for name, tensor in all_tensors(batch).items():
        assert all_tensors(elsewhere)[name].device.type == ("cpu" if name.startswith("spans of") else "meta"), name
        assert all_tensors(elsewhere)[name].shape == tensor.shape and torch.equal(all_tensors(here)[name], tensor)
    assert len(batch) == len(elsewhere) == len(here) == 3 and len(batch.select([2])) == 1


@settings(max_examples=25)
@given(st.lists(samples, min_size=1, max_size=4), st.data())
def test_selected_rows_are_the_batch_that_is_built_of_them(tiny, rows, data):
    """Any rows in any order, some of them twice: as if the others had never been there."""
    _, adapter = tiny
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    batch = build(adapter, rows)
    before = {name: tensor.clone() for name, tensor in all_tensors(batch).items() if tensor is not None}
    chosen, built = batch.select(picked), build(adapter, [rows[i] for i in picked])
    L = built.input_ids.shape[1]

    def content(batch):
        named = {
            name: getattr(batch, name)
            for name in ("loss_mask", "behavior_logprobs", "rewards", "group_ids", "is_truncated")
        }
        spans = {f"spans of {name}": spans for name, spans in batch.media_spans.items() if len(batch.media[name])}
        named |= batch.model_inputs() | spans
        return {name: t[:, :L] if t.shape == batch.input_ids.shape else t for name, t in named.items()}

    actual, expected = content(chosen), content(built)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert (chosen.attention_mask[:, L:] == 0).all()
    assert chosen.rollout_ids.tolist() == picked  # which rows they were is not forgotten
    assert all(torch.equal(all_tensors(batch)[name], tensor) for name, tensor in before.items())  # nothing was changed


# ---------------------------------------------------------------- any modality

IMAGE, VOCABULARY, WIDTH, FEATURES = 1, 20, 16, 12  # IMAGE: the placeholder, one an image
IMAGES = torch.tensor([2, 0, 1, 1, 3])  # of each row, where they are stored as spans
# patches of each image
GRIDS = torch.tensor([[1, 2, 2], [1, 1, 3], [1, 4, 2], [1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2]])
SIZES = torch.tensor([[2, 2], [4, 2], [2, 6], [4, 4], [2, 2], [2, 4], [6, 2]])  # in pixels; a tile is 2 x 2
TILES = (SIZES // 2).prod(-1)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def sum_of_images(images, pixels, sizes, edge=1):
    """(B, FEATURES): the sum of each row's patches or tiles, `edge` long; a model finds by counting which are whose."""
    if pixels is None:  # left out, as no row has an image
        return torch.zeros(len(images), FEATURES)
    owner = torch.arange(len(images)).repeat_interleave(images).repeat_interleave((sizes // edge).prod(-1))
    return pixels.new_zeros(len(images), FEATURES).index_add(0, owner, pixels.flatten(1))


# What a model makes of its media, (B, FEATURES) or by token (B, L, FEATURES); the media; how many of their rows are an
# image's, where they are stored as spans.
FORMATS = {
    "(B, C, H, W)": (lambda images, pixel_values: pixel_values.flatten(1), {"pixel_values": noise(5, 3, 2, 2)}, {}),
    "(B, N, C, H, W)": (
        lambda images, pixel_values: (pixel_values[:, 0] - 2 * pixel_values[:, 1]).flatten(1),
        {"pixel_values": noise(5, 2, 3, 2, 2)},
        {},
    ),
    "grayscale": (lambda images, pixel_values: pixel_values.flatten(1), {"pixel_values": noise(5, 1, 3, 4)}, {}),
    "flat patches": (
        lambda images, pixel_values=None, image_grid_thw=None: sum_of_images(images, pixel_values, image_grid_thw),
        {"pixel_values": noise(int(GRIDS.prod(-1).sum()), 12), "image_grid_thw": GRIDS},
        {"pixel_values": GRIDS.prod(-1), "image_grid_thw": torch.ones(7, dtype=torch.long)},
    ),
    "tiles": (
        lambda images, pixel_values=None, image_sizes=None: sum_of_images(images, pixel_values, image_sizes, edge=2),
        {"pixel_values": noise(int(TILES.sum()), 3, 2, 2), "image_sizes": SIZES},
        {"pixel_values": TILES, "image_sizes": torch.ones(7, dtype=torch.long)},
    ),
    "image embeddings": (
        lambda images, image_embeddings: image_embeddings.sum(1),
        {"image_embeddings": noise(5, 4, 12)},
        {},
    ),
    "aspect ratios": (
        lambda images, pixel_values, aspect_ratios: (
            pixel_values.flatten(1) * aspect_ratios[:, :1] + aspect_ratios[:, 1:]
        ),
        {"pixel_values": noise(5, 3, 2, 2), "aspect_ratios": noise(5, 2)},
        {},
    ),
    "by token": (
        lambda images, token_features: token_features.unsqueeze(-1).expand(-1, -1, FEATURES),
        {"token_features": noise(5, 9)},
        {},
    ),
    "audio": (lambda images, input_features: input_features.mean(-1), {"input_features": noise(5, 12, 30)}, {}),
}


class AnyVLM(nn.Module):
    """A causal language model of running means; what a row sees is added to the embedding of each of its tokens."""

    def __init__(self, sees):
        super().__init__()
        self.sees, self.embedding = sees, nn.Embedding(VOCABULARY, WIDTH)
        self.projection, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, attention_mask, **media):
        seen = self.projection(self.sees((input_ids == IMAGE).sum(-1), **media))
        hidden = self.embedding(input_ids) + (seen if seen.ndim == 3 else seen.unsqueeze(1))
        mask = attention_mask.unsqueeze(-1)
        return self.head(torch.tanh((hidden * mask).cumsum(1) / mask.cumsum(1)))  # (B, L, VOCABULARY)


class NoAdapter(MultimodalAdapter):
    build_batch = None  # the batch is at hand


def format_case(name):
    """A model that takes this format, and five rows of two groups for it, off-policy enough that the ratio matters."""
    sees, media, rows_of_image = FORMATS[name]
    media = {key: tensor.clone().requires_grad_(tensor.is_floating_point()) for key, tensor in media.items()}
    torch.manual_seed(0)
    model, column, lengths = AnyVLM(sees), torch.arange(9), torch.tensor([[9], [6], [7], [9], [8]])
    ids = torch.where(column < IMAGES[:, None], IMAGE, torch.randint(2, VOCABULARY, (5, 9)))
    media_spans = {}
    for key, rows in rows_of_image.items():
        stops = torch.stack([part.sum() for part in rows.split(IMAGES.tolist())]).cumsum(0)
        media_spans[key] = torch.stack([torch.cat([stops.new_zeros(1), stops[:-1]]), stops], dim=-1)
    batch = MultimodalBatch(
        input_ids=ids,
        attention_mask=(column < lengths).long(),
        loss_mask=((column >= 4) & (column < lengths)).long(),
        behavior_logprobs=torch.zeros(5, 9),
        rewards=torch.tensor([0.0, 1.0, 0.3, 0.2, 0.9]),
        group_ids=torch.tensor([0, 0, 0, 1, 1]),
        pixel_values=media.pop("pixel_values", None),
        extra_model_kwargs=media,
        media_spans=media_spans,
    )
    now = nn.functional.pad(score(model, batch)[0].detach(), (1, 0))
    return model, replace(batch, behavior_logprobs=now + 0.1 * torch.randn(5, 9))


@pytest.mark.parametrize("name", FORMATS)
def test_any_modality_trains_and_micro_batches_change_neither_loss_nor_gradient(name):
    """A model of unknown family, in a trainer as it is configured by default."""
    results = []
    for micro_batch_tokens in (45, 18, 1):  # of rows of 9
        model, batch = format_case(name)
        before = [p.detach().clone() for p in model.parameters()]
        config = MultimodalRLConfig(micro_batch_tokens=micro_batch_tokens, learning_rate=1e-2, mismatch_threshold=1.0)
        metrics = MultimodalGRPOTrainer(model, None, NoAdapter(None), config, server=object()).update(batch)
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        gradients = [tensor.grad for tensor in batch.media.values() if tensor.requires_grad]
        results.append((metrics["loss"], metrics["grad_norm"], gradients))
        for gradient in gradients:
            assert (gradient.flatten(1).abs().sum(-1) > 0).all(), "a row of media without gradient"
    for loss, grad_norm, gradients in results[1:]:  # float32 sums of 20 tokens' losses in another order
        assert (loss, grad_norm) == pytest.approx(results[0][:2], rel=1e-5)
        for gradient, expected in zip(gradients, results[0][2]):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ---------------------------------------------------------------- pixels


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
@example(1, 1, 0)
def test_png_data_uris_keep_every_pixel(width, height, seed):
    image = Picture(width, height, seed=seed).image()
    loaded = load_image(png_data_uri(image))
    assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.asarray(image))


def with_a_transparent_colour(image, colour):
    image.info["transparency"] = colour  # as PNG stores it
    return image


OF_EVERY_MODE = {
    **{mode: Picture(mode=mode, seed=3).image() for mode in MODES},
    "P, one colour transparent": with_a_transparent_colour(Picture(seed=3).image().quantize(8), 0),
    "L, one grey transparent": with_a_transparent_colour(Picture(mode="L", seed=3).image(), 60),
}


@pytest.mark.parametrize("image", OF_EVERY_MODE.values(), ids=OF_EVERY_MODE)
def test_every_mode_becomes_rgb_and_whatever_is_transparent_becomes_white(image):
    """Server and trainer must see the same pixels, and vLLM lays transparency of every mode on white."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    loaded = load_image(png_data_uri(image))
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)))


def test_a_photo_taken_sideways_is_turned_upright():
    """Cameras store the turn beside the pixels (EXIF), and vLLM applies it."""
    image, exif, buffer = Picture(30, 50).image(), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    image.save(buffer, format="PNG", exif=exif)
    loaded = load_image("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    assert np.array_equal(np.asarray(loaded), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def bmp_that_claims(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, format="BMP")
    data = buffer.getvalue()[:18] + struct.pack("<ii", width, height) + buffer.getvalue()[26:]
    return "data:image/bmp;base64," + base64.b64encode(data).decode()


PNG = Picture().url()
BAD_URLS = {
    "a web address": "https://example.org/a.png",
    "a file": "file:///etc/hostname",
    "a path": "/etc/hostname",
    "nothing": "",
    "another type": "data:text/plain;base64,aGVsbG8=",
    "a picture of another type": PNG.replace("image/png", "application/pdf"),
    "no base64": PNG.replace(";base64", ""),
    "letters outside base64": "data:image/png;base64,####",
    "bytes of no image": "data:image/png;base64,aGVsbG8=",
    "no bytes": "data:image/png;base64,",
    "half an image": PNG[: len(PNG) // 2 // 4 * 4 + 2],
    "more pixels than Pillow will open": bmp_that_claims(30_000, 30_000),
}


@pytest.mark.parametrize("url", BAD_URLS.values(), ids=BAD_URLS)
def test_what_is_no_image_is_an_error_that_names_image_url(url):
    with pytest.raises(ValueError, match="^image_url="):
        load_image(url)


@pytest.mark.parametrize(
    "size", [(8, 8), (8, 120), (120, 8), (1, 100), (100, 3), (8, 1500), (1000, 10), (119, 61), (300, 200)]
)
def test_placeholders_are_as_many_as_the_vision_tower_gives_features(tiny, size):
    model, adapter = tiny
    ids = adapter.encode_prompt(messages(Sample((Picture(*size),)))).ids
    features = count_features(model, processed(adapter, [load_image(url_of(Picture(*size)))]))
    assert ids.count(adapter.processor.image_token_id) == features


@torch.no_grad()
def test_a_llava_that_keeps_the_class_token_has_a_placeholder_for_it_and_scores_like_the_plain_model():
    model, tokenizer, image_processor = make_tiny_vlm("llava")
    model.config.vision_feature_select_strategy = "full"  # the published checkpoints say "default": without it
    adapter = LlavaAdapter(tokenizer, image_processor, model.config)
    ids = adapter.encode_prompt(messages(Sample((Picture(),)))).ids
    features = count_features(model, processed(adapter, [load_image(Picture().url())]))
    assert ids.count(adapter.processor.image_token_id) == features == 1 + 2 * 2  # 56 x 56 pixels are 2 x 2 patches
    assert_rows_equal_plain(model, adapter, build(adapter, MIXED), [sample.pictures for sample in MIXED])


def test_encoded_prompts_are_kept_within_a_bound_of_bytes_the_oldest_go_first(tiny, monkeypatch):
    """Images were kept by number, 64 of them: 18 GB of a phone's photos, and too few of small ones."""
    adapter = ProcessorAdapter(tiny[1].processor)  # keeps none yet
    asked = [messages(Sample((Picture(56, 56, seed=seed),))) for seed in range(5)]
    one = adapter.encode_prompt(asked[0])
    monkeypatch.setattr(adapters, "KEPT_BYTES", int(2.5 * one.nbytes))
    kept = [adapter.encode_prompt(prompt) for prompt in asked]
    assert kept[0] is one and len(adapter.kept) == 2 and adapter.kept_bytes == 2 * one.nbytes
    assert adapter.encode_prompt(asked[-1]) is kept[-1]  # not made again
    again = adapter.encode_prompt(asked[0])  # made again, the same
    assert again is not one and torch.equal(again.media.tensors["pixel_values"], one.media.tensors["pixel_values"])
    monkeypatch.setattr(adapters, "KEPT_BYTES", 1)
    assert adapter.encode_prompt(asked[2]) is adapter.encode_prompt(asked[2])  # one is kept, however large


def test_prompts_with_the_same_media_share_them_whatever_else_they_say(tiny):
    """So a batch finds the pictures that the server in this process asked for, and stores them once."""
    adapter = ProcessorAdapter(tiny[1].processor)
    one, other = (adapter.encode_prompt(messages(Sample(TWO, question=question))) for question in QUESTIONS[:2])
    assert one.media is other.media and one.ids != other.ids
    calls = []
    adapter._call_processor = lambda *_: calls.append(1)  # what is asked for again is a mistake
    rollouts = [rollout(tiny[1], Sample(TWO, question=question)) for question in QUESTIONS[:2]]
    batch = adapter.build_batch({"outputs": rollouts, "metadata": {}})
    assert calls == [] and torch.equal(batch.media["pixel_values"], one.media.tensors["pixel_values"])
