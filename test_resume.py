"""Tests of what outlives a run: checkpoints that are whole at every moment, and runs that go on from them bit for bit.

    pytest test_resume.py

Runs are killed for real, in processes of their own: one that has imported everything forks a child for each run.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import verifiers as vf

from checkpoint import DOOMED, FREE, STATE, checkpoints, read_state
from conftest import make_tiny, make_trainer, needs, wait_for
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig

HERE = Path(__file__).parent
SMALL = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, eval_examples=2, learning_rate=1e-3)
ENV = {"num_train_examples": 6, "num_eval_examples": 4}


def run(folder, env=ENV, **settings):
    """Train in this process, from the beginning or from a checkpoint; the trainer."""
    trainer = make_trainer(env=env, **{**SMALL, "output_dir": str(folder), **settings})
    trainer.train()
    trainer.close()
    return trainer


def metrics(folder) -> list[dict]:
    """The lines of metrics.jsonl without what a clock has measured."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


def bits(checkpoint: Path) -> dict[str, str]:
    """Hashes of all weights and of the optimizer's state."""
    files = [*checkpoint.glob("*.safetensors"), checkpoint / "optimizer.state"]
    assert len(files) == 2
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    "settings",
    [
        dict(updates_per_batch=2, beta=0.1, scale_rewards="batch"),
        dict(env={**ENV, "turns": 2}, loss_type="gspo", micro_batch_tokens=150),
        pytest.param(dict(optim="adamw_8bit", updates_per_batch=2), marks=needs("bitsandbytes")),
        dict(param_dtype="bfloat16", updates_per_batch=2, beta=0.1, learning_rate=1e-4),  # most steps below a bit
    ],
    ids=["with a reference policy", "two turns", "an optimizer of 8 bits", "weights in bfloat16"],
)
def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path, settings):
    """Five steps walk the six prompts for a second time: shuffles and random streams go on too."""
    run(tmp_path / "whole", max_steps=5, **settings)
    for steps in (1, 3):
        run(tmp_path / "parts", max_steps=steps, resume_from_checkpoint="true" if steps > 1 else None, **settings)
    run(tmp_path / "parts", max_steps=5, resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"), **settings)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts") and len(metrics(tmp_path / "whole")) == 5
    assert bits(tmp_path / "whole" / "checkpoint-5") == bits(tmp_path / "parts" / "checkpoint-5")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_rate_falls_goes_on_with_the_same_bits_to_the_end_that_it_had(tmp_path, schedule):
    """Another end would be another rate at every step, those included that are done."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = dict(lr_scheduler_type=schedule, warmup_steps=1, max_steps=4, save_steps=1)
    run(whole, **settings)
    shutil.copytree(whole, parts)
    for step in (3, 4):  # as if it had been killed after step 2
        shutil.rmtree(parts / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="not the run's settings: max_steps: 4 -> 5 "):
        run(parts, **{**settings, "max_steps": 5}, resume_from_checkpoint="true")
    run(parts, **settings, resume_from_checkpoint="true")
    assert metrics(whole) == metrics(parts) and bits(whole / "checkpoint-4") == bits(parts / "checkpoint-4")
    assert len({line["learning_rate"] for line in metrics(parts)}) == 4


def chance(completion) -> float:
    """A reward from every global generator of random numbers."""
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


def test_environments_that_draw_from_global_generators_go_on_too(tmp_path):
    def env():
        made = vf.load_environment("shapes-env", **ENV)
        return vf.SingleTurnEnv(dataset=made.get_dataset(), eval_dataset=made.get_eval_dataset(), rubric=rubric)

    rubric = vf.Rubric(funcs=[chance])
    run(tmp_path / "whole", env=env(), max_steps=4)
    run(tmp_path / "parts", env=env(), max_steps=2)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    run(tmp_path / "parts", env=env(), max_steps=4, resume_from_checkpoint="true", eval_examples=0)
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert whole == parts and len({line["reward"] for line in whole}) == 4


def test_a_module_that_is_no_transformers_model_is_resumed_too(tmp_path):
    class Wrapped(torch.nn.Module):
        """The head's weights hang here, the rest of the model does not learn."""

        def __init__(self):
            super().__init__()
            inner, self.adapter = make_tiny("qwen")
            self.inner = [inner.requires_grad_(False)]
            self.bias = torch.nn.Parameter(torch.zeros(inner.lm_head.weight.shape[0]))

        def forward(self, **inputs):
            return self.inner[0](**inputs).logits + self.bias

    def go(folder, **settings):
        source = make_trainer(env=ENV, **SMALL)
        model = Wrapped()
        config = MultimodalRLConfig(**{**SMALL, "output_dir": str(folder), "mismatch_threshold": 1e3, **settings})
        trainer = MultimodalGRPOTrainer(model, source.tokenizer, model.adapter, config, source.env, source.server)
        trainer.train()
        return model.bias.detach().clone()

    whole = go(tmp_path / "whole", max_steps=3)
    go(tmp_path / "parts", max_steps=2)
    assert torch.equal(go(tmp_path / "parts", max_steps=3, resume_from_checkpoint="true"), whole) and whole.any()


