"""Gradient checkpointing: a layer's activations are dropped after its forward and made again in its backward.

Transformers' own switch works in train mode only and drops the cache that the shared prefix goes on from. Here the
model stays in eval mode, where nothing is dropped out, and the cache's layers give the same answer when asked again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: nn.Module, on: bool) -> None:
    """Checkpoint the layers that Transformers would, or no longer.

    Raises:
        ValueError: the model has no layers that Transformers would checkpoint.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if on and not layers:
        name = type(model).__name__
        raise ValueError(f"gradient_checkpointing=True: {name} has no layers to checkpoint; leave it out")
    for layer in layers:
        if is_checkpointed(layer):
            del layer.forward
        if on:
            layer.forward = partial(checkpointed, layer.forward)


def checkpointed(forward: Callable, *args, **kwargs):
    """A layer's forward, to be run again in its backward. It must not write to a cache twice: one that is not
    `repeatable` is kept from it (the plain forward makes one that nobody reads)."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def kept(value: Any) -> Any:
        return None if isinstance(value, Cache) and not hasattr(value, "is_repeatable") else value

    kwargs = {name: kept(value) for name, value in kwargs.items()}
    # no random state to keep: nothing is dropped out in eval mode
    return checkpoint(forward, *map(kept, args), use_reentrant=False, preserve_rng_state=False, **kwargs)


def is_checkpointed(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is checkpointed


def recomputes(model: nn.Module) -> bool:
    """Whether layers run again in their backward."""
    return any(is_checkpointed(module) for module in model.modules())


def repeatable(cache: Cache, rows: Tensor | None = None) -> Cache:
    """This cache, its layers' `update` made to give the same answer when it is asked again. With `rows` it is that of
    these rows, chosen when a layer asks: no two layers' copies of a prompt's keys exist at once."""
    for layer in cache.layers:
        layer.update = partial(update_again, layer, copy.copy(layer), rows)
    cache.is_repeatable = True
    return cache


def update_again(layer, before, rows, *args, **kwargs):
    """What `layer.update` answers when the layer is as it was `before`. A layer that held nothing keeps what it gets,
    a prompt's keys and values; one that held some stays as it is, as nothing reads a completion's."""
    after = copy.copy(before)
    if rows is not None:
        after.reorder_cache(rows)
    answer = type(layer).update(after, *args, **kwargs)
    if not layer.is_initialized:
        vars(layer).update(vars(after))
    return answer
