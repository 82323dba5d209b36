"""Tests of the settings: what is impossible is refused by name, and every one changes something that can be seen.

pytest test_config.py
"""

import contextlib
import io
import json
import math
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from adapters import ADAPTERS, load_model
from command_line import parse_arguments
from conftest import make_tiny, message, picture
from local_server import LocalServer
from mm_grpo import LOSS_TYPES, MultimodalGRPOTrainer, MultimodalRLConfig, main
from report import RunLog
from vllm_server import processor_flag

INF, NAN = math.inf, math.nan
HERE = Path(__file__).parent

# ---------------------------------------------------------------- what cannot be

IMPOSSIBLE = {
    **dict.fromkeys(("learning_rate", "temperature", "max_grad_norm"), (0.0, -1.0, INF, NAN, "1", True)),
    **dict.fromkeys(("generation_timeout", "rollout_timeout", "vllm_server_timeout"), (0.0, -1.0, INF, NAN)),
    "lr_scheduler_type": ("polynomial",), "warmup_steps": (-1, 0.5, 3), "optim": ("adamw_8bit_torchao",),
    **dict.fromkeys(("updates_per_batch", "micro_batch_tokens", "max_tokens", "log_every_steps"), (0, -1, 1.0, True)),
    "lora_rank": (-1, 0.5), "lora_alpha": (0, 1.5), "merge_adapter": ("yes",), "freeze": ("(", 1),
    "max_image_pixels": (0, -1, 1e6),
    "max_concurrent": (0, -1),
    **dict.fromkeys(("max_steps", "eval_examples", "sync_to_vllm_every"), (-1, 0.5)),
    **dict.fromkeys(("save_steps", "save_total_limit", "eval_steps", "report_steps", "report_rollouts"), (-1, 0.5)),
    **dict.fromkeys(("weight_decay", "clip_high", "beta"), (-0.1, NAN)),
    "rollouts_per_example": (1, 0), "rollouts_per_step": (0, 4, 12), "clip_low": (-0.1, 1.0, NAN),
    "mask_ratio_low": (-0.1, 1.1, NAN), "mask_ratio_high": (0.9, NAN), "mismatch_threshold": (0.0, NAN, "much"),
    **dict.fromkeys(("on_mismatch", "on_control_tokens"), ("stop",)),
    "vllm_server_port": (0, 65536), "loss_type": ("ppo",), "scale_rewards": ("both",),
    "env_args": ("{", "red", [1], 7), "processor_kwargs": ("{", [1]), "bf16": ("yes", 1), "seed": (0.5, "x", -1, 2**32),
    "report_to": ("wandb,mlflow", 1),
    "shard": ("yes", True), "ddp_timeout": (0, INF), "output_dir": (None, 3), "param_dtype": ("float16", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_an_impossible_setting_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ValueError) as error:
        MultimodalRLConfig(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r}: must ")


def test_every_number_and_choice_of_the_config_has_a_rule():
    kinds = get_type_hints(MultimodalRLConfig)  # without the bounds
    ruled = {name for name, kind in kinds.items() if kind in (int, float) or get_origin(kind) is Literal}
    assert set(IMPOSSIBLE) >= ruled and get_args(kinds["loss_type"]) == LOSS_TYPES


def test_settings_on_the_edge_of_the_possible_are_taken():
    MultimodalRLConfig(mask_ratio_low=0.0, mask_ratio_high=INF, clip_high=INF)
    MultimodalRLConfig(
        clip_low=0.0, clip_high=0.0, mask_ratio_low=1.0, mask_ratio_high=1.0, beta=0.0, weight_decay=0.0, max_steps=0,
        eval_examples=0, sync_to_vllm_every=0, rollouts_per_example=2, rollouts_per_step=2, vllm_server_port=65535,
    )  # fmt: skip


def test_a_whole_number_is_taken_where_a_number_is_asked_for():
    assert MultimodalRLConfig(learning_rate=1, beta=0).learning_rate == 1


def test_env_args_are_the_same_as_a_dict_and_as_json():
    as_json, as_dict = MultimodalRLConfig(env_args='{"blind": true}'), MultimodalRLConfig(env_args={"blind": True})
    assert as_json.env_args == as_dict.env_args == {"blind": True}
    assert MultimodalRLConfig(env_args=None).env_args == MultimodalRLConfig(env_args="{}").env_args == {}
    with pytest.raises(ValueError, match="env_args.*must be a JSON object"):
        MultimodalRLConfig(env_args="[1]")


# ---------------------------------------------------------------- what each setting does


class Counted(LocalServer):
    """A server that the trainer takes for one with weights of its own, and that counts the updates of them."""

    shares_weights = False
    updates = 0

    def sync(self, model):
        self.updates += 1


def trainer(server=None, **settings):
    """A tiny Qwen2-VL on the shapes, two prompts of four completions a step."""
    model, adapter = make_tiny("qwen")
    small = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, learning_rate=1e-3, eval_examples=2)
    config = MultimodalRLConfig(**{**small, **settings})
    made = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, config, server=server and server(model, adapter))
    made.set_environment("shapes-env", num_train_examples=8, num_eval_examples=8)
    return made