def test_the_same_seed_gives_the_same_bits_whatever_runs_beside_it(tmp_path):
    """A group's first requests came in the order of threads: the client asks in one on what platform it runs."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for name in ("one", "other"):
            # no evaluation: the very first requests are those of a group
            run(tmp_path / name, max_steps=3, rollouts_per_step=32, max_concurrent=4, eval_examples=0)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert metrics(tmp_path / "one") == metrics(tmp_path / "other")
    assert bits(tmp_path / "one" / "checkpoint-3") == bits(tmp_path / "other" / "checkpoint-3")


# ---------------------------------------------------------------- killed


KILLS, STEPS = 20, 45  # a kill comes within two steps
COMMAND = ["--adapter", "qwen", "--rollouts_per_step", "8", "--eval_examples", "2", "--save_steps", "1"]
COMMAND += ["--save_total_limit", "2", "--max_steps", str(STEPS), "--env_args", json.dumps(ENV)]


def newest(folder: Path) -> int:
    return max([0, *(int(path.name.removeprefix("checkpoint-")) for path in checkpoints(folder))])


def test_a_run_that_is_killed_20_times_and_resumed_ends_with_the_bits_of_one_left_alone(runs, tmp_path):
    """kill -9 at random moments, every other one in the middle of a save."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    runs.start(*COMMAND, "--output_dir", str(alone))
    assert runs.end() == 0, runs.said()[-2000:]
    moments, reached, in_saves = random.Random(0), 0, 0
    for i in range(KILLS):
        again = ["--resume_from_checkpoint", "true"] if i else []
        process = runs.start(*COMMAND, "--output_dir", str(killed), *again)
        if i % 2:  # once a step is done, in the next save
            wait_for(lambda past=reached: newest(killed) > past)
            wait_for(lambda: any(killed.glob(".checkpoint-*.unfinished")))
        else:
            wait_for(lambda: (killed / "config.json").exists())
            until = time.monotonic() + moments.uniform(0, 2)  # on a fast machine within a step of the first one
            wait_for(lambda past=reached, until=until: time.monotonic() > until or newest(killed) > past)
            time.sleep(moments.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        assert runs.end() == -9, runs.said()[-2000:]  # it had not ended before
        in_saves += any(killed.glob(".checkpoint-*.unfinished"))
        reached = newest(killed)
        for path in checkpoints(killed):  # whole, whenever it was
            assert bits(path) and set(read_state(path)["files"]) < {name.name for name in path.iterdir()}
    assert in_saves >= 5 and reached < STEPS
    runs.start(*COMMAND, "--output_dir", str(killed), "--resume_from_checkpoint", "true")
    assert runs.end() == 0, runs.said()[-2000:]
    assert metrics(alone) == metrics(killed) and [line["step"] for line in metrics(killed)] == list(range(1, STEPS + 1))
    assert bits(alone / f"checkpoint-{STEPS}") == bits(killed / f"checkpoint-{STEPS}")
    assert not list(killed.glob(".*"))  # nothing unfinished is left


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_and_one_line(runs, tmp_path, number, code):
    said = len(runs.said()) if runs.log.exists() else 0
    process = runs.start(*COMMAND, "--output_dir", str(tmp_path / "run"), "--max_steps", "1000", "--save_steps", "0")
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size)
    for _ in range(3):  # the second and the third wait like the first
        os.kill(process, number)
        time.sleep(0.02)
    assert runs.end() == code
    (saved,) = checkpoints(tmp_path / "run")
    assert read_state(saved)["step"] == metrics(tmp_path / "run")[-1]["step"] and bits(saved)
    screen = runs.said()[said:]
    assert "Traceback" not in screen and "never awaited" not in screen and "pending" not in screen
    name = signal.Signals(number).name
    assert screen.count(f"{name}: the run stops after this step, with a checkpoint") == 1
    assert f"{name}: stopped; --resume_from_checkpoint {saved} goes on" in screen


