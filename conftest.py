"""Set-up shared by the tests: one hypothesis profile, one thread, tiny models, pictures, messages, trainers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub

import random

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from adapters import ADAPTERS
from local_server import LocalServer
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig
from report import quiet_libraries
from shapes_env import COLOURS, draw_shape, png_data_uri
from tiny_vlm import FAMILIES, make_tiny_vlm

# The same examples on every run, however slow the machine; `--hypothesis-profile=explore` draws new ones.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("explore", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci")

torch.set_num_threads(1)  # these models are too small to share, and two test runs beside each other would spin
quiet_libraries()


def make_tiny(family: str, seed: int = 0):
    """(model, adapter) of a family, new weights."""
    model, tokenizer, image_processor = make_tiny_vlm(family, seed=seed)
    return model, ADAPTERS[family](tokenizer, image_processor, model.config)


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request):
    """(model, adapter) of each family in turn; tests must leave the weights as they are."""
    return make_tiny(request.param)


def favour(model, token: int, by: float) -> None:
    """Give a model an output head for which the logit of this token is `by` above what the weights say."""
    head = nn.Linear(*model.lm_head.weight.T.shape)
    head.weight.data.copy_(model.lm_head.weight)
    head.bias.data.zero_()[token] = by
    model.lm_head = head


def make_trainer(
    family="qwen", env=None, server=None, seed=0, favoured=None, by=0.0, max_model_len=None, tiny=None, **config
) -> MultimodalGRPOTrainer:
    """A trainer with a tiny model of its own.

    Args:
        env: a verifiers environment, or a dict: the shapes environment with these arguments.
        server: where completions come from; None: what the config says.
        seed: of the weights and of the run.
        favoured: name of a token (the tokenizer's `eos_token_id`, the adapter's `image_token_id`) whose logit is `by`
            above what the weights say.
        max_model_len: of the server in this process.
        tiny: (model, adapter) to train, in place of new ones of the family.
        config: settings, see MultimodalRLConfig.
    """
    model, adapter = tiny or make_tiny(family, seed=seed)
    if favoured is not None:
        token = getattr(adapter, favoured, None)
        favour(model, getattr(adapter.tokenizer, favoured) if token is None else token, by)
    if max_model_len is not None:
        server = LocalServer(model, adapter, seed=seed, max_model_len=max_model_len)
    config = MultimodalRLConfig(seed=seed, **config)
    trainer = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, config, server=server)
    if isinstance(env, dict):
        trainer.set_environment("shapes-env", **env)
    elif env is not None:
        trainer.set_environment(env)
    return trainer


def picture(seed: int = 0) -> dict:
    """A content part of a message: a circle of one of four colours, drawn anew for each seed."""
    drawn = draw_shape(list(COLOURS)[seed % len(COLOURS)], "circle", 56, random.Random(seed))
    return {"type": "image_url", "image_url": {"url": png_data_uri(drawn)}}


def message(*parts) -> list[dict]:
    """The messages of a chat that starts: one of the user, of these parts; a string is text."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]
