"""Ranks and shards: one run in several processes, a device each, on torch.distributed.

    torchrun --nproc-per-node 8 mm_grpo.py ...            # each rank has the whole model, and its share of the prompts
    torchrun --nproc-per-node 8 mm_grpo.py --shard True --vllm_server_host ...     # and its share of the language model

Every rank rolls out its share of a step's prompts and goes forward and backward on them; gradients are summed once an
update. What depends on the whole batch (advantages, the weights of the tokens, metrics, whether an update is skipped)
is computed from all ranks' rows by the same functions as in one process: N ranks give the run that one rank gives, up
to the order of float32 sums. Started without torchrun there is one rank, and all of this does nothing.

Ranks speak in the same order or not at all: one that fails by itself leaves without a word to the group, and the others
end with its name.
"""

from __future__ import annotations

import atexit
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from itertools import count, islice, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from faults import RunStopped

if TYPE_CHECKING:
    from mm_grpo import MultimodalBatch, MultimodalRLConfig, Policy
    from shared_prefix import Block

Result = TypeVar("Result")
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun, and others like it, say to a process
ROLL_CALL = 5.0  # seconds until a rank that does not answer is given up


class RankLost(RunStopped):
    """A rank failed by itself, or is gone: the others have no state in common that could be saved."""


# ---------------------------------------------------------------------------------------------------------------------
# The group


def start(config: MultimodalRLConfig, model: nn.Module | None = None) -> None:
    """Join the other ranks, where there are any. Rank 0 names the output_dir, and it alone writes there; the model gets
    its weights."""
    if LAUNCHED <= os.environ.keys() and not dist.is_initialized():
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.ddp_timeout))
        atexit.register(end)
    config.output_dir = of_first(config.output_dir)
    if model is not None and ranks() > 1:
        with torch.no_grad(), leaving():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)


