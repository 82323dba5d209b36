"""Where completions come from. One small interface, two servers:

    server.client      openai.AsyncOpenAI, for /v1/chat/completions
    server.model_name  the name to ask for
    server.sync(model) bring the server's weights up to date
    server.close()

`LocalServer` answers inside this process with the very model in training: no socket, no second copy of the weights, and
the same client code as for a server far away. `VLLMServer` speaks to a vLLM server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from safetensors.torch import save_file
from torch import Tensor
from verifiers.clients import OpenAIChatCompletionsClient


class ChatClient(OpenAIChatCompletionsClient):
    """verifiers' chat client, for training.

    An empty completion (the policy stopped at once) is an answer like any other: it earns its reward and its stop token
    is trained on. verifiers raises EmptyModelResponseError for it, and the rollout would come back without tokens.
    """

    async def raise_from_native_response(self, response) -> None:
        if not (response and response.choices and getattr(response.choices[0], "token_ids", None)):
            await super().raise_from_native_response(response)

    async def from_native_response(self, response):
        result = await super().from_native_response(response)
        if result.message.content is None and not result.message.tool_calls:
            result.message.content = ""
        return result

    async def to_native_prompt(self, messages):
        """Drop the None fields that a dataset gives to content parts of different types ({"type": "text", "image_url": None})."""
        native, extra = await super().to_native_prompt(messages)
        for message in native:
            if isinstance(message.get("content"), list):
                message["content"] = [{k: v for k, v in part.items() if v is not None} for part in message["content"]]
        return native, extra


# ---------------------------------------------------------------------------------------------------------------------
# In this process


class BadRequest(Exception):
    """A request that is answered with an error, in vLLM's words and shape."""

    def __init__(self, message: str, param: str | None = None, code: int = 400, kind: str = "BadRequestError"):
        super().__init__(message)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.code = code


@dataclass
class ChatRequest:
    """One request for one completion, checked."""

    prompt: Any  # the adapter's encoded prompt
    key: str  # what the prompt was, for sharing: equal keys are equal prompts
    max_tokens: int
    temperature: float
    top_p: float
    logit_bias: dict[int, float]
    noise: Tensor  # (max_tokens,) uniform numbers, one a token
    ids: list[int] = field(default_factory=list)  # the completion, filled in by generate
    logprobs: list[float] = field(default_factory=list)

    def finished(self, stop_ids: set[int]) -> bool:
        return len(self.ids) == self.max_tokens or bool(self.ids) and self.ids[-1] in stop_ids


# Parameters that would change the distribution, with the value at which they do nothing. Anything else is refused:
# a setting that is quietly ignored makes the logprobs a lie.
NEUTRAL = {
    "top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "n": (1,), "stream": (False,), "stop": ([], ""), "top_logprobs": (0,), "tools": ([],), "logprobs": (True, False),
    "return_token_ids": (True, False),
}  # fmt: skip
KNOWN = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "logit_bias")


