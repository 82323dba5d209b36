"""GRPO for vision-language models in one file: config, batch, adapter, math, scoring, trainer, command line.

Group Relative Policy Optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300) samples G completions of one
prompt, scores each with a reward, and raises the probability of those that beat their group's mean. For a
vision-language model the prompt holds images; nothing else about the method changes. So the trainer below never learns
a model family's name: an adapter turns rollouts into a `MultimodalBatch`, and the batch's tensors go to the model's
forward as they are.

    verifiers environment -> OpenAI chat completions -> server (in this process, or vLLM)
        -> GenerateOutputs -> adapter.build_batch -> MultimodalBatch
        -> group_advantages -> score (the model's forward) -> grpo_loss -> AdamW -> server.sync -> next step

Where this departs from the paper: the ratio is taken against the logprobs that the server reported for the tokens it
sampled (so a server that differs from the trainer is corrected for, and seen in `mismatch_kl`); beta is 0 by default (no
reference policy); the default loss is DAPO's mean over all tokens. Token in, token out: the ids that were sampled are
the ids that are trained on, nothing is tokenised again.

Run it:
    python mm_grpo.py --adapter qwen                          # tiny Qwen2-VL, random weights, learns to see on a CPU
    python mm_grpo.py --adapter llava --seed 1                # the same with LLaVA
    python mm_grpo.py --adapter qwen --env_args '{"blind": true}'   # the control: nothing to see, nothing learned
    python mm_grpo.py --adapter qwen --vllm_server_host 127.0.0.1   # rollouts by a vLLM server; the README starts one
    python mm_grpo.py --help                                  # every field of the config

Dimensions: B rows (sequences), L sequence length, T = L - 1 predicted tokens, G group size (completions of one prompt),
V vocabulary size.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import logging
import math
import shutil
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inference import ATTEMPTS, ChatClient, LocalServer, VLLMServer
from report import combine_metrics, describe, draw_curves, reward_metrics, rollout_metrics, zero_spread_fraction
from shared_prefix import SharedPrefixes, score_shared, shared_prefixes

if TYPE_CHECKING:
    import verifiers as vf
    from verifiers.types import GenerateOutputs

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "masked")
PLACEHOLDER_BIAS = -100.0  # what OpenAI's logit_bias allows at most; exp(-100) is never sampled
CHUNK_TOKENS = 512  # tokens whose logits exist at once
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside any clip range, and float32 stays finite

# ---------------------------------------------------------------------------------------------------------------------
# Config


def option(default: Any, help: str) -> Any:
    """A config field: its default and its line of --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class MultimodalRLConfig:
    """Every setting of a run. Flat; parsed from the command line; impossible values are refused when it is made."""

    output_dir: str = option("outputs", "folder for the checkpoint, metrics.jsonl and curves.png; must not hold an earlier run")
    learning_rate: float = option(1e-6, "of AdamW, constant")
    weight_decay: float = option(0.0, "of AdamW")
    max_steps: int = option(500, "steps: one collects rollouts_per_step rollouts and trains on them")
    rollouts_per_step: int = option(128, "rollouts a step, a multiple of rollouts_per_example")
    rollouts_per_example: int = option(8, "group size G: completions sampled of each prompt, at least 2")
    updates_per_batch: int = option(1, "optimizer steps on each batch of rollouts; beyond 1 the ratio does its work")
    micro_batch_size: int = option(8, "rows a forward pass; changes memory and speed, not the gradient")
    share_prefix: bool = option(True, "run each distinct prompt of a micro-batch once; same numbers, less work")
    temperature: float = option(1.0, "of sampling, and of the logprobs that are trained")
    max_tokens: int = option(512, "longest completion of one turn, in tokens")
    max_concurrent: int = option(512, "rollouts in flight at once, at least rollouts_per_example")
    generation_timeout: float = option(600.0, "seconds until a request for a completion fails")
    env_id: str = option("shapes-env", "verifiers environment: any installed one")
    env_args: dict | str | None = option(None, "its arguments, as JSON")  # a dict in Python
    primary_reward_key: str = option("reward", "what is trained: 'reward' (the rubric's sum) or the name of one of its metrics")
    eval_examples: int = option(256, "examples of the greedy evaluation before and after training; 0: none")
    vllm_server_host: str | None = option(None, "host of a vLLM server for the rollouts; unset: they run in this process")
    vllm_server_port: int = option(8000, "its port")
    vllm_server_timeout: float = option(240.0, "seconds to wait for the server to answer, and for each part of a weight update")
    sync_to_vllm_every: int = option(1, "steps between weight updates of the vLLM server; 0: never")
    weight_sync_dir: str | None = option(None, "folder for weight updates that trainer and server both see; unset: output_dir/weights")
    async_rollouts: bool = option(False, "a vLLM server samples the next step's rollouts while a step trains: one step off-policy")
    loss_type: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "masked"] = option("dapo", "see the table in the README")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low, in [0, 1)")
    clip_high: float = option(0.2, "the ratio is clipped above 1 + clip_high")
    mask_ratio_low: float = option(0.1, "tokens with a smaller ratio are dropped")
    mask_ratio_high: float = option(10.0, "tokens with a larger ratio are dropped")
    beta: float = option(0.0, "weight of the KL penalty to the initial policy; above 0 a frozen copy of it is kept")
    scale_rewards: Literal["group", "batch", "none"] = option("group", "standard deviation that advantages are divided by")
    mask_truncated_completions: bool = option(False, "do not train on completions that were cut off at max_tokens")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    mismatch_threshold: float | None = option(
        None, "largest mean |trainer's - server's logprob| of on-policy rollouts; unset: 1e-3 in float32, else 0.1"
    )
    on_mismatch: Literal["warn", "error"] = option("warn", "what a larger one is: a warning that names the usual causes, or the end")
    bf16: bool = option(False, "run the forward passes in bfloat16 autocast; weights and optimizer stay as they are")
    seed: int = option(0, "of the prompts' order and of sampling in this process (and of the weights, where they are made here)")
    log_every_steps: int = option(1, "steps between lines of metrics.jsonl")

    def __post_init__(self) -> None:
        self.env_args = {} if self.env_args is None else self.env_args
        if isinstance(self.env_args, str):
            try:
                self.env_args = json.loads(self.env_args)
            except json.JSONDecodeError as error:
                raise ValueError(f"env_args={self.env_args!r}: must be a JSON object ({error})") from None
        if not isinstance(self.env_args, dict):
            raise ValueError(f"env_args={self.env_args!r}: must be a JSON object")

        def rule(name: str, holds: bool, text: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: {text}")

        for f in fields(self):
            kind = {"int": int, "float": (int, float)}.get(f.type)
            value = getattr(self, f.name)
            if kind and (isinstance(value, bool) or not isinstance(value, kind) or value != value):
                rule(f.name, False, f"must be {'a whole number' if kind is int else 'a number'}")
        for name in ("learning_rate", "temperature", "generation_timeout", "vllm_server_timeout", "max_grad_norm"):
            rule(name, 0 < getattr(self, name) < math.inf, "must be above 0 and finite")
        for name in ("updates_per_batch", "micro_batch_size", "max_tokens", "log_every_steps"):
            rule(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("weight_decay", "max_steps", "eval_examples", "sync_to_vllm_every", "clip_high", "beta", "mask_ratio_low"):
            rule(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("weight_decay", "beta"):
            rule(name, getattr(self, name) < math.inf, "must be finite")
        G = self.rollouts_per_example
        rule("rollouts_per_example", G >= 2, "must be at least 2: a group of one has no mean to compare with")
        rule("rollouts_per_step", self.rollouts_per_step >= G, f"must be at least rollouts_per_example={G}")
        rule("rollouts_per_step", self.rollouts_per_step % G == 0, f"must be a multiple of rollouts_per_example={G}")
        rule("max_concurrent", self.max_concurrent >= G, f"must be at least rollouts_per_example={G}: a group's rollouts start together")
        rule("clip_low", 0 <= self.clip_low < 1, "must be in [0, 1)")
        rule("mask_ratio_low", self.mask_ratio_low <= 1, "must be at most 1, or on-policy tokens would be dropped")
        rule("mask_ratio_high", self.mask_ratio_high >= 1, "must be at least 1, or on-policy tokens would be dropped")
        threshold = 1 if self.mismatch_threshold is None else self.mismatch_threshold
        rule("mismatch_threshold", isinstance(threshold, int | float) and threshold > 0, "must be a number above 0")
        rule("on_mismatch", self.on_mismatch in ("warn", "error"), "must be 'warn' or 'error'")
        rule("vllm_server_port", 0 < self.vllm_server_port < 65536, "must be a port number")
        rule("loss_type", self.loss_type in LOSS_TYPES, f"must be one of {list(LOSS_TYPES)}")
        rule("scale_rewards", self.scale_rewards in ("group", "batch", "none"), "must be 'group', 'batch' or 'none'")


# ---------------------------------------------------------------------------------------------------------------------
# Batch


@dataclass
class MultimodalBatch:
    """What one update trains on. Text tensors have fixed names; media are whatever the model's forward takes.

    A tensor named in `media_spans` is stored once and owned by spans of its rows: row i of the batch owns its rows
    [start, stop), and rows of a group may own the same span. Qwen's flat patches, a row with two images and one with
    none, LLaVA-NeXT tiles: all are spans. Any other tensor is batched along dim 0, such as (B, C, H, W) pixels, or
    per-token tensors of shape (B, L).

    Args:
        input_ids: (B, L) long, prompt and completion, padded anywhere.
        attention_mask: (B, L), 0 on padding.
        loss_mask: (B, L), 1 on sampled tokens, the stop token included. Never 1 at position 0, which nothing predicts.
        behavior_logprobs: (B, L) float, the server's logprob of each sampled token; 0 elsewhere.
        rewards: (B,) float, finite.
        pixel_values: passed to the forward under that name; left out when None.
        extra_model_kwargs: further tensors for the forward, by argument name.
        group_ids: (B,) long, rows that answer the same prompt. None: one group.
        media_spans: name -> (B, 2) long.
        rollout_ids: (B,) long. Rows of one rollout that had to be split carry the same id: its reward counts once in
            the group. None: every row is a rollout of its own.
        is_truncated: (B,) bool, rows that were cut off at a limit. None: not known.

    Raises:
        ValueError: names the field, what was expected and what it got.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    rewards: Tensor
    pixel_values: Tensor | None = None
    extra_model_kwargs: dict[str, Tensor] = field(default_factory=dict)
    group_ids: Tensor | None = None
    media_spans: dict[str, Tensor] = field(default_factory=dict)
    rollout_ids: Tensor | None = None
    is_truncated: Tensor | None = None

    def __post_init__(self) -> None:
        def check(name: str, holds: Any, expected: str, got: Any) -> None:
            if not bool(holds):
                raise ValueError(f"{name}: expected {expected}, got {got}")

        def check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
            check(name, isinstance(tensor, Tensor), f"a tensor of shape {shape}", type(tensor).__name__)
            check(name, tensor.shape == shape, f"shape {shape}", tuple(tensor.shape))

        ids = self.input_ids
        check("input_ids", isinstance(ids, Tensor), "a tensor of shape (B, L)", type(ids).__name__)
        check("input_ids", ids.ndim == 2, "shape (B, L)", tuple(ids.shape))
        check("input_ids", not (ids.is_floating_point() or ids.dtype == torch.bool), "token ids (long)", ids.dtype)
        B, L = ids.shape
        for name in ("attention_mask", "loss_mask", "behavior_logprobs"):
            check_shape(name, getattr(self, name), (B, L))
        check_shape("rewards", self.rewards, (B,))
        for name in ("group_ids", "rollout_ids", "is_truncated"):
            if getattr(self, name) is not None:
                check_shape(name, getattr(self, name), (B,))
        trained = self.loss_mask != 0
        check("loss_mask", not (trained & (self.attention_mask == 0)).any(), "0 on padding", "1 on a padded token")
        check("loss_mask", not trained[:, :1].any(), "0 at position 0, which nothing predicts", "1 there")
        check("rewards", torch.isfinite(self.rewards).all(), "finite values", self.rewards.tolist())
        reported = self.behavior_logprobs[trained]
        check("behavior_logprobs", torch.isfinite(reported).all(), "finite values on trained tokens", "inf or NaN")

        media = self.media
        for name, tensor in media.items():
            check(name, isinstance(tensor, Tensor), "a tensor", type(tensor).__name__)
        for name in ("input_ids", "attention_mask", "pixel_values"):
            check(f"extra_model_kwargs[{name!r}]", name not in self.extra_model_kwargs, f"to be given as {name}", "a second one")
        for name, spans in self.media_spans.items():
            check(f"media_spans[{name!r}]", name in media, f"the name of a tensor, one of {sorted(media)}", repr(name))
            check_shape(f"media_spans[{name!r}]", spans, (B, 2))
            rows = len(media[name])
            inside = (spans[:, 0] >= 0) & (spans[:, 0] <= spans[:, 1]) & (spans[:, 1] <= rows)
            check(f"media_spans[{name!r}]", inside.all(), f"0 <= start <= stop <= {rows} rows of {name}", spans.tolist())
        for name, tensor in media.items():
            if name not in self.media_spans:
                check(name, tensor.ndim > 0 and len(tensor) == B,
                      f"{B} rows along dim 0 (one a sequence), or an entry in media_spans", tuple(tensor.shape))

    @property
    def media(self) -> dict[str, Tensor]:
        """Every tensor for the forward beside ids and attention mask, by argument name."""
        pixels = {} if self.pixel_values is None else {"pixel_values": self.pixel_values}
        return {**pixels, **self.extra_model_kwargs}

    def __len__(self) -> int:
        return len(self.input_ids)

    def _map(self, per_row, media) -> MultimodalBatch:
        """A new batch: `per_row(tensor)` on each (B, ...) field, `media(name, tensor)` on the forward's tensors."""
        new = {name: media(name, tensor) for name, tensor in self.media.items()}
        rows = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        rows.pop("pixel_values", None)
        return replace(
            self,
            **{name: per_row(tensor) for name, tensor in rows.items()},
            pixel_values=new.pop("pixel_values", None),
            extra_model_kwargs=new,
            media_spans={name: per_row(spans) for name, spans in self.media_spans.items()},
        )

    def to(self, device: torch.device | str) -> MultimodalBatch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda t: t.to(device), lambda _, t: t.to(device))

    def select(self, rows: Tensor | Sequence[int]) -> MultimodalBatch:
        """The batch of these rows, in this order. Media that they own are taken along, shared ones still once."""
        index = torch.as_tensor(rows, device=self.input_ids.device)
        if index.dtype == torch.bool:
            raise ValueError("rows: expected row numbers, got a bool mask; use mask.nonzero()[:, 0]")
        index = index.long()
        chosen = self._map(lambda t: t[index], lambda name, t: t if name in self.media_spans else t[index])
        for name, spans in chosen.media_spans.items():
            starts: dict[tuple[int, int], int] = {}  # old span -> where it starts in the new tensor
            total = 0
            for start, stop in spans.tolist():
                if (start, stop) not in starts:
                    starts[start, stop] = total
                    total += stop - start
            moved = [[starts[start, stop], starts[start, stop] + stop - start] for start, stop in spans.tolist()]
            kept = take_spans(chosen.media[name], list(starts))
            chosen.media_spans[name] = torch.as_tensor(moved, dtype=spans.dtype, device=spans.device).reshape(-1, 2)
            if name == "pixel_values":
                chosen.pixel_values = kept
            else:
                chosen.extra_model_kwargs[name] = kept
        return chosen

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward: every row gets its media, in the order of the rows.

        Media of which these rows own nothing are left out, as a forward of text alone expects.
        """
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        for name, tensor in self.media.items():
            if name in self.media_spans:
                tensor = take_spans(tensor, self.media_spans[name].tolist())
                if len(tensor) == 0:
                    continue
            inputs[name] = tensor
        return inputs


def take_spans(tensor: Tensor, spans: Sequence[Sequence[int]]) -> Tensor:
    """The rows [start, stop) of a tensor for each span, one after the other; differentiable."""
    return torch.cat([tensor[:0], *(tensor[start:stop] for start, stop in spans)])


# ---------------------------------------------------------------------------------------------------------------------
# Adapter: what a model family has to say


class MultimodalAdapter(ABC):
    """Turns rollouts into a batch for one model family; the only place that knows the family.

    `adapters.py` has the ones for Qwen-VL and LLaVA and what they share; the README writes a new one in 25 lines.

    Attributes:
        placeholder_ids: token ids that stand for media (image, video). They are never sampled: rollouts are asked with
            a logit_bias of -100 on them, and `score` applies the same bias, so that the ratio stays exact.
    """

    placeholder_ids: Sequence[int] = ()

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    @abstractmethod
    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """Make the batch of these rollouts.

        Args:
            outputs: verifiers' own type. Rollout i is `outputs["outputs"][i]`; its reward `["reward"]`, its prompt's
                identity `["example_id"]`; of its turn k `["trajectory"][k]` the messages with their images are
                `["prompt"]` and what the server sampled is `["tokens"]` (prompt_ids, completion_ids,
                completion_logprobs).

        Returns:
            The batch on the CPU; rollouts that cannot be trained on are left out, with a warning that says why.
        """

    def server_parameter_name(self, name: str) -> str:
        """A parameter of the model in training, by the name that vLLM and published checkpoints know it by.

        The names that wrappers put in front (torch.compile, DistributedDataParallel) are taken off.
        """
        return name.removeprefix("module.").replace("_orig_mod.", "")

    def save_pretrained(self, folder: str | Path) -> None:
        """Save what is needed to load the checkpoint again, beside the weights."""
        self.tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Math: pure functions, one equation each


def group_advantages(rewards: Tensor, group_ids: Tensor | None = None, scale: str = "group") -> Tensor:
    """How much better than its group each completion did.

        A_i = (r_i - mean(group of i)) / (std + 1e-4)

    Args:
        rewards: (B,), finite.
        group_ids: (B,) integers in any order; rows with the same id answer the same prompt. None: one group.
        scale: "group" divides by the group's standard deviation (GRPO, https://arxiv.org/abs/2402.03300), "batch" by
            that of all rewards, "none" by 1 (Dr. GRPO, https://arxiv.org/abs/2503.20783). Unbiased (n - 1).

    Returns:
        (B,) float32. Exactly 0 for a group of one and for a group whose rewards are all equal.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r}: must be 'group', 'batch' or 'none'")
    if rewards.ndim != 1 or not torch.isfinite(rewards).all():
        raise ValueError(f"rewards: expected finite values of shape (B,), got {tuple(rewards.shape)}: {rewards.tolist()}")
    if group_ids is None:
        group_ids = torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids: expected shape {tuple(rewards.shape)}, got {tuple(group_ids.shape)}")

    def std(values: Tensor) -> Tensor:
        return values.std() if len(values) > 1 else values.new_zeros(())

    exact = rewards.double()  # in float32 the mean of eight times 0.7 is not 0.7, and 1e-8 / 1e-8 is a large advantage
    advantages = torch.zeros_like(exact)
    for group in group_ids.unique():
        rows = group_ids == group
        members = exact[rows]
        if (members == members[0]).all():
            continue
        divisor = {"group": std(members), "batch": std(exact), "none": None}[scale]
        centred = members - members.mean()
        advantages[rows] = centred if divisor is None else centred / (divisor + 1e-4)
    return advantages.float()


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of the distribution it was drawn from.

    log p = log_softmax(logits / temperature), in float32 whatever the logits' type (a bf16 log-softmax is off by
    percents). The temperature is the sampling temperature: the policy that acts is the policy that is trained.

    Args:
        logits: (..., V).
        targets: (...) token ids.

    Returns:
        (logprobs, entropies): (...) float32 each, in nats; entropies without gradient.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    all_logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    logprobs = all_logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # a metric; for an entropy bonus take this line away, at the price of its memory
        entropies = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return logprobs, entropies


def token_weights(loss_mask: Tensor, loss_type: str, max_tokens: int | None = None) -> Tensor:
    """The weight of each token in the loss: loss = sum(weights * per-token loss).

    The weights are those of the whole batch. Micro-batches take their rows of them, so their losses and gradients add
    up to the whole batch's, however it is split; normalising each micro-batch by itself would not.

    Args:
        loss_mask: (B, T), 1 on trained tokens.
        loss_type: "grpo", "gspo": mean over a row's tokens, then over the B rows (an empty row counts as a zero).
            "dr_grpo": 1 / (B * max_tokens). "dapo", "cispo", "masked": 1 / tokens in the batch.
        max_tokens: for "dr_grpo": the longest completion that could have been sampled.

    Returns:
        (B, T) float32, 0 where loss_mask is 0.
    """
    mask = (loss_mask != 0).float()
    if loss_type in ("grpo", "gspo"):
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / max(len(mask), 1)
    if loss_type == "dr_grpo":
        if max_tokens is None or max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: loss_type 'dr_grpo' needs the completions' limit, at least 1")
        return mask / (max(len(mask), 1) * max_tokens)
    if loss_type in ("dapo", "cispo", "masked"):
        return mask / mask.sum().clamp(min=1)
    raise ValueError(f"loss_type={loss_type!r}: must be one of {list(LOSS_TYPES)}")


def grpo_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    loss_type: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    mask_ratio_low: float = 0.0,
    mask_ratio_high: float = math.inf,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy-gradient loss of GRPO and its relatives, with a KL penalty to a reference policy.

        ratio = exp(logprobs - behavior_logprobs)
        grpo, dr_grpo, dapo   -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        gspo                  the same, with one ratio a row: exp(mean of the row's log-ratios)
        cispo                 -stop_gradient(min(ratio, 1 + clip_high)) * A * logprobs
        masked                -ratio * A
        loss = sum(weights * (the above + beta * k3)),  k3 = exp(ref - logprobs) - (ref - logprobs) - 1

    In every type a token whose ratio lies outside [mask_ratio_low, mask_ratio_high] loses its policy term: that far
    off, trainer and server disagree about what happened. Papers: grpo 2402.03300, dr_grpo 2503.20783, dapo 2503.14476,
    gspo 2507.18071, cispo 2506.13585 (https://arxiv.org/abs/...); masked as in verifiers' RLTrainer; k3
    http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: (B, T) of the policy in training, with gradient.
        behavior_logprobs: (B, T) of the policy that sampled.
        advantages: (B,).
        weights: (B, T) from `token_weights`. Where it is 0 nothing else is looked at.
        ref_logprobs: (B, T) of the reference policy; needed when beta > 0.

    Returns:
        (loss, metrics): a scalar, and detached scalars over the tokens with weight > 0: mismatch_kl (mean k3 of policy
        to behaviour), logprob_difference (mean |log-ratio|), ratio_min, ratio_max, clip_fraction, masked_fraction, and kl
        (to the reference) when beta > 0.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: must be one of {list(LOSS_TYPES)}")
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: beta={beta} needs the reference policy's logprobs, got None")
    trained = weights > 0  # (B, T)
    count = trained.sum().clamp(min=1)
    # `where` before any arithmetic: an untrained token may hold anything, and 0 * inf would be NaN
    log_ratio = torch.where(trained, logprobs - behavior_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    token_ratio = log_ratio.exp()
    ratio = token_ratio
    if loss_type == "gspo":
        tokens = trained.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
        ratio = (log_ratio.sum(-1, keepdim=True) / tokens).exp().expand_as(log_ratio)
    A = advantages.unsqueeze(-1)  # (B, 1)

    if loss_type == "cispo":
        policy_term = -ratio.clamp(max=1 + clip_high).detach() * A * logprobs
        clipped = ratio > 1 + clip_high
    elif loss_type == "masked":
        policy_term = -ratio * A
        clipped = torch.zeros_like(trained)
    else:
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        policy_term = -torch.minimum(ratio * A, bounded * A)
        clipped = bounded * A < ratio * A
    dropped = (ratio < mask_ratio_low) | (ratio > mask_ratio_high)
    per_token = torch.where(dropped, 0.0, policy_term)

    def k3(difference: Tensor) -> Tensor:
        # expm1 in float64: in float32, exp(d) - d - 1 of a small d is rounding noise, and can be negative
        difference = difference.double()
        return (torch.expm1(difference) - difference).float()

    def mean(values: Tensor) -> Tensor:
        return (torch.where(trained, values.detach(), 0.0).sum() / count).float()

    ratios = token_ratio.detach()[trained]
    metrics = {
        "mismatch_kl": mean(k3(log_ratio)),
        "logprob_difference": mean(log_ratio.abs()),
        "ratio_min": ratios.min() if ratios.numel() else torch.ones(()),
        "ratio_max": ratios.max() if ratios.numel() else torch.ones(()),
        "clip_fraction": mean(clipped.float()),
        "masked_fraction": mean(dropped.float()),
    }
    if beta > 0:
        towards_ref = torch.where(trained, ref_logprobs - logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        per_token = per_token + beta * k3(towards_ref)
        metrics["kl"] = mean(k3(towards_ref))
    loss = torch.where(trained, weights * per_token, 0.0).sum()
    return loss, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def score(
    model,
    batch: MultimodalBatch,
    temperature: float = 1.0,
    placeholder_ids: Sequence[int] = (),
    prefixes: SharedPrefixes | None = None,
) -> tuple[Tensor, Tensor]:
    """The policy's view of the batch's tokens: the forward of the vision-language model, gradients on.

    Args:
        model: called as `model(input_ids=..., attention_mask=..., pixel_values=..., **extra_model_kwargs)`, with
            pixel_values left out where there are none; returns logits (B, L, V), as an attribute or as they are.
        batch: on the model's device.
        temperature: of the sampling.
        placeholder_ids: ids that were asked for with a logit_bias of -100.
        prefixes: from `shared_prefixes`, to run each distinct prompt once. Same numbers at trained tokens.

    Returns:
        (logprobs, entropies): (B, T) float32 each; [:, t] is about token t + 1, given the tokens up to t. With prefixes
        they are 0 where nothing is trained.
    """
    with headless(model) as head:

        def score_tokens(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (..., H), (...)
            return chunked_logprobs(head, hidden, targets, temperature, placeholder_ids)

        if prefixes is not None:
            return score_shared(model, batch, prefixes, score_tokens)
        output = model(**batch.model_inputs())
        return score_tokens(getattr(output, "logits", output)[:, :-1], batch.input_ids[:, 1:])  # (B, T, H), (B, T)


@contextmanager
def headless(model) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it the model's forward returns, as its logits, the hidden states (..., H) that go into its output head.

    Yields the head, (..., H) -> (..., V). A model that names no head, or that does something to the logits after it,
    keeps its forward, and the head that is yielded returns what it gets.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    text_config = model.config.get_text_config() if head is not None else None
    if head is None or any(getattr(text_config, name, None) for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")):
        yield lambda logits: logits
        return
    forward, was_replaced = head.forward, "forward" in vars(head)
    head.forward = lambda hidden: hidden
    try:
        yield forward
    finally:
        del head.forward  # the class's own again
        if was_replaced:
            head.forward = forward


def chunked_logprobs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float, placeholder_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`token_logprobs(head(hidden), targets)` with the server's logit_bias, CHUNK_TOKENS tokens at a time.

    Logits, their softmax and their gradient are the peak of an update: with 152k tokens in the vocabulary, 0.6 MB each a
    token. A chunk's are dropped after its forward and made again in its backward, so the peak does not grow with the batch.

    Args:
        hidden: (..., H). targets: (...).

    Returns:
        (logprobs, entropies): (...) each.
    """

    def one(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (n, H), (n,)
        logits = head(hidden)
        if len(placeholder_ids):
            bias = torch.zeros(logits.shape[-1], device=logits.device)
            bias[list(placeholder_ids)] = PLACEHOLDER_BIAS
            logits = logits.float() + bias
        return token_logprobs(logits, targets, temperature)

    chunks = list(zip(hidden.flatten(0, -2).split(CHUNK_TOKENS), targets.flatten().split(CHUNK_TOKENS)))
    if len(chunks) == 1:
        scored = [one(*chunks[0])]
    else:
        scored = [checkpoint(one, *chunk, use_reentrant=False) for chunk in chunks]
    logprobs, entropies = (torch.cat(values).view(targets.shape) for values in zip(*scored))
    return logprobs, entropies


# ---------------------------------------------------------------------------------------------------------------------
# Trainer


@dataclass
class RolloutsAhead:
    """The next step's rollouts, which a server samples while this step trains."""

    examples: list[dict]
    outputs: Future[GenerateOutputs | None]  # None: the server was lost on the way
    synced_at: int | None  # steps that their policy has seen


class MultimodalGRPOTrainer:
    """GRPO: collect rollouts, build the batch, update the policy, bring the server up to date; over and over.

    Args:
        model: the policy, on its device; a Transformers model, or any module that `score` can call.
        tokenizer: saved with the checkpoint.
        adapter: of the model's family.
        config: see MultimodalRLConfig.
        env: a verifiers environment; or call `set_environment`.
        server: where completions come from (`inference.py`); None: a LocalServer in this process, or the vLLM server
            that the config names.
    """

    def __init__(self, model, tokenizer, adapter: MultimodalAdapter, config: MultimodalRLConfig, env=None, server=None):
        self.model, self.tokenizer, self.adapter, self.config = model.eval(), tokenizer, adapter, config  # eval: no dropout
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.ref_model = copy.deepcopy(model).requires_grad_(False) if config.beta > 0 else None
        self.env = env
        if server is None and config.vllm_server_host is not None:
            server = VLLMServer(
                model, adapter, config.vllm_server_host, config.vllm_server_port,
                weights_dir=config.weight_sync_dir or Path(config.output_dir) / "weights",
                timeout=config.vllm_server_timeout, generation_timeout=config.generation_timeout,
            )  # fmt: skip
        self.server = server or LocalServer(model, adapter, seed=config.seed)
        if config.async_rollouts and self.server.shares_weights:
            raise ValueError(
                "async_rollouts=True: needs vllm_server_host; in this process the model that samples is the one that is being changed"
            )
        self.loop = asyncio.new_event_loop()  # one for the trainer's life: the client is bound to the loop it first ran in
        self.prompts_taken = 0
        self.steps_done = 0
        self.synced_at: int | None = None  # steps that the server's weights have seen; None: it has none from here
        self.lag = 0  # steps that the rollouts in training lie behind
        self.running: RolloutsAhead | None = None  # with async_rollouts
        self.background = ThreadPoolExecutor(max_workers=1)

    def set_environment(self, id_or_env: str | vf.Environment, **env_args) -> None:
        """Train on this verifiers environment: an installed one's id with its arguments, or the environment itself."""
        import verifiers as vf

        self.env = vf.load_environment(id_or_env, **env_args) if isinstance(id_or_env, str) else id_or_env

    # -- one step, four lines

    def step(self) -> dict[str, float]:
        """Collect, build, update, sync. Returns the step's metrics (the README's glossary says what they mean)."""
        started = time.perf_counter()
        outputs = self.collect()
        collected = time.perf_counter()
        batch = self.adapter.build_batch(outputs)
        metrics = self.update(batch)
        self.steps_done += 1
        updated = time.perf_counter()
        if self.running is not None:  # no rollout may come from two policies
            wait([self.running.outputs])
        waited = time.perf_counter()
        if self.config.sync_to_vllm_every and self.steps_done % self.config.sync_to_vllm_every == 0:
            self.sync()
        return {
            "step": self.steps_done,
            **rollout_metrics(outputs, batch),
            **metrics,
            "lag": self.lag,
            "seconds_rollout": collected - started + waited - updated,
            "seconds_update": updated - collected,
            "seconds_sync": time.perf_counter() - waited,
        }

    def collect(self) -> GenerateOutputs:
        """Roll out the next prompts, G completions each; with `async_rollouts` that ran while the last step trained."""
        ahead, self.running = self.running, None
        examples = ahead.examples if ahead else self.next_examples()
        outputs, policy = (ahead.outputs.result(), ahead.synced_at) if ahead else (None, None)
        if outputs is None:  # nothing ran ahead, or the server was lost under it
            outputs, policy = self.rollout(examples, self.config.temperature), self.synced_at
        self.lag = 0 if self.server.shares_weights else self.steps_done - (policy or 0)
        if self.config.async_rollouts:
            self._roll_out_ahead()
        return with_reward(outputs, self.config.primary_reward_key)

    def _roll_out_ahead(self) -> None:
        """Start the next step's rollouts, if there is one.

        Not before the first weight update: the rollouts that come after it must be on-policy, to see whether updates arrive.
        """
        updated = self.synced_at or not self.config.sync_to_vllm_every
        if updated and self.steps_done + 1 < self.config.max_steps:
            examples = self.next_examples()
            outputs = self.background.submit(self._try_rollout, examples, self.config.temperature)
            self.running = RolloutsAhead(examples, outputs, self.synced_at)

    def sync(self) -> None:
        """Bring the server's weights up to date."""
        self.server.sync(self.model)
        self.synced_at = self.steps_done

    def next_examples(self) -> list[dict]:
        """The examples of a step: each of the next prompts G times."""
        count = self.config.rollouts_per_step // self.config.rollouts_per_example
        return [example for example in [self.next_example() for _ in range(count)] for _ in range(self.config.rollouts_per_example)]

    def next_example(self) -> dict:
        """Walk the training set in a seeded shuffle, anew in each epoch: every example once before any comes again."""
        dataset = self._environment().get_dataset()
        epoch, i = divmod(self.prompts_taken, len(dataset))
        self.prompts_taken += 1
        return dataset[epoch_order(len(dataset), self.config.seed, epoch)[i]]

    def rollout(self, examples: list[dict], temperature: float) -> GenerateOutputs:
        """Run the environment on these dataset rows. A server that is lost meanwhile is waited for, and they run again."""
        if self.synced_at is None and self.config.sync_to_vllm_every:
            self.sync()  # the server may have started from other weights
        for _ in range(ATTEMPTS):
            outputs = self._try_rollout(examples, temperature)
            if outputs is not None:
                return outputs
            warnings.warn(f"step {self.steps_done + 1}: the server was lost during the rollouts; waiting for it, then they run again")
            self.server.connect()
            if self.config.sync_to_vllm_every:
                self.sync()
        raise RuntimeError(f"step {self.steps_done + 1}: the server was lost {ATTEMPTS} times during the same rollouts; its log knows why")

    def _try_rollout(self, examples: list[dict], temperature: float) -> GenerateOutputs | None:
        """The rollouts; None if the server was lost on the way, as those after its restart are of old weights."""
        # Every sampling parameter is sent: a server's defaults may differ
        sampling = {
            "temperature": temperature,
            "max_tokens": self.config.max_tokens,
            "top_p": 1.0,
            "logprobs": True,
            "extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
        }
        if len(self.adapter.placeholder_ids):
            sampling["logit_bias"] = {str(i): PLACEHOLDER_BIAS for i in self.adapter.placeholder_ids}
        groups = self.config.max_concurrent // self.config.rollouts_per_example  # generate() counts groups, not rollouts
        run = self._environment().generate(
            examples,
            client=ChatClient(self.server.client),
            model=self.server.model_name,
            sampling_args=sampling,
            max_concurrent=groups,
            state_columns=["trajectory"],
            on_start=lambda *_: None,
            on_progress=lambda *_: None,
            on_log=lambda *_: None,
        )
        with self._autocast():
            outputs = self.loop.run_until_complete(run)
        return outputs if self.server.up_to_date() else None

    def update(self, batch: MultimodalBatch) -> dict[str, float]:
        """Train on one batch: `updates_per_batch` optimizer steps. Returns the metrics of the first and last of them."""
        config, batch = self.config, batch.to(self.device)
        if config.mask_truncated_completions:
            batch = without_truncated(batch)
        advantages = row_advantages(batch, config.scale_rewards)
        weights = token_weights(batch.loss_mask[:, 1:], config.loss_type, config.max_tokens)
        # Micro-batches: their rows, the batch of them, the prompts that they share. Rows without a trained token say nothing.
        speaking = (weights > 0).any(-1).nonzero()[:, 0] if (weights > 0).any() else torch.arange(len(batch))
        parts = [(rows, batch.select(rows)) for rows in speaking.split(config.micro_batch_size)]
        prefixes = [self._prefixes(part) for _, part in parts]
        ref_logprobs = [None] * len(parts)
        if self.ref_model is not None:
            ref_logprobs = [self.score(self.ref_model, part, shared)[0] for (_, part), shared in zip(parts, prefixes)]

        metrics: dict[str, float] = {}
        for update in range(config.updates_per_batch):
            values_of_parts = []
            for (rows, part), shared, ref in zip(parts, prefixes, ref_logprobs):
                logprobs, entropies = self.score(self.model, part, shared)
                loss, values = grpo_loss(
                    logprobs,
                    part.behavior_logprobs[:, 1:],
                    advantages[rows],
                    weights[rows],
                    loss_type=config.loss_type,
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    mask_ratio_low=config.mask_ratio_low,
                    mask_ratio_high=config.mask_ratio_high,
                    ref_logprobs=ref,
                    beta=config.beta,
                )
                trained = weights[rows] > 0
                values |= {"loss": loss.detach(), "entropy": entropies.detach()[trained].sum() / max(int(trained.sum()), 1)}
                values_of_parts.append((values, int(trained.sum())))
                loss.backward()
            last = combine_metrics(values_of_parts)
            if update == 0 and self.lag == 0:
                self._check_on_policy(last)
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
            if torch.isfinite(grad_norm):
                self.optimizer.step()
            else:
                warnings.warn(f"grad_norm={grad_norm.item()}: this update is skipped, the weights stay as they are")
            self.optimizer.zero_grad(set_to_none=True)
            last["grad_norm"] = grad_norm.item()
            metrics = metrics or last
        if config.updates_per_batch > 1:  # the first update is on-policy; what the later ones drift to, the last one shows
            metrics |= {f"last_update/{name}": value for name, value in last.items()}
        return {
            **metrics,
            "zero_spread_fraction": zero_spread_fraction(batch),
            "shared_prefix_fraction": sum(len(part) for (_, part), p in zip(parts, prefixes) if p) / len(speaking),
            "trained_tokens": int((batch.loss_mask != 0).sum()),
            "learning_rate": config.learning_rate,
        }

    def score(self, model, batch: MultimodalBatch, prefixes: SharedPrefixes | None) -> tuple[Tensor, Tensor]:
        """`score` with this run's temperature, placeholders and precision; without gradients for a frozen model."""
        with self._autocast(), torch.set_grad_enabled(model is self.model):
            return score(model, batch, self.config.temperature, self.adapter.placeholder_ids, prefixes)

    def evaluate(self) -> dict[str, float]:
        """Greedy rollouts of the first `eval_examples` evaluation examples: mean reward and mean of each metric."""
        if self.config.sync_to_vllm_every and self.synced_at != self.steps_done:
            self.sync()  # the policy of now, also between two weight updates
        examples = self._environment().get_eval_dataset(n=self.config.eval_examples or -1)
        outputs = with_reward(self.rollout(examples.to_list(), temperature=0.0), self.config.primary_reward_key)
        return reward_metrics(outputs)

    def train(self) -> dict[str, float]:
        """Run `max_steps` steps; log, evaluate before and after, save the checkpoint. Returns the last evaluation."""
        from tqdm import tqdm

        config, folder = self.config, Path(self.config.output_dir)
        log = folder / "metrics.jsonl"
        if log.exists():
            raise FileExistsError(f"output_dir={config.output_dir!r}: holds an earlier run ({log.name}); name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        if config.eval_examples:
            print(f"before training: {describe(self.evaluate())}", flush=True)
        try:
            with tqdm(range(config.max_steps), desc="training", unit="step") as progress, log.open("w") as lines:
                for _ in progress:
                    metrics = self.step()
                    if self.steps_done % config.log_every_steps == 0:
                        lines.write(json.dumps(metrics) + "\n")
                        lines.flush()
                    kl = metrics.get("kl", metrics["mismatch_kl"])
                    seconds = sum(metrics[f"seconds_{part}"] for part in ("rollout", "update", "sync"))
                    progress.set_postfix_str(f"reward {metrics['reward']:.3f}, KL {kl:.1e}, {seconds:.2f} s/step")
        finally:  # an interrupted run keeps what it has learned
            if self.running is not None:  # nobody waits for them any more
                self.loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self.loop)])
            self.save_checkpoint(folder / "checkpoint")
        final = self.evaluate() if config.eval_examples else {}
        if config.eval_examples:
            print(f"after training:  {describe(final)}")
        print(f"checkpoint {folder / 'checkpoint'}, metrics {log}", end="")
        print(f", curves {draw_curves(log, folder / 'curves.png')}" if log.stat().st_size else "")
        return final

    def save_checkpoint(self, folder: str | Path) -> None:
        """Weights, tokenizer and what the adapter adds, as `from_pretrained` and vLLM read them; whole or not at all."""
        folder = Path(folder)
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        weights = {self.adapter.server_parameter_name(name): tensor for name, tensor in self.model.state_dict().items()}
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(fresh, state_dict=weights)
        else:
            torch.save(self.model.state_dict(), fresh / "model.pt")
        self.adapter.save_pretrained(fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)

    def _environment(self) -> vf.Environment:
        if self.env is None:
            raise RuntimeError("no environment: call trainer.set_environment('shapes-env'), or pass env=...")
        return self.env

    def _prefixes(self, batch: MultimodalBatch) -> SharedPrefixes | None:
        return shared_prefixes(self.model, batch, self.adapter.placeholder_ids) if self.config.share_prefix else None

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bf16)

    def _check_on_policy(self, metrics: dict[str, float]) -> None:
        """Rollouts of the current policy must have the trainer's own logprobs, as far as the forwards' precision goes."""
        threshold = self.config.mismatch_threshold
        if threshold is None:
            threshold = 1e-3 if self.server.dtype == torch.float32 and not self.config.bf16 else 0.1
        difference = metrics["logprob_difference"]
        if difference <= threshold:
            return
        message = (
            f"step {self.steps_done + 1}: logprob_difference={difference:.3g} is above mismatch_threshold={threshold:g} at the "
            "first update after a rollout: the server and the trainer disagree about the policy that sampled. Usual causes: "
            "images lost or resized differently on the way (vLLM: --mm-processor-kwargs), the server's weights are old or were "
            "only partly updated (a tied output head), it reports logprobs before the temperature (vLLM: --logprobs-mode "
            "processed_logprobs), or it adds sampling settings of the checkpoint (vLLM: --generation-config vllm)."
        )
        if self.config.on_mismatch == "error":
            self.optimizer.zero_grad(set_to_none=True)  # of this update nothing remains
            raise RuntimeError(message)
        warnings.warn(message)


# ---------------------------------------------------------------------------------------------------------------------
# What the trainer needs beside the method


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch shows `count` examples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def with_reward(outputs: GenerateOutputs, key: str) -> GenerateOutputs:
    """The outputs with each rollout's "reward" taken from `key`: the reward itself or one of the rubric's metrics."""
    if key == "reward":
        return outputs
    rollouts = outputs["outputs"]
    for rollout in rollouts:
        if key not in (rollout["metrics"] or {}):
            raise ValueError(f"primary_reward_key={key!r}: the environment reports 'reward' and {sorted(rollout['metrics'] or {})}")
    return {**outputs, "outputs": [{**rollout, "reward": rollout["metrics"][key]} for rollout in rollouts]}


def row_advantages(batch: MultimodalBatch, scale: str) -> Tensor:
    """(B,) advantages; a rollout that was split into several rows counts once in its group's mean."""
    if batch.rollout_ids is None:
        return group_advantages(batch.rewards, batch.group_ids, scale)
    ids, rollout = batch.rollout_ids.unique(return_inverse=True)  # (R,), (B,)
    first = torch.stack([(rollout == r).nonzero()[0, 0] for r in range(len(ids))])  # (R,) a row of each rollout
    groups = None if batch.group_ids is None else batch.group_ids[first]
    return group_advantages(batch.rewards[first], groups, scale)[rollout]


def without_truncated(batch: MultimodalBatch) -> MultimodalBatch:
    """The batch with nothing trained in rows that were cut off."""
    if batch.is_truncated is None:
        raise ValueError("is_truncated: mask_truncated_completions needs it from the adapter's build_batch, got None")
    kept = ~batch.is_truncated.bool().unsqueeze(-1)
    return replace(batch, loss_mask=batch.loss_mask * kept, behavior_logprobs=batch.behavior_logprobs * kept)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

# Where no --model is given: a tiny model of the family with random weights, and a run that fits it.
DEMO = dict(
    learning_rate=5e-4, max_steps=400, rollouts_per_example=4, updates_per_batch=3, micro_batch_size=128, max_tokens=3,
    scale_rewards="batch", beta=0.1,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import HfArgumentParser

    from adapters import ADAPTERS

    parser = HfArgumentParser(MultimodalRLConfig, description=__doc__.split("\n\n")[0])
    parser.add_argument("--adapter", choices=sorted(ADAPTERS), required=True, help="model family")
    parser.add_argument("--model", help="checkpoint, a name or a folder; unset: a tiny model of the family, random weights")
    parser.set_defaults(output_dir=time.strftime("runs/%Y%m%d-%H%M%S"))
    if "--model" not in " ".join(sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**DEMO)
    try:
        config, arguments = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    quiet_libraries()

    if arguments.model is None:
        from tiny_vlm import make_tiny_vlm

        torch.set_num_threads(1)  # two are no faster at this size, and many times slower on a machine that is busy
        model, tokenizer, image_processor = make_tiny_vlm(arguments.adapter, seed=config.seed)
        adapter = ADAPTERS[arguments.adapter](tokenizer, image_processor, model.config)
    else:
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        adapter = ADAPTERS[arguments.adapter](tokenizer)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e6:.2f} M parameters, on {next(model.parameters()).device}")
    trainer = MultimodalGRPOTrainer(model=model, tokenizer=tokenizer, adapter=adapter, config=config)
    print(f"rollouts {trainer.server}")
    trainer.set_environment(config.env_id, **config.env_args)
    trainer.train()


def quiet_libraries() -> None:
    """Keep library output off the screen that a user can do nothing about; warnings of this file stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("verifiers").setLevel(logging.ERROR)


if __name__ == "__main__":
    from mm_grpo import main  # not the module a second time as __main__: adapters import it by name

    main()
