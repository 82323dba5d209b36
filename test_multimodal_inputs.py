"""Tests of images on their way from chat messages into the model's forward, and of the gradient back to the pixels.

    pytest test_multimodal_inputs.py

A batch is held against the model's own forward of each row alone, without padding, spans or sharing, and against the
scores of Transformers' `generate`; counts of image features against the model's own vision tower. What no published model
takes (five-dimensional pixels, grayscale, audio, ...) goes to a small `nn.Module` of this file.
"""

import base64
import io
import re
import warnings
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from adapters import load_image
from conftest import make_tiny
from mm_grpo import (
    MultimodalAdapter,
    MultimodalBatch,
    MultimodalGRPOTrainer,
    MultimodalRLConfig,
    group_advantages,
    grpo_loss,
    score,
    shared_prefixes,
    take_spans,
    token_weights,
)
from shapes_env import COLOURS, draw_shape, png_data_uri

# Logprobs here are about -4, where float32 numbers lie 5e-7 apart; batched and unbatched matrix products sum in another
# order through 3 to 4 layers. Measured: 1.5e-6 at most. A picture exchanged for another one moves them by 1e-3 and more.
SAME = dict(rtol=0, atol=1e-5)
QUESTIONS = ("Which colour do you see ?", "Name the shape of the first picture and the colour of the second picture .", "")
MODES = ("RGB", "RGBA", "L", "P", "LA")


# ---------------------------------------------------------------- pictures, rollouts, batches


@dataclass(frozen=True)
class Picture:
    """A picture of coloured noise: a random hue, so that two pictures differ as a whole, with random pixels on it."""

    width: int = 40
    height: int = 40
    mode: str = "RGB"
    seed: int = 0

    def image(self) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        pixels = rng.integers(0, 256, 4) + rng.integers(-60, 60, (self.height, self.width, 4))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA").convert(self.mode)

    @lru_cache(maxsize=None)
    def url(self) -> str:
        return png_data_uri(self.image())


@dataclass(frozen=True)
class Sample:
    """A rollout of one turn: what was shown, what was asked, what came back (indices into the ids that may be sampled)."""

    pictures: tuple[Picture, ...] = ()
    completion: tuple[int, ...] = (7, 11, 13)
    question: str = QUESTIONS[0]
    example_id: int = 0
    reward: float = 0.0


def messages(sample):
    parts = [{"type": "image_url", "image_url": {"url": picture.url()}} for picture in sample.pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": sample.question}]}]


def sampled_ids(adapter, sample):
    allowed = [i for i in range(len(adapter.tokenizer)) if i not in adapter.placeholder_ids]
    return [allowed[i % len(allowed)] for i in sample.completion]


def step(adapter, prompt, prompt_ids, completion_ids):
    tokens = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "completion_logprobs": [-1.5] * len(completion_ids)}
    return {"prompt": prompt, "tokens": tokens, "is_truncated": False}


def rollout(adapter, sample):
    """A rollout as verifiers returns it."""
    turn = step(adapter, messages(sample), adapter.encode_prompt(messages(sample)).ids, sampled_ids(adapter, sample))
    return {
        "example_id": sample.example_id, "reward": sample.reward, "metrics": {}, "error": None, "is_truncated": False,
        "stop_condition": "max_turns_reached", "trajectory": [turn],
    }  # fmt: skip


def two_turns(adapter, sample, later):
    """The rollout of a sample that goes on: the environment answers with `later`, and the policy speaks once more."""
    result = rollout(adapter, sample)
    ids = [i for part in ("prompt_ids", "completion_ids") for i in result["trajectory"][0]["tokens"][part]]
    ids += adapter.encode_prompt(messages(later)).ids
    history = [*messages(sample), {"role": "assistant", "content": "red"}, *messages(later)]
    result["trajectory"].append(step(adapter, history, ids, sampled_ids(adapter, later)))
    return result


def build(adapter, samples, change=None):
    """The batch of these samples; `change(rollouts)` may spoil them first."""
    rollouts = [rollout(adapter, sample) for sample in samples]
    if change:
        change(rollouts)
    return adapter.build_batch({"outputs": rollouts, "metadata": {}})


def row_ids(batch, row):
    return batch.input_ids[row, : int(batch.attention_mask[row].sum())]


pictures = st.builds(
    Picture, width=st.integers(8, 120), height=st.integers(8, 120), mode=st.sampled_from(MODES), seed=st.integers(0, 99)
)
shown = st.lists(pictures, max_size=3).map(tuple)
completions = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
samples = st.builds(Sample, shown, completions, st.sampled_from(QUESTIONS), st.integers(0, 3))
ONE, TWO = (Picture(seed=1),), (Picture(30, 90, seed=2), Picture(110, 20, "LA", seed=3))
TALL, WIDE = (Picture(8, 120, seed=4),), (Picture(120, 8, "P", seed=5),)
MIXED = [Sample(TWO), Sample(()), Sample(ONE, (3,), QUESTIONS[1])]


@st.composite
def grouped(draw):
    """The rows of one to three groups in any order: groups and completions of different lengths."""
    rows = []
    for example_id in range(draw(st.integers(1, 3))):
        shared, question = draw(shown), draw(st.sampled_from(QUESTIONS))
        for completion in draw(st.lists(completions, min_size=1, max_size=4)):
            rows.append(Sample(shared, completion, question, example_id))
    return draw(st.permutations(rows))


