"""Tests of the corners: batches with nothing to learn from, rewards that are no numbers, rollouts that went wrong,
settings that cannot be.

    pytest test_edge_cases.py

Everything runs on the real thing: tiny models of both families, the server in this process, verifiers environments. A
rollout is edited by hand only to stand for a server that misbehaves.
"""

import ast
import copy
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import verifiers as vf
from datasets import Dataset
from torch import nn

import mm_grpo
from conftest import make_tiny
from inference import LocalServer
from mm_grpo import (
    LOSS_TYPES, MultimodalBatch, MultimodalGRPOTrainer, MultimodalRLConfig, group_advantages, rollout_metrics,
    row_advantages, score, shared_prefixes, with_reward,
)  # fmt: skip
from shapes_env import draw_shape, png_data_uri
from tiny_vlm import FAMILIES

INF, NAN = math.inf, math.nan
both_families = pytest.mark.parametrize("family", FAMILIES)
# Server and trainer add the same float32 numbers in another order: logprobs of these models differ by about 1e-6.
ON_POLICY = 1e-4
SPREAD = [0.0, 1.0, 2.0, 3.0] * 2  # rewards of two groups of four


def text(words):
    return {"type": "text", "text": words}


def picture(seed=0):
    return {"type": "image_url", "image_url": {"url": png_data_uri(draw_shape("red", "circle", 56, random.Random(seed)))}}


UNREADABLE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
PICTURES = [[picture(0), text("red")], [picture(1), text("what is the second colour ?")]]


def length_reward(completion):
    """Some number that differs between completions."""
    return len(str(completion[-1]["content"])) % 7 if completion else 0.0


def environment(prompts=PICTURES, reward=length_reward, kind=vf.SingleTurnEnv, **more):
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}], "answer": ""} for parts in prompts])
    return kind(dataset=data, eval_dataset=data, rubric=vf.Rubric(funcs=[reward]), **more)


def make_trainer(family="qwen", env=None, favoured=None, by=0.0, max_model_len=None, **settings):
    """A trainer with a tiny model of its own; `favoured` is a token whose logit is `by` above what the weights say."""
    model, adapter = make_tiny(family)
    if favoured is not None:
        head = nn.Linear(*model.lm_head.weight.T.shape)
        head.weight.data.copy_(model.lm_head.weight)
        head.bias.data.zero_()[getattr(adapter, favoured, None) or getattr(adapter.tokenizer, favoured)] = by
        model.lm_head = head
    small = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, learning_rate=1e-3, mismatch_threshold=1e3)
    server = LocalServer(model, adapter, max_model_len=max_model_len) if max_model_len else None
    config = MultimodalRLConfig(**{**small, **settings})
    return MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, config, env=env or environment(), server=server)


def make_batch(trainer, rewards=None):
    """The batch of one collection of rollouts, 2 prompts x 4; with `rewards` in place of the environment's."""
    batch = trainer.adapter.build_batch(trainer.collect())
    return batch if rewards is None else replace(batch, rewards=torch.tensor(rewards, dtype=torch.float32))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def gradient_of(trainer, batch):
    """One update's gradient as the optimizer gets it, one long vector; and the update's metrics."""
    seen = []
    flat = lambda *_: seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
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


NOTHING_TO_LEARN = {
    "an empty loss mask": lambda batch: replace(batch, loss_mask=batch.loss_mask * 0),
    "every ratio too large": far_off(5.0),
    "every ratio too small": far_off(-5.0),
    "one row": lambda batch: batch.select([2]),
    "groups of one row": lambda batch: replace(batch, group_ids=torch.arange(8)),
    "rewards all 0": rewarded(0.0),
    "rewards all 0.1": rewarded(0.1),
    "rewards all 0.7": rewarded(0.7),
    "rewards all 1e6": rewarded(1e6),
    "rewards equal within each group": rewarded(0.1, 0.7),
}


