"""GRPO for vision-language models: the method in one file, read top to bottom.

Group Relative Policy Optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300) samples G completions of one
prompt, scores each with a reward, and raises the probability of those that beat their group's mean. For a
vision-language model the prompt holds images; nothing else about the method changes. So the trainer below never learns
a model family's name: an adapter turns rollouts into a `MultimodalBatch`, and the batch's tensors go to the model's
forward as they are.

    verifiers environment -> OpenAI chat completions -> server (in this process, or vLLM)
        -> GenerateOutputs -> adapter.build_batch -> MultimodalBatch
        -> group_advantages -> score (the model's forward) -> grpo_loss -> AdamW -> server.sync -> next step

Where this departs from the paper:
 1. The ratio is taken against the logprobs that the server reported for the tokens it sampled, so a server that differs
    from the trainer is corrected for, and seen (`mismatch_kl`, `logprob_difference`).
 2. beta is 0: no reference policy unless it is asked for. The default loss is DAPO's mean over all tokens.
 3. Tokens whose ratio lies outside [0.1, 10] lose their policy term: so far off, trainer and server disagree.
 4. Advantages divide by the unbiased standard deviation + 1e-4, and are exactly 0 where a group's rewards are equal.
 5. The model trains in eval mode: with dropout the policy that is trained would not be the one that acts.
 6. Placeholders of media are never sampled: logit_bias -100 on the server, and the same in `token_logprobs`.
 7. Token in, token out: the ids that were sampled are the ids that are trained on, nothing is tokenised again.

Run it:
    python mm_grpo.py --adapter qwen                          # a tiny model, random weights, learns to see on a CPU
    python mm_grpo.py --model NAME --vllm_server_host localhost     # any Transformers model, rollouts by a vLLM server
    python mm_grpo.py --help                                  # every field of the config

Dimensions: B rows (sequences), L sequence length, T = L - 1 predicted tokens, G group size (completions of one prompt),
V vocabulary, H hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import parallel
import shared_prefix
from checkpoint import RunState, published_names, save_checkpoint
from checks import check_config, expect_batch
from command_line import one_line_errors, parse_arguments
from faults import RunStopped, after_pauses, deferred_signals, halving, stop_where_skipped
from local_server import LocalServer
from lora import adapters_off, choose_trained, reference_of
from media import select_spans, take_spans
from optimizers import OPTIMIZERS, SCHEDULES, clip_and_step, learning_rates, make_optimizer
from output_head import head_is_last, in_chunks, look_at_head
from page import Page
from recompute import checkpoint_layers
from report import Clock, RunLog, quiet_libraries, reward_metrics, rollout_metrics, run_log, zero_spread_fraction
from rollouts import PLACEHOLDER_BIAS, Rollouts, RolloutsAhead, Server
from rows import NoRollouts, without_truncated
from shared_prefix import Block, Completions, Prefix, SharedPrompts
from vllm_server import VLLMServer

if TYPE_CHECKING:
    import verifiers as vf
    from verifiers.types import GenerateOutputs

# ---------------------------------------------------------------------------------------------------------------------
# The equations


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
        raise ValueError(f"rewards: expected finite values of shape (B,), got {rewards.tolist()}")
    group_ids = torch.zeros_like(rewards).long() if group_ids is None else group_ids
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids: expected shape {tuple(rewards.shape)}, got {tuple(group_ids.shape)}")
    exact = rewards.double()  # in float32 the mean of eight times 0.7 is not 0.7, and 1e-8 / 1e-8 is a large advantage
    advantages = torch.zeros_like(exact)
    for group in group_ids.unique():
        rows = group_ids == group
        members = exact[rows]
        if (members == members[0]).all():
            continue
        advantages[rows] = members - members.mean()
        if scale != "none":
            advantages[rows] /= (members if scale == "group" else exact).std() + 1e-4
    return advantages.float()


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, banned_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of the distribution it was drawn from.

        log p = log_softmax((logits + bias) / temperature)

    in float32 whatever the logits' type (a bf16 log-softmax is off by percents). Bias and temperature are those of the
    sampling: the policy that acts is the policy that is trained.

    Args:
        logits, targets: (..., V), and (...) token ids.
        banned_ids: ids for which the server was asked for a logit_bias of -100.

    Returns:
        (logprobs, entropies): (...) float32 each, in nats; entropies without gradient.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    bias = torch.zeros(logits.shape[-1], device=logits.device)
    bias[list(banned_ids)] = PLACEHOLDER_BIAS
    all_logprobs = torch.log_softmax((logits.float() + bias) / temperature, dim=-1)
    logprobs = all_logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # a metric; remove no_grad to train an entropy bonus, which costs one (..., V) tensor
        entropies = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return logprobs, entropies


LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "masked")


def policy_term(
    loss_type: str, ratio: Tensor, A: Tensor, logprobs: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """What a loss minimises for each token, and where its clip binds; (B, T) each, from ratio, A (B, 1) and logprobs.

    To add a loss: its name above and its term here. Its mean is over all tokens, unless `token_weights` knows it.
    """
    if loss_type == "cispo":  # every token keeps its gradient, bounded: the ratio is a constant factor
        return -ratio.clamp(max=1 + clip_high).detach() * A * logprobs, ratio > 1 + clip_high
    if loss_type == "masked":  # nothing but [mask_ratio_low, mask_ratio_high] bounds the ratio
        return -ratio * A, torch.zeros_like(ratio, dtype=torch.bool)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)  # PPO's: no gain from going further than the clip
    return -torch.minimum(ratio * A, bounded * A), bounded * A < ratio * A


def token_weights(loss_mask: Tensor, loss_type: str, max_tokens: int | None = None) -> Tensor:
    """The weight of each token in the loss: loss = sum(weights * per-token loss).

    The weights are those of the whole batch. Micro-batches take their rows of them, so their losses and gradients add
    up to the whole batch's, however it is split; normalising each micro-batch by itself would not.

    Args:
        loss_mask: (B, T), 1 on trained tokens.
        loss_type: "grpo", "gspo": mean over a row's tokens, then over the B rows (an empty row counts as a zero).
            "dr_grpo": 1 / (B * max_tokens). Every other: mean over all tokens of the batch.
        max_tokens: for "dr_grpo": the longest completion that could have been sampled.

    Returns:
        (B, T) float32, 0 where loss_mask is 0.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: must be one of {list(LOSS_TYPES)}")
    mask, B = (loss_mask != 0).float(), max(len(loss_mask), 1)
    if loss_type in ("grpo", "gspo"):
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / B
    if loss_type == "dr_grpo":
        if max_tokens is None or max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: loss_type 'dr_grpo' needs the completions' limit, at least 1")
        return mask / (B * max_tokens)
    return mask / mask.sum().clamp(min=1)


