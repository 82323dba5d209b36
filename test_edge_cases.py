"""Tests of the corners: batches with nothing to learn from, rewards that are no numbers, rollouts that went wrong.

    pytest test_edge_cases.py

Everything runs on the real thing: tiny models of both families, the server in this process, verifiers environments. A
rollout is edited by hand only to stand for a server that misbehaves.
"""

import copy
import math
import warnings
from dataclasses import fields, replace

import pytest
import torch
import verifiers as vf
from datasets import Dataset

import conftest
from conftest import DEMONSTRATIONS, message, picture
from local_server import LocalServer
from mm_grpo import LOSS_TYPES, MultimodalBatch, group_advantages, row_advantages, score
from rollouts import with_reward
from shared_prefix import find_shared_prompts

# The alarm of an update whose rollouts are not the policy's own: here it ends the test that did not expect it.
pytestmark = pytest.mark.filterwarnings("error:.*mismatch_threshold")
SILENT = 1e3  # mismatch_threshold of tests that edit the server's logprobs, or the model after it has sampled

INF, NAN = math.inf, math.nan
both_families = pytest.mark.parametrize("family", DEMONSTRATIONS)
# Server and trainer add the same float32 numbers in another order: logprobs of these models differ by about 1e-6.
ON_POLICY = 1e-4
SPREAD = [0.0, 1.0, 2.0, 3.0] * 2  # rewards of two groups of four


UNREADABLE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
PICTURES = [[picture(0), "red"], [picture(1), "what is the second colour ?"]]


def length_reward(completion):
    """Some number that differs between completions."""
    return len(str(completion[-1]["content"])) % 7 if completion else 0.0


def environment(prompts=PICTURES, reward=length_reward, kind=vf.SingleTurnEnv, **more):
    data = Dataset.from_list([{"prompt": message(*parts), "answer": ""} for parts in prompts])
    return kind(dataset=data, eval_dataset=data, rubric=vf.Rubric(funcs=[reward]), **more)


def make_trainer(family="qwen", env=None, **settings):
    """A trainer on 2 prompts x 4 completions of three tokens at most; see conftest."""
    small = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, learning_rate=1e-3)
    return conftest.make_trainer(family, env or environment(), **{**small, **settings})


def make_batch(trainer, rewards=None):
    """The batch of one collection of rollouts, 2 prompts x 4; with `rewards` in place of the environment's."""
    batch = trainer.adapter.build_batch(trainer.rollouts.collect())
    return batch if rewards is None else replace(batch, rewards=torch.tensor(rewards, dtype=torch.float32))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def gradient_of(trainer, batch):
    """One update's gradient as the optimizer gets it, one long vector; and the update's metrics."""
    seen = []

    def flat(*_):
        seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))

    hook = trainer.optimizer.register_step_pre_hook(flat)
    metrics = trainer.update(batch)
    hook.remove()
    return seen[-1], metrics


def all_finite(metrics):
    return all(math.isfinite(value) for value in metrics.values())


def on_policy(metrics):
    return 1 - ON_POLICY < metrics["ratio_min"] <= metrics["ratio_max"] < 1 + ON_POLICY


# ---------------------------------------------------------------- batches with nothing to learn from


def far_off(log_ratio):
    return lambda batch: replace(batch, behavior_logprobs=batch.behavior_logprobs - log_ratio * batch.loss_mask)


