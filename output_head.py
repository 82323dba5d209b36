"""The output head, run on a few tokens at a time where that is exact: logits are the peak of an update's memory.

With 152k tokens in the vocabulary, a token's logits, their softmax and their gradient take 0.6 MB each.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel import agreed

if TYPE_CHECKING:
    from mm_grpo import MultimodalBatch, Policy

CHUNK_TOKENS = 512  # tokens whose logits exist at once
COMPARED_TOKENS = 16  # at the end of a prompt, whose logits are made in both ways


def in_chunks(function: Callable, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`function(hidden, targets)`, CHUNK_TOKENS tokens at a time.

    What a chunk makes is dropped after its forward and made again in its backward, so that the peak does not grow with
    the batch.

    Args:
        function: ((n, H), (n,)) -> two tensors (n,).
        hidden: (..., H). targets: (...).

    Returns:
        Two tensors (...).
    """
    chunks = list(zip(hidden.flatten(0, -2).split(CHUNK_TOKENS), targets.flatten().split(CHUNK_TOKENS)))
    run = function if len(chunks) == 1 else partial(checkpoint, function, use_reentrant=False)
    one, other = zip(*(run(*chunk) for chunk in chunks))
    return torch.cat(one).view(targets.shape), torch.cat(other).view(targets.shape)


def head_is_last(model: nn.Module, batch: MultimodalBatch) -> bool:
    """Whether the model's logits are head(body(x)) and nothing else, tried on the batch's first row.

    A model that does more (scales the hidden states, caps the logits, cuts some off) keeps its own forward, with a
    warning: all logits of a micro-batch then exist at once. So does a model that names no body or no head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", model)
    if head is None or body is model:
        return False
    inputs, n = batch.select([0]).model_inputs(), COMPARED_TOKENS
    keep = {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad(), torch.autocast(batch.input_ids.device.type, enabled=False):
        logits = model(**inputs, **keep).logits[:, -n:].float()  # (1, n, V)
        ours = head(body(**inputs)[0][:, -n:]).float()
    difference = (ours - logits).abs().max() / logits.abs().max() if ours.shape == logits.shape else math.inf
    if difference <= 1e-5:  # the same operations on the same numbers
        return True
    warnings.warn(
        f"{type(model).__name__}: its logits are not its output head's alone (off by {difference:.1e}), so its own "
        "forward is used, and all logits of a micro-batch exist at once: if memory ends, lower micro_batch_tokens"
    )
    return False


def look_at_head(policy: Policy, batch: MultimodalBatch) -> None:
    """Find out whether the policy's head is last, where that is not known yet; ranks of a sharded one together."""
    if policy.head_is_last is None:
        policy.head_is_last = agreed(policy, head_is_last(policy.model, batch))
