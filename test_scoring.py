"""Tests of scoring as an update does it: along prompts, in chunks of tokens, without a second look at the data.

    pytest test_scoring.py

The plain way (a forward of each row, all logits at once) is the oracle of every shortcut. What a shortcut saves is
counted: images, bytes, validations, looks at a tensor's values.
"""

import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

import benchmark
import output_head
from conftest import DEMONSTRATIONS, make_tiny, make_trainer
from mm_grpo import MultimodalBatch, MultimodalRLConfig, Policy, score, token_logprobs
from output_head import head_is_last, in_chunks
from shared_prefix import cut_along_prompts, find_shared_prompts, micro_batches

HERE = Path(__file__).parent
GROUPS = dict(num_train_examples=8, num_eval_examples=1)  # of the shapes environment
SMALL = dict(rollouts_per_step=16, rollouts_per_example=4, max_tokens=3, learning_rate=1e-9)
NOT_LAST = "not its output head's alone"  # what a model is told that does more than its head


def make_batch(trainer):
    """The batch of one collection of rollouts."""
    return trainer.adapter.build_batch(trainer.rollouts.collect())


def of_trained(batch, values):
    return values[batch.loss_mask[:, 1:] != 0]


def values_and_gradient(model, batch, scored):
    """Logprobs and entropies of the trained tokens, and the gradient of a fixed random sum of the logprobs, flat."""
    logprobs, entropies = (of_trained(batch, values) for values in scored)
    factors = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    model.zero_grad(set_to_none=True)
    (logprobs * factors).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.stack([logprobs.detach(), entropies]), gradient


def assert_same(one, other):
    (values, gradient), (expected, expected_gradient) = one, other
    # logprobs are about -4: float32 sums of other shapes differ by some 1e-6 there, gradients as much in relation
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


# ---------------------------------------------------------------- chunks of tokens


@settings(max_examples=25)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 10),
    chunk=st.integers(1, 16),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_chunks_change_no_logprob_entropy_or_gradient(rows, columns, chunk, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(8, 50, bias=False)
    targets = torch.randint(0, 50, (rows, columns), generator=generator)
    values = torch.randn(rows, columns, 8, generator=generator)
    sizes = []  # of what is computed at once

    def logprobs_of(hidden, targets):
        sizes.append(len(targets))
        return token_logprobs(head(hidden), targets, temperature, banned_ids=[3, 7])

    results = []
    for run in (logprobs_of, lambda *given: in_chunks(logprobs_of, *given)):
        hidden = values.clone().requires_grad_()
        head.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_head, "CHUNK_TOKENS", chunk)
            sizes.clear()
            logprobs, entropies = run(hidden, targets)
            logprobs.sum().backward()
        results.append([logprobs.detach(), entropies.detach(), hidden.grad, head.weight.grad.clone()])
    # float32 sums in another order: a few units in the last place of numbers up to 10
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)
    tokens, backwards = rows * columns, 2 if rows * columns > chunk else 1  # a chunk is made again in its backward
    assert sum(sizes) == backwards * tokens and max(sizes) == min(chunk, tokens)


def test_the_peak_does_not_grow_with_tokens_times_vocabulary(runs):
    """4,096 tokens of a vocabulary of 50,000: their logits alone are 0.8 GB in float32, and the plain way holds
    several such tensors. In chunks of 512 an update's peak stays below one of them."""

    def peak_mb(tokens: int) -> float:
        code = f"""
import torch, mm_grpo, output_head
from benchmark import peak_rss
torch.set_num_threads(2)
output_head.CHUNK_TOKENS = 512
head, hidden = torch.nn.Linear(16, 50_000, bias=False), torch.randn({tokens}, 16, requires_grad=True)
logprobs_of = lambda hidden, targets: mm_grpo.token_logprobs(head(hidden), targets, 1.0, [5])
targets, before = torch.randint(0, 50_000, ({tokens},)), peak_rss()
logprobs, _ = output_head.in_chunks(logprobs_of, hidden, targets)
logprobs.sum().backward()
print(peak_rss() - before)
"""
        return float(runs.printed(code))

    logits_mb = 4096 * 50_000 * 4 / 2**20
    chunked = peak_mb(4096)
    assert chunked < logits_mb  # four tensors of 98 MB live at once in a chunk
    assert chunked < 1.3 * peak_mb(1024)  # four times the tokens, the same peak