def end() -> None:
    """Part from the other ranks, where all went well."""
    if dist.is_initialized() and not apart():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Of this rank."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def exchange(value: Result) -> list[Result]:
    """The value of each rank, on all of them. Raises RankLost."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    with leaving():
        dist.all_gather_object(values, value)
    return values


def of_first(value: Result) -> Result:
    """The value that rank 0 has."""
    return exchange(value)[0]


def came_to_any(came: list) -> list:
    """What came to the first rank to which something did. Of what comes meanwhile the next exchange tells."""
    return next(filter(None, exchange(list(came))), [])


def together(work: Callable[[], Result], none: type[Exception] | tuple = ()) -> Result | None:
    """`work()`, done by every rank; where one of them fails, RunStopped on all, with its number and what it said.

    Args:
        none: an error that only means that this rank has no result: then it is None, and raised where none has one.
    """
    if ranks() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as failed:
        error = failed
    said = exchange(error and (isinstance(error, none), f"{type(error).__name__}: {error}"))
    if all(said) and all(harmless for harmless, _ in said):
        raise error
    for number, (harmless, text) in enumerate(one or (True, "") for one in said):
        if not harmless:
            raise RunStopped(f"rank {number}: {text}") from error
    return result


@contextmanager
def leaving(*alike: type[Exception]) -> Iterator[None]:
    """An error in here is this rank's alone, or comes of another that is gone: RankLost, with the name of the one that
    was first. RunStopped, and what is named here, is raised by all ranks alike."""
    try:
        yield
    except (RunStopped, *alike):
        raise
    except Exception as error:
        if ranks() == 1:
            raise
        _left.append(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        of_group = isinstance(error, dist.DistError) or "gloo" in _left[-1]
        raise RankLost(roll_call(_left[-1], of_group)) from error


_left: list[str] = []  # why this rank no longer speaks to the others


def apart() -> bool:
    """Whether this rank no longer speaks to the others."""
    return bool(_left)


def roll_call(said: str, of_group: bool) -> str:
    """Which rank failed first, found out through the store where the ranks met.

    Args:
        said: what happened here. of_group: whether that is only how a lost rank looks from here.
    """
    names = {n: f"mm_grpo/left/{n}" for n in range(ranks())}
    until = time.monotonic() + (ROLL_CALL if of_group else 0)
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(names[rank()], f"{store.add('mm_grpo/left', 1):06} {said}")
        while time.monotonic() < until and not store.check([*names.values()]):
            time.sleep(0.05)
        left = {n: store.get(name).decode() for n, name in names.items() if store.check([name])}
        heard = store.add("mm_grpo/heard", 1)
        while rank() == 0 and time.monotonic() < until and heard < ranks():  # with this process the store may go
            time.sleep(0.05)
            heard = store.add("mm_grpo/heard", 0)
    except Exception as error:  # it went with the process that held it
        return f"the process where the ranks met is gone ({error}); here: {said}"
    if of_group and len(left) < ranks():
        silent = ", ".join(str(n) for n in names if n not in left)
        return f"rank {silent} is gone, or does not answer; seen by rank {rank()}: {said}"
    first = min(left, key=left.__getitem__)
    return f"rank {first} failed: {left[first][7:]}"


# ---------------------------------------------------------------------------------------------------------------------
# The batch


def share(examples: Sequence[dict]) -> list[dict]:
    """This rank's share of these examples. Those with equal prompts go to one rank: in this process their completions
    draw from the streams of one prompt, one after the other."""
    if ranks() == 1:
        return list(examples)
    mine, counts, rank_of = [], [0] * ranks(), {}
    for example in examples:
        prompt = json.dumps(example.get("prompt"), sort_keys=True, default=str)
        chosen = rank_of.setdefault(prompt, counts.index(min(counts)))
        counts[chosen] += 1
        mine += [example] if chosen == rank() else []
    return mine


def everyone(batch: MultimodalBatch) -> tuple[MultimodalBatch, slice]:
    """The rows of all ranks, without their media, and which of them are this rank's. Ids of groups and rollouts, which
    each rank counts from 0, become those of the whole."""
    if ranks() == 1:
        return batch, slice(None)
    media = {"pixel_values": None, "extra_model_kwargs": {}, "media_spans": {}}
    names = [f.name for f in fields(batch) if f.name not in media]
    parts = exchange({name: getattr(batch, name) for name in names})
    sizes = [len(part["input_ids"]) for part in parts]
    L = max(part["input_ids"].shape[1] for part in parts)
    whole: dict[str, Tensor | None] = {}
    for name in names:
        tensors, first = [], 0
        for part, size in zip(parts, sizes):
            tensor = part[name]
            if tensor is None and any(other[name] is not None for other in parts):
                tensor = torch.zeros(size, dtype=torch.long)  # one group; or the rank has no rows
            if name in ("group_ids", "rollout_ids") and tensor is not None and size:
                tensor = tensor + first
                first = int(tensor.max()) + 1
            tensors.append(tensor)
        if tensors[0] is None:
            whole[name] = None
        elif tensors[0].ndim > 1:
            whole[name] = torch.cat([nn.functional.pad(tensor, (0, L - tensor.shape[1])) for tensor in tensors])
        else:
            whole[name] = torch.cat(tensors)
    start = sum(sizes[: rank()])
    return replace(batch, **whole, **media), slice(start, start + len(batch))


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of this rank's rows, (B,) or (B, T) with one T, as those of all ranks' rows."""
    if ranks() == 1:
        return tensors
    parts = exchange({name: tensor.cpu() for name, tensor in tensors.items()})
    return {name: torch.cat([part[name] for part in parts]).to(tensor.device) for name, tensor in tensors.items()}


