"""Checkpoints: the names that vLLM and published ones know weights by, whole folders, the state of a run."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from lora import adapter_weights, base_of, load_adapter, lora_layers, save_adapter, without_adapters
from optimizers import FALLING, load_state_tensors, state_tensors
from parallel import apart, exchange, full, gathered, of_first, placed, rank

STATE = "trainer_state.json"
DOOMED = "trainer_state.json.deleted"  # its name while the checkpoint is deleted
UNFINISHED = "unfinished"  # ends the name of a folder that is being written
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


def published_weights(
    model: nn.Module, merge: bool = True, trained: bool = False, read: Callable[[Tensor], Tensor] = full
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter as published checkpoints have it, a block of layers at a time. Not the state dict: tied parameters
    are here once. Of shards every rank must ask for each, and gets it whole.

    Args:
        merge: with what LoRA adapters add to it; else without.
        trained: leave out blocks of which nothing is trained. A block is whole: vLLM puts the parts of a fused layer
            together anew, and makes garbage of those that did not come.
        read: makes of a parameter what is to be published; `full` gathers shards.
    """
    model = getattr(model, "module", model)  # of a wrapper such as DistributedDataParallel
    blocks: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        blocks.setdefault(block_of(name), {})[name] = parameter
    for block in blocks.values():
        if trained and not any(parameter.requires_grad for parameter in block.values()):
            continue
        weights = {name: read(parameter.detach()) for name, parameter in block.items()}
        for name, tensor in published(model, without_adapters(model, weights, merge)).items():
            yield published_name(name, model), tensor


