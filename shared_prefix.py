"""Each distinct prompt once: for generation, for scoring, for gradients.

The G completions of a prompt share the prompt and its images. The plain forward runs G * (P + C) tokens and encodes the
images G times; here the prompt is run once, gradients on, and the completions against its cache (keys and values, the
states of convolutions and linear attention): P + G * C tokens and one encoding, with the same logprobs and the same
gradients. `benchmark.py` measures it.

Dimensions: K distinct prompts of at most P tokens, B rows of at most C tokens after their prompt, L sequence length,
T = L - 1 predicted tokens, H hidden size.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from faults import is_out_of_memory

if TYPE_CHECKING:
    from mm_grpo import MultimodalBatch, MultimodalRLConfig, Policy

logger = logging.getLogger("mm_grpo")


@dataclass
class SharedPrompts:
    """The distinct prompts of B rows. A row's prompt is what stands before its first trained token. Which row has which
    stays on the CPU, where it is read to arrange the rows."""

    prompts: MultimodalBatch  # K rows of the batch, one of each prompt, with its media; longer than their prompts
    lengths: Tensor  # (K,) tokens of each prompt
    prompt_of_row: Tensor  # (B,)

    def select(self, rows: Sequence[int]) -> SharedPrompts | None:
        """The prompts of these rows; None where no two of them share one."""
        prompts, prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        if len(prompts) == len(rows):
            return None
        return SharedPrompts(self.prompts.select(prompts), self.lengths[prompts], prompt_of_row)

    def to(self, device: torch.device | str) -> SharedPrompts:
        return replace(self, prompts=self.prompts.to(device))

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the forward for the prompts, padded on the left: their last tokens share a column."""
        P = int(self.lengths.max())
        source = torch.arange(P) - (P - self.lengths)[:, None]  # (K, P) the column that comes here; negative: padding
        source, inside = source.clamp(min=0).to(self.prompts.input_ids.device), source >= 0
        inputs = self.prompts.model_inputs()
        for name in inputs.keys() - self.prompts.media_spans.keys():  # by token, (K, L)
            inputs[name] = inputs[name].gather(1, source) * inside.to(source.device)  # (K, P)
        return inputs


def find_shared_prompts(model: nn.Module, batch: MultimodalBatch, placeholder_ids: Sequence[int]):
    """The `SharedPrompts` of a batch; None where no two rows share one, or the plain forward has to do it.

    Two rows share their prompt when its ids, its media (their spans) and its per-token inputs are equal.
    """
    if reason := why_not_shared(model, batch, placeholder_ids):
        logger.info("prompts are not shared: %s", reason)
        return None
    ids, lengths = batch.input_ids.tolist(), prompt_lengths(batch).tolist()
    spans = [spans.tolist() for spans in batch.media_spans.values()]
    by_token = [tensor.tolist() for name, tensor in batch.media.items() if name not in batch.media_spans]
    prompts: dict[tuple, int] = {}  # all that makes a prompt -> the first row that has it
    first_of_row = []
    for row, length in enumerate(lengths):
        key = (*(tuple(column[row][:length]) for column in [ids, *by_token]), *(tuple(owned[row]) for owned in spans))
        first_of_row.append(prompts.setdefault(key, row))
    return SharedPrompts(batch, torch.tensor(lengths), torch.tensor(first_of_row)).select(range(len(batch)))


def prompt_lengths(batch: MultimodalBatch) -> Tensor:
    """(B,) tokens before each row's first trained one."""
    return (batch.loss_mask != 0).int().argmax(-1)


