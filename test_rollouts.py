"""Tests of the collector: which policy sampled what, when the server gets new weights, what runs ahead, what is let go.

    pytest test_rollouts.py

A second server in this process, with a copy of the weights, stands for one far away; test_vllm.py has the real one.
"""

import asyncio
import contextlib
import copy
import functools
import inspect
import json
import math
import random
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import verifiers as vf
from datasets import Dataset

import conftest
from checkpoint import checkpoints
from conftest import make_tiny, message
from local_server import LocalServer
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig, score
from rollouts import ATTEMPTS, Rollouts, RolloutsAhead, Server
from rows import NoRollouts

CLOSE = (
    1e-4  # between two float32 forwards of one token, which differ by about 1e-6; another policy's by more than 1e-3
)


class OwnWeights(LocalServer):
    """A server with weights of its own, that is lost during some collections (the first one is 1)."""

    shares_weights = False

    def __init__(self, model, adapter, lost_in=()):
        super().__init__(copy.deepcopy(model), adapter)
        self.lost_in, self.collections, self.connected, self.updates = lost_in, 0, 0, 0

    def connect(self):
        self.connected += 1

    def sync(self, model):
        self.model.load_state_dict(model.state_dict())
        self.updates += 1

    def up_to_date(self):
        self.collections += 1
        return self.collections not in self.lost_in


def make_trainer(lost_in=(), **settings):
    model, adapter = make_tiny("qwen")
    small = dict(rollouts_per_step=16, rollouts_per_example=4, max_tokens=3, max_steps=5, learning_rate=5e-3)
    config = MultimodalRLConfig(**{**small, **settings})
    server = OwnWeights(model, adapter, lost_in)
    with torch.no_grad():  # it starts from other weights
        server.model.lm_head.weight.mul_(2)
    trainer = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, config, server=server)
    trainer.set_environment("shapes-env", num_train_examples=16, num_eval_examples=4)
    return trainer


def steps(trainer, count):
    """The metrics of some steps; that old rollouts are no fault of anybody's is known here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was lost during the rollouts")
        return [trainer.step() for _ in range(count)]


def on_policy(metrics):
    return max(abs(math.log(metrics["ratio_min"])), abs(math.log(metrics["ratio_max"]))) < CLOSE


def note_prompts(trainer):
    """The example ids of each collection, as they are asked for."""
    asked, roll_out = [], trainer.rollouts.roll_out

    def noted(examples, temperature):
        asked.append([example["example_id"] for example in examples])
        return roll_out(examples, temperature)

    trainer.rollouts.roll_out = noted
    return asked


# ---------------------------------------------------------------- which policy


def test_the_server_gets_the_weights_before_the_first_rollouts_and_after_each_step():
    trainer = make_trainer()
    assert trainer.rollouts.server_version is None  # nobody knows what it started from
    metrics = steps(trainer, 3)
    assert all(map(on_policy, metrics)) and [step["lag"] for step in metrics] == [0, 0, 0]
    assert (trainer.policy.version, trainer.rollouts.policy_version, trainer.rollouts.server_version) == (3, 2, 3)
    assert trainer.server.updates == 4


def test_between_weight_updates_the_lag_counts_the_steps():
    trainer = make_trainer(sync_to_vllm_every=2)
    metrics = steps(trainer, 5)
    assert [step["lag"] for step in metrics] == [0, 1, 0, 1, 0]
    assert list(map(on_policy, metrics)) == [True, False, True, False, True]


def test_without_weight_updates_the_server_keeps_what_it_started_from():
    trainer = make_trainer(sync_to_vllm_every=0, mismatch_threshold=1e3)
    metrics = steps(trainer, 2)
    assert trainer.server.updates == 0 and not any(map(on_policy, metrics))
    assert [step["lag"] for step in metrics] == [0, 1]


def test_an_evaluation_between_two_weight_updates_is_of_the_newest_policy():
    trainer = make_trainer(sync_to_vllm_every=3, eval_examples=4)
    steps(trainer, 1)
    assert set(trainer.evaluate()) >= {"reward", "exact"}
    (metrics,) = steps(trainer, 1)
    assert metrics["lag"] == 0 and on_policy(metrics)  # of the weights that the evaluation brought


def test_no_evaluation_examples_mean_no_evaluation():
    """0 meant none before and after training, and all where `evaluate` was called."""
    trainer = make_trainer(eval_examples=0)
    assert trainer.evaluate() == {} and trainer.server.updates == 0


# ---------------------------------------------------------------- in which order


@pytest.mark.parametrize("kind", ["each rollout", "each group"])
def test_reward_functions_are_called_in_the_order_of_the_rollouts(kind, monkeypatch):
    """verifiers handles each answer in threads, which come back in any order: a reward that drew from a global
    generator belonged to another rollout now and then, so that a run's bits differed. Here every thread dawdles."""
    called, submit, dice = [], ThreadPoolExecutor.submit, random.Random(0)

    def dawdle(pause, work, *args, **named):
        time.sleep(pause)
        return work(*args, **named)

    late = lambda self, work, *args, **named: submit(self, dawdle, 2e-3 * dice.random(), work, *args, **named)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", late)

    def in_turn(state):
        called.append(state["example_id"])
        return float(len(called))

    def of_group(states):
        called.extend(state["example_id"] for state in states)
        return [0.0] * len(states)

    prompts = [{"prompt": message("red " * (i % 3)), "answer": ""} for i in range(32)]
    funcs = [in_turn] if kind == "each rollout" else [of_group]
    env = vf.SingleTurnEnv(dataset=Dataset.from_list(prompts), rubric=vf.Rubric(funcs=funcs))
    small = dict(rollouts_per_step=64, rollouts_per_example=2, max_tokens=2)
    outputs = conftest.make_trainer("qwen", env=env, **small).rollouts.collect()["outputs"]
    assert called == [rollout["example_id"] for rollout in outputs] and len(set(called)) == 32


