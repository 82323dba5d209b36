"""Rollouts: the next prompts in order, through the environment, answered by a server that has the policy's weights.

`Rollouts` is one step's collection after the other; `RolloutsAhead` wraps it so that a server of its own samples the
next step's rollouts while this step trains. An environment is touched here alone, in three places: its training
examples, its evaluation examples, `generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol

import torch
from verifiers.clients import OpenAIChatCompletionsClient

from media import plain_messages

if TYPE_CHECKING:
    import verifiers as vf
    from verifiers.types import GenerateOutputs

    from mm_grpo import MultimodalAdapter, MultimodalRLConfig, Policy
    from report import Clock

PLACEHOLDER_BIAS = -100.0  # the strongest ban that logit_bias knows; exp(-100) is never sampled
ATTEMPTS = 3  # a server that is lost so often in the same rollouts is not a passing fault


class Server(Protocol):
    """Where completions come from. `local_server.LocalServer` and `vllm_server.VLLMServer` are two."""

    client: Any  # openai.AsyncOpenAI, for /v1/chat/completions
    model_name: str  # to ask for
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


class Rollouts:
    """Collects a step's rollouts, and keeps the server's weights as new as `sync_to_vllm_every` asks.

    Args:
        policy: in training; its `version` counts the steps that it has been trained.
        adapter: of its family; names the placeholders that are never sampled.
        server: see `Server`.
        config: see MultimodalRLConfig.
        clock: takes the time of "rollout" and "sync".
        env: a verifiers environment; may be set later.

    Attributes:
        policy_version: of the policy that sampled the rollouts collected last.
        server_version: of the policy whose weights the server has; None: not known before the first weight update.
        prompts_taken: prompts of the training set so far, over all epochs.
        rubric: names of the environment's own metrics, known from the first rollouts on.
    """

    def __init__(
        self,
        policy: Policy,
        adapter: MultimodalAdapter,
        server: Server,
        config: MultimodalRLConfig,
        clock: Clock,
        env: vf.Environment | None = None,
    ):
        self.policy, self.adapter, self.server = policy, adapter, server
        self.config, self.clock, self.env = config, clock, env
        self.loop = asyncio.new_event_loop()  # one for the run: the client is bound to the loop that it first ran in
        self.prompts_taken = 0
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

    def collect(self) -> GenerateOutputs:
        """Roll out the next prompts, G completions each; their rewards are those of `primary_reward_key`."""
        with self.clock("rollout"):
            outputs = self.sample(self.next_examples(), self.config.temperature)
        self.policy_version = self.server_version
        return with_reward(outputs, self.config.primary_reward_key)

    def mismatch_message(self, difference: float) -> str | None:
        """What is wrong where the trainer's logprobs of on-policy rollouts are so far (mean |difference|) from the
        server's; None: no more than the precision of two forwards."""
        threshold = self.config.mismatch_threshold
        if threshold is None:
            threshold = 1e-3 if self.server.dtype == torch.float32 and not self.config.bf16 else 0.1
        if difference <= threshold:
            return None
        return (
            f"step {self.policy.version + 1}: logprob_difference={difference:.3g} is above mismatch_threshold="
            f"{threshold:g} at the first update after a rollout: the server and the trainer disagree about the policy "
            "that sampled. Usual causes: images lost or resized differently on the way (vLLM: --mm-processor-kwargs), "
            "the server's weights are old or were only partly updated (a tied output head), it reports logprobs before "
            "the temperature (vLLM: --logprobs-mode processed_logprobs), or it adds sampling settings of the "
            "checkpoint (vLLM: --generation-config vllm)."
        )

    def evaluate(self) -> GenerateOutputs:
        """Greedy rollouts of the first `eval_examples` evaluation examples, by the policy as it is now."""
        if self.config.sync_to_vllm_every and self.server_version != self.policy.version:
            self.sync()  # also between two weight updates
        examples = self.environment.get_eval_dataset(n=self.config.eval_examples).to_list()
        return with_reward(self.sample(examples, temperature=0.0), self.config.primary_reward_key)

    def next_examples(self) -> list[dict]:
        """The dataset rows of a step, each of the next prompts G times.

        The training set is walked in a seeded shuffle, anew in each epoch: every example once before any comes again.
        """
        dataset = self.environment.get_dataset()
        G, N = self.config.rollouts_per_example, len(dataset)
        taken = range(self.prompts_taken, self.prompts_taken + self.config.rollouts_per_step // G)
        self.prompts_taken = taken.stop
        order = {epoch: epoch_order(N, self.config.seed, epoch) for epoch in {i // N for i in taken}}
        return [example for i in taken for example in [dataset[order[i // N][i % N]]] * G]

    def sample(self, examples: list[dict], temperature: float) -> GenerateOutputs:
        """Run the environment on these rows. A server that is lost meanwhile is waited for; then they run again."""
        step = self.policy.version + 1
        if self.server_version is None:  # it may have started from other weights
            self.sync()
        for _ in range(ATTEMPTS):
            outputs = self.generate(examples, temperature)
            if outputs is not None:
                return outputs
            warnings.warn(f"step {step}: the server was lost during the rollouts; waiting for it, then they run again")
            self.server.connect()
            if self.config.sync_to_vllm_every:
                self.sync()
        raise RuntimeError(f"step {step}: the server was lost {ATTEMPTS} times during the same rollouts; see its log")

    def generate(self, examples: list[dict], temperature: float) -> GenerateOutputs | None:
        """One attempt; None if the server was lost on the way, as what it samples after a restart is of old weights."""
        # Every sampling parameter is sent: a server's defaults may differ
        sampling = {
            "temperature": temperature,
            "max_tokens": self.config.max_tokens,
            "top_p": 1.0,
            "logprobs": True,
            "extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
        }
        if len(self.adapter.placeholder_ids):
            sampling["logit_bias"] = {str(i): PLACEHOLDER_BIAS for i in self.adapter.placeholder_ids}
        groups = self.config.max_concurrent // self.config.rollouts_per_example  # generate counts groups, not rollouts
        outputs = self.loop.run_until_complete(
            self.environment.generate(
                examples,
                client=ChatClient(self.server.client),
                model=self.server.model_name,
                sampling_args=sampling,
                max_concurrent=groups,
                state_columns=["trajectory"],
                on_start=lambda *_: None,
                on_progress=lambda *_: None,
                on_log=lambda *_: None,
            )
        )
        self.rubric = sorted({name for rollout in outputs["outputs"] for name in rollout["metrics"] or {}})
        return outputs if self.server.up_to_date() else None

    def sync(self) -> None:
        """Give the server the policy as it is now."""
        self.server.sync(self.policy.model)
        self.server_version = self.policy.version

    def sync_when_due(self) -> None:
        """The same, every `sync_to_vllm_every` steps; a server in this process has the weights at every step."""
        every = self.config.sync_to_vllm_every
        if self.server.shares_weights or (every and self.policy.version % every == 0):
            with self.clock("sync"):
                self.sync()

    def stop(self) -> None:
        """Call off what is still running; nobody waits for it any more."""

    def close(self) -> None:
        """Let go of the server, its client and the event loop."""
        self.stop()
        if not (self.loop.is_closed() or self.loop.is_running()):
            self.loop.run_until_complete(self.server.client.close())
            self.loop.close()
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
        self.background = ThreadPoolExecutor(max_workers=1)
        self.running: tuple[list[dict], int, Future] | None = None  # examples, version of their policy, outputs

    def collect(self) -> GenerateOutputs:
        if self.running is None:
            outputs = super().collect()
        else:
            (examples, version, future), self.running = self.running, None
            with self.clock("rollout"):
                outputs = future.result()
                if outputs is None:  # the server was lost under it
                    outputs, version = self.sample(examples, self.config.temperature), self.server_version
            self.policy_version = version
            outputs = with_reward(outputs, self.config.primary_reward_key)
        updated = self.server_version > 0 or not self.config.sync_to_vllm_every
        if updated and self.policy.version + 1 < self.config.max_steps:
            examples = self.next_examples()
            future = self.background.submit(self.generate, examples, self.config.temperature)
            self.running = examples, self.server_version, future
        return outputs

    def sync_when_due(self) -> None:
        if self.running is not None:  # finish rollouts first: a sync in between would mix two policies
            with self.clock("rollout"):
                wait([self.running[-1]])
        super().sync_when_due()

    def stop(self) -> None:
        if self.running is not None:
            self.loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self.loop)])
            wait([self.running[-1]], timeout=10)
            self.running = None
            if not self.loop.is_running():  # they had ended by themselves: nothing else may be called off later
                with contextlib.suppress(asyncio.CancelledError):
                    self.loop.run_until_complete(asyncio.sleep(0))

    def close(self) -> None:
        super().close()
        self.background.shutdown()


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch shows `count` examples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def with_reward(outputs: GenerateOutputs, key: str) -> GenerateOutputs:
    """The outputs with each rollout's "reward" taken from `key`: the reward itself or one of the rubric's metrics."""
    if key == "reward":
        return outputs
    rollouts = outputs["outputs"]
    for rollout in rollouts:
        if key not in (rollout["metrics"] or {}):
            names = sorted(rollout["metrics"] or {})
            raise ValueError(f"primary_reward_key={key!r}: the environment reports 'reward' and {names}")
    return {**outputs, "outputs": [{**rollout, "reward": rollout["metrics"][key]} for rollout in rollouts]}
