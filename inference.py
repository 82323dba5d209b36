"""Where completions come from. One small interface, two servers:

    server.client      openai.AsyncOpenAI, for /v1/chat/completions
    server.model_name  the name to ask for
    server.sync(model) bring the server's weights up to date
    server.up_to_date()    whether it still has the weights of the last sync
    server.shares_weights  whether the model that samples is the very model that trains
    server.dtype       of its forward passes
    server.close()

`LocalServer` answers inside this process with the very model in training: no socket, no second copy of the weights, and
the same client code as for a server far away. `VLLMServer` speaks to a vLLM server.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import io
import json
import math
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from PIL import Image
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

    shares_weights = True

    def __init__(self, model, adapter, seed: int = 0, model_name: str = "policy", max_model_len: int | None = None, max_images: int = 16):
        for method in ("encode_prompt", "prompt_inputs"):
            if not hasattr(adapter, method):
                raise TypeError(
                    f"adapter: {type(adapter).__name__} has no {method}(), which generation in this process needs; derive it "
                    "from adapters.ImageAdapter, or roll out on a vLLM server (vllm_server_host)"
                )
        self.model, self.adapter, self.seed, self.model_name, self.max_images = model, adapter, seed, model_name, max_images
        self.dtype = next(model.parameters()).dtype
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

    def up_to_date(self) -> bool:
        return True

    def close(self) -> None:
        self.pending.clear()

    def __str__(self) -> str:
        return "in this process"

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
PROBE_SIZES = ((32, 32), (448, 336), (1344, 1008))  # (width, height) of the pictures that server and adapter must expand alike
ATTEMPTS = 3  # a weight update that kills the server so often is not its bad luck


class VLLMServer:
    """A running vLLM server: completions over HTTP, weights through a folder that both sides see, or over NCCL.

    Start it with VLLM_COMMAND: dev mode has the routes for weight updates, processed logprobs are those of the distribution
    that was sampled, and without `--generation-config vllm` the checkpoint's own sampling settings sneak in.

    Weights go over NCCL where the server was started with `--weight-transfer-config '{"backend": "nccl"}'`, the model is on
    a GPU and vllm is installed beside the trainer; else through the folder.

    Args:
        model: in training; `sync` sends its weights, and the server must have its vocabulary.
        adapter: of its family: names the parameters for the server (`server_parameter_name`), and knows how many
            placeholders a picture fills (`encode_prompt`, where it has that).
        host, port: of the server.
        weights_dir: folder for weight updates, seen by server and trainer under this path. Its subfolder `policy` is ours.
        timeout: seconds to wait for the server to come up, and for each part of a weight update.
        generation_timeout: seconds until a request for a completion fails.

    Raises:
        TimeoutError, RuntimeError: what is wrong, and which option of the server mends it.
    """

    shares_weights = False

    def __init__(
        self, model, adapter, host: str, port: int, weights_dir: str | Path, timeout: float = 240.0, generation_timeout: float = 600.0
    ):
        self.model, self.adapter, self.host, self.port = model, adapter, host, port
        self.url, self.weights_dir, self.timeout = f"http://{host}:{port}", Path(weights_dir), timeout
        # A connection for each call: a server that fails inside one closes it, and /resume must come through all the same.
        self.http = httpx.Client(base_url=self.url, timeout=timeout, limits=httpx.Limits(max_keepalive_connections=0))
        # No request is sent twice: a server that was restarted in between would answer the second one with old weights.
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", timeout=generation_timeout, max_retries=0)
        self.connect()

    def connect(self) -> None:
        """Wait until the server answers, and check that a policy can be trained on what it says."""
        deadline = time.monotonic() + self.timeout
        if not self._healthy():
            print(f"waiting up to {self.timeout:g} s for a vLLM server at {self.url}", flush=True)
        while not self._healthy():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no vLLM server answered at {self.url} within vllm_server_timeout={self.timeout:g} s. Start one: {VLLM_COMMAND}"
                )
            time.sleep(0.5)
        self.version = self._call("GET", "/weight_info").json()["weight_version"]
        served = self._call("GET", "/v1/models").json()["data"][0]
        self.model_name, self.max_model_len = served["id"], served["max_model_len"]
        settings = self._call("GET", "/server_info?config_format=json").json()["vllm_config"]
        self.dtype = getattr(torch, settings["model_config"]["dtype"].removeprefix("torch."))
        can_nccl = next(self.model.parameters()).is_cuda and importlib.util.find_spec("vllm") is not None
        self.transport = "nccl" if can_nccl and (settings["weight_transfer_config"] or {}).get("backend") == "nccl" else "disk"
        self.nccl = None  # connected at the first update
        self._check_logprobs()
        self._check_vocabulary()
        self._check_placeholders()

    def up_to_date(self) -> bool:
        """Whether the server still has the weights of the last sync; one that was restarted has not."""
        try:
            return self._call("GET", "/weight_info").json()["weight_version"] == self.version
        except RuntimeError:
            return False

    def sync(self, model) -> None:
        """Load the model's weights into the server. A server that dies meanwhile is waited for, and then gets them."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._push(model)
                return
            except RuntimeError as error:
                if attempt == ATTEMPTS or self._healthy():
                    raise
                warnings.warn(f"{error}. Waiting for the server; the weight update starts over")
                self.connect()

    def _push(self, model) -> None:
        """Pause, load, drop every cache of the old policy, name the new one, resume (whatever happens in between)."""
        folder = self._write(model) if self.transport == "disk" else None
        try:
            self._call("POST", "/pause?mode=wait")
            if folder is None:
                self.nccl = self.nccl or nccl_sender(self, lambda: self._weights(model))
                self.nccl.send_weights()
            else:
                self._call("POST", "/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            if not self._call("POST", "/reset_prefix_cache").json()["success"]:
                raise RuntimeError(f"{self.url}/reset_prefix_cache: blocks are still held; requests of the old policy are running")
            self._call("POST", "/reset_mm_cache")
            self._call("POST", "/reset_encoder_cache")
            self.version = f"mm_grpo-{uuid.uuid4().hex}"
            self._call("POST", "/update_weight_version", json={"new_version": self.version})
        finally:
            self._call("POST", "/resume")

    def _weights(self, model) -> Iterator[tuple[str, Tensor]]:
        """Each parameter by the server's name and in its type. Not the state dict: tied parameters are here once."""
        for name, parameter in model.named_parameters():
            yield self.adapter.server_parameter_name(name), parameter.detach().to(self.dtype)

    def _write(self, model) -> Path:
        """The weights as a folder that is whole or not there."""
        folder = self.weights_dir.resolve() / "policy"
        fresh = folder.with_name("policy.new")
        fresh.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in self._weights(model)}, fresh / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        return folder

    def close(self) -> None:
        self.http.close()

    def __str__(self) -> str:
        weights = "over NCCL" if self.transport == "nccl" else f"through {self.weights_dir}"
        return f"by the vLLM server at {self.url}, weights {weights}"

    def _healthy(self) -> bool:
        try:
            return self.http.get("/health", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def _request(self, method: str, route: str, **arguments) -> httpx.Response:
        try:
            return self.http.request(method, route, **arguments)
        except httpx.TimeoutException:
            raise RuntimeError(f"{self.url}{route}: no answer within vllm_server_timeout={self.timeout:g} s") from None
        except httpx.TransportError as error:
            raise RuntimeError(f"{self.url}{route}: {type(error).__name__}: {error}") from None

    def _call(self, method: str, route: str, **arguments) -> httpx.Response:
        response = self._request(method, route, **arguments)
        if response.status_code == 404:
            raise RuntimeError(f"{self.url}{route} does not exist: start the server (vLLM 0.32 or later) with VLLM_SERVER_DEV_MODE=1")
        if response.status_code != 200:
            hint = f". Can the server read {self.weights_dir.resolve()}? (weight_sync_dir)" if route == "/collective_rpc" else ""
            raise RuntimeError(f"{self.url}{route}: {response.status_code} {response.text[:500]}{hint}")
        return response

    def _complete(self, **request) -> httpx.Response:
        """One token, straight from token ids."""
        ask = {"model": self.model_name, "prompt": [1, 2, 3], "max_tokens": 1, "return_token_ids": True}
        return self._request("POST", "/v1/completions", json={**ask, **request})

    def _check_logprobs(self) -> None:
        """The likeliest token's logprob must change with the temperature; where it does not, they are raw logprobs."""
        best = []
        for temperature in (1.0, 0.5):
            answer = self._complete(temperature=temperature, logprobs=1).raise_for_status().json()["choices"][0]
            if not answer.get("token_ids"):
                raise RuntimeError(f"{self.url}: return_token_ids gave no token ids; vLLM 0.10.2 or later is needed")
            best.append(max(answer["logprobs"]["top_logprobs"][0].values()))
        if best[0] < -1e-3 and abs(best[0] - best[1]) < 1e-6:
            raise RuntimeError(f"{self.url} reports logprobs before the temperature: start it with --logprobs-mode processed_logprobs")

    def _check_vocabulary(self) -> None:
        """The server must know the trainer's last token id, and none after it."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        if head is None:
            return
        size = len(head.weight)
        answers = [self._complete(logit_bias={str(token): 0}) for token in (size - 1, size)]
        if [answer.status_code for answer in answers] != [200, 400]:
            said = next((answer.text[:300] for answer in answers if answer.status_code != 200), f"token id {size} is known")
            raise RuntimeError(
                f"{self.url}: its model has another vocabulary than the trainer's, which has {size} token ids. Serve the checkpoint "
                f"that is trained (vllm serve MODEL). The server said: {said}"
            )

    def _check_placeholders(self) -> None:
        """The server must expand a picture to as many placeholder tokens as the adapter does, whatever its size."""
        if not hasattr(self.adapter, "encode_prompt"):
            return

        def placeholders(ids: list[int]) -> int:
            return sum(token in self.adapter.placeholder_ids for token in ids)

        for size in PROBE_SIZES:
            png = io.BytesIO()
            Image.new("RGB", size, "grey").save(png, format="PNG")
            url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
            messages = [{"role": "user", "content": content}]
            expected = self.adapter.encode_prompt(messages).ids
            if len(expected) >= self.max_model_len:
                continue  # such a picture cannot be asked about at all
            ask = {"model": self.model_name, "messages": messages, "max_tokens": 1, "return_token_ids": True}
            answer = self._request("POST", "/v1/chat/completions", json=ask)
            shape, mend = f"a picture of {size[0]} x {size[1]} pixels", "vLLM: --mm-processor-kwargs, as the adapter's image processor has them"
            if answer.status_code != 200:
                raise RuntimeError(
                    f"{self.url} refuses {shape}, {placeholders(expected)} placeholders for the adapter: {answer.text[:300]} "
                    f"(--limit-mm-per-prompt, --max-model-len, or image size limits; {mend})"
                )
            got = placeholders(answer.json()["prompt_token_ids"])
            if got != placeholders(expected):
                raise RuntimeError(
                    f"{self.url} expands {shape} to {got} placeholders, the adapter to {placeholders(expected)}: "
                    f"give both the same image size limits ({mend})"
                )


def nccl_sender(server: VLLMServer, weights: Callable[[], Iterator[tuple[str, Tensor]]]):
    """vLLM's own sender, connected to the server's workers: `send_weights()` broadcasts what `weights()` yields."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Weights(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return weights()

    with socket.create_connection((server.host, server.port)) as connection:
        address = connection.getsockname()[0]  # of ours, the one that the server can reach
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    workers = server._call("GET", "/get_world_size").json()["world_size"]
    return WeightTransferTrainerFactory.trainer_init(
        NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + workers),
        client=HTTPVLLMWeightSyncClient(server.url, timeout=server.timeout),
        source=Weights(),
    )
