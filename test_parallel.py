"""Tests of ranks and shards: N processes give the run that one gives.

    pytest test_parallel.py

Two real processes with gloo each time, as torchrun would start them; shards with a real vLLM server are in
test_vllm.py.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import checkpoints, published_weights, step_of
from conftest import group, make_trainer, needs, wait_for
from lora import adapter_weights
from rollouts import epoch_order

HERE = Path(__file__).parent
QUICK = "--eval_examples 8 --max_steps 5 --rollouts_per_step 16 --rollouts_per_example 4 --max_tokens 4 --beta 0.1"
# AdamW moves a weight whose gradient is rounding noise as far as any other, so two orders of sums are apart by a share
# of the learning rate: at 1e-3 one weight of 280,000 by 1.2e-5
QUICK += " --updates_per_batch 2 --learning_rate 3e-4 --lr_scheduler_type constant --adapter qwen"


def metrics(folder) -> list[dict]:
    """The lines of metrics.jsonl without what a clock has measured."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


def weights(folder) -> torch.Tensor:
    """Of the newest checkpoint: the model's, or its adapter's."""
    (file,) = checkpoints(Path(folder))[-1].glob("*.safetensors")
    tensors = load_file(file)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def run(runs, folder, ranks, *arguments) -> Path:
    """A run of the command line in so many processes; its folder."""
    said = len(runs.said())
    command = [*QUICK.split(), "--output_dir", str(folder), *arguments]
    started = runs.start_ranks(ranks, *command) if ranks > 1 else [runs.start(*command)]
    assert [runs.end(process) for process in started] == [0] * ranks, runs.said()[said:][-3000:]
    return folder


def expect_equal(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Every metric of every step within 1e-4, weights within 1e-5."""
    ours, theirs = metrics(one), metrics(other)
    assert len(ours) == len(theirs) and all(ours)
    for mine, yours in zip(ours, theirs):
        assert mine.keys() == yours.keys()
        wrong = {
            name: (mine[name], yours[name])
            for name in mine
            if not math.isclose(mine[name], yours[name], rel_tol=rtol, abs_tol=1e-6)
        }
        assert not wrong
    assert (weights(one) - weights(other)).abs().max() <= atol


SETTINGS = {
    "the demonstration's loss": [],
    "the batch's spread": ["--scale_rewards", "batch"],
    "dr_grpo": ["--loss_type", "dr_grpo", "--scale_rewards", "none"],
    "gspo": ["--loss_type", "gspo", "--scale_rewards", "group"],
    "adapters": pytest.param(["--lora_rank", "4"], marks=needs("peft")),
    "a frozen tower": ["--freeze", "visual"],
    "uneven shares": ["--rollouts_per_step", "12"],
    "prompts that come twice": ["--env_args", '{"num_train_examples": 3}'],
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_two_ranks_give_the_run_that_one_gives(runs, tmp_path, settings):
    expect_equal(run(runs, tmp_path / "one", 1, *settings), run(runs, tmp_path / "two", 2, *settings))


JUDGE = '''
import verifiers as vf

def load_environment(bad=()):
    """The shapes, with a reward that raises for these examples."""
    shapes = vf.load_environment("shapes-env", num_train_examples=6, num_eval_examples=4)

    def exact(completion, answer, info, **kwargs) -> float:
        if info["number"] in bad:
            raise RuntimeError("the judge is away")
        return float(len(completion[0]["content"]) % 3) + len(answer) / 10

    rows = shapes.get_dataset().to_list()
    numbered = [{**row, "info": {"number": i}} for i, row in enumerate(rows)]
    dataset = type(shapes.get_dataset()).from_list(numbered)
    return vf.SingleTurnEnv(dataset=dataset, eval_dataset=dataset, rubric=vf.Rubric(funcs=[exact]))
'''


def test_a_rank_that_has_nothing_to_train_on_leaves_the_run_what_it_was(runs, tmp_path):
    """Of two prompts a step the second rank's fails in the first step, the first rank's in the second."""
    (runs.log.parent / "halves_env.py").write_text(JUDGE)  # where its processes look for modules
    first, second, third, *_ = epoch_order(6, seed=0, epoch=0)
    settings = ["--env_id", "halves_env", "--env_args", json.dumps({"bad": [second, third]}), "--max_steps", "3"]
    settings += ["--rollouts_per_step", "8", "--eval_examples", "0", "--micro_batch_tokens", "100"]
    one, two = (run(runs, tmp_path / str(ranks), ranks, *settings) for ranks in (1, 2))
    assert [line["rollouts_dropped"] for line in metrics(one)] == [4, 4, 0]
    expect_equal(one, two)


def test_fewer_prompts_than_ranks_and_a_shard_of_one_process_are_refused(runs, tmp_path):
    said, command = len(runs.said()), [*QUICK.split(), "--output_dir", str(tmp_path / "run")]
    started = runs.start_ranks(2, *command, "--rollouts_per_step", "4")
    assert [runs.end(process) for process in started] == [2, 2]
    assert "error: rollouts_per_step=4: fewer prompts than the 2 ranks" in runs.said()[said:]
    server = type("Elsewhere", (), {"shares_weights": False})()
    with pytest.raises(ValueError, match="shard=True: there is one process; start it with torchrun"):
        make_trainer(server=server, shard=True, vllm_server_host="elsewhere")


def test_torchrun_starts_ranks_and_one_of_them_speaks(tmp_path):
    """The README's command; torchrun itself starts the processes. Rank 0 has a screen and a folder, for all."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "mm_grpo.py"]
    command += [*QUICK.split(), "--max_steps", "2", "--eval_examples", "4"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("Qwen2VL")]
    assert said.endswith("on cpu, the first of 2 ranks") and done.stdout.count("after training: reward") == 1
    folder = HERE / re.search(r"'(\S+)/checkpoint-2'", done.stdout)[1]
    assert len(metrics(folder)) == 2
    shutil.rmtree(folder)


# ---------------------------------------------------------------- ranks that fail


SABOTAGE = '''
import os
import verifiers as vf

def load_environment(step, **kwargs):
    """The shapes, and a second rank whose backward fails at this step."""
    import mm_grpo
    backward = mm_grpo.MultimodalGRPOTrainer.backward

    def broken(trainer, *args):
        if os.environ.get("RANK") == "1" and trainer.policy.version + 1 == step:
            raise RuntimeError("a kernel that this device does not have")
        return backward(trainer, *args)

    mm_grpo.MultimodalGRPOTrainer.backward = broken
    return vf.load_environment("shapes-env", **kwargs)
'''
LONG = ["--max_steps", "500", "--save_steps", "2", "--eval_examples", "0"]


def begin(runs, folder, *arguments, ranks=2, steps=3) -> list[int]:
    """Start a long run in so many processes and wait until it has done some steps; the process ids."""
    started = runs.start_ranks(ranks, *QUICK.split(), "--output_dir", str(folder), *LONG, *arguments)
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= steps, seconds=60)
    return started