def collected(**settings):
    return trainer(**settings).rollouts.collect()["outputs"]


def completion_length(rollout):
    return len(rollout["trajectory"][0]["tokens"]["completion_ids"])


def stepped(**settings):
    made = trainer(**settings)
    return made, made.step()


def rates(lr_scheduler_type, **settings):
    """The learning rates of a run of two steps."""
    made = trainer(max_steps=2, lr_scheduler_type=lr_scheduler_type, **settings)
    return tuple(made.step()["learning_rate"] for _ in range(2))


def moved(off_policy=0.0, **settings):
    """How far the weights go in an update on one batch, off-policy by the spread of these log-ratios; digits that the
    order of float32 sums does not touch."""
    made = trainer(**{"mismatch_threshold": 1e3, "max_grad_norm": 1e6, **settings})
    batch = made.adapter.build_batch(made.rollouts.collect())
    uneven = batch.loss_mask.clone()
    uneven[1, uneven[1].nonzero()[-1]] = 0  # rows of one length have the same mean in every loss
    noise = torch.randn(batch.behavior_logprobs.shape, generator=torch.Generator().manual_seed(0))
    batch = replace(
        batch,
        rewards=torch.tensor([0.0, 1.0, 2.0, 4.0, 0.0, 0.1, 0.0, 0.1]),
        loss_mask=uneven,
        behavior_logprobs=batch.behavior_logprobs - off_policy * noise * batch.loss_mask,
    )
    with torch.no_grad():
        made.model.lm_head.weight.mul_(1.2)  # away from the reference
    seen = []
    flat = lambda *_: seen.append(torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None]))
    made.optimizer.register_step_pre_hook(flat)
    before = made.model.lm_head.weight.detach().clone()
    made.update(batch)
    return [f"{seen[0].norm():.4g}", f"{(made.model.lm_head.weight - before).abs().max():.3g}", len(seen)]


