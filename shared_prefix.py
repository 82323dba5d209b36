"""Each distinct prompt once: for generation, for scoring, for gradients.

The G completions of a prompt share the prompt and its images. The plain forward runs G * (P + C) tokens and encodes the
images G times; here the prompt is run once an update, gradients on, and the completions against its cache (keys and
values, the states of convolutions and linear attention): P + G * C tokens and one encoding, with the same logprobs and
the same gradients. `benchmark.py` measures it.

A group need not fit into memory. What a prompt leaves behind is cut from its graph: micro-batches of completions go
forward and backward one after the other and add up their gradients at the cut, then the prompt goes backward, once. At
its peak an update holds the activations of the prompts that run together and of one micro-batch.

Dimensions: K distinct prompts of at most P tokens, B rows of at most C tokens after their prompt, L sequence length,
T = L - 1 predicted tokens, H hidden size, N trained tokens.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache

from faults import RunStopped, is_out_of_memory
from parallel import agreed, exchange, in_step, is_sharded, stand_in, total_norm
from recompute import recomputes, repeatable

if TYPE_CHECKING:
    from mm_grpo import MultimodalBatch, MultimodalRLConfig, Policy

logger = logging.getLogger("mm_grpo")

KEY_TOKENS = 4  # tokens of a prompt that cost a row that goes on from it as much memory as one of its own: of them it
# holds a copy of keys and values, of its own every activation
FEW_TOKENS = 512  # tokens that are hardly worth a forward pass of their own


@dataclass
class SharedPrompts:
    """The distinct prompts of B rows. A row's prompt is what stands before its first trained token. Which row has which
    stays on the CPU, where it is read to arrange the rows."""

    prompts: MultimodalBatch  # K rows of the batch, one of each prompt, with its media; longer than their prompts
    lengths: Tensor  # (K,) tokens of each prompt
    prompt_of_row: Tensor  # (B,)
    later: MultimodalBatch | None = None  # the B rows with the media behind their prompts; None: there are none

    def select(self, rows: Sequence[int]) -> SharedPrompts:
        """The prompts of these rows."""
        prompts, prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        later = None if self.later is None else self.later.select(rows)
        return SharedPrompts(self.prompts.select(prompts), self.lengths[prompts], prompt_of_row, later)

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

    Two rows share their prompt when its ids, its media and its per-token inputs are equal.
    """
    reason = why_not_shared(model, batch)
    cuts = None if reason else media_cuts(batch, placeholder_ids)
    if cuts is None:
        logger.info("prompts are not shared: %s", reason or "which media stand behind them cannot be told")
        return None
    ids, lengths = batch.input_ids.tolist(), prompt_lengths(batch).tolist()
    batch, later = split_media(batch, cuts)
    spans = [owned(batch, name, later is not None) for name in batch.media_spans]
    by_token = [tensor.tolist() for name, tensor in batch.media.items() if name not in batch.media_spans]
    prompts: dict[tuple, int] = {}  # all that makes a prompt -> the first row that has it
    first_of_row = []
    for row, length in enumerate(lengths):
        key = (*(tuple(column[row][:length]) for column in [ids, *by_token]), *(each[row] for each in spans))
        first_of_row.append(prompts.setdefault(key, row))
    if len(prompts) == len(batch):
        return None
    return SharedPrompts(batch, torch.tensor(lengths), torch.tensor(first_of_row), later).select(range(len(batch)))


def owned(batch: MultimodalBatch, name: str, by_value: bool) -> list:
    """What each row owns of a tensor: equal where it is the same. Rows whose later media differ have copies of their
    prompt's: these are the same by value."""
    spans, tensor = batch.media_spans[name].tolist(), batch.media[name].detach()

    @functools.cache
    def digest(start: int, stop: int) -> bytes:
        return hashlib.sha256(tensor[start:stop].cpu().contiguous().view(torch.uint8).numpy()).digest()

    return [(stop - start, digest(start, stop)) if by_value else (start, stop) for start, stop in spans]


