"""Tests of what goes wrong in a run of days: environments that fail, updates that explode, memory and disks that are
full, interrupts, a user's mistakes. Each fault is made for real: an exception, a signal, a full disk, a capped process.

    pytest test_faults.py
"""

import asyncio
import contextlib
import json
import math
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import verifiers as vf
from datasets import Dataset
from safetensors.torch import load_file, save_file

import faults
from adapters import ProcessorAdapter
from checkpoint import checkpoints, save_checkpoint, whole_folder
from conftest import make_tiny, make_trainer, message, picture, wait_for
from faults import MAX_SKIPPED, RunStopped, deferred_signals
from local_server import LocalServer
from mm_grpo import MultimodalRLConfig
from report import SAME_REWARD, RunLog
from rows import NoRollouts
from test_readme import blocks

HERE = Path(__file__).parent
SMALL = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, eval_examples=2, learning_rate=1e-3)


def words(completion) -> float:
    """A reward that differs within a group."""
    return float(len(completion[-1]["content"]))


def dataset(count: int = 8, **columns) -> Dataset:
    rows = [{"prompt": message(picture(i), "What is it ?"), "answer": "red"} for i in range(count)]
    made = Dataset.from_list(rows)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def environment(*funcs, kind=vf.SingleTurnEnv, data=None, **arguments) -> vf.Environment:
    """Pictures and these reward functions."""
    data = dataset() if data is None else data
    return kind(dataset=data, eval_dataset=data, rubric=vf.Rubric(funcs=list(funcs or [words])), **arguments)


def trainer(env=None, **settings):
    return make_trainer(env=environment() if env is None else env, **{**SMALL, **settings})