# ---------------------------------------------------------------- the body, then the head


@pytest.mark.parametrize("share", [False, True])
def test_the_head_after_the_body_gives_the_models_own_logits_and_scores(tiny, share, monkeypatch):
    model, adapter = tiny
    trainer = make_trainer(env=GROUPS, tiny=tiny, **SMALL)
    batch = make_batch(trainer)
    inputs = batch.model_inputs()
    with torch.no_grad():
        hidden = model.base_model(**inputs)[0]
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**inputs).logits, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert head_is_last(model, batch) and head_is_last(model, batch.select([3, 0]))
    monkeypatch.setattr(output_head, "CHUNK_TOKENS", 7)
    shared = find_shared_prompts(model, batch, adapter.placeholder_ids) if share else None
    assert share == (shared is not None)
    chunked, plain, found_out = (
        values_and_gradient(model, batch, score(model, batch, 0.7, adapter.placeholder_ids, shared, chunked))
        for chunked in (True, False, None)
    )
    model.zero_grad(set_to_none=True)
    assert_same(chunked, plain)
    assert torch.equal(found_out[0], chunked[0])


class OwnForward(LlavaForConditionalGeneration):
    """A LLaVA that does something of its own between body and head, or behind the head."""

    before = after = staticmethod(lambda x: x)

    def forward(self, input_ids=None, logits_to_keep=0, **inputs):
        output = self.model(input_ids=input_ids, **inputs)
        logits = self.after(self.lm_head(self.before(output[0][:, -logits_to_keep:])))
        return LlavaCausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


OWN = {  # where, what, and rows of the head beyond the vocabulary
    "logits softcapped": ("after", lambda logits: 3 * torch.tanh(logits / 3), 0),
    "logits scaled": ("after", lambda logits: 0.5 * logits, 0),
    "logits cut off": ("after", lambda logits: logits[..., :-8], 8),
    "hidden states scaled": ("before", lambda hidden: hidden / 3, 0),
}