def split_media(batch: MultimodalBatch, cuts: dict[str, Tensor]) -> tuple[MultimodalBatch, MultimodalBatch | None]:
    """The batch with the media of its prompts alone, and with those behind them alone; None: there are none."""
    starts = prompt_lengths(batch)[:, None]
    inside = torch.arange(batch.input_ids.shape[1], device=starts.device) < starts  # (B, L)
    by_token = {name: tensor * inside for name, tensor in batch.media.items() if name not in cuts}
    same = [torch.equal(tensor, batch.media[name]) for name, tensor in by_token.items()]
    if all(same) and all(torch.equal(cuts[name], spans[:, 1]) for name, spans in batch.media_spans.items()):
        return batch, None
    before, behind = copy.copy(batch), copy.copy(batch)  # not validated again: parts of a valid batch
    before.media_spans = {name: torch.stack([spans[:, 0], cuts[name]], -1) for name, spans in batch.media_spans.items()}
    # whatever runs these rows whole finds no placeholder without its medium
    before.input_ids = torch.where(inside, batch.input_ids, batch.input_ids.gather(1, starts))
    before.extra_model_kwargs = {**batch.extra_model_kwargs, **by_token}
    behind.media_spans = {name: torch.stack([cuts[name], spans[:, 1]], -1) for name, spans in batch.media_spans.items()}
    return before, behind


def media_cuts(batch: MultimodalBatch, placeholder_ids: Sequence[int]) -> dict[str, Tensor] | None:
    """name -> (B,) where in each row's span the media behind its prompt begin; None: it cannot be told.

    The placeholders tell it. Every run of them has a fixed share of a tensor's rows: patches and tiles always, and what
    has a row a medium where all of the sequence's are of one size; but grids say themselves how large each is.
    """
    ids = batch.input_ids
    media = torch.isin(ids, torch.tensor(list(placeholder_ids), dtype=torch.long, device=ids.device))
    for tensor in (tensor for name, tensor in batch.media.items() if name not in batch.media_spans):
        media = media | (tensor != 0)  # (B, L)
    cuts = {name: spans[:, 1].clone() for name, spans in batch.media_spans.items()}
    starts, ends = prompt_lengths(batch).tolist(), batch.attention_mask.sum(-1).tolist()
    behind = media & (torch.arange(media.shape[1], device=media.device) >= prompt_lengths(batch)[:, None])
    for row in behind.any(-1).nonzero()[:, 0].tolist():
        tokens = media[row, : ends[row]].tolist()
        before, total, parts = sum(tokens[: starts[row]]), sum(tokens), (tokens[: starts[row]], tokens[starts[row] :])
        runs = [len(list(run)) for part in parts for is_media, run in groupby(part) if is_media]
        owned = {name: spans[row].tolist() for name, spans in batch.media_spans.items()}
        grids = [name for name, (start, stop) in owned.items() if name.endswith("_grid_thw") and stop > start]
        for name, (start, stop) in owned.items():
            count = before * (stop - start) / total
            if name in grids:
                sizes = [0, *batch.media[name][start:stop].prod(-1).cumsum(-1).tolist()]
                share = before * sizes[-1] / total
                count = sizes.index(share) if share in sizes else -1
            elif any(run * (stop - start) % total for run in runs):
                count = -1
            if count < 0 or len(grids) > 1 or tokens[-1]:
                return None
            cuts[name][row] = start + int(count)
    return cuts


def prompt_lengths(batch: MultimodalBatch) -> Tensor:
    """(B,) tokens before each row's first trained one."""
    return (batch.loss_mask != 0).int().argmax(-1)


def why_not_shared(model: nn.Module, batch: MultimodalBatch) -> str | None:
    """What keeps this model from running this batch's prompts once each; None: nothing."""
    if not isinstance(model, GenerationMixin):
        return "the model has no key-value cache"
    if model.training and model.is_activation_checkpointing:
        return "activation checkpointing drops the key-value cache"
    run_again = DynamicCache(config=model.config).layers if recomputes(model) else ()
    if any(hasattr(layer, "update_conv_state") for layer in run_again):
        return "gradient checkpointing would update the states of its convolutions and linear attention twice"
    B, L = batch.input_ids.shape
    column = torch.arange(L, device=batch.input_ids.device)
    if not torch.equal(batch.attention_mask != 0, column < batch.attention_mask.sum(-1, keepdim=True)):
        return "rows are not padded on the right"
    if not (batch.loss_mask != 0).any(-1).all():
        return "a row has no trained token"
    for name, tensor in batch.media.items():
        if name not in batch.media_spans and tensor.shape != (B, L):
            return f"{name} is stored by row"
    return None