def quietly(work):
    """Its result and the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return work(), [str(warning.message) for warning in said]


class Every:
    """True at every third call."""

    def __init__(self, period: int = 3):
        self.calls, self.period = 0, period

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls % self.period == 0


# ---------------------------------------------------------------- environments that fail


class Failing(vf.SingleTurnEnv):
    """Fails while a rollout is set up, every third time."""

    def __init__(self, fail, **arguments):
        super().__init__(**arguments)
        self.fail, self.due = fail, Every()

    async def setup_state(self, state):
        if self.due():
            await self.fail()
        return await super().setup_state(state)


async def crash():
    raise RuntimeError("simulator crashed")


async def hang():
    await asyncio.sleep(1e6)


def test_an_environment_that_raises_costs_its_rollouts_and_no_others():
    made = trainer(environment(kind=Failing, fail=crash))
    metrics, said = quietly(made.step)
    assert metrics["rollouts_dropped"] == metrics["dropped/environment"] == 2  # of 8; both groups keep three
    assert metrics["zero_spread_fraction"] < 1 and abs(metrics["ratio_max"] - 1) < 1e-4
    (line,) = [line for line in said if "cannot be trained on" in line]
    assert "2 of 8" in line and "RuntimeError: simulator crashed" in line
    assert made.step()["rollouts_dropped"] > 0 and made.policy.version == 2


def test_a_prompt_without_content_costs_its_own_rollouts():
    data = [{"prompt": [{"role": "user", "content": None if i == 3 else "?"}], "answer": "red"} for i in range(8)]
    made = trainer(environment(data=Dataset.from_list(data)), rollouts_per_step=32)
    metrics, _ = quietly(made.step)
    assert metrics["dropped/environment"] == metrics["rollouts_dropped"] == 4


def test_a_malformed_row_costs_its_own_rollouts():
    data = [{"prompt": message(picture(i), "?"), "answer": "red", "info": "{" if i == 3 else "{}"} for i in range(8)]
    made = trainer(environment(data=Dataset.from_list(data)), rollouts_per_step=32)
    metrics, _ = quietly(made.step)
    assert metrics["dropped/environment"] == metrics["rollouts_dropped"] == 4


def test_a_rollout_that_takes_too_long_is_left_out_and_named():
    made = trainer(environment(kind=Failing, fail=hang), rollout_timeout=2.0)
    metrics, said = quietly(made.step)
    assert metrics["rollouts_dropped"] == metrics["dropped/timeout"] == 2
    assert any("took longer than rollout_timeout=2 s" in line for line in said)


def test_a_reward_function_that_never_returns_is_left_out_too():
    due = Every()

    async def slow(completion) -> float:
        if due():
            await asyncio.sleep(1e6)
        return words(completion)

    metrics, _ = quietly(trainer(environment(slow), rollout_timeout=2.0).step)
    assert metrics["rollouts_dropped"] == metrics["dropped/timeout"] == 2


def test_code_that_blocks_the_event_loop_ends_the_run_with_words():
    """It cannot be called off: the words say what it should have done."""
    released = threading.Event()
    made = trainer(environment(lambda completion: float(released.wait())), rollout_timeout=1.0)
    with pytest.raises(RuntimeError, match="has blocked the event loop for rollout_timeout=1 s.*must be awaited"):
        made.step()
    released.set()


def raising(completion) -> float:
    raise KeyError("sometimes")


@pytest.mark.parametrize(
    "fault",
    [raising, lambda completion: None, lambda completion: "good", lambda completion: math.nan, lambda completion: 1e39],
    ids=["raises", "None", "a word", "NaN", "no float32"],
)
def test_a_reward_that_is_none_is_never_trained_on_as_a_zero(fault):
    """verifiers gives 0 for a function that raises: it was trained on as a bad answer, without a word."""
    due = Every()

    def sometimes(completion) -> float:
        return fault(completion) if due() else 5.0

    made = trainer(environment(sometimes, words))
    outputs = made.rollouts.collect()
    batch, said = quietly(lambda: made.adapter.build_batch(outputs))
    assert len(batch) == 6 and (batch.rewards >= 5).all()
    assert any("2 of 8 rollouts cannot be trained on" in line for line in said)
    metrics, _ = quietly(made.step)
    assert metrics["dropped/reward"] == metrics["rollouts_dropped"] > 0
    assert metrics["reward"] >= 5  # nor is it in the means


def test_a_rubric_that_compares_a_group_fails_as_a_group():
    calls = Every(2)

    def best(completions) -> list[float]:
        if calls():
            raise ValueError("no judge")
        lengths = [words(completion) for completion in completions]
        return [float(length == max(lengths)) for length in lengths]

    made = trainer(environment(best), rollouts_per_step=16)
    metrics, said = quietly(made.step)
    assert metrics["dropped/reward"] == metrics["rollouts_dropped"] == 8  # two of four groups
    assert any("no judge" in line for line in said)
    assert len(made.rollouts.evaluate()["outputs"]) == 2  # each by itself


def test_a_metric_named_reward_is_not_trained_on_in_place_of_the_reward():
    def reward(completion) -> float:
        return 1.0

    def bonus(completion) -> float:
        return 40.0

    outputs = trainer(environment(reward, bonus)).rollouts.collect()["outputs"]
    assert [rollout["reward"] for rollout in outputs] == [41.0] * 8


@pytest.mark.parametrize("name", ["error", "metrics", "trajectory", "example_id", "is_truncated", "step"])
def test_a_reward_function_with_a_name_that_verifiers_overwrites_is_refused(name):
    func = lambda completion: 1.0
    func.__name__ = name
    with pytest.raises(ValueError, match=rf"reward functions named \['{name}'\].*rename"):
        trainer(environment(func)).prepare()


@pytest.mark.parametrize("ids", [[7] * 8, [f"row {i}" for i in range(8)]], ids=["all the same", "words"])
def test_groups_are_those_of_the_prompts_whatever_the_data_set_calls_them(ids):
    """Data sets that were put together have ids twice: advantages went over two prompts."""
    data = dataset().map(lambda row, i: {"example_id": ids[i]}, with_indices=True)
    made = trainer(environment(data=data), rollouts_per_step=16)
    batch = made.adapter.build_batch(made.rollouts.collect())
    assert sorted(batch.group_ids.tolist()) == sorted([0, 1, 2, 3] * 4)
    for group in range(4):
        assert len({tuple(row[:5]) for row in batch.input_ids[batch.group_ids == group].tolist()}) == 1


def test_an_evaluation_says_how_many_of_its_examples_failed(tmp_path, capsys):
    made = trainer(
        environment(kind=Failing, fail=crash), eval_examples=6, max_steps=0, output_dir=str(tmp_path / "run")
    )
    result, _ = quietly(made.train)
    assert result["failed"] == 2
    assert "(2 of its examples failed)" in capsys.readouterr().out


def test_an_evaluation_is_greedy_and_of_the_evaluation_set():
    held_out = Dataset.from_list([{"prompt": message(picture(i), "What colour ?"), "answer": ""} for i in range(8)])
    env = vf.SingleTurnEnv(dataset=dataset(), eval_dataset=held_out, rubric=vf.Rubric(funcs=[words]))
    made = trainer(env, eval_examples=6, max_tokens=8)
    first, second = (made.rollouts.evaluate()["outputs"] for _ in range(2))
    assert all("What colour ?" in str(rollout["prompt"]) for rollout in first)
    replies = [[r["trajectory"][0]["tokens"]["completion_ids"] for r in outputs] for outputs in (first, second)]
    assert replies[0] == replies[1] and len(replies[0]) == 6


def test_the_clients_very_first_request_is_none_of_those_whose_order_counts(monkeypatch):
    """It asks in a thread on what platform it runs: a group's first requests came in the order of threads."""
    monkeypatch.delattr(LocalServer, "answer")  # as one far away
    made, paths = trainer(), []
    handle = made.server.handle_async_request
    made.server.handle_async_request = lambda request: (paths.append(request.url.path), handle(request))[1]
    made.rollouts.collect()
    assert paths == ["/v1/models", *["/v1/chat/completions"] * 8]