def sum_gradients(policy: Policy) -> None:
    """Sum the gradients of all ranks; those of shards are summed by their backward. A parameter that no rank has used
    keeps none."""
    if isinstance(policy, FSDPModule):
        policy.reshard()  # the next forward gathers what the optimizer has made of it
    if ranks() == 1:
        return
    own = [p for p in policy.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    used = map(any, zip(*exchange([p.grad is not None for p in own])))
    with leaving():
        sums = []
        for parameter in (p for p, used_somewhere in zip(own, used) if used_somewhere):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            sums.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in sums:
            work.wait()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, each shard counted on its rank."""
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    if shards:
        square = nn.utils.get_total_norm(shards).square()
        dist.all_reduce(square)
        norm = (norm.square() + square).sqrt()
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def shard(on: bool, *policies: Policy | None) -> None:
    """Where it is on: cut the language model's parameters into shards, one a rank, gathered a layer at a time: FSDP2.

    Whatever is not the language model's (vision tower, projector) stays whole on every rank, as a rank without pictures
    would not take part in gathering it.

    Raises:
        ValueError: there are no other ranks; the model does not name the layers that can be gathered one at a time.
    """
    if on and not dist.is_initialized():
        raise ValueError("shard=True: there is one process; start it with torchrun --nproc-per-node N mm_grpo.py ...")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is done in place with it
    mesh = init_device_mesh(device().type, (ranks(),)) if on else None
    for policy in dict.fromkeys(filter(None, policies)) if on else ():  # with adapters it is its own reference
        model, names = policy.model, getattr(policy.model, "_no_split_modules", None) or ()
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        layers = [module for module in decoder.modules() if type(module).__name__ in names]
        if not layers:
            raise ValueError(f"shard=True: {type(model).__name__} names no layers of its language model")
        of_language = {id(p) for part in (decoder, model.get_output_embeddings()) for p in part.parameters()}
        others = {parameter for parameter in policy.parameters() if id(parameter) not in of_language}
        for module in (*reversed(layers), policy):
            fully_shard(module, mesh=mesh, ignored_params=others)
            module.set_gradient_divide_factor(1.0)  # a sum: the weights of the tokens are those of the whole batch
            module.set_force_sum_reduction_for_comms(True)
        for parameter in others:
            parameter.data = parameter.data.to(device())
        # What prompts leave behind is no tensor that a hook could stand on: the root stays gathered until they are done
        policy.set_reshard_after_backward(False, recurse=False)
        register_fsdp_forward_method(policy, "run_prompts")


def is_sharded(policy: nn.Module) -> bool:
    return isinstance(policy, FSDPModule)


def agreed(policy: Policy, holds: bool) -> bool:
    """Whether it holds on every rank, where ranks must go the same way: those of a sharded policy."""
    return all(exchange(holds)) if is_sharded(policy) else holds


def in_step(policy: Policy, blocks: list[Block]) -> list[Block]:
    """Blocks of as many passes as the rank with most has: ranks of a sharded policy gather each layer together, and one
    that made fewer passes would keep the others waiting. What is repeated for that has no rows, and moves nothing."""
    if not is_sharded(policy):
        return blocks
    equal = []
    for i, counts in enumerate(zip_longest(*exchange([len(block.parts) for block in blocks]), fillvalue=0)):
        block = blocks[min(i, len(blocks) - 1)]
        parts = block.parts if i < len(blocks) else []
        repeated = block.parts[-1]._replace(rows=None)
        equal.append(block._replace(parts=[*parts, *[repeated] * (max(counts) - len(parts))]))
    return equal


def stand_in(policy: Policy, batch: MultimodalBatch) -> MultimodalBatch:
    """Two rows of four tokens, for a rank that has no rows and must make passes all the same."""
    # not the first ids: the embedding of padding may be zeros
    ids = [*islice((i for i in count(3) if i not in policy.placeholder_ids), 4)]
    ones, trained = torch.ones(2, 4, dtype=torch.long), torch.tensor([[0, 0, 1, 1]] * 2)
    return type(batch)(ones * torch.tensor(ids), ones, trained, torch.zeros(2, 4), torch.zeros(2))


def full(tensor: Tensor) -> Tensor:
    """A parameter, or what an optimizer keeps of it, gathered where it is a shard: by all ranks, one at a time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_first(tensor: Tensor) -> Tensor | None:
    """The same, for the first rank alone: None on all others, which take part in gathering it."""
    gathered = full(tensor)
    return None if rank() else gathered


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: on_first(tensor) for name, tensor in tensors.items()}


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, cut as this one is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