@both_families
@pytest.mark.parametrize("case", NOTHING_TO_LEARN)
def test_a_batch_with_nothing_to_learn_from_changes_no_weight(case, family):
    trainer = make_trainer(family)
    batch, before = NOTHING_TO_LEARN[case](make_batch(trainer, SPREAD)), weights_of(trainer.model)
    metrics = trainer.update(batch)
    assert metrics["grad_norm"] == 0 and unchanged(trainer.model, before) and all_finite(metrics)
    assert metrics["zero_spread_fraction"] == float("reward" in case or "row" in case)
    assert metrics["masked_fraction"] == float("ratio" in case)


@pytest.mark.parametrize("reward", [0.0, 0.7, 1e6])
def test_equal_rewards_leave_the_pull_towards_the_reference_policy(reward):
    trainer = make_trainer(beta=0.1, learning_rate=1e-5)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(2)  # the policy has moved away from the reference
    batch = make_batch(trainer, [reward] * 8)
    first, second = trainer.update(batch), trainer.update(batch)
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


@both_families
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared prompts"])
def test_rows_of_very_different_lengths_score_as_each_row_alone(shared, family):
    trainer = make_trainer(family, env=environment([[picture(), text("red")], [picture(), text("red " * 400)]]))
    batch, hidden = make_batch(trainer), trainer.adapter.placeholder_ids
    lengths = batch.attention_mask.sum(-1).tolist()
    assert max(lengths) > 10 * min(lengths)
    prefixes = shared_prefixes(trainer.model, batch, hidden) if shared else None
    together, _ = score(trainer.model, batch, 1.0, hidden, prefixes)
    for i, length in enumerate(lengths):
        row = batch.select([i])
        row = row._map(lambda t: t[:, :length] if t.ndim > 1 else t, lambda _, t: t[:, :length] if t.shape == row.input_ids.shape else t)
        alone, _ = score(trainer.model, row, 1.0, hidden)
        trained = row.loss_mask[0, 1:] == 1
        torch.testing.assert_close(together[i, : length - 1][trained], alone[0][trained], rtol=0, atol=ON_POLICY)


@both_families
def test_the_stop_token_is_trained_on_when_it_is_the_padding_token_too(family):
    """Masks made from ids lose the stop token where PAD is EOS, and stopping gets no gradient. Ours come from lengths."""
    usual, same = (make_trainer(family, favoured="eos_token_id", by=2.5, learning_rate=1e-9) for _ in range(2))
    eos = same.tokenizer.pad_token_id = same.tokenizer.eos_token_id
    outputs = same.collect()
    batch = replace(same.adapter.build_batch(outputs), rewards=torch.arange(8.0))
    assert (batch.input_ids == eos)[batch.attention_mask == 0].any()  # padded with it
    for ids, mask, rollout in zip(batch.input_ids, batch.loss_mask, outputs["outputs"]):
        assert ids[mask == 1].tolist() == rollout["trajectory"][0]["tokens"]["completion_ids"]
    stops = batch.loss_mask * (batch.input_ids == eos)
    assert 0 < stops.sum() < batch.loss_mask.sum()
    expected, _ = gradient_of(usual, replace(usual.adapter.build_batch(outputs), rewards=torch.arange(8.0)))
    torch.testing.assert_close(gradient_of(same, batch)[0], expected, rtol=0, atol=0)  # what padding is made of changes no sum
    assert gradient_of(same, replace(batch, loss_mask=stops))[0].norm() > 0


@both_families
def test_a_policy_that_longs_for_placeholders_never_samples_one_and_its_ratio_stays_exact(family):
    trainer = make_trainer(family, favoured="image_token_id", by=50.0)
    batch = make_batch(trainer, SPREAD)
    assert not torch.isin(batch.input_ids[batch.loss_mask == 1], torch.tensor(trainer.adapter.placeholder_ids)).any()
    assert on_policy(trainer.update(batch))