def test_a_signal_before_the_first_step_ends_a_run_too(runs, tmp_path):
    process = runs.start(*COMMAND, "--output_dir", str(tmp_path / "run"), "--eval_examples", "256")
    wait_for(lambda: (tmp_path / "run" / "config.json").exists())
    time.sleep(1.0)  # in the loading, or in the first evaluation
    os.kill(process, signal.SIGINT)
    assert runs.end() == 130


def test_an_ignored_signal_stays_ignored(tmp_path):
    """nohup ignores SIGHUP; a handler of ours would end what must go on."""
    script = "import signal, os; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    script += (
        "from faults import deferred_signals\nwith deferred_signals() as came: os.kill(os.getpid(), signal.SIGHUP)"
    )
    done = subprocess.run([sys.executable, "-c", script + "\nprint(came)"], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- what is kept, what is evaluated


def test_checkpoints_come_every_save_steps_and_the_newest_are_kept(tmp_path):
    def names(folder):
        return [path.name for path in checkpoints(folder)]

    run(tmp_path / "all", max_steps=5, save_steps=2, save_total_limit=0)
    assert names(tmp_path / "all") == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    run(tmp_path / "last", max_steps=2, save_steps=0)
    assert names(tmp_path / "last") == ["checkpoint-2"]
    folder = tmp_path / "two"
    run(folder, max_steps=2, save_steps=1, save_total_limit=2)
    (folder / "checkpoint-1" / "thesis.txt").write_text("mine")
    (folder / "checkpoint-best").mkdir()
    run(folder, max_steps=4, save_steps=1, save_total_limit=2, resume_from_checkpoint="true")
    assert names(folder) == ["checkpoint-3", "checkpoint-4"]
    # what the run did not write is still there, and nothing else of the old one
    assert [path.name for path in (folder / "checkpoint-1").iterdir()] == ["thesis.txt"]
    assert (folder / "checkpoint-best").exists() and not (folder / "checkpoint-2").exists()


def test_evaluations_on_the_way_are_in_the_metrics_and_change_no_bit(tmp_path):
    run(tmp_path / "with", max_steps=4, eval_steps=2)
    run(tmp_path / "without", max_steps=4)
    lines = metrics(tmp_path / "with")
    assert [step["step"] for step in lines if "eval/exact" in step] == [2, 4]
    assert all({"eval/reward", "eval/colour"} <= set(step) for step in lines[1::2])
    assert bits(tmp_path / "with" / "checkpoint-4") == bits(tmp_path / "without" / "checkpoint-4")


def test_a_checkpoint_holds_no_pickle_and_all_that_its_run_was(tmp_path):
    trainer = run(tmp_path, max_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".state", ".json", ".jinja"}
    state = read_state(checkpoint)
    assert (state["step"], state["policy_version"], state["prompts_taken"]) == (2, 2, 4)
    assert state["settings"]["adapter"] == "QwenVLAdapter"
    assert state["settings"]["model"].startswith("Qwen2VLForConditionalGeneration")
    assert state["settings"]["learning_rate"] == 1e-3 and set(state["versions"]) == {
        "torch",
        "transformers",
        "verifiers",
    }
    loaded = type(trainer.model).from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_pickle_with_code_in_a_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    run(tmp_path / "run", max_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pt"):
        (checkpoint / name).write_bytes(pickle.dumps(Code()))
    with pytest.raises((OSError, ValueError, RuntimeError, pickle.UnpicklingError)):
        run(tmp_path / "run", max_steps=2, resume_from_checkpoint="true")
    assert not (tmp_path / "it ran").exists()


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder, max_steps=2, save_steps=1)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A run of two steps with a checkpoint after each, for one test."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 2e-3), ("seed", 1), ("rollouts_per_step", 16), ("env_args", {"turns": 2}), ("temperature", 0.5)]
    + [("param_dtype", "bfloat16")],
)
def test_a_setting_that_matters_and_is_another_is_named_and_refused(copied, name, value):
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint='true': not the run's settings: .*{name}: .* -> "):
        run(copied, max_steps=3, resume_from_checkpoint="true", **{name: value})
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-1", "checkpoint-2"]