def in_flight(**settings):
    """The most completions that grow together on a server that does not share the weights."""
    made, sizes = trainer(rollouts_per_step=16, server=Counted, **settings), []
    made.model.register_forward_pre_hook(lambda _, a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    made.rollouts.collect()
    return max(sizes)


def forwards(**settings):
    """Forward passes of the policy in an update."""
    made = trainer(**settings)
    batch = made.adapter.build_batch(made.rollouts.collect())
    calls, made.policy.sharing_is_exact = [], True  # finding that out would count
    made.policy.register_forward_hook(lambda *_: calls.append(1))
    made.update(batch)
    return len(calls)


def layers_run(**settings):
    """How often the language model's first layer runs for each micro-batch of an update."""
    made, calls = trainer(share_prefix=False, micro_batch_tokens=1000, **settings), []
    batch = made.adapter.build_batch(made.rollouts.collect())
    made.policy.head_is_last = True  # finding that out would count
    made.model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    made.update(batch)
    return len(calls)


def precision(**settings):
    """The type of what comes out of the head, in sampling and in training."""
    made, types = trainer(**settings), []
    made.model.lm_head.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    made.server.cache_is_exact = made.policy.sharing_is_exact = made.policy.head_is_last = (
        True  # to find out is in float32
    )
    outputs = made.rollouts.collect()
    sampling, types[:] = set(types), []
    made.update(made.adapter.build_batch(outputs))
    return sampling, set(types)


def complaints(**settings):
    """What an update says of a batch that another policy sampled."""
    made = trainer(**settings)
    batch = made.adapter.build_batch(made.rollouts.collect())
    batch.behavior_logprobs -= 0.5 * batch.loss_mask
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            made.update(batch)
        except RuntimeError:
            return "the end"
    return len(said)


def run(tmp_path_factory, **settings):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    trainer(**{"output_dir": str(folder), "max_steps": 2, "eval_examples": 0, **settings}).train()
    return folder


def lines(folder):
    return len((folder / "metrics.jsonl").read_text().splitlines())


def updates(**settings):
    made = trainer(server=Counted, mismatch_threshold=1e3, **settings)
    lags = [made.step()["lag"] for _ in range(4)]
    return made.server.updates, lags


def refusal(*arguments):
    """The one line that the command line ends with."""
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(io.StringIO()) as screen:
        main(["--adapter", "qwen", "--max_steps", "0", *arguments])
    line = screen.getvalue().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("mm_grpo.py: error: ")
    return line


def no_server(**settings):
    with pytest.raises(TimeoutError) as error:
        trainer(**{"vllm_server_host": "127.0.0.1", "vllm_server_port": 9, "vllm_server_timeout": 0.1, **settings})
    return str(error.value)


def refused(**settings):
    try:
        trainer(**settings)
    except ValueError as error:
        return str(error)


OFF = dict(off_policy=1.0)  # log-ratios on both sides of the clip and, some, of a narrow mask
# setting: (value, another one, what is to be seen of it: a function of the setting; where it is known, what is seen)
EFFECTS = {
    "learning_rate": (1e-3, 2e-3, lambda **s: moved(**s)[1], ["0.001", "0.002"]),  # AdamW's first step has that length
    "weight_decay": (0.0, 0.5, lambda **s: moved(**s)[1]),
    "lr_scheduler_type": ("constant", "linear", rates, [(1e-3, 1e-3), (1e-3, 5e-4)]),
    "warmup_steps": (0, 2, lambda **s: rates("constant_with_warmup", **s), [(1e-3, 1e-3), (0.0, 5e-4)]),
    "rollouts_per_step": (8, 16, lambda **s: len(collected(**s)), [8, 16]),
    "rollouts_per_example": (4, 2, lambda **s: len({r["example_id"] for r in collected(**s)}), [2, 4]),
    "updates_per_batch": (1, 3, lambda **s: moved(**s)[2], [1, 3]),
    "micro_batch_tokens": (1000, 60, forwards, [1, 2]),
    "gradient_checkpointing": (False, True, layers_run, [1, 2]),
    "share_prefix": (True, False, lambda **s: stepped(**s)[1]["shared_prefix_fraction"], [1.0, 0.0]),
    "temperature": (1.0, 0.3, lambda **s: round(stepped(**s)[1]["entropy"], 2)),
    "max_tokens": (3, 5, lambda **s: max(map(completion_length, collected(**s))), [3, 5]),
    "max_concurrent": (512, 8, in_flight, [16, 8]),
    "primary_reward_key": ("reward", "form", lambda **s: {r["reward"] for r in collected(rollouts_per_step=64, **s)}),
    "eval_examples": (2, 3, lambda **s: len(trainer(**s).rollouts.evaluate()["outputs"]), [2, 3]),
    "sync_to_vllm_every": (1, 2, updates, [(5, [0, 0, 0, 0]), (3, [0, 1, 0, 1])]),
    "async_rollouts": (False, True, refused),
    "clip_low": (0.2, 0.9, lambda **s: moved(**OFF, **s)[0]),
    "clip_high": (0.2, 3.0, lambda **s: moved(**OFF, **s)[0]),
    "mask_ratio_low": (0.0, 0.9, lambda **s: moved(**OFF, **s)[0]),
    "mask_ratio_high": (10.0, 1.1, lambda **s: moved(**OFF, **s)[0]),
    "beta": (0.0, 1.0, lambda **s: moved(**s)[0]),
    "scale_rewards": ("group", "none", lambda **s: moved(**s)[0]),
    "mask_truncated_completions": (False, True, lambda **s: stepped(**s)[1]["trained_tokens"] > 12, [True, False]),
    "max_grad_norm": (1e6, 0.01, lambda **s: moved(**s)[0]),
    "mismatch_threshold": (0.4, 0.6, complaints, [1, 0]),
    "on_mismatch": ("warn", "error", complaints, [1, "the end"]),
    "bf16": (False, True, precision, [2 * ({torch.float32},), 2 * ({torch.bfloat16},)]),
    "seed": (0, 1, lambda **s: [r["example_id"] for r in collected(**s)]),
    "vllm_server_host": ("127.0.0.1", "localhost", no_server),
    "vllm_server_port": (9, 10, no_server),
    "vllm_server_timeout": (0.1, 0.2, no_server),
}  # fmt: skip
LOSS_EFFECTS = {loss_type: lambda **s: moved(**OFF, max_tokens=4, **s)[0] for loss_type in LOSS_TYPES}
# What needs a folder, a command line or a real server has a test of its own, here, in test_media.py or test_vllm.py
ELSEWHERE = {
    "optim": "test_a_setting_costs_a_parameter_the_bytes_that_are_said",
    "param_dtype": "test_param_dtype_is_that_of_the_weights_which_are_loaded",
    "report_to": "test_a_dashboard_gets_every_number_of_every_step",
    "shard": "test_shards_make_the_update_that_one_process_makes",
    "ddp_timeout": "test_a_rank_that_no_longer_answers_ends_the_others_within_the_timeout",
    "output_dir": "test_a_run_writes_where_it_is_told_as_often_as_it_is_told",
    "max_steps": "test_a_run_writes_where_it_is_told_as_often_as_it_is_told",
    "log_every_steps": "test_a_run_writes_where_it_is_told_as_often_as_it_is_told",
    "env_id": "test_the_environment_and_its_arguments_are_those_of_the_command_line",
    "processor_kwargs": "test_processor_kwargs_hold_for_prompts_and_batches_and_the_server_is_told_the_flag",
    **dict.fromkeys(
        ("max_image_pixels", "allowed_local_media_path", "allowed_media_domains"),
        "test_the_settings_of_a_run_are_the_rules_of_its_media",
    ),
    "env_args": "test_the_environment_and_its_arguments_are_those_of_the_command_line",
    "loss_type": "test_each_loss_type_is_another_loss",
    "generation_timeout": "test_a_request_that_takes_too_long_fails_alone_and_is_not_taken_for_a_lost_server",
    "vllm_api_key": "test_the_key_of_a_server_goes_with_every_request_and_is_never_written_down",
    "resume_from_checkpoint": "test_a_resumed_run_goes_on_with_the_same_bits",
    "save_steps": "test_checkpoints_come_every_save_steps_and_the_newest_are_kept",
    "save_total_limit": "test_checkpoints_come_every_save_steps_and_the_newest_are_kept",
    "eval_steps": "test_evaluations_on_the_way_are_in_the_metrics_and_change_no_bit",
    "on_control_tokens": "test_the_command_line_hands_the_setting_to_the_adapter",
    "rollout_timeout": "test_a_rollout_that_takes_too_long_is_left_out_and_named",
    "lora_rank": "test_an_adapter_of_rank_8_learns_a_changed_task_on_a_trained_base",
    "lora_alpha": "test_lora_alpha_is_what_adapters_add_over_the_rank",
    "lora_target_modules": "test_adapters_are_of_the_language_models_linear_layers_or_of_those_that_are_named",
    "merge_adapter": "test_an_old_checkpoint_goes_with_its_merged_model_and_merging_may_change_on_the_way",
    "freeze": "test_frozen_weights_have_no_gradient_no_state_and_no_copy_and_stay_as_they_are",
    "report_steps": "test_the_report_comes_every_report_steps_and_none_is_made_with_no_rollouts",
    "report_rollouts": "test_whole_groups_are_noted_about_as_many_as_asked_for",
    "weight_sync_dir": "test_the_weights_file_is_replaced_whole_under_the_folder_that_is_named",
}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_setting_changes_what_it_says(name):
    """A setting that nothing reads is a lie to the user; so is one that is read and thrown away."""
    value, other, see, *known = EFFECTS[name]
    seen = [see(**{name: value}), see(**{name: other})]
    assert seen[0] != seen[1]
    if known:
        assert seen == known[0]


def test_each_loss_type_is_another_loss():
    seen = {loss_type: see(loss_type=loss_type) for loss_type, see in LOSS_EFFECTS.items()}
    assert len(set(seen.values())) == len(LOSS_TYPES), seen


def test_dr_grpo_divides_by_the_longest_completion_that_could_have_been_sampled():
    norms = []
    for max_tokens in (3, 6):
        made = trainer(loss_type="dr_grpo", mismatch_threshold=1e3)
        batch = replace(made.adapter.build_batch(made.rollouts.collect()), rewards=torch.arange(8.0))
        made.config = replace(made.config, max_tokens=max_tokens)
        norms.append(made.update(batch)["grad_norm"])
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-4)


