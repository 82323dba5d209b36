"""Rollouts in this process: an OpenAI-compatible chat server that samples from the very model in training.

There is no socket and no second copy of the weights. OpenAI's client reaches it like one far away; rollouts hand their
requests to `LocalServer.answer`, which says the same.
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
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import httpx
import openai
import torch
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers.cli.serving.utils import get_response_template

from shared_prefix import prefill, tolerance

if TYPE_CHECKING:
    from adapters import ProcessorAdapter
    from mm_grpo import MultimodalRLConfig

COMPARED_TOKENS = 3  # of a completion, to try the cache: one that the prompt predicts, two that the cache does
MAX_BODY = 2**26  # bytes of a request
BATCH_TOKENS = 2**16  # generated together, padding included: the key-value cache holds them all
SAMPLED_LOGITS = 2**22  # drawn from at once, in float64: 512 requests and 152,064 ids would take 2 GB
CALLS_WITHOUT_FORM = (
    "Set tokenizer.response_template, ask with tool_choice='none' (calls stay text), or roll out on a vLLM server with "
    "--enable-auto-tool-choice --tool-call-parser (vllm_server_host)"
)
NOT_FINITE = "the policy's logits are NaN: its weights are broken (a too large learning rate? look at grad_norm)"


class BadRequest(Exception):
    """A request that is answered with an error, in vLLM's words and shape."""

    def __init__(self, message: str, param: str | None = None, code: int = 400, kind: str = "BadRequestError"):
        super().__init__(message)
        self.code, self.body = code, {"error": dict(message=message, type=kind, param=param, code=code)}


# Parameters that would change the distribution, with the values at which they do nothing. Any other value is refused,
# and any name that is not in ChatCompletionRequest either: what is quietly ignored makes the logprobs a lie.
NEUTRAL = {
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty", "top_logprobs"), (0,)),
    **dict(top_k=(-1, 0), repetition_penalty=(1,), n=(1,), stop=([], ""), stream=(False,), parallel_tool_calls=(True,)),
    **dict.fromkeys(("logprobs", "return_token_ids"), (True, False)),
    "modalities": (["text"],),  # verifiers asks for it where a prompt has sound
}
TOOL_CHOICES = "be 'auto' or 'none' (to force a call, roll out on a vLLM server: vllm_server_host)"
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
    tool_choice: Literal["auto", "none"] | None = Field(None, description=TOOL_CHOICES)

    @classmethod
    def parse(cls, body: bytes, messages: list[dict] | None = None) -> ChatCompletionRequest:
        """The request of a JSON body; its messages are these instead, if there are any: pictures are not copied then.
        Raises BadRequest: what is wrong with the first field that is."""
        try:
            request = cls.model_validate_json(body)
            request.messages = messages or request.messages
        except ValidationError as invalid:
            error = invalid.errors(include_url=False)[0]
            name = str(error["loc"][0]) if error["loc"] else None
            if name not in cls.model_fields:
                raise BadRequest(f"the body must be a JSON object of a chat completion: {error['msg']}") from None
            said = f"{name} must {cls.model_fields[name].description}, got {error['input']!r}."
            raise BadRequest(said, name) from None
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
    error: str | None = None  # what made it fail

    def finished(self, stop_ids: set[int]) -> bool:
        return bool(self.error) or len(self.ids) == self.max_tokens or not stop_ids.isdisjoint(self.ids[-1:])


