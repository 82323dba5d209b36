"""Set-up shared by the tests: one hypothesis profile, one thread, tiny models, pictures, messages, trainers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub

import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import tiny_vlm
from adapters import ADAPTERS, ProcessorAdapter
from local_server import LocalServer
from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig
from report import quiet_libraries
from shapes_env import COLOURS, draw_shape, png_data_uri
from tiny_vlm import make_tiny_vlm

DEMONSTRATIONS = ("qwen", "llava")  # the families that the command line makes by itself; every other: test_families.py

# Qwen3-VL's published chat template, without its videos: the tools in the system turn, calls in the assistant's, what
# they gave in a user's.
TOOL_TEMPLATE = """
{%- macro show(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set system = messages[0].role == 'system' %}
{%- if tools or system %}
    {{- '<|im_start|>system\n' }}
    {%- if system %}
        {{- show(messages[0].content) }}
    {%- endif %}
    {%- if tools %}
        {{- '\n\n' if system else '' }}
        {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
        {%- for tool in tools %}
            {{- '\n' }}
            {{- tool | tojson }}
        {%- endfor %}
        {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
        {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' }}
        {{- '<args-json-object>}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' }}
        {{- show(message.content) }}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {{- show(message.content) }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\n' if message.content or not loop.first else '' }}
            {%- set call = tool_call.function or tool_call %}
            {{- '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- '\n<tool_response>\n' }}
        {{- show(message.content) }}
        {{- '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

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


def make_tool_user(*answers: str, family: str = "qwen3_vl"):
    """(model, adapter) with a chat template that knows tools. With `answers`, each a token of its own, the policy says
    one of them or stops, with about the same probability."""
    model, processor = tiny_vlm.make_tiny(family)
    processor.chat_template = TOOL_TEMPLATE
    processor.tokenizer.add_tokens(list(answers))
    model.resize_token_embeddings(len(processor.tokenizer))
    for token in (*answers, processor.tokenizer.eos_token) if answers else ():
        favour(model, processor.tokenizer.convert_tokens_to_ids(token), by=9.0)
    return model, ProcessorAdapter(processor, model.config)


def pytest_collection_modifyitems(items):
    """Tests that wait for vLLM servers come first: with `-n 2` they are one worker's, whose other tests the second one
    takes over. Last, they would be what both wait for."""
    items.sort(key=lambda item: not item.path.name.startswith("test_vllm"))


@pytest.fixture(scope="session", params=DEMONSTRATIONS)
def tiny(request):
    """(model, adapter) of each family in turn; tests must leave the weights as they are."""
    return make_tiny(request.param)


# What Transformers' classes of a family ask for beyond the project's packages; `.ci/run` installs all of it
NEEDS = {"smolvlm": ("torchvision", "num2words"), **dict.fromkeys(("mistral3", "pixtral"), ("torchvision",))}
NEEDS |= dict.fromkeys(("cohere2_vision", "ernie4_5_vl_moe", "lfm2_vl", "lighton_ocr", "llama4"), ("torchvision",))


def not_installed(family: str) -> str:
    """The packages that this family needs and that are not here; in CI none may be missing."""
    return "" if os.environ.get("CI") else ", ".join(name for name in NEEDS.get(family, ()) if not find_spec(name))


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test where this package is not installed; in CI none may be missing."""
    missing = not (os.environ.get("CI") or find_spec(package))
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def favour(model, token: int, by: float) -> None:
    """Give a model an output head for which the logit of this token is `by` above what the weights say."""
    head = nn.Linear(*model.lm_head.weight.T.shape)
    head.weight.data.copy_(model.lm_head.weight)
    head.bias.data.zero_() if model.lm_head.bias is None else head.bias.data.copy_(model.lm_head.bias)
    head.bias.data[token] = by
    model.lm_head = head


def make_trainer(
    family="qwen", env=None, server=None, seed=0, favoured=None, by=0.0, max_model_len=None, tiny=None, **config
) -> MultimodalGRPOTrainer:
    """A trainer with a tiny model of its own.

    Args:
        env: a verifiers environment, or a dict: the shapes environment with these arguments.
        server: where completions come from; None: what the config says.
        seed: of the weights and of the run.
        favoured: name of a token (the tokenizer's `eos_token_id`, the processor's `image_token_id`) whose logit is `by`
            above what the weights say.
        max_model_len: of the server in this process.
        tiny: (model, adapter) to train, in place of new ones of the family.
        config: settings, see MultimodalRLConfig. `param_dtype` holds here too, as where a model is loaded.
    """
    model, adapter = tiny or make_tiny(family, seed=seed)
    for weight in model.parameters() if "param_dtype" in config else ():
        weight.data = weight.data.to(getattr(torch, config["param_dtype"]))
    if favoured is not None:
        token = getattr(adapter.processor, favoured, None)
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


def processed(adapter, images) -> dict[str, torch.Tensor]:
    """What the family's image processor makes of these pictures, all at once."""
    return dict(adapter.processor.image_processor(images=images, return_tensors="pt"))


@torch.no_grad()
def count_features(model, tensors) -> int:
    """How many features the model's own vision tower gives for these tensors: as many placeholders must stand there."""
    return sum(part.flatten(0, -2).shape[0] for part in model.get_image_features(**tensors).pooler_output)


def picture(seed: int = 0) -> dict:
    """A content part of a message: a circle of one of four colours, drawn anew for each seed."""
    drawn = draw_shape(list(COLOURS)[seed % len(COLOURS)], "circle", 56, random.Random(seed))
    return {"type": "image_url", "image_url": {"url": png_data_uri(drawn)}}


def message(*parts) -> list[dict]:
    """The messages of a chat that starts: one of the user, of these parts; a string is text."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def peak_of_saved_bytes(work) -> int:
    """The most bytes that autograd holds at once for the backward while this runs; afterwards it must hold none."""
    held = Counter()

    class Held:
        """A tensor that autograd saves; what ends when the graph lets go of it."""

        def __init__(self, tensor):
            size = tensor.numel() * tensor.element_size()
            self.tensor, self.size = tensor.detach(), size  # detached: no circle where it is what was computed
            held["now"] += self.size
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self):
            held["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda saved: saved.tensor):
        work()
    assert held["now"] == 0  # nothing of it stays
    return held["peak"]


# Command lines in processes that start at once: one has imported everything, and forks a child for each run
ZYGOTE = f"""
import ctypes, os, sys, json
sys.path[:0] = [{str(Path(__file__).parent)!r}, os.environ["RUN_ENVS"]]
import torch, verifiers, datasets, matplotlib.figure, adapters, mm_grpo, tiny_vlm, shapes_env
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # makes torch's pool anew: of several threads that ask at once one may find none
        log = os.open(os.environ["RUN_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2), os.setsid(), os.chdir(asked["folder"])
        os.environ.update(asked.get("environment", {{}}))
        try:
            if "code" in asked:
                os.dup2(os.open(asked["output"], os.O_WRONLY | os.O_CREAT), 1)
                for parameter, value in ((-3, 10**6), (-8, 1)):  # M_MMAP_THRESHOLD, M_ARENA_MAX
                    hasattr(ctypes.CDLL(None), "mallopt") and ctypes.CDLL(None).mallopt(parameter, value)
                exec(asked["code"], {{"__name__": "__main__"}})
            else:
                mm_grpo.main(asked["arguments"])
            sys.stdout.flush()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(77)
    print(pid, flush=True)
"""


def group(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes, in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**told, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


class Runs:
    """Command lines, and other code, in processes that start within a second."""

    def __init__(self, log: Path):
        self.log = log
        log.touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUN_LOG": str(log), "RUN_ENVS": str(log.parent)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.zygote = subprocess.Popen([sys.executable, "-c", ZYGOTE], env=environment, **pipes)
        assert self.zygote.stdout.readline() == "ready\n"

    def ask(self, what) -> int:
        self.zygote.stdin.write(json.dumps(what) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())

    def start(self, *arguments: str, cwd: Path | None = None, **environment: str) -> int:
        """The process id."""
        asked = {"arguments": arguments, "folder": str(cwd or self.log.parent), "environment": environment}
        self.last = self.ask(asked)
        return self.last

    def start_ranks(self, ranks: int, *arguments: str, cwd: Path | None = None) -> list[int]:
        """The same command line in so many processes, told what torchrun tells its own; their process ids."""
        return [self.start(*arguments, cwd=cwd, **told) for told in group(ranks)]

    def printed(self, code: str, ranks: int = 1) -> str:
        """What this code prints in a process of its own: its memory can be measured and capped. Of what it frees the
        heap keeps nothing above a megabyte, so that the numbers are the same each time. With `ranks` in so many."""
        output, said = self.log.with_name("printed"), len(self.said())
        output.unlink(missing_ok=True)
        asked = {"code": code, "output": str(output), "folder": str(Path(__file__).parent)}
        started = [self.ask({**asked, "environment": told}) for told in (group(ranks) if ranks > 1 else [{}])]
        assert [self.end(process) for process in started] == [0] * ranks, self.said()[said:][-3000:]
        return output.read_text()

    def end(self, process: int | None = None) -> int:
        """Wait for a run, by default for the last that was started. Its exit code; -9 where it was killed."""
        return self.ask(process or self.last)

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    started = Runs(tmp_path_factory.mktemp("runs") / "log")
    yield started
    started.zygote.kill()


def wait_for(there, seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.001)