@both_families
def test_a_rollout_with_a_sampled_placeholder_is_dropped_loudly(family):
    trainer = make_trainer(family, favoured="image_token_id", by=2.5)
    placeholders, trainer.adapter.placeholder_ids = trainer.adapter.placeholder_ids, ()  # a server that ignores logit_bias
    outputs = trainer.collect()
    trainer.adapter.placeholder_ids = placeholders
    sampled = [rollout["trajectory"][0]["tokens"]["completion_ids"] for rollout in outputs["outputs"]]
    good = [i for i, ids in enumerate(sampled) if not set(ids) & set(placeholders)]
    assert 0 < len(good) < 8
    with pytest.warns(UserWarning, match="sampled the media placeholder.*logit_bias"):
        assert trainer.adapter.build_batch(outputs).rollout_ids.tolist() == good


LEFT_OUT = {  # what the server sends of the second rollout, and what the error must say
    "no token ids": (lambda tokens: None, "rollout 1, turn 0: tokens.*return_token_ids"),
    "too few logprobs": (lambda tokens: {**tokens, "completion_logprobs": []}, "rollout 1, turn 0: completion_logprobs: .* got 0"),
    "logprobs that are NaN": (
        lambda tokens: {**tokens, "completion_logprobs": [NAN] * len(tokens["completion_ids"])}, "behavior_logprobs: .*finite values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_server_left_out_is_an_error_that_names_it(case):
    change, named = LEFT_OUT[case]
    trainer = make_trainer()
    outputs = trainer.collect()
    turn = outputs["outputs"][1]["trajectory"][0]
    turn["tokens"] = change(turn["tokens"])
    with pytest.raises(ValueError, match=named):
        trainer.adapter.build_batch(outputs)


@both_families
def test_an_empty_completion_comes_back_and_its_one_stop_token_is_trained_on(family):
    trainer = make_trainer(family, favoured="eos_token_id", by=100.0)
    outputs = trainer.collect()
    assert [rollout["error"] for rollout in outputs["outputs"]] == [None] * 8
    batch = trainer.adapter.build_batch(outputs)
    assert batch.input_ids[batch.loss_mask == 1].tolist() == [trainer.tokenizer.eos_token_id] * 8
    assert batch.loss_mask.sum(-1).tolist() == [1] * 8


# ---------------------------------------------------------------- rollouts that failed


@both_families
@pytest.mark.parametrize(
    ("parts", "reason"),
    [([UNREADABLE], "BadRequestError"), ([picture(), text("red " * 60)], "longer than the server's limit")],
    ids=["an image that cannot be read", "a prompt that is too long"],
)
def test_rollouts_that_failed_are_dropped_counted_and_named(parts, reason, family):
    trainer = make_trainer(family, env=environment([[picture(), text("red")], parts]), max_model_len=60)
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
        return [{"role": "user", "content": [picture(7), text("now the second picture")]}]


@both_families
def test_a_later_turn_continues_its_row_or_starts_another_and_the_rollout_counts_once(family):
    """The tiny tokenizer leaves special tokens out of the text, so some histories come back as other ids than were
    sampled: those rollouts have to be split."""
    trainer = make_trainer(family, env=environment(kind=TwoTurns, max_turns=2), rollouts_per_step=24, rollouts_per_example=12)
    outputs = trainer.collect()
    rollouts, batch = outputs["outputs"], trainer.adapter.build_batch(outputs)
    split = 0
    for i, rollout in enumerate(rollouts):
        first, second = (turn["tokens"] for turn in rollout["trajectory"])
        rows = (batch.rollout_ids == i).nonzero().flatten().tolist()
        held = [batch.input_ids[row][batch.attention_mask[row] == 1].tolist() for row in rows]
        trained = [batch.input_ids[row][batch.loss_mask[row] == 1].tolist() for row in rows]
        start, whole = (tokens["prompt_ids"] + tokens["completion_ids"] for tokens in (first, second))
        if len(rows) == 1:
            assert held == [whole] and trained == [first["completion_ids"] + second["completion_ids"]]
        else:
            assert held == [start, whole] and trained == [first["completion_ids"], second["completion_ids"]]
            assert whole[: len(start)] != start
            split += 1
    assert 0 < split < len(rollouts) and rollout_metrics(outputs, batch)["rollouts_dropped"] == 0

    advantages = row_advantages(batch, "group").tolist()
    for row, i in enumerate(batch.rollout_ids.tolist()):
        rewards = [rollout["reward"] for rollout in rollouts if rollout["example_id"] == rollouts[i]["example_id"]]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        assert advantages[row] == pytest.approx((rollouts[i]["reward"] - mean) / (std + 1e-4), abs=1e-6)  # float32, around 1
    assert on_policy(trainer.update(batch))


@both_families
def test_completions_that_were_cut_off_are_left_out_on_request_only(family):
    settings = dict(favoured="eos_token_id", by=2.5, max_tokens=2)
    masking, other = (make_trainer(family, mask_truncated_completions=mask, **settings) for mask in (True, False))
    batch = replace(make_batch(masking), rewards=torch.arange(8.0))
    cut = torch.tensor([masking.tokenizer.eos_token_id not in ids[mask == 1] for ids, mask in zip(batch.input_ids, batch.loss_mask)])
    assert 0 < cut.sum() < 8
    gradient, metrics = gradient_of(masking, batch)
    assert metrics["trained_tokens"] == batch.loss_mask[~cut].sum()
    by_hand = replace(batch, loss_mask=batch.loss_mask * ~cut[:, None])
    torch.testing.assert_close(gradient, gradient_of(other, by_hand)[0], rtol=0, atol=0)
    assert other.update(batch)["trained_tokens"] == batch.loss_mask.sum()
    with pytest.raises(ValueError, match="is_truncated"):
        masking.update(replace(batch, is_truncated=None))


# ---------------------------------------------------------------- one update


@both_families
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_sum_to_the_gradient_of_the_whole_batch(loss_type, family):
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) / 2  # ratios on both sides of every clip
    gradients = {}
    for size in (8, 3, 1):
        trainer = make_trainer(family, loss_type=loss_type, micro_batch_size=size, beta=0.1, max_grad_norm=1e6)
        batch = make_batch(trainer, [0.0, 1.0, 2.0, 5.0] * 2)
        batch.behavior_logprobs += noise[:, : batch.input_ids.shape[1]] * batch.loss_mask
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)  # away from the reference
        gradients[size], metrics = gradient_of(trainer, batch)
    for size in (3, 1):  # float32 sums of a few thousand terms in another order
        assert (gradients[size] - gradients[8]).norm() < 1e-5 * gradients[8].norm()
    assert metrics["kl"] > 0 and metrics["mismatch_kl"] > 0.01


