"""Set-up shared by the tests: one hypothesis profile, one thread, and tiny models made once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub

import pytest
import torch
from hypothesis import HealthCheck, settings

from adapters import ADAPTERS
from mm_grpo import quiet_libraries
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