class MicroBatch(NamedTuple):
    """The rows of one forward pass."""

    rows: Tensor | None  # (n,) their numbers in the whole batch; None: a pass that only keeps in step with other ranks
    batch: MultimodalBatch  # no longer than they are; without media where their prompts have them
    completions: Completions | None  # what follows their prompts, which run before; None: the plain forward

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(self.rows, self.batch.to(device), self.completions and self.completions.to(device))

    @property
    def place(self) -> tuple[Tensor, slice]:
        """Where their values stand in a (B, T) tensor of the whole batch."""
        return self.rows, slice(self.batch.input_ids.shape[1] - 1)

    def take(self, tensor: Tensor) -> Tensor:
        """Their part of a tensor (B,) or (B, T) of the whole batch."""
        return tensor[self.rows] if tensor.ndim == 1 else tensor[self.place]


class Block(NamedTuple):
    """Micro-batches that go on from the same prompts, which run once for all of them; or one plain micro-batch."""

    prompts: SharedPrompts | None
    parts: list[MicroBatch]

    def to(self, device: torch.device | str) -> Block:
        return Block(self.prompts and self.prompts.to(device), [part.to(device) for part in self.parts])


def micro_batches(
    policy: Policy, batch: MultimodalBatch, rows: Tensor, config: MultimodalRLConfig, tokens: int | None = None
) -> list[Block]:
    """Cut a batch into forward passes of at most `tokens` tokens (None: `micro_batch_tokens`), padding counted.

    Rows of about the same length go together, so that little is padding. One that is longer than the budget goes alone,
    and so does a prompt. A row that goes on from its prompt counts KEY_TOKENS of the prompt's tokens as one.

    Args:
        policy: remembers whether its model can share prompts, found out with the first batch that would.
        rows: (B,) bool, those that have something to train; all are taken where none has.
        config: also says whether prompts are shared.
    """
    if not len(batch):  # this rank's; other ranks have some
        cut = micro_batches(policy, stand_in(policy, batch), rows.new_ones(2), config) if is_sharded(policy) else []
        return [block._replace(parts=[part._replace(rows=None) for part in block.parts]) for block in cut]
    numbers = rows.nonzero()[:, 0] if rows.any() else torch.arange(len(batch))
    chosen = batch if len(numbers) == len(batch) else batch.select(numbers)
    budget = tokens or config.micro_batch_tokens
    shared = find_shared_prompts(policy.model, chosen, policy.placeholder_ids) if config.share_prefix else None
    shared = shared if agreed(policy, shared is not None) else None
    # media in what goes on from a prompt are tried by themselves: their positions and masks are the model's own affair
    verdict = "sharing_is_exact" if shared and agreed(policy, shared.later is None) else "later_media_are_exact"
    if shared is not None and getattr(policy, verdict) is None:
        setattr(policy, verdict, sharing_is_exact(policy, chosen, shared))
    if shared is not None and getattr(policy, verdict) is False:
        logger.info("prompts are not shared: %s gave other numbers or an error", type(policy.model).__name__)
        shared = None
    ends = (chosen.attention_mask != 0) * torch.arange(1, chosen.input_ids.shape[1] + 1)
    ends = ends.amax(-1)  # (n,) columns up to each row's last token
    if shared is None:
        parts = [(part, chosen.select(part, width=int(ends[part].max()))) for part in within(budget, ends.tolist())]
        return in_step(policy, [Block(None, [MicroBatch(numbers[part], of_part, None)]) for part, of_part in parts])
    blocks, own = [], ends - shared.lengths[shared.prompt_of_row]  # (n,) columns after each row's prompt
    for together in within(budget, shared.lengths.tolist()):
        members = torch.isin(shared.prompt_of_row, torch.tensor(together)).nonzero()[:, 0]
        block = Block(replace(shared, later=None).select(members), [])
        widths = own[members] + block.prompts.lengths.max() // KEY_TOKENS
        for part in within(budget, widths.tolist()):
            of_part = chosen.select(members[part], with_media=False, width=int(ends[members[part]].max()))
            later = None if shared.later is None else shared.later.select(members[part])
            prompts = replace(block.prompts, prompt_of_row=block.prompts.prompt_of_row[part], later=later)
            completions = Completions.of(policy.model, of_part, prompts)
            block.parts.append(MicroBatch(numbers[members[part]], of_part, completions))
        blocks.append(block)
    return in_step(policy, blocks)