@pytest.mark.parametrize(("where", "change", "padding"), OWN.values(), ids=OWN)
def test_a_model_with_a_forward_of_its_own_around_the_head_keeps_it_and_says_so(where, change, padding):
    plain, adapter = make_tiny("llava")
    model = OwnForward(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    model.generation_config = plain.generation_config
    model.lm_head.weight = nn.Parameter(torch.cat([plain.lm_head.weight, plain.lm_head.weight[:padding]]).detach())
    setattr(model, where, change)

    trainer = make_trainer(env=GROUPS, tiny=(model, adapter), **SMALL)
    batch, placeholders = make_batch(trainer), adapter.placeholder_ids
    shared = find_shared_prompts(model, batch, placeholders)
    own = model(**batch.model_inputs()).logits[:, :-1]
    expected = token_logprobs(own, batch.input_ids[:, 1:], 0.7, placeholders)
    expected = values_and_gradient(model, batch, expected)
    policy = Policy(model, 0.7, placeholders)
    with pytest.warns(UserWarning, match=f"OwnForward: .*{NOT_LAST}.*micro_batch_size"):
        assert not head_is_last(model, batch)
    with pytest.warns(UserWarning, match=NOT_LAST):
        assert_same(values_and_gradient(model, batch, policy(batch)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert_same(values_and_gradient(model, batch, policy(batch, shared)), expected)
    with pytest.warns(UserWarning, match=NOT_LAST) as caught:
        metrics = trainer.update(batch)
    # the server samples from the same forward: on-policy, to float32 sums in another order
    assert len(caught) == 1 and 1 - 1e-4 < metrics["ratio_min"] <= metrics["ratio_max"] < 1 + 1e-4


class Words(nn.Module):
    """A model of two layers that is no Transformers class."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask):
        return self.head(torch.tanh(self.embedding(input_ids).cumsum(1)))


class NamesItsHead(Words):
    def get_output_embeddings(self):
        return self.head


class HasNoHead(Words):
    base_model = property(lambda self: self.embedding)

    def get_output_embeddings(self):
        return None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [Words, NamesItsHead, HasNoHead])
def test_a_model_that_names_no_body_or_no_head_keeps_its_own_forward_without_a_word(kind):
    model, ids = kind(), torch.randint(20, (3, 6))
    batch = MultimodalBatch(ids, ids * 0 + 1, (torch.arange(6) >= 3).long().expand(3, 6), torch.zeros(3, 6), ids[:, 0])
    assert not head_is_last(model, batch)
    expected = values_and_gradient(model, batch, token_logprobs(model(ids, None)[:, :-1], ids[:, 1:], 0.7, [4]))
    assert_same(values_and_gradient(model, batch, score(model, batch, 0.7, [4])), expected)
    assert_same(values_and_gradient(model, batch, Policy(model, 0.7, [4])(batch)), expected)


# ---------------------------------------------------------------- micro-batches, cut along prompts


@settings(max_examples=200)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 10))
def test_rows_are_cut_along_their_prompts(prompt_of_row, size):
    parts = cut_along_prompts(prompt_of_row, size)
    assert sorted(row for part in parts for row in part) == list(range(len(prompt_of_row)))  # each exactly once
    assert all(0 < len(part) <= size for part in parts)
    for prompt, n in Counter(prompt_of_row).items():
        held = [sum(prompt_of_row[row] == prompt for row in part) for part in parts]
        held = [count for count in held if count]
        assert len(held) == -(-n // size)  # together where they fit
        assert max(held) - min(held) <= 1  # else evenly
    # as few parts as that allows, in order: no two neighbours fit into one
    assert all(len(one) + len(next_) > size for one, next_ in zip(parts, parts[1:]))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("size", [1, 3, 5, 16])
def test_a_micro_batch_holds_its_rows_and_their_prompts(tiny, size, share):
    """Rows that have nothing to train are in none; where no row has, all are run, for the metrics."""
    model, adapter = tiny
    batch = make_batch(make_trainer(env=GROUPS, tiny=tiny, **SMALL))
    policy = Policy(model, 1.0, adapter.placeholder_ids)
    config = MultimodalRLConfig(micro_batch_size=size, share_prefix=share)
    trains = torch.arange(16) % 7 != 2
    for rows, expected in ((trains, trains.nonzero()[:, 0].tolist()), (trains & False, list(range(16)))):
        parts = micro_batches(policy, batch, rows, config)
        assert sorted(torch.cat([part.rows for part in parts]).tolist()) == expected
        assert all(len(part.rows) <= size and (part.shared is None or share) for part in parts)
        assert any(part.shared for part in parts) == (share and size > 1)
        for part in parts:
            of_rows = batch.select(part.rows)
            assert torch.equal(part.batch.input_ids, of_rows.input_ids)
            if part.shared is None:
                theirs, all_inputs = part.batch.model_inputs(), of_rows.model_inputs()
                assert all(torch.equal(theirs[name], tensor) for name, tensor in all_inputs.items())
                continue
            assert not part.batch.media and len(part.shared.lengths) < len(part.rows)
            own_prompts = part.shared.prompts.select(part.shared.prompt_of_row)
            for name, pixels in own_prompts.model_inputs().items():
                if name in batch.media_spans:
                    assert torch.equal(pixels, of_rows.model_inputs()[name])
            for row, prompt in enumerate(part.shared.prompt_of_row.tolist()):
                start = int(of_rows.loss_mask[row].argmax())
                assert part.shared.lengths[prompt] == start
                assert torch.equal(own_prompts.input_ids[row, :start], of_rows.input_ids[row, :start])


@pytest.mark.parametrize("share", [True, False])
def test_the_shared_prefix_fraction_tells_the_truth(share):
    trainer = make_trainer("qwen", GROUPS, micro_batch_size=8, share_prefix=share, **SMALL)
    batch = make_batch(trainer)
    trainer.update(batch)  # the first one also tries the output head, on one row
    encoded = []  # images that the vision tower sees

    def count(module, args, kwargs):
        encoded.append(len(kwargs["grid_thw"]))

    trainer.model.model.visual.register_forward_pre_hook(count, with_kwargs=True)
    assert trainer.update(batch)["shared_prefix_fraction"] == float(share)
    assert sum(encoded) == (4 if share else 16)
    # a group that does not fit is cut evenly: 4 rows in parts of at most 3 are 2 and 2, and each runs the prompt once
    encoded.clear()
    trainer.micro_batch_size = 3
    assert trainer.update(batch)["shared_prefix_fraction"] == float(share)
    assert sum(encoded) == (8 if share else 16)
    # a row alone shares with nobody
    trainer.micro_batch_size = 1
    assert trainer.update(batch)["shared_prefix_fraction"] == 0


# ---------------------------------------------------------------- what an update does not do again


@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_an_update_validates_nothing_again_and_looks_at_few_values(family, monkeypatch):
    """A batch is validated when it is made. Each look at a tensor's values waits for a GPU, so an update's looks grow
    with its micro-batches, not with its rows; the media of a group, stored once, are not copied."""
    settings = dict(rollouts_per_step=128, rollouts_per_example=8, micro_batch_size=8, max_tokens=3)
    trainer = make_trainer(family, {**GROUPS, "num_train_examples": 16}, **settings)
    batch = make_batch(trainer)
    trainer.update(batch)  # the first one also tries the output head and the shared prompts, on a few rows
    calls = Counter()  # from a file of this project; what a model's forward does is its own affair

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            file = Path(sys._getframe(1).f_code.co_filename)
            if file.parent == HERE:
                calls[name, file.name] += 1
                calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        count(Tensor, name)
    count(torch, "cat")
    validations = []
    validate = MultimodalBatch.__post_init__
    monkeypatch.setattr(MultimodalBatch, "__post_init__", lambda batch: validations.append(batch) or validate(batch))
    trainer.update(batch)
    monkeypatch.undo()
    rows, parts = 128, 16
    assert not validations and calls["cat", "media.py"] == 0
    assert 0 < calls["tolist"] < rows  # two tensors of media, asked for their spans a few times in each part
    assert 0 < calls["__bool__"] < 2 * parts  # one a group, for equal rewards
    assert calls["item"] == 1 and calls["__int__"] <= 2 * parts + 1 and calls["__float__"] == 0
    assert replace(batch).rewards is batch.rewards  # replace makes a batch, and that is validated
    with pytest.raises(ValueError, match="rewards: expected shape"):
        replace(batch, rewards=batch.rewards[:3])


def test_the_benchmark_compares_ways_with_the_same_gradients():
    model = benchmark.make_model("8m", "cpu")
    batch = benchmark.make_batch(model, P=benchmark.TEXT + 16, C=8, G=4)
    gradients = []
    for share in (False, True):
        model.zero_grad(set_to_none=True)
        benchmark.update(model, batch, share)
        gradients.append(benchmark.gradients(model))
    # float32 sums in another order
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
    dense = benchmark.dense_batch(batch, benchmark.TEXT + 16)
    assert dense.input_ids.shape == (1, benchmark.TEXT + 16 + 4 * 8)
    assert len(dense.extra_model_kwargs["image_grid_thw"]) == 1