def test_a_rank_that_is_killed_ends_the_others_with_its_name_and_the_run_goes_on(runs, tmp_path):
    """Two ranks go on to the same bits, one rank to the same numbers, each from the last whole checkpoint."""
    said = len(runs.said())
    processes = begin(runs, tmp_path / "killed")
    os.kill(processes[1], signal.SIGKILL)
    killed = time.monotonic()
    assert [runs.end(process) for process in processes] == [1, -9]
    assert time.monotonic() - killed < 20 and "error: rank 1 is gone" in runs.said()[said:]
    done = step_of(checkpoints(tmp_path / "killed")[-1])
    assert done >= 2 and done % 2 == 0 and not list((tmp_path / "killed").glob(".checkpoint*"))
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    length = ["--max_steps", str(done + 3), "--eval_examples", "0"]
    run(runs, tmp_path / "killed", 2, *length, "--resume_from_checkpoint", "true")
    run(runs, tmp_path / "alone", 1, *length, "--resume_from_checkpoint", "true")
    run(runs, tmp_path / "whole", 2, *length)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    expect_equal(tmp_path / "alone", tmp_path / "whole")


def test_a_rank_that_fails_by_itself_ends_the_others_with_what_it_said(runs, tmp_path):
    (runs.log.parent / "sabotage_env.py").write_text(SABOTAGE)
    said = len(runs.said())
    arguments = ["--env_id", "sabotage_env", "--env_args", '{"step": 4}']
    processes = begin(runs, tmp_path / "run", *arguments, ranks=3)
    assert [runs.end(process) for process in processes] == [1, 1, 1]
    named = "error: rank 1 failed: RuntimeError: a kernel that this device does not have"
    assert runs.said()[said:].count(named) == 3
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_a_rank_that_no_longer_answers_ends_the_others_within_the_timeout(runs, tmp_path):
    said = len(runs.said())
    processes = begin(runs, tmp_path / "run", "--ddp_timeout", "5")
    os.kill(processes[1], signal.SIGSTOP)
    stopped = time.monotonic()
    assert runs.end(processes[0]) == 1
    assert 4 < time.monotonic() - stopped < 20 and "rank 1 is gone, or does not answer" in runs.said()[said:]
    os.kill(processes[1], signal.SIGKILL)
    assert runs.end(processes[1]) == -9 and checkpoints(tmp_path / "run")


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(runs, tmp_path):
    processes = begin(runs, tmp_path / "run")
    os.kill(processes[1], signal.SIGTERM)
    assert [runs.end(process) for process in processes] == [143, 143]
    assert step_of(checkpoints(tmp_path / "run")[-1]) == metrics(tmp_path / "run")[-1]["step"]