def test_sampling_settings_of_the_environment_are_overruled_with_a_word():
    """Its seed made all completions of a group the same."""
    arguments = {"seed": 7, "temperature": 0.1, "extra_body": {"top_k": 3}}
    made = trainer(environment(sampling_args=arguments))
    outputs, said = quietly(made.rollouts.collect)
    assert any(re.search(r"\['seed', 'temperature', 'top_k'\] are overruled", line) for line in said)
    replies = [tuple(r["trajectory"][0]["tokens"]["completion_ids"]) for r in outputs["outputs"]]
    assert len(set(replies)) > 2


# ---------------------------------------------------------------- steps with nothing to train on


def test_a_step_without_a_usable_rollout_is_tried_again_with_the_same_prompts(tmp_path, monkeypatch):
    """A sandbox that was down for a minute ended the run; the next step would have worked."""
    monkeypatch.setattr(faults, "PAUSES", (0.1, 0.1, 0.1))
    down, asked = iter([True] * 16 + [False] * 1000), []

    async def outage():
        if next(down):
            raise ConnectionError("sandbox is down")

    env = environment(kind=Failing, fail=outage)
    env.due.period = 1
    made = trainer(env, max_steps=2, eval_examples=0, output_dir=str(tmp_path / "run"))
    roll_out = made.rollouts.roll_out
    made.rollouts.roll_out = lambda rows, t: (asked.append([row["example_id"] for row in rows]), roll_out(rows, t))[1]
    _, said = quietly(made.train)
    assert asked[0] == asked[1] == asked[2] != asked[3] and len(asked) == 4
    again = [line for line in said if "Tried again in 0.1 s" in line]
    assert len(again) == 2 and "environment, 8 times" in again[0] and "sandbox is down" in again[0]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_signal_ends_the_pause_before_a_step_is_tried_again(monkeypatch):
    def no_luck():
        raise NoRollouts("none")

    monkeypatch.setattr(faults, "PAUSES", (100.0,))
    started = time.monotonic()
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        faults.after_pauses(no_luck, NoRollouts, [signal.SIGTERM])
    assert end.value.code == 143 and time.monotonic() - started < 10


def test_a_run_without_usable_rollouts_stops_with_the_commonest_cause_and_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", (0.1,))
    env = environment(kind=Failing, fail=crash)
    made = trainer(env, max_steps=3, eval_examples=0, output_dir=str(tmp_path / "run"))
    first = made.step
    made.step = lambda: (first(), setattr(env.due, "period", 1))[0]
    with pytest.raises(NoRollouts, match="8 came; most often: environment, 8 times.*simulator crashed"):
        quietly(made.train)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_a_run_that_cannot_learn_says_so(tmp_path):
    made = trainer(environment(lambda completion: 1.0), output_dir=str(tmp_path), max_steps=SAME_REWARD + 2)
    _, said = quietly(made.train)
    assert sum("no group's rewards differed" in line for line in said) == 1


# ---------------------------------------------------------------- updates that go wrong


def test_updates_that_are_not_finite_are_counted_and_five_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """It went on to the end with 37 of 40 updates skipped, and exit code 0."""
    made = trainer(max_steps=40, output_dir=str(tmp_path / "run"), eval_examples=0)
    with torch.no_grad():  # finite logits, whose gradient overflows
        made.model.lm_head.weight.register_hook(lambda grad: grad * torch.inf if made.policy.version >= 2 else grad)
    with pytest.raises(RunStopped, match=f"not finite {MAX_SKIPPED} times in a row.*not_finite.pt"):
        quietly(made.train)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["updates_skipped"] for line in lines] == [0, 0, 1, 1, 1, 1] and lines[-1]["grad_norm"] is None
    (last,) = checkpoints(tmp_path / "run")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last / "model.safetensors").values())
    batch = torch.load(tmp_path / "run" / "not_finite.pt", weights_only=True)
    assert batch["input_ids"].shape == batch["loss_mask"].shape and len(batch["rewards"]) == 8