def published(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Transformers does when it loads a checkpoint undone: names, experts stacked, layers taken apart."""
    return revert_weight_conversion(model, weights) if isinstance(model, PreTrainedModel) else weights


def block_of(name: str) -> str:
    """The layer of a stack that a parameter is in, up to the first number in its name; without one, its module."""
    block = re.match(r".*?\.\d+\.", name)
    return block[0] if block else re.sub(r"\.base_layer|(?<=\.)lora_.*", "", name).rpartition(".")[0]


def shape_of(parameter: Tensor) -> Tensor:
    """A tensor of this shape without numbers."""
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


def published_names(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Each parameter with its published name; with several where it is stacked from several published ones."""
    for name, parameter in model.named_parameters():
        names = [name]
        with suppress(ValueError):  # it is published together with others alone: by its own name
            names = list(published(model, {name: shape_of(parameter)}))
        yield parameter, [published_name(each, model) for each in names]


def save_checkpoint(
    folder: Path, model: nn.Module, *beside: Any, state: RunState | None = None, merge: bool = False
) -> None:
    """Write the weights, and what has a `save_pretrained` beside them (adapter, tokenizer), whole or not at all. Every
    rank must call it; the first one writes.

    As `from_pretrained` and vLLM read them; of a module that is no Transformers model, the state dict as model.pt. Of a
    model with LoRA adapters these alone, as peft reads them.

    Args:
        state: of the run, saved last.
        merge: write the whole model too, with what its adapters add, into `merged`.

    Raises:
        FileExistsError: the folder exists; nothing is overwritten.
        ValueError: weights that are not finite.
        OSError: they could not be written; nothing is left of them.
    """
    adapter = gathered(adapter_weights(model)) if (has_adapter := bool(lora_layers(model))) else {}
    weights = gathered(model.state_dict()) if merge or not has_adapter else {}
    if rank():
        return
    broken = [name for name, tensor in (adapter | weights).items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{broken[0]} and {len(broken) - 1} other weights are not finite: not saved")
    with whole_folder(folder) as fresh:
        if has_adapter:
            save_adapter(fresh, model, adapter)
        if merge or not has_adapter:
            save_model(fresh / "merged" if has_adapter else fresh, model, without_adapters(model, weights))
        for place in (fresh, fresh / "merged"):
            for thing in beside if place.exists() else ():
                if thing is not None:
                    thing.save_pretrained(place)
        if state is not None:
            state.save_pretrained(fresh)


def save_model(folder: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write the whole model with these weights."""
    if not hasattr(model, "save_pretrained"):
        return torch.save(weights, folder / "model.pt")
    model = copy.copy(model)
    model._hf_peft_config_loaded = False  # with it Transformers writes the adapter alone
    model.save_pretrained(folder, state_dict={published_name(name, model): each for name, each in weights.items()})


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` once it is whole and on the disk; else nothing is left of it.

    Args:
        replace: an existing one, which is ours, gives way to it.
    """
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder}: exists, and is not overwritten; name another folder")
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in (UNFINISHED, "old"))
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed and had our number
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            path.chmod(path.stat().st_mode | 0o444)  # a server of another user may have to read it
            sync(path)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":  # how its library says that the disk is full
            raise OSError(str(error)) from None
        raise


def sync(path: Path) -> None:
    """Wait until it is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run, beside its weights


# Settings that may change on the way: they say how long, how often and where, or change no number but by rounding
FREE = (
    *("shard", "ddp_timeout", "report_to"),
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "eval_steps", "eval_examples"),
    *("max_steps", "log_every_steps", "micro_batch_tokens", "gradient_checkpointing", "max_concurrent"),
    *("rollout_timeout", "generation_timeout", "report_steps", "report_rollouts"),
    *("vllm_server_host", "vllm_server_port", "vllm_api_key", "vllm_server_timeout", "weight_sync_dir"),
    *("mismatch_threshold", "on_mismatch", "on_control_tokens", "merge_adapter"),
)
SECRET = "vllm_api_key"


def settings_of(config: Any) -> dict[str, Any]:
    """The settings as they may be written down, as JSON gives them back."""
    return json.loads(json.dumps({name: value for name, value in asdict(config).items() if name != SECRET}))


class RunState:
    """What a checkpoint holds beside weights and tokenizer, so that a run goes on with the same bits. No pickles.

    Prompts and the random streams of completions follow from the step alone, so they need no state. The reference
    policy of the KL penalty is the model that the run starts from again.

    Args:
        trainer: a MultimodalGRPOTrainer.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.config, self.folder = trainer, trainer.config, Path(trainer.config.output_dir)

    def facts(self) -> dict[str, Any]:
        """What the run is, for trainer_state.json."""
        model, step = self.trainer.model, self.trainer.policy.version
        return {
            "step": step,
            "policy_version": step,
            "prompts_taken": step * self.config.rollouts_per_step // self.config.rollouts_per_example,
            "settings": {
                **settings_of(self.config),
                "param_dtype": str(next(model.parameters()).dtype)[6:],  # the model's own; "torch." in front
                "adapter": type(self.trainer.adapter).__name__,
                "model": f"{type(model).__name__} {getattr(model, 'name_or_path', '')}".strip(),
            },
            "versions": {name: version(name) for name in ("torch", "transformers", "verifiers")},
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write the optimizer's state, the random states and the facts."""
        # another suffix: vLLM takes every *.safetensors for weights
        save_file(self.optimizer_state, folder / "optimizer.state")
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        text = json.dumps({**self.facts(), "files": files, "random_states": self.randomness})
        (folder / STATE).write_text(text + "\n")

    def save(self, folder: Path | None = None) -> Path | None:
        """Write `checkpoint-N` (into `folder`; None: output_dir), N the step, and delete what is above the limit.

        Returns:
            The checkpoint; None, with a warning, where it could not be written: the next one may be.
        """
        trainer, path = self.trainer, (folder or self.folder) / f"checkpoint-{self.trainer.policy.version}"
        if apart():
            return None
        if of_first(read_state(path) is not None):  # of this very step
            return path
        self.optimizer_state, self.randomness = state_tensors(trainer.optimizer), exchange(random_states())
        try:
            beside, merge = (trainer.adapter, trainer.tokenizer), self.config.merge_adapter
            save_checkpoint(path, trainer.model, *beside, state=self, merge=merge)
            for old in [] if rank() else checkpoints(path.parent)[: -(self.config.save_total_limit or sys.maxsize)]:
                delete_checkpoint(old)
        except (OSError, ValueError) as error:
            warnings.warn(f"{path}: this checkpoint is not written: {error}")
            path = None
        return of_first(path)

    def save_elsewhere(self) -> Path | None:
        """The last resort, where output_dir has no room: the folder for temporary files."""
        return self.save(of_first(Path(tempfile.mkdtemp(prefix="mm_grpo-"))))

    def resume(self) -> None:
        """Bring the trainer to where `resume_from_checkpoint` left the run; where there is none, seed the global random
        number generators, which environments may draw from.

        Raises:
            ValueError: there is no such checkpoint, a newer one, or a setting that matters is another.
        """
        name = self.config.resume_from_checkpoint
        if self.trainer.policy.version:  # done already
            return
        if name and not rank():
            clean_up(self.folder)
        whole = of_first(checkpoints(self.folder))
        folder = (whole[-1] if whole else None) if name == "true" else name and Path(name)
        from transformers import set_seed  # here: with it come peft and bitsandbytes, where they are installed

        set_seed(self.config.seed + rank())
        if folder is None:
            return
        saved = read_state(folder)
        if saved is None or folder.resolve().parent != self.folder.resolve():
            raise ValueError(f"resume_from_checkpoint={name!r}: no checkpoint of output_dir={str(self.folder)!r}")
        if newer := [path.name for path in whole if step_of(path) > saved["step"]]:
            raise ValueError(f"resume_from_checkpoint={name!r}: there are newer ones, {newer}; resume from the last")
        now, falls = self.facts(), self.config.lr_scheduler_type in FALLING
        free = tuple(name for name in FREE if name != "max_steps" or not falls)  # every rate follows from it there
        if changed := changed_settings(saved["settings"], now["settings"], free):
            raise ValueError(
                f"resume_from_checkpoint={name!r}: not the run's settings: {'; '.join(changed)} (a new run from its "
                f"weights: --model {folder})"
            )
        if saved["versions"] != now["versions"]:
            warnings.warn(f"resumed with other versions: {changed_settings(saved['versions'], now['versions'])}")
        self.load(folder, saved["random_states"])
        self.trainer.policy.version = self.trainer.server.updates = saved["step"]

    def load(self, folder: Path, randomness: list[dict[str, Any]]) -> None:
        """Weights, optimizer and random states of a checkpoint."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        if lora_layers(model):
            load_adapter(folder, model)
        else:
            if hasattr(model, "save_pretrained"):
                saved = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype).state_dict()
            else:
                saved = torch.load(folder / "model.pt", weights_only=True)
            model.load_state_dict({name: placed(saved[name], own) for name, own in model.state_dict().items()})
        load_state_tensors(optimizer, load_file(folder / "optimizer.state"))
        if rank() < len(randomness):  # of as many ranks as the run had
            set_random_states(randomness[rank()])


def random_states() -> dict[str, Any]:
    """Those of the global generators, as JSON holds them."""
    numpy_state = [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]
    torch_states = [state.tolist() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch_states}


def set_random_states(states: dict[str, Any]) -> None:
    number, words, gauss = states["python"]
    random.setstate((number, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    here, *devices = (torch.tensor(state, dtype=torch.uint8) for state in states["torch"])
    torch.set_rng_state(here)
    torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])


def read_state(folder: Path) -> dict[str, Any] | None:
    """The trainer_state.json of a checkpoint; None where there is none."""
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, `checkpoint-N`, by N."""
    named = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted((path for path in named if read_state(path) is not None), key=step_of)


def delete_checkpoint(folder: Path) -> None:
    """Delete what was written there, and nothing else that lies beside it."""
    state, doomed = folder / STATE, folder / DOOMED
    if state.exists():
        state.rename(doomed)  # first of all: half a checkpoint is none
    files = [*json.loads(doomed.read_text())["files"], DOOMED]
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for path in sorted({(folder / name).parent for name in files} | {folder}, reverse=True):
        with suppress(OSError):  # something is left in it
            path.rmdir()


def clean_up(folder: Path) -> None:
    """Finish what a run that was killed had begun: half-written and half-deleted checkpoints."""
    for path in folder.glob(f".checkpoint-*.{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"checkpoint-*/{DOOMED}"):
        delete_checkpoint(path.parent)


def changed_settings(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = ()) -> list[str]:
    """What differs between the settings of a checkpoint and those of now, `name: old -> new`, but for the free ones."""
    names = [name for name in now if name not in free and before.get(name, now[name]) != now[name]]
    return [f"{name}: {before[name]!r} -> {now[name]!r}" for name in names]


@cache
def without_video(kind: type) -> type:
    """The processor's class without its video part, which needs torchvision: for stills and sound."""
    attributes = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: attributes)})


def load_processor(checkpoint: str) -> ProcessorMixin:
    """The processor of a checkpoint, a name or a folder; without torchvision one that takes no video."""
    if not is_torchvision_available():
        kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(base_of(checkpoint))), None)
        if kind is not None and "video_processor" in kind.get_attributes():
            return without_video(kind).from_pretrained(checkpoint)
    return AutoProcessor.from_pretrained(checkpoint)