# ---------------------------------------------------------------- shards

SHARDED = """
import sys, torch, parallel
sys.path.insert(0, ".")
from conftest import make_trainer
class Elsewhere:  # a server that is not in this process; nothing is asked of it here
    shares_weights, dtype, client = False, torch.float32, None
parallel.start(type("", (), dict(ddp_timeout=60, output_dir="")))
batch, settings = torch.load({batch!r}, weights_only=False)
trainer = make_trainer(server=Elsewhere(), shard=True, vllm_server_host="elsewhere", **settings)
mine = batch.select([i for i in range(len(batch)) if i in {shares}[parallel.rank()]])
metrics = trainer.update(mine)
trainer.save_checkpoint(__import__("pathlib").Path({folder!r}))
if parallel.rank() == 0:
    print(metrics)
"""


def batch_of(env, **settings):
    """A batch of the first prompts, sampled in this process."""
    trainer = make_trainer(env=env, **settings)
    batch = trainer.adapter.build_batch(trainer.rollouts.collect())
    trainer.close()
    return replace(batch, rewards=torch.rand(len(batch), generator=torch.Generator().manual_seed(0)))


HALVES, UNEVEN, NONE = ([range(8), range(8, 16)], [range(12), range(12, 16)], [range(16), ()])  # rollouts of two ranks
LORA = {"lora_rank": 4, "merge_adapter": True}
SHARDS = [({}, HALVES), ({}, UNEVEN), ({}, NONE), ({"share_prefix": False}, UNEVEN), ({"share_prefix": False}, NONE)]
SHARDS += [
    ({"gradient_checkpointing": True}, UNEVEN),
    ({"freeze": "visual"}, UNEVEN),
    ({"freeze": r"layers\.0"}, UNEVEN),
]
SHARDS += [({"turns": 2}, UNEVEN), ({"turns": 2}, NONE)]  # a picture in each turn: later ones go with their rows
SHARDS += [pytest.param(LORA, UNEVEN, marks=needs("peft"))]


@pytest.mark.parametrize(("settings", "shares"), SHARDS)
def test_shards_make_the_update_that_one_process_makes(runs, tmp_path, settings, shares):
    settings = dict(settings, updates_per_batch=2, beta=0.1, micro_batch_tokens=60, rollouts_per_step=16)
    settings |= dict(rollouts_per_example=4, max_tokens=4, learning_rate=3e-4, output_dir=str(tmp_path / "out"))
    turns = settings.pop("turns", 1)
    batch = batch_of({"num_train_examples": 6, "turns": turns}, **settings)
    torch.save((batch, settings), tmp_path / "batch.pt")
    trainer = make_trainer(**settings)
    alone = trainer.update(batch)
    assert trainer.policy.later_media_are_exact == (True if turns == 2 else None)
    rollouts, folder = batch.rollout_ids.tolist(), tmp_path / "two"
    shares = [[row for row, rollout in enumerate(rollouts) if rollout in part] for part in shares]
    code = SHARDED.format(batch=str(tmp_path / "batch.pt"), shares=shares, folder=str(folder))
    sharded = eval(runs.printed(code, ranks=2))
    assert sharded.keys() == alone.keys()
    wrong = {name for name in alone if not math.isclose(alone[name], sharded[name], rel_tol=1e-4, abs_tol=1e-6)}
    assert not wrong, [(name, alone[name], sharded[name]) for name in wrong]
    saved = load_file((folder / "merged" if "lora_rank" in settings else folder) / "model.safetensors")
    ours = dict(published_weights(trainer.model))
    assert max((ours[name] - saved[name]).abs().max() for name in ours) <= 1e-5


