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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import find_adapter_config_file

from checks import check_setting

if TYPE_CHECKING:
    from mm_grpo import MultimodalRLConfig, Policy

INSTALL = "needs a package: pip install peft==0.21.2"
WEIGHTS = "adapter_model.safetensors"  # peft's name


def check_trained(config: MultimodalRLConfig) -> None:
    """Raises ValueError for settings of what is trained that cannot be, or that nothing would read."""
    for name in ("lora_alpha", "lora_target_modules", "merge_adapter"):
        check_setting(config, name, config.lora_rank or not getattr(config, name), "must be unset without lora_rank")
    rule = "must be unset with lora_rank, which trains adapters alone (lora_target_modules says of which layers)"
    check_setting(config, "freeze", not (config.freeze and config.lora_rank), rule)
    for name in ("freeze", "lora_target_modules"):
        try:
            re.compile(getattr(config, name) or "")
        except re.error as error:
            check_setting(config, name, False, f"must be a regular expression ({error})")


def choose_trained(
    model: nn.Module,
    config: MultimodalRLConfig,
    published_names: Callable[[nn.Module], Iterable[tuple[nn.Parameter, list[str]]]],
) -> None:
    """Give the model its adapters, or freeze what is not trained, as the config says. No global generator is drawn from.

    Args:
        model: a Transformers model where there are adapters; one that was loaded with an adapter goes on with that.
        config: its lora_rank, lora_alpha, lora_target_modules, freeze and seed are read.
        published_names: `checkpoint.published_names`.

    Raises:
        ValueError: names the field: no such layers or parameters, another adapter than the one that is there, no peft.
    """
    if carried := getattr(model, "peft_config", None):
        go_on_with_adapter(model, config, carried)
    elif config.lora_rank:
        add_lora(model, config)
    if config.freeze:
        freeze(model, config.freeze, published_names(model))


def add_lora(model: nn.Module, config: MultimodalRLConfig) -> None:
    """Put an adapter of its rank beside each layer that the config names; nothing else is trained then."""
    if not hasattr(model, "add_adapter"):
        raise ValueError(f"lora_rank={config.lora_rank}: {type(model).__name__} is no Transformers model")
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
    """The full names of the linear layers that these targets choose. Names (ends of them), separated by commas, or one
    regex of full names; None: all of the language model, without the output head."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = model.get_output_embeddings()
    if targets is None:
        inside = set(model.get_decoder().modules()) - {head}
        return [name for name, layer in linear.items() if layer in inside]
    names = targets.split(",") if re.fullmatch(r"[\w.,]+", targets) else []
    patterns = [rf"(.*\.)?{re.escape(name)}" for name in names] or [targets]
    chosen = [[name for name in linear if re.fullmatch(pattern, name)] for pattern in patterns]
    for pattern, found in zip(names or patterns, chosen):
        if not found:
            some = ", ".join(list(linear)[:: max(1, len(linear) // 5)])
            raise ValueError(f"lora_target_modules={targets!r}: no linear layer is named {pattern!r}; some are {some}")
    layers = [name for name in linear if any(name in found for found in chosen)]
    if any(linear[name] is head for name in layers) and head.weight is model.get_input_embeddings().weight:
        raise ValueError(f"lora_target_modules={targets!r}: the output head is tied to the embeddings; leave it out")
    return layers


def go_on_with_adapter(model: nn.Module, config: MultimodalRLConfig, carried: dict[str, Any]) -> None:
    """Train the adapter that the model was loaded with."""
    (name, found), *more = carried.items()
    if not config.lora_rank:
        ways = f"lora_rank={getattr(found, 'r', '...')} goes on training it, the model merged with it trains as a whole"
        raise ValueError(f"lora_rank=0: the model carries an adapter: {ways}")
    odd = [field for field in ("use_dora", "lora_bias", "modules_to_save") if getattr(found, field, None)]
    if more or odd or found.peft_type != "LORA" or getattr(found, "bias", "none") != "none":
        kind = ", ".join([*carried, str(found.peft_type), *odd])
        raise ValueError(f"lora_rank={config.lora_rank}: the model carries other adapters than one plain LoRA: {kind}")
    for field, value in dict(lora_rank=found.r, lora_alpha=found.lora_alpha).items():
        wanted = getattr(config, field)
        check_setting(config, field, wanted in (None, value), f"the model carries an adapter with {value}; take that")
    rule = "must be unset for a model that carries an adapter, which goes on as it is"
    check_setting(config, "lora_target_modules", config.lora_target_modules is None, rule)
    model.set_adapter(name)  # loaded for inference, it needs no gradient
    found.inference_mode = False
    vars(model).pop("_weight_conversions", None)  # Transformers has noted the adapter's there, not the model's
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
        some = ", ".join(seen[:: max(1, len(seen) // 5)])
        raise ValueError(f"freeze={pattern!r}: is found in no parameter's name; some are {some}")
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


def adapter_weights(model: nn.Module, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's weights by the names that peft saves them under; of these weights of the model, or its own."""
    (adapter,), layers = model.active_adapters(), lora_layers(model)
    weights = model.state_dict() if weights is None else weights
    own = [name for name in weights if ".lora_" in name and name.partition(".lora_")[0] in layers]
    return {f"base_model.model.{name.replace(f'.{adapter}.', '.')}": weights[name] for name in own}


def save_adapter(folder: Path, model: nn.Module, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter alone, as peft, Transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[model.active_adapters()[0]].save_pretrained(folder)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_weights(model, weights).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Give the model's adapter the weights that `save_adapter` wrote."""
    saved, own = load_file(folder / WEIGHTS), adapter_weights(model)
    if saved.keys() != own.keys():
        raise ValueError(f"{folder / WEIGHTS}: an adapter of other layers: {sorted(saved.keys() ^ own.keys())[:5]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def base_of(checkpoint: str) -> str:
    """Where the model of a checkpoint lies: of an adapter's its base, which it names; else the checkpoint itself.

    Raises:
        ValueError: an adapter without peft, or its base cannot be found.
    """
    found = find_adapter_config_file(checkpoint)
    if found is None or (Path(checkpoint) / "config.json").exists():
        return checkpoint
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"model={checkpoint!r}: is a LoRA adapter: {INSTALL}") from None
    base = json.loads(Path(found).read_text()).get("base_model_name_or_path")
    whole = f"; with --merge_adapter a whole model lies in {checkpoint}/merged"
    if not base:
        raise ValueError(f"model={checkpoint!r}: is an adapter of a model that was in memory alone{whole}")
    if Path(base).is_absolute() and not Path(base).exists():
        raise ValueError(f"model={checkpoint!r}: is an adapter of {base}, where there is nothing{whole}")
    return base