def row_ratio(log_ratio: Tensor, trained: Tensor) -> Tensor:
    """GSPO's one ratio a row, exp(mean of the row's log-ratios), in each of its columns: (B, T)."""
    tokens = trained.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    return (log_ratio.sum(-1, keepdim=True) / tokens).exp().expand_as(log_ratio)


def k3(gap: Tensor) -> Tensor:
    """exp(gap) - gap - 1, gap = log other - log policy: estimates KL(policy || other), joschu.net/blog/kl-approx.html.

    In float64: in float32 that of a small gap is rounding noise of either sign.
    """
    gap = gap.double()
    return (torch.expm1(gap) - gap).float()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where the mask is True, without gradient; 0 where it is nowhere."""
    return torch.where(mask, values.detach().float(), 0.0).sum() / mask.sum().clamp(min=1)


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

    In every type a token whose ratio lies outside [mask_ratio_low, mask_ratio_high] loses its policy term. Papers: grpo
    2402.03300, dr_grpo 2503.20783, dapo 2503.14476, gspo 2507.18071, cispo 2506.13585 (https://arxiv.org/abs/...);
    masked as in verifiers' RLTrainer.

    Args:
        logprobs: (B, T) of the policy in training, with gradient.
        behavior_logprobs: (B, T) of the policy that sampled.
        advantages, weights: (B,), and (B, T) from `token_weights`. Where a weight is 0 nothing else is looked at.
        ref_logprobs: (B, T) of the reference policy; needed when beta > 0.

    Returns:
        (loss, metrics): a scalar, and detached scalars over the tokens with weight > 0: mismatch_kl (mean k3 to the
        behaviour policy), logprob_difference (mean |log-ratio|), ratio_min, ratio_max, clip_fraction, masked_fraction,
        and kl (to the reference) when beta > 0.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: must be one of {list(LOSS_TYPES)}")
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: beta={beta} needs the reference policy's logprobs, got None")
    trained = weights > 0  # (B, T)

    def difference(one: Tensor, other: Tensor) -> Tensor:
        # select before exp: an untrained token may hold anything, and 0 * inf is NaN. exp(20) is beyond every clip.
        return torch.where(trained, one - other, 0.0).clamp(-20.0, 20.0)

    log_ratio = difference(logprobs, behavior_logprobs)
    token_ratio = log_ratio.exp()
    ratio = row_ratio(log_ratio, trained) if loss_type == "gspo" else token_ratio
    term, clipped = policy_term(loss_type, ratio, advantages.unsqueeze(-1), logprobs, clip_low, clip_high)
    dropped = (ratio < mask_ratio_low) | (ratio > mask_ratio_high)
    per_token = torch.where(dropped, 0.0, term)

    counted, ratios = trained | ~trained.any(), token_ratio.detach()  # where nothing is trained every ratio is 1
    metrics = {
        "mismatch_kl": masked_mean(k3(log_ratio), trained),
        "logprob_difference": masked_mean(log_ratio.abs(), trained),
        "ratio_min": torch.where(counted, ratios, math.inf).min(),
        "ratio_max": torch.where(counted, ratios, -math.inf).max(),
        "clip_fraction": masked_mean(clipped, trained),
        "masked_fraction": masked_mean(dropped, trained),
    }
    if beta > 0:
        penalty = k3(difference(ref_logprobs, logprobs))
        per_token = per_token + beta * penalty
        metrics["kl"] = masked_mean(penalty, trained)
    return torch.where(trained, weights * per_token, 0.0).sum(), metrics


# ---------------------------------------------------------------------------------------------------------------------
# Batch

TOKEN_FIELDS = ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")  # (B, L)
ROW_FIELDS = ("rewards", "group_ids", "rollout_ids", "is_truncated")  # (B,)


@dataclass
class MultimodalBatch:
    """What one update trains on. Text tensors have fixed names; media are whatever the model's forward takes.

    A tensor named in `media_spans` is stored once and owned by spans of its rows: row i of the batch owns its rows
    [start, stop), and rows of a group may own the same span. Qwen's flat patches, a row with two images and one with
    none, LLaVA-NeXT tiles: all are spans. Any other tensor is batched along dim 0, such as (B, C, H, W) pixels, or
    per-token tensors of shape (B, L). A batch is validated when it is made, and not again by `to` and `select`.

    Raises:
        ValueError: names the field, what was expected and what it got.
    """

    input_ids: Tensor  # (B, L) long, prompt and completion, padded anywhere
    attention_mask: Tensor  # (B, L), 0 on padding
    loss_mask: Tensor  # (B, L), 1 on sampled tokens, the stop token included; 0 at position 0, which nothing predicts
    behavior_logprobs: Tensor  # (B, L) float, the server's logprob of each sampled token, 0 elsewhere
    rewards: Tensor  # (B,) float, finite
    pixel_values: Tensor | None = None  # passed to the forward under that name; left out when None
    extra_model_kwargs: dict[str, Tensor] = field(default_factory=dict)  # further tensors for the forward, by name
    group_ids: Tensor | None = None  # (B,) long, equal where rows answer the same prompt; None: one group
    media_spans: dict[str, Tensor] = field(default_factory=dict)  # name -> (B, 2) long, on the CPU, where they are read
    rollout_ids: Tensor | None = None  # (B,) long, equal in the rows of a split rollout: its reward counts once
    is_truncated: Tensor | None = None  # (B,) bool, rows that were cut off at a limit; None: not known

    def __post_init__(self) -> None:
        expect_batch(self, TOKEN_FIELDS, ROW_FIELDS)

    @property
    def media(self) -> dict[str, Tensor]:
        """Every tensor for the forward beside ids and attention mask, by argument name."""
        pixels = {} if self.pixel_values is None else {"pixel_values": self.pixel_values}
        return {**pixels, **self.extra_model_kwargs}

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> MultimodalBatch:
        """The same batch with every tensor but the spans on `device`."""
        media = {name: tensor.to(device) for name, tensor in self.media.items()}
        return self._changed(lambda tensor: tensor.to(device), media, self.media_spans)

    def select(
        self, rows: Tensor | Sequence[int], with_media: bool = True, width: int | None = None
    ) -> MultimodalBatch:
        """The batch of these rows, in this order, and of its first `width` columns, where all others are padding. Media
        that they own are taken along, shared ones still once."""
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            raise ValueError("rows: expected row numbers, got a bool mask; use mask.nonzero()[:, 0]")
        rows, index = rows.long().cpu(), rows.long().to(self.input_ids.device)
        media, spans = {}, {}
        for name, tensor in self.media.items() if with_media else ():
            if name in self.media_spans:
                media[name], spans[name] = select_spans(tensor, self.media_spans[name][rows])
            else:
                media[name] = tensor[index, :width] if tensor.shape == self.input_ids.shape else tensor[index]
        return self._changed(lambda tensor: tensor[index, :width] if tensor.ndim > 1 else tensor[index], media, spans)

    def _changed(self, change: Callable[[Tensor], Tensor], media: dict, spans: dict) -> MultimodalBatch:
        """A copy, `change` applied to what is by row, with these media. Not validated: a valid batch stays one."""
        new = copy.copy(self)
        for name in (*TOKEN_FIELDS, *ROW_FIELDS):
            value = getattr(self, name)
            setattr(new, name, None if value is None else change(value))
        new.media_spans, new.pixel_values = spans, media.get("pixel_values")
        new.extra_model_kwargs = {name: tensor for name, tensor in media.items() if name != "pixel_values"}
        return new

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the forward, with each row's media; those that no row owns are left out."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.media}
        for name, spans in self.media_spans.items():
            inputs[name] = take_spans(inputs[name], spans.tolist())
            if len(inputs[name]) == 0:
                del inputs[name]
        return inputs


NOTHING = MultimodalBatch(*[torch.zeros(0, 1).long()] * 3, torch.zeros(0, 1), torch.zeros(0))  # a batch of no rows

# ---------------------------------------------------------------------------------------------------------------------
# Adapter: what a model family has to say


class MultimodalAdapter(ABC):
    """Turns rollouts into a batch for a model; the only place that knows what the model's forward takes.

    `adapters.ProcessorAdapter` serves every family with a Transformers processor; docs/fork.md writes one in 14 lines.
    """

    # Token ids that stand for media (image, video). They are never sampled: requests carry a logit_bias of -100 for
    # them, and `score` applies the same, so that the ratio stays exact.
    placeholder_ids: Sequence[int] = ()

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    @abstractmethod
    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """The batch of these rollouts, on the CPU; those that cannot be trained on are left out, with a warning.

        Args:
            outputs: verifiers' own type. Rollout i is `outputs["outputs"][i]`; its reward `["reward"]`, its prompt's
                identity `["example_id"]`; of its turn k `["trajectory"][k]` the messages with their images are
                `["prompt"]`, the server's `["tokens"]` are prompt_ids, completion_ids and completion_logprobs.
        """

    def save_pretrained(self, folder: str | Path) -> None:
        """Save what is needed to load the checkpoint again, beside the weights."""
        self.tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Config: the types carry the rules

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AtLeast0, AtLeast1, AtLeast2 = (Annotated[int, Field(ge=least)] for least in range(3))


def option(default: Any, help: str) -> Any:
    """A config field: its default and its line of --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class MultimodalRLConfig:
    """Every setting of a run. Flat; parsed from the command line; impossible values are refused when it is made."""

    output_dir: str = option("outputs", "folder for checkpoints, metrics and curves; must not hold an earlier run")
    resume_from_checkpoint: str | None = option(None, "go on from this folder; true: from the newest in output_dir")
    max_steps: AtLeast0 = option(500, "steps: one collects rollouts_per_step rollouts and trains on them")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = option(0, "of prompt order, local sampling, the demo's weights")
    save_steps: AtLeast0 = option(100, "steps between checkpoints; 0: only where the run ends")
    save_total_limit: AtLeast0 = option(3, "keep the newest so many checkpoints; 0: all")
    eval_steps: AtLeast0 = option(0, "steps between evaluations during training; 0: none")
    eval_examples: AtLeast0 = option(256, "examples of the greedy evaluation before and after training; 0: none")
    log_every_steps: AtLeast1 = option(1, "steps between lines of metrics.jsonl")
    report_steps: AtLeast0 = option(50, "steps between writings of report.html; 0: only where the run ends")
    report_rollouts: AtLeast0 = option(16, "rollouts a step in it, whole groups, at least one; 0: no report")
    report_to: str | None = option(None, "dashboards, separated by commas: tensorboard, wandb, trackio; unset: none")
    env_id: str = option("shapes-env", "verifiers environment: any installed one")
    env_args: dict | str | None = option(None, "its arguments, as JSON")  # a dict in Python
    primary_reward_key: str = option("reward", "what is trained: 'reward' (the rubric's sum) or one of its metrics")
    processor_kwargs: dict | str | None = option(None, 'for the processor, as JSON: {"max_pixels": 401408}')
    max_image_pixels: AtLeast1 = option(16_000_000, "of a picture or a video's frames together; more are refused")
    allowed_local_media_path: str | None = option(None, "folder below which file:// pictures are read; unset: none")
    allowed_media_domains: str | None = option(None, "hosts of http(s):// pictures, separated by commas; unset: none")
    on_control_tokens: Literal["warn", "error"] = option("warn", "where text became control tokens on the server")
    rollouts_per_step: AtLeast1 = option(128, "rollouts a step, a multiple of rollouts_per_example")
    rollouts_per_example: AtLeast2 = option(8, "group size G: completions sampled of each prompt")
    max_tokens: AtLeast1 = option(512, "longest completion of one turn, in tokens")
    temperature: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = option(1.0, "of sampling; logprobs use it too")
    rollout_timeout: Positive = option(3600.0, "seconds until a rollout, its reward included, is given up")
    vllm_server_host: str | None = option(None, "host of a vLLM server for the rollouts; unset: in this process")
    vllm_server_port: Annotated[int, Field(gt=0, lt=65536)] = option(8000, "its port")
    vllm_api_key: str | None = option(None, "its --api-key")
    vllm_server_timeout: Positive = option(240.0, "seconds to wait for it, and for each part of a weight update")
    generation_timeout: Positive = option(600.0, "seconds until a request for a completion to a vLLM server fails")
    max_concurrent: AtLeast1 = option(512, "rollouts in flight at once on a vLLM server")
    sync_to_vllm_every: AtLeast0 = option(1, "steps between weight updates of the vLLM server; 0: never")
    weight_sync_dir: str | None = option(None, "folder for weight updates, seen by both; unset: output_dir/weights")
    async_rollouts: bool = option(False, "vLLM samples the next step's rollouts meanwhile: one step off-policy")
    mismatch_threshold: Positive | None = option(None, "of logprob_difference; unset: 1e-3 in float32, else 0.1")
    on_mismatch: Literal["warn", "error"] = option("warn", "where it is exceeded on-policy: warn, or stop the run")
    loss_type: Literal[LOSS_TYPES] = option("dapo", "see the table in the README")
    scale_rewards: Literal["group", "batch", "none"] = option("group", "whose spread advantages are divided by")
    clip_low: Annotated[float, Field(ge=0, lt=1)] = option(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: Annotated[float, Field(ge=0)] = option(0.2, "the ratio is clipped above 1 + clip_high")
    mask_ratio_low: Annotated[float, Field(ge=0, le=1)] = option(0.1, "tokens with a smaller ratio are dropped")
    mask_ratio_high: Annotated[float, Field(ge=1)] = option(10.0, "tokens with a larger ratio are dropped")
    beta: NotNegative = option(0.0, "weight of the KL penalty to the initial policy (LoRA: to the base)")
    updates_per_batch: AtLeast1 = option(1, "optimizer steps on each batch; above 1 off-policy, the clip matters")
    mask_truncated_completions: bool = option(False, "do not train on completions that were cut off at max_tokens")
    learning_rate: Positive = option(1e-6, "AdamW's learning rate, the largest of the schedule")
    lr_scheduler_type: Literal[SCHEDULES] = option("constant", "linear and cosine fall to zero at max_steps")
    warmup_steps: AtLeast0 = option(0, "steps in which the rate rises to learning_rate; not where it is constant")
    optim: Literal[OPTIMIZERS] = option("adamw_torch", "adamw_8bit (bitsandbytes): 2 bytes of state a parameter for 8")
    weight_decay: NotNegative = option(0.0, "AdamW's weight decay")
    max_grad_norm: Positive = option(1.0, "gradients are scaled down to this norm")
    lora_rank: AtLeast0 = option(0, "train LoRA adapters of this rank (peft) beside the weights; 0: the weights")
    lora_alpha: AtLeast1 | None = option(None, "what they add is scaled by lora_alpha / lora_rank; unset: by 2")
    lora_target_modules: str | None = option(None, "a,b: names of layers, or a regex; unset: the language model's")
    merge_adapter: bool = option(False, "checkpoints hold the whole model too, in merged/")
    freeze: str | None = option(None, "regex: parameters in whose published name it is found are not trained")
    param_dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights; bfloat16: see docs/gpus.md")
    bf16: bool = option(False, "forward passes in bfloat16 autocast; weights and optimizer stay as they are")
    micro_batch_tokens: AtLeast1 = option(8192, "tokens a forward pass; changes memory and speed, not the gradient")
    gradient_checkpointing: bool = option(False, "make activations again in the backward: slower, much less memory")
    share_prefix: bool = option(True, "run each distinct prompt once an update; same numbers, less work")
    shard: bool = option(False, "each rank holds a share of the language model (FSDP2); needs vllm_server_host")
    ddp_timeout: Positive = option(7200.0, "seconds that a rank waits for the others, which may still roll out")

    def __post_init__(self) -> None:
        check_config(self)


# ---------------------------------------------------------------------------------------------------------------------
# Policy: the probability of each token


class Policy(nn.Module):
    """The model as the trainer calls it and FSDP wraps it: `score`. `version` counts the steps that it was trained."""

    def __init__(self, model: nn.Module, temperature: float = 1.0, placeholder_ids: Sequence[int] = (), bf16=False):
        super().__init__()
        self.model, self.temperature, self.placeholder_ids, self.bf16 = model, temperature, placeholder_ids, bf16
        self.version = 0
        self.head_is_last = self.sharing_is_exact = self.later_media_are_exact = None  # bool, the first batch tells

    def forward(self, batch: MultimodalBatch, shared: SharedPrompts | Completions | None = None, cast: bool = True):
        """(logprobs, entropies) of this batch, (B, T) each; without `cast`, in the weights' own precision."""
        look_at_head(self, shared.prompts if isinstance(shared, SharedPrompts) else batch)
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.bf16 and cast):
            return score(self.model, batch, self.temperature, self.placeholder_ids, shared, self.head_is_last)

    def run_prompts(self, shared: SharedPrompts) -> Prefix:
        """Run these prompts for `forward` to go on from; what goes on from them goes backward before they do."""
        look_at_head(self, shared.prompts)
        body = self.model.base_model if self.head_is_last else self.model
        with torch.autocast(shared.prompts.input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            return shared_prefix.run_prompts(body, shared.model_inputs()).cut()


def score(
    model: nn.Module,
    batch: MultimodalBatch,
    temperature: float = 1.0,
    placeholder_ids: Sequence[int] = (),
    shared: SharedPrompts | Completions | None = None,
    chunked: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The policy's view of the batch's tokens: the forward of the vision-language model, gradients on.

    Args:
        model: called as `model(input_ids=..., attention_mask=..., pixel_values=..., **extra_model_kwargs)`, with
            pixel_values left out where there are none; returns logits (B, L, V), as an attribute or as they are.
        batch: on the model's device.
        temperature, placeholder_ids: of the sampling; these ids were asked for with a logit_bias of -100.
        shared: from `find_shared_prompts`, to run each distinct prompt once; same numbers at trained tokens.
        chunked: run the model's body, then its output head on a chunk of tokens at a time; else the model's own
            forward. None: find out whether that is the same (`head_is_last`).

    Returns:
        (logprobs, entropies): (B, T) float32 each; [:, t] is about token t + 1, given the tokens up to t. With `shared`
        they are 0 where nothing is trained.
    """
    if chunked is None:
        chunked = head_is_last(model, shared.prompts if shared else batch)
    body, head = (model.base_model, model.get_output_embeddings()) if chunked else (model, nn.Identity())

    def logprobs_of(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (n, H), (n,)
        return token_logprobs(head(hidden), targets, temperature, placeholder_ids)

    if shared is not None:
        return shared_prefix.score_shared(body, batch, shared, functools.partial(in_chunks, logprobs_of))
    output = body(**batch.model_inputs())
    hidden = output if isinstance(output, Tensor) else output[0]  # (B, L, H); logits (B, L, V) of a whole model
    return in_chunks(logprobs_of, hidden[:, :-1], batch.input_ids[:, 1:])


# ---------------------------------------------------------------------------------------------------------------------
# Trainer


class MultimodalGRPOTrainer:
    """GRPO: collect rollouts, build the batch, update the policy, bring the server up to date; over and over.

    Args:
        model: the policy, on its device; a Transformers model, or any module that `score` can call. It is put into
            eval mode: no dropout, on either side of the ratio.
        tokenizer, adapter: of its family; saved with each checkpoint. config: see MultimodalRLConfig.
        env: a verifiers environment; or call `set_environment`.
        server: where completions come from; None: a LocalServer in this process, or the vLLM server that config names.
    """

    env = property(lambda self: self.rollouts.env, lambda self, env: setattr(self.rollouts, "env", env))

    def __init__(self, model, tokenizer, adapter, config: MultimodalRLConfig, env=None, server: Server | None = None):
        self.model, self.tokenizer, self.adapter, self.config = model.eval(), tokenizer, adapter, config
        parallel.start(config, model)
        checkpoint_layers(model, config.gradient_checkpointing)
        choose_trained(model, config, published_names(model))
        self.policy = Policy(model, config.temperature, adapter.placeholder_ids, config.bf16)
        self.ref_policy = reference_of(self.policy) if config.beta > 0 else None
        parallel.shard(config.shard, self.policy, self.ref_policy)
        self.device, self.clock, self.page = next(model.parameters()).device, Clock(), Page(adapter, config)
        self.optimizer, self.learning_rate = make_optimizer(model.parameters(), config), learning_rates(config)
        names = ("loss_type", "clip_low", "clip_high", "mask_ratio_low", "mask_ratio_high", "beta")
        self.loss = functools.partial(grpo_loss, **{name: getattr(config, name) for name in names})
        kind = LocalServer if config.vllm_server_host is None else VLLMServer
        self.server = server = server or kind.from_config(model, adapter, config)
        self.micro_batch_tokens, self.skipped = config.micro_batch_tokens, 0  # as memory allows; updates in a row
        kind = RolloutsAhead if config.async_rollouts else Rollouts
        self.rollouts = kind(self.policy, adapter, server, config, self.clock, env)

    def set_environment(self, id_or_env: str | vf.Environment, **env_args) -> None:
        """Train on this verifiers environment: an installed one's id with its arguments, or the environment itself."""
        import verifiers as vf

        self.rollouts.env = vf.load_environment(id_or_env, **env_args) if isinstance(id_or_env, str) else id_or_env

    @parallel.leaving(NoRollouts)
    def step(self) -> dict[str, float]:
        """Collect, build, update, sync. Returns the step's metrics (docs/metrics.md says what they mean)."""
        self.clock.restart()
        outputs, lag = self.rollouts.collect(), self.rollouts.lag
        with deferred_signals():  # a step is trained whole or not at all
            with self.clock("update"):
                batch = parallel.together(lambda: self.adapter.build_batch(outputs), NoRollouts) or NOTHING
                metrics = self.update(batch, on_policy=lag == 0)
            self.policy.version += 1
            self.rollouts.sync_when_due()
        self.page.step(self.policy.version, outputs, batch)
        metrics = {"step": self.policy.version, **rollout_metrics(outputs, batch), **metrics, "lag": lag}
        return metrics | self.clock.metrics()

    def update(self, batch: MultimodalBatch, on_policy: bool = True) -> dict[str, float]:
        """Train on one batch: `updates_per_batch` optimizer steps. Returns the metrics of the first one, and those of
        the last one as `last_update/...`.

        Args:
            batch: as `build_batch` made it, on the CPU; with more ranks, this one's rows of the step.
            on_policy: whether the policy as it is now sampled it; then its logprobs must be the server's.
        """
        config = self.config
        batch = without_truncated(batch) if config.mask_truncated_completions else batch
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.policy.version)  # of all updates on the batch
        everyone, ours = parallel.everyone(batch)  # the rows of all ranks, and which of them are in this batch
        whole = {  # what the loss is made of; a micro-batch takes its rows
            "behavior_logprobs": everyone.behavior_logprobs[:, 1:],  # (B, T)
            "advantages": row_advantages(everyone, config.scale_rewards),  # (B,)
            "weights": token_weights(everyone.loss_mask[:, 1:], config.loss_type, config.max_tokens),  # (B, T)
        }
        own, trained = {name: each[ours].to(self.device) for name, each in whole.items()}, whole["weights"][ours] > 0
        self.page.advantages = whole["advantages"][ours]

        @functools.lru_cache(maxsize=1)
        def blocks(tokens: int) -> list[Block]:
            cut = shared_prefix.micro_batches(self.policy, batch, trained.any(-1), config, tokens)
            return [block.to(self.device) for block in cut]

        history = []  # the metrics of each update
        for i in range(config.updates_per_batch):
            settings = self.micro_batch_tokens, self.optimizer.zero_grad, not config.shard
            (logprobs, entropies), self.micro_batch_tokens = halving(lambda n: self.backward(blocks(n), own), *settings)
            parallel.sum_gradients(self.policy)
            whole = parallel.gather({**own, "logprobs": logprobs, "entropies": entropies})
            entropies = whole.pop("entropies")
            loss, values = self.loss(**whole)  # of the whole batch, for the metrics
            values |= {"loss": loss, "entropy": masked_mean(entropies, whole["weights"] > 0)}
            history.append(dict(zip(values, torch.stack(list(values.values())).tolist())))
            if i == 0 and on_policy:
                self.rollouts.check_on_policy(history[0]["logprob_difference"], self.optimizer.zero_grad)
            history[-1]["grad_norm"] = clip_and_step(self.optimizer, config.max_grad_norm)
            self.skipped = 0 if math.isfinite(history[-1]["grad_norm"]) else self.skipped + 1
            stop_where_skipped(self.skipped, {} if parallel.rank() else vars(batch), config.output_dir)
        return {
            **history[0],  # the first update is on-policy, later ones are not
            **{f"last_update/{name}": value for last in history[1:][-1:] for name, value in last.items()},
            "updates_skipped": sum(not math.isfinite(values["grad_norm"]) for values in history),
            "zero_spread_fraction": zero_spread_fraction(everyone),
            "shared_prefix_fraction": shared_prefix.shared_fraction(blocks(self.micro_batch_tokens)),
            "trained_tokens": int((everyone.loss_mask != 0).sum()),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def backward(self, blocks: list[Block], own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the micro-batches: they are the whole batch's. Returns its (logprobs, entropies)."""
        logprobs, entropies = torch.zeros_like(own["weights"]), torch.zeros_like(own["weights"])  # (B, T)
        if self.ref_policy is not None and "ref_logprobs" not in own:
            own["ref_logprobs"] = torch.zeros_like(logprobs)
            with torch.no_grad(), adapters_off(self.model):
                for part, reference, _ in shared_prefix.run(self.ref_policy, blocks):
                    own["ref_logprobs"][part.place] = reference
        for part, new, new_entropies in shared_prefix.run(self.policy, blocks):
            loss, _ = self.loss(new, **{name: part.take(tensor) for name, tensor in own.items()})
            loss.backward()
            logprobs[part.place], entropies[part.place] = new.detach(), new_entropies
        return logprobs, entropies

    @parallel.leaving()
    def evaluate(self) -> dict[str, float]:
        """Greedy rollouts of the first `eval_examples` evaluation examples: mean reward, mean of each metric."""
        note, step = self.page.evaluation, self.policy.version
        return reward_metrics(note(step, self.rollouts.evaluate())) if self.config.eval_examples else {}

    def train(self, log: RunLog | None = None) -> dict[str, float]:
        """Run up to step `max_steps`; log, evaluate before and after, save. Returns the last evaluation.
        RunStopped, NoRollouts (a fault that does not pass) and a signal end it early, with a checkpoint all the same.
        """
        config, state = self.config, RunState(self)
        with deferred_signals(announce=True) as came, log or run_log(config) as log:
            self.prepare()
            log.start(self)
            if self.policy.version == 0:
                log.evaluation("before training", self.evaluate())
            try:
                while self.policy.version < config.max_steps and not parallel.came_to_any(came):
                    metrics = after_pauses(self.step, NoRollouts, came, parallel.came_to_any)
                    if config.eval_steps and self.policy.version % config.eval_steps == 0:
                        metrics |= {f"eval/{name}": value for name, value in self.evaluate().items()}
                    log.step(metrics)
                    if config.save_steps and self.policy.version % config.save_steps == 0:
                        state.save()
            finally:  # whatever ends a run, it keeps what it has learned
                self.rollouts.stop()
                saved = state.save()
            log.end_where_interrupted(parallel.came_to_any(came), saved)
            log.evaluation("after training", final := self.evaluate())
            log.finish(saved or state.save() or state.save_elsewhere())
        return final

    def prepare(self) -> None:
        """Before training: look at the environment, seed what draws from global generators, or resume."""
        self.rollouts.check()
        RunState(self).resume()

    def save_checkpoint(self, folder: str | Path) -> None:
        """Weights, tokenizer and what the adapter adds, as `from_pretrained` and vLLM read them."""
        save_checkpoint(Path(folder), self.model, self.adapter, self.tokenizer, merge=self.config.merge_adapter)

    def close(self) -> None:
        """Let go of the server and the event loop: no step and no evaluation after it."""
        self.rollouts.close()


def row_advantages(batch: MultimodalBatch, scale: str) -> Tensor:
    """(B,) advantages; a rollout that was split into several rows counts once in its group's mean."""
    ids = torch.arange(len(batch)) if batch.rollout_ids is None else batch.rollout_ids
    rollouts, rollout_of_row = ids.unique(return_inverse=True)
    first_rows = [int((rollout_of_row == i).nonzero()[0]) for i in range(len(rollouts))]
    groups = None if batch.group_ids is None else batch.group_ids[first_rows]
    return group_advantages(batch.rewards[first_rows], groups, scale)[rollout_of_row]


# ---------------------------------------------------------------------------------------------------------------------
# Command line

# A run that fits a tiny model with random weights: what --demo sets, and what holds where no --model is given
DEMO = {"learning_rate": 1.2e-3, "lr_scheduler_type": "linear", "max_steps": 280, "rollouts_per_example": 4}
DEMO |= {"updates_per_batch": 3, "max_tokens": 3, "scale_rewards": "batch", "beta": 0.1}


def main(argv: Sequence[str] | None = None) -> None:
    from adapters import ADAPTERS, load_model

    config, arguments = parse_arguments(MultimodalRLConfig, DEMO, __doc__, ADAPTERS, argv)
    quiet_libraries()
    with contextlib.ExitStack() as stack:
        with one_line_errors(Exception, code=2):  # the user's to mend, before anything is trained
            parallel.start(config)
            log = stack.enter_context(run_log(config))
            model, tokenizer, adapter = load_model(arguments.adapter, arguments.model, config)
            model = model if config.shard else model.to(parallel.device())
            trainer = MultimodalGRPOTrainer(model, tokenizer, adapter, config)
            stack.enter_context(contextlib.closing(trainer))
            log.describe(trainer, DEMO if arguments.demo else ())
            trainer.set_environment(config.env_id, **config.env_args)
            trainer.prepare()
        gc.freeze()  # what the imports have made stays; full collections would look through it every ten steps
        with one_line_errors(RunStopped, NoRollouts, TimeoutError, code=1):
            trainer.train(log)


if __name__ == "__main__":
    from mm_grpo import main  # not the module a second time as __main__: adapters import it by name

    main()
