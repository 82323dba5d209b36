"""Rollouts: the next prompts in order, through the environment, answered by a server that has the policy's weights.

`Rollouts` is one step's collection after the other; `RolloutsAhead` wraps it so that a server of its own samples the
next step's rollouts while this step trains. An environment is touched here alone, in three places: its training
examples, its evaluation examples, `run_rollout` (`run_group` where its rubric compares a group's rollouts).

A rollout that fails (an exception of the environment, a reward function that raises, a time limit) is marked and left
out by the adapter; nothing that was a fault is trained on as a bad answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import torch
from verifiers.clients import OpenAIChatCompletionsClient
from verifiers.clients.openai_chat_completions_client import handle_openai_overlong_prompt
from verifiers.utils.response_utils import parse_response_tokens
from verifiers.utils.save_utils import state_to_output

from faults import RunStopped, deferred_signals
from media import plain_messages
from parallel import exchange, ranks, share, together

if TYPE_CHECKING:
    import verifiers as vf
    from verifiers.types import GenerateOutputs

    from mm_grpo import MultimodalAdapter, MultimodalRLConfig, Policy
    from report import Clock

PLACEHOLDER_BIAS = -100.0  # the strongest ban that logit_bias knows; exp(-100) is never sampled
ATTEMPTS = 3  # a server that is lost so often in the same rollouts is not a passing fault
TRIED_EXAMPLES = 8  # whose prompts are encoded before a run starts
RESERVED = {"error", "metrics", "trajectory", "example_id", "is_truncated", "step"}  # verifiers lays metrics over them
OF_EACH_ANSWER = tuple(f"{work.__module__}.{work.__qualname__}" for work in (parse_response_tokens, state_to_output))


class Server(Protocol):
    """Where completions come from. `local_server.LocalServer` and `vllm_server.VLLMServer` are two; one that has an
    `answer`, from a request's body to what `client` would give, is asked directly."""

    client: Any  # openai.AsyncOpenAI, for /v1/chat/completions
    model_name: str  # to ask for
    max_model_len: int  # tokens of a prompt and its completion together
    dtype: torch.dtype  # of its forward passes
    shares_weights: bool  # whether the model that samples is the very model that trains

    def connect(self) -> None:
        """Wait until it answers, and check that a policy can be trained on what it says."""

    def sync(self, model: torch.nn.Module) -> None:
        """Bring its weights up to date."""

    def up_to_date(self) -> bool:
        """Whether it still has the weights of the last sync; one that was restarted has not."""

    def close(self) -> None:
        """Let go of what it holds."""


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
        """Drop the None fields that a data set gives to parts of different shapes: a text's image_url, its detail."""
        native, extra = await super().to_native_prompt(messages)
        return plain_messages(native), extra


class LocalClient(ChatClient):
    """The same for a server in this process, which is handed the request itself: HTTP and the JSON of pictures would
    cost more than a small model's answer."""

    def __init__(self, server: Server):
        super().__init__(server.client)
        self.server = server

    @handle_openai_overlong_prompt
    async def get_native_response(self, prompt, model, sampling_args, tools=None, **kwargs):
        settings = dict(sampling_args)
        extra = settings.pop("extra_body", None) or {}
        if "max_tokens" in settings:  # as verifiers sends it
            settings["max_completion_tokens"] = settings.pop("max_tokens")
        return await self.server.answer({"model": model, "messages": prompt, "tools": tools, **settings, **extra})


REWARD_FAULTS: ContextVar[list[str] | None] = ContextVar("reward_faults", default=None)  # of the rollout at hand


class RewardFaults(logging.Handler):
    """Notes reward functions that raise: verifiers logs their exception and goes on with a reward of 0."""

    def emit(self, record: logging.LogRecord) -> None:
        faults, said = REWARD_FAULTS.get(), record.getMessage()
        if faults is not None and said.startswith(("Error calling reward function", "Error calling group reward")):
            faults.append(said)


logging.getLogger("verifiers").addHandler(RewardFaults(logging.ERROR))


