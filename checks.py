"""Errors that name the field, what was expected and what it got."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

# Why a rollout is left out: an exception in it or a malformed rollout; a reward function failed or gave no finite
# float32; it took too long; an error of the server or its client; nothing was sampled, or ids or logprobs are missing
# or impossible; the policy sampled a placeholder; a medium that cannot be loaded or does not fill its placeholders.
CAUSES = ("environment", "reward", "timeout", "server", "tokens", "placeholder", "media")
TRACKERS = ("tensorboard", "wandb", "trackio")  # dashboards that a run can report to


def expect(name: str, holds: Any, expected: str, got: Any) -> None:
    """Raise ValueError where `holds` (a bool, or a tensor of one) is not true."""
    if not bool(holds):
        raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_shape(name: str, tensor: Any, *shape: int | str) -> None:
    """A tensor of this shape; a letter stands for any size."""
    text = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    expect(name, isinstance(tensor, Tensor), f"a tensor of shape {text}", type(tensor).__name__)
    fits = all(isinstance(size, str) or size == actual for size, actual in zip(shape, tensor.shape))
    expect(name, fits and tensor.ndim == len(shape), f"shape {text}", tuple(tensor.shape))


def expect_batch(batch: Any, token_fields: Sequence[str], row_fields: Sequence[str]) -> None:
    """The fields of a `MultimodalBatch` fit each other: (B, L) those of tokens, (B,) those of rows (or None)."""
    ids = batch.input_ids
    expect_shape("input_ids", ids, "B", "L")
    expect("input_ids", not (ids.is_floating_point() or ids.dtype == torch.bool), "token ids (long)", ids.dtype)
    B, L = ids.shape
    for name in token_fields:
        expect_shape(name, getattr(batch, name), B, L)
    for name in row_fields:
        if getattr(batch, name) is not None or name == "rewards":
            expect_shape(name, getattr(batch, name), B)
    trained = batch.loss_mask != 0
    expect("loss_mask", not (trained & (batch.attention_mask == 0)).any(), "0 on padding", "1 on a padded token")
    expect("loss_mask", not trained[:, :1].any(), "0 at position 0, which nothing predicts", "1 there")
    expect("rewards", torch.isfinite(batch.rewards).all(), "finite values", batch.rewards.tolist())
    reported = torch.isfinite(batch.behavior_logprobs[trained])
    expect("behavior_logprobs", reported.all(), "finite values on trained tokens", "inf or NaN")
    for name in {"input_ids", "attention_mask", "pixel_values"} & batch.extra_model_kwargs.keys():
        expect(f"extra_model_kwargs[{name!r}]", False, f"to be given as {name}", "a second one")
    expect_media(batch.media, batch.media_spans, B)


def expect_media(media: dict[str, Any], media_spans: dict[str, Any], B: int) -> None:
    """Every medium is a tensor with a row for each of B sequences, or one whose rows `media_spans` gives to them."""
    for name in media_spans.keys() - media.keys():
        expect(f"media_spans[{name!r}]", False, f"the name of a tensor, one of {sorted(media)}", repr(name))
    for name, tensor in media.items():
        expect(name, isinstance(tensor, Tensor), "a tensor", type(tensor).__name__)
        rows, spans = len(tensor) if tensor.ndim else None, media_spans.get(name)
        if spans is None:
            by_row = f"{B} rows along dim 0 (one a sequence), or an entry in media_spans"
            expect(name, rows == B, by_row, tuple(tensor.shape))
        else:
            name = f"media_spans[{name!r}]"
            expect_shape(name, spans, B, 2)
            inside = (spans[:, 0] >= 0) & (spans[:, 0] <= spans[:, 1]) & (spans[:, 1] <= rows)
            expect(name, inside.all(), f"0 <= start <= stop <= {rows} rows of the tensor", spans.tolist())


def check_config(config: Any) -> None:
    """Each field of a `MultimodalRLConfig` must be what its annotation says, and the fields must fit each other. Those
    of JSON become dicts.

    Raises:
        ValueError: names the field, its value and the rule.
    """
    check_types(config)
    config.env_args, config.processor_kwargs = json_object(config, "env_args"), json_object(config, "processor_kwargs")
    rule = f"must be a multiple of rollouts_per_example={config.rollouts_per_example}"
    check_setting(config, "rollouts_per_step", config.rollouts_per_step % config.rollouts_per_example == 0, rule)
    rule = "must be 0 with lr_scheduler_type='constant', which ignores it; or take 'constant_with_warmup'"
    check_setting(config, "warmup_steps", not config.warmup_steps or config.lr_scheduler_type != "constant", rule)
    rule = "must have a vllm_server_host: for rollouts in this process each rank would need the whole model"
    check_setting(config, "shard", not config.shard or config.vllm_server_host is not None, rule)
    for name in ("lora_alpha", "lora_target_modules", "merge_adapter"):
        check_setting(config, name, config.lora_rank or not getattr(config, name), "must be unset without lora_rank")
    rule = "must be unset with lora_rank, which trains adapters alone (lora_target_modules says of which layers)"
    check_setting(config, "freeze", not (config.freeze and config.lora_rank), rule)
    unknown = [name for name in (config.report_to or "").split(",") if name.strip() not in ("", *TRACKERS)]
    check_setting(config, "report_to", not unknown, f"must be names of {', '.join(TRACKERS)}, separated by commas")
    for name in ("freeze", "lora_target_modules"):
        try:
            re.compile(getattr(config, name) or "")
        except re.error as error:
            check_setting(config, name, False, f"must be a regular expression ({error})")


def check_setting(config: Any, name: str, holds: bool, rule: str) -> None:
    """Raise ValueError with the setting's name, its value and the rule, where the rule does not hold."""
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r}: {rule}")