def why_not_shared(model: nn.Module, batch: MultimodalBatch, placeholder_ids: Sequence[int]) -> str | None:
    """What keeps this model from running this batch's prompts once each; None: nothing."""
    if not isinstance(model, GenerationMixin):
        return "the model has no key-value cache"
    if model.training and model.is_activation_checkpointing:
        return "activation checkpointing drops the key-value cache"
    B, L = batch.input_ids.shape
    column = torch.arange(L, device=batch.input_ids.device)
    if not torch.equal(batch.attention_mask != 0, column < batch.attention_mask.sum(-1, keepdim=True)):
        return "rows are not padded on the right"
    if not (batch.loss_mask != 0).any(-1).all():
        return "a row has no trained token"
    by_token = {name: tensor for name, tensor in batch.media.items() if name not in batch.media_spans}
    media = torch.isin(batch.input_ids, torch.tensor(list(placeholder_ids), dtype=torch.long, device=column.device))
    for name, tensor in by_token.items():
        if tensor.shape != (B, L):
            return f"{name} is stored by row"
        media = media | (tensor != 0)
    if (media & (column >= prompt_lengths(batch)[:, None])).any():
        return "media stand behind a row's first trained token"
    return None


class MicroBatch(NamedTuple):
    """The rows of one forward pass."""

    rows: Tensor  # (n,) their numbers in the whole batch
    batch: MultimodalBatch
    shared: SharedPrompts | None  # their prompts, to run each once; None: the plain forward

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(self.rows, self.batch.to(device), self.shared and self.shared.to(device))


def micro_batches(
    policy: Policy, batch: MultimodalBatch, rows: Tensor, config: MultimodalRLConfig, size: int | None = None
) -> list[MicroBatch]:
    """Cut a batch into parts of at most `size` rows (None: `micro_batch_size`), along its prompts.

    Args:
        policy: remembers whether its model can share prompts, found out with the first batch that would.
        rows: (B,) bool, those that have something to train; all are taken where none has.
        config: also says whether prompts are shared.
    """
    numbers = rows.nonzero()[:, 0] if rows.any() else torch.arange(len(batch))
    chosen = batch if len(numbers) == len(batch) else batch.select(numbers)
    shared = find_shared_prompts(policy.model, chosen, policy.placeholder_ids) if config.share_prefix else None
    if shared is not None and policy.sharing_is_exact is None:
        policy.sharing_is_exact = sharing_is_exact(policy, chosen, shared)
    if shared is not None and policy.sharing_is_exact is False:
        logger.info("prompts are not shared: %s gave other numbers or an error", type(policy.model).__name__)
        shared = None
    parts = []
    prompt_of_row = range(len(chosen)) if shared is None else shared.prompt_of_row.tolist()
    for part in cut_along_prompts(prompt_of_row, size or config.micro_batch_size):
        prompts = shared and shared.select(part)
        micro_batch = chosen.select(part, with_media=prompts is None)  # the prompts have the media
        parts.append(MicroBatch(numbers[part], micro_batch, prompts))
    return parts


def sharing_is_exact(policy: Policy, batch: MultimodalBatch, shared: SharedPrompts) -> bool | None:
    """Whether prompts that are run once give the logprobs and the gradient of each row alone, tried on three rows.

    Whatever a model does with its cache shows here, before anything is trained: it returns none, or one that has no
    rows to copy; a continuation does not go on from all of it, or writes where autograd looks. Such a model runs the
    prompt of every row, with a warning. None: no row goes on from its prompt, the next batch may tell.

    Raises:
        ValueError: these rows have other logprobs in one plain batch than alone: what is theirs went to another row.
    """
    rows = compared_rows(batch, shared)
    model, parameters = policy.model, list(policy.parameters())
    if int((batch.attention_mask.sum(-1) - shared.lengths[shared.prompt_of_row])[rows[0]]) == 1:
        return None

    def backward(rows: list[int], shared: SharedPrompts | None, sign: int) -> Tensor:
        part = MicroBatch(torch.tensor(rows), batch.select(rows, with_media=shared is None), shared)
        part = part.to(parameters[0].device)
        logprobs = policy(part.batch, part.shared, cast=False)[0][part.batch.loss_mask[:, 1:] != 0]
        (sign * logprobs.sum()).backward()
        return logprobs.detach()

    def norm() -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    policy.zero_grad(set_to_none=True)
    try:
        logprobs, of_shared = backward(rows, shared.select(rows), 1), norm()
        off = (logprobs - torch.cat([backward([row], None, -1) for row in rows])).abs().mean()
        left = norm() / of_shared  # of the gradient, once the plain one is taken away
        if off <= tolerance(model) and left <= 3 * tolerance(model):
            return True
        reason = f"logprobs are off by {off:.1e}, the gradient by {left:.1e} of its norm"
    except Exception as error:  # the cache is the model's own affair, and so is how it fails
        if is_out_of_memory(error):  # which says nothing of the model
            raise
        reason = f"{type(error).__name__}: {error}"
    finally:
        policy.zero_grad(set_to_none=True)
    expect_rows_alone(policy, batch, rows)
    warnings.warn(f"{type(model).__name__}: every row runs its prompt, which cannot be run once for several: {reason}")
    return False


