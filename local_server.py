"""Rollouts in this process: an OpenAI-compatible chat server that samples from the very model in training.

There is no socket and no second copy of the weights; the client code is the same as for a server far away.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import httpx
import openai
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers.cli.serving.utils import get_response_template

from shared_prefix import prefill, tolerance

if TYPE_CHECKING:
    from mm_grpo import MultimodalRLConfig

COMPARED_TOKENS = 3  # of a completion, to try the cache: one that the prompt predicts, two that the cache does


class BadRequest(Exception):
    """A request that is answered with an error, in vLLM's words and shape."""

    def __init__(self, message: str, param: str | None = None, code: int = 400, kind: str = "BadRequestError"):
        super().__init__(message)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.code = code


# Parameters that would change the distribution, with the values at which they do nothing. Any other value, and any
# parameter that stands neither here nor in ChatCompletionRequest, is refused: what is quietly ignored makes the
# logprobs a lie.
NEUTRAL = {
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "n": (1,),
    "stream": (False,),
    "stop": ([], ""),
    "top_logprobs": (0,),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),  # verifiers asks for it where a prompt has sound
    "logprobs": (True, False),
    "return_token_ids": (True, False),
}

PROBE = [{"role": "user", "content": "?"}]  # a prompt that shows tools, if the chat template knows them


class ChatCompletionRequest(BaseModel):
    """The body of a request; each field's description is its rule, as an error says it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="be a string")
    messages: list[dict[str, Any]] = Field(min_length=1, description="be a list of at least one chat message")
    max_tokens: int | None = Field(None, ge=1, description="be at least 1")
    max_completion_tokens: int | None = Field(None, ge=1, description="be at least 1")
    temperature: float | None = Field(None, ge=0, description="be at least 0")
    top_p: float | None = Field(None, gt=0, le=1, description="be in (0, 1]")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="be a whole number of 64 bits")
    logit_bias: dict[int, float] | None = Field(None, description="map token ids to numbers")
    tools: list[dict[str, Any]] | None = Field(None, description="be a list of functions, in OpenAI's shape")
    tool_choice: Literal["auto", "none"] | None = Field(
        None, description="be 'auto' or 'none' (to force a call, roll out on a vLLM server: vllm_server_host)"
    )

    @classmethod
    def parse(cls, body: bytes) -> ChatCompletionRequest:
        """Raises BadRequest: what is wrong with the first field that is."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as invalid:
            error = invalid.errors(include_url=False)[0]
            name = str(error["loc"][0]) if error["loc"] else None
            if name not in cls.model_fields:
                raise BadRequest(f"the body must be a JSON object of a chat completion: {error['msg']}") from None
            rule = cls.model_fields[name].description
            raise BadRequest(f"{name} must {rule}, got {error['input']!r}.", name) from None
        for name, value in (request.model_extra or {}).items():
            if value is not None and value not in NEUTRAL.get(name, ()):
                raise BadRequest(f"{name}={value!r} is not supported by the server in this process", name)
        return request


@dataclass
class Completion:
    """One completion: what it goes on from, how it is sampled, and what has been sampled so far."""

    prompt: Any  # the adapter's encoded prompt
    key: str  # of the prompt: equal keys are equal prompts
    max_tokens: int
    temperature: float
    top_p: float
    logit_bias: dict[int, float]
    noise: Tensor  # (max_tokens,) uniform numbers, one a token
    tools: list[dict] | None = None  # whose calls are looked for in the answer
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def finished(self, stop_ids: set[int]) -> bool:
        return len(self.ids) == self.max_tokens or (bool(self.ids) and self.ids[-1] in stop_ids)


