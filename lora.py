"""What is trained: LoRA adapters beside the weights (https://arxiv.org/abs/2106.09685), or the weights but frozen ones.

    y = W x + (alpha / rank) B A x        A (rank, in) is random, B (out, rank) zero: the first policy is the model

Adapters are peft's, added by Transformers itself (`model.add_adapter`): the model keeps its class, where a `PeftModel`
around it would hide its cache, and with that the shared prefix. W stays as it is, so the model with its adapters off is
the reference policy, without a copy.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import find_adapter_config_file, is_peft_available

from checks import check_setting
from parallel import placed

if TYPE_CHECKING:
    from mm_grpo import MultimodalRLConfig, Policy

INSTALL = "needs a package: pip install peft==0.21.2"
WEIGHTS = "adapter_model.safetensors"  # peft's name


def choose_trained(
    model: nn.Module, config: MultimodalRLConfig, names: Iterable[tuple[nn.Parameter, list[str]]]
) -> None:
    """Give the model its adapters, or freeze what is not trained, as the config says.

    Args:
        model: a Transformers model where there are adapters; one that was loaded with an adapter goes on with that.
        config: its lora_rank, lora_alpha, lora_target_modules, freeze and seed are read. No global generator is.
        names: `checkpoint.published_names` of the model.

    Raises:
        ValueError: names the field: no such layers or parameters, another adapter than the one that is there, no peft.
    """
    if carried := getattr(model, "peft_config", None):
        go_on_with_adapter(model, config, carried)
    elif config.lora_rank:
        add_lora(model, config)
    if config.freeze:
        freeze(model, config.freeze, names)


def add_lora(model: nn.Module, config: MultimodalRLConfig) -> None:
    """Put an adapter beside each layer that the config names; nothing else is trained then."""
    check_setting(
        config, "lora_rank", hasattr(model, "add_adapter"), f"{type(model).__name__} is no Transformers model"
    )
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise ValueError(f"lora_rank={config.lora_rank}: {INSTALL}") from None
    settings = dict(r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank)
    layers = target_layers(model, config.lora_target_modules)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # the CPU's, on which A is drawn
        model.add_adapter(LoraConfig(**settings, target_modules=layers))
    keep_in_float32(model)


def keep_in_float32(model: nn.Module) -> None:
    """Adapters, beside weights of any type: in bfloat16 AdamW's steps would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_layers(model: nn.Module, targets: str | None) -> list[str]:
    """The full names of the linear layers that these targets choose: names or ends of them, separated by commas, or one
    regex of full names; None: all of the language model but the output head."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = model.get_output_embeddings()
    if targets is None:
        inside = set(model.get_decoder().modules()) - {head}
        return [name for name, layer in linear.items() if layer in inside]
    chosen, is_list = set(), re.fullmatch(r"[\w.,]+", targets)
    for target in targets.split(",") if is_list else [targets]:
        pattern = rf"(.*\.)?{re.escape(target)}" if is_list else target
        found = {name for name in linear if re.fullmatch(pattern, name)}
        if not found:
            some = f"some are {', '.join(spread(linear))}"
            raise ValueError(f"lora_target_modules={targets!r}: no linear layer is named {target!r}; {some}")
        chosen |= found
    if any(linear[name] is head for name in chosen) and head.weight is model.get_input_embeddings().weight:
        raise ValueError(f"lora_target_modules={targets!r}: the output head is tied to the embeddings; leave it out")
    return [name for name in linear if name in chosen]


def spread(names: Iterable[str]) -> list[str]:
    """A few of many names."""
    names = list(names)
    return names[:: max(1, len(names) // 5)]


def go_on_with_adapter(model: nn.Module, config: MultimodalRLConfig, carried: dict[str, Any]) -> None:
    """Train the adapter that the model was loaded with."""
    (name, found), *more = carried.items()
    there = "the model carries an adapter"
    merge = "set the rank to go on training it, or start from the model merged with it"
    check_setting(config, "lora_rank", config.lora_rank, f"{there}; {merge}")
    plain = str(found.peft_type.value) == "LORA" and getattr(found, "bias", None) == "none"
    odd = [field for field in ("use_dora", "lora_bias", "modules_to_save") if getattr(found, field, None)]
    check_setting(config, "lora_rank", plain and not (more or odd), f"{there} that is not one plain LoRA; merge it")
    for field, value in dict(lora_rank=found.r, lora_alpha=found.lora_alpha, lora_target_modules=None).items():
        rule = f"{there} of {value}; take that" if value else f"must be unset: {there}, which stays where it is"
        check_setting(config, field, getattr(config, field) in (None, value), rule)
    if found.inference_mode:  # so Transformers loads it
        model.set_adapter(name)
        found.inference_mode = False
        vars(model).pop("_weight_conversions", None)  # it has noted the adapter's there, not the model's
    keep_in_float32(model)


def freeze(model: nn.Module, pattern: str, published: Iterable[tuple[nn.Parameter, list[str]]]) -> None:
    """No gradient for the parameters in whose published name the regex is found, anywhere in it (`re.search`)."""
    seen, frozen = [], 0
    for parameter, names in published:
        found = [bool(re.search(pattern, name)) for name in names]
        if any(found) and not all(found):
            raise ValueError(f"freeze={pattern!r}: {names} are one parameter here: freeze all of them, or none")
        seen += names
        frozen += any(found)
        parameter.requires_grad_(parameter.requires_grad and not any(found))
    if not frozen:
        raise ValueError(f"freeze={pattern!r}: is found in no parameter's name; some are {', '.join(spread(seen))}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={pattern!r}: is found in every parameter's name: nothing is left to train")


def reference_of(policy: Policy) -> Policy:
    """A policy that stays as this one is now: itself where it has adapters, to be run with `adapters_off`; else a copy,
    which shares what is frozen."""
    if lora_layers(policy.model):
        return policy
    shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was without its adapters; where it has none, as it is."""
    if not lora_layers(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def without_adapters(model: nn.Module, weights: dict[str, Tensor], merge: bool = True) -> dict[str, Tensor]:
    """These weights of the model, by name, as they are called where there are no adapters.

    Args:
        weights: of the whole model or of whole layers, adapters included.
        merge: add to each weight what its adapter adds, in float32; else leave that out.
    """
    layers, plain = lora_layers(model), {}
    for name, weight in weights.items():
        layer, of_adapter, _ = name.partition(".lora_")
        if of_adapter and layer in layers:
            continue
        layer, inner, kind = name.partition(".base_layer.")
        if layer in layers and merge and kind == "weight":
            (adapter,), scaling = layers[layer].active_adapters, layers[layer].scaling
            A, B = (weights[f"{layer}.lora_{letter}.{adapter}.weight"].detach().float() for letter in "AB")
            weight = (weight.float() + (B @ A) * scaling[adapter]).to(weight.dtype)
        plain[f"{layer}.{kind}" if inner else name] = weight
    return plain


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights by the names that peft saves them under."""
    (adapter,), layers = model.active_adapters(), lora_layers(model)
    own = {name: each.detach() for name, each in model.named_parameters() if name.partition(".lora_")[0] in layers}
    own = {name: each for name, each in own.items() if ".lora_" in name}
    return {f"base_model.model.{name.replace(f'.{adapter}.', '.')}": each for name, each in own.items()}


def save_adapter(folder: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write the adapter alone, these `adapter_weights`, as peft, Transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[model.active_adapters()[0]].save_pretrained(folder)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Give the model's adapter the weights that `save_adapter` wrote."""
    saved, own = load_file(folder / WEIGHTS), adapter_weights(model)
    if saved.keys() != own.keys():
        raise ValueError(f"{folder / WEIGHTS}: an adapter of other layers: {sorted(saved.keys() ^ own.keys())[:5]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(placed(saved[name], tensor))


def base_of(checkpoint: str) -> str:
    """Where the model of a checkpoint lies: of an adapter's its base, which it names; else the checkpoint itself.

    Raises:
        ValueError: an adapter without peft, or its base cannot be found.
    """
    found = find_adapter_config_file(checkpoint)
    if found is None or (Path(checkpoint) / "config.json").exists():
        return checkpoint
    base = json.loads(Path(found).read_text()).get("base_model_name_or_path")
    reason = None if is_peft_available() else INSTALL
    if not base or (Path(base).is_absolute() and not Path(base).exists()):
        whole = f"{checkpoint}/merged is a whole model, where the run had --merge_adapter"
        reason = f"its base, {base or 'a model in memory'}, cannot be found; {whole}"
    if reason:
        raise ValueError(f"model={checkpoint!r}: is a LoRA adapter: {reason}")
    return base