class LocalServer(httpx.AsyncBaseTransport):
    """An OpenAI-compatible chat server inside the process, as the transport of its own client.

    Requests that are in flight together are generated together; each distinct prompt runs through the model once,
    images included, and its key-value cache serves all its completions. Sampling does not depend on that: every request
    draws from a random stream of its own, given by `seed`, its prompt, and how often that prompt was asked before.

    Args:
        model: a Transformers vision-language model; the one in training, so `sync` has nothing to do.
        adapter: encodes prompts (`encode_prompt`, `prompt_inputs`) and holds the tokenizer.
        seed: of sampling.
        model_name: what requests must ask for.
        max_model_len: prompt and completion together; None: the model's own limit.
        max_images: a prompt may hold.
    """

    def __init__(self, model, adapter, seed: int = 0, model_name: str = "policy", max_model_len: int | None = None, max_images: int = 16):
        for method in ("encode_prompt", "prompt_inputs"):
            if not hasattr(adapter, method):
                raise TypeError(
                    f"adapter: {type(adapter).__name__} has no {method}(), which generation in this process needs; derive it "
                    "from adapters.ImageAdapter, or roll out on a vLLM server (vllm_server_host)"
                )
        self.model, self.adapter, self.seed, self.model_name, self.max_images = model, adapter, seed, model_name, max_images
        self.max_model_len = max_model_len or model.config.get_text_config().max_position_embeddings
        self.client = openai.AsyncOpenAI(
            base_url="http://in-process/v1", api_key="none", max_retries=0, http_client=httpx.AsyncClient(transport=self)
        )
        eos = model.generation_config.eos_token_id
        self.stop_ids = {adapter.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.pending: list[tuple[ChatRequest, asyncio.Future]] = []
        self.encoded: dict[str, Any] = {}  # the pending requests' prompts, by key
        self.times_asked: dict[str, int] = {}

    def sync(self, model) -> None:
        """Nothing to do: the model that samples is the model that trains."""

    def close(self) -> None:
        self.pending.clear()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        try:
            if path == "/v1/models":
                entry = {"id": self.model_name, "object": "model", "max_model_len": self.max_model_len}
                return httpx.Response(200, json={"object": "list", "data": [entry]})
            if path != "/v1/chat/completions":
                raise BadRequest(f"no route {path}", code=404, kind="NotFoundError")
            try:
                body = json.loads(await request.aread())
            except ValueError as error:  # not JSON, or not even text
                raise BadRequest(f"the body is not JSON: {error}") from None
            parsed = self.parse(body)
            future = asyncio.get_running_loop().create_future()
            self.pending.append((parsed, future))
            if len(self.pending) == 1:  # a task of its own: the request that came first may be cancelled like any other
                self.running = asyncio.create_task(self.run_pending())
            await future
            return httpx.Response(200, json=self.reply(parsed))
        except BadRequest as error:
            return httpx.Response(error.code, json=error.body)

    async def run_pending(self) -> None:
        """Wait until no more requests come, then run them all."""
        arrived = 0
        while len(self.pending) > arrived:
            arrived = len(self.pending)
            await asyncio.sleep(0.002)
        batch = [(request, waiting) for request, waiting in self.pending if not waiting.done()]  # done: cancelled
        self.pending, self.encoded = [], {}
        try:
            if batch:
                generate(self.model, self.adapter, [request for request, _ in batch], self.stop_ids)
            for _, waiting in batch:
                waiting.set_result(None)
        except Exception as error:  # the cause reaches the client as it would from vLLM
            for _, waiting in batch:
                waiting.set_exception(BadRequest(f"{type(error).__name__}: {error}", code=500, kind="InternalServerError"))

    def parse(self, body: dict) -> ChatRequest:
        """Check a request's body as vLLM would, and make its random stream."""
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        body = {name: value for name, value in body.items() if value is not None}
        for name, value in body.items():
            if name not in KNOWN and value not in NEUTRAL.get(name, ()):
                raise BadRequest(f"{name}={value!r} is not supported by the server in this process", param=name)
        if body.get("model") != self.model_name:
            raise BadRequest(f"The model `{body.get('model')}` does not exist.", "model", 404, "NotFoundError")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages: must be a list of at least one chat message", param="messages")

        def number(name: str, default: float, low: float, high: float) -> float:
            value = body.get(name, default)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise BadRequest(f"{name} must be in [{low}, {high}], got {value!r}.", param=name)
            return value

        temperature = number("temperature", 1.0, 0.0, float("inf"))
        top_p = number("top_p", 1.0, 0.0, 1.0)
        if top_p == 0:
            raise BadRequest("top_p must be in (0, 1], got 0.", param="top_p")
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        try:
            bias = {int(token): min(100.0, max(-100.0, float(value))) for token, value in body.get("logit_bias", {}).items()}
            if any(math.isnan(value) for value in bias.values()):
                raise ValueError("NaN")
        except (AttributeError, TypeError, ValueError):
            raise BadRequest("logit_bias must map token ids to numbers.", param="logit_bias") from None
        if any(not 0 <= token < vocabulary for token in bias):
            raise BadRequest(f"token_id(s) {sorted(bias)} in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocabulary}", "logit_bias")
        try:
            images = sum(part["type"] == "image_url" for m in messages if isinstance(m.get("content"), list) for part in m["content"])
            if images > self.max_images:
                raise BadRequest(f"At most {self.max_images} image(s) may be provided in one prompt, got {images}.", "image")
            key = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
            if key not in self.encoded:  # the G requests of a group carry the same prompt
                self.encoded[key] = self.adapter.encode_prompt(messages)
            prompt = self.encoded[key]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"messages: {type(error).__name__}: {error}", param="messages") from None
        room = self.max_model_len - len(prompt.ids)
        wanted = body.get("max_completion_tokens", body.get("max_tokens", room))
        if room >= 1 and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
            raise BadRequest(f"max_completion_tokens must be at least 1, got {wanted!r}.", param="max_completion_tokens")
        if room < 1 or wanted > room:
            raise BadRequest(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {wanted} output "
                f"tokens and your prompt contains {len(prompt.ids)} input tokens.", param="input_tokens",
            )  # fmt: skip
        if "seed" in body:
            stream = int(number("seed", 0, -(2**63), 2**63 - 1))
        else:
            count = self.times_asked[key] = self.times_asked.get(key, -1) + 1
            stream = int(hashlib.sha256(f"{self.seed} {key} {count}".encode()).hexdigest()[:15], 16)
        noise = torch.rand(wanted, generator=torch.Generator().manual_seed(stream), dtype=torch.float64)
        return ChatRequest(prompt, key, wanted, temperature, top_p, bias, noise)

    def reply(self, request: ChatRequest) -> dict:
        """vLLM's JSON for a finished request."""
        tokenizer = self.adapter.tokenizer
        content = [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(tokenizer.convert_ids_to_tokens(request.ids), request.logprobs)
        ]
        P, C = len(request.prompt.ids), len(request.ids)
        return {
            "id": f"chatcmpl-{request.key[:16]}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model_name,
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": tokenizer.decode(request.ids, skip_special_tokens=True)},
                "finish_reason": "stop" if request.ids[-1] in self.stop_ids else "length",
                "logprobs": {"content": content},
                "token_ids": request.ids,
            }],
            "usage": {"prompt_tokens": P, "completion_tokens": C, "total_tokens": P + C},
            "prompt_token_ids": request.prompt.ids,
        }  # fmt: skip


