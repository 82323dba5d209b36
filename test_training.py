"""The whole way: rollouts, updates, command line. Does a policy learn to see, and only by seeing?"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import verifiers as vf
from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer

from conftest import DEMONSTRATIONS, make_trainer
from mm_grpo import DEMO, MultimodalGRPOTrainer, MultimodalRLConfig

HERE = Path(__file__).parent
COMMAND = [sys.executable, str(HERE / "mm_grpo.py")]


def make_demo(family: str, env: dict | None = None, seed: int = 0, **settings) -> MultimodalGRPOTrainer:
    """A trainer with the settings of the command line's demonstration run."""
    return make_trainer(family, {"num_eval_examples": 128, **(env or {})}, seed=seed, **{**DEMO, **settings})


def run(*arguments: str, cwd: Path) -> str:
    """Run the command line; returns what appeared on the screen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# -- learning to see


@pytest.fixture(scope="module")
def trained() -> MultimodalGRPOTrainer:
    """A Qwen2-VL after 160 steps of the demonstration run (of 280; the README has the full runs' numbers)."""
    trainer = make_demo("qwen")
    for _ in range(160):
        trainer.step()
    return trainer


def test_a_random_model_answers_at_chance_and_learns_to_see(trained):
    untrained = make_demo("qwen").evaluate()
    assert untrained["exact"] <= 0.10
    seen = trained.evaluate()
    # chance is 1/4 for the colour, 1/3 for the shape and 1/12 for both
    assert seen["colour"] >= 0.80 and seen["shape"] >= 0.50 and seen["exact"] >= 0.45


def test_a_trained_policy_falls_to_chance_when_images_are_swapped(trained):
    """The same answers with the images of other prompts: what is left was never seen."""
    env = trained.env
    rows = env.get_eval_dataset().to_list()
    prompts = [row["prompt"] for row in rows]
    swapped = [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts[1:] + prompts[:1])]
    swapped = vf.SingleTurnEnv(eval_dataset=Dataset.from_list(swapped), rubric=env.rubric, parser=env.parser)
    trained.set_environment(swapped)
    blind = trained.evaluate()
    trained.set_environment(env)
    # 128 draws at 1/12: mean 0.083, standard deviation 0.024; at 1/4: 0.038; at 1/3: 0.042. Bounds at 4 deviations.
    assert blind["exact"] <= 0.18 and blind["colour"] <= 0.41 and blind["shape"] <= 0.50


def test_nothing_is_learned_where_there_is_nothing_to_see():
    trainer = make_demo("qwen", env={"blind": True})
    for _ in range(100):
        trainer.step()
    result = trainer.evaluate()
    assert result["exact"] <= 0.25
    assert result["form"] >= 0.6  # it did learn what can be learned blind: to answer with a colour and a shape


def test_llava_learns_to_see_colours():
    trainer = make_demo("llava")
    for _ in range(80):
        trainer.step()
    assert trainer.evaluate()["colour"] >= 0.5  # chance 0.25


# -- exactness


@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_every_first_update_is_on_policy(family):
    """The trainer's probability of each sampled token is the server's, to 1e-4, after every update; images included."""
    trainer = make_demo(family, rollouts_per_step=32, env={"num_train_examples": 64, "images_per_prompt": 2})
    for _ in range(6):
        metrics = trainer.step()
        assert abs(metrics["ratio_min"] - 1) <= 1e-4 and abs(metrics["ratio_max"] - 1) <= 1e-4
        assert metrics["rollouts_dropped"] == 0


def test_a_temperature_keeps_the_policy_on_policy():
    trainer = make_demo("qwen", rollouts_per_step=32, temperature=0.6, env={"num_train_examples": 64})
    metrics = trainer.step()
    assert abs(metrics["ratio_min"] - 1) <= 1e-4 and abs(metrics["ratio_max"] - 1) <= 1e-4


def test_the_same_seed_gives_the_same_metrics():
    def metrics(seed):
        trainer = make_demo("qwen", seed=seed, rollouts_per_step=32, env={"num_train_examples": 64})
        steps = [trainer.step() for _ in range(3)]
        return [{name: value for name, value in step.items() if not name.startswith("seconds")} for step in steps]

    first, again, other = metrics(0), metrics(0), metrics(1)
    assert again == first and other != first


def test_a_mismatch_is_a_warning_that_names_its_causes():
    trainer = make_demo("qwen", rollouts_per_step=16, env={"num_train_examples": 16})
    batch = trainer.adapter.build_batch(trainer.rollouts.collect())
    batch.behavior_logprobs[batch.loss_mask != 0] -= 1.0
    with pytest.warns(UserWarning, match="images lost.*processed_logprobs.*generation-config"):
        trainer.update(batch)


def test_a_lost_image_shows_as_mismatch():
    """Why the check exists: the same tokens scored with other pixels are not on-policy, and mismatch_kl says so."""
    trainer = make_demo("qwen", rollouts_per_step=16, env={"num_train_examples": 16})
    batch = trainer.adapter.build_batch(trainer.rollouts.collect())
    batch.pixel_values = torch.zeros_like(batch.pixel_values)
    with pytest.warns(UserWarning, match="images lost"):
        assert trainer.update(batch)["mismatch_kl"] > 1e-6  # on-policy it is below 1e-10


# -- command line


def test_the_command_line_trains_and_ends_with_what_can_be_done_now(runs, tmp_path, monkeypatch):
    screen = run("--adapter", "llava", "--max_steps", "2", "--eval_examples", "8", "--output_dir", "out", cwd=tmp_path)
    assert "before training" in screen and "after training" in screen and "training: 100%" in screen
    assert "Warning" not in screen and "Traceback" not in screen
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    assert (out / "curves.png").stat().st_size > 1000
    assert json.loads((out / "config.json").read_text())["max_steps"] == 2
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint-2")
    AutoImageProcessor.from_pretrained(out / "checkpoint-2")
    # the last three lines on the screen are what can be done now, and each can be
    look, load, train = (
        line.partition(": ")[2] for line in screen.splitlines() if re.match("look|load|train your", line)
    )
    assert look == "out/report.html (curves out/curves.png, numbers out/metrics.jsonl)"
    assert (out / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    model = eval(load, {"transformers": transformers})
    again = shlex.split(train.partition(" (")[0].replace("YOURS", "shapes-env"))
    assert again[:2] == ["python", "mm_grpo.py"]
    few = "--max_steps 1 --eval_examples 0 --max_tokens 3 --rollouts_per_step 16 --output_dir again".split()
    said = len(runs.said())
    runs.start(*again[2:], *few, cwd=tmp_path)
    assert runs.end() == 0, runs.said()[said:]
    assert type(model).__name__ in runs.said()[said:] and tokenizer.eos_token == "</s>"
    # an earlier run is never overwritten
    said = len(runs.said())
    runs.start("--adapter", "llava", "--max_steps", "1", "--output_dir", "out", cwd=tmp_path)
    assert runs.end() != 0 and "holds an earlier run" in runs.said()[said:]


def test_help_names_every_field_and_a_bad_value_is_refused_by_name(runs):
    said = len(runs.said())
    runs.start("--help")
    assert runs.end() == 0
    assert all(f"--{name}" in runs.said()[said:] for name in MultimodalRLConfig.__dataclass_fields__)
    said = len(runs.said())
    runs.start("--adapter", "qwen", "--rollouts_per_step", "14")
    assert runs.end() == 2 and "rollouts_per_step=14: must be a multiple" in runs.said()[said:]


def test_importing_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import mm_grpo, adapters"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout + done.stderr == ""