def test_a_good_update_in_between_starts_the_count_again():
    made, bad = trainer(), iter([True] * 4 + [False] + [True] * 4 + [False] * 9)
    made.policy.sharing_is_exact = True  # finding that out would take a gradient
    made.model.lm_head.weight.register_hook(lambda grad: grad * torch.nan if next(bad) else grad)
    batch = made.adapter.build_batch(made.rollouts.collect())
    skipped = [quietly(lambda: made.update(batch, on_policy=False))[0]["updates_skipped"] for _ in range(10)]
    assert skipped == [1, 1, 1, 1, 0, 1, 1, 1, 1, 0]


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path):
    made = trainer(output_dir=str(tmp_path))
    with torch.no_grad():
        made.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="lm_head.weight.*not finite: not saved"):
        made.save_checkpoint(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_ids_without_a_token_are_never_sampled():
    """All published Qwen-VL have output heads with more rows than their tokenizers have tokens. On such an id the
    server fell over, and most rollouts of a tiny model were lost."""
    model, adapter = make_tiny("qwen")
    model.resize_token_embeddings(len(adapter.tokenizer) + 60)  # most of what it would say are such ids
    with torch.no_grad():
        model.lm_head.weight[-60:] *= 3
    adapter = ProcessorAdapter(adapter.processor, model.config)
    made = make_trainer(env=environment(), tiny=(model, adapter), **SMALL | {"rollouts_per_step": 32})
    outputs = made.rollouts.collect()
    for rollout in outputs["outputs"]:
        assert max(rollout["trajectory"][0]["tokens"]["completion_ids"]) < len(adapter.tokenizer)
    metrics = made.step()
    assert metrics["rollouts_dropped"] == 0
    assert abs(metrics["ratio_max"] - 1) < 1e-4 and abs(metrics["ratio_min"] - 1) < 1e-4


def test_broken_weights_are_named_as_such(monkeypatch):
    made = trainer()
    with torch.no_grad():
        made.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NoRollouts, match="logits are NaN"):
        quietly(made.step)


CAPPED = """
import resource, warnings, torch
from conftest import make_trainer
from faults import is_out_of_memory
made = make_trainer("qwen", env={"num_train_examples": 8}, rollouts_per_step=64, rollouts_per_example=8, max_tokens=200,
                    micro_batch_tokens=2**14, share_prefix=False, max_grad_norm=1e9, learning_rate=1e-9,
                    favoured="eos_token_id", by=-99.0)  # no completion stops early: rows of one length
batch = made.adapter.build_batch(made.rollouts.collect())
gradients = []
made.optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in made.model.parameters()]))
made.update(batch)
size = lambda: int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = lambda room: resource.setrlimit(resource.RLIMIT_AS, (size() + room, -1))
warnings.simplefilter("always")
for room in (2 ** k * 2**20 for k in range(10, -1, -1)):  # from 1 GB down, until memory does not do
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        limit(room)
        made.update(batch, on_policy=False)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if made.micro_batch_tokens < 2**14:
        break
first, last = (torch.cat([g.flatten() for g in gradient]) for gradient in (gradients[0], gradients[-1]))
said = sum("out of memory" in str(warning.message) for warning in said)
print(made.micro_batch_tokens, said, float((first - last).norm() / first.norm()))
"""


def test_memory_that_runs_out_halves_the_micro_batches_and_not_the_gradient(runs):
    """In a process whose address space is capped until a forward pass of 64 rows does not fit."""
    size, said, off = runs.printed(CAPPED).split()
    assert int(size) < 2**14 and int(said) == 1  # however often it was halved
    assert float(off) < 1e-5  # float32 sums in another order