class LocalServer(httpx.AsyncBaseTransport):
    """An OpenAI-compatible chat server inside the process, as the transport of its own client (see `rollouts.Server`).

    Requests that are in flight together are generated together; each distinct prompt runs through the model once,
    images included, and its key-value cache serves all its completions; a model for which that is not the plain forward
    (`cache_is_exact`) runs prompt and completion anew for each token. Sampling does not depend on that: every request
    draws from a random stream of its own, given by `seed`, its prompt, and how often that prompt was asked before.

    Args:
        model: a Transformers vision-language model; the one in training, so `sync` has nothing to do.
        adapter: encodes prompts (`encode_prompt`, `prompt_inputs`) and holds the tokenizer.
        seed: of sampling.
        model_name: what requests must ask for.
        max_model_len: prompt and completion together; None: the model's own limit.
        max_images: a prompt may hold.
        bf16: sample in bfloat16 autocast.
    """

    shares_weights = True

    def __init__(
        self,
        model,
        adapter,
        seed: int = 0,
        model_name: str = "policy",
        max_model_len: int | None = None,
        max_images: int = 16,
        bf16: bool = False,
    ):
        for method in ("encode_prompt", "prompt_inputs"):
            if not hasattr(adapter, method):
                raise TypeError(
                    f"adapter: {type(adapter).__name__} has no {method}(), which generation in this process needs; "
                    "derive it from adapters.ProcessorAdapter, or roll out on a vLLM server (vllm_server_host)"
                )
        self.model, self.adapter, self.seed = model, adapter, seed
        self.model_name, self.max_images, self.bf16 = model_name, max_images, bf16
        self.dtype = torch.bfloat16 if bf16 else next(model.parameters()).dtype
        self.max_model_len = max_model_len or model.config.get_text_config().max_position_embeddings
        self.client = openai.AsyncOpenAI(
            base_url="http://in-process/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=self),
        )
        eos = model.generation_config.eos_token_id
        self.stop_ids = {adapter.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.cache_is_exact: bool | None = None  # found out with the first requests
        self.call_form = get_response_template(adapter.tokenizer, model)  # how it writes tool calls; None: not known
        self.pending: list[tuple[Completion, asyncio.Future]] = []
        self.encoded: dict[str, Any] = {}  # the pending requests' prompts, by key
        self.times_asked: dict[str, int] = {}

    @classmethod
    def from_config(cls, model, adapter, config: MultimodalRLConfig) -> LocalServer:
        """The server of a run with this config."""
        return cls(model, adapter, seed=config.seed, bf16=config.bf16)

    def connect(self) -> None:
        """Nothing to do: it is here."""

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
            completion = self.prepare(ChatCompletionRequest.parse(await request.aread()))
            future = asyncio.get_running_loop().create_future()
            self.pending.append((completion, future))
            if len(self.pending) == 1:  # a task of its own: the request that came first may be cancelled like any other
                self.running = asyncio.create_task(self.run_pending())
            await future
            return httpx.Response(200, json=self.reply(completion))
        except BadRequest as error:
            return httpx.Response(error.code, json=error.body)

    async def run_pending(self) -> None:
        """Wait until no more requests come, then run them all."""
        arrived = 0
        while len(self.pending) > arrived:
            arrived = len(self.pending)
            await asyncio.sleep(0.002)
        batch = [(completion, waiting) for completion, waiting in self.pending if not waiting.done()]  # done: cancelled
        self.pending, self.encoded = [], {}
        try:
            if batch:
                completions = [completion for completion, _ in batch]
                if self.cache_is_exact is None:
                    self.cache_is_exact = cache_is_exact(self.model, self.adapter, completions)
                with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                    generate(self.model, self.adapter, completions, self.stop_ids, self.cache_is_exact)
            for _, waiting in batch:
                waiting.set_result(None)
        except Exception as error:  # the cause reaches the client as it would from vLLM
            for _, waiting in batch:
                waiting.set_exception(
                    BadRequest(f"{type(error).__name__}: {error}", code=500, kind="InternalServerError")
                )

    def prepare(self, request: ChatCompletionRequest) -> Completion:
        """Check a request against the model as vLLM would, encode its prompt, make its random stream."""
        if request.model != self.model_name:
            raise BadRequest(f"The model `{request.model}` does not exist.", "model", 404, "NotFoundError")
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        bias = {token: min(100.0, max(-100.0, value)) for token, value in (request.logit_bias or {}).items()}
        if any(not 0 <= token < vocabulary for token in bias):
            raise BadRequest(
                f"token_id(s) {sorted(bias)} in logit_bias contain out-of-vocab token ids. Vocabulary size: "
                f"{vocabulary}",
                "logit_bias",
            )
        key, prompt = self.encode(request.messages, request.tools or None)
        callable_tools = request.tools if request.tool_choice != "none" else None
        if callable_tools and self.call_form is None:
            raise BadRequest(
                f"tools: Transformers does not know how {type(self.model).__name__} writes calls. Set tokenizer."
                "response_template, ask with tool_choice='none' (calls stay text), or roll out on a vLLM server with "
                "--enable-auto-tool-choice --tool-call-parser (vllm_server_host)",
                "tools",
            )
        room = self.max_model_len - len(prompt.ids)
        wanted = request.max_completion_tokens or request.max_tokens or room
        if room < 1 or wanted > room:
            raise BadRequest(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {wanted} "
                f"output tokens and your prompt contains {len(prompt.ids)} input tokens.",
                "input_tokens",
            )
        stream = request.seed
        if stream is None:
            count = self.times_asked[key] = self.times_asked.get(key, -1) + 1
            stream = int(hashlib.sha256(f"{self.seed} {key} {count}".encode()).hexdigest()[:15], 16)
        noise = torch.rand(wanted, generator=torch.Generator().manual_seed(stream), dtype=torch.float64)
        temperature = 1.0 if request.temperature is None else request.temperature
        return Completion(prompt, key, wanted, temperature, request.top_p or 1.0, bias, noise, callable_tools)

    def encode(self, messages: list[dict[str, Any]], tools: list[dict] | None = None) -> tuple[str, Any]:
        """(key, encoded prompt) of these messages. The G requests of a group carry the same ones: encoded once."""
        shown = (messages, tools) if tools else (messages,)
        key = hashlib.sha256("".join(json.dumps(part, sort_keys=True) for part in shown).encode()).hexdigest()
        try:
            if tools and self.adapter.encode_prompt(PROBE, tools).ids == self.adapter.encode_prompt(PROBE).ids:
                raise BadRequest("tools: this model's chat template does not show them; set another one", "tools")
            if key not in self.encoded:
                parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
                images = sum(part["type"] == "image_url" for part in parts)
                if images > self.max_images:
                    raise BadRequest(
                        f"At most {self.max_images} image(s) may be provided in one prompt, got {images}.", "image"
                    )
                self.encoded[key] = self.adapter.encode_prompt(*shown)
        except BadRequest:
            raise
        except Exception as error:  # whatever a chat template raises for what it does not take
            raise BadRequest(f"messages: {type(error).__name__}: {error}", "messages") from None
        return key, self.encoded[key]

    def reply(self, completion: Completion) -> dict:
        """vLLM's JSON for a finished completion."""
        tokenizer, ids = self.adapter.tokenizer, completion.ids
        content = [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(tokenizer.convert_ids_to_tokens(ids), completion.logprobs)
        ]
        P, C = len(completion.prompt.ids), len(ids)
        message = self.message(completion)
        stopped = "tool_calls" if "tool_calls" in message else "stop"
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": stopped if ids[-1] in self.stop_ids else "length",
            "logprobs": {"content": content},
            "token_ids": ids,
        }
        return {
            "id": f"chatcmpl-{completion.key[:16]}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model_name,
            "choices": [choice],
            "usage": {"prompt_tokens": P, "completion_tokens": C, "total_tokens": P + C},
            "prompt_token_ids": completion.prompt.ids,
        }

    def message(self, completion: Completion) -> dict:
        """The answer as a chat message. A tool call that is not well-formed leaves all of it text, as with vLLM."""
        tokenizer = self.adapter.tokenizer
        text = {"role": "assistant", "content": tokenizer.decode(completion.ids, skip_special_tokens=True)}
        if not completion.tools:
            return text
        form, context = self.call_form, dict(prefix=completion.prompt.ids, tools=completion.tools)
        try:
            parsed = tokenizer.parse_response(completion.ids, form, **context)
            # ids that are the same for the same answer: what follows is the same prompt then, and encoded once
            calls = [tool_call(f"call-{completion.key[:16]}-{i}", call) for i, call in enumerate(parsed["tool_calls"])]
        except (KeyError, TypeError, ValueError, RecursionError):
            return text
        return {**text, "content": None, **parsed, "tool_calls": calls}


