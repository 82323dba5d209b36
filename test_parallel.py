"""Tests of ranks and shards: N processes give the run that one gives.

    pytest test_parallel.py

Two real processes with gloo each time, as torchrun would start them; shards with a real vLLM server are in
test_vllm.py.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import checkpoints

QUICK = "--eval_examples 8 --max_steps 5 --rollouts_per_step 16 --rollouts_per_example 4 --max_tokens 4 --beta 0.1"
QUICK += " --updates_per_batch 2 --learning_rate 1e-3 --lr_scheduler_type constant --adapter qwen"


def metrics(folder) -> list[dict]:
    """The lines of metrics.jsonl without what a clock has measured."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


def weights(folder) -> torch.Tensor:
    """Of the newest checkpoint."""
    tensors = load_file(checkpoints(Path(folder))[-1] / "model.safetensors")
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
    "uneven shares": ["--rollouts_per_step", "12"],
    "prompts that come twice": ["--env_args", '{"num_train_examples": 3}'],
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_two_ranks_give_the_run_that_one_gives(runs, tmp_path, settings):
    expect_equal(run(runs, tmp_path / "one", 1, *settings), run(runs, tmp_path / "two", 2, *settings))