def test_the_part_that_was_done_before_memory_ran_out_is_not_counted_twice():
    batch, gradients = None, []
    for ends in (False, True):
        made, calls = trainer(micro_batch_tokens=40, max_grad_norm=1e9), []
        batch = made.adapter.build_batch(made.rollouts.collect()) if batch is None else batch
        made.policy.sharing_is_exact = True  # finding that out would be a call

        def forward(*_, ends=ends, calls=calls):
            calls.append(1)
            if ends and len(calls) == 2:
                raise MemoryError("in the second micro-batch")

        made.policy.register_forward_pre_hook(forward)
        head = made.model.lm_head.weight
        made.optimizer.register_step_pre_hook(lambda *_, head=head: gradients.append(head.grad.clone()))
        quietly(lambda made=made, batch=batch: made.update(batch))
        assert made.micro_batch_tokens == (20 if ends else 40)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-4


def test_halving_says_the_size_that_fits_once():
    """It warned at each halving: from 64 rows to 4 four times the same, three of them already untrue."""

    def work(size):
        if size > 4:
            raise MemoryError("no room")
        return "done"

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert faults.halving(work, 64, lambda: None) == faults.halving(work, 4, lambda: None) == ("done", 4)
    (warning,) = said
    assert re.match(r"out of memory \(no room\): from here on micro-batches of 4 tokens", str(warning.message))


def test_an_error_that_has_nothing_to_do_with_memory_is_not_tried_again():
    calls = []

    def work(size):
        calls.append(size)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        faults.halving(work, 8, lambda: None)
    assert calls == [8]


class DropoutHead(torch.nn.Linear):
    """An output head that forgets half of what comes in, in training mode."""

    def forward(self, hidden):
        return super().forward(torch.nn.functional.dropout(hidden, 0.5, self.training))


def test_a_model_with_dropout_stays_on_policy():
    """Trained with it, the policy in training would not be the one that acts."""
    model, adapter = make_tiny("qwen")
    head = DropoutHead(*model.lm_head.weight.T.shape, bias=False)
    head.weight, model.lm_head = model.lm_head.weight, head
    made = make_trainer(env=environment(), tiny=(model.train(), adapter), mismatch_threshold=1e3, **SMALL)
    assert made.step()["logprob_difference"] < 1e-4


# ---------------------------------------------------------------- interrupts


def tasks(made) -> set:
    async def others():
        return asyncio.all_tasks() - {asyncio.current_task()}

    return made.rollouts.wait(others())