def within(budget: int, widths: Sequence[int]) -> list[list[int]]:
    """The numbers of these widths in parts that are no larger than the budget when each is padded to its part's widest,
    narrow ones first; what is too wide by itself is a part of its own. A part of more than FEW_TOKENS tokens is not
    padded by more than a quarter either."""
    parts: list[list[int]] = []
    real = 0  # tokens of the last part without its padding
    for number in sorted(range(len(widths)), key=widths.__getitem__):
        padded = (len(parts[-1]) + 1) * widths[number] if parts else 0
        if not parts or padded > budget or (real > FEW_TOKENS and padded > 1.25 * (real + widths[number])):
            parts.append([])
            real = 0
        parts[-1].append(number)
        real += widths[number]
    return parts


def run(policy: Policy, blocks: Sequence[Block]) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
    """Each micro-batch with its (logprobs, entropies), (n, T) each, to go backward before the next one is asked for.

    Prompts run before the first of their completions, and go backward after the last.
    """
    for block in blocks:
        prefix = policy.run_prompts(block.prompts) if block.prompts else None
        for part in block.parts:
            logprobs, entropies = policy(part.batch, part.completions and replace(part.completions, prefix=prefix))
            if part.rows is not None:
                yield part, logprobs, entropies
            elif logprobs.requires_grad:
                (0.0 * logprobs.sum()).backward()
        if prefix is not None:
            prefix.backward()


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
    longest = int((batch.attention_mask.sum(-1) - shared.lengths[shared.prompt_of_row])[rows[0]])
    if not agreed(policy, longest > 1):
        return None

    def backward(rows: list[int], shared: SharedPrompts | None, sign: int) -> Tensor:
        device, part = parameters[0].device, batch.select(rows, with_media=shared is None)
        part, shared = part.to(device), shared and shared.to(device)
        logprobs = policy(part, shared, cast=False)[0][part.loss_mask[:, 1:] != 0]
        (sign * logprobs.sum()).backward()
        return logprobs.detach()

    def norm() -> Tensor:
        return total_norm([p.grad for p in parameters if p.grad is not None])

    def forget() -> None:  # not by `policy.zero_grad`: a sharded policy's parameters are others once they are gathered
        for parameter in parameters:
            parameter.grad = None

    forget()
    try:
        logprobs, of_shared = backward(rows, shared.select(rows), 1), norm()
        off = (logprobs - torch.cat([backward([row], None, -1) for row in rows])).abs().mean()
        left = norm() / of_shared  # of the gradient, once the plain one is taken away
        if agreed(policy, bool(off <= tolerance(model) and left <= 3 * tolerance(model))):
            return True
        reason = f"logprobs are off by {off:.1e}, the gradient by {left:.1e} of its norm"
    except Exception as error:  # the cache is the model's own affair, and so is how it fails
        if is_out_of_memory(error) or isinstance(error, RunStopped):  # which say nothing of the model
            raise
        agreed(policy, False)
        reason = f"{type(error).__name__}: {error}"
    finally:
        forget()
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
    that whose length differs most, which pads one of the two; their media are joined. Where there is no other prompt
    the second row comes twice."""
    prompts = shared.prompt_of_row
    longest = batch.attention_mask.sum(-1) - shared.lengths[prompts]  # (B,)
    for spans in shared.later.media_spans.values() if shared.later is not None else ():  # and with media, if any has
        longest = longest + batch.input_ids.shape[1] * (spans[:, 1] > spans[:, 0])
    row = int((longest * (prompts.bincount()[prompts] > 1)).argmax())
    mate = next(i for i, prompt in enumerate(prompts.tolist()) if prompt == prompts[row] and i != row)
    apart = (shared.lengths - shared.lengths[prompts[row]]).abs()
    apart[prompts[row]] = -1
    other = int(apart.argmax())
    return [row, mate, mate if other == prompts[row] else prompts.tolist().index(other)]  # three on every rank


def shared_fraction(blocks: Sequence[Block]) -> float:
    """Share of the rows, of all ranks, whose prompt is run once for several of them."""
    own = [(len(part.rows), block.prompts) for block in blocks for part in block.parts if part.rows is not None]
    rows = [pair for pairs in exchange([(n, prompts is not None) for n, prompts in own]) for pair in pairs]
    return sum(n for n, shares in rows if shares) / sum(n for n, _ in rows)


class Prefix:
    """K prompts that the model has run, to go on from. No dataclass: FSDP looks for gradients in the fields of those,
    and would take a gradient that comes to the cut for the end of its root's backward.

    Args:
        last: what it gave at each prompt's last token: logits (K, V), or a body's hidden states (K, H).
        cache: of all layers.
        mask: (K, P) the prompts' attention mask.
        positions: (K, 1) of the token after the prompt.
        again: whether layers run again in the backward, those that go on from it too.
        cuts: what the prompts gave, and the leaf in its place.
    """

    def __init__(self, last: Tensor, cache: Cache, mask: Tensor, positions: Tensor, again: bool, cuts: Sequence = ()):
        self.last, self.cache, self.mask, self.positions = last, cache, mask, positions
        self.again, self.cuts = again, cuts

    def cut(self) -> Prefix:
        """The same, cut from its graph: what goes on from it leaves its gradients at the cut, for `backward`."""
        cuts = []

        def leaf(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: leaf(each) for name, each in value.items()}
            if not (isinstance(value, Tensor) and value.requires_grad):
                return value
            cuts.append((value, value.detach().requires_grad_()))
            return cuts[-1][1]

        return Prefix(leaf(self.last), copy_cache(self.cache, leaf), self.mask, self.positions, self.again, cuts)

    def backward(self) -> None:
        """Take the gradients that came to the cut on through the prompts; once."""
        reached = [(value, leaf.grad) for value, leaf in self.cuts if leaf.grad is not None]
        if reached:
            torch.autograd.backward(*map(list, zip(*reached)))

    def branch(self, prompt_of_row: Tensor) -> tuple[Tensor, Cache, Tensor, Tensor]:
        """(last, cache, mask, positions) of B rows, (B,) the prompt of each. Gradients come together in the prompt's.
        The cache is the rows' own, to be written to; where layers run `again`, for one forward and its backward."""
        cache = copy_cache(self.cache, lambda value: dict(value) if isinstance(value, dict) else value)
        if self.again:
            repeatable(cache, prompt_of_row)
        else:  # beam search's name for it; not every layer has `batch_select_indices`
            cache.reorder_cache(prompt_of_row)
        return self.last[prompt_of_row], cache, self.mask[prompt_of_row], self.positions[prompt_of_row]