# ---------------------------------------------------------------- the batch's forward is the model's own


def plain_row(model, adapter, pictures, ids):
    """Logprobs and entropies (L - 1,) by the model's own forward of one row: one call of the image processor, no batch."""
    media = adapter.image_processor(images=[load_image(p.url()) for p in pictures], return_tensors="pt") if pictures else {}
    if "image_grid_thw" in media:
        media["mm_token_type_ids"] = (ids == adapter.image_token_id).long()[None]
    logprobs = model(input_ids=ids[None], **media).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def assert_rows_equal_plain(model, adapter, batch, pictures_of_rows):
    with torch.no_grad():
        scored = score(model, batch)
        for row, shown_there in enumerate(pictures_of_rows):
            ids = row_ids(batch, row)
            alone = plain_row(model, adapter, shown_there, ids)
            by_score = score(model, batch.select([row]))
            for values, expected, selected in zip(scored, alone, by_score):
                torch.testing.assert_close(values[row, : len(ids) - 1], expected.float(), **SAME)
                torch.testing.assert_close(selected[0, : len(ids) - 1], expected.float(), **SAME)


@settings(max_examples=40)
@given(st.lists(samples, min_size=1, max_size=4))
@example([Sample(())])  # text alone: the vision arguments must be left out
@example(MIXED)  # 2, 0 and 1 images in one batch: as many images as rows, and not one a row
@example([Sample(()), Sample(())])
@example([Sample(TALL + WIDE), Sample(WIDE + TALL)])  # the same images in another order are other rows
@example([Sample(ONE), Sample(ONE + ONE)])  # one picture twice in a row
def test_a_batch_gives_each_row_the_logprobs_of_the_row_alone(tiny, rows):
    model, adapter = tiny
    assert_rows_equal_plain(model, adapter, build(adapter, rows), [sample.pictures for sample in rows])


def test_images_of_later_turns_reach_the_model_at_their_own_placeholders(tiny):
    model, adapter = tiny
    first, later = Sample(ONE), Sample(TWO, (5, 6))
    batch = adapter.build_batch({"outputs": [two_turns(adapter, first, later), rollout(adapter, first)], "metadata": {}})
    assert_rows_equal_plain(model, adapter, batch, [ONE + TWO, ONE])
    assert batch.loss_mask.sum(-1).tolist() == [5, 3]


def test_another_picture_moves_the_logprobs_by_far_more_than_the_tolerances_here(tiny):
    """Else every comparison in this file would pass with images lost."""
    model, adapter = tiny
    batch = build(adapter, [Sample(ONE), Sample((Picture(seed=9),)), Sample(TWO), Sample(TWO[::-1])])
    logprobs, _ = score(model, batch)
    for a, b in ((0, 1), (2, 3)):
        sampled = batch.loss_mask[a, 1:] * batch.loss_mask[b, 1:] == 1
        assert (logprobs[a] - logprobs[b])[sampled].abs().max() > 100 * SAME["atol"]


@pytest.mark.parametrize("share_prefix", [False, True])
def test_score_agrees_with_the_scores_of_transformers_generate(tiny, share_prefix):
    """`generate` knows nothing of this project: its own cache, its own positions. Placeholders are forbidden in both."""
    model, adapter = tiny
    rows, expected = [], []
    for sample in MIXED:
        inputs = adapter.prompt_inputs([adapter.encode_prompt(messages(sample))])
        length = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=adapter.placeholder_ids,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        chosen = output.sequences[0, length:]
        logprobs = torch.stack(output.scores).squeeze(1).double().log_softmax(-1)  # (C, V)
        expected.append(logprobs.gather(-1, chosen[:, None])[:, 0].float())
        rows.append(rollout(adapter, sample))
        rows[-1]["trajectory"][0] = step(adapter, messages(sample), inputs["input_ids"][0].tolist(), chosen.tolist())
    batch = adapter.build_batch({"outputs": rows, "metadata": {}})
    logprobs, _ = score(model, batch, placeholder_ids=adapter.placeholder_ids, share_prefix=share_prefix)
    for row, values in enumerate(expected):
        torch.testing.assert_close(logprobs[row][batch.loss_mask[row, 1:] == 1], values, **SAME)


# ---------------------------------------------------------------- a prompt that is run once


def values_and_gradients(model, adapter, batch, share_prefix):
    """Logprobs and entropies of the trained tokens, and each parameter's gradient of a fixed random sum of them."""
    logprobs, entropies = score(model, batch, 0.7, adapter.placeholder_ids, share_prefix)
    trained = batch.loss_mask[:, 1:] != 0
    values = torch.stack([logprobs[trained], entropies[trained]])
    (torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * values).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return values.detach(), gradients


def zero_in_exact_arithmetic(name):
    """A key's bias adds the same number to all scores of a query, which the softmax removes: its gradient is rounding
    noise. Not so where positions rotate the keys after the bias: there it counts, and is compared."""
    return "vision_tower" in name and name.endswith("k_proj.bias")