def test_threads_of_an_environment_stay_threads():
    used = []

    class Slow(vf.SingleTurnEnv):
        async def setup_state(self, state):
            used.append(await asyncio.to_thread(threading.current_thread))

    rubric = vf.Rubric(funcs=[lambda completion: 0.0])
    env = Slow(dataset=Dataset.from_list([{"prompt": message("red"), "answer": ""}]), rubric=rubric)
    trainer = conftest.make_trainer("qwen", env=env, rollouts_per_step=2, rollouts_per_example=2, max_tokens=2)
    assert [rollout["error"] for rollout in trainer.rollouts.collect()["outputs"]] == [None] * 2
    assert len(used) == 2 and trainer.rollouts.thread not in used


class Judge:
    """Reward functions of every kind."""

    def method(self, completion, answer="", *, info=None):
        return 1.0

    def __call__(self, completion, **more):
        return 2.0


def passed_on(function):
    @functools.wraps(function)
    def wrapper(*args, **named):
        return function(*args, **named)

    return wrapper


def test_the_signatures_that_verifiers_asks_for_are_kept_and_change_nothing():
    def plain(completion: list, state) -> float:
        return 4.0

    kinds = [Judge().method, Judge(), passed_on(plain), plain, lambda **named: len(named) > 3]
    for i, function in enumerate(kinds):
        with contextlib.suppress(AttributeError):  # of a method, which has a name
            function.__name__ = f"reward_{i}"
    env = vf.SingleTurnEnv(
        dataset=Dataset.from_list([{"prompt": message("red"), "answer": ""}]), rubric=vf.Rubric(funcs=kinds)
    )
    asked = [*kinds, *env._stop_conditions]
    before = [inspect.signature(function) for function in asked]
    trainer = conftest.make_trainer("qwen", env=env, rollouts_per_step=2, rollouts_per_example=2, max_tokens=2)
    for _ in range(2):
        (rollout, _) = trainer.rollouts.collect()["outputs"]
        rewards = {"method": 1.0, "reward_1": 2.0, "reward_2": 4.0, "reward_3": 4.0, "reward_4": 1.0}
        assert rollout["metrics"] == {**rewards, "num_turns": 1.0} and rollout["stop_condition"] == "max_turns_reached"
        assert [inspect.signature(function) for function in asked] == before
    kept = [getattr(function, "__func__", function) for function in asked if not isinstance(function, Judge)]
    assert all(inspect.signature(function) is inspect.signature(function) for function in kept)


# ---------------------------------------------------------------- a server that is lost


def test_rollouts_of_a_lost_server_are_made_again_with_the_same_prompts_and_new_weights():
    trainer = make_trainer(lost_in=(1, 2))
    asked = note_prompts(trainer)
    with pytest.warns(UserWarning, match="step 1: the server was lost during the rollouts"):
        metrics = trainer.step()
    assert on_policy(metrics) and trainer.server.connected == 2 and trainer.server.updates == 1 + 2 + 1
    assert asked[0] == asked[1] == asked[2] and len(set(asked[0])) == 4


