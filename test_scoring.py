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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

import benchmark
import output_head
from conftest import DEMONSTRATIONS, make_tiny, make_trainer, peak_of_saved_bytes
from mm_grpo import MultimodalBatch, MultimodalRLConfig, Policy, score, token_logprobs
from output_head import head_is_last, in_chunks
from recompute import checkpoint_layers
from shared_prefix import FEW_TOKENS, KEY_TOKENS, find_shared_prompts, micro_batches, within

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
    with pytest.warns(UserWarning, match=f"OwnForward: .*{NOT_LAST}.*micro_batch_tokens"):
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


# ---------------------------------------------------------------- micro-batches within a budget of tokens


@settings(max_examples=200)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 5000))
@example([128, 172, 284, 428] * 2, 10_000)
def test_parts_stay_within_the_budget_padding_counted(widths, budget):
    parts = within(budget, widths)
    assert sorted(number for part in parts for number in part) == list(range(len(widths)))  # each exactly once
    assert [widths[i] for part in parts for i in part] == sorted(widths)  # little padding: like goes with like

    def fits(part):
        n, widest, real = len(part), max(widths[i] for i in part), sum(widths[i] for i in part)
        hollow = real - widest > FEW_TOKENS and n * widest > 1.25 * real
        return n == 1 or n * widest <= budget and not hollow

    assert all(map(fits, parts))
    # as few parts as that allows: what comes next would not have fitted
    assert not any(fits([*one, other[0]]) for one, other in zip(parts, parts[1:]))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tokens", [1, 50, 90, 10_000])
def test_a_micro_batch_holds_its_rows_and_their_prompts(tiny, tokens, share):
    """Rows that have nothing to train are in none; where no row has, all are run, for the metrics."""
    model, adapter = tiny
    batch = make_batch(make_trainer(env=GROUPS, tiny=tiny, **SMALL))
    policy = Policy(model, 1.0, adapter.placeholder_ids)
    config = MultimodalRLConfig(micro_batch_tokens=tokens, share_prefix=share)
    trains = torch.arange(16) % 7 != 2
    for rows, expected in ((trains, trains.nonzero()[:, 0].tolist()), (trains & False, list(range(16)))):
        blocks = micro_batches(policy, batch, rows, config)
        assert sorted(row for block in blocks for part in block.parts for row in part.rows.tolist()) == expected
        for block in blocks:
            assert (block.prompts is not None) == share
            if share:
                K, P = len(block.prompts.lengths), int(block.prompts.lengths.max())
                assert K == 1 or K * P <= tokens
            for part in block.parts:
                of_rows, n, L = batch.select(part.rows), *part.batch.input_ids.shape
                assert torch.equal(part.batch.input_ids, of_rows.input_ids[:, :L])
                assert (of_rows.attention_mask[:, L:] == 0).all() and part.batch.attention_mask[:, -1].any()
                if not share:
                    assert n == 1 or n * L <= tokens
                    theirs, all_inputs = part.batch.model_inputs(), of_rows.model_inputs()
                    by_token = all_inputs.keys() - batch.media_spans.keys()
                    all_inputs |= {name: all_inputs[name][:, :L] for name in by_token}
                    assert all(torch.equal(theirs[name], tensor) for name, tensor in all_inputs.items())
                    continue
                assert not part.batch.media and len(part.completions.ids) == n
                longest = int((of_rows.attention_mask.sum(-1) - of_rows.loss_mask.argmax(-1)).max())
                assert n == 1 or n * (longest + P // KEY_TOKENS) <= tokens
                prompt_of_row = part.completions.prompt_of_row
                own_prompts = block.prompts.prompts.select(prompt_of_row)
                for name, pixels in own_prompts.model_inputs().items():
                    if name in batch.media_spans:
                        assert torch.equal(pixels, of_rows.model_inputs()[name])
                for row, prompt in enumerate(prompt_of_row.tolist()):
                    start = int(of_rows.loss_mask[row].argmax())
                    assert block.prompts.lengths[prompt] == start
                    assert torch.equal(own_prompts.input_ids[row, :start], of_rows.input_ids[row, :start])


@pytest.fixture(scope="module", params=DEMONSTRATIONS)
def updated(request):
    """(trainer, batch, gradient, metrics): an update by the plain forward of each row alone; weights never change.

    Completions of 1 to 12 tokens, as the stop token is likely.
    """
    small = dict(rollouts_per_step=16, rollouts_per_example=4, max_tokens=12, learning_rate=1e-9, max_grad_norm=1e9)
    trainer = make_trainer(request.param, GROUPS, favoured="eos_token_id", by=2.0, beta=0.1, loss_type="grpo", **small)
    batch = make_batch(trainer)
    assert len(set(batch.loss_mask.sum(-1).tolist())) > 4
    noise = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) / 2
    batch.behavior_logprobs += noise * batch.loss_mask  # ratios on both sides of the clip
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)  # away from the reference
    return trainer, batch, *update_of(trainer, batch, tokens=1, share=False)