class LocalServer(httpx.AsyncBaseTransport):
    """An OpenAI-compatible chat server inside the process, as the transport of its own client (see `rollouts.Server`).

    Requests in flight are generated together, as many as memory has room for. Each distinct prompt runs through the
    model once, images included, and its key-value cache serves all its completions; a model for which that is not the
    plain forward (`cache_is_exact`) runs prompt and completion anew for each token. Every request draws from a random
    stream of its own: of its prompt and its seed, or of `seed`, `updates`, and how often the prompt was asked since.

    Args:
        model: a Transformers vision-language model; the one in training, so `sync` has nothing to do.
        adapter: encodes prompts (`encode_prompt`, `prompt_inputs`) and holds the tokenizer.
        seed: of sampling.
        model_name: what requests must ask for.
        max_model_len: prompt and completion together; None: the model's own limit.
        max_images: a prompt may hold.
        bf16: sample in bfloat16 autocast.

    Raises:
        TypeError: the adapter lacks one of these methods.
    """

    shares_weights = True

    def __init__(
        self,
        model: torch.nn.Module,
        adapter: ProcessorAdapter,
        seed: int = 0,
        model_name: str = "policy",
        max_model_len: int | None = None,
        max_images: int = 16,
        bf16: bool = False,
    ):
        if missing := [name for name in ("encode_prompt", "prompt_inputs") if not hasattr(adapter, name)]:
            instead = "derive it from adapters.ProcessorAdapter, or roll out on a vLLM server (vllm_server_host)"
            raise TypeError(f"adapter: {type(adapter).__name__} has no {missing[0]}(), needed here: {instead}")
        self.model, self.adapter, self.seed = model, adapter, seed
        self.model_name, self.max_images, self.bf16 = model_name, max_images, bf16
        self.dtype = torch.bfloat16 if bf16 else next(model.parameters()).dtype
        self.max_model_len = max_model_len or model.config.get_text_config().max_position_embeddings
        address = dict(base_url="http://in-process/v1", api_key="none", max_retries=0)
        self.client = openai.AsyncOpenAI(**address, http_client=httpx.AsyncClient(transport=self))
        eos = model.generation_config.eos_token_id
        self.stop_ids = {adapter.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.cache_is_exact: bool | None = None  # found out with the first requests
        self.call_form = get_response_template(adapter.tokenizer, model)  # how it writes tool calls; None: not known
        self.pending: list[tuple[Completion, asyncio.Future]] = []
        self.encoded: dict[Any, tuple[str, Any]] = {}  # what is pending, by its messages
        self.updates = 0  # of the weights so far; a run that goes on from another one may set it
        self.times_asked: dict[str, int] = {}  # by prompt, since the last update of the weights
        self.memory_ended = False  # once, and it was said

    @classmethod
    def from_config(cls, model: torch.nn.Module, adapter: ProcessorAdapter, config: MultimodalRLConfig) -> LocalServer:
        """The server of a run with this config."""
        return cls(model, adapter, seed=config.seed, bf16=config.bf16)

    def connect(self) -> None:
        """Nothing to do: it is here."""

    def sync(self, model: torch.nn.Module) -> None:
        """The model that samples is the model that trains: only the random streams are new."""
        self.updates += 1
        self.times_asked.clear()

    def up_to_date(self) -> bool:
        return True

    def close(self) -> None:
        self.pending.clear()
        self.encoded.clear()

    def __str__(self) -> str:
        return "in this process"

    async def answer(self, body: dict[str, Any]) -> ChatCompletion:
        """What `client` gives for a request with this body, with neither HTTP nor the messages' JSON on the way; no
        limit but memory on how large it is.

        Raises:
            openai.APIStatusError: what `client` would raise. TypeError, ValueError: JSON cannot hold the settings.
        """
        settings = json.dumps({**body, "messages": [{}] * len(body["messages"])}, allow_nan=False)
        try:
            return ChatCompletion.model_validate(await self.complete(settings.encode(), body["messages"]))
        except Exception as error:
            failed = refusal(error)
        failed.request = httpx.Request("POST", f"{self.client.base_url}chat/completions")
        raise self.client._make_status_error_from_response(failed)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            if request.url.path == "/v1/models":
                entry = {"id": self.model_name, "object": "model", "max_model_len": self.max_model_len}
                return httpx.Response(200, json={"object": "list", "data": [entry]})
            if request.url.path != "/v1/chat/completions":
                raise BadRequest(f"no route {request.url.path}", code=404, kind="NotFoundError")
            body = await request.aread()
            if len(body) > MAX_BODY:
                raise BadRequest(f"a body of {len(body)} bytes: at most {MAX_BODY}", code=413, kind="RequestTooLarge")
            return httpx.Response(200, json=await self.complete(body))
        except Exception as error:
            return refusal(error)

    async def complete(self, body: bytes, messages: list[dict] | None = None) -> dict:
        """vLLM's JSON for a request, see `ChatCompletionRequest.parse`."""
        completion = self.prepare(ChatCompletionRequest.parse(body, messages))
        future = asyncio.get_running_loop().create_future()
        self.pending.append((completion, future))
        if len(self.pending) == 1:  # a task of its own: the request that came first may be cancelled like any other
            self.running = asyncio.create_task(self.run_pending())
        await future
        return self.reply(completion)

    async def run_pending(self) -> None:
        """Wait until no more requests come, then run them all."""
        arrived = 0
        while len(self.pending) > arrived:
            arrived = len(self.pending)
            await asyncio.sleep(0.002)
        batch = [(completion, waiting) for completion, waiting in self.pending if not waiting.done()]  # done: cancelled
        self.pending = []
        self.encoded.clear()
        left = sorted((completion for completion, _ in batch), key=lambda completion: len(completion.prompt.ids))
        try:
            if left and self.cache_is_exact is None:
                self.cache_is_exact = cache_is_exact(self.model, self.adapter, left)
            while left:
                rows = batch_size(left)
                self.run(left[:rows])
                left = left[rows:]
        finally:  # nobody waits for ever, whatever goes wrong here (a warning may be an error)
            for _, waiting in batch:
                waiting.set_result(None)

    def run(self, completions: Sequence[Completion]) -> None:
        """Generate these; where that fails, each half anew, down to the one that fails alone: it has the error."""
        for completion in completions:
            completion.ids, completion.logprobs, completion.error = [], [], None
        try:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                return generate(self.model, self.adapter, completions, self.stop_ids, bool(self.cache_is_exact))
        except Exception as error:  # the cause reaches the client as it would from vLLM
            completions[0].error = f"{type(error).__name__}: {error}"
            of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        half = len(completions) // 2  # the error is gone, and with its frames the memory that they held
        if half and of_memory and not self.memory_ended:
            self.memory_ended = True
            warnings.warn(f"memory ended: {len(completions)} completions run in halves (fewer at once: max_concurrent)")
        for part in (completions[:half], completions[half:]) if half else ():
            self.run(part)

    def prepare(self, request: ChatCompletionRequest) -> Completion:
        """Check a request against the model as vLLM would, encode its prompt, make its random stream."""
        if request.model != self.model_name:
            raise BadRequest(f"The model `{request.model}` does not exist.", "model", 404, "NotFoundError")
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        bias = {token: min(100.0, max(-100.0, value)) for token, value in (request.logit_bias or {}).items()}
        if unknown := [token for token in bias if not 0 <= token < vocabulary]:
            said = f"token_id(s) {unknown} in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocabulary}"
            raise BadRequest(said, "logit_bias")
        key, prompt = self.encode(request.messages, request.tools or None)
        callable_tools = request.tools if request.tool_choice != "none" else None
        if callable_tools and self.call_form is None:
            unknown = f"tools: Transformers does not know how {type(self.model).__name__} writes calls"
            raise BadRequest(f"{unknown}. {CALLS_WITHOUT_FORM}", "tools")
        held, limit = len(prompt.ids), self.max_model_len
        wanted = request.max_completion_tokens or request.max_tokens or limit - held
        if held >= limit or held + wanted > limit:
            asked = f"However, you requested {wanted} output tokens and your prompt contains {held} input tokens."
            raise BadRequest(f"This model's maximum context length is {limit} tokens. {asked}", "input_tokens")
        temperature = 1.0 if request.temperature is None else request.temperature
        count = self.times_asked.get(key, 0)
        if request.seed is None and temperature > 0:  # a greedy answer uses no noise
            self.times_asked[key] = count + 1
        source = (self.seed, self.updates, key, count) if request.seed is None else (request.seed, key)
        stream = int(hashlib.sha256(repr(source).encode()).hexdigest()[:15], 16)
        noise = torch.rand(wanted, generator=torch.Generator().manual_seed(stream), dtype=torch.float64)
        return Completion(prompt, key, wanted, temperature, request.top_p or 1.0, bias, noise, callable_tools)

    def encode(self, messages: list[dict[str, Any]], tools: list[dict] | None = None) -> tuple[str, Any]:
        """(key, encoded prompt) of these messages: made once for all that are asked together."""
        if not self.pending:  # of those before, some may have been refused
            self.encoded.clear()
        asked = frozen((messages, tools))
        if asked not in self.encoded:
            self.encoded[asked] = self.encode_anew(messages, tools)
        return self.encoded[asked]

    def encode_anew(self, messages: list[dict[str, Any]], tools: list[dict] | None) -> tuple[str, Any]:
        """The same, whatever was asked before. Raises BadRequest."""
        shown = (messages, tools) if tools else (messages,)
        key = hashlib.sha256("".join(json.dumps(part, sort_keys=True) for part in shown).encode()).hexdigest()
        try:
            parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
            images = sum(part["type"] == "image_url" for part in parts)
            untold = tools and self.adapter.encode_prompt(PROBE, tools).ids == self.adapter.encode_prompt(PROBE).ids
            if images <= self.max_images and not untold:
                return key, self.adapter.encode_prompt(*shown)
        except Exception as error:  # whatever a chat template raises for what it does not take
            raise BadRequest(f"messages: {type(error).__name__}: {error}", "messages") from None
        if untold:
            raise BadRequest("tools: this model's chat template does not show them; set another one", "tools")
        raise BadRequest(f"At most {self.max_images} image(s) may be provided in one prompt, got {images}.", "image")

    def reply(self, completion: Completion) -> dict:
        """vLLM's JSON for a finished completion. Raises BadRequest for one that failed."""
        if completion.error or not completion.ids:
            raise BadRequest(completion.error or "it was not run", code=500, kind="InternalServerError")
        ids, prompt_ids = completion.ids, completion.prompt.ids
        content = []
        for token, logprob in zip(self.adapter.tokenizer.convert_ids_to_tokens(ids), completion.logprobs):
            token = token or ""  # a head may have more ids than tokens
            content.append(dict(token=token, logprob=logprob, bytes=list(token.encode()), top_logprobs=[]))
        P, C = len(completion.prompt.ids), len(ids)
        message = self.message(completion)
        stopped = "tool_calls" if "tool_calls" in message else "stop"
        reason = stopped if ids[-1] in self.stop_ids else "length"
        choice = dict(index=0, message=message, finish_reason=reason, logprobs={"content": content}, token_ids=ids)
        usage = dict(prompt_tokens=P, completion_tokens=C, total_tokens=P + C)
        answer = dict(id=f"chatcmpl-{completion.key[:16]}", object="chat.completion", created=int(time.time()))
        return answer | dict(model=self.model_name, choices=[choice], usage=usage, prompt_token_ids=prompt_ids)

    def message(self, completion: Completion) -> dict:
        """The answer as a chat message. A tool call that is not well-formed leaves all of it text, as with vLLM."""
        tokenizer = self.adapter.tokenizer
        text = {"role": "assistant", "content": tokenizer.decode(completion.ids, skip_special_tokens=True)}
        if not completion.tools:
            return text
        context = dict(prefix=completion.prompt.ids, tools=completion.tools)
        try:
            parsed = tokenizer.parse_response(completion.ids, self.call_form, **context)
            # ids that are the same for the same answer: what follows is the same prompt then, and encoded once
            calls = [tool_call(f"call-{completion.key[:16]}-{i}", call) for i, call in enumerate(parsed["tool_calls"])]
        except (KeyError, TypeError, ValueError, RecursionError):
            return text
        return {**text, "content": None, **parsed, "tool_calls": calls}


def refusal(error: Exception) -> httpx.Response:
    """vLLM's answer where this went wrong; what is no BadRequest is the server's own fault."""
    if not isinstance(error, BadRequest):
        error = BadRequest(f"{type(error).__name__}: {error}", code=500, kind="InternalServerError")
    return httpx.Response(error.code, json=error.body)


def frozen(value: Any) -> Any:
    """A key of what JSON can hold: two are equal only where the JSON is. Its texts are those themselves, of which
    Python keeps the hash: a picture that many requests share is read once."""
    if isinstance(value, dict):
        return dict, *((name, frozen(inner)) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return value if isinstance(value, str) else (type(value), repr(value))  # 1, 1.0 and True are equal to Python


def tool_call(call_id: str, parsed: dict) -> dict:
    """A tool call of OpenAI's shape. Raises KeyError, TypeError or ValueError for one that is not well-formed."""
    name, arguments = parsed["function"]["name"], parsed["function"]["arguments"]
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        raise TypeError(f"tool call: expected a name and a dict of arguments, got {name!r} and {arguments!r}")
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    json.dumps(function, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent
    return {"id": call_id, "type": "function", "function": function}


def batch_size(completions: Sequence[Completion]) -> int:
    """How many of the first of these, sorted by prompt length, are generated together: so many that rows x (longest
    prompt + largest max_tokens) stays within BATCH_TOKENS, and at least one."""
    largest = accumulate((completion.max_tokens for completion in completions), max)
    columns = (len(completion.prompt.ids) + most for completion, most in zip(completions, largest))
    return max(1, sum(rows * width <= BATCH_TOKENS for rows, width in enumerate(columns, 1)))


@torch.no_grad()
def generate(model, adapter, completions: Sequence[Completion], stop_ids: set[int], cached: bool = True) -> None:
    """Sample these completions into their `ids` and `logprobs`: they grow together, a token a forward."""
    device = model.device
    temperature = torch.tensor([[completion.temperature] for completion in completions], device=device)  # (B, 1)
    top_p = torch.tensor([[completion.top_p] for completion in completions], dtype=torch.float64)
    noise = torch.nn.utils.rnn.pad_sequence([c.noise for c in completions], batch_first=True).to(device)
    numbers: dict[tuple, int] = {}  # of the distinct biases
    bias_of_row = [numbers.setdefault(tuple(c.logit_bias.items()), len(numbers)) for c in completions]
    bias_of_row = torch.tensor(bias_of_row, device=device)  # (B,)
    for t, logits in enumerate((cached_logits if cached else repeated_logits)(model, adapter, completions)):
        if t == 0:
            bias = torch.zeros(len(numbers), logits.shape[-1], device=device)
            for row, items in zip(bias, numbers):
                row[[token for token, _ in items]] = torch.tensor([value for _, value in items], device=device)
        rows = max(1, SAMPLED_LOGITS // logits.shape[-1])
        chunks = zip(*(each.split(rows) for each in (logits, bias_of_row, temperature, top_p, noise[:, t : t + 1])))
        drawn = [sample(some.float() + bias[its], *settings) for some, its, *settings in chunks]
        for completion, token, logprob in zip(completions, *(torch.cat(values).tolist() for values in zip(*drawn))):
            if not completion.finished(stop_ids):
                completion.ids.append(token)
                completion.logprobs.append(logprob)
                if not logprob > -torch.inf:  # NaN
                    completion.error = NOT_FINITE
        if all(completion.finished(stop_ids) for completion in completions):
            return


def cached_logits(model, adapter, completions: Sequence[Completion]) -> Iterator[Tensor]:
    """(B, V) logits of each completion's next token, again and again, the completions having grown by a token since.
    Their K distinct prompts run once; then the cache goes on with a token a row."""
    prompts = {completion.key: completion.prompt for completion in completions}  # K
    numbers = [list(prompts).index(completion.key) for completion in completions]
    inputs = {name: tensor.to(model.device) for name, tensor in adapter.prompt_inputs([*prompts.values()]).items()}
    logits, cache, mask, positions = prefill(model, inputs, torch.tensor(numbers, device=model.device))
    while True:
        yield logits
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        ids = torch.tensor([completion.ids[-1:] for completion in completions], device=model.device)  # (B, 1)
        options = dict(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        output = model(input_ids=ids, **options)
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
            grown = [replace(one.prompt, ids=one.prompt.ids + one.ids) for one in (completions[row] for row in rows)]
            inputs = {name: tensor.to(model.device) for name, tensor in adapter.prompt_inputs(grown).items()}
            logits |= zip(rows, model(**inputs, **keep).logits[:, -1])
        yield torch.stack([logits[row] for row in range(len(completions))])


@torch.no_grad()
def cache_is_exact(model, adapter, completions: Sequence[Completion]) -> bool | None:
    """Whether a cache that goes on from a prompt gives the plain forward's logprobs, tried on two rows of the longest
    prompt, the last, and on the shortest, the first, padded. A model for which it does not is warned about; generation
    repeats its prompts. None: the plain forward fails or is NaN as well, and what is asked next may tell.
    """
    tried = [replace(completions[i], ids=[]) for i in (-1, -1, 0)]
    try:
        repeated, cached = (next_logits(model, adapter, tried) for next_logits in (repeated_logits, cached_logits))
        differences = []
        for _ in range(COMPARED_TOKENS):
            plain = None
            plain = next(repeated).float().log_softmax(-1)
            differences.append((next(cached).float().log_softmax(-1) - plain).abs().mean())
            for completion in tried:
                completion.ids.append(completion.prompt.ids[-1])  # a token that is sure not to stand for an image
        off = torch.stack(differences).max()
        if off <= tolerance(model):
            return True
        reason = f"logprobs are off by {off:.1e}"
    except Exception as error:  # the cache is the model's own affair, and so is how it fails
        reason = f"{type(error).__name__}: {error}"
    if plain is None or plain.isnan().any():
        return None
    warnings.warn(f"{type(model).__name__}: generation in this process repeats the prompt for each token: {reason}")
    return False


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row, by inverting the distribution function at `noise`.

    Args:
        logits: (B, V) float32, bias applied.
        temperature: (B, 1); 0 takes the likeliest token.
        top_p: (B, 1) in (0, 1], on the CPU; the smallest set of likeliest tokens with at least that probability stays.
        noise: (B, 1) float64 in [0, 1).

    Returns:
        (tokens, logprobs): (B,) each. Logprobs are of the distribution that was drawn from; with temperature 0, of
        temperature 1 (as vLLM reports them).
    """
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature), dim=-1)  # (B, V)
    if (top_p < 1).any():
        ordered, order = logprobs.sort(dim=-1, descending=True)
        before = ordered.double().exp_().cumsum_(-1) - ordered.double().exp_()  # probability of all likelier tokens
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < top_p.to(before.device))
        logprobs = torch.log_softmax(logprobs.masked_fill(~kept & ~greedy, -torch.inf), dim=-1)
    cumulative = logprobs.double().exp_().cumsum_(-1)
    drawn = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)  # skips tokens of probability 0
    tokens = torch.where(greedy, logprobs.argmax(-1, keepdim=True), drawn.clamp(max=logits.shape[-1] - 1))  # (B, 1)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)