@torch.no_grad()
def expect_rows_alone(policy: Policy, batch: MultimodalBatch, rows: list[int]) -> None:
    """Raises ValueError where the plain forward gives these rows other logprobs together than each alone: a processor
    may count through the patches of a prompt, or pad what its model does not mask, so that prompts cannot be joined."""
    device = next(policy.parameters()).device
    parts = [batch.select(part).to(device) for part in (rows, *([row] for row in rows))]
    together, *alone = (policy(part, None, cast=False)[0][part.loss_mask[:, 1:] != 0] for part in parts)
    off = (together - torch.cat(alone)).abs().mean()
    if off > tolerance(policy.model):
        wrong = f"a row's logprobs depend on the rows beside it (off by {off:.1e})"
        why = f"tensors {list(batch.media)} cannot be joined along their first dimension. Its adapter must join them"
        raise ValueError(f"{type(policy.model).__name__}: {wrong}: its {why}")


def tolerance(model: nn.Module) -> float:
    """How far off the mean logprob of a model may be by rounding: float32 sums in another order give up to 1e-5 (and
    1e-4 of the gradient's norm), in bfloat16 up to 3e-2 (and 0.2), in 24 layers of random weights."""
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1


def compared_rows(batch: MultimodalBatch, shared: SharedPrompts) -> list[int]:
    """Two rows of one prompt, the first with the longest completion there is among such, and one of another prompt,
    that whose length differs most, which pads one of the two; their media are joined."""
    prompts = shared.prompt_of_row
    longest = batch.attention_mask.sum(-1) - shared.lengths[prompts]  # (B,)
    row = int((longest * (prompts.bincount()[prompts] > 1)).argmax())
    mate = next(i for i, prompt in enumerate(prompts.tolist()) if prompt == prompts[row] and i != row)
    apart = (shared.lengths - shared.lengths[prompts[row]]).abs()
    apart[prompts[row]] = -1
    other = int(apart.argmax())
    return [row, mate] + ([] if other == prompts[row] else [prompts.tolist().index(other)])


def shared_fraction(parts: Sequence[MicroBatch]) -> float:
    """Share of the rows whose prompt is run once for several of them."""
    return sum(len(part.rows) for part in parts if part.shared) / sum(len(part.rows) for part in parts)


