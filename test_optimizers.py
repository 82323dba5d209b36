"""Tests of the optimizer: what it costs, the rate at each step, weights in bfloat16, a state that goes through a file
with the same bits.

    pytest test_optimizers.py

Runs that are resumed are in test_resume.py.
"""

import contextlib
import io
import itertools
import re
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import get_scheduler

from adapters import ADAPTERS, load_model
from checkpoint import save_checkpoint
from command_line import parse_arguments
from conftest import make_tiny, make_trainer, needs
from mm_grpo import DEMO, MultimodalRLConfig, main
from optimizers import (
    FALLING,
    OPTIMIZERS,
    SCHEDULES,
    bytes_per_parameter,
    clip_and_step,
    learning_rates,
    load_state_tensors,
    make_optimizer,
    masters_of,
    parameters_of,
    state_tensors,
)

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16")
EACH = [pytest.param(name, marks=needs("bitsandbytes") if name == "adamw_8bit" else ()) for name in OPTIMIZERS]
ENV = {"num_train_examples": 6, "num_eval_examples": 4}
SMALL = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, eval_examples=0, learning_rate=1e-3)


def fitted(optim: str, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32, **settings):
    """(two linear layers, their optimizer, a function that makes one more step) after fitting a random map."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64)).to(dtype)  # 8,192 and 4,096 weights; biases of 64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 10)
    inputs, targets = (torch.randn(256, width, generator=draw).to(dtype) for width in (128, 64))
    optimizer = make_optimizer(model.parameters(), MultimodalRLConfig(optim=optim, learning_rate=1e-2, **settings))

    def step():
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


# ---------------------------------------------------------------- what it costs


def readme_table() -> dict[tuple[str, str], list[float]]:
    """Bytes a parameter by docs/gpus.md: (optimizer, type) -> weights, gradients, state, in all, with a reference."""
    rows = re.findall(r"^\| `(adamw\w+)`[^|]*\| `(\w+)` \|(.*)\|$", (HERE / "docs/gpus.md").read_text(), flags=re.M)
    rows += re.findall(r"^\| (frozen)[^|]*\| `(\w+)` \|(.*)\|$", (HERE / "docs/gpus.md").read_text(), flags=re.M)
    return {(optim, dtype): [float(cell) for cell in cells.split("|")] for optim, dtype, cells in rows}


def test_the_readme_says_what_each_setting_costs_a_parameter():
    expected = {}
    for optim, dtype in itertools.product((*OPTIMIZERS, "frozen"), DTYPES):
        config = MultimodalRLConfig(param_dtype=dtype, optim="adamw_torch" if optim == "frozen" else optim)
        plain, with_reference = (
            bytes_per_parameter(each, trained=optim != "frozen") for each in (config, replace(config, beta=0.1))
        )
        costs = (plain["weights"], plain["gradients"], plain["optimizer"], plain["whole"], with_reference["whole"])
        expected[optim, dtype] = [round(cost, 2) for cost in costs]
    assert readme_table() == expected


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optim", EACH)
def test_a_setting_costs_a_parameter_the_bytes_that_are_said(optim, dtype, beta):
    """Every large tensor of a model, its vision tower frozen, weighed in a step of the trainer."""
    model, adapter = make_tiny("qwen")
    model.model.visual.requires_grad_(False)
    settings, costs = {**SMALL, "optim": optim, "param_dtype": dtype, "beta": beta}, {}
    trainer = make_trainer(tiny=(model, adapter), env=ENV, **settings)
    for name, parameter in model.named_parameters():
        costs[name] = Counter(weights=parameter.nbytes)
        if parameter.requires_grad:
            note = lambda weight, name=name: costs[name].update(gradients=weight.grad.nbytes - costs[name]["gradients"])
            parameter.register_post_accumulate_grad_hook(note)
    trainer.step()
    masters = dict(masters_of(trainer.optimizer))
    for name, parameter in model.named_parameters():
        stepped = masters.get(parameter, parameter)
        state = trainer.optimizer.state.get(stepped, {}) | ({"master": stepped} if parameter in masters else {})
        costs[name]["optimizer"] = sum(value.nbytes for key, value in state.items() if not re.match("step|qmap", key))
        reference = dict(trainer.ref_policy.model.named_parameters())[name] if beta else parameter
        reference = 0 if reference is parameter else reference.nbytes
        costs[name].update(reference=reference, whole=costs[name].total() + reference)
    large = {name: p for name, p in model.named_parameters() if p.numel() >= 4096}
    assert {p.requires_grad for p in large.values()} == {True, False} and len(large) > 10
    for name, parameter in large.items():
        said = bytes_per_parameter(trainer.config, parameter.requires_grad)
        found = {each: costs[name][each] / parameter.numel() for each in said}
        assert found == pytest.approx(said, abs=0.005), name


@pytest.mark.parametrize("optim", EACH)
def test_moments_of_small_tensors_are_in_float32_whatever_the_optimizer(optim):
    model, optimizer, _ = fitted(optim, steps=1)
    state = optimizer.state[model[0].bias]
    assert sum(value.nbytes for name, value in state.items() if not re.match("step|qmap", name)) == 8 * 64


@needs("bitsandbytes")
def test_the_tables_of_the_8_bit_optimizer_are_there_once_for_all_parameters():
    """What the bytes mean, 2 KB: of every tensor for itself they would cost a small one more than its state."""
    parameters = [nn.Parameter(torch.ones(4096)) for _ in range(3)]
    optimizer = make_optimizer(parameters, MultimodalRLConfig(optim="adamw_8bit"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = {(name, optimizer.state[p][name].data_ptr()) for p in parameters for name in ("qmap1", "qmap2")}
    assert len(tables) == 2


# ---------------------------------------------------------------- which optimizer it is


@needs("bitsandbytes")
def test_8_bits_lead_where_32_do():
    """Dettmers et al.'s claim, on 30 steps: the weights go the same way, within a few percent of its length."""
    start, full, small = (
        torch.cat([p.detach().flatten() for p in fitted(optim, steps)[0].parameters()])
        for optim, steps in (("adamw_torch", 0), ("adamw_torch", 30), ("adamw_8bit", 30))
    )
    way, apart = (full - start).norm(), (full - small).norm()
    assert 0 < apart <= 0.05 * way  # 0.03: moments in bytes are off by percents, an update by as much of its length


