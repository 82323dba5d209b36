"""Tests of what is trained: LoRA adapters beside the weights, and weights that are frozen.

    pytest test_lora.py

What a real vLLM server gets of them is in test_vllm.py. Adapters are held against peft's own code, its merge and its
loader.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import verifiers as vf
from torch import nn

import tiny_vlm
from adapters import load_model
from checkpoint import checkpoints, published_names, published_weights, save_checkpoint
from conftest import make_tiny, make_trainer, needs
from lora import WEIGHTS, adapters_off, choose_trained, lora_layers, without_adapters
from mm_grpo import MultimodalRLConfig
from test_resume import bits, metrics, run

NAMES = {"red": "green", "green": "blue", "blue": "yellow", "yellow": "red"}  # the changed task
ENV = {"num_train_examples": 8, "num_eval_examples": 4}
SMALL = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, eval_examples=0, learning_rate=1e-2)
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def trainer(family="qwen", **settings):
    return make_trainer(family, **{"env": ENV, **SMALL, **settings})


def with_adapter(model, seed=0, **settings):
    """The model with an adapter that does something: B is zero when it is made."""
    choose_trained(model, MultimodalRLConfig(**{"lora_rank": 8, **settings}), published_names(model))
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) / 10)
    return model


def flat(model) -> torch.Tensor:
    return torch.cat([weight.flatten() for _, weight in sorted(published_weights(model), key=lambda each: each[0])])


@torch.no_grad()
def logits(model, adapter) -> torch.Tensor:
    """Of two prompts with their pictures."""
    rows = vf.load_environment("shapes-env", num_train_examples=2, num_eval_examples=1).get_dataset().to_list()
    return model(**adapter.prompt_inputs([adapter.encode_prompt(row["prompt"]) for row in rows])).logits


# ---------------------------------------------------------------- learning


def teach(model, adapter, steps: int, noise: float = 0.3) -> None:
    """Supervised steps on the shapes, the colour of some answers drawn anew: a base that knows them and is not sure."""
    rows = vf.load_environment("shapes-env", num_train_examples=512, num_eval_examples=1).get_dataset().to_list()
    inputs = adapter.prompt_inputs([adapter.encode_prompt(row["prompt"]) for row in rows])  # all of one length
    spoken, N = [adapter.tokenizer.encode(row["answer"]) for row in rows], len(rows)
    answers = torch.tensor([[*ids, adapter.tokenizer.eos_token_id] for ids in spoken])  # (N, 3)
    colours, generator = answers[:, 0].unique(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        chosen = torch.randint(N, (32,), generator=generator)
        batch = {name: tensor.unflatten(0, (N, -1))[chosen].flatten(0, 1) for name, tensor in inputs.items()}
        said, other = answers[chosen], colours[torch.randint(len(colours), (32,), generator=generator)]
        said[:, 0] = torch.where(torch.rand(32, generator=generator) < noise, other, said[:, 0])
        more = {"input_ids": said, "attention_mask": torch.ones_like(said), "mm_token_type_ids": torch.zeros_like(said)}
        batch |= {name: torch.cat([batch[name], tensor], dim=1) for name, tensor in more.items()}
        scores = model(**batch).logits[:, -4:-1]  # that predict the answer
        nn.functional.cross_entropy(scores.flatten(0, 1), said.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@needs("peft")
def test_an_adapter_of_rank_8_learns_a_changed_task_on_a_trained_base():
    """The colours are called otherwise: a base that is right about the shapes has every colour wrong."""
    model, adapter = make_tiny("qwen")
    teach(model, adapter, steps=200)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = dict(lora_rank=8, learning_rate=5e-3, lr_scheduler_type="linear", max_steps=80, scale_rewards="batch")
    settings |= dict(rollouts_per_step=32, updates_per_batch=3, eval_examples=64)
    env = dict(num_train_examples=512, num_eval_examples=64, colour_names=NAMES)
    learner = trainer(tiny=(model, adapter), env=env, **settings)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained < 0.15 * sum(weight.numel() for weight in model.parameters())
    score = learner.evaluate()
    assert score["exact"] == 0 and score["shape"] > 0.9
    for _ in range(80):
        assert learner.step()["shared_prefix_fraction"] == 1
    assert learner.evaluate()["exact"] > 0.9
    after = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters()}
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())  # the base has not moved


# ---------------------------------------------------------------- the policy and its reference


@needs("peft")
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"share_prefix": False}], ids=str)
def test_the_reference_is_the_base_without_a_copy_and_kl_is_exactly_zero_at_first(family, settings):
    made = trainer(family, lora_rank=8, beta=0.1, **settings)
    base = copy.deepcopy(make_tiny(family)[0])
    seen = []
    loss = made.loss
    made.loss = lambda logprobs, **of_batch: seen.append(of_batch["ref_logprobs"]) or loss(logprobs, **of_batch)
    first = made.step()
    assert first["kl"] == 0.0 and 1 - 1e-4 < first["ratio_min"] <= first["ratio_max"] < 1 + 1e-4
    assert first["shared_prefix_fraction"] == (0 if "share_prefix" in settings else 1)
    assert made.ref_policy is made.policy and made.policy.head_is_last
    second = made.step()
    assert second["kl"] > 1e-4 and all(weight.requires_grad for weight in made.optimizer.param_groups[0]["params"])
    # the same batch under a base that never had an adapter
    batch = made.adapter.build_batch(made.rollouts.collect())
    seen.clear()
    made.update(batch)
    made.policy.model, made.policy.sharing_is_exact, trained = base, None, batch.loss_mask[:, 1:] != 0
    with torch.no_grad():
        expected, _ = made.policy(batch)
    assert (seen[-1] - expected)[trained].abs().max() < 1e-5


@needs("peft")
def test_adapters_are_on_again_whatever_happens_while_they_are_off():
    model, adapter = make_tiny("qwen")
    base = logits(model, adapter)
    with_adapter(model)
    adapted = logits(model, adapter)
    assert (adapted - base).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits(model, adapter), base)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(logits(model, adapter), adapted)
    assert all(weight.requires_grad == (".lora_" in name) for name, weight in model.named_parameters())


@needs("peft")
def test_an_adapter_is_random_by_the_runs_seed_alone_and_leaves_the_global_generator_alone():
    def adapter_of(seed, at):
        model, _ = make_tiny("qwen")
        torch.manual_seed(at)
        choose_trained(model, MultimodalRLConfig(lora_rank=8, seed=seed), published_names(model))
        drawn = torch.rand(1)
        torch.manual_seed(at)
        assert torch.equal(drawn, torch.rand(1))
        return torch.cat([layer.lora_A["default"].weight.flatten() for layer in lora_layers(model).values()])

    assert torch.equal(adapter_of(0, at=1), adapter_of(0, at=2)) and not torch.equal(adapter_of(0, 1), adapter_of(1, 1))


@needs("peft")
def test_adapters_are_of_the_language_models_linear_layers_or_of_those_that_are_named():
    def names(family="qwen", **settings):
        return set(lora_layers(with_adapter(make_tiny(family)[0], **settings)))

    for family in ("qwen", "llava"):
        language = {f"model.language_model.layers.{i}" for i in (0, 1)}
        found = names(family)
        assert {name.rsplit(".", 2)[0] for name in found} == language and {n.rpartition(".")[2] for n in found} == {
            *LAYERS
        }
    assert names(lora_target_modules="1.self_attn.q_proj,qkv") == {
        *("model.language_model.layers.1.self_attn.q_proj", "model.visual.blocks.0.attn.qkv")
    }
    assert names(lora_target_modules=r".*layers\.0\.mlp\.\w+") == {
        f"model.language_model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


@needs("peft")
def test_adapters_beside_bfloat16_weights_are_float32_and_their_policy_is_the_bases_at_first():
    model, adapter = make_tiny("qwen")
    made = trainer(tiny=(model.bfloat16(), adapter), lora_rank=4, beta=0.1, mismatch_threshold=1.0)
    kinds = {".lora_" in name: weight.dtype for name, weight in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert made.step()["kl"] == 0.0
    assert {weight.dtype for _, weight in published_weights(model)} == {torch.bfloat16}


@needs("peft")
def test_lora_alpha_is_what_adapters_add_over_the_rank():
    ones = lambda **settings: with_adapter(make_tiny("qwen")[0], **settings)
    name, base = "model.layers.0.mlp.up_proj.weight", dict(published_weights(make_tiny("qwen")[0]))
    added = {alpha: dict(published_weights(ones(lora_alpha=alpha)))[name] - base[name] for alpha in (None, 8, 16)}
    assert torch.equal(added[None], added[16]) and torch.allclose(added[16], 2 * added[8], atol=1e-6)


# ---------------------------------------------------------------- merged


@needs("peft")
@pytest.mark.parametrize("family", ["qwen", "llava", "qwen3_5_moe", "ernie4_5_vl_moe"])
def test_published_weights_are_merged_as_peft_merges_and_have_the_bases_names(family):
    """Also where published ones are stacked, or only whole layers have a published form."""
    model, _ = tiny_vlm.make_tiny(family)
    base = dict(published_weights(model))
    with_adapter(model)
    assert all(torch.equal(weight, base[name]) for name, weight in published_weights(model, merge=False))
    published = dict(published_weights(model))
    for layer in lora_layers(model).values():
        layer.merge()
    merged = dict(published_weights(model, merge=False))
    assert published.keys() == merged.keys() == base.keys()
    assert max((published[name] - merged[name]).abs().max() for name in base) < 1e-6
    changed = {name for name in base if not torch.equal(published[name], base[name])}
    trained = {name for name, _ in published_weights(model, trained=True)}
    assert changed < trained < base.keys() and all(".layers." in name and "vis" not in name for name in trained)


@needs("peft")
def test_a_merged_model_has_the_adapted_ones_logits(tmp_path):
    model, adapter = make_tiny("qwen")
    base = logits(model, adapter)
    with_adapter(model)
    plain = make_tiny("qwen", seed=1)[0]
    plain.load_state_dict(without_adapters(model, model.state_dict()))
    assert (logits(plain, adapter) - logits(model, adapter)).abs().max() < 1e-5
    assert (logits(plain, adapter) - base).abs().max() > 0.1


# ---------------------------------------------------------------- checkpoints


@needs("peft")
def test_a_checkpoint_is_the_adapter_as_peft_and_transformers_load_it(tmp_path):
    from peft import PeftModel

    model, adapter = make_tiny("qwen")
    save_checkpoint(tmp_path / "base", model, adapter)
    tiny = type(model).from_pretrained(tmp_path / "base").eval(), adapter
    made = run(tmp_path / "run", tiny=tiny, lora_rank=8, max_steps=2, merge_adapter=True)
    (folder,) = checkpoints(tmp_path / "run")
    with torch.no_grad():
        expected = logits(made.model, adapter)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base") and settings["r"] == 8
    assert (folder / WEIGHTS).stat().st_size < 0.15 * (tmp_path / "base" / "model.safetensors").stat().st_size
    assert not (folder / "config.json").exists() and (folder / "processor_config.json").exists()
    by_peft = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), folder)
    assert torch.equal(logits(by_peft.eval(), adapter), expected)
    assert torch.equal(logits(type(model).from_pretrained(folder).eval(), adapter), expected)

    whole = type(model).from_pretrained(folder / "merged").eval()
    assert not lora_layers(whole) and (logits(whole, adapter) - expected).abs().max() < 1e-5
    assert {path.name for path in (folder / "merged").iterdir()} >= {"config.json", "processor_config.json"}
    assert json.loads((folder / "merged" / "config.json").read_text())["architectures"] == [type(model).__name__]

    # the command line takes both
    for path, rank in ((folder, 8), (folder / "merged", 0)):
        again, _, its_adapter = load_model("auto", str(path), MultimodalRLConfig())
        assert (logits(again.eval(), its_adapter) - expected).abs().max() < 1e-5
        assert bool(lora_layers(again)) == bool(rank)


@needs("peft")
@pytest.mark.parametrize(
    "settings", [{"lora_rank": 4, "beta": 0.1, "merge_adapter": True}, {"freeze": "visual"}], ids=str
)
def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path, settings):
    run(tmp_path / "whole", max_steps=4, **settings)
    run(tmp_path / "parts", max_steps=2, **settings)
    torch.manual_seed(7)
    run(tmp_path / "parts", max_steps=4, resume_from_checkpoint="true", **settings)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts") and len(metrics(tmp_path / "parts")) == 4
    assert bits(tmp_path / "whole" / "checkpoint-4") == bits(tmp_path / "parts" / "checkpoint-4")
    assert bits(tmp_path / "parts" / "checkpoint-2") != bits(tmp_path / "parts" / "checkpoint-4")


@needs("peft")
def test_an_old_checkpoint_goes_with_its_merged_model_and_merging_may_change_on_the_way(tmp_path):
    settings = dict(lora_rank=4, save_steps=1, save_total_limit=1)
    run(tmp_path, max_steps=2, merge_adapter=True, **settings)
    assert (tmp_path / "checkpoint-2" / "merged" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1").exists()
    run(tmp_path, max_steps=3, resume_from_checkpoint="true", **settings)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "checkpoint-3" / "merged").exists()
    with pytest.raises(ValueError, match="not the run's settings: lora_rank: 4 -> 8"):
        run(tmp_path, max_steps=4, resume_from_checkpoint="true", **{**settings, "lora_rank": 8})


@needs("peft")
def test_an_adapter_that_a_model_was_loaded_with_is_trained_on(tmp_path):
    model, adapter = make_tiny("qwen")
    save_checkpoint(tmp_path / "base", model, adapter)
    base = type(model).from_pretrained(tmp_path / "base").eval()
    save_checkpoint(tmp_path / "adapter", with_adapter(base), adapter)
    load = lambda: (type(model).from_pretrained(tmp_path / "adapter").eval(), adapter)
    made = trainer(tiny=load(), lora_rank=8, beta=0.1)
    before = flat(made.model)
    assert torch.equal(before, flat(base))
    step = made.step()
    assert step["kl"] > 1e-3 and step["grad_norm"] > 0 and not torch.equal(flat(made.model), before)  # KL to the base
    refused = {
        "lora_rank=0: the model carries an adapter; set the rank to go on": dict(lora_rank=0),
        "lora_rank=4: the model carries an adapter of 8; take that": dict(lora_rank=4),
        "lora_alpha=8: the model carries an adapter of 16": dict(lora_rank=8, lora_alpha=8),
        "lora_target_modules='q_proj': must be unset": dict(lora_rank=8, lora_target_modules="q_proj"),
    }
    for message, settings in refused.items():
        with pytest.raises(ValueError, match=message):
            trainer(tiny=load(), **settings)


@needs("peft")
def test_an_adapter_whose_base_is_not_there_is_refused_with_the_way_out(tmp_path, monkeypatch):
    model, adapter = make_tiny("qwen")
    save_checkpoint(tmp_path / "adapter", with_adapter(model), adapter, merge=True)
    load = lambda: load_model("auto", str(tmp_path / "adapter"), MultimodalRLConfig())
    with pytest.raises(ValueError, match="is a LoRA adapter: its base, a model in memory, cannot.*adapter/merged"):
        load()
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/moved/away"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is a LoRA adapter: its base, /moved/away, cannot be found"):
        load()
    settings["base_model_name_or_path"] = str(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("lora.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"is a LoRA adapter: needs a package: pip install peft==0.21.2"):
        load()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("lora_alpha=16: must be unset without lora_rank", dict(lora_alpha=16)),
        ("lora_target_modules='q_proj': must be unset without", dict(lora_target_modules="q_proj")),
        ("merge_adapter=True: must be unset without lora_rank", dict(merge_adapter=True)),
        ("freeze='visual': must be unset with lora_rank", dict(freeze="visual", lora_rank=4)),
        (r"freeze='\[': must be a regular expression", dict(freeze="[")),
        (r"lora_target_modules='\*': must be a regular expression", dict(lora_target_modules="*", lora_rank=4)),
    ],
)
def test_settings_that_do_not_go_together_are_refused(message, settings):
    with pytest.raises(ValueError, match=message):
        MultimodalRLConfig(**settings)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("freeze='vision_tower': is found in no parameter's name; some are visual", dict(freeze="vision_tower")),
        ("freeze='': is found in every parameter's name: nothing is left", dict(freeze=".")),
        ("lora_target_modules='q_proj,c_attn': no linear layer is named 'c_attn'; some are model", dict(lora_rank=4)),
        (r"lora_target_modules='model\.\*norm': no linear layer is named", dict(lora_rank=4)),
    ],
)
def test_what_the_model_does_not_have_is_refused_with_names_that_it_has(message, settings):
    pytest.importorskip("peft") if settings.get("lora_rank") else None
    if "lora_rank" in settings:
        settings = {**settings, "lora_target_modules": message.split("'")[1].replace("\\", "")}
    if "every" in message:
        message = message.replace("''", r"'\.'")
    with pytest.raises(ValueError, match=message):
        trainer(**settings)


@needs("peft")
def test_adapters_need_peft_and_a_transformers_model_and_a_head_of_its_own(monkeypatch):
    model, adapter = make_tiny("qwen")
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="lora_target_modules='lm_head': the output head is tied to the embeddings"):
        trainer(tiny=(model, adapter), lora_rank=4, lora_target_modules="lm_head")
    with pytest.raises(ValueError, match="lora_rank=4: Sequential is no Transformers model"):
        choose_trained(nn.Sequential(nn.Linear(2, 2)), MultimodalRLConfig(lora_rank=4), ())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank=4: needs a package: pip install peft==0.21.2"):
        trainer(lora_rank=4)


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize(("family", "pattern"), [("qwen", "visual"), ("llava", "vision_tower|multi_modal_projector")])
def test_frozen_weights_have_no_gradient_no_state_and_no_copy_and_stay_as_they_are(family, pattern):
    made = trainer(family, freeze=pattern, beta=0.1)
    frozen = {n: w.clone() for n, w in made.model.named_parameters() if not w.requires_grad}
    assert {name.split(".")[1] for name in frozen} == set(pattern.split("|"))
    assert {n for n, w in made.model.named_parameters() if not any(part in n for part in pattern.split("|"))} == {
        name for name, weight in made.model.named_parameters() if weight.requires_grad
    }
    assert made.step()["kl"] == 0.0 and made.step()["kl"] > 1e-5
    weights = dict(made.model.named_parameters())
    assert all(torch.equal(weights[name], weight) and weights[name].grad is None for name, weight in frozen.items())
    assert len(made.optimizer.state) == len(weights) - len(frozen)
    copied = dict(made.ref_policy.model.named_parameters())
    assert {name for name in weights if copied[name] is weights[name]} == set(frozen)


def test_names_are_found_as_published_checkpoints_spell_them():
    """A CLIP tower's have a level more there than in Transformers 5."""
    made = trainer("llava", freeze=r"^vision_tower\.vision_model\.encoder")
    frozen = [name for name, weight in made.model.named_parameters() if not weight.requires_grad]
    assert frozen and all(name.startswith("model.vision_tower.encoder.") for name in frozen)