def cut_along_prompts(prompt_of_row: Sequence[int], size: int) -> list[list[int]]:
    """The rows in parts of at most `size`. A prompt's rows stay together where they fit, else they are cut evenly: each
    part that holds some of them runs the prompt once more."""
    rows_of_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_of_row):
        rows_of_prompt.setdefault(prompt, []).append(row)
    parts: list[list[int]] = []
    for rows in rows_of_prompt.values():
        pieces = -(-len(rows) // size)
        for piece in (rows[i::pieces] for i in range(pieces)):
            if not parts or len(parts[-1]) + len(piece) > size:
                parts.append([])
            parts[-1] += piece
    return parts


def prefill(model: nn.Module, inputs: dict[str, Tensor], prompt_of_row: Tensor):
    """Run K distinct prompts through the model once, images included, and make ready to go on from them B times.

    Args:
        model: a Transformers model, or its body.
        inputs: keyword arguments of the forward for (K, P) prompts, padded on the left.
        prompt_of_row: (B,) which prompt each continuation goes on from.

    Returns:
        (last, cache, mask, positions): what the model gives at each prompt's last token, logits (B, V) or a body's
        hidden states (B, H); the cache and the attention mask (B, P), a row a continuation; positions (B, 1)
        of the token after the prompt. Gradients flow where they are on.
    """
    mask = inputs["attention_mask"]
    # A model with M-RoPE places images in two dimensions by itself and leaves behind by how much text after them is
    # moved (`rope_deltas`). Everything else counts tokens, without padding.
    rope = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)
    sections = "mrope_section" in (getattr(model.config.get_text_config(), "rope_parameters", None) or {})
    own_positions = rope is not None and sections and any(name.endswith("_grid_thw") for name in inputs)
    if rope is not None:
        rope.rope_deltas = None  # what another forward left there belongs to other prompts
    options = {} if own_positions else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    output = model(**inputs, **options, use_cache=True)
    cache = output.past_key_values
    cache.reorder_cache(prompt_of_row)  # beam search's name for it; not every layer has `batch_select_indices`
    positions = mask.sum(-1, keepdim=True) + (rope.rope_deltas if own_positions else 0)  # (K, 1)
    return output[0][prompt_of_row, -1], cache, mask[prompt_of_row], positions[prompt_of_row]


def score_shared(body: nn.Module, batch: MultimodalBatch, shared: SharedPrompts, logprobs_of: Callable):
    """`mm_grpo.score` at the cost of the distinct tokens: K prompts once, then B completions against their cache.

    Models are causal: a prompt's keys, values and states do not depend on what follows it, and a completion sees
    nothing of its prompt but those. So running the prompt once and copying its cache to the group's completions is the
    plain forward with its repetitions left out. Backwards, the copy adds up the group's gradients by itself.

    Args:
        body: what gives the hidden states (or a whole model, which gives logits).
        batch: the B rows; their media are not looked at, the prompts have them.
        logprobs_of: (hidden (N, H), targets (N,)) -> (logprobs, entropies), (N,) each.

    Returns:
        (logprobs, entropies): (B, T) each, in the columns of the plain forward; 0 where nothing is trained.
    """
    (B, L), device = batch.input_ids.shape, batch.input_ids.device
    prompt_of_row = shared.prompt_of_row.to(device)
    starts = shared.lengths[shared.prompt_of_row].to(device)  # (B,)
    ends = batch.attention_mask.sum(-1)  # (B,)
    C = int((ends - starts).max())  # longest completion
    C += C == 2  # one token alone would take the kernels for decoding, which have no backward: padding goes with it
    columns = starts[:, None] + torch.arange(C, device=device)  # (B, C) where in the batch they stand
    inside = (columns < ends[:, None]).long()
    completions = batch.input_ids.gather(1, columns.clamp(max=L - 1))  # (B, C)

    last, cache, mask, positions = prefill(body, shared.model_inputs(), prompt_of_row)
    hidden = last[:, None]  # (B, 1, H): a prompt's last token predicts each completion's first
    if C > 1:
        for layer in cache.layers:  # recurrent states stay: autograd needs what was read, nothing reads what would come
            if hasattr(layer, "update_recurrent_state"):
                layer.update_recurrent_state = lambda states, *args, **kwargs: states
        inputs = dict(input_ids=completions[:, :-1], attention_mask=torch.cat([mask, inside[:, :-1]], dim=1))
        inputs["position_ids"] = positions + torch.arange(C - 1, device=device)
        output = body(**inputs, past_key_values=cache, use_cache=True)
        hidden = torch.cat([hidden, output[0]], dim=1)  # (B, C, H)
    trained = batch.loss_mask[:, 1:] != 0  # (B, T)
    row, target = trained.nonzero(as_tuple=True)  # (N,) each; the target stands in column target + 1
    place = target + 1 - starts[row]  # (N,) its place in the completion
    scored = logprobs_of(hidden[row, place], completions[row, place])
    logprobs, entropies = (values.new_zeros(B, L - 1).masked_scatter(trained, values) for values in scored)
    return logprobs, entropies