@pytest.mark.parametrize("optim", EACH)
def test_rate_and_decay_are_those_of_the_config_and_frozen_parameters_are_left_out(optim):
    decayed, frozen = nn.Parameter(torch.ones(4096)), nn.Parameter(torch.ones(4096), requires_grad=False)
    config = MultimodalRLConfig(optim=optim, learning_rate=0.25, weight_decay=0.5)
    optimizer = make_optimizer([decayed, frozen], config)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 1 and group["params"][0] is decayed
    decayed.grad = torch.full_like(decayed, 3.0)
    optimizer.step()
    # decay of 0.5 * 0.25, then a first step as long as the rate, whatever the gradient's size
    assert torch.allclose(decayed, torch.full_like(decayed, 1 - 0.125 - 0.25), atol=1e-5)


def test_a_missing_package_is_one_line_with_the_field_and_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    command = ["--adapter", "qwen", "--optim", "adamw_8bit", "--max_steps", "0", "--eval_examples", "0"]
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(io.StringIO()) as screen:
        main([*command, "--output_dir", str(tmp_path / "out")])
    said = "mm_grpo.py: error: optim='adamw_8bit': needs a package: pip install bitsandbytes==0.50.2"
    assert end.value.code == 2 and screen.getvalue().splitlines()[-1] == said


# ---------------------------------------------------------------- the rate at each step


# a constant rate takes no warm-up: see test_config.py
@pytest.mark.parametrize(("schedule", "warmup_steps"), [("constant", 0), *itertools.product(SCHEDULES[1:], (0, 3))])
def test_the_rate_at_each_step_is_that_of_transformers_own_scheduler(schedule, warmup_steps):
    settings = dict(lr_scheduler_type=schedule, warmup_steps=warmup_steps, max_steps=10, learning_rate=0.7)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.7)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=10)
    theirs = []
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rate = learning_rates(MultimodalRLConfig(**settings))
    assert [rate(step) for step in range(10)] == theirs
    assert [rate(step) for step in (7, 2)] == [theirs[7], theirs[2]]  # of the step alone, in whatever order
    assert (schedule in FALLING) == (theirs[9] < 0.7) and (warmup_steps > 0) == (theirs[0] == 0)


