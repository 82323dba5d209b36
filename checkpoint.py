"""Weights on their way out: the names that vLLM and published checkpoints know them by, in folders that are whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Vision towers of whose module names Transformers 5 has dropped a level that published checkpoints and vLLM 0.32 have
NESTED_TOWERS = ("clip_vision_model",)


def published_name(name: str, model: nn.Module) -> str:
    """The name of a parameter of `model` as vLLM and published checkpoints spell it.

    What wrappers put in front (torch.compile, DistributedDataParallel) is taken off.
    """
    name = name.removeprefix("module.").replace("_orig_mod.", "")
    vision_config = getattr(getattr(model, "config", None), "vision_config", None)
    if getattr(vision_config, "model_type", None) in NESTED_TOWERS:
        name = re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return name


def published_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of the model with its published name. Not the state dict: tied parameters are here once."""
    for name, parameter in model.named_parameters():
        yield published_name(name, model), parameter.detach()


def save_checkpoint(folder: Path, model: nn.Module, *beside: Any) -> None:
    """Write the weights, and what has a `save_pretrained` beside them (adapter, tokenizer), whole or not at all.

    As `from_pretrained` and vLLM read them; of a module that is no Transformers model, the state dict as model.pt.
    """
    with whole_folder(folder) as fresh:
        if hasattr(model, "save_pretrained"):
            weights = {published_name(name, model): tensor for name, tensor in model.state_dict().items()}
            model.save_pretrained(fresh, state_dict=weights)
        else:
            torch.save(model.state_dict(), fresh / "model.pt")
        for thing in beside:
            if thing is not None:
                thing.save_pretrained(fresh)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` once it is whole."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