def copy_cache(cache: Cache, change: Callable[[Any], Any]) -> Cache:
    """A copy of a cache, `change` applied to all that its layers hold; nothing written to it reaches the other one."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        vars(layer).update({name: change(value) for name, value in vars(layer).items()})
    return cache


def positions_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module | None, bool]:
    """(what of the model has `rope_deltas`, whether it places these inputs by itself): with M-RoPE it places images in
    two dimensions, and leaves behind by how much text after them is moved. Else tokens are counted, without padding."""
    rope = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)
    sections = "mrope_section" in (getattr(model.config.get_text_config(), "rope_parameters", None) or {})
    return rope, rope is not None and sections and any(name.endswith("_grid_thw") for name in inputs)


def run_prompts(model: nn.Module, inputs: dict[str, Tensor]) -> Prefix:
    """Run K distinct prompts through the model once, images included. Gradients flow where they are on.

    Args:
        model: a Transformers model, or its body.
        inputs: keyword arguments of the forward for (K, P) prompts, padded on the left.
    """
    mask = inputs["attention_mask"]
    rope, own_positions = positions_of(model, inputs)
    if rope is not None:
        rope.rope_deltas = None  # what another forward left there belongs to other prompts
    options: dict[str, Any] = {} if own_positions else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    again = torch.is_grad_enabled() and recomputes(model)
    if again:
        options["past_key_values"] = repeatable(DynamicCache(config=model.config))
    output = model(**inputs, **options, use_cache=True)
    positions = mask.sum(-1, keepdim=True) + (rope.rope_deltas if own_positions else 0)
    return Prefix(output[0][:, -1], output.past_key_values, mask, positions, again)


def prefill(model: nn.Module, inputs: dict[str, Tensor], prompt_of_row: Tensor):
    """(last, cache, mask, positions), see `Prefix.branch`: K prompts run once, to go on from B times."""
    return run_prompts(model, inputs).branch(prompt_of_row)


@dataclass
class Completions:
    """What follows the prompts of n rows, laid out on the CPU: a look at a GPU's tensors would wait for it."""

    prompt_of_row: Tensor  # (n,)
    ids: Tensor  # (n, C)
    inside: Tensor  # (n, C) long, 0 on padding
    trained: tuple[Tensor, Tensor]  # (N,) row, and place in its completion, of each trained token
    columns: Tensor  # (N,) where its logprob stands in the row of T
    positions: Tensor  # (C - 1,) of the tokens that are run, the first being 0; or (3, n, C - 1)
    media: dict[str, Tensor]  # that stand there, by argument name of the forward
    T: int
    prefix: Prefix | None = None  # once it has been run

    @classmethod
    def of(cls, model: nn.Module, batch: MultimodalBatch, shared: SharedPrompts) -> Completions:
        (_, L), starts = batch.input_ids.shape, shared.lengths[shared.prompt_of_row]  # (n,)
        ids, sampled, ends = batch.input_ids.cpu(), batch.loss_mask.cpu() != 0, batch.attention_mask.sum(-1).cpu()
        C = int((ends - starts).max())  # longest completion
        C += C == 2  # one token alone would take the kernels for decoding, which have no backward: padding goes with it
        columns = starts[:, None] + torch.arange(C)  # (n, C) where in the batch they stand
        row, column = sampled[:, 1:].nonzero(as_tuple=True)
        inside, columns = (columns < ends[:, None]).long(), columns.clamp(max=L - 1)
        ids, positions, media = ids.gather(1, columns), torch.arange(C - 1), {}
        if shared.later is not None:
            inputs = shared.later.to("cpu").model_inputs()
            for name in inputs.keys() - shared.later.media_spans.keys():
                inputs[name] = (inputs[name].gather(1, columns) * inside)[:, :-1]
            rope, own_positions = positions_of(model, inputs)
            if own_positions:  # text after media goes on as after text: they may be counted from anywhere
                names = inspect.signature(rope.get_rope_index).parameters.keys() & inputs.keys()
                positions, _ = rope.get_rope_index(**{name: inputs[name] for name in names})
            media = {name: inputs[name] for name in inputs.keys() - {"input_ids", "attention_mask"}}
        trained = row, column + 1 - starts[row]
        whole = cls(shared.prompt_of_row, ids, inside, trained, column, positions, media, L - 1)
        return whole.to(batch.input_ids.device)

    def to(self, device: torch.device | str) -> Completions:
        tensors = (self.prompt_of_row, self.ids, self.inside, *self.trained, self.columns, self.positions)
        prompt_of_row, ids, inside, row, place, columns, positions = (tensor.to(device) for tensor in tensors)
        media = {name: tensor.to(device) for name, tensor in self.media.items()}
        trained = row, place
        return Completions(prompt_of_row, ids, inside, trained, columns, positions, media, self.T, self.prefix)


