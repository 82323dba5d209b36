"""Tests of the optimizer: what it costs, the rate at each step, a state that goes through a file with the same bits.

    pytest test_optimizers.py

Runs that are resumed are in test_resume.py.
"""

import contextlib
import io
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import get_scheduler

from adapters import ADAPTERS
from command_line import parse_arguments
from conftest import make_trainer, needs
from mm_grpo import DEMO, MultimodalRLConfig, main
from optimizers import FALLING, OPTIMIZERS, SCHEDULES, learning_rates, load_state_tensors, make_optimizer, state_tensors

HERE = Path(__file__).parent
EACH = [pytest.param(name, marks=needs("bitsandbytes") if name == "adamw_8bit" else ()) for name in OPTIMIZERS]
ENV = {"num_train_examples": 6, "num_eval_examples": 4}
SMALL = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, eval_examples=0, learning_rate=1e-3)


def fitted(optim: str, steps: int, seed: int = 0, **settings):
    """(two linear layers, their optimizer, a function that makes one more step) after fitting a random map."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64))  # 8,192 and 4,096 weights; biases of 64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 10)
    inputs, targets = torch.randn(256, 128, generator=draw), torch.randn(256, 64, generator=draw)
    optimizer = make_optimizer(model.parameters(), MultimodalRLConfig(optim=optim, learning_rate=1e-2, **settings))

    def step():
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


# ---------------------------------------------------------------- what it costs


def readme_row(optim: str) -> list[float]:
    """Bytes a parameter by the README: weights, gradients, state, in all."""
    (row,) = re.findall(rf"^\| `{optim}`[^|]*\|(.*)\|$", (HERE / "README.md").read_text(), flags=re.MULTILINE)
    return [float(cell) for cell in row.split("|")]


@pytest.mark.parametrize("optim", EACH)
def test_an_optimizer_costs_a_parameter_the_bytes_that_the_readme_says(optim):
    model, optimizer, _ = fitted(optim, steps=1)

    def bytes_a_parameter(parameter):
        state = [value for name, value in optimizer.state[parameter].items() if not re.match("step|qmap", name)]
        return sum(tensor.nbytes for tensor in state) / parameter.numel()

    expected = {"adamw_torch": 8, "adamw_8bit": 2 + 2 * 4 / 256}[optim]  # a byte and, for 256 of them, a float32 scale
    first, second = model
    assert bytes_a_parameter(first.weight) == bytes_a_parameter(second.weight) == expected
    assert bytes_a_parameter(first.bias) == 8  # fewer than 4,096 elements
    weights, gradients, state, whole = readme_row(optim)
    assert weights == first.weight.element_size() and gradients == first.weight.grad.element_size()
    assert state == round(expected, 2) and whole == pytest.approx(weights + gradients + state)


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


# ---------------------------------------------------------------- its state


@pytest.mark.parametrize("optim", EACH)
def test_a_state_goes_through_a_file_and_on_with_the_same_bits(optim):
    """Several tensors of 8 bits share their tables: safetensors refuses to store memory twice."""
    model, optimizer, step = fitted(optim, steps=7)
    stored = save(state_tensors(optimizer))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step()
    other, fresh, step_of_other = fitted(optim, steps=0, seed=0)
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