def test_parameters_that_are_one_here_and_many_published_are_frozen_together_or_not_at_all():
    def frozen(pattern):
        model, _ = tiny_vlm.make_tiny("qwen3_5_moe")
        choose_trained(model, MultimodalRLConfig(freeze=pattern), published_names(model))
        return {name.rpartition(".")[2] for name, weight in model.named_parameters() if not weight.requires_grad}

    assert frozen(r"mlp\.experts\.") == {"gate_up_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"are one parameter here: freeze all of them, or none"):
        frozen(r"experts\.0\.down_proj")


def test_what_is_trained_is_published_in_whole_blocks():
    """One frozen part of a layer that a server fuses goes with the others."""
    made = trainer(freeze=r"visual|embed_tokens|lm_head|layers\.0|layers\.1\.self_attn\.(q|k)_proj|model\.norm")
    sent = {name for name, _ in published_weights(made.model, trained=True)}
    every = {name for name, _ in published_weights(made.model)}
    assert sent == {name for name in every if "model.layers.1." in name}
    assert {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"} < sent


def test_a_setting_of_what_is_trained_changes_what_is_written(tmp_path):
    """merge_adapter is seen above; with freeze the optimizer's state is smaller."""
    sizes = []
    for freeze in (None, "visual"):
        folder = Path(tmp_path, str(freeze))
        run(folder, max_steps=1, freeze=freeze)
        sizes.append((folder / "checkpoint-1" / "optimizer.state").stat().st_size)
    assert sizes[1] < 0.9 * sizes[0]