def test_an_interrupted_step_leaves_a_trainer_that_goes_on(tiny):
    """In a notebook. Tasks went on unseen, and an interrupt came again that nobody had sent."""
    made, moments = trainer(rollouts_per_step=32, rollouts_per_example=8, max_tokens=40), random.Random(0)
    made.step()
    interrupted = 0
    for _ in range(12):
        timer = threading.Timer(moments.uniform(0.0, 0.4), os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        version = made.policy.version
        try:
            made.step()
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert made.policy.version - version in (0, 1)
        assert not tasks(made) and not made.server.pending
        steps = {int(state["step"]) for state in made.optimizer.state.values()}
        assert steps == {made.policy.version}  # no update was left half-way
    assert interrupted >= 6
    before = made.policy.version
    time.sleep(0.3)  # for a phantom
    metrics = made.step()
    assert metrics["step"] == before + 1 and metrics["rollouts_dropped"] == 0 and abs(metrics["ratio_max"] - 1) < 1e-4


def test_an_interrupt_as_the_rollouts_start_leaves_none_of_them_running(monkeypatch):
    """They ran on unseen where it came after their start and before the wait for them."""
    made = trainer(max_tokens=40)
    start = made.rollouts.start

    def interrupted(coroutine):
        monkeypatch.undo()
        future = start(coroutine)
        os.kill(os.getpid(), signal.SIGINT)
        return future

    monkeypatch.setattr(made.rollouts, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.step()
    assert not tasks(made) and not made.server.pending
    assert made.step()["step"] == 1


def test_an_interrupt_in_the_middle_of_an_update_waits_for_its_end():
    made = trainer(updates_per_batch=2)
    made.optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        made.step()
    assert {int(state["step"]) for state in made.optimizer.state.values()} == {2} and made.policy.version == 1


def test_a_signal_within_a_deferred_block_comes_after_it():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with deferred_signals() as outer:
            with deferred_signals():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            assert outer == [signal.SIGINT]  # it has moved on to the outer block
            done.append("outer")
    assert done == ["inner", "outer"]


def test_a_trainer_works_where_an_event_loop_runs():
    async def notebook():
        made = trainer()
        return made.step(), made.close()

    metrics, _ = asyncio.run(notebook())
    assert metrics["step"] == 1 and metrics["rollouts_dropped"] == 0


def test_the_example_of_the_readme_runs_in_a_real_jupyter_kernel(tmp_path):
    """It failed with: Cannot run the event loop while another loop is running."""
    if not find_spec("ipykernel") and "CI" not in os.environ:
        pytest.skip("pip install ipykernel")
    from jupyter_client.manager import start_new_kernel

    (example,) = [block for block in blocks(HERE / "README.md", "python") if "trainer.train()" in block]
    start = f"import sys, os; sys.path.insert(0, {str(HERE)!r}); os.chdir({str(tmp_path)!r})\n"
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute(start + example + "\nprint('version', trainer.policy.version)")
        said, until = [], time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                content = client.get_iopub_msg(timeout=5)
                said.append(content["content"].get("text", "") + "\n".join(content["content"].get("traceback", [])))
                if (
                    content["msg_type"] == "status"
                    and content["content"]["execution_state"] == "idle"
                    and len(said) > 3
                ):
                    break
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "version 3" in "".join(said), "".join(said)[-3000:]


# ---------------------------------------------------------------- disks, folders, screens


@pytest.fixture
def disk(tmp_path):
    """disk(size): an empty file system of this size."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_ends_neither_training_nor_the_result(disk, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = disk("1m")
    made = trainer(max_steps=3, save_steps=1, output_dir=str(folder / "run"))
    result, said = quietly(made.train)
    assert "reward" in result  # evaluated
    assert sum("is not written" in line for line in said) >= 4  # said at each, tried again
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert not list((folder / "run").glob("*checkpoint*"))  # no half one, and no waste that would fill the disk
    saved = Path(re.search(r"from_pretrained\('(\S+)'\)", capsys.readouterr().out)[1])
    assert saved.name == "checkpoint-3" and saved.is_relative_to(tmp_path) and not saved.is_relative_to(folder)
    loaded = load_file(saved / "model.safetensors")
    assert torch.equal(loaded["lm_head.weight"], made.model.lm_head.weight)


def test_a_checkpoint_that_did_not_fit_is_written_when_there_is_room(disk):
    folder = disk("6m")
    (folder / "full").write_bytes(bytes(4 * 2**20))
    made = trainer(max_steps=3, save_steps=1, output_dir=str(folder / "run"))
    step = made.step

    def then_clean_up():
        if made.policy.version == 1:
            (folder / "full").unlink()
        return step()

    made.step = then_clean_up
    _, said = quietly(made.train)
    assert sum("is not written" in line for line in said) >= 1
    assert checkpoints(folder / "run")[-1].name == "checkpoint-3" or len(checkpoints(folder / "run")) >= 1


def test_lines_that_could_not_be_written_are_written_later(disk):
    folder = disk("64k")
    config = MultimodalRLConfig(output_dir=str(folder / "run"))
    common = {"reward": 0.0, "mismatch_kl": 0.0, "zero_spread_fraction": 0.0, "long": 10.0**100}
    with RunLog(config) as log:
        log.start(trainer(report_rollouts=0, output_dir=log.config.output_dir))
        log.step({"step": 1, **common})  # its block has room for a few more, and for a part of one
        with (folder / "full").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024))
        for i in range(2, 80):
            quietly(lambda step=i: log.step({"step": step, **common}))
        assert log.unwritten
        before = log.metrics.read_text()
        assert [json.loads(line)["step"] for line in before.splitlines()] == list(range(1, 80 - len(log.unwritten)))
        (folder / "full").unlink()
        log.step({"step": 80, **common})
        assert [json.loads(line)["step"] for line in log.metrics.read_text().splitlines()] == list(range(1, 81))


def test_a_screen_that_is_gone_ends_no_run(tmp_path):
    command = [sys.executable, "mm_grpo.py", "--adapter", "qwen", "--max_steps", "2", "--rollouts_per_step", "8"]
    command += ["--eval_examples", "2", "--env_args", '{"num_train_examples": 8, "num_eval_examples": 4}']
    for name, streams in (
        ("full", dict(stdout=open("/dev/full", "w"), stderr=open("/dev/full", "w"))),
        ("closed", dict(stdout=open(os.open("/dev/null", os.O_RDONLY)), stderr=subprocess.DEVNULL)),
    ):
        done = subprocess.run([*command, "--output_dir", str(tmp_path / name)], cwd=HERE, **streams, timeout=120)
        assert len(checkpoints(tmp_path / name)) == 1 and done.returncode == 0, name


def test_a_pipe_that_is_closed_ends_no_run(tmp_path):
    command = f"{sys.executable} mm_grpo.py --adapter qwen --max_steps 2 --rollouts_per_step 8 --eval_examples 2"
    command += f" --output_dir {tmp_path / 'run'} 2>/dev/null | head -1"
    subprocess.run(command, shell=True, cwd=HERE, timeout=120)
    wait_for(lambda: len(checkpoints(tmp_path / "run")) == 1, seconds=60)


def test_two_runs_never_write_into_one_folder(runs, tmp_path):
    """The check and the first write were a whole evaluation apart."""
    with RunLog(MultimodalRLConfig(output_dir=str(tmp_path / "run"))):
        said = len(runs.said()) if runs.log.exists() else 0
        runs.start("--adapter", "qwen", "--max_steps", "1", "--output_dir", str(tmp_path / "run"))
        assert runs.end() == 2
        assert f"process {os.getpid()} writes there; name another" in runs.said()[said:]
    # what a run leaves that was killed before its first step is no run, and locks nothing
    runs.start("--adapter", "qwen", "--max_steps", "1", "--eval_examples", "2", "--output_dir", str(tmp_path / "run"))
    assert runs.end() == 0, runs.said()[said:]


def test_two_seeds_that_start_together_get_two_folders(runs, tmp_path):
    command = ["--adapter", "qwen", "--max_steps", "1", "--eval_examples", "2"]
    both = [runs.start(*command, "--seed", str(i), cwd=tmp_path) for i in (0, 1)]
    assert [runs.end(process) for process in both] == [0, 0], runs.said()[-2000:]
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(len(checkpoints(folder)) == 1 for folder in folders)
    assert {json.loads((folder / "config.json").read_text())["seed"] for folder in folders} == {0, 1}


def test_what_lies_in_the_folder_already_stays(runs, tmp_path):
    """A folder `checkpoint` of the user's was deleted, `checkpoint.new` too."""
    for name in ("checkpoint", "checkpoint.new", "weights", "checkpoint-best"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "thesis.safetensors").write_text("years of work")
    arguments = ["--adapter", "qwen", "--max_steps", "2", "--save_steps", "1", "--eval_examples", "2"]
    runs.start(*arguments, "--save_total_limit", "1", "--output_dir", str(tmp_path / "run"))
    code = runs.end()
    assert code == 2 or len(list((tmp_path / "run").glob("*/thesis.safetensors"))) == 4
    assert all(path.read_text() == "years of work" for path in (tmp_path / "run").glob("*/thesis.safetensors"))
    assert len(list((tmp_path / "run").glob("*/thesis.safetensors"))) == 4


def test_a_folder_is_never_written_over(tmp_path):
    (tmp_path / "mine").mkdir()
    model, adapter = make_tiny("qwen")
    with pytest.raises(FileExistsError, match="exists, and is not overwritten"):
        save_checkpoint(tmp_path / "mine", model, adapter)
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "new") as fresh:
        (fresh / "half").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_link_to_a_bigger_disk_stays_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big")
    settings = dict(save_steps=1, save_total_limit=1, eval_examples=0, output_dir=str(tmp_path / "run"))
    trainer(max_steps=1, **settings).train()
    last = str(tmp_path / "big" / "checkpoint-1")
    trainer(max_steps=2, resume_from_checkpoint=last, **settings).train()
    assert (tmp_path / "run").is_symlink()
    assert [path.name for path in checkpoints(tmp_path / "big")] == ["checkpoint-2"]


# ---------------------------------------------------------------- one line for a user's mistake


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    model, adapter = make_tiny("qwen")
    folder = tmp_path_factory.mktemp("checkpoints") / "qwen"
    save_checkpoint(folder, model, adapter)
    return folder


def without(name):
    return lambda folder: [path.unlink() for path in folder.glob(name)]


def less_weights(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("visual.blocks.0.attn.qkv.weight"))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


BLIND = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
BROKEN_CHECKPOINTS = {
    "a missing tensor": (less_weights, "its weights lack 1 tensors: .*visual.blocks.0.attn.qkv.weight"),
    "no tokenizer": (without("tokenizer*"), "token"),
    "no chat template": (without("chat_template*"), "chat_template"),
    "a broken template": (template("{% for m in messages %}"), "chat_template|template"),
    "a blind template": (template(BLIND), "images passed"),
    "no image processor": (without("pre*"), "processor|config"),
    "cut weights": (cut, "Error|header|metadata"),
    "no config": (without("config.json"), "config"),
}


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_trained_is_one_line(runs, tiny_checkpoint, tmp_path, name):
    harm, words = BROKEN_CHECKPOINTS[name]
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    harm(folder)
    assert re.search(words, refusal(runs, tmp_path, "--model", str(folder), "--adapter", "auto"))


def refusal(runs, tmp_path, *arguments) -> str:
    """The one line with which a command line ends, with exit code 2."""
    said = len(runs.said()) if runs.log.exists() else 0
    runs.start("--max_steps", "1", "--max_tokens", "3", "--output_dir", str(tmp_path / "out"), *arguments)
    assert runs.end() == 2, runs.said()[said:]
    screen = runs.said()[said:]
    assert "Traceback" not in screen, screen
    line = screen.strip().splitlines()[-1]
    assert re.match(r"\S+: error: ", line), screen
    return line


ENVIRONMENTS = """
import verifiers as vf
from datasets import Dataset
def load_environment(kind="empty"):
    if kind == "raises":
        raise RuntimeError("no licence")
    if kind == "none":
        return None
    if kind == "mixed":
        parts = [{"type": "text", "text": "as parts"}]
        rows = [{"prompt": "as text"}, {"prompt": [{"role": "user", "content": parts}]}]
        return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=vf.Rubric())
    data = Dataset.from_dict({"prompt": [], "answer": []})
    return vf.SingleTurnEnv(dataset=data, eval_dataset=data, rubric=vf.Rubric())
"""

MISTAKES = {
    "no such folder": (["--model", "/nonexistent/path"], "model='/nonexistent/path': there is no such folder"),
    "an abbreviation": (["--mode", "somewhere"], r"\['--mode', 'somewhere'\]"),
    "no such environment": (["--env_id", "no-such-env"], "no-such-env|no_such_env"),
    "an unknown argument": (["--env_args", '{"num_train_example": 4}'], "num_train_example"),
    "an environment that raises": (["--env_id", "odd_env", "--env_args", '{"kind": "raises"}'], "no licence"),
    "an environment that is none": (["--env_id", "odd_env", "--env_args", '{"kind": "none"}'], "NoneType"),
    "no examples": (["--env_id", "odd_env"], "no training examples"),
    "rows of two kinds": (["--env_id", "odd_env", "--env_args", '{"kind": "mixed"}'], "Failed to load environment"),
    "no room": (["--max_tokens", "5000"], r"max_tokens=5000: prompts of \d+ tokens leave room for \d+ in the model's"),
    "a seed": (["--seed", "99999999999999999999"], "seed=.*must"),
    "a temperature": (["--temperature", "1e-40"], "temperature=1e-40: must"),
    "no such metric": (["--primary_reward_key", "style"], "primary_reward_key='style'.*'colour'"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "holds no run that could be resumed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(runs, tmp_path, name):
    (runs.log.parent / "odd_env.py").write_text(ENVIRONMENTS)  # where its processes look for modules
    arguments, words = MISTAKES[name]
    assert re.search(words, refusal(runs, tmp_path, "--adapter", "qwen", *arguments))


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_loaded(runs, tmp_path, disk, kind):
    (tmp_path / "file").write_text("")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}.get(kind)
    if folder is None:
        folder = disk("64k")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    said = len(runs.said()) if runs.log.exists() else 0
    runs.start("--adapter", "qwen", "--output_dir", str(folder))
    assert runs.end() == 2
    (line,) = runs.said()[said:].strip().splitlines()  # not even the demonstration's settings
    assert f"output_dir={str(folder)!r}: cannot be written to" in line


def test_settings_that_do_nothing_without_a_server_are_named(runs, tmp_path):
    said = len(runs.said()) if runs.log.exists() else 0
    out = ["--output_dir", str(tmp_path / "out"), "--max_steps", "0", "--eval_examples", "0"]
    runs.start("--adapter", "qwen", "--generation_timeout", "0.001", "--max_concurrent", "8", *out)
    assert runs.end() == 0
    assert "without vllm_server_host there is nothing that max_concurrent, generation_timeout" in runs.said()[said:]


# ---------------------------------------------------------------- what is written about it


def test_every_test_that_the_page_on_reliability_names_exists():
    rows = re.findall(r"^\|(?! what is tried|---)(.*)\|$", (HERE / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named or "| no test" in row, row
        for file, name in named:
            assert f"def {name}(" in (HERE / file).read_text(), f"{file}::{name}"
