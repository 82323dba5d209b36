"""The optimizer: AdamW with its state in 32 or in 8 bits, its learning rate at each step, its state for checkpoints.

Names are Hugging Face's. torchao's 8-bit AdamW is not offered: its state is made of tensor subclasses, which
safetensors cannot store as they are.

A weight in bfloat16 has a master, a copy in float32: the optimizer steps the master and rounds it into the weight
(https://arxiv.org/abs/1710.03740). A bfloat16 number has 8 bits, so a step of 1e-6 on a weight of 0.02 would be lost.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel import on_first, placed, total_norm

OPTIMIZERS = ("adamw_torch", "adamw_8bit")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
FALLING = ("linear", "cosine")  # to zero, at max_steps: with another max_steps every step has another rate


def bytes_per_parameter(config: Any, trained: bool = True) -> dict[str, float]:
    """What a parameter costs in memory, in bytes, in tensors of 4,096 elements or more; activations come on top.

    At the step itself the gradient of a bfloat16 weight is in float32, 2 bytes more: the activations are gone by then.

    Args:
        config: its optim, param_dtype and beta are read.
        trained: False: of a frozen parameter, LoRA's base for one; the reference policy is that itself.

    Returns:
        By what takes it: weights, gradients, optimizer (its state, a master included), reference (policy), whole.
    """
    weights = 4 if config.param_dtype == "float32" else 2
    moments = 8 if config.optim == "adamw_torch" else 2 * (1 + 4 / 256)  # a byte and, for 256 of them, a float32 scale
    master = 0 if config.param_dtype == "float32" else 4
    costs = {"weights": weights, "gradients": trained * weights, "optimizer": trained * (moments + master)}
    costs["reference"] = trained * weights if config.beta > 0 else 0
    return {**costs, "whole": sum(costs.values())}


def make_optimizer(parameters: Iterable[nn.Parameter], config: Any) -> Optimizer:
    """AdamW over the parameters that need a gradient, as `optim` says; in place of bfloat16 ones over their masters.

    adamw_torch: PyTorch's; both moments in the type of what it steps. adamw_8bit: bitsandbytes', a byte for each moment
    and a scale for each 256 (https://arxiv.org/abs/2110.02861), in every tensor of 4,096 elements or more, embeddings
    too, which Transformers' Trainer leaves in 32 bits; float32 in smaller ones.

    What is stepped is one group. Where there are masters it begins with them, and their weights are a second group, in
    the same order: it is never stepped, its gradients go to the masters and are dropped with theirs. A weight that is
    changed by other hands than the optimizer's is its master again after the next step.

    Args:
        config: its optim, learning_rate and weight_decay are read.

    Raises:
        ValueError: bitsandbytes is asked for and not installed.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.shard and config.optim != "adamw_torch":
        raise ValueError(f"optim={config.optim!r}: its state cannot be cut into shards; with shard take 'adamw_torch'")
    weights = [parameter for parameter in trained if parameter.dtype == torch.bfloat16]
    stepped = [nn.Parameter(weight.detach().float()) for weight in weights]
    stepped += [parameter for parameter in trained if parameter.dtype != torch.bfloat16]
    kind = torch.optim.AdamW
    if config.optim == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ModuleNotFoundError:
            raise ValueError(f"optim={config.optim!r}: needs a package: pip install bitsandbytes==0.50.2") from None
    groups = [{"params": stepped}, {"params": weights}] if weights else stepped
    optimizer = kind(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    if weights:
        optimizer.register_step_pre_hook(lambda *_: take_gradients(optimizer))
        optimizer.register_step_post_hook(lambda *_: round_masters(optimizer))
    return optimizer


def masters_of(optimizer: Optimizer) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(weight, master) of each weight in bfloat16, see `make_optimizer`."""
    stepped, *weights = (group["params"] for group in optimizer.param_groups)
    return list(zip(weights[0], stepped)) if weights else []


def take_gradients(optimizer: Optimizer) -> None:
    """Give the gradients of bfloat16 weights to their masters, in float32."""
    for weight, master in masters_of(optimizer):
        if weight.grad is not None:
            master.grad, weight.grad = weight.grad.float(), None


@torch.no_grad()
def round_masters(optimizer: Optimizer) -> None:
    """Set bfloat16 weights to what their masters are."""
    for weight, master in masters_of(optimizer):
        weight.copy_(master)


def learning_rates(config: Any) -> Callable[[int], float]:
    """The learning rate at each step, a function of the step alone: a resumed run has nothing to restore.

    It is that of Transformers' `get_scheduler`. Steps count from 0, so with warm-up the first step's rate is 0, as it
    is there: that step moves no weight, AdamW's moments take its gradients in all the same.

    Args:
        config: its learning_rate, lr_scheduler_type, warmup_steps and max_steps are read.
    """
    from transformers import get_scheduler  # here: with it come peft and bitsandbytes, where they are installed

    unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.learning_rate)  # get_scheduler wants one
    schedule = get_scheduler(config.lr_scheduler_type, unused, config.warmup_steps, config.max_steps)
    (share,) = schedule.lr_lambdas
    return lambda step: config.learning_rate * share(step)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_and_step(optimizer: Optimizer, max_norm: float) -> float:
    """Scale the gradient down to this norm, step, forget it. One that is not finite changes nothing, with a warning.

    Returns:
        The gradient's norm as it came.
    """
    take_gradients(optimizer)  # first: a norm in bfloat16 would have 8 bits, and so would what is scaled by it
    gradients = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    norm = total_norm(gradients)
    scale, norm = (max_norm / (norm + 1e-6)).clamp(max=1.0).item(), norm.item()
    if math.isfinite(norm):
        for gradient in gradients:
            gradient.mul_(scale)
        optimizer.step()
    else:
        warnings.warn(f"grad_norm={norm}: this update is skipped, the weights stay as they are")
    optimizer.zero_grad(set_to_none=True)
    return norm


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors, none sharing memory: `3.exp_avg` is of parameter 3, `3.master` is itself one. A
    plain int (bitsandbytes' step) is a scalar of int64. Every rank must ask; the first one gets it."""
    tensors = {f"{i}.master": on_first(master.detach()) for i, (_, master) in enumerate(masters_of(optimizer))}
    stored: set[int] = set()
    for i, parameter in enumerate(parameters_of(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            tensor = on_first(torch.as_tensor(value))
            if tensor is None:
                continue
            # all parameters look the meaning of a byte up in the same two tables of bitsandbytes'
            tensors[f"{i}.{name}"] = tensor.clone() if tensor.data_ptr() in stored else tensor
            stored.add(tensor.data_ptr())
    return tensors


def load_state_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer of the same kind and parameters the state that `state_tensors` took. Settings stay its own."""
    parameters, states = parameters_of(optimizer), {}
    for i, (_, master) in enumerate(masters_of(optimizer)):
        master.detach().copy_(placed(tensors[f"{i}.master"], master))
    for name, tensor in tensors.items():
        number, _, field = name.partition(".")
        if field == "master":
            continue
        plain = tensor.ndim == 0 and tensor.dtype == torch.int64
        states.setdefault(int(number), {})[field] = tensor.item() if plain else placed(tensor, parameters[int(number)])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