def score_shared(body: nn.Module, batch: MultimodalBatch, shared: SharedPrompts | Completions, logprobs_of: Callable):
    """`mm_grpo.score` at the cost of the distinct tokens: K prompts once, then B completions against their cache.

    Models are causal: a prompt's keys, values and states do not depend on what follows it, and a completion sees
    nothing of its prompt but those. So running the prompt once and copying its cache to the group's completions is the
    plain forward with its repetitions left out. Backwards, the copy adds up the group's gradients by itself.

    Args:
        body: what gives the hidden states (or a whole model, which gives logits).
        batch: the B rows; their media are not looked at, `shared` has them.
        shared: their prompts, or their completions with the prefix that was run before.
        logprobs_of: (hidden (N, H), targets (N,)) -> (logprobs, entropies), (N,) each.

    Returns:
        (logprobs, entropies): (B, T) each, in the columns of the plain forward; 0 where nothing is trained.
    """
    if isinstance(shared, SharedPrompts):
        prefix = run_prompts(body, shared.model_inputs())
        shared = replace(Completions.of(body, batch, shared), prefix=prefix)
    ids, inside = shared.ids, shared.inside
    last, cache, mask, positions = shared.prefix.branch(shared.prompt_of_row)
    hidden = last[:, None]  # (B, 1, H): a prompt's last token predicts each completion's first
    if ids.shape[1] > 1:
        for layer in cache.layers:  # recurrent states stay: autograd needs what was read, nothing reads what would come
            if hasattr(layer, "update_recurrent_state"):
                layer.update_recurrent_state = lambda states, *args, **kwargs: states
        inputs = dict(input_ids=ids[:, :-1], attention_mask=torch.cat([mask, inside[:, :-1]], dim=1))
        inputs["position_ids"] = positions + shared.positions
        output = body(**inputs, **shared.media, past_key_values=cache, use_cache=True)
        hidden = torch.cat([hidden, output[0]], dim=1)  # (B, C, H)
    scored = logprobs_of(hidden[shared.trained], ids[shared.trained])
    place = (shared.trained[0], shared.columns)
    logprobs, entropies = (values.new_zeros(len(ids), shared.T).index_put(place, values) for values in scored)
    return logprobs, entropies
