"""Tests of gradient checkpointing: the same numbers from activations that are made again.

    pytest test_recompute.py

The model's own forward and backward, without checkpointing, are the oracle. Every family: test_families.py; every
budget of tokens: test_scoring.py.
"""

import pytest
import torch
from torch import nn

from conftest import make_tiny, make_trainer, peak_of_saved_bytes
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig
from recompute import checkpoint_layers
from shared_prefix import find_shared_prompts
from test_hybrid import make_hybrid, values_and_gradients, words
from test_multimodal_inputs import NoAdapter

SMALL = dict(rollouts_per_step=16, rollouts_per_example=4, max_tokens=12, learning_rate=1e-9)
ENV = dict(num_train_examples=8, num_eval_examples=1)


@pytest.fixture
def model():
    return make_tiny("qwen")[0]


def layers_of(model):
    """A layer of the language model and one of the vision tower."""
    return model.model.language_model.layers[0], model.model.visual.blocks[0]


@pytest.mark.parametrize("share", [True, False])
def test_layers_run_twice_and_less_is_kept(share):
    """Of the language model and of the vision tower; once where nothing goes backward: in generation."""
    kept, runs = {}, {}
    for on in (False, True):
        trainer = make_trainer("qwen", ENV, share_prefix=share, gradient_checkpointing=on, **SMALL)
        calls = {layer.mlp: 0 for layer in layers_of(trainer.model)}

        def count(mlp, *_, calls=calls):
            calls[mlp] += 1

        for mlp in calls:
            mlp.register_forward_pre_hook(count)  # the second run ends in it, with the last tensor that is needed
        batch = trainer.adapter.build_batch(trainer.rollouts.collect())
        sampling = list(calls.values())
        trainer.update(batch)  # tries the output head and the shared prompts
        before = list(calls.values())
        kept[on] = peak_of_saved_bytes(lambda trainer=trainer, batch=batch: trainer.update(batch, False))
        runs[on] = sampling, [now - then for now, then in zip(calls.values(), before)]
    assert runs[True][0] == runs[False][0]
    assert runs[True][1] == [2 * n for n in runs[False][1]]
    assert kept[True] < 0.6 * kept[False]  # three layers in all, of which one is made again at a time, and the head


def test_nothing_is_dropped_out(model):
    """The model stays in eval mode, its layers too: a policy with dropout would not be the one that acted."""
    trainer = make_trainer("qwen", ENV, gradient_checkpointing=True, **SMALL)
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    metrics = trainer.step()
    assert not any(module.training for module in trainer.model.modules())
    assert metrics["ratio_max"] < 1 + 1e-4 and metrics["shared_prefix_fraction"] == 1


def test_a_model_samples_the_same_and_is_as_before_once_it_is_switched_off(model):
    answers = {}
    for on in (True, False):
        trainer = make_trainer("qwen", ENV, gradient_checkpointing=on, tiny=None, **SMALL)
        outputs = trainer.rollouts.collect()["outputs"]
        answers[on] = [r["trajectory"][0]["tokens"]["completion_ids"] for r in outputs]
    assert answers[True] == answers[False]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for on in (True, True, False):
        checkpoint_layers(model, on)
        assert ["forward" in vars(layer) for layer in layers_of(model)] == [on, on]
        once = [getattr(layer.forward, "args", [None])[0] for layer in layers_of(model)]
        assert not on or not any(hasattr(forward, "args") for forward in once)  # not twice around
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "gemma3"])
def test_models_with_other_states_than_keys_and_values_take_the_plain_forward(name):
    """A convolution's state would be updated twice. A window of keys is no such state."""
    model, adapter = make_hybrid(name)
    batch = adapter.build([(prompt, words(n)) for n in (5, 1, 9) for prompt in ("text", "picture", "long")])
    expected, gradients = values_and_gradients(model, adapter, batch, None)
    checkpoint_layers(model, True)
    shared = find_shared_prompts(model, batch, adapter.placeholder_ids)
    assert (shared is None) == (name != "gemma3")
    values, again = values_and_gradients(model, adapter, batch, shared)
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for parameter, gradient in gradients.items():
        assert (again[parameter] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * total, parameter


class NoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask):
        return self.head(self.embedding(input_ids))


def test_a_model_without_such_layers_is_refused_by_name():
    config = MultimodalRLConfig(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=True: NoLayers has no layers to checkpoint"):
        MultimodalGRPOTrainer(NoLayers(), None, NoAdapter(None), config, server=object())
