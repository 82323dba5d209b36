"""Scoring in chunks of tokens: the same numbers as the plain way, at a fraction of its memory, and it says what it did."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import benchmark
import mm_grpo
from conftest import make_tiny
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig, chunked_logprobs, headless, token_logprobs

HERE = Path(__file__).parent


@settings(max_examples=25)
@given(tokens=st.integers(1, 40), chunk=st.integers(1, 16), temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_chunks_change_no_logprob_entropy_or_gradient(tokens, chunk, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(8, 50, bias=False)
    targets = torch.randint(0, 50, (tokens,), generator=generator)
    values = torch.randn(tokens, 8, generator=generator)
    old, results = mm_grpo.CHUNK_TOKENS, []
    for size in (10**9, chunk):
        mm_grpo.CHUNK_TOKENS = size
        hidden = values.clone().requires_grad_()
        head.zero_grad()
        logprobs, entropies = chunked_logprobs(head, hidden, targets, temperature, [3, 7])
        logprobs.sum().backward()
        results.append([logprobs.detach(), entropies.detach(), hidden.grad, head.weight.grad.clone()])
    mm_grpo.CHUNK_TOKENS = old
    bias = torch.zeros(50)
    bias[[3, 7]] = -100.0
    plain = token_logprobs(head(values) + bias, targets, temperature)
    # float32 sums in another order: a few units in the last place of numbers up to 10
    for whole, chunked in zip(results[0], results[1]):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1][0], plain[0].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1][1], plain[1].detach(), atol=1e-5, rtol=1e-5)


def test_the_peak_does_not_grow_with_tokens_times_vocabulary():
    """4,096 tokens of a vocabulary of 100,000: their logits alone are 1.6 GB in float32, and the plain way holds several
    such tensors. In chunks of 512 an update's peak stays below one of them."""

    def peak_mb(chunk: int, tokens: int) -> float:
        code = (
            "import torch, mm_grpo; from benchmark import peak_rss; torch.set_num_threads(2); mm_grpo.CHUNK_TOKENS = %d;"
            "head = torch.nn.Linear(16, 100_000, bias=False); hidden = torch.randn(%d, 16, requires_grad=True);"
            "targets = torch.randint(0, 100_000, (%d,));"
            "before = peak_rss();"
            "lp, _ = mm_grpo.chunked_logprobs(head, hidden, targets, 1.0, [5]); lp.sum().backward();"
            "print(peak_rss() - before)" % (chunk, tokens, tokens)
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
        return float(done.stdout)

    logits_mb = 4096 * 100_000 * 4 / 2**20
    chunked = peak_mb(512, 4096)
    assert chunked < logits_mb  # four tensors of 195 MB live at once in a chunk
    assert chunked < 1.3 * peak_mb(512, 1024)  # four times the tokens, the same peak


def test_headless_gives_the_heads_input_and_puts_the_head_back():
    for family in ("qwen", "llava"):
        model, adapter = make_tiny(family)
        ids = torch.tensor([[8, 9, 10, 11]])
        logits = model(input_ids=ids).logits
        with headless(model) as head:
            hidden = model(input_ids=ids).logits
            assert hidden.shape[-1] == model.config.get_text_config().hidden_size
            torch.testing.assert_close(head(hidden), logits)
        assert torch.equal(model(input_ids=ids).logits, logits)
        with pytest.raises(RuntimeError), headless(model):
            raise RuntimeError
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_model_that_changes_its_logits_after_the_head_keeps_its_own_forward():
    model, _ = make_tiny("llava")
    model.config.get_text_config().final_logit_softcapping = 30.0
    ids = torch.tensor([[8, 9, 10]])
    with headless(model) as head:
        logits = model(input_ids=ids).logits
        assert logits.shape[-1] == model.config.get_text_config().vocab_size and head(logits) is logits


@pytest.mark.parametrize("share", [True, False])
def test_the_shared_prefix_fraction_tells_the_truth(share):
    model, adapter = make_tiny("qwen")
    config = MultimodalRLConfig(
        rollouts_per_step=16, rollouts_per_example=4, micro_batch_size=8, max_tokens=3, share_prefix=share, learning_rate=1e-9
    )
    trainer = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, config)
    trainer.set_environment("shapes-env", num_train_examples=8, num_eval_examples=1)
    encoded = []  # images that the vision tower sees
    handle = model.model.visual.register_forward_hook(lambda module, args, kwargs, out: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True)
    batch = adapter.build_batch(trainer.collect())
    encoded.clear()
    metrics = trainer.update(batch)
    handle.remove()
    assert metrics["shared_prefix_fraction"] == float(share)
    assert sum(encoded) == (4 if share else 16)
    # a group cut by micro-batches runs its prompt once in each part
    config.micro_batch_size = 3  # 4 + 4 + 4 + 4 rows in parts of 3: 3, 1+2, 2+1, 3, 3, 1
    assert trainer.update(batch)["shared_prefix_fraction"] == (15 / 16 if share else 0.0)  # the last part is a row alone


def test_both_ways_give_the_same_update():
    metrics = []
    for share in (True, False):
        model, adapter = make_tiny("llava")
        config = MultimodalRLConfig(rollouts_per_step=32, micro_batch_size=16, max_tokens=3, share_prefix=share, beta=0.1)
        trainer = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, config)
        trainer.set_environment("shapes-env", num_train_examples=8, num_eval_examples=1)
        metrics.append(trainer.step())
    # gradients agree to float32's rounding; the loss is a sum of terms of both signs, so its bound is absolute
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4, abs=1e-7)
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-6)
    assert metrics[0]["entropy"] == pytest.approx(metrics[1]["entropy"], rel=1e-5)


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
    assert dense.input_ids.shape == (1, benchmark.TEXT + 16 + 4 * 8) and len(dense.extra_model_kwargs["image_grid_thw"]) == 1