@settings(max_examples=40)
@given(grouped(), st.integers(0, 2**16), st.sampled_from([0.0, 0.3]))
@example([Sample(TWO, (1,)), Sample(TWO, (2, 3, 4, 5))], 0, 0.0)  # nothing to run after the prompt in one of the rows
@example([Sample(ONE, (1,)), Sample(ONE, (2,))], 0, 0.0)  # in none
@example([Sample(ONE, (1, 2)), Sample((), (3, 4), QUESTIONS[1])], 0, 0.0)  # prompts of different lengths, one has no image
@example([Sample((), (1, 2)), Sample((), (3,))], 0, 0.0)
@example([Sample(TWO, (1, 2)), Sample(TWO[::-1], (1, 2))], 0, 0.0)  # prompts that differ in nothing but their pixels
def test_scoring_a_shared_prompt_once_changes_no_logprob_entropy_or_gradient(tiny, rows, seed, untrained):
    """`untrained` is the share of sampled tokens that are not trained on, as a tool's words between two turns."""
    model, adapter = tiny
    batch = build(adapter, rows)
    kept = torch.rand(batch.loss_mask.shape, generator=torch.Generator().manual_seed(seed)) >= untrained
    batch = replace(batch, loss_mask=batch.loss_mask * kept)
    plain, plain_gradients = values_and_gradients(model, adapter, batch, share_prefix=False)
    shared, shared_gradients = values_and_gradients(model, adapter, batch, share_prefix=True)
    torch.testing.assert_close(shared, plain, rtol=0, atol=2e-5)  # SAME, and the temperature of 0.7 magnifies
    with torch.no_grad():  # as the reference policy is scored
        logprobs, entropies = score(model, batch, 0.7, adapter.placeholder_ids, share_prefix=True)
    trained = batch.loss_mask[:, 1:] != 0
    torch.testing.assert_close(torch.stack([logprobs[trained], entropies[trained]]), plain, rtol=0, atol=2e-5)
    assert shared_gradients.keys() == plain_gradients.keys()
    total = torch.stack([g.norm() for g in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():
        if not zero_in_exact_arithmetic(name):
            # 1e-4 of the parameter's own gradient; a gradient that nearly cancels is held to the rounding of its terms
            difference = (shared_gradients[name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm() + 1e-6 * total, f"{name}: {difference / gradient.norm():.1e}"


def test_distinct_prompts_are_run_once_each(tiny):
    _, adapter = tiny
    rows = [Sample(ONE, (1,)), Sample(TWO, (1,)), Sample(ONE, (2, 3)), Sample(ONE, (4,), QUESTIONS[1]), Sample(TWO, (5,))]
    batch = build(adapter, rows)
    prompts, owner, lengths = shared_prefixes(batch, adapter.placeholder_ids)
    assert owner.tolist() == [0, 1, 0, 2, 1]
    assert lengths.tolist() == [len(adapter.encode_prompt(messages(sample)).ids) for sample in rows]
    for prompt, row in enumerate((0, 1, 3)):  # padded on the left, the images taken along
        encoded = adapter.encode_prompt(messages(rows[row]))
        assert prompts.input_ids[prompt][prompts.attention_mask[prompt] == 1].tolist() == encoded.ids
        assert prompts.attention_mask[prompt, -1] == 1
        pixels = torch.cat([image.tensors["pixel_values"] for image in encoded.images])
        assert torch.equal(take_spans(prompts.pixel_values, prompts.media_spans["pixel_values"][[prompt]].tolist()), pixels)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_nothing_of_one_batch_is_left_when_the_next_is_scored(tiny, share_prefix):
    """Models with M-RoPE keep what they found out about the last prompt's images (`rope_deltas`)."""
    model, adapter = tiny
    batches = [build(adapter, rows) for rows in ([Sample(TWO + ONE), Sample(ONE)], [Sample(())], [Sample(TALL, (2, 3))] * 3)]
    first = [score(model, batch, share_prefix=share_prefix)[0] for batch in batches]
    for one, other in ((2, 0), (1, 2), (0, 1)):
        score(model, batches[one], share_prefix=not share_prefix)
        assert torch.equal(score(model, batches[other], share_prefix=share_prefix)[0], first[other])


def padded_on_the_left(adapter, batch):
    moved = {name: getattr(batch, name).clone() for name in ("input_ids", "attention_mask", "loss_mask")}
    per_token = {name: t.clone() for name, t in batch.extra_model_kwargs.items() if name == "mm_token_type_ids"}
    for row in range(len(batch)):
        padding = int((batch.attention_mask[row] == 0).sum())
        for tensor in (*moved.values(), *per_token.values()):
            tensor[row] = tensor[row].roll(padding)
    return replace(batch, **moved, extra_model_kwargs={**batch.extra_model_kwargs, **per_token})


def with_a_row_not_trained(adapter, batch):
    return replace(batch, loss_mask=batch.loss_mask * torch.tensor([[1], [0]]))


def with_media_stored_by_row(adapter, batch):
    name = "image_grid_thw" if "image_grid_thw" in batch.media_spans else "pixel_values"
    return replace(batch, media_spans={n: spans for n, spans in batch.media_spans.items() if n != name})


def with_an_image_in_a_later_turn(adapter, batch):
    rollouts = [two_turns(adapter, Sample(ONE), Sample(TWO)), rollout(adapter, Sample(ONE))]
    return adapter.build_batch({"outputs": rollouts, "metadata": {}})


@pytest.mark.parametrize(
    "change", [padded_on_the_left, with_a_row_not_trained, with_media_stored_by_row, with_an_image_in_a_later_turn]
)
def test_what_cannot_share_a_prompt_is_scored_by_the_plain_forward(tiny, change):
    model, adapter = tiny
    batch = build(adapter, [Sample(ONE), Sample((Picture(seed=9),), (1, 2, 3, 4, 5))])
    assert shared_prefixes(batch, adapter.placeholder_ids) is not None
    batch = change(adapter, batch)
    assert shared_prefixes(batch, adapter.placeholder_ids) is None
    for way, plain in zip(score(model, batch, share_prefix=True), score(model, batch)):
        assert torch.equal(way, plain)


# ---------------------------------------------------------------- placeholders are features


def test_the_batch_holds_two_no_and_one_image_where_rows_have_them(tiny):
    _, adapter = tiny
    batch = build(adapter, MIXED)
    for name, spans in batch.media_spans.items():
        for row, sample in enumerate(MIXED):
            own = [image.tensors[name] for image in adapter.encode_prompt(messages(sample)).images]
            assert torch.equal(batch.media[name][slice(*spans[row])], torch.cat([batch.media[name][:0], *own]))
    images = batch.media_spans.get("image_grid_thw", batch.media_spans["pixel_values"])
    assert (images[:, 1] - images[:, 0]).tolist() == [2, 0, 1]


def change_images(count):
    def change(adapter, rollout):
        content = rollout["trajectory"][0]["prompt"][0]["content"]
        if count > 0:
            content.insert(0, {"type": "image_url", "image_url": {"url": Picture(seed=7).url()}})
        else:
            content.pop(0)

    return change


def change_placeholders(count):
    def change(adapter, rollout):
        ids = rollout["trajectory"][0]["tokens"]["prompt_ids"]
        ids.insert(1, adapter.image_token_id) if count > 0 else ids.remove(adapter.image_token_id)

    return change


CHANGES = {
    "an image lost": change_images(-1),
    "an image too many": change_images(1),
    "a placeholder lost": change_placeholders(-1),
    "a placeholder too many": change_placeholders(1),
}


@pytest.mark.parametrize("row", [0, 1, 2], ids=["two images", "no image", "one image"])
@pytest.mark.parametrize("change", CHANGES)
def test_placeholders_that_are_not_the_images_features_are_an_error_with_both_counts(tiny, change, row):
    _, adapter = tiny
    if not MIXED[row].pictures and change.endswith("lost"):
        pytest.skip("there is none to lose")
    spoiled = rollout(adapter, MIXED[row])
    CHANGES[change](adapter, spoiled)
    turn = spoiled["trajectory"][0]
    held = turn["tokens"]["prompt_ids"].count(adapter.image_token_id)
    features = sum(image.num_tokens for image in adapter.encode_prompt(turn["prompt"]).images)
    assert held != features
    with pytest.raises(ValueError, match=rf"rollout {row}\b.* holds {held} .*\b{features} features"):
        build(adapter, MIXED, lambda rollouts: rollouts.__setitem__(row, spoiled))


def test_two_rows_whose_errors_cancel_are_an_error(tiny):
    """Counts are compared row by row: over the batch, one placeholder too many here and one too few there add up."""
    _, adapter = tiny

    def change(rollouts):
        CHANGES["a placeholder lost"](adapter, rollouts[0])
        CHANGES["a placeholder too many"](adapter, rollouts[1])

    with pytest.raises(ValueError, match="rollout 0"):
        build(adapter, MIXED, change)


def test_a_placeholder_word_in_a_message_is_an_error(tiny):
    _, adapter = tiny
    with pytest.raises(ValueError, match=r"1 images, but the chat template wrote 2"):
        adapter.encode_prompt(messages(Sample(ONE, question=f"What is {adapter.image_token} ?")))


def test_a_rollout_that_sampled_a_placeholder_is_dropped_and_the_others_keep_their_images(tiny):
    model, adapter = tiny

    def sample_a_placeholder(rollouts):
        rollouts[1]["trajectory"][0]["tokens"]["completion_ids"][0] = adapter.placeholder_ids[-1]

    rows = [Sample(TWO), Sample(ONE), Sample(()), Sample(TALL)]
    with pytest.warns(UserWarning, match=r"1 of 4 .*rollout 1 .*placeholder"):
        batch = build(adapter, rows, sample_a_placeholder)
    assert batch.rollout_ids.tolist() == [0, 2, 3]
    assert_rows_equal_plain(model, adapter, batch, [TWO, (), TALL])
    with pytest.raises(ValueError, match="placeholder"):
        build(adapter, [Sample(TALL), Sample(TALL)], lambda rollouts: [rollouts.pop(0), sample_a_placeholder([None, *rollouts])])


# ---------------------------------------------------------------- the gradient back to the pixels


def with_pixel_gradient(batch):
    batch.pixel_values = batch.pixel_values.clone().requires_grad_()
    return batch


@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_rows_loss_reaches_all_of_its_own_pixels_and_no_others(tiny, share_prefix):
    model, adapter = tiny
    batch = with_pixel_gradient(build(adapter, [*MIXED, Sample(TALL)]))
    for row, sample in enumerate([*MIXED, Sample(TALL)]):
        logprobs, _ = score(model, batch, share_prefix=share_prefix)
        loss = logprobs[row][batch.loss_mask[row, 1:] == 1].sum()
        (gradient,) = torch.autograd.grad(loss, batch.pixel_values)
        start, stop = batch.media_spans["pixel_values"][row].tolist()
        reached = gradient.flatten(1).abs().sum(-1) > 0  # (patches or images,)
        own = torch.arange(len(reached)).ge(start) & torch.arange(len(reached)).lt(stop)
        assert torch.equal(reached, own)
        assert own.any() == bool(sample.pictures)


def test_rows_without_advantage_send_no_gradient_to_their_pixels(tiny):
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


def stored_by_row(batch):
    """The same batch with a copy of its media for every row."""
    media, spans = {}, {}
    for name, owned in batch.media_spans.items():
        ends = (owned[:, 1] - owned[:, 0]).cumsum(0)
        media[name] = take_spans(batch.media[name], owned.tolist())
        spans[name] = torch.stack([ends - (owned[:, 1] - owned[:, 0]), ends], dim=-1)
    extra = {**batch.extra_model_kwargs, **{name: t for name, t in media.items() if name != "pixel_values"}}
    return replace(batch, pixel_values=media["pixel_values"], extra_model_kwargs=extra, media_spans=spans)


def test_a_groups_image_is_stored_once_and_collects_the_gradient_of_all_its_rows(tiny):
    model, adapter = tiny
    once = build(adapter, [Sample(TWO, (1, 2)), Sample(ONE, (9,)), Sample(TWO, (3, 4)), Sample(TWO, (5,))])
    copies = with_pixel_gradient(stored_by_row(once))
    once = with_pixel_gradient(once)
    owned, owned_copies = (batch.media_spans["pixel_values"].tolist() for batch in (once, copies))
    assert owned[0] == owned[2] == owned[3] != owned[1]
    stored = sum(len(image.tensors["pixel_values"]) for s in (TWO, ONE) for image in adapter.encode_prompt(messages(Sample(s))).images)
    assert len(once.pixel_values) == stored < len(copies.pixel_values)
    scored = [score(model, batch)[0] for batch in (once, copies)]
    assert torch.equal(*scored)
    gradient, of_copies = (
        torch.autograd.grad(logprobs[once.loss_mask[:, 1:] == 1].sum(), batch.pixel_values)[0]
        for logprobs, batch in zip(scored, (once, copies))
    )
    total = sum(of_copies[slice(*owned_copies[row])] for row in (0, 2, 3))
    # a sum of three numbers in another order: float32 rounds it by some 1e-7 of the largest
    torch.testing.assert_close(gradient[slice(*owned[0])], total, rtol=0, atol=1e-6 * total.abs().max().item())


# ---------------------------------------------------------------- MultimodalBatch


def small_batch(**changes):
    """B = 3, L = 5; pixels by row, features by spans, a mask by token."""
    values = dict(
        input_ids=torch.arange(15).reshape(3, 5),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        loss_mask=torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]),
        behavior_logprobs=torch.zeros(3, 5),
        rewards=torch.tensor([0.0, 0.5, 1.0]),
        pixel_values=torch.rand(3, 1, 2, 2),
        extra_model_kwargs={"features": torch.rand(4, 6), "kinds": torch.arange(15).reshape(3, 5)},
        group_ids=torch.tensor([0, 0, 1]),
        media_spans={"features": torch.tensor([[0, 2], [2, 2], [3, 4]])},
        rollout_ids=torch.tensor([0, 1, 2]),
        is_truncated=torch.tensor([False, False, True]),
    )
    values["extra_model_kwargs"] |= changes.pop("extra", {})
    return MultimodalBatch(**{**values, **changes})


def spans(rows):
    return {"features": torch.tensor(rows)}


def padded_mask():
    return torch.ones(3, 5, dtype=torch.long)


BAD = [  # what is wrong, and what the message must say: field, expected, actual
    *[({name: torch.zeros(3, 6)}, name, "(3, 5)", "(3, 6)") for name in ("attention_mask", "loss_mask", "behavior_logprobs")],
    *[({name: torch.zeros(4)}, name, "(3,)", "(4,)") for name in ("rewards", "group_ids", "rollout_ids", "is_truncated")],
    *[({name: torch.zeros(3, 1)}, name, "(3,)", "(3, 1)") for name in ("rewards", "group_ids", "rollout_ids", "is_truncated")],
    *[({name: [0, 1, 2]}, name, "a tensor", "list") for name in ("input_ids", "loss_mask", "rewards", "rollout_ids", "pixel_values")],
    ({"attention_mask": None}, "attention_mask", "(3, 5)", "NoneType"),
    ({"input_ids": torch.arange(15)}, "input_ids", "(B, L)", "(15,)"),
    ({"input_ids": torch.zeros(3, 5, 1, dtype=torch.long)}, "input_ids", "(B, L)", "(3, 5, 1)"),
    ({"input_ids": torch.zeros(3, 5)}, "input_ids", "long", "float32"),
    ({"pixel_values": torch.zeros(2, 1, 2, 2)}, "pixel_values", "3 rows", "(2, 1, 2, 2)"),
    ({"pixel_values": torch.zeros(())}, "pixel_values", "3 rows", "()"),
    ({"extra": {"kinds": torch.zeros(4, 5)}}, "kinds", "3 rows", "(4, 5)"),
    ({"extra": {"kinds": "none"}}, "kinds", "a tensor", "str"),
    ({"media_spans": spans([[0, 1, 2]] * 3)}, "media_spans['features']", "(3, 2)", "(3, 3)"),
    ({"media_spans": spans([[0, 1]] * 2)}, "media_spans['features']", "(3, 2)", "(2, 2)"),
    ({"media_spans": spans([[0, 2], [2, 5], [3, 4]])}, "media_spans['features']", "<= 4 rows", "[2, 5]"),
    ({"media_spans": spans([[0, 2], [-1, 2], [3, 4]])}, "media_spans['features']", "0 <= start", "[-1, 2]"),
    ({"media_spans": spans([[0, 2], [2, 1], [3, 4]])}, "media_spans['features']", "start <= stop", "[2, 1]"),
    ({"media_spans": {"pictures": torch.zeros(3, 2)}}, "media_spans['pictures']", "features", "'pictures'"),
    ({"loss_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]])}, "loss_mask", "0 on padding", "1 on a padded"),
    ({"loss_mask": torch.tensor([[1, 0, 0, 0, 0]] * 3)}, "loss_mask", "0 at position 0", "1 there"),
    ({"rewards": torch.tensor([0.0, float("inf"), 1.0])}, "rewards", "finite", "inf"),
    ({"behavior_logprobs": torch.full((3, 5), float("nan"))}, "behavior_logprobs", "finite", "NaN"),
]  # fmt: skip


@pytest.mark.parametrize("changes, field, expected, actual", BAD, ids=[f"{i}-{field}" for i, (_, field, _, _) in enumerate(BAD)])
def test_an_impossible_batch_is_refused_by_field_expected_and_actual(changes, field, expected, actual):
    small_batch()  # is possible
    with pytest.raises(ValueError, match=rf"^{re.escape(field)}: expected .*{re.escape(expected)}.* got .*{re.escape(actual)}"):
        small_batch(**changes)


def batch_tensors(batch):
    """Every tensor of a batch by name."""
    named = {f.name: getattr(batch, f.name) for f in fields(batch)}
    spans = {f"spans of {name}": t for name, t in named.pop("media_spans").items()}
    return {name: t for name, t in {**named, **named.pop("extra_model_kwargs"), **spans}.items() if isinstance(t, Tensor)}


def test_to_moves_every_tensor_and_len_counts_rows(monkeypatch):
    batch = small_batch()
    moved, move = [], Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: moved.append(tensor.data_ptr()) or move(tensor, device))
    there = batch.to(torch.device("cpu"))
    monkeypatch.undo()
    assert sorted(moved) == sorted(tensor.data_ptr() for tensor in batch_tensors(batch).values())
    for name, tensor in batch_tensors(batch).items():
        assert torch.equal(batch_tensors(there)[name], tensor), name
    assert len(batch) == len(there) == 3 and len(batch.select([2])) == 1


@settings(max_examples=25)
@given(st.lists(samples, min_size=1, max_size=4), st.data())
def test_selected_rows_are_the_batch_that_is_built_of_them(tiny, rows, data):
    """Any rows in any order, some of them twice: as if the others had never been there."""
    _, adapter = tiny
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    batch = build(adapter, rows)
    before = {name: tensor.clone() for name, tensor in batch_tensors(batch).items()}
    chosen, built = batch.select(picked), build(adapter, [rows[i] for i in picked])
    L = built.input_ids.shape[1]
    expected, actual = batch_tensors(built), batch_tensors(chosen)
    expected["rollout_ids"] = torch.tensor(picked)  # which rows they were is not forgotten
    per_token = [name for name, tensor in actual.items() if tensor.shape[1:] == batch.input_ids.shape[1:] and "spans" not in name]
    for name in per_token:
        assert (actual[name][:, L:] == (batch.input_ids[0, -1] * 0 + actual[name][:, L:])).all()
        actual[name] = actual[name][:, :L]
    assert (chosen.attention_mask[:, L:] == 0).all()
    if not any(rows[i].pictures for i in picked):  # built without any image there is no media tensor at all
        assert not chosen.model_inputs().keys() & {"pixel_values", "image_grid_thw"}
        actual = {name: tensor for name, tensor in actual.items() if name in expected}
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in batch_tensors(batch).items())


# ---------------------------------------------------------------- any modality

IMAGE, VOCABULARY, WIDTH, FEATURES = 1, 20, 16, 12  # IMAGE: the placeholder, one an image
IMAGES = torch.tensor([2, 0, 1, 1, 3])  # of each row, where they are stored as spans


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def cumulative_spans(counts):
    return torch.stack([counts.cumsum(0) - counts, counts.cumsum(0)], dim=-1)


def flat_media(images, pixels, rows_of_image):
    """(B, FEATURES): the sum of each row's flat patches or tiles, found like a real model does it: by counting."""
    if pixels is None:
        return torch.zeros(len(images), FEATURES)
    owner = torch.arange(len(images)).repeat_interleave(images).repeat_interleave(rows_of_image)
    return pixels.new_zeros(len(images), FEATURES).index_add(0, owner, pixels.flatten(1))


# How a model takes its media: its arguments, and what of each row it sees, (B, FEATURES) or by token (B, L, FEATURES).
def sees_pictures(images, pixel_values):
    return pixel_values.flatten(1)


def sees_several_pictures(images, pixel_values):
    return (pixel_values * torch.arange(1, pixel_values.shape[1] + 1).reshape(1, -1, 1, 1, 1)).sum(1).flatten(1)


def sees_patches(images, pixel_values=None, image_grid_thw=None):
    return flat_media(images, pixel_values, None if image_grid_thw is None else image_grid_thw.prod(-1))


def sees_tiles(images, pixel_values=None, image_sizes=None):
    return flat_media(images, pixel_values, None if image_sizes is None else (image_sizes // 2).prod(-1))  # a tile is 2 x 2


def sees_embeddings(images, image_embeddings):
    return image_embeddings.sum(1)


def sees_pictures_and_ratios(images, pixel_values, aspect_ratios):
    return pixel_values.flatten(1) * aspect_ratios[:, :1] + aspect_ratios[:, 1:]


def sees_tokens(images, token_features):
    return token_features.unsqueeze(-1).expand(-1, -1, FEATURES)


def hears(images, input_features):
    return input_features.mean(-1)


GRIDS = torch.tensor([[1, 2, 2], [1, 1, 3], [1, 4, 2], [1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2]])
SIZES = torch.tensor([[2, 2], [4, 2], [2, 6], [4, 4], [2, 2], [2, 4], [6, 2]])
FORMATS = {  # name -> (what the model sees, its media tensors by argument, rows of each image where they are spans)
    "(B, C, H, W) pixels": (sees_pictures, {"pixel_values": noise(5, 3, 2, 2)}, {}),
    "(B, N, C, H, W) pixels": (sees_several_pictures, {"pixel_values": noise(5, 2, 3, 2, 2)}, {}),
    "grayscale": (sees_pictures, {"pixel_values": noise(5, 1, 3, 4)}, {}),
    "flat patches": (
        sees_patches,
        {"pixel_values": noise(int(GRIDS.prod(-1).sum()), 12), "image_grid_thw": GRIDS},
        {"pixel_values": GRIDS.prod(-1), "image_grid_thw": torch.ones(7, dtype=torch.long)},
    ),
    "tiles": (
        sees_tiles,
        {"pixel_values": noise(int((SIZES // 2).prod(-1).sum()), 3, 2, 2), "image_sizes": SIZES},
        {"pixel_values": (SIZES // 2).prod(-1), "image_sizes": torch.ones(7, dtype=torch.long)},
    ),
    "image embeddings": (sees_embeddings, {"image_embeddings": noise(5, 4, 12)}, {}),
    "aspect ratios": (sees_pictures_and_ratios, {"pixel_values": noise(5, 3, 2, 2), "aspect_ratios": noise(5, 2)}, {}),
    "by token": (sees_tokens, {"token_features": noise(5, 9)}, {}),
    "audio": (hears, {"input_features": noise(5, 12, 30)}, {}),
}


class AnyVLM(nn.Module):
    """A causal language model of running means; what a row sees is added to the embedding of each of its tokens."""

    def __init__(self, sees):
        super().__init__()
        self.sees = sees
        self.embedding, self.projection = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, attention_mask, **media):
        seen = self.projection(self.sees((input_ids == IMAGE).sum(-1), **media))
        hidden = self.embedding(input_ids) + (seen if seen.ndim == 3 else seen.unsqueeze(1))
        mask = attention_mask.unsqueeze(-1)
        return self.head(torch.tanh((hidden * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)))  # (B, L, VOCABULARY)


class NoAdapter(MultimodalAdapter):
    def build_batch(self, outputs):
        raise AssertionError("the batch is at hand")


def format_batch(name):
    """Five rows of two groups with this format's media, off-policy enough that the ratio matters."""
    sees, media, rows_of_image = FORMATS[name]
    media = {key: t.clone().requires_grad_(t.is_floating_point()) for key, t in media.items()}
    owner = torch.arange(5).repeat_interleave(IMAGES)
    counts = {key: torch.zeros(5, dtype=torch.long).index_add(0, owner, rows) for key, rows in rows_of_image.items()}
    rng = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 6, 7, 9, 8])
    ids = torch.randint(2, VOCABULARY, (5, 9), generator=rng)
    ids[torch.arange(9) < IMAGES[:, None]] = IMAGE
    inside = torch.arange(9) < lengths[:, None]
    torch.manual_seed(0)
    model = AnyVLM(sees)
    batch = MultimodalBatch(
        input_ids=ids * inside,
        attention_mask=inside.long(),
        loss_mask=(inside & (torch.arange(9) >= 4)).long(),
        behavior_logprobs=torch.zeros(5, 9),
        rewards=torch.tensor([0.0, 1.0, 0.3, 0.2, 0.9]),
        group_ids=torch.tensor([0, 0, 0, 1, 1]),
        pixel_values=media.pop("pixel_values", None),
        extra_model_kwargs=media,
        media_spans={key: cumulative_spans(rows) for key, rows in counts.items()},
    )
    with torch.no_grad():
        now = torch.nn.functional.pad(score(model, batch)[0], (1, 0))
    drift = 0.1 * torch.randn(now.shape, generator=rng)
    return model, replace(batch, behavior_logprobs=(now + drift) * batch.loss_mask)


@pytest.mark.parametrize("name", FORMATS)
def test_any_modality_trains_and_micro_batches_change_neither_loss_nor_gradient(name):
    """A model of unknown family in the trainer as it is configured by default."""
    results, gradients = [], []
    for micro_batch_size in (1, 2, 5):
        model, batch = format_batch(name)
        before = [p.detach().clone() for p in model.parameters()]
        config = MultimodalRLConfig(micro_batch_size=micro_batch_size, learning_rate=1e-2, mismatch_threshold=1.0)
        trainer = MultimodalGRPOTrainer(model, None, NoAdapter(None), config, server=object())
        metrics = trainer.update(batch)
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        gradients.append({key: t.grad for key, t in batch.media.items() if t.is_floating_point()})
        for key, gradient in gradients[-1].items():
            assert (gradient.abs().sum(tuple(range(1, gradient.ndim))) > 0).all(), f"{key}: rows without gradient"
        results.append([metrics["loss"], metrics["grad_norm"]])
    for other, gradient in zip(results[1:], gradients[1:]):
        # float32 sums of 20 token losses in another order
        assert other == pytest.approx(results[0], rel=1e-5)
        for key in gradient:
            torch.testing.assert_close(gradient[key], gradients[0][key], rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- pixels


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
@example(1, 1, 0)
def test_png_data_uris_keep_every_pixel(width, height, seed):
    image = Picture(width, height, seed=seed).image()
    loaded = load_image(png_data_uri(image))
    assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.asarray(image))


def test_shapes_reach_the_model_with_every_pixel():
    import random

    image = draw_shape(next(iter(COLOURS)), "circle", 56, random.Random(0))
    _, adapter = make_tiny("llava")  # its crop is 56 x 56 too: nothing is resized, only shifted and scaled
    pixels = adapter.image_input(load_image(png_data_uri(image))).tensors["pixel_values"][0].permute(1, 2, 0).double()
    processor = adapter.image_processor
    bytes_again = (pixels * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)) * 255
    assert np.array_equal(bytes_again.round().numpy().astype(np.uint8), np.asarray(image))


def on_white(rgba):
    """The definition of laying a picture on white, in float64 and rounded."""
    pixels = np.asarray(rgba).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def with_transparent_colour(mode):
    image = Picture(mode="RGB", seed=3).image().quantize(8) if mode == "P" else Picture(mode=mode, seed=3).image()
    image.info["transparency"] = 0 if mode == "P" else 200
    return image


@pytest.mark.parametrize(
    "image",
    [*(Picture(mode=mode, seed=3).image() for mode in MODES), *(with_transparent_colour(mode) for mode in "PL")],
    ids=[*MODES, "P with a transparent colour", "L with a transparent grey"],
)
def test_every_mode_becomes_rgb_and_whatever_is_transparent_becomes_white(image):
    """Server and trainer must see the same pixels, and vLLM lays transparency of every mode on white."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    loaded = load_image(png_data_uri(image))
    assert loaded.mode == "RGB" and loaded.size == image.size
    assert np.array_equal(np.asarray(loaded), on_white(Image.open(buffer).convert("RGBA")))


def test_a_photo_taken_sideways_is_turned_upright():
    """Cameras store the turn beside the pixels (EXIF), and vLLM applies it."""
    image, exif = Picture(30, 50).image(), Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    loaded = load_image("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    assert np.array_equal(np.asarray(loaded), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


PNG = Picture().url()
BAD_URLS = {
    "a web address": "https://example.org/a.png",
    "a file": "file:///etc/hostname",
    "a path": "/etc/hostname",
    "nothing": "",
    "another type": "data:text/plain;base64,aGVsbG8=",
    "no base64": PNG.replace(";base64", ""),
    "letters outside base64": "data:image/png;base64,####",
    "bytes of no image": "data:image/png;base64,aGVsbG8=",
    "no bytes": "data:image/png;base64,",
    "half an image": PNG[: len(PNG) // 2 // 4 * 4],
}


@pytest.mark.parametrize("url", BAD_URLS.values(), ids=BAD_URLS)
def test_what_is_no_image_is_an_error_that_names_image_url(url):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and nothing is opened or left open on the way
        with pytest.raises(ValueError, match="^image_url="):
            load_image(url)


@pytest.mark.parametrize("size", [(8, 8), (8, 120), (120, 8), (1, 100), (100, 3), (8, 1500), (1000, 10), (119, 61), (300, 200)])
def test_placeholders_are_as_many_as_the_vision_tower_gives_features(tiny, size):
    model, adapter = tiny
    image = adapter.image_input(Picture(*size).image())
    features = model.get_image_features(**image.tensors).pooler_output
    assert image.num_tokens == sum(len(part.reshape(-1, part.shape[-1])) for part in features)