def prefill(model, inputs: dict[str, Tensor], owner: Tensor):
    """Run K distinct prompts through the model once, images included, and make ready to go on from them B times.

    Args:
        inputs: keyword arguments of the forward for (K, P) prompts, padded on the left.
        owner: (B,) which prompt each continuation goes on from.

    Returns:
        (logits, cache, mask, positions): logits (B, V) of the token after the prompt; the key-value cache and the
        attention mask (B, P), a row a continuation; positions (B, 1) of that token. Gradients flow where they are on.
    """
    mask = inputs["attention_mask"]
    # A model with M-RoPE places images in two dimensions by itself and leaves behind by how much text after them is
    # moved (`rope_deltas`). Everything else counts tokens, without padding.
    rope = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)
    own_positions = rope is not None and any(name.endswith("_grid_thw") for name in inputs)
    if rope is not None:
        rope.rope_deltas = None  # what another forward left there belongs to other prompts
    counted = {} if own_positions else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    output = model(**inputs, **counted, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_select_indices(owner)
    positions = mask.sum(-1, keepdim=True) + (rope.rope_deltas if own_positions else 0)  # (K, 1)
    return output.logits[owner, -1], cache, mask[owner], positions[owner]


@torch.no_grad()
def generate(model, adapter, requests: Sequence[ChatRequest], stop_ids: set[int]) -> None:
    """Sample the completions of these requests into their `ids` and `logprobs`: B requests for K distinct prompts grow
    together, a token a forward."""
    first = {request.key: i for i, request in reversed(list(enumerate(requests)))}  # a request of each distinct prompt
    number = {key: k for k, key in enumerate(first)}
    device = model.device
    inputs = adapter.prompt_inputs([requests[i].prompt for i in first.values()])
    owner = torch.tensor([number[request.key] for request in requests], device=device)  # (B,)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits, cache, mask, positions = prefill(model, inputs, owner)

    B, V = logits.shape
    bias = torch.zeros(B, V, device=device)
    for row, request in enumerate(requests):
        for token, value in request.logit_bias.items():
            bias[row, token] = value
    temperature = torch.tensor([[request.temperature] for request in requests], device=device)  # (B, 1)
    top_p = torch.tensor([[request.top_p] for request in requests], device=device, dtype=torch.float64)
    for t in range(max(request.max_tokens for request in requests)):
        noise = torch.tensor([[request.noise[min(t, request.max_tokens - 1)]] for request in requests], device=device)
        tokens, logprobs = sample(logits.float() + bias, temperature, top_p, noise)  # (B,) each
        for request, token, logprob in zip(requests, tokens.tolist(), logprobs.tolist()):
            if len(request.ids) == t and not request.finished(stop_ids):
                request.ids.append(token)
                request.logprobs.append(logprob)
        if all(request.finished(stop_ids) for request in requests):
            return
        mask = torch.cat([mask, mask.new_ones(B, 1)], dim=-1)
        output = model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions + t, past_key_values=cache, use_cache=True
        )
        logits = output.logits[:, -1]


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row, by inverting the distribution function at `noise`.

    Args:
        logits: (B, V) float32, bias applied.
        temperature: (B, 1); 0 takes the likeliest token.
        top_p: (B, 1) in (0, 1]; the smallest set of likeliest tokens with at least that probability is kept.
        noise: (B, 1) float64 in [0, 1).

    Returns:
        (tokens, logprobs): (B,) each. Logprobs are of the distribution that was drawn from; with temperature 0, of
        temperature 1 (as vLLM reports them).
    """
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature), dim=-1)  # (B, V)
    if (top_p < 1).any():
        ordered, order = logprobs.sort(dim=-1, descending=True)
        before = ordered.double().exp().cumsum(-1) - ordered.double().exp()  # probability of all likelier tokens
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < top_p)
        logprobs = torch.log_softmax(logprobs.masked_fill(~kept & ~greedy, -torch.inf), dim=-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)  # skips tokens of probability 0
    tokens = torch.where(greedy, logprobs.argmax(-1, keepdim=True), drawn.clamp(max=logits.shape[-1] - 1))  # (B, 1)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# A vLLM server

VLLM_COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm"


class VLLMServer:
    """A running vLLM server: completions over HTTP, weights through a folder that both sides see.

    Start it with VLLM_COMMAND: dev mode has the routes for weight updates, processed logprobs are those of the distribution
    that was sampled, and without `--generation-config vllm` the checkpoint's own sampling settings sneak in.

    Args:
        host, port: of the server.
        weights_dir: folder for weight updates, seen by server and trainer.
        parameter_name: a parameter's name in the trainer's model -> its name for the server (the adapter knows).
        timeout: seconds to wait for the server to come up, and for each part of a weight update.
        generation_timeout: seconds until a request for a completion fails.

    Raises:
        TimeoutError, RuntimeError: what is wrong, and which option of the server mends it.
    """

    def __init__(
        self, host: str, port: int, weights_dir: str | Path, parameter_name: Callable[[str], str] = str,
        timeout: float = 240.0, generation_timeout: float = 600.0,
    ):
        self.url, self.weights_dir, self.parameter_name = f"http://{host}:{port}", Path(weights_dir), parameter_name
        self.http = httpx.Client(base_url=self.url, timeout=timeout)
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no vLLM server answered at {self.url} within {timeout:.0f} s. Start one: {VLLM_COMMAND}")
            time.sleep(0.5)
        self.model_name = self._call("GET", "/v1/models").json()["data"][0]["id"]
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", timeout=generation_timeout)
        self._check_logprobs()

    def sync(self, model) -> None:
        """Load the model's weights into the server: write, pause, reload, drop every cache of the old policy, resume."""
        # parameters, not the state dict: tied ones are there once, and safetensors refuses shared memory
        weights = {self.parameter_name(name): tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}
        folder = self.weights_dir.resolve()
        fresh = folder.with_name(folder.name + ".new")
        fresh.mkdir(parents=True, exist_ok=True)
        save_file(weights, fresh / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)  # whole or not at all
        self._call("POST", "/pause?mode=wait")
        try:
            self._call("POST", "/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            if not self._call("POST", "/reset_prefix_cache").json()["success"]:
                raise RuntimeError(f"{self.url}/reset_prefix_cache: blocks are still held; requests of the old policy are running")
            self._call("POST", "/reset_mm_cache")
            self._call("POST", "/reset_encoder_cache")
        finally:
            self._call("POST", "/resume")

    def close(self) -> None:
        self.http.close()

    def _healthy(self) -> bool:
        try:
            return self.http.get("/health", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def _call(self, method: str, route: str, **arguments) -> httpx.Response:
        response = self.http.request(method, route, **arguments)
        if response.status_code == 404:
            raise RuntimeError(f"{self.url}{route} does not exist: start the server with VLLM_SERVER_DEV_MODE=1")
        if response.status_code != 200:
            raise RuntimeError(f"{self.url}{route}: {response.status_code} {response.text[:500]}")
        return response

    def _check_logprobs(self) -> None:
        """The likeliest token's logprob must change with the temperature; where it does not, they are raw logprobs."""
        best = []
        for temperature in (1.0, 0.5):
            ask = {"model": self.model_name, "prompt": [1, 2, 3], "max_tokens": 1, "temperature": temperature}
            answer = self._call("POST", "/v1/completions", json={**ask, "logprobs": 1, "return_token_ids": True}).json()
            if not answer["choices"][0].get("token_ids"):
                raise RuntimeError(f"{self.url}: return_token_ids gave no token ids; vLLM 0.10.2 or later is needed")
            best.append(max(answer["choices"][0]["logprobs"]["top_logprobs"][0].values()))
        if best[0] < -1e-3 and abs(best[0] - best[1]) < 1e-6:
            raise RuntimeError(f"{self.url} reports logprobs before the temperature: start it with --logprobs-mode processed_logprobs")