def test_a_server_that_is_lost_again_and_again_ends_the_run():
    trainer = make_trainer(lost_in=range(1, ATTEMPTS + 1))
    with (
        pytest.warns(UserWarning, match="lost"),
        pytest.raises(RuntimeError, match=f"lost {ATTEMPTS} times.*see its log"),
    ):
        trainer.step()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_weight_update_that_fails_ends_the_run_and_leaves_no_gap_in_its_metrics(ahead, tmp_path):
    """The step was trained and saved, and had no line in metrics.jsonl: a run that went on from there never had it."""
    trainer = make_trainer(async_rollouts=ahead, output_dir=str(tmp_path), eval_examples=0, max_steps=6)
    sync, updates = trainer.server.sync, []

    def sync_until_the_third_step(model):
        updates.append(trainer.policy.version)
        if trainer.policy.version == 3:
            raise RuntimeError("no route")
        sync(model)

    trainer.server.sync = sync_until_the_third_step
    with pytest.raises(RuntimeError, match="no route"):
        trainer.train()
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3] and [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert updates == [0, 1, 2, 3] and trainer.rollouts.server_version == 2  # tried once
    trainer.server.sync = sync
    with pytest.raises(RuntimeError, match="no route"):
        trainer.step()  # never on weights that came in part
    trainer.rollouts.sync()
    assert on_policy(trainer.step()) and trainer.policy.version == 4
    trainer.close()


# ---------------------------------------------------------------- rollouts ahead


def test_rollouts_ahead_are_one_step_old_after_the_first_ones_and_skip_no_prompt():
    trainer = make_trainer(async_rollouts=True)
    asked, policies, differences = note_prompts(trainer), [], []
    update = trainer.update

    def update_and_compare(batch, on_policy):
        """The batch's logprobs under the policy that should have sampled it."""
        policies.append(copy.deepcopy(trainer.model))
        sampled_by = policies[len(policies) - 1 - trainer.rollouts.lag]
        with torch.no_grad():
            logprobs, _ = score(sampled_by, batch, 1.0, trainer.adapter.placeholder_ids)
        trained = batch.loss_mask[:, 1:] == 1
        differences.append((logprobs - batch.behavior_logprobs[:, 1:])[trained].abs().max().item())
        return update(batch, on_policy)

    trainer.update = update_and_compare
    metrics = steps(trainer, 5)
    assert isinstance(trainer.rollouts, RolloutsAhead)
    assert [step["lag"] for step in metrics] == [0, 0, 1, 1, 1]
    assert max(differences) < CLOSE and not any(map(on_policy, metrics[2:]))
    again = [[example["example_id"] for example in trainer.rollouts.examples(step)] for step in range(5)]
    assert asked == again  # none twice, none after the last step


def test_rollouts_ahead_that_are_lost_are_made_again():
    trainer = make_trainer(async_rollouts=True, lost_in=(3,))  # the third collection runs while the second step trains
    asked = note_prompts(trainer)
    metrics = steps(trainer, 4)
    assert [step["lag"] for step in metrics] == [0, 0, 0, 1] and on_policy(metrics[2])
    assert asked[2] == asked[3] and len(asked) == 6  # the fifth step's run now


def test_rollouts_that_still_run_are_called_off_where_the_run_ends():
    trainer = make_trainer(async_rollouts=True, max_steps=10)
    steps(trainer, 2)
    assert trainer.rollouts.running is not None
    trainer.close()
    assert trainer.rollouts.running is None and trainer.rollouts.loop.is_closed()


def test_a_step_that_is_tried_again_takes_its_own_prompts_and_not_those_that_run_ahead():
    trainer = make_trainer(async_rollouts=True, max_steps=10)
    steps(trainer, 2)
    asked, build = note_prompts(trainer), trainer.adapter.build_batch
    trainer.adapter.build_batch = lambda outputs: (_ for _ in ()).throw(NoRollouts("all of them failed"))
    with pytest.raises(NoRollouts):
        trainer.step()
    trainer.adapter.build_batch = build
    trainer.step()
    again = [[example["example_id"] for example in trainer.rollouts.examples(step)] for step in (3, 2, 3)]
    assert asked == again and trainer.policy.version == 3
    trainer.close()


def test_an_evaluation_never_updates_the_weights_under_rollouts_that_run_ahead():
    trainer = make_trainer(async_rollouts=True, max_steps=10, sync_to_vllm_every=2, eval_examples=4)
    steps(trainer, 3)  # the next rollouts run, and the server is a step behind
    running, updates = trainer.rollouts.running, trainer.server.updates
    assert running is not None and trainer.rollouts.server_version < trainer.policy.version
    done, sync = [], trainer.server.sync
    trainer.server.sync = lambda model: (done.append(running[-1].done()), sync(model))
    trainer.evaluate()
    assert done == [True] and trainer.server.updates == updates + 1
    trainer.close()


def test_rollouts_ahead_need_a_server_of_their_own():
    model, adapter = make_tiny("qwen")
    with pytest.raises(ValueError, match="async_rollouts=True: needs vllm_server_host"):
        MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, MultimodalRLConfig(async_rollouts=True))


# ---------------------------------------------------------------- what is let go, what is missing


def test_a_closed_trainer_has_let_go_of_everything_and_can_be_closed_again(tiny):
    model, adapter = tiny
    trainer = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, MultimodalRLConfig())
    trainer.close()
    assert trainer.rollouts.loop.is_closed() and trainer.server.client.is_closed()
    trainer.close()


def test_the_server_in_this_process_has_all_that_a_server_must_have(tiny):
    declared = set(Server.__annotations__) | {name for name in vars(Server) if not name.startswith("_")}
    assert declared >= {"client", "model_name", "dtype", "shares_weights", "connect", "sync", "up_to_date", "close"}
    assert declared <= set(dir(LocalServer(*tiny)))


def test_without_an_environment_the_error_says_how_to_get_one(tiny):
    model, adapter = tiny
    trainer = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, MultimodalRLConfig())
    assert trainer.env is None and isinstance(trainer.rollouts, Rollouts)
    with pytest.raises(RuntimeError, match="set_environment"):
        trainer.step()
