"""Score a group at the cost of its distinct tokens.

The G completions of a prompt share the prompt and its images. The plain forward runs G * (P + C) tokens and encodes the
images G times; here the prompt is run once, gradients on, and the completions against its key-value cache: P + G * C
tokens and one encoding, with the same logprobs and the same gradients. `benchmark.py` measures it.

Dimensions: K distinct prompts of at most P tokens, B rows of at most C tokens after their prompt, L sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationMixin

from inference import prefill

if TYPE_CHECKING:
    from mm_grpo import MultimodalBatch


@dataclass
class SharedPrefixes:
    """The distinct prompts of a batch of B rows."""

    prompts: MultimodalBatch  # K rows, padded on the left
    owner: Tensor  # (B,) the prompt of each row
    lengths: Tensor  # (B,) its length


def score_shared(
    model, batch: MultimodalBatch, prefixes: SharedPrefixes, score_tokens: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """`score` at the cost of the distinct tokens: K prompts once, then B completions against their key-value cache.

    Attention is causal: a prompt's keys and values do not depend on what follows it, and a completion sees nothing of its
    prompt but those. So running the prompt once and copying its cache to the group's completions is the plain forward with
    its repetitions left out. Backwards, the copy adds up the group's gradients by itself.

    Args:
        model: called as in `mm_grpo.score`; what it gives as logits is handed to `score_tokens` with the target ids.

    Returns:
        What `score_tokens` says of each trained token, in the columns of the plain forward: (B, T) each, 0 elsewhere.
    """
    B, L = batch.input_ids.shape
    ends = batch.attention_mask.sum(-1)
    C = int((ends - prefixes.lengths).max())  # longest completion
    columns = prefixes.lengths[:, None] + torch.arange(C, device=ends.device)  # (B, C) where in the batch they stand
    inside = (columns < ends[:, None]).long()
    completions = batch.input_ids.gather(1, columns.clamp(max=L - 1))  # (B, C)

    first, cache, mask, positions = prefill(model, prefixes.prompts.model_inputs(), prefixes.owner)
    hidden = first[:, None]  # (B, 1, H): a prompt's last token predicts each completion's first
    if C > 1:
        rest = model(
            input_ids=completions[:, :-1],
            attention_mask=torch.cat([mask, inside[:, :-1]], dim=1),
            position_ids=positions + torch.arange(C - 1, device=ends.device),
            past_key_values=cache,
            use_cache=True,
        )
        hidden = torch.cat([hidden, rest.logits], dim=1)  # (B, C, H)
    trained = batch.loss_mask[:, 1:] != 0  # (B, T)
    at = (torch.arange(1, L, device=ends.device) - prefixes.lengths[:, None])[trained]  # column of a trained token in C
    row = torch.arange(B, device=ends.device)[:, None].expand(B, L - 1)[trained]
    scored = score_tokens(hidden[row, at], completions[row, at])
    logprobs, entropies = (values.new_zeros(B, L - 1).masked_scatter(trained, values) for values in scored)
    return logprobs, entropies


def shared_prefixes(model, batch: MultimodalBatch, placeholder_ids: Sequence[int]) -> SharedPrefixes | None:
    """The distinct prompts of a batch, if each row is a prompt with all its media followed by the rest.

    A row's prompt is what stands before its first trained token. Two rows share it when ids, media spans and per-token
    inputs are equal.

    Returns:
        None where the plain forward has to do it: rows that share nothing, are not padded on the right or have nothing
        trained; media stored by row; media or per-token inputs beyond the prompt; a model without a key-value cache, or
        one that drops it (activation checkpointing).
    """
    if not isinstance(model, GenerationMixin) or (model.training and model.is_activation_checkpointing):
        return None
    B, L = batch.input_ids.shape
    ends = batch.attention_mask.sum(-1)
    column = torch.arange(L, device=ends.device)
    if not torch.equal(batch.attention_mask != 0, column < ends[:, None]):
        return None
    trained = batch.loss_mask != 0
    if not trained.any(-1).all():
        return None
    lengths = trained.int().argmax(-1)  # (B,) where the first trained token stands
    per_row = {name: tensor for name, tensor in batch.media.items() if name not in batch.media_spans}
    if any(tensor.shape != (B, L) for tensor in per_row.values()):
        return None
    media = torch.isin(batch.input_ids, torch.tensor(list(placeholder_ids), dtype=torch.long, device=ends.device))
    for tensor in per_row.values():
        media = media | (tensor != 0)
    if (media & (column >= lengths[:, None])).any():
        return None
    number: dict[tuple, int] = {}
    rows: list[int] = []  # a row of each distinct prompt
    owner = []
    for i, (ids, length) in enumerate(zip(batch.input_ids.tolist(), lengths.tolist())):
        key = (
            tuple(ids[:length]),
            *(tuple(spans[i].tolist()) for spans in batch.media_spans.values()),
            *(tuple(tensor[i, :length].tolist()) for tensor in per_row.values()),
        )
        if key not in number:
            number[key] = len(rows)
            rows.append(i)
        owner.append(number[key])
    if len(rows) == B:
        return None
    prompts = batch.select(rows)
    P = int(lengths[rows].max())
    shift = column[:P] - (P - lengths[rows])[:, None]  # (K, P) the column that comes to stand here; negative: padding
    left = {"input_ids": prompts.input_ids} | {name: prompts.media[name] for name in per_row}
    left = {name: t.gather(1, shift.clamp(min=0)) * (shift >= 0) for name, t in left.items()}
    ids = left.pop("input_ids")
    zeros = torch.zeros_like(ids)
    prompts = replace(
        prompts, input_ids=ids, attention_mask=(shift >= 0).long(), loss_mask=zeros, behavior_logprobs=zeros.float(),
        extra_model_kwargs={**prompts.extra_model_kwargs, **left},
    )
    return SharedPrefixes(prompts, torch.tensor(owner, device=ends.device), lengths)