def tool_call(call_id: str, parsed: dict) -> dict:
    """A tool call of OpenAI's shape. Raises KeyError, TypeError or ValueError for one that is not well-formed."""
    name, arguments = parsed["function"]["name"], parsed["function"]["arguments"]
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        raise TypeError(f"tool call: expected a name and a dict of arguments, got {name!r} and {arguments!r}")
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    json.dumps(function, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent
    return {"id": call_id, "type": "function", "function": function}


@torch.no_grad()
def generate(model, adapter, completions: Sequence[Completion], stop_ids: set[int], cached: bool = True) -> None:
    """Sample these completions into their `ids` and `logprobs`: they grow together, a token a forward."""
    device, B = model.device, len(completions)
    temperature = torch.tensor([[completion.temperature] for completion in completions], device=device)  # (B, 1)
    top_p = torch.tensor([[completion.top_p] for completion in completions], device=device, dtype=torch.float64)
    next_logits = cached_logits if cached else repeated_logits
    for t, logits in enumerate(next_logits(model, adapter, completions)):
        if t == 0:
            bias = torch.zeros(B, logits.shape[-1], device=device)
            for row, completion in enumerate(completions):
                for token, value in completion.logit_bias.items():
                    bias[row, token] = value
        noise = [[completion.noise[min(t, completion.max_tokens - 1)]] for completion in completions]
        drawn = sample(logits.float() + bias, temperature, top_p, torch.tensor(noise, device=device))  # (B,) each
        for completion, token, logprob in zip(completions, *(values.tolist() for values in drawn)):
            if not completion.finished(stop_ids):
                completion.ids.append(token)
                completion.logprobs.append(logprob)
        if all(completion.finished(stop_ids) for completion in completions):
            return


def cached_logits(model, adapter, completions: Sequence[Completion]) -> Iterator[Tensor]:
    """(B, V) logits of each completion's next token, again and again, the completions having grown by a token since.

    Their K distinct prompts run once; then the cache goes on with a token a row.
    """
    prompts: dict[str, int] = {}  # key -> number of the prompt
    first_of_prompt: list[Completion] = []
    for completion in completions:
        if completion.key not in prompts:
            prompts[completion.key] = len(prompts)
            first_of_prompt.append(completion)
    device = model.device
    prompt_of_row = torch.tensor([prompts[completion.key] for completion in completions], device=device)  # (B,)
    inputs = adapter.prompt_inputs([completion.prompt for completion in first_of_prompt])
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits, cache, mask, positions = prefill(model, inputs, prompt_of_row)
    while True:
        yield logits
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        output = model(
            input_ids=torch.tensor([completion.ids[-1:] for completion in completions], device=device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits, positions = output.logits[:, -1], positions + 1


def repeated_logits(model, adapter, completions: Sequence[Completion]) -> Iterator[Tensor]:
    """What `cached_logits` gives, by the plain forward of prompt and completion, anew for each token. Sequences of one
    length run together, so that nothing is padded."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    while True:
        rows_of_length: dict[int, list[int]] = {}
        for row, completion in enumerate(completions):
            rows_of_length.setdefault(len(completion.prompt.ids) + len(completion.ids), []).append(row)
        logits: dict[int, Tensor] = {}  # of each row
        for rows in rows_of_length.values():
            prompts = [completions[row].prompt for row in rows]
            prompts = [replace(prompt, ids=prompt.ids + completions[row].ids) for prompt, row in zip(prompts, rows)]
            inputs = {name: tensor.to(model.device) for name, tensor in adapter.prompt_inputs(prompts).items()}
            logits |= zip(rows, model(**inputs, **keep).logits[:, -1])
        yield torch.stack([logits[row] for row in range(len(completions))])


@torch.no_grad()
def cache_is_exact(model, adapter, completions: Sequence[Completion]) -> bool:
    """Whether a cache that goes on from a prompt gives the plain forward's logprobs, tried on the longest prompt, for
    two rows, and the shortest, padded. A model for which it does not is warned about; generation repeats its prompts.
    """
    by_length = sorted(completions, key=lambda completion: len(completion.prompt.ids))
    tried = [replace(completion, ids=[]) for completion in (by_length[-1], by_length[-1], by_length[0])]
    try:
        cached, repeated = (next_logits(model, adapter, tried) for next_logits in (cached_logits, repeated_logits))
        differences = []
        for _ in range(COMPARED_TOKENS):
            one, other = (next(logits).float().log_softmax(-1) for logits in (cached, repeated))
            differences.append((one - other).abs().mean())
            for completion in tried:
                completion.ids.append(completion.prompt.ids[-1])  # a token that is sure not to stand for an image
        off = torch.stack(differences).max()
        if off <= tolerance(model):
            return True
        reason = f"logprobs are off by {off:.1e}"
    except Exception as error:  # the cache is the model's own affair, and so is how it fails
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"{type(model).__name__}: generation in this process repeats the prompt for each token: {reason}")
    return False


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