def rewarded(*rewards):
    return lambda batch: replace(batch, rewards=torch.tensor(rewards).repeat_interleave(8 // len(rewards)))


NOTHING_TO_LEARN = {  # what becomes of the batch, zero_spread_fraction, masked_fraction
    "an empty loss mask": (lambda batch: replace(batch, loss_mask=batch.loss_mask * 0), 0.0, 0.0),
    "every ratio too large": (far_off(5.0), 0.0, 1.0),
    "every ratio too small": (far_off(-5.0), 0.0, 1.0),
    "one row": (lambda batch: batch.select([2]), 1.0, 0.0),
    "groups of one row": (lambda batch: replace(batch, group_ids=torch.arange(8)), 1.0, 0.0),
    "rewards all 0": (rewarded(0.0), 1.0, 0.0),
    "rewards all 0.1": (rewarded(0.1), 1.0, 0.0),
    "rewards all 0.7": (rewarded(0.7), 1.0, 0.0),
    "rewards all 1e6": (rewarded(1e6), 1.0, 0.0),
    "rewards equal within each group": (rewarded(0.1, 0.7), 1.0, 0.0),
}


@both_families
@pytest.mark.parametrize(("change", "zero_spread", "masked"), NOTHING_TO_LEARN.values(), ids=NOTHING_TO_LEARN)
def test_a_batch_with_nothing_to_learn_from_changes_no_weight(change, zero_spread, masked, family):
    trainer = make_trainer(family, mismatch_threshold=SILENT)
    batch, before = change(make_batch(trainer, SPREAD)), weights_of(trainer.model)
    metrics = trainer.update(batch)
    assert metrics["grad_norm"] == 0 and unchanged(trainer.model, before) and all_finite(metrics)
    assert metrics["zero_spread_fraction"] == zero_spread and metrics["masked_fraction"] == masked


@pytest.mark.parametrize("reward", [0.0, 0.7, 1e6])
def test_equal_rewards_leave_the_pull_towards_the_reference_policy(reward):
    trainer = make_trainer(beta=0.1, learning_rate=1e-5)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(2)  # the policy has moved away from the reference
    batch = make_batch(trainer, [reward] * 8)
    first, second = trainer.update(batch), trainer.update(batch, on_policy=False)
    assert first["zero_spread_fraction"] == 1 and first["grad_norm"] > 0
    assert 0 < second["kl"] < first["kl"]


# ---------------------------------------------------------------- rewards


@both_families
@pytest.mark.parametrize("scale", [-1e-3, -1.0, 1e6, 1e37])
def test_advantages_over_the_group_std_make_negative_and_huge_rewards_harmless(scale, family):
    one, other = make_trainer(family), make_trainer(family)
    batch = make_batch(one, [0.0, 10.0, 20.0, 30.0, -30.0, 10.0, 0.0, 5.0])
    expected, _ = gradient_of(one, batch)
    gradient, metrics = gradient_of(other, replace(batch, rewards=batch.rewards * scale))
    # the 1e-4 beside the standard deviation (13, times 1e-3 for the smallest scale) takes up to 1 % off an advantage
    assert (gradient - math.copysign(1, scale) * expected).norm() < 0.01 * expected.norm() and all_finite(metrics)


def test_rewards_that_overflow_the_loss_never_reach_the_weights():
    trainer = make_trainer(scale_rewards="none")
    batch, before = make_batch(trainer, [3e38, -3e38, 3e38, 0.0] * 2), weights_of(trainer.model)
    with pytest.warns(UserWarning, match="skipped"):
        trainer.update(batch)
    assert unchanged(trainer.model, before)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_rewards_that_are_no_numbers_are_refused_by_name_or_dropped_with_their_rollouts(value):
    def reward(prompt, completion):
        return value if "second" in str(prompt) else length_reward(completion)

    trainer = make_trainer(env=environment(reward=reward))
    with pytest.raises(ValueError, match="rewards: expected finite"):
        make_batch(make_trainer(), [0.0, value, 1.0, 1.0] * 2)
    with pytest.raises(ValueError, match="rewards: expected finite"):
        group_advantages(torch.tensor([0.0, value]))
    with pytest.warns(UserWarning, match="4 of 8 rollouts.*reward="):
        metrics = trainer.step()
    assert metrics["rollouts_dropped"] == 4 and 0 < metrics["grad_norm"] < INF
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_gradient_that_is_no_number_skips_the_update_and_leaves_nothing_behind():
    trainer = make_trainer()
    batch, before = make_batch(trainer, SPREAD), weights_of(trainer.model)
    hook = trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * NAN)
    with pytest.warns(UserWarning, match="grad_norm=nan.*skipped"):
        trainer.update(batch)
    assert unchanged(trainer.model, before)
    hook.remove()
    assert 0 < trainer.update(batch)["grad_norm"] < INF and not unchanged(trainer.model, before)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


# ---------------------------------------------------------------- rows and tokens


def without_padding(row, length):
    """A batch of one row, padded on the right, that ends after `length` tokens."""
    by_token = ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")
    media = {
        name: tensor if name in row.media_spans else tensor[:, :length]
        for name, tensor in row.extra_model_kwargs.items()
    }
    return replace(row, **{name: getattr(row, name)[:, :length] for name in by_token}, extra_model_kwargs=media)


@both_families
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared prompts"])
def test_rows_of_very_different_lengths_score_as_each_row_alone(shared, family):
    trainer = make_trainer(family, env=environment([[picture(), "red"], [picture(), "red " * 400]]))
    batch, hidden = make_batch(trainer), trainer.adapter.placeholder_ids
    lengths = batch.attention_mask.sum(-1).tolist()
    assert max(lengths) > 10 * min(lengths)
    shared_prompts = find_shared_prompts(trainer.model, batch, hidden) if shared else None
    together, _ = score(trainer.model, batch, 1.0, hidden, shared_prompts)
    for i, length in enumerate(lengths):
        row = without_padding(batch.select([i]), length)
        alone, _ = score(trainer.model, row, 1.0, hidden)
        trained = row.loss_mask[0, 1:] == 1
        torch.testing.assert_close(together[i, : length - 1][trained], alone[0][trained], rtol=0, atol=ON_POLICY)


@both_families
def test_the_stop_token_is_trained_on_when_it_is_the_padding_token_too(family):
    """Masks made from ids lose the stop token where PAD is EOS: stopping gets no gradient. Ours come from lengths."""
    usual, same = (make_trainer(family, favoured="eos_token_id", by=2.5, learning_rate=1e-9) for _ in range(2))
    eos = same.tokenizer.pad_token_id = same.tokenizer.eos_token_id
    outputs = same.rollouts.collect()
    batch = replace(same.adapter.build_batch(outputs), rewards=torch.arange(8.0))
    assert (batch.input_ids == eos)[batch.attention_mask == 0].any()  # padded with it
    for ids, mask, rollout in zip(batch.input_ids, batch.loss_mask, outputs["outputs"]):
        assert ids[mask == 1].tolist() == rollout["trajectory"][0]["tokens"]["completion_ids"]
    stops = batch.loss_mask * (batch.input_ids == eos)
    assert 0 < stops.sum() < batch.loss_mask.sum()
    expected, _ = gradient_of(usual, replace(usual.adapter.build_batch(outputs), rewards=torch.arange(8.0)))
    # what padding is made of changes no sum
    torch.testing.assert_close(gradient_of(same, batch)[0], expected, rtol=0, atol=0)
    assert gradient_of(same, replace(batch, loss_mask=stops))[0].norm() > 0


@both_families
def test_a_policy_that_longs_for_placeholders_never_samples_one_and_its_ratio_stays_exact(family):
    trainer = make_trainer(family, favoured="image_token_id", by=50.0)
    batch = make_batch(trainer, SPREAD)
    assert not torch.isin(batch.input_ids[batch.loss_mask == 1], torch.tensor(trainer.adapter.placeholder_ids)).any()
    assert on_policy(trainer.update(batch))


LEFT_OUT = {  # what the server sends of a rollout, and what must be said of it
    "no token ids": (lambda tokens: None, "turn 0: tokens.*return_token_ids"),
    "too few logprobs": (
        lambda tokens: {**tokens, "completion_logprobs": []},
        "turn 0: completion_logprobs: .* got 0",
    ),
    "logprobs that are NaN": (
        lambda tokens: {**tokens, "completion_logprobs": [NAN] * len(tokens["completion_ids"])},
        "turn 0: completion_logprobs: expected finite.*nan",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_server_left_out_is_named_and_is_an_error_where_it_is_left_out_of_every_rollout(case):
    change, named = LEFT_OUT[case]
    trainer = make_trainer()
    outputs = trainer.rollouts.collect()

    def spoil(rollout):
        rollout["trajectory"][0]["tokens"] = change(rollout["trajectory"][0]["tokens"])

    spoil(outputs["outputs"][1])
    with pytest.warns(UserWarning, match=rf"1 of 8 .*rollout 1 .*: {named}"):
        assert trainer.adapter.build_batch(outputs).rollout_ids.tolist() == [0, 2, 3, 4, 5, 6, 7]
    for rollout in outputs["outputs"][:1] + outputs["outputs"][2:]:
        spoil(rollout)
    with pytest.raises(ValueError, match=rf"no rollout can be trained on .8 came.*tokens, 8 times.*{named}"):
        trainer.adapter.build_batch(outputs)


@both_families
def test_an_empty_completion_comes_back_and_its_one_stop_token_is_trained_on(family):
    trainer = make_trainer(family, favoured="eos_token_id", by=100.0)
    outputs = trainer.rollouts.collect()
    assert [rollout["error"] for rollout in outputs["outputs"]] == [None] * 8
    batch = trainer.adapter.build_batch(outputs)
    assert batch.input_ids[batch.loss_mask == 1].tolist() == [trainer.tokenizer.eos_token_id] * 8
    assert batch.loss_mask.sum(-1).tolist() == [1] * 8


# ---------------------------------------------------------------- rollouts that failed


@both_families
@pytest.mark.parametrize(
    ("parts", "reason"),
    [([UNREADABLE], "BadRequestError"), ([picture(), "red " * 60], "longer than the server's limit")],
    ids=["an image that cannot be read", "a prompt that is too long"],
)
def test_rollouts_that_failed_are_dropped_counted_and_named(parts, reason, family):
    trainer = make_trainer(family, env=environment([[picture(), "red"], parts]), max_model_len=60)
    with pytest.warns(UserWarning, match=f"4 of 8 rollouts cannot be trained on. First: rollout . .*{reason}"):
        metrics = trainer.step()
    assert metrics["rollouts_dropped"] == 4 and 0 < metrics["trained_tokens"] <= 4 * 3 and all_finite(metrics)


@pytest.mark.filterwarnings("ignore:8 of 8")
def test_when_every_rollout_failed_the_error_says_why():
    with pytest.raises(ValueError, match="no rollout can be trained on .8 came.*BadRequestError"):
        make_trainer(env=environment([[UNREADABLE]])).step()


# ---------------------------------------------------------------- several turns, completions cut off


class TwoTurns(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **_):
        return message(picture(7), "now the second picture")


@both_families
def test_a_rollout_that_was_split_into_two_rows_counts_once_in_its_groups_mean(family):
    """The tiny tokenizer leaves special tokens out of the text, so some histories come back as other ids than were
    sampled: those rollouts have to be split."""
    env = environment(kind=TwoTurns, max_turns=2)
    trainer = make_trainer(family, env=env, rollouts_per_step=24, rollouts_per_example=12)
    outputs = trainer.rollouts.collect()
    rollouts, batch = outputs["outputs"], trainer.adapter.build_batch(outputs)
    assert len(rollouts) < len(batch) < 2 * len(rollouts)  # some are split, some are not
    advantages = row_advantages(batch, "group").tolist()
    for row, i in enumerate(batch.rollout_ids.tolist()):
        rewards = [rollout["reward"] for rollout in rollouts if rollout["example_id"] == rollouts[i]["example_id"]]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        # float32, around 1
        assert advantages[row] == pytest.approx((rollouts[i]["reward"] - mean) / (std + 1e-4), abs=1e-6)
    assert on_policy(trainer.update(batch))


@both_families
def test_completions_that_were_cut_off_are_left_out_on_request_only(family):
    settings = dict(favoured="eos_token_id", by=3.5, max_tokens=2)
    masking, other = (make_trainer(family, mask_truncated_completions=mask, **settings) for mask in (True, False))
    batch = replace(make_batch(masking), rewards=torch.arange(8.0))
    cut = torch.tensor(
        [masking.tokenizer.eos_token_id not in ids[mask == 1] for ids, mask in zip(batch.input_ids, batch.loss_mask)]
    )
    assert 0 < cut.sum() < 8
    gradient, metrics = gradient_of(masking, batch)
    assert metrics["trained_tokens"] == batch.loss_mask[~cut].sum()
    by_hand = replace(batch, loss_mask=batch.loss_mask * ~cut[:, None])
    torch.testing.assert_close(gradient, gradient_of(other, by_hand)[0], rtol=0, atol=0)
    assert other.update(batch, on_policy=False)["trained_tokens"] == batch.loss_mask.sum()
    with pytest.raises(ValueError, match="is_truncated"):
        masking.update(replace(batch, is_truncated=None))


# ---------------------------------------------------------------- one update


@both_families
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_sum_to_the_gradient_of_the_whole_batch(loss_type, family):
    """However the batch is cut, and whether its prompts are run once or once a row: one gradient, the same metrics."""
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) / 2  # ratios on both sides of every clip
    results = {}
    for tokens, share in ((1000, True), (50, True), (1, True), (1000, False), (100, False)):
        cut = dict(micro_batch_tokens=tokens, share_prefix=share)
        settings = dict(loss_type=loss_type, beta=0.1, max_grad_norm=1e6, mismatch_threshold=SILENT)
        trainer = make_trainer(family, **cut, **settings)
        batch = make_batch(trainer, [0.0, 1.0, 2.0, 5.0] * 2)
        batch.behavior_logprobs += noise[:, : batch.input_ids.shape[1]] * batch.loss_mask
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)  # away from the reference
        results[tokens, share] = gradient_of(trainer, batch)
    whole, expected = results.pop((1000, True))
    assert expected["shared_prefix_fraction"] == 1 and expected["kl"] > 0 and expected["mismatch_kl"] > 0.01
    for (_, share), (gradient, metrics) in results.items():
        assert metrics.pop("shared_prefix_fraction") == float(share)
        # float32 sums of a few thousand terms in another order; a loss of terms of both signs rounds as its terms do
        assert (gradient - whole).norm() < 1e-5 * whole.norm()
        assert metrics == pytest.approx({name: expected[name] for name in metrics}, rel=1e-5, abs=1e-6)


def test_later_updates_of_a_batch_are_off_policy_and_the_first_is_not():
    trainer = make_trainer(updates_per_batch=3)
    metrics = trainer.update(make_batch(trainer, SPREAD))
    assert on_policy(metrics) and metrics["last_update/ratio_max"] > 1 + 10 * ON_POLICY
    assert metrics["last_update/mismatch_kl"] > 100 * metrics["mismatch_kl"] >= 0


def test_the_reference_policy_is_a_frozen_copy_that_only_a_kl_penalty_needs():
    assert make_trainer(beta=0.0).ref_policy is None
    trainer = make_trainer(beta=0.1)
    before = weights_of(trainer.model)
    trainer.update(make_batch(trainer, SPREAD))
    assert unchanged(trainer.ref_policy.model, before) and not unchanged(trainer.model, before)
    assert not any(p.requires_grad for p in trainer.ref_policy.parameters())


@both_families
def test_bf16_runs_a_step_and_leaves_the_weights_in_float32(family):
    trainer = make_trainer(family, bf16=True)
    before = weights_of(trainer.model)
    metrics = trainer.step()
    assert all_finite(metrics) and not unchanged(trainer.model, before)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    # bfloat16 keeps 8 bits: logits around 1 are off by about 1 %, and never by 10 %
    assert 0.9 < metrics["ratio_min"] <= metrics["ratio_max"] < 1.1


def test_max_grad_norm_scales_the_gradient_down_and_never_turns_it():
    free, bound = make_trainer(max_grad_norm=1e6), make_trainer(max_grad_norm=0.01)
    batch = make_batch(free, SPREAD)
    (whole, metrics), (small, _) = gradient_of(free, batch), gradient_of(bound, batch)
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4) and metrics["grad_norm"] > 0.1
    # clip_grad_norm_ adds 1e-6 to the norm
    torch.testing.assert_close(small, whole * 0.01 / whole.norm(), rtol=1e-3, atol=1e-9)