def test_a_model_from_python_in_another_precision_is_refused(copied):
    """Its masters, or their absence, would not be those of the checkpoint."""
    model, adapter = make_tiny("qwen")
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    with pytest.raises(ValueError, match="settings: param_dtype: 'float32' -> 'bfloat16' "):
        run(copied, tiny=(model, adapter), max_steps=3, resume_from_checkpoint="true")


def test_settings_that_do_not_matter_may_change(copied):
    changed = dict(
        max_steps=3, log_every_steps=1, micro_batch_tokens=99, eval_examples=0, save_total_limit=1, save_steps=5
    )
    assert set(changed) <= set(FREE)
    run(copied, resume_from_checkpoint="true", **changed)
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-3"]


def test_every_free_setting_is_one(finished):
    assert set(FREE) <= {f.name for f in fields(MultimodalRLConfig)}
    assert set(read_state(finished / "checkpoint-2")["settings"]) >= set(FREE) - {"vllm_api_key"}


def test_another_model_is_refused(copied):
    with pytest.raises(ValueError, match="adapter: 'QwenVLAdapter' -> 'LlavaAdapter'; model: 'Qwen2VL.* -> 'Llava"):
        run(copied, family="llava", max_steps=3, resume_from_checkpoint="true")


def test_an_older_checkpoint_than_the_newest_is_refused(copied):
    with pytest.raises(ValueError, match=r"there are newer ones, \['checkpoint-2'\]"):
        run(copied, max_steps=3, resume_from_checkpoint=str(copied / "checkpoint-1"))


@pytest.mark.parametrize("name", ["checkpoint-7", "config.json", "."])
def test_what_is_no_checkpoint_is_refused(copied, name):
    with pytest.raises(ValueError, match="no checkpoint of output_dir"):
        run(copied, max_steps=3, resume_from_checkpoint=str(copied / name))


def test_a_deletion_that_was_cut_off_is_finished(copied):
    (copied / "checkpoint-1" / "notes.txt").write_text("mine")
    (copied / "checkpoint-1" / STATE).rename(copied / "checkpoint-1" / DOOMED)
    run(copied, max_steps=3, resume_from_checkpoint="true")
    assert [path.name for path in (copied / "checkpoint-1").iterdir()] == ["notes.txt"]


def test_half_a_checkpoint_is_none(copied):
    """Where someone's copying of it was cut off: the newest whole one is taken."""
    (copied / "checkpoint-2" / STATE).write_text('{"step": 2, "sett')
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-1"]
    trainer = make_trainer(env=ENV, **SMALL, max_steps=2, output_dir=str(copied), resume_from_checkpoint="true")
    trainer.prepare()
    assert trainer.policy.version == 1


def test_a_folder_with_a_run_is_refused_and_one_without_is_not_resumed(copied, tmp_path):
    with pytest.raises(FileExistsError, match="holds an earlier run; name another folder, or go on with"):
        run(copied, max_steps=3)
    with pytest.raises(FileExistsError, match="holds no run that could be resumed"):
        run(tmp_path / "new", max_steps=3, resume_from_checkpoint="true")


def test_going_on_from_a_checkpoint_as_a_model_says_which_settings_differ(finished, runs, tmp_path):
    said = len(runs.said()) if runs.log.exists() else 0
    checkpoint = str(finished / "checkpoint-2")
    runs.start(
        "--model", checkpoint, "--max_steps", "0", "--eval_examples", "0", "--output_dir", str(tmp_path / "next")
    )
    assert runs.end() == 0, runs.said()[-2000:]
    line = next(line for line in runs.said()[said:].splitlines() if "settings that differ" in line)
    assert checkpoint in line and "learning_rate: 0.001 -> 1e-06" in line and "max_tokens: 3 -> 512" in line