def test_the_seed_is_also_that_of_sampling_in_this_process():
    servers = [trainer(seed=seed).server for seed in (3, 4)]
    assert [server.seed for server in servers] == [3, 4]


def test_the_progress_bar_tells_the_mismatch_from_the_kl(tmp_path):
    with RunLog(MultimodalRLConfig(output_dir=str(tmp_path / "run"))) as log:
        log.start(trainer(report_rollouts=0, output_dir=log.config.output_dir))
        common = {"reward": 0.25, "mismatch_kl": 1e-3, "zero_spread_fraction": 0.0, "seconds_update": 2.0}
        log.step({"step": 1, "kl": 0.5, **common})
        assert log.progress.postfix == "reward 0.250, mismatch 1e-03, KL 0.500, 2.00 s/step"
        log.step({"step": 2, **common})
        assert log.progress.postfix == "reward 0.250, mismatch 1e-03, 2.00 s/step"


def test_every_setting_has_its_effect_tested():
    settings = {f.name for f in fields(MultimodalRLConfig)}
    assert settings == set(EFFECTS) | set(ELSEWHERE) and not set(EFFECTS) & set(ELSEWHERE)
    files = (
        "test_config.py",
        "test_faults.py",
        "test_lora.py",
        "test_media.py",
        "test_optimizers.py",
        "test_page.py",
        "test_resume.py",
    )
    files += ("test_parallel.py", "test_rows.py", "test_trackers.py", "test_vllm.py")
    written = "".join((HERE / name).read_text() for name in files)
    assert all(f"def {test}(" in written for test in ELSEWHERE.values())
    assert all(f.metadata["help"] for f in fields(MultimodalRLConfig))