def test_an_update_does_not_modify_its_batch():
    trainer = make_trainer(mask_truncated_completions=True, updates_per_batch=2, micro_batch_tokens=50)
    batch = make_batch(trainer, SPREAD)
    before = copy.deepcopy(batch)
    trainer.update(batch)
    for f in fields(MultimodalBatch):
        torch.testing.assert_close(getattr(batch, f.name), getattr(before, f.name), rtol=0, atol=0)


# ---------------------------------------------------------------- the alarm of a server that disagrees


@pytest.mark.parametrize("times", [1 - 1e-3, 1 + 1e-3], ids=["just below", "just above"])
@pytest.mark.parametrize(
    ("trainer_bf16", "server_bf16", "threshold"),
    [(False, False, 1e-3), (True, True, 0.1), (True, False, 0.1), (False, True, 0.1)],
)
def test_a_difference_above_the_precision_of_the_forwards_warns_and_one_below_does_not(
    trainer_bf16, server_bf16, threshold, times
):
    """By how much logprobs may differ without a word: 1e-3 in float32, 0.1 where a side computes in bfloat16."""
    model, adapter = conftest.make_tiny("qwen")
    server = LocalServer(model, adapter, bf16=server_bf16)
    trainer = make_trainer(tiny=(model, adapter), server=server, bf16=trainer_bf16, share_prefix=False)
    batch = make_batch(trainer, SPREAD)
    with torch.no_grad():
        own = torch.nn.functional.pad(trainer.policy(batch)[0], (1, 0))
    batch = replace(batch, behavior_logprobs=(own - times * threshold) * batch.loss_mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = trainer.update(batch)
    # the same forward twice; logprobs of about 4 are rounded to 5e-7, half of the distance to the threshold in float32
    assert metrics["logprob_difference"] == pytest.approx(times * threshold, abs=5e-7)
    alarms = [str(warning.message) for warning in caught if "mismatch_threshold" in str(warning.message)]
    assert len(alarms) == (times > 1) and all(f"mismatch_threshold={threshold:g} " in alarm for alarm in alarms)


def test_a_run_that_stops_at_a_mismatch_leaves_weights_and_optimizer_as_they_were():
    trainer = make_trainer(on_mismatch="error", updates_per_batch=2)
    batch, before = make_batch(trainer, SPREAD), weights_of(trainer.model)
    with pytest.raises(RuntimeError, match="logprob_difference=0.5 is above mismatch_threshold=0.001"):
        trainer.update(far_off(0.5)(batch))
    assert unchanged(trainer.model, before) and not trainer.optimizer.state
    assert all(p.grad is None for p in trainer.model.parameters())
    assert on_policy(trainer.update(batch)) and not unchanged(trainer.model, before)  # and the next batch may train


# ---------------------------------------------------------------- what is trained, and in which order


def test_a_metric_of_the_rubric_is_trained_where_it_is_named():
    trainer = make_trainer(primary_reward_key="form", rollouts_per_step=32, rollouts_per_example=16)
    trainer.set_environment("shapes-env", num_train_examples=2, num_eval_examples=1)
    outputs = trainer.rollouts.collect()
    metrics, rewards = ([rollout[key] for rollout in outputs["outputs"]] for key in ("metrics", "reward"))
    rewards_of_batch = trainer.adapter.build_batch(outputs).rewards.tolist()
    assert rewards_of_batch == pytest.approx([values["form"] for values in metrics])
    assert [values["form"] for values in metrics] != [values["colour"] for values in metrics]

    changed = with_reward(outputs, "colour")
    assert [rollout["reward"] for rollout in changed["outputs"]] == [values["colour"] for values in metrics]
    assert [rollout["reward"] for rollout in outputs["outputs"]] == rewards  # the input is as it was
    with pytest.raises(ValueError, match="primary_reward_key='colours'.*'reward'.*'colour', 'exact', 'form'.*'shape'"):
        with_reward(outputs, "colours")


def test_a_folder_that_holds_an_earlier_run_is_refused_and_left_as_it_is(tmp_path):
    def run():
        make_trainer(output_dir=str(tmp_path), max_steps=1, eval_examples=0).train()
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = run()
    with pytest.raises(FileExistsError, match=f"output_dir={str(tmp_path)!r}"):
        run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_every_example_comes_once_an_epoch_in_an_order_of_the_seed_and_the_epoch():
    def epochs(seed):
        one_prompt_a_step = dict(rollouts_per_step=2, rollouts_per_example=2)
        rollouts = make_trainer(env=environment([["red"]] * 9), seed=seed, **one_prompt_a_step).rollouts
        return [[rollouts.examples(9 * epoch + i)[0]["example_id"] for i in range(9)] for epoch in range(3)]

    orders = epochs(0)
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epochs(0) == orders and epochs(1)[0] not in orders