@needs("peft")
def test_shards_of_a_base_in_bfloat16_and_adapters_in_float32_learn_as_one_process_does(runs, tmp_path):
    settings = dict(LORA, param_dtype="bfloat16", updates_per_batch=2, beta=0.1, rollouts_per_step=16, max_tokens=4)
    settings |= dict(rollouts_per_example=4, learning_rate=3e-4, output_dir=str(tmp_path / "out"))
    batch = batch_of({"num_train_examples": 6}, **settings)
    torch.save((batch, settings), tmp_path / "batch.pt")
    trainer = make_trainer(**settings)
    alone = trainer.update(batch)
    code = SHARDED.format(
        batch=str(tmp_path / "batch.pt"), shares=[list(s) for s in HALVES], folder=str(tmp_path / "t")
    )
    sharded = eval(runs.printed(code, ranks=2))
    assert sharded["kl"] == alone["kl"] == 0 and math.isclose(sharded["grad_norm"], alone["grad_norm"], rel_tol=0.05)
    saved, ours = load_file(tmp_path / "t" / "adapter_model.safetensors"), adapter_weights(trainer.model)
    assert saved.keys() == ours.keys() and {tensor.dtype for tensor in saved.values()} == {torch.float32}
    start = adapter_weights(make_trainer(**settings).model)
    moved, apart = (
        torch.cat([(one[name] - other[name]).flatten() for name in ours]).norm()
        for one, other in ((ours, start), (saved, ours))
    )
    assert 0 < apart < 0.3 * moved  # gradients of bfloat16 passes in another order, of which AdamW makes whole steps


RESUMED = """
import os, signal, sys, torch, parallel
from pathlib import Path
sys.path.insert(0, ".")
from checkpoint import RunState
from conftest import make_trainer
class Elsewhere:  # a server that is not in this process; nothing is asked of it here
    shares_weights, dtype, client, updates = False, torch.float32, None, 0
parallel.start(type("", (), dict(ddp_timeout=60, output_dir="")))
batch, settings = torch.load({batch!r}, weights_only=False)
settings |= dict(output_dir={folder!r}, resume_from_checkpoint="true", max_steps=9)
if parallel.ranks() > 1:
    settings |= dict(shard={shard}, vllm_server_host="elsewhere")
trainer = make_trainer(server=Elsewhere(), **settings)
RunState(trainer).resume()
while trainer.policy.version < 4:
    rows = [i for i in range(len(batch)) if i // 8 % parallel.ranks() == parallel.rank()]
    trainer.update(batch.select(rows))
    trainer.policy.version += 1
    if trainer.policy.version in ({killed}, 4):
        RunState(trainer).save()
    if trainer.policy.version == {killed} + 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("shard", [True, False], ids=["shards", "whole models"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_two_ranks_that_are_killed_go_on_to_the_same_bits_and_one_to_the_same_numbers(
    runs, tmp_path, shard, param_dtype
):
    settings = dict(rollouts_per_step=16, rollouts_per_example=4, max_tokens=4, learning_rate=3e-4, beta=0.1)
    batch = batch_of({"num_train_examples": 6}, **settings, output_dir=str(tmp_path / "sampled"))
    torch.save((batch, {**settings, "param_dtype": param_dtype}), tmp_path / "batch.pt")

    def train(name, ranks, killed=9) -> Path:
        code = RESUMED.format(batch=str(tmp_path / "batch.pt"), folder=str(tmp_path / name), shard=shard, killed=killed)
        if killed == 9:
            runs.printed(code, ranks)
        else:
            asked = {"code": code, "output": str(tmp_path / "printed"), "folder": str(HERE)}
            started = [runs.ask({**asked, "environment": told}) for told in group(ranks)]
            assert [runs.end(process) for process in started] == [-9] * ranks
        return checkpoints(tmp_path / name)[-1]

    assert train("killed", 2, killed=2).name == "checkpoint-2"
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    whole, parts, alone = train("whole", 2), train("killed", 2), train("alone", 1)
    assert whole.name == parts.name == alone.name == "checkpoint-4"
    for name in ("model.safetensors", "optimizer.state"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    apart = (weights(whole.parent) - weights(alone.parent)).float().abs().max()
    assert apart <= (1e-5 if param_dtype == "float32" else 2e-3)  # a bfloat16 weight of 0.2 has steps of 1e-3
