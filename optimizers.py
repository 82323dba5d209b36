"""The optimizer: AdamW with its state in 32 or in 8 bits, its learning rate at each step, its state for checkpoints.

Names are Hugging Face's. What each optimizer costs a parameter is in the README. torchao's 8-bit AdamW is not offered:
its state is made of tensor subclasses, which safetensors cannot store as they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import get_scheduler

from parallel import on_first, placed, total_norm

OPTIMIZERS = ("adamw_torch", "adamw_8bit")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
FALLING = ("linear", "cosine")  # to zero, at max_steps: with another max_steps every step has another rate


def make_optimizer(parameters: Iterable[nn.Parameter], config: Any) -> Optimizer:
    """AdamW over the parameters that need a gradient, in one group, as `optim` says.

    adamw_torch: PyTorch's; both moments in the parameters' own type. adamw_8bit: bitsandbytes', a byte for each moment
    and a scale for each 256 (https://arxiv.org/abs/2110.02861), in every tensor of 4,096 elements or more, embeddings
    too, which Transformers' Trainer leaves in 32 bits; float32 in smaller ones.

    Args:
        config: its optim, learning_rate and weight_decay are read.

    Raises:
        ValueError: bitsandbytes is asked for and not installed.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.shard and config.optim != "adamw_torch":
        raise ValueError(f"optim={config.optim!r}: its state cannot be cut into shards; with shard take 'adamw_torch'")
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(trained, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError:
        raise ValueError(f"optim={config.optim!r}: needs a package: pip install bitsandbytes==0.50.2") from None
    return AdamW8bit(trained, **settings)


def learning_rates(config: Any) -> Callable[[int], float]:
    """The learning rate at each step, a function of the step alone: a resumed run has nothing to restore.

    It is that of Transformers' `get_scheduler`. Steps count from 0, so with warm-up the first step's rate is 0, as it
    is there: that step moves no weight, AdamW's moments take its gradients in all the same.

    Args:
        config: its learning_rate, lr_scheduler_type, warmup_steps and max_steps are read.
    """
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
    """The optimizer's state as tensors, none sharing memory: `3.exp_avg` is of parameter 3. Every rank must ask, the
    first one gets it. A plain int (bitsandbytes'
    step) is a scalar of int64."""
    tensors: dict[str, Tensor] = {}
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
    for name, tensor in tensors.items():
        number, _, field = name.partition(".")
        plain = tensor.ndim == 0 and tensor.dtype == torch.int64
        states.setdefault(int(number), {})[field] = tensor.item() if plain else placed(tensor, parameters[int(number)])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