def test_a_run_writes_where_it_is_told_as_often_as_it_is_told(tmp_path_factory):
    often, seldom = run(tmp_path_factory, max_steps=3), run(tmp_path_factory, max_steps=4, log_every_steps=2)
    assert lines(often) == 3 and lines(seldom) == 2
    assert sorted(path.name for path in often.iterdir()) == [
        *("checkpoint-3", "config.json", "curves.png", "lock", "metrics.jsonl", "report.html", "rollouts.jsonl")
    ]
    assert json.loads((seldom / "config.json").read_text())["log_every_steps"] == 2


def test_the_environment_and_its_arguments_are_those_of_the_command_line(tmp_path):
    out = ["--output_dir", str(tmp_path / "out")]
    assert "no-such-env" in refusal("--env_id", "no-such-env", *out)
    assert "image_size=3" in refusal("--env_args", '{"image_size": 3}', *out)
    assert "colour" in refusal("--primary_reward_key", "style", *out)  # shapes-env's own metrics


def test_processor_kwargs_hold_for_prompts_and_batches_and_the_server_is_told_the_flag():
    fewer = {"max_pixels": 28 * 28}
    lengths = []
    for options in ({}, fewer):
        _, _, adapter = load_model("qwen", None, MultimodalRLConfig(processor_kwargs=options))
        prompt = adapter.encode_prompt(message(picture(0), "red"))
        lengths.append(adapter.placeholders(prompt.ids).total())
        assert len(prompt.media.tensors["pixel_values"]) == 4 * lengths[-1]
    assert lengths == [4, 1]
    assert processor_flag(adapter) == "--mm-processor-kwargs '{\"max_pixels\": 784}'"
    config, _ = parse_arguments(MultimodalRLConfig, {}, "", ADAPTERS, ["--processor_kwargs", json.dumps(fewer)])
    assert config.processor_kwargs == fewer
