"""Checkpoints: the names that vLLM and published ones know weights by, whole folders, what loads a processor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

# Vision towers of whose module names Transformers 5 has dropped a level that published checkpoints and vLLM 0.32 have
NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")


def published_name(name: str, model: nn.Module) -> str:
    """The name of a parameter of `model` as vLLM and published checkpoints spell it.

    What wrappers put in front (torch.compile, DistributedDataParallel) is taken off.
    """
    name = name.removeprefix("module.").replace("_orig_mod.", "")
    vision_config = getattr(getattr(getattr(model, "module", model), "config", None), "vision_config", None)
    if getattr(vision_config, "model_type", None) in NESTED_TOWERS:
        name = re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return name


def published_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter as published checkpoints have it. Not the state dict: tied parameters are here once."""
    model = getattr(model, "module", model)  # of a wrapper such as DistributedDataParallel
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if isinstance(model, PreTrainedModel):  # undo what Transformers does when it loads: names, experts stacked
        weights = revert_weight_conversion(model, weights)
    for name, tensor in weights.items():
        yield published_name(name, model), tensor


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


@cache
def without_video(kind: type) -> type:
    """The processor's class without its video part, which needs torchvision: for stills and sound."""
    attributes = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: attributes)})


def load_processor(checkpoint: str):
    """The processor of a checkpoint, a name or a folder; without torchvision one that takes no video."""
    if not is_torchvision_available():
        kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(checkpoint)), None)
        if kind is not None and "video_processor" in kind.get_attributes():
            return without_video(kind).from_pretrained(checkpoint)
    return AutoProcessor.from_pretrained(checkpoint)