def test_all_updates_of_a_step_have_its_rate_and_the_metrics_say_it():
    settings = dict(lr_scheduler_type="linear", warmup_steps=1, max_steps=4, updates_per_batch=2)
    trainer = make_trainer(env=ENV, **{**SMALL, **settings})
    used, weight = [], next(trainer.model.parameters())
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    before = weight.detach().clone()
    said = [trainer.step()["learning_rate"]]
    assert torch.equal(weight, before)  # with warm-up the first step's rate is 0, as in Transformers
    said += [trainer.step()["learning_rate"] for _ in range(3)]
    assert not torch.equal(weight, before) and torch.isfinite(weight).all()
    assert said == pytest.approx([0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert used == [rate for rate in said for _ in range(2)]


def test_the_demonstrations_rate_falls_from_its_largest_in_a_straight_line():
    config, _ = parse_arguments(MultimodalRLConfig, DEMO, "", ADAPTERS, ["--adapter", "qwen"])
    rate = learning_rates(config)
    assert config.max_steps == 280 and config.optim == "adamw_torch"
    assert [rate(step) for step in (0, 140, 279)] == pytest.approx([1.2e-3, 6e-4, 1.2e-3 / 280])


# ---------------------------------------------------------------- weights in bfloat16


def in_bfloat16(family: str = "qwen", **settings):
    return make_trainer(family, env=ENV, **{**SMALL, "param_dtype": "bfloat16", **settings})


def test_param_dtype_is_that_of_the_weights_which_are_loaded(tmp_path):
    """Of a tiny model and of a checkpoint, which is saved in it again. Frequencies of positions stay float32: in
    bfloat16 the positions of long prompts would be rounded."""
    low, full = MultimodalRLConfig(param_dtype="bfloat16"), MultimodalRLConfig()
    (tiny, tokenizer, adapter), (exact, *_) = load_model("qwen", None, low), load_model("qwen", None, full)
    save_checkpoint(tmp_path / "saved", tiny, adapter, tokenizer)
    for config, dtype in ((low, torch.bfloat16), (full, torch.float32)):
        model, _, _ = load_model("auto", str(tmp_path / "saved"), config)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {b.dtype for b in (*model.buffers(), *tiny.buffers())} == {torch.float32}
        for (name, p), mine, theirs in zip(
            model.named_parameters(), tiny.parameters(), exact.parameters(), strict=True
        ):
            assert mine.dtype == torch.bfloat16 and torch.equal(p.bfloat16(), mine), name
            assert torch.equal(mine, theirs.bfloat16()), name
    assert '"dtype": "bfloat16"' in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("optim", EACH)
def test_steps_too_small_for_bfloat16_add_up_in_the_master(optim):
    """A step of 1e-6 at 0.02, where bfloat16 numbers are 1.2e-4 apart: without a master it is lost, each time."""
    weight, alone, exact = (nn.Parameter(torch.full((4096,), 0.02, dtype=torch.bfloat16)) for _ in range(3))
    exact = nn.Parameter(exact.detach().float())
    config = MultimodalRLConfig(optim=optim, learning_rate=1e-6)
    optimizer, of_exact = make_optimizer([weight], config), make_optimizer([exact], config)
    of_alone = torch.optim.AdamW([alone], lr=1e-6, weight_decay=0.0)
    start, moved = weight.detach().clone(), []
    for _ in range(200):
        for parameter in (weight, alone, exact):
            parameter.grad = torch.ones_like(parameter)
        for each in (optimizer, of_alone, of_exact):
            each.step()
        moved.append(not torch.equal(weight, start))
    assert torch.equal(alone, start) and not moved[0]
    assert moved[-1] and torch.equal(weight, exact.bfloat16())
    assert torch.equal(masters_of(optimizer)[0][1], exact) and (exact < start.float() - 1.9e-4).all()


def test_only_weights_in_bfloat16_that_are_trained_have_a_master():
    """Adapters in float32 over a base in bfloat16 are stepped themselves."""
    low, full = nn.Parameter(torch.ones(8, dtype=torch.bfloat16)), nn.Parameter(torch.ones(8))
    frozen = nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
    optimizer = make_optimizer([full, frozen, low], MultimodalRLConfig(learning_rate=0.25))
    ((weight, master),) = masters_of(optimizer)
    assert weight is low and master.dtype == torch.float32
    for parameter in (low, full):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(full, torch.full((8,), 0.75)) and torch.equal(low, full.bfloat16()) and (frozen == 1).all()
    assert not masters_of(make_optimizer([full], MultimodalRLConfig()))


def test_the_gradient_is_measured_and_cut_in_float32():
    """A norm of bfloat16 would be 16.0: its next number is 16.125."""
    low, full = nn.Parameter(torch.zeros(256, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([low, full], MultimodalRLConfig(learning_rate=1.0))
    low.grad, full.grad, seen = torch.ones_like(low), torch.ones_like(full), []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in parameters_of(optimizer)))
    assert clip_and_step(optimizer, max_norm=0.3) == pytest.approx(257**0.5, rel=1e-6)
    master, other, of_weight = seen
    assert of_weight is None and torch.allclose(master, torch.full((256,), 0.3 / 257**0.5), rtol=1e-5)
    assert torch.equal(other, master[:1]) and low.grad is None and all(p.grad is None for p in parameters_of(optimizer))


def test_a_gradient_that_is_dropped_or_not_finite_moves_no_weight_in_bfloat16():
    low = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = make_optimizer([low], MultimodalRLConfig(learning_rate=0.25))
    low.grad = torch.ones_like(low)
    optimizer.zero_grad()
    optimizer.step()
    assert low.grad is None and (low == 1).all()
    low.grad = torch.full_like(low, torch.inf)
    with pytest.warns(UserWarning, match="this update is skipped"):
        clip_and_step(optimizer, max_norm=1.0)
    optimizer.step()
    assert low.grad is None and (low == 1).all() and (masters_of(optimizer)[0][1] == 1).all()


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_weights_in_bfloat16_train_on_policy_from_the_server_to_the_reference(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a prompt that is not shared, a mismatch, ... would be one
        trainer = in_bfloat16(family, beta=0.1, updates_per_batch=2, max_tokens=8, on_mismatch="error")
        start = [p.detach().clone() for p in trainer.model.parameters()]
        steps = [trainer.step() for _ in range(3)]
    for metrics in steps:
        assert metrics["logprob_difference"] < 0.02 and 0.9 < metrics["ratio_min"] <= metrics["ratio_max"] < 1.1
        assert metrics["last_update/kl"] > 0 and metrics["shared_prefix_fraction"] == 1
    assert trainer.server.dtype == torch.bfloat16 and trainer.policy.head_is_last
    assert all(map(torch.equal, trainer.ref_policy.parameters(), start))
    for weight, master in masters_of(trainer.optimizer):
        assert torch.equal(weight, master.bfloat16())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert not torch.equal(trainer.model.lm_head.weight, trainer.ref_policy.model.lm_head.weight)


def test_gradients_of_bfloat16_weights_are_as_good_as_those_of_autocast():
    """Micro-batches add up their gradients in bfloat16, a row each here; judged by what plain autocast is off by."""
    source = make_trainer(env=ENV, **{**SMALL, "max_tokens": 8, "rollouts_per_step": 24})
    batch = source.adapter.build_batch(source.rollouts.collect())
    batch = replace(batch, rewards=torch.randn(24, generator=torch.Generator().manual_seed(0)))

    def gradient(dtype: str, **settings) -> torch.Tensor:
        trainer = in_bfloat16(
            param_dtype=dtype, micro_batch_tokens=1, mismatch_threshold=1e3, max_grad_norm=1e9, **settings
        )
        seen = []
        trainer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.extend(p.grad.flatten() for p in stepped(trainer) if p.grad is not None)
        )
        trainer.update(batch)
        return torch.cat(seen)

    def stepped(trainer) -> list[nn.Parameter]:
        masters = dict(masters_of(trainer.optimizer))
        return [masters.get(p, p) for p in trainer.model.parameters()]

    exact = gradient("float32")
    of_weights, of_autocast = (
        (each - exact).norm() / exact.norm() for each in (gradient("bfloat16"), gradient("float32", bf16=True))
    )
    assert 0 < of_weights <= 2 * of_autocast


def test_the_threshold_is_that_of_the_coarser_side():
    """A vLLM server in float32 beside a trainer in bfloat16 is no mismatch."""
    trainer = in_bfloat16()
    trainer.server.dtype = torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.rollouts.check_on_policy(0.05, lambda: None)
    with pytest.warns(UserWarning, match="mismatch_threshold=0.1"):
        trainer.rollouts.check_on_policy(0.2, lambda: None)
    trainer = make_trainer(env=ENV, **SMALL)
    with pytest.warns(UserWarning, match="mismatch_threshold=0.001"):
        trainer.rollouts.check_on_policy(0.05, lambda: None)


# ---------------------------------------------------------------- its state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", EACH)
def test_a_state_goes_through_a_file_and_on_with_the_same_bits(optim, dtype):
    """Several tensors of 8 bits share their tables: safetensors refuses to store memory twice. Of bfloat16 weights it
    is the masters that count: what they have beyond the weights would be lost."""
    model, optimizer, step = fitted(optim, steps=7, dtype=dtype)
    stored = save(state_tensors(optimizer))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step()
    other, fresh, step_of_other = fitted(optim, steps=0, seed=0, dtype=dtype)
    other.load_state_dict(weights)
    load_state_tensors(fresh, load(stored))
    assert save(state_tensors(fresh)) == stored
    step_of_other()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert save(state_tensors(fresh)) == save(state_tensors(optimizer))


@pytest.mark.parametrize("optim", EACH)
def test_a_loaded_state_leaves_the_settings_as_they_are(optim):
    _, optimizer, _ = fitted(optim, steps=1)
    _, other, _ = fitted(optim, steps=0, weight_decay=0.25)
    load_state_tensors(other, state_tensors(optimizer))
    assert other.param_groups[0]["weight_decay"] == 0.25