def test_later_updates_of_a_batch_are_off_policy_and_the_first_is_not():
    trainer = make_trainer(updates_per_batch=3)
    metrics = trainer.update(make_batch(trainer, SPREAD))
    assert on_policy(metrics) and metrics["last_update/ratio_max"] > 1 + 10 * ON_POLICY
    assert metrics["last_update/mismatch_kl"] > 100 * metrics["mismatch_kl"] >= 0


def test_the_reference_policy_is_a_frozen_copy_that_only_a_kl_penalty_needs():
    assert make_trainer(beta=0.0).ref_model is None
    trainer = make_trainer(beta=0.1)
    before = weights_of(trainer.model)
    trainer.update(make_batch(trainer, SPREAD))
    assert unchanged(trainer.ref_model, before) and not unchanged(trainer.model, before)
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


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
    torch.testing.assert_close(small, whole * 0.01 / whole.norm(), rtol=1e-3, atol=1e-9)  # clip_grad_norm_ adds 1e-6 to the norm


def test_an_update_does_not_modify_its_batch():
    trainer = make_trainer(mask_truncated_completions=True, updates_per_batch=2, micro_batch_size=3)
    batch = make_batch(trainer, SPREAD)
    before = copy.deepcopy(batch)
    trainer.update(batch)
    for f in fields(MultimodalBatch):
        torch.testing.assert_close(getattr(batch, f.name), getattr(before, f.name), rtol=0, atol=0)


# ---------------------------------------------------------------- config