def json_object(config: Any, name: str) -> dict:
    """The setting as a dict: it may be one, JSON text of one, or None for an empty one."""
    value = getattr(config, name)
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    value = {} if value is None else value
    check_setting(config, name, isinstance(value, dict), "must be a JSON object")
    return value


def check_types(config: Any) -> None:
    """Each field of a dataclass must be what its annotation says, bounds included (`Annotated[int, Field(ge=1)]`)."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        try:
            TypeAdapter(kind).validate_python(getattr(config, name), strict=True)
        except ValidationError as error:
            check_setting(config, name, False, error.errors()[0]["msg"].replace("Input should", "must"))


def finite_float32(value: Any) -> float | None:
    """The value as a number that float32 can hold; None for whatever is none, such as NaN, 1e39, None and texts."""
    try:
        number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except Exception:  # of whatever type it is, its own
        return None
    return number if abs(number) <= torch.finfo(torch.float32).max else None


def fault_of(rollout: dict) -> tuple[str, str] | None:
    """(cause, one of CAUSES; what happened) of a rollout that failed, came back without a turn or has no reward."""
    error, cause, reward = rollout.get("error"), rollout.get("dropped"), rollout.get("reward")
    if error or cause in CAUSES:
        chain = error if isinstance(error, dict) else {}
        names = str(chain.get("error_chain_str", error))
        by_name = "server" if re.search("Model(Response)?Error", names) else "environment"
        cause = cause if cause in CAUSES else "timeout" if "Timeout" in names else by_name
        return cause, f"error: {chain.get('error_chain_repr', error or 'it came marked')}"
    if not rollout.get("trajectory"):
        stopped = "prompt longer than the server's limit, or the environment stopped before a turn"
        return "tokens", f"nothing was sampled ({stopped})"
    if finite_float32(reward) is None:
        return "reward", f"reward={reward!r:.60}: must be a finite float32; look at the environment's rubric"
    return None


def expect_tokens(turn: str, tokens: Any, vocab_size: int | None) -> tuple[list[int], list[int], list[float]]:
    """(prompt ids, sampled ids, their logprobs) of a turn, if they are what can be trained on."""
    if not isinstance(tokens, dict):
        rule = "the request must ask for return_token_ids and logprobs, and the server know them (vLLM >= 0.10.2)"
        raise ValueError(f"{turn}: tokens: the server sent no token ids or logprobs: {rule}")
    an_id = "token ids of the vocabulary", lambda i: type(i) is int and 0 <= i < (vocab_size or 2**63)
    a_logprob = "finite numbers", lambda x: type(x) in (int, float) and finite_float32(x) is not None
    expected = {"prompt_ids": an_id, "completion_ids": an_id, "completion_logprobs": a_logprob}
    for name, (what, fits) in expected.items():
        values = tokens.get(name)
        wrong = [x for x in values if not fits(x)] if isinstance(values, list) else [values]
        expect(f"{turn}: {name}", not wrong, what, f"{wrong[:1]!r:.60}")
    prompt, sampled, logprobs = (tokens[name] for name in expected)
    expect(f"{turn}: prompt_ids", prompt, "at least one, which predicts the first sampled token", "none")
    expect(f"{turn}: completion_logprobs", len(sampled) == len(logprobs), f"{len(sampled)}", len(logprobs))
    return prompt, sampled, logprobs
