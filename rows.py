"""Rollouts to rows, for every adapter: what the server saw and sampled, as the text tensors of a batch.

A rollout that cannot be trained on never ends a step: it is left out and marked with the cause, `rollout["dropped"]`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks import expect_tokens, fault_of

if TYPE_CHECKING:
    from mm_grpo import MultimodalBatch


class NoRollouts(ValueError):
    """None of a step's rollouts can be trained on."""


class Unusable(Exception):
    """A rollout that cannot be trained on: the cause, one of `checks.CAUSES`, and what happened."""


@dataclass
class Row:
    """One sequence to train on: the ids that the server saw and sampled, in order."""

    reward: float
    group: int  # the prompt's slot in the step, or the example's id
    rollout: int  # index into outputs["outputs"]
    ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)  # 1 on sampled tokens
    logprobs: list[float] = field(default_factory=list)  # the server's, 0 elsewhere
    messages: list[Any] = field(default_factory=list)  # the prompt of its last turn: it holds all images of these ids
    prompt_length: int = 0  # of that prompt, in ids
    is_truncated: bool = False
    media: Any = None  # what `media_of` gave for it


def rollout_rows(outputs, placeholder_ids: Sequence[int] = (), vocab_size=None, media_of=None) -> list[Row]:
    """The rows of these rollouts, on the server's own ids.

    A later turn continues a row where its prompt starts with the row's ids so far; where it does not (the chat template
    wrote history anew), it starts a new row of the same rollout. What cannot be trained on is left out with a warning.

    Args:
        outputs: verifiers' own. A rollout's group is its "group", where it has one, else its "example_id".
        placeholder_ids, vocab_size: ids that must not be sampled, and the number that all are below.
        media_of: (row, rollout) -> the row's `media`; may raise Unusable.

    Raises:
        NoRollouts: nothing is left; says the most frequent cause.
    """
    rollouts, rows = outputs["outputs"], []
    dropped: list[tuple[str, str]] = []  # cause, what happened
    for i, rollout in enumerate(rollouts):
        try:
            of_rollout = _rows(rollout, i, placeholder_ids, vocab_size)
            for row in of_rollout if media_of else ():
                row.media = media_of(row, rollout)
            rows += of_rollout
        except Unusable as unusable:
            rollout["dropped"], rollout["because"] = cause, reason = unusable.args
            dropped.append((cause, f"rollout {i} (example {rollout.get('example_id')}): {reason}"))
    if not rows:
        often, times = (Counter(cause for cause, _ in dropped).most_common(1) or [("nothing", 0)])[0]
        first = next((reason for cause, reason in dropped if cause == often), "none came")
        counts = f"{len(dropped)} came; most often: {often}, {times} times"
        raise NoRollouts(f"no rollout can be trained on ({counts}). First of these: {first}")
    if dropped:
        warnings.warn(f"{len(dropped)} of {len(rollouts)} rollouts cannot be trained on. First: {dropped[0][1]}")
    if not all(type(row.group) is int and abs(row.group) < 2**63 for row in rows):  # names: numbered as they come
        number: dict[str, int] = {}
        for row in rows:
            row.group = number.setdefault(repr(row.group), len(number))
    return rows


def _rows(rollout, i: int, placeholder_ids: Sequence[int], vocab_size: int | None) -> list[Row]:
    """The rows of rollout i. Raises Unusable."""
    if fault := fault_of(rollout):
        raise Unusable(*fault)
    rows: list[Row] = []
    try:
        for turn, step in enumerate(rollout["trajectory"]):
            prompt, sampled, logprobs = expect_tokens(f"turn {turn}", step.get("tokens"), vocab_size)
            if not rows or prompt[: len(rows[-1].ids)] != rows[-1].ids:
                group = rollout["group"] if "group" in rollout else rollout["example_id"]
                rows.append(Row(reward=float(rollout["reward"]), group=group, rollout=i))
            row = rows[-1]
            given = len(prompt) - len(row.ids)
            row.ids = [*prompt, *sampled]
            row.loss_mask += [0] * given + [1] * len(sampled)
            row.logprobs += [0.0] * given + logprobs
            row.messages, row.prompt_length = step["prompt"], len(prompt)
            row.is_truncated |= bool(step["is_truncated"])
        for row in rows:
            row.messages = list(row.messages)  # of its last turn, which holds those before
    except ValueError as error:
        raise Unusable("tokens", str(error)) from None
    except Exception as error:  # a key that is absent, a value of another type
        raise Unusable("environment", f"malformed: {type(error).__name__}: {error}") from error
    sampled = {token for row in rows for token, trained in zip(row.ids, row.loss_mask) if trained}
    if not sampled:
        raise Unusable("tokens", "nothing was sampled")
    if found := sorted(sampled.intersection(placeholder_ids)):
        why = "which has no image; the server should apply the request's logit_bias"
        raise Unusable("placeholder", f"the policy sampled the media placeholder {found}, {why}")
    return rows


def token_tensors(rows: Sequence[Row], pad_id: int = 0) -> dict[str, Tensor]:
    """The tensors of a `MultimodalBatch` that are about tokens, padded on the right. Masks come from lengths: the
    padding token may be the stop token, and the stop token is trained on."""
    L = max(len(row.ids) for row in rows)

    def padded(values: list[list], fill, dtype) -> Tensor:
        return torch.tensor([v + [fill] * (L - len(v)) for v in values], dtype=dtype)  # (B, L)

    return dict(
        input_ids=padded([row.ids for row in rows], pad_id, torch.long),
        attention_mask=padded([[1] * len(row.ids) for row in rows], 0, torch.long),
        loss_mask=padded([row.loss_mask for row in rows], 0, torch.long),
        behavior_logprobs=padded([row.logprobs for row in rows], 0.0, torch.float32),
        rewards=torch.tensor([row.reward for row in rows], dtype=torch.float32),
        group_ids=torch.tensor([row.group for row in rows], dtype=torch.long),
        rollout_ids=torch.tensor([row.rollout for row in rows], dtype=torch.long),
        is_truncated=torch.tensor([row.is_truncated for row in rows]),
    )


def without_truncated(batch: MultimodalBatch) -> MultimodalBatch:
    """The batch with nothing trained in rows that were cut off."""
    if not len(batch):
        return batch
    if batch.is_truncated is None:
        raise ValueError("is_truncated: mask_truncated_completions needs it from the adapter's build_batch, got None")
    return replace(batch, loss_mask=batch.loss_mask * ~batch.is_truncated.bool().unsqueeze(-1))