IMPOSSIBLE = {
    **dict.fromkeys(("learning_rate", "temperature", "max_grad_norm"), (0.0, -1.0, INF, NAN)),
    **dict.fromkeys(("generation_timeout", "vllm_server_timeout"), (0.0, -1.0, INF, NAN)),
    **dict.fromkeys(("updates_per_batch", "micro_batch_size", "max_tokens", "log_every_steps"), (0, -1)),
    "max_concurrent": (0, -1, 7),  # of a group's 8 rollouts
    **dict.fromkeys(("max_steps", "eval_examples", "sync_to_vllm_every"), (-1,)),
    **dict.fromkeys(("weight_decay", "clip_high", "beta"), (-0.1, NAN)),
    "rollouts_per_example": (1, 0), "rollouts_per_step": (0, 4, 12), "clip_low": (-0.1, 1.0, NAN), "mask_ratio_low": (-0.1, 1.1, NAN),
    "mask_ratio_high": (0.9, NAN), "mismatch_threshold": (0.0, NAN, "much"), "on_mismatch": ("stop",), "vllm_server_port": (0, 65536), "loss_type": ("ppo",),
    "scale_rewards": ("both",), "env_args": ("{", "red", [1], 7),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_an_impossible_setting_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ValueError) as error:
        MultimodalRLConfig(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r}: must ")


def test_every_number_and_choice_of_the_config_has_a_rule():
    ruled = {f.name for f in fields(MultimodalRLConfig) if f.type in ("int", "float") or f.type.startswith("Literal")}
    assert set(IMPOSSIBLE) >= ruled - {"seed"}  # any seed will do


def test_settings_on_the_edge_of_the_possible_are_taken():
    MultimodalRLConfig(mask_ratio_low=0.0, mask_ratio_high=INF, clip_high=INF)
    MultimodalRLConfig(
        clip_low=0.0, clip_high=0.0, mask_ratio_low=1.0, mask_ratio_high=1.0, beta=0.0, weight_decay=0.0, max_steps=0,
        eval_examples=0, sync_to_vllm_every=0, rollouts_per_example=2, rollouts_per_step=2, vllm_server_port=65535,
    )  # fmt: skip


def test_every_setting_is_read_somewhere():
    """A setting that nothing reads is a lie to the user."""
    top = ast.parse(Path(mm_grpo.__file__).read_text()).body
    outside = [node for part in top if getattr(part, "name", "") != "MultimodalRLConfig" for node in ast.walk(part)]
    attributes = [node for node in outside if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if (getattr(node.value, "attr", None) or getattr(node.value, "id", None)) == "config"}
    assert {f.name for f in fields(MultimodalRLConfig)} <= read
    assert all(f.metadata["help"] for f in fields(MultimodalRLConfig))


def test_env_args_are_the_same_as_a_dict_and_as_json():
    assert MultimodalRLConfig(env_args='{"blind": true}').env_args == MultimodalRLConfig(env_args={"blind": True}).env_args
    assert MultimodalRLConfig(env_args=None).env_args == MultimodalRLConfig(env_args="{}").env_args == {}
    with pytest.raises(ValueError, match="env_args.*must be a JSON object"):
        MultimodalRLConfig(env_args="[1]")


# ---------------------------------------------------------------- what is trained, and in which order


def test_a_metric_of_the_rubric_is_trained_where_it_is_named():
    trainer = make_trainer(primary_reward_key="form", rollouts_per_step=32, rollouts_per_example=16)
    trainer.set_environment("shapes-env", num_train_examples=2, num_eval_examples=1)
    outputs = trainer.collect()
    metrics, rewards = ([rollout[key] for rollout in outputs["outputs"]] for key in ("metrics", "reward"))
    assert trainer.adapter.build_batch(outputs).rewards.tolist() == pytest.approx([values["form"] for values in metrics])
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
        trainer = make_trainer(env=environment([[text("red")]] * 9), seed=seed)
        return [[trainer.next_example()["example_id"] for _ in range(9)] for _ in range(3)]

    orders = epochs(0)
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epochs(0) == orders and epochs(1)[0] not in orders