def update_of(trainer, batch, tokens, share):
    """(gradient, metrics) of an update with these settings that leaves the weights as they are."""
    trainer.micro_batch_tokens, trainer.config.share_prefix = tokens, share
    gradient, step = [], trainer.optimizer.step

    def instead():
        gradient.extend(p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None)

    trainer.optimizer.step = instead
    try:
        metrics = trainer.update(batch, on_policy=False)
    finally:
        trainer.optimizer.step = step
    return torch.cat(gradient), metrics


@settings(max_examples=15)
@given(tokens=st.one_of(st.integers(1, 300), st.just(10_000)), share=st.booleans(), recompute=st.booleans())
@example(tokens=1, share=True, recompute=False)  # each prompt and each row alone
@example(tokens=40, share=True, recompute=True)  # several micro-batches of a prompt, made again in the backward
@example(tokens=10_000, share=True, recompute=True)
def test_no_budget_changes_the_gradient_or_the_metrics(updated, tokens, share, recompute):
    trainer, batch, expected_gradient, expected = updated
    checkpoint_layers(trainer.model, recompute)
    gradient, metrics = update_of(trainer, batch, tokens, share)
    checkpoint_layers(trainer.model, False)
    assert metrics["shared_prefix_fraction"] == float(share)
    # float32 sums of a few thousand terms in another order
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()
    same = {name: value for name, value in expected.items() if name != "shared_prefix_fraction"}
    assert {name: metrics[name] for name in same} == pytest.approx(same, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_a_picture_in_each_turn_changes_nothing_of_that(family):
    """The prompt is run once, the later pictures with the rows that go on from it, in whatever micro-batch."""
    settings = dict(rollouts_per_step=16, rollouts_per_example=4, max_tokens=4, learning_rate=1e-9, max_grad_norm=1e9)
    env = dict(GROUPS, turns=2, images_per_prompt=2)
    trainer = make_trainer(family, env, favoured="eos_token_id", by=2.0, beta=0.1, loss_type="grpo", **settings)
    batch = make_batch(trainer)
    expected_gradient, expected = update_of(trainer, batch, tokens=1, share=False)
    for tokens, recompute in ((1, False), (150, True), (10_000, False), (10_000, True)):
        checkpoint_layers(trainer.model, recompute)
        gradient, metrics = update_of(trainer, batch, tokens, share=True)
        checkpoint_layers(trainer.model, False)
        assert metrics.pop("shared_prefix_fraction") == 1 and trainer.policy.later_media_are_exact
        # float32 sums of a few thousand terms in another order
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()
        assert metrics == pytest.approx({name: expected[name] for name in metrics}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_a_prompt_is_run_once_an_update_whatever_the_micro_batch(share):
    trainer = make_trainer("qwen", GROUPS, share_prefix=share, **SMALL)
    batch = make_batch(trainer)
    trainer.update(batch)  # the first one also tries the output head, on one row
    encoded, came_back = [], []  # images that the vision tower sees, on the way there and back

    def count(module, args, kwargs):
        encoded.append(len(kwargs["grid_thw"]))

    visual = trainer.model.model.visual
    visual.register_forward_pre_hook(count, with_kwargs=True)
    visual.blocks[0].norm1.register_full_backward_hook(lambda *_: came_back.append(1))
    for tokens in (8192, 60, 1):
        encoded.clear(), came_back.clear()
        trainer.micro_batch_tokens = tokens
        assert trainer.update(batch)["shared_prefix_fraction"] == float(share)
        assert sum(encoded) == (4 if share else 16)
        assert len(came_back) == len(encoded)


def test_what_is_kept_for_the_backward_does_not_grow_with_the_group():
    """Bytes that autograd holds at once: of the prompts that run together and one micro-batch, whatever G."""
    peaks = {}
    for G in (8, 32):
        trainer = make_trainer("qwen", GROUPS, rollouts_per_step=2 * G, rollouts_per_example=G, max_tokens=12)
        batch = make_batch(trainer)
        trainer.update(batch)  # tries the output head and the shared prompts
        for tokens in (100, 10_000):
            trainer.micro_batch_tokens = tokens
            peaks[G, tokens] = peak_of_saved_bytes(lambda trainer=trainer, batch=batch: trainer.update(batch, False))
    assert peaks[32, 100] <= 1.15 * peaks[8, 100]
    assert peaks[32, 10_000] > 2 * peaks[8, 10_000]  # what is measured is there


# ---------------------------------------------------------------- what an update does not do again


class Looks(TorchDispatchMode):
    """Counts what waits for a GPU when its tensors are there: values that are read, shapes that depend on values. Of
    this project's lines alone; what a model's forward does is its own affair."""

    WAITS = ("local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.lines, self.copies = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, frame = func.overloadpacket.__name__.strip("_"), sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        place = Path(frame.f_code.co_filename)
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if place.parent == HERE and (by_mask or name.startswith(self.WAITS)):
            self.lines[f"{place.name} {frame.f_code.co_name} {name}"] += 1
        self.copies += name == "cat" and place.name == "media.py"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_no_micro_batch_waits_for_the_device(family, share, monkeypatch):
    """An update reads its tensors' values when it lays out the micro-batches, which is on the CPU, and once at its end:
    the metrics and the gradient's norm. In between, however many micro-batches there are, there is no look at a value
    of theirs; media of a group, stored once, are not copied; a batch, validated when it is made, is not again.
    """
    settings = dict(rollouts_per_step=64, rollouts_per_example=32, max_tokens=3, share_prefix=share, beta=0.1)
    trainer = make_trainer(family, GROUPS, **settings)
    batch = make_batch(trainer)
    trainer.update(batch)  # the first one also tries the output head and the shared prompts, on a few rows
    config, rows, parts, validations = trainer.config, torch.ones(64, dtype=torch.bool), [], []
    monkeypatch.setattr(MultimodalBatch, "__post_init__", validations.append)
    whole = dict(behavior_logprobs=batch.behavior_logprobs[:, 1:], advantages=batch.rewards)
    whole["weights"] = batch.loss_mask[:, 1:].float()
    for tokens in (10_000, 50):
        blocks = micro_batches(trainer.policy, batch, rows, config, tokens)
        parts.append(sum(len(block.parts) for block in blocks))
        with Looks() as looks:
            trainer.backward(blocks, dict(whole))
        # a block's longest prompt, for the policy and for the reference: lengths stay on the CPU
        assert looks.lines.total() == (2 * len(blocks) if share else 0) and len(looks.lines) <= 1
        assert not share or not looks.copies
    assert parts[0] <= 2 and parts[1] >= 8
    with Looks() as looks:
        trainer.update(batch, on_policy=False)
    read = {line.split()[1] for line in looks.lines if line.startswith("mm_grpo.py")}
    assert not read & {"backward", "loss", "grpo_loss", "policy_term", "k3", "masked_mean", "score", "token_logprobs"}
    assert not validations
    with Looks() as looks:  # what is counted is there
        bool(torch.ones(1)), torch.ones(3)[torch.ones(3) > 0], torch.ones(3).nonzero(), torch.ones(1).item()
    assert looks.lines.total() >= 4
    monkeypatch.undo()
    assert replace(batch).rewards is batch.rewards  # replace makes a batch, and that is validated
    with pytest.raises(ValueError, match="rewards: expected shape"):
        replace(batch, rewards=batch.rewards[:3])


@pytest.fixture(scope="module")
def benchmarked():
    """(trainer, batch) of the benchmark: two pictures of different sizes, three completions of each, 1 to 9 tokens."""
    trainer = benchmark.make_trainer(benchmark.make_model("8m", "cpu"))
    batch = benchmark.make_batch(trainer.model, (benchmark.TEXT + 16, benchmark.TEXT + 4), [3, 9, 5, 7, 1, 2], G=3)
    return trainer, benchmark.sampled_by(trainer, batch)


def test_the_benchmark_compares_ways_with_the_same_gradients(benchmarked):
    trainer, batch = benchmarked
    ways = [benchmark.make_way(way, trainer, batch, tokens, 1) for way in ("plain", "shared") for tokens in (9999, 30)]
    plain, *others = (benchmark.gradient(trainer, way) for way in ways)
    assert plain.norm() > 0.1
    assert max(benchmark.difference(other, plain) for other in others) <= 1e-5  # float32 sums in another order
    # nothing is clipped, and no step changes the weights
    assert trainer.update(batch)["logprob_difference"] <= 1e-5
    assert benchmark.difference(benchmark.gradient(trainer, ways[0]), plain) <= 1e-6


def test_the_benchmarks_floor_is_the_distinct_tokens_once(benchmarked):
    trainer, batch = benchmarked
    rows = benchmark.dense_rows(batch)
    for k, (side, row) in enumerate(zip((4, 2), rows, strict=True)):
        sampled = [ids[mask != 0] for ids, mask in zip(batch.input_ids[3 * k :][:3], batch.loss_mask[3 * k :][:3])]
        prompt = batch.input_ids[3 * k, : benchmark.TEXT + side**2]
        assert row.input_ids.tolist() == [torch.cat([prompt, *sampled]).tolist()]
        assert row.attention_mask.all() and row.loss_mask.sum() == sum(map(len, sampled))
        assert row.extra_model_kwargs["image_grid_thw"].tolist() == [[1, 2 * side, 2 * side]]  # one picture
        assert len(row.pixel_values) == 4 * side**2 == 4 * (row.input_ids == benchmark.IMAGE_TOKEN).sum()
    assert benchmark.gradient(trainer, benchmark.make_way("dense", trainer, batch, 1, 1)).norm() > 0.1