class InOrder(ThreadPoolExecutor):
    """Threads, but not for what verifiers does with each answer: threads come back in any order, and then a reward
    function that draws from a global generator would serve another rollout now and then, and a seed other rewards."""

    def submit(self, work: Callable, /, *args, **named) -> Future:
        called = next(iter(getattr(work, "args", ())), None)  # asyncio.to_thread hands in partial(context.run, called)
        name = f"{getattr(called, '__module__', '')}.{getattr(called, '__qualname__', '')}"
        if not name.startswith(OF_EACH_ANSWER):
            return super().submit(work, *args, **named)
        done: Future = Future()
        done.set_result(work(*args, **named))  # what it raises, it raises where the thread would be awaited
        return done


def keep_signature(function: Callable) -> None:
    """Note a function's signature where `inspect.signature` looks first: verifiers asks for it some fifty times a
    rollout, a third of a small model's."""
    plain = getattr(function, "__func__", function)
    if inspect.isfunction(plain):
        plain.__signature__ = inspect.signature(plain)


def run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


class Rollouts:
    """Collects a step's rollouts, and keeps the server's weights as new as `sync_to_vllm_every` asks.

    Args:
        policy: in training; its `version` counts the steps that it has been trained.
        adapter: of its family; names the placeholders that are never sampled.
        server: see `Server`.
        config: see MultimodalRLConfig.
        clock: takes the time of "rollout" and "sync".
        env: a verifiers environment; may be set later.

    The event loop has a thread of its own, so that all of this works where a loop runs already (Jupyter), and what
    interrupts the wait for rollouts can call them off.

    Attributes:
        policy_version: of the policy that sampled the rollouts collected last.
        server_version: of the policy whose weights the server has; None: not known before the first weight update.
        rubric: names of the environment's own metrics, known from the first rollouts on.
    """

    def __init__(
        self,
        policy: Policy,
        adapter: MultimodalAdapter,
        server: Server,
        config: MultimodalRLConfig,
        clock: Clock,
        env=None,
    ):
        self.policy, self.adapter, self.server = policy, adapter, server
        self.config, self.clock, self.env = config, clock, env
        self.loop = asyncio.new_event_loop()  # one for the run: the client is bound to the loop that it first ran in
        self.loop.set_default_executor(InOrder(thread_name_prefix="asyncio"))
        self.thread = threading.Thread(target=run_loop, args=[self.loop], name="rollouts", daemon=True)
        self.thread.start()
        self.stop_loop = weakref.finalize(self, self.loop.call_soon_threadsafe, self.loop.stop)
        self.greeted = False  # whether the client has made its first request
        self.failed_sync: Exception | None = None
        self.rubric: list[str] = []
        self.policy_version = 0
        self.server_version = None if config.sync_to_vllm_every else 0  # without updates it is taken as it started

    @property
    def environment(self) -> vf.Environment:
        if self.env is None:
            raise RuntimeError("no environment: call trainer.set_environment('shapes-env'), or pass env=...")
        return self.env

    @property
    def lag(self) -> int:
        """Steps that the policy of the rollouts collected last lies behind the one in training."""
        return 0 if self.server.shares_weights else self.policy.version - self.policy_version

    def check(self) -> None:
        """Look at the environment before a run starts.

        Raises:
            ValueError: no training examples, a reward function with a name that verifiers overwrites, prompts that the
                adapter cannot encode, completions that the server has no room for.
        """
        import verifiers as vf

        if not isinstance(self.environment, vf.Environment):
            raise ValueError(f"env: expected a verifiers environment, got {type(self.environment).__name__}")
        dataset = self.environment.get_dataset()
        if not len(dataset):
            raise ValueError("env: it has no training examples")
        names, key = self.environment.rubric._get_reward_func_names(), self.config.primary_reward_key
        if taken := RESERVED & set(names):
            raise ValueError(f"env: reward functions named {sorted(taken)}: verifiers uses these names itself; rename")
        if key not in ("reward", *names):
            raise ValueError(f"primary_reward_key={key!r}: the environment reports 'reward' and {sorted(names)}")
        if self.config.rollouts_per_step // self.config.rollouts_per_example < ranks():
            raise ValueError(
                f"rollouts_per_step={self.config.rollouts_per_step}: fewer prompts than the {ranks()} ranks"
            )
        if not hasattr(self.adapter, "encode_prompt"):
            return
        lengths, reasons = [], []
        for row in dataset.select(range(min(TRIED_EXAMPLES, len(dataset)))).to_list():
            try:
                lengths.append(len(self.adapter.encode_prompt(row["prompt"]).ids))
            except Exception as error:  # a row that is bad alone is left out when its turn comes
                reasons.append(f"{type(error).__name__}: {error}")
        if not lengths:
            raise ValueError(f"env: none of the first {len(reasons)} prompts can be encoded. The first: {reasons[0]}")
        context, wanted = self.server.max_model_len, self.config.max_tokens
        if wanted > context - min(lengths):
            left = f"leave room for {max(context - min(lengths), 0)} in the model's context of {context}"
            raise ValueError(f"max_tokens={wanted}: prompts of {min(lengths)} tokens {left}")

    def collect(self) -> GenerateOutputs:
        """Roll out the step's prompts, G completions each; their rewards are those of `primary_reward_key`."""
        self.expect_synced()
        with self.clock("rollout"):
            outputs = self.sample(self.examples(self.policy.version), self.config.temperature)
        self.policy_version = self.server_version
        return with_reward(outputs, self.config.primary_reward_key)

    def check_on_policy(self, difference: float, undo: Callable[[], None]) -> None:
        """The logprobs of the current policy's rollouts must be the trainer's own, but for the precision of the two
        forwards: a warning, or with `on_mismatch` "error" RunStopped, after `undo`.

        Args:
            difference: mean |trainer's - server's|, at the first update after the rollouts.
        """
        threshold = self.config.mismatch_threshold
        if threshold is None:
            dtypes = {self.server.dtype, next(self.policy.parameters()).dtype}
            threshold = 1e-3 if dtypes == {torch.float32} and not self.config.bf16 else 0.1
        if difference <= threshold:
            return
        message = (
            f"step {self.policy.version + 1}: logprob_difference={difference:.3g} is above mismatch_threshold="
            f"{threshold:g} at the first update after a rollout: the server and the trainer disagree about the policy "
            "that sampled. Usual causes: images lost or resized differently on the way (vLLM: --mm-processor-kwargs), "
            "the server's weights are old or were only partly updated (a tied output head), it reports logprobs before "
            "the temperature (vLLM: --logprobs-mode processed_logprobs), or it adds sampling settings of the "
            "checkpoint (vLLM: --generation-config vllm)."
        )
        if self.config.on_mismatch == "error":
            undo()
            raise RunStopped(message)
        warnings.warn(message)

    def evaluate(self) -> GenerateOutputs:
        """Greedy rollouts of the first `eval_examples` evaluation examples, by the policy as it is now."""
        if self.config.sync_to_vllm_every and self.server_version != self.policy.version:
            self.sync()  # also between two weight updates
        examples = share(self.environment.get_eval_dataset(n=self.config.eval_examples).to_list())
        return with_reward(self.sample(examples, temperature=0.0), self.config.primary_reward_key)

    def examples(self, step: int) -> list[dict]:
        """This rank's dataset rows of a step (the first one is 0), each of its prompts G times.

        The training set is walked in a seeded shuffle, anew in each epoch: every example once before any comes again.
        """
        dataset = self.environment.get_dataset()
        G, N = self.config.rollouts_per_example, len(dataset)
        K = self.config.rollouts_per_step // G  # prompts a step
        taken = range(step * K, step * K + K)
        order = {epoch: epoch_order(N, self.config.seed, epoch) for epoch in {i // N for i in taken}}
        return [example for each in share([dataset[order[i // N][i % N]] for i in taken]) for example in [each] * G]

    def sample(self, examples: list[dict], temperature: float) -> GenerateOutputs:
        """Run the environment on these rows. A server that is lost meanwhile is waited for; then they run again."""
        step = self.policy.version + 1
        if self.server_version is None:  # it may have started from other weights
            self.sync()
        for _ in range(ATTEMPTS):
            outputs = together(lambda: self.generate(examples, temperature))
            if all(exchange(outputs is not None)):
                return outputs
            warnings.warn(f"step {step}: the server was lost during the rollouts; waiting for it, then they run again")
            together(self.server.connect)
            if self.config.sync_to_vllm_every:
                self.sync()
        raise RuntimeError(f"step {step}: the server was lost {ATTEMPTS} times during the same rollouts; see its log")

    def generate(self, examples: list[dict], temperature: float) -> GenerateOutputs | None:
        """One attempt; None if the server was lost on the way, as what it samples after a restart is of old weights."""
        return self.wait(self.roll_out(examples, temperature))

    async def roll_out(self, examples: list[dict], temperature: float) -> GenerateOutputs | None:
        """Every rollout by itself, at most `max_concurrent` at once; all of them where the server is in this process,
        which then samples the same whatever else the machine does."""
        direct = hasattr(self.server, "answer")
        if not (self.greeted or direct):  # the client asks in a thread on what platform it runs, before its very first
            with contextlib.suppress(Exception):  # request: that must not be one whose order counts
                await self.server.client.models.list()
            self.greeted = True
        client = LocalClient(self.server) if direct else ChatClient(self.server.client)
        G = self.config.rollouts_per_example if temperature else 1  # of an evaluation: one each
        for function in (*self.environment.rubric._get_reward_funcs(), *self.environment._stop_conditions):
            keep_signature(function)
        size = G if self.environment.requires_group_rollouts else 1
        room = len(examples) if self.server.shares_weights else max(1, self.config.max_concurrent // size)
        limit, sampling = asyncio.Semaphore(room), self.sampling(temperature)
        units = [
            self.run_unit(examples[i : i + size], i // G, client, sampling, limit)
            for i in range(0, len(examples), size)
        ]
        rollouts = [rollout for unit in await asyncio.gather(*units) for rollout in unit]
        self.rubric = sorted({name for rollout in rollouts for name in rollout["metrics"] or {}})
        return {"outputs": rollouts} if await asyncio.to_thread(self.server.up_to_date) else None

    async def run_unit(self, rows: list[dict], group: int, client, sampling: dict, limit: asyncio.Semaphore) -> list:
        """The outputs of one rollout, or of a group whose rubric compares its rollouts. One that fails has "dropped",
        the word for its cause, and "error"; "group" is the number of the prompt in the step, whatever its id."""
        REWARD_FAULTS.set(faults := [])
        env, settings = self.environment, (client, self.server.model_name, sampling)
        columns = ["trajectory", "reward"]  # the reward again: a metric of that name is laid over it
        try:
            async with limit, asyncio.timeout(self.config.rollout_timeout):
                if env.requires_group_rollouts:
                    outputs = await env.run_group(rows, *settings, state_columns=columns)
                else:
                    outputs = [await env.run_rollout(rows[0], *settings, state_columns=columns)]
            fault = ("reward", faults[0]) if faults else None
        except TimeoutError:
            fault = "timeout", f"it took longer than rollout_timeout={self.config.rollout_timeout:g} s"
        except Exception as error:  # the environment's own code may raise anything
            fault = "environment", f"{type(error).__name__}: {error}"
        if fault and fault[0] != "reward":
            nothing = {"completion": None, "reward": None, "metrics": {}, "trajectory": [], "is_truncated": False}
            outputs = [{"example_id": row.get("example_id"), "prompt": row.get("prompt"), **nothing} for row in rows]
        for output in outputs:
            output["group"] = group
            if fault and not output.get("error"):
                output |= {"dropped": fault[0], "error": {"error_chain_repr": fault[1]}}
        return outputs

    def sampling(self, temperature: float) -> dict:
        """Every sampling parameter is sent, as a server's defaults may differ. What the environment sets otherwise is
        overruled, with a warning: the ratio is of the distribution that the config describes."""
        ours = {"temperature": temperature, "max_tokens": self.config.max_tokens, "top_p": 1.0, "logprobs": True}
        ours["seed"] = None  # one seed for all would make a group's completions the same
        if len(self.adapter.placeholder_ids):
            ours["logit_bias"] = {str(i): PLACEHOLDER_BIAS for i in self.adapter.placeholder_ids}
        extra = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        theirs = self.environment.sampling_args or {}
        named = {**theirs, **(theirs.get("extra_body") or {})}
        if changed := [name for name, value in {**ours, **extra}.items() if named.get(name, value) != value]:
            warnings.warn(f"env: its sampling_args {sorted(changed)} are overruled by the run's settings")
        return {**theirs, **ours, "extra_body": {**(theirs.get("extra_body") or {}), **extra}}

    # -- the event loop, in its thread

    def start(self, coroutine: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def wait(self, work: Coroutine | Future) -> Any:
        """Its result. What interrupts the wait calls the work off first, so that nothing of it goes on unseen."""
        limit, future = self.config.rollout_timeout, None
        try:
            with deferred_signals():  # until it is known what would have to be called off
                future = work if isinstance(work, Future) else self.start(work)
            while not wait([future], timeout=limit).done:
                if not wait([self.start(asyncio.sleep(0)), future], timeout=limit, return_when=FIRST_COMPLETED).done:
                    awaited = "what waits must be awaited (asyncio.to_thread)"
                    raise RuntimeError(f"env: it has blocked the event loop for rollout_timeout={limit:g} s; {awaited}")
            return future.result()
        except BaseException:
            if future is not None and not future.done():
                self.call_off(future)
            raise

    def call_off(self, future: Future) -> None:
        async def others_end() -> None:
            if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(tasks)

        future.cancel()
        wait([self.start(others_end())], timeout=10)

    def sync(self) -> None:
        """Give the server the policy as it is now."""
        self.server.sync(self.policy.model)
        self.server_version, self.failed_sync = self.policy.version, None

    def sync_when_due(self) -> None:
        """The same, every `sync_to_vllm_every` steps; a server in this process has the weights at every step.

        Where it fails, the next rollouts do: the step is trained by now, and its metrics are still to be logged."""
        every = self.config.sync_to_vllm_every
        if self.server.shares_weights or (every and self.policy.version % every == 0):
            with self.clock("sync"):
                try:
                    self.sync()
                except Exception as error:
                    self.failed_sync = error

    def expect_synced(self) -> None:
        """Raises what the last weight update raised."""
        if self.failed_sync is not None:
            raise self.failed_sync

    def stop(self) -> None:
        """Call off what is still running; nobody waits for it any more."""

    def close(self) -> None:
        """Let go of the server, its client and the event loop."""
        self.stop()
        if self.stop_loop.alive:
            wait([self.start(self.server.client.close())], timeout=10)
            self.stop_loop()
            self.thread.join(timeout=10)
        self.server.close()


class RolloutsAhead(Rollouts):
    """The next step's rollouts are sampled while this step trains: one step off-policy, in less time.

    The first ones are not: those after the first weight update are on-policy, which shows whether updates arrive.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.server.shares_weights:
            raise ValueError(
                "async_rollouts=True: needs vllm_server_host; in this process the model that samples is the one that "
                "is being changed"
            )
        self.running: tuple[int, list[dict], int, Future] | None = None  # step, examples, policy's version, outputs

    def collect(self) -> GenerateOutputs:
        self.expect_synced()
        if self.running is not None and self.running[0] != self.policy.version:  # a step is tried again
            self.stop()
        if self.running is None:
            outputs = super().collect()
        else:
            (_, examples, version, future), self.running = self.running, None
            with self.clock("rollout"):
                outputs = together(lambda: self.wait(future))
                if not all(exchange(outputs is not None)):  # the server was lost under it
                    outputs, version = self.sample(examples, self.config.temperature), self.server_version
            self.policy_version = version
            outputs = with_reward(outputs, self.config.primary_reward_key)
        updated = self.server_version > 0 or not self.config.sync_to_vllm_every
        if updated and self.policy.version + 1 < self.config.max_steps:
            step, examples = self.policy.version + 1, self.examples(self.policy.version + 1)
            with deferred_signals():  # as in `wait`
                future = self.start(self.roll_out(examples, self.config.temperature))
                self.running = step, examples, self.server_version, future
        return outputs

    def sync(self) -> None:
        self.finish_rollouts()
        super().sync()

    def sync_when_due(self) -> None:
        with self.clock("rollout"):
            self.finish_rollouts()
        super().sync_when_due()

    def finish_rollouts(self) -> None:
        """Wait for them, those of every rank: a weight update in between would mix two policies."""
        if self.running is not None:
            wait([self.running[-1]])
        exchange(None)

    def stop(self) -> None:
        if self.running is not None:
            self.call_off(self.running[-1])
            self.running = None


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch shows `count` examples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def with_reward(outputs: GenerateOutputs, key: str) -> GenerateOutputs:
    """The outputs with each rollout's "reward" taken from `key`: the reward itself or one of the rubric's metrics."""
    if key == "reward":
        return outputs
    rewards = []
    for rollout in outputs["outputs"]:
        metrics = rollout["metrics"] or {}
        if not rollout.get("error") and key not in metrics:
            raise ValueError(f"primary_reward_key={key!r}: the environment reports 'reward' and {sorted(metrics)}")
        rewards.append(metrics.get(key))
    rollouts = zip(outputs["outputs"], rewards)
    return {**outputs, "outputs": [{**rollout, "reward": reward} for rollout, reward in rollouts]}
