"""Tests of the server in this process and of the client that talks to it.

    pytest test_local_server.py

The server is asked through the OpenAI client that training uses. What it answers is held against Transformers' own
`generate` and against the model's plain forward on the ids that came back.
"""

import asyncio
import json
import math
import re
import sys
import warnings
from collections import Counter
from dataclasses import replace

import httpx
import hypothesis
import openai
import pytest
import torch
import verifiers as vf
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cli.serving.utils import get_response_template

import local_server
import tiny_vlm
from adapters import ProcessorAdapter
from conftest import (
    DEMONSTRATIONS,
    count_features,
    favour,
    make_tiny,
    make_tool_user,
    make_trainer,
    message,
    picture,
    processed,
)
from local_server import BATCH_TOKENS, MAX_BODY, ChatCompletionRequest, LocalServer, frozen, generate, sample
from media import image_urls, load_image
from mm_grpo import DEMO, MultimodalRLConfig
from rollouts import ChatClient, LocalClient

PROMPTS = [
    message(picture(0), "red"),
    message(picture(1), "what is the second colour ?"),
    message(picture(2), picture(3)),
    message("star ?"),
]


@pytest.fixture(scope="module", params=DEMONSTRATIONS)
def lively(request):
    """(model, adapter) whose weights are twice as large as fresh ones: it has opinions, and greedy answers differ."""
    model, adapter = make_tiny(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model, adapter


def ask(server, *requests, errors=False):
    """The answers to these requests, all in flight together; placeholders are biased away, as training does it.
    With `errors`, a request that fails has its exception for an answer."""
    usual = {"model": "policy", "extra_body": {"return_token_ids": True}, "logprobs": True}
    bias = {str(token): -100 for token in server.adapter.placeholder_ids}

    async def run():
        # a client's first requests ask in threads on what platform it runs, and come when those are done
        await server.client.models.list()
        biases = [bias | given if isinstance(given := r.get("logit_bias", {}), dict) else given for r in requests]
        create = server.client.chat.completions.create
        answers = (create(**usual | r | {"logit_bias": b}) for r, b in zip(requests, biases))
        return await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=errors), timeout=120)

    return asyncio.run(run())


def ids_of(answer):
    return answer.choices[0].token_ids


def logprobs_of(answer):
    return [token.logprob for token in answer.choices[0].logprobs.content]


def plain_logits(model, adapter, messages, answer):
    """(C, V) float64: the logits that the answer's tokens were drawn from, bias applied; by one forward, no cache."""
    prompt = adapter.encode_prompt(messages)
    assert answer.prompt_token_ids == prompt.ids
    whole = replace(prompt, ids=prompt.ids + ids_of(answer))
    with torch.no_grad():
        logits = model(**adapter.prompt_inputs([whole])).logits[0]
    logits[:, adapter.placeholder_ids] -= 100
    return logits[len(answer.prompt_token_ids) - 1 : -1].double()


# ---------------------------------------------------------------- what is sampled


def test_temperature_zero_is_transformers_greedy_generate_for_prompts_of_any_length(lively):
    model, adapter = lively
    requests = [dict(messages=messages, temperature=0, max_completion_tokens=8) for messages in PROMPTS]
    answers = ask(LocalServer(model, adapter), *requests)
    for messages, answer in zip(PROMPTS, answers):
        prompt = adapter.encode_prompt(messages)
        greedy = dict(do_sample=False, max_new_tokens=8, suppress_tokens=adapter.placeholder_ids)
        generated = model.generate(**adapter.prompt_inputs([prompt]), **greedy)[0]
        assert answer.prompt_token_ids + ids_of(answer) == generated.tolist()
    assert len({tuple(ids_of(answer)) for answer in answers}) == 4  # or this would prove little


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=1.7),
        dict(temperature=0.7, logit_bias={"9": -100, "10": 2.5, "11": 30.0}),
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_plain_forward_with_temperature_and_bias_applied(settings, lively):
    model, adapter = lively
    requests = [dict(messages=m, max_completion_tokens=6, **settings) for m in PROMPTS * 2]
    answers = ask(LocalServer(model, adapter), *requests)
    for messages, answer in zip(PROMPTS * 2, answers):
        logits = plain_logits(model, adapter, messages, answer)
        for token, value in settings.get("logit_bias", {}).items():
            logits[:, int(token)] += value
        expected = (logits / settings.get("temperature", 1.0)).log_softmax(-1)
        expected = expected[range(len(logits)), ids_of(answer)].tolist()
        # float32 sums in another order, logits around 5
        assert logprobs_of(answer) == pytest.approx(expected, abs=1e-4)


def test_top_p_draws_from_the_nucleus_only_and_its_logprobs_are_those_of_the_nucleus(lively):
    model, adapter = lively
    answers = ask(LocalServer(model, adapter), *[dict(messages=PROMPTS[0], max_completion_tokens=5, top_p=0.6)] * 12)
    for answer in answers:
        drawn_from = plain_logits(model, adapter, PROMPTS[0], answer)
        for logits, token, logprob in zip(drawn_from, ids_of(answer), logprobs_of(answer)):
            probabilities = logits.softmax(-1)
            likelier = probabilities[probabilities > probabilities[token]].sum()
            ordered = probabilities.sort(descending=True).values
            nucleus = ordered[: int((ordered.cumsum(0) < 0.6).sum()) + 1].sum()
            expected = (probabilities[token] / nucleus).log().item()
            assert likelier < 0.6 + 1e-4 and logprob == pytest.approx(expected, abs=1e-4)  # rounded as above


def test_a_seed_fixes_the_answer_and_another_one_changes_it(lively):
    server = LocalServer(*lively)
    request = dict(messages=PROMPTS[0], max_completion_tokens=12)
    once, again, other = ask(server, *({**request, "seed": seed} for seed in (5, 5, 6)))
    assert ids_of(once) == ids_of(again) != ids_of(other)
    (elsewhere,) = ask(LocalServer(*lively, seed=1), {**request, "seed": 5})
    assert ids_of(elsewhere) == ids_of(once)
    unseeded = [answer for seed in (0, 1) for answer in ask(LocalServer(*lively, seed=seed), *[request] * 4)]
    assert len({tuple(ids_of(answer)) for answer in unseeded}) == 8  # without one, no two requests share their draws


def test_a_bias_of_100_forces_a_token_and_of_minus_100_forbids_it(lively):
    model, adapter = lively
    stop = adapter.tokenizer.eos_token_id
    forbidden = {str(token): -100 for token in range(len(adapter.tokenizer)) if token not in (20, 21)}
    forced, left = ask(
        LocalServer(model, adapter),
        dict(messages=PROMPTS[0], max_completion_tokens=9, logit_bias={"20": 100, str(stop): -100}),
        dict(messages=PROMPTS[0], max_completion_tokens=40, logit_bias=forbidden),
    )
    assert ids_of(forced) == [20] * 9 and logprobs_of(forced) == pytest.approx([0.0] * 9, abs=1e-6)
    assert set(ids_of(left)) == {20, 21} and len(ids_of(left)) == 40


def test_an_answer_ends_at_the_stop_token_or_at_its_own_limit_and_says_which(lively):
    model, adapter = lively
    stop, words = adapter.tokenizer.eos_token_id, {"20": 100}
    answers = ask(
        LocalServer(model, adapter),
        dict(messages=PROMPTS[0], max_completion_tokens=9, logit_bias={str(stop): 100}),
        dict(messages=PROMPTS[1], max_completion_tokens=2, logit_bias=words),
        dict(messages=PROMPTS[2], max_tokens=5, logit_bias=words),
    )
    assert [ids_of(answer) for answer in answers] == [[stop], [20] * 2, [20] * 5]
    assert [answer.choices[0].finish_reason for answer in answers] == ["stop", "length", "length"]
    word = adapter.tokenizer.decode([20])
    assert [answer.choices[0].message.content for answer in answers] == ["", " ".join([word] * 2), " ".join([word] * 5)]
    for answer, messages in zip(answers, PROMPTS):
        images = [load_image(url) for url in image_urls(messages)]
        features = count_features(model, processed(adapter, images))
        held = answer.prompt_token_ids.count(adapter.processor.image_token_id)
        assert held == features > 1  # one placeholder a feature, not an image
        prompt, completion, usage = len(answer.prompt_token_ids), len(ids_of(answer)), answer.usage
        counted = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
        assert counted == (prompt, completion, prompt + completion)


def test_each_stop_token_of_the_generation_config_ends_an_answer():
    """Qwen-VL has two."""
    model, adapter = make_tiny("qwen")
    model.generation_config.eos_token_id = [adapter.tokenizer.eos_token_id, 20]
    server = LocalServer(model, adapter)
    (answer,) = ask(server, dict(messages=PROMPTS[0], max_completion_tokens=9, logit_bias={"20": 100}))
    assert ids_of(answer) == [20] and answer.choices[0].finish_reason == "stop"


def test_tokens_come_as_often_as_they_are_probable(tiny):
    model, adapter = tiny
    answers = ask(LocalServer(model, adapter, seed=3), *[dict(messages=PROMPTS[0], max_completion_tokens=1)] * 700)
    counts = Counter(ids_of(answer)[0] for answer in answers)
    expected = 700 * plain_logits(model, adapter, PROMPTS[0], answers[0])[0].softmax(-1)
    likely = (expected >= 5).nonzero().flatten().tolist()  # where the statistic is close to chi-square
    statistic = sum((counts[token] - expected[token].item()) ** 2 / expected[token].item() for token in likely)
    # mean n, standard deviation sqrt(2 n); the draws are always the same, so 4 deviations leave no chance of a false
    # alarm
    assert len(likely) > 20 and statistic < len(likely) + 4 * math.sqrt(2 * len(likely))


def test_each_distinct_prompt_runs_once_with_its_images_and_a_token_a_forward_follows(lively):
    model, adapter = lively
    server, seen = LocalServer(model, adapter), []
    ask(server, dict(messages=PROMPTS[0], max_completion_tokens=1))  # the first requests also try the cache
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    pixels = lambda _, args, kwargs: seen.append(len(kwargs.get("pixel_values", *args[:1])))
    tokens = lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape))
    watched = ((tower, pixels), (model, tokens))
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in watched]
    requests = [dict(messages=m, max_completion_tokens=4, logit_bias={"20": 100}) for m in PROMPTS] * 5
    ask(server, *requests)
    for hook in hooks:
        hook.remove()
    prompts = [adapter.encode_prompt(messages) for messages in PROMPTS]
    pixel_rows = sum(len(prompt.media.tensors["pixel_values"]) for prompt in prompts if prompt.media)
    assert seen == [(4, max(len(prompt.ids) for prompt in prompts)), pixel_rows, (20, 1), (20, 1), (20, 1)]


def test_an_answer_does_not_depend_on_what_else_is_asked(lively):
    requests = [dict(messages=m, max_completion_tokens=n) for n, m in zip((8, 6, 9, 7), PROMPTS)]
    together = ask(LocalServer(*lively), *requests)
    for answer, messages, n in zip(together, PROMPTS, (8, 6, 9, 7)):
        (alone,) = ask(LocalServer(*lively), dict(messages=messages, max_completion_tokens=n))
        assert ids_of(alone) == ids_of(answer)
        assert logprobs_of(alone) == pytest.approx(logprobs_of(answer), abs=1e-5)  # float32 sums of other shapes


def test_requests_that_have_no_room_beside_each_other_run_one_after_the_other(lively, monkeypatch):
    """511 short prompts were padded to one of 900 tokens; a large vocabulary was drawn from in one piece."""
    requests = [dict(messages=m, max_completion_tokens=6) for m in (*PROMPTS, message("red " * 60))]
    together, sizes, drawn = ask(LocalServer(*lively), *requests), [], []
    generate, sample = local_server.generate, local_server.sample
    monkeypatch.setattr(local_server, "generate", lambda *a: (sizes.append(len(a[2])), generate(*a))[1])
    monkeypatch.setattr(local_server, "sample", lambda logits, *a: (drawn.append(len(logits)), sample(logits, *a))[1])
    monkeypatch.setattr(local_server, "BATCH_TOKENS", 150)
    monkeypatch.setattr(local_server, "SAMPLED_LOGITS", 1)
    apart = ask(LocalServer(*lively), *requests)
    assert sizes[-1] == 1 < max(sizes) < 5 == sum(sizes) and set(drawn) == {1}  # the long one by itself
    assert [ids_of(answer) for answer in apart] == [ids_of(answer) for answer in together]


@pytest.mark.parametrize("error", [MemoryError(), IndexError("index out of range in self")], ids=["memory", "another"])
def test_a_request_that_fails_in_a_batch_fails_alone(tiny, monkeypatch, error):
    generate = local_server.generate

    def failing(model, adapter, completions, *rest):
        if any(completion.max_tokens == 7 for completion in completions):
            raise error
        return generate(model, adapter, completions, *rest)

    monkeypatch.setattr(local_server, "generate", failing)

    async def run(server):
        ask_for = lambda n: server.client.chat.completions.create(model="policy", messages=PROMPTS[0], max_tokens=n)
        return await asyncio.gather(*map(ask_for, (2, 3, 7, 4)), return_exceptions=True)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = asyncio.run(run(LocalServer(*tiny)))
    assert [isinstance(answer, openai.InternalServerError) for answer in answers] == [False, False, True, False]
    assert type(error).__name__ in str(answers[2])
    assert sum("memory ended" in str(line.message) for line in said) == isinstance(error, MemoryError)


def test_the_server_answers_with_the_very_weights_in_training():
    model, adapter = make_tiny("qwen")
    server, request = LocalServer(model, adapter), dict(messages=PROMPTS[0], max_completion_tokens=1, seed=0)
    (before,) = ask(server, request)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    (after,) = ask(server, request)
    assert abs(logprobs_of(before)[0] - logprobs_of(after)[0]) > 0.01
    expected = plain_logits(model, adapter, PROMPTS[0], after).log_softmax(-1)[0, ids_of(after)[0]].item()
    assert logprobs_of(after) == pytest.approx([expected], abs=1e-4)


# A row of logits; -100 stands for a token whose probability is exactly 0. Multiples of 1/8: float32 holds them exactly.
LOGITS = st.lists(st.integers(-40, 40).map(lambda k: k / 8) | st.just(-100.0), min_size=2, max_size=7)
EDGE = 1e-5  # float32 log-softmax of numbers up to 20: a draw that close to a boundary may fall on either side


@given(LOGITS, st.integers(2, 24).map(lambda k: k / 8), st.floats(0.05, 1.0), st.floats(0, 1, exclude_max=True))
@example([-100.0, 0.0, -100.0], 1.0, 1.0, 0.0)  # the first token has no probability
@example([0.0, 0.0, -100.0], 1.0, 1.0, 1 - 2**-53)  # nor the last
@example([3.0, 0.0, 1.0], 1.0, 0.5, 1 - 2**-53)  # nor has the last one outside a nucleus
def test_sample_inverts_the_distribution_function_of_the_nucleus(logits, temperature, top_p, noise):
    assume(max(logits) > -100)
    weights = [0.0 if x == -100 else math.exp(x / temperature) for x in logits]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    reached = [sum(p[i] for i in order[:n]) for n in range(len(p) + 1)]
    assume(top_p == 1 or all(abs(r - top_p) > EDGE for r in reached))
    assume(top_p == 1 or len(set(logits)) == len(logits))  # which of two equal tokens is in the nucleus is open
    nucleus = {i for n, i in enumerate(order) if reached[n] < top_p and p[i] > 0}
    tensor = torch.tensor([[-math.inf if x == -100 else x for x in logits]])
    nucleus_size, draw = (torch.tensor([[x]], dtype=torch.float64) for x in (top_p, noise))
    (token,), (logprob,) = sample(tensor, torch.tensor([[temperature]]), nucleus_size, draw)
    token, kept = int(token), sum(p[i] for i in nucleus)
    below = sum(p[i] for i in sorted(nucleus) if i < token) / kept
    assert token in nucleus and below - EDGE <= noise <= below + p[token] / kept + EDGE
    assert float(logprob) == pytest.approx(math.log(p[token] / kept), abs=1e-5)  # float32, numbers up to 40


# ---------------------------------------------------------------- what is refused, and how


def image(url):
    return dict(messages=message({"type": "image_url", "image_url": {"url": url}}))


COLOUR = {"type": "object", "properties": {"colour": {"type": "string"}, "times": {"type": "integer"}}}
LOOK = {"type": "function", "function": {"name": "look", "description": "Look for a colour.", "parameters": COLOUR}}
# a PNG of a few bytes whose header promises four thousand million pixels
BOMB = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA//8AAP//CAIAAAA5Z04HAAAAAElEQVQ1rwYeAAAAAElFTkSuQmCC"
REFUSED = {  # the request; the parameter that is blamed; what the message says
    "an unknown model": (dict(model="gpt"), "model", "`gpt` does not exist"),
    "an image that cannot be read": (image("data:image/png;base64,AAAA"), "messages", "cannot be read as an image"),
    "an image of absurd size": (image(BOMB), "messages", "cannot be read as an image .*exceeds limit"),
    "an image in a file": (image("file:///etc/passwd"), "messages", "allowed_local_media_path=None"),
    "too many images": (dict(messages=message(*map(picture, range(3)))), "image", "At most 2 image.* got 3"),
    "audio": (dict(messages=message({"type": "input_audio", "input_audio": {}})), "messages", "input_audio"),
    "no messages": (dict(messages=[]), "messages", "at least one"),
    "too long a prompt": (dict(messages=message("red " * 99)), "input_tokens", "maximum context length is 64"),
    "too long a prompt, no limit": (
        dict(messages=message("red " * 99), max_completion_tokens=None), "input_tokens", "context length",
    ),
    "too long a completion": (dict(max_completion_tokens=63), "input_tokens", "requested 63 output tokens"),
    "no room for a token": (dict(max_completion_tokens=0), "max_completion_tokens", "at least 1, got 0"),
    "top_k": (dict(extra_body={"top_k": 5}), "top_k", "top_k=5 is not supported"),
    "a penalty": (dict(presence_penalty=0.5), "presence_penalty", "not supported"),
    "several choices": (dict(n=2), "n", "not supported"),
    "a bias on no token": (dict(logit_bias={"99999": 1}), "logit_bias", "out-of-vocab.*Vocabulary size"),
    "a bias that is no number": (dict(logit_bias={"3": "much"}), "logit_bias", "numbers"),
    "a bias that is no map": (dict(logit_bias=[3]), "logit_bias", "map token ids"),
    "a negative temperature": (dict(temperature=-0.1), "temperature", "-0.1"),
    "a temperature in words": (dict(temperature="warm"), "temperature", "warm"),
    "top_p 0": (dict(top_p=0), "top_p", r"\(0, 1\]"),
    "a seed in words": (dict(seed="x"), "seed", "x"),
    "tools that the chat template does not show": (dict(tools=[LOOK]), "tools", "chat template does not show them"),
    "tools that are no list": (dict(tools="look"), "tools", "list of functions.*got 'look'"),
    "a call that is forced": (dict(tools=[LOOK], tool_choice="required"), "tool_choice", "'none'.*vllm_server_host"),
    "one tool only": (dict(tools=[LOOK], tool_choice={"type": "function"}), "tool_choice", "'auto' or 'none'"),
    "one call at a time": (dict(tools=[LOOK], parallel_tool_calls=False), "parallel_tool_calls", "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_with_the_status_and_error_body_of_vllm(case, tiny):
    request, param, text = REFUSED[case]
    server = LocalServer(*tiny, max_model_len=64, max_images=2)
    good = {"messages": message("red"), "max_completion_tokens": 3}
    with pytest.raises(openai.APIStatusError, match=text) as refused:
        ask(server, {**good, **request})
    error = refused.value.response.json()["error"]
    code, kind = (404, "NotFoundError") if param == "model" else (400, "BadRequestError")
    assert error == {"message": error["message"], "type": kind, "param": param, "code": code}
    assert refused.value.status_code == code
    assert ask(server, good)  # and the server lives on


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [*(("chat/completions", body, 400) for body in (b"red {", b"[1]", b"\xff")), ("embeddings", b"{}", 404)],
)
def test_a_body_that_is_no_json_object_and_an_unknown_route_are_refused_too(path, body, status):
    async def post():
        server = LocalServer(*make_tiny("qwen"))
        async with httpx.AsyncClient(transport=server, base_url="http://in-process/v1") as client:
            return await client.post(path, content=body)

    response = asyncio.run(post())
    assert response.status_code == status and response.json()["error"]["code"] == status


def test_a_body_that_is_too_large_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(local_server, "MAX_BODY", 5000)
    with pytest.raises(openai.APIStatusError, match="bytes: at most 5000") as refused:
        ask(LocalServer(*tiny), dict(messages=message("red " * 2000)))
    assert refused.value.status_code == 413


def test_nothing_is_kept_of_prompts_that_are_answered_or_refused(tiny):
    server = LocalServer(*tiny, max_model_len=64)
    ask(server, dict(messages=PROMPTS[3], max_completion_tokens=2))
    for count in range(100, 103):
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            ask(server, dict(messages=message("red " * count)))
        assert len(server.encoded) <= 1  # of those before, none
    server.sync(server.model)
    assert not server.times_asked and not server.pending


@pytest.mark.parametrize("cancelled", [0, 1, 2])
def test_a_request_that_is_called_off_takes_no_other_with_it(cancelled):
    """An environment's time limit cancels requests in flight. The one that is cancelled may be the one that the others
    wait for."""

    async def run():
        server = LocalServer(*make_tiny("qwen"))
        request = dict(model="policy", messages=PROMPTS[0], max_completion_tokens=2)
        create = lambda: server.client.chat.completions.create(**request)
        tasks = [asyncio.create_task(create()) for _ in range(3)]
        while len(server.pending) < 3:
            await asyncio.sleep(0)
        tasks[cancelled].cancel()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=60)
        return answers, await asyncio.wait_for(create(), timeout=60)

    answers, later = asyncio.run(run())
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [i == cancelled for i in range(3)]
    assert all(answer.choices for i, answer in enumerate(answers) if i != cancelled) and later.choices


# ---------------------------------------------------------------- asked directly, as in training


def answers_of(client, requests):
    """What the client says to these requests, all in flight together, as plain data without the time."""

    async def one(messages=PROMPTS[3], model="policy", tools=None, extra_body=None, **settings):
        extra = {"return_token_ids": True, **(extra_body or {})}
        settings = dict(max_completion_tokens=3, logprobs=True) | settings | {"extra_body": extra}
        try:
            answer = await client.get_native_response(messages, model, settings, tools)
        except Exception as error:
            cause = error.__cause__ if isinstance(error, vf.OverlongPromptError) else error
            said = str(cause), cause.status_code, cause.code, cause.param, cause.body, cause.response.json()
            return type(error), type(cause), said
        parsed = await client.from_native_response(answer)
        return type(answer), *(said.model_dump() | {"created": 0} for said in (answer, parsed))

    async def run():
        await client.client.models.list()  # its very first request looks in a thread for what platform it runs on
        return await asyncio.wait_for(asyncio.gather(*(one(**request) for request in requests)), timeout=120)

    return asyncio.run(run())


def both_ways(model, adapter, batches, **options):
    """What a server says to these batches of requests that is asked directly; the same through the OpenAI client."""
    servers = [LocalServer(model, adapter, **options) for _ in range(2)]
    clients = LocalClient(servers[0]), ChatClient(servers[1].client)
    return [[answers_of(client, batch) for batch in batches] for client in clients]


ASKED = [
    *(dict(messages=prompt) for prompt in PROMPTS * 3),  # groups
    dict(messages=PROMPTS[0], seed=5, max_tokens=8),
    dict(messages=PROMPTS[1], temperature=0.0, top_p=1.0, n=1, stop=None),
    dict(messages=PROMPTS[1], temperature=0.7, top_p=0.9, logit_bias={"9": -100, "10": 2.5}),
    dict(messages=PROMPTS[2], max_tokens=None, max_completion_tokens=4, presence_penalty=0, reasoning_effort=None),
    dict(messages=PROMPTS[3], extra_body={"top_k": -1, "min_p": 0.0, "max_tokens": 2, "return_token_ids": True}),
    dict(messages=message("red"), logit_bias={"no number": 1}),
    dict(messages=[{"role": "tool", "content": 5}]),
    dict(reasoning_effort="high"),
    dict(temperature=None, seed=2**63),
    *(request for request, *_ in REFUSED.values()),
]


def test_a_server_that_is_asked_directly_says_what_the_openai_client_would(tiny):
    """Ids, logprobs, message, reason, usage and tokens; of an error its type, its words and all that a client sees."""
    direct, through_http = both_ways(*tiny, [ASKED, ASKED], max_model_len=64, max_images=2, seed=3)
    assert direct == through_http
    kinds = Counter(kind.__name__ for kind, *_ in direct[0])
    assert kinds["ChatCompletion"] == 17 and kinds["OverlongPromptError"] == 3 and kinds["NotFoundError"] == 1
    assert kinds["BadRequestError"] == len(ASKED) - 21


@given(st.lists(st.lists(st.sampled_from(ASKED), min_size=1, max_size=9), min_size=1, max_size=2))
@hypothesis.settings(max_examples=20)
def test_whatever_is_asked_together_both_surfaces_say_the_same(tiny, batches):
    direct, through_http = both_ways(*tiny, batches, max_model_len=64, max_images=2)
    assert direct == through_http


def test_with_tools_it_says_what_the_openai_client_would_too():
    """A policy that calls now and then, asked where it may and where it must not."""
    requests = [dict(messages=message(picture(i % 2), "red"), tools=[LOOK]) for i in range(8)]
    requests += [dict(tools=[LOOK], tool_choice="none"), dict(messages=message("red"))]
    said = '<tool_call>\n{"name": "look", "arguments": {"colour": "red"}}\n</tool_call>'
    direct, through_http = both_ways(*make_tool_user(said), [requests])
    assert direct == through_http
    assert {answer["choices"][0]["finish_reason"] for _, answer, _ in direct[0]} >= {"tool_calls", "stop"}


def test_settings_that_json_cannot_hold_fail_alike(tiny):
    for value, kind in ((float("nan"), ValueError), ({1}, TypeError)):
        for client in (LocalClient(LocalServer(*tiny)), ChatClient(LocalServer(*tiny).client)):
            with pytest.raises(kind):
                asyncio.run(client.get_native_response(PROMPTS[3], "policy", {"temperature": value}))


def test_an_error_of_the_servers_own_is_one_on_both_surfaces(tiny, monkeypatch):
    monkeypatch.setattr(LocalServer, "prepare", lambda *_: {}["its own"])
    (direct,), (through_http,) = both_ways(*tiny, [[{}]])
    assert direct == through_http and direct[0][0] is openai.InternalServerError and "KeyError" in str(direct)


def test_rollouts_in_this_process_encode_each_prompt_once_and_use_no_http(monkeypatch):
    """Two thirds of the demonstration's step went into the OpenAI client, httpx and the JSON of one's own process, and
    each of a group's requests read its picture's base64 twice more for a key."""
    trainer = make_trainer("qwen", env=dict(num_train_examples=8), rollouts_per_step=32, rollouts_per_example=4)
    server, adapter, pictures, counted = trainer.server, trainer.adapter, [], Counter()
    monkeypatch.setattr(LocalServer, "handle_async_request", None)

    def count(owner, name):
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args: (counted.update([name]), inner(*args))[1])

    count(adapter, "_encode"), count(server, "encode_anew"), count(server, "prepare")
    prepare = server.prepare
    server.prepare = lambda asked: (pictures.extend(image_urls(asked.messages)), prepare(asked))[1]
    for epoch in (1, 2):
        trainer.adapter.build_batch(trainer.rollouts.collect())
        assert counted == Counter(prepare=32 * epoch, encode_anew=8 * epoch, _encode=8)
        assert len({id(url) for url in pictures[-32:]}) == 8 == len(set(pictures))  # not copied: its hash is kept
        assert not server.encoded
        server.sync(trainer.model)


def test_messages_that_are_changed_after_they_were_asked_are_another_prompt(lively):
    server, messages = LocalServer(*lively), message(picture(0), "red")

    async def run():
        asked = dict(model="policy", messages=messages, max_completion_tokens=1)
        first = asyncio.create_task(server.answer(asked))
        await asyncio.sleep(0)
        assert server.pending
        messages[0]["content"][1]["text"] = "star red"
        return [answer.prompt_token_ids for answer in await asyncio.gather(first, server.answer(asked))]

    first, second = asyncio.run(run())
    assert first == server.adapter.encode_prompt(message(picture(0), "red")).ids
    assert second == server.adapter.encode_prompt(messages).ids != first


JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, 1, 0.0, 1.0, -0.0, "", "1", "None", "red"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)


@given(JSON, JSON)
@example([], {})
@example([True], [1])
@example([1], [1.0])
@example([["a", 1]], {"a": 1})
@example("1", 1)
def test_the_keys_of_two_messages_are_equal_only_where_their_json_is(one, other):
    assert (frozen(one) == frozen(other)) == (json.dumps(one) == json.dumps(other))
    assert hash(frozen(one)) == hash(frozen(json.loads(json.dumps(one))))


# ---------------------------------------------------------------- many requests at once


def prepared(server, **request):
    """A request as the server holds it until it is generated."""
    return server.prepare(ChatCompletionRequest.parse(json.dumps(dict(model="policy", **request)).encode()))


def assert_same(answers, others):
    """The same ids; logprobs but for float32 sums of other shapes, in another order."""
    assert list(map(ids_of, answers)) == list(map(ids_of, others))
    for answer, other in zip(answers, others):
        assert logprobs_of(answer) == pytest.approx(logprobs_of(other), abs=1e-5)


def note_forwards(model, seen):
    """A hook that notes the shape of the ids of each forward of the model in `seen`."""
    noted = lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape))
    return model.register_forward_pre_hook(noted, with_kwargs=True)


def numbered(i, length):
    """A prompt of so many words, another one for each number below 5 ** length."""
    return message(" ".join("red green blue star square".split()[i // 5**k % 5] for k in range(length)))


IN_CHILD = """
import json, resource
from pathlib import Path
from benchmark import peak_rss
from test_local_server import *
"""


def in_child(runs, code):
    """What this code prints, as JSON, in a process of its own."""
    return json.loads(runs.printed(IN_CHILD + code))


def test_one_long_prompt_among_511_short_ones_takes_no_memory_of_theirs(runs):
    """All 512 were padded to its 900 tokens: 3,126 MB more than the short ones alone."""
    alone, together, answered = in_child(
        runs,
        """
server = LocalServer(*make_tiny("qwen"))
short = [dict(messages=numbered(i, 4), max_completion_tokens=3) for i in range(511)]
ask(server, *short)
alone = peak_rss()
answers = ask(server, *short[:300], dict(messages=message("red " * 890), max_completion_tokens=3), *short[300:])
print(json.dumps([alone, peak_rss(), [len(answer.prompt_token_ids) for answer in answers]]))
""",
    )
    assert len(answered) == 512 and answered.count(answered[0]) == 511 and answered[300] == answered[0] + 886
    assert together - alone < 100  # MB


@pytest.mark.parametrize("budget", [64, 200, 400])
def test_batches_stay_within_their_budget_and_answer_as_requests_alone(budget, lively, monkeypatch):
    """Short texts beside prompts with pictures, short completions beside long ones."""
    model, adapter = lively
    prompts = [message("star " * (1 + 7 * i % 11)) if i % 2 else PROMPTS[i // 2 % 4] for i in range(22)]
    requests = [dict(messages=m, max_completion_tokens=2 + 5 * i % 10, seed=i) for i, m in enumerate(prompts)]
    server, batches, seen, generate = LocalServer(model, adapter), [], [], local_server.generate
    server.cache_is_exact = True
    monkeypatch.setattr(local_server, "BATCH_TOKENS", budget)
    monkeypatch.setattr(local_server, "generate", lambda *args: batches.append(args[2]) or generate(*args))
    hook = note_forwards(model, seen)
    answers = ask(server, *requests)
    hook.remove()
    sizes = [[(len(c.prompt.ids), c.max_tokens) for c in batch] for batch in batches]
    padded = lambda batch: len(batch) * sum(map(max, zip(*batch)))
    assert len(batches) > 1 and sum(map(len, batches)) == 22
    assert all(len(batch) == 1 or padded(batch) <= budget for batch in sizes)
    for batch, (first, *_) in zip(sizes, sizes[1:]):  # no batch but for want of room
        assert padded([*batch, first]) > budget
    lengths = [length for batch in sizes for length, _ in batch]
    assert lengths == sorted(lengths)  # what is padded together is of like length
    assert [columns for _, columns in seen if columns > 1] == [max(length for length, _ in batch) for batch in sizes]
    assert_same(answers, [ask(LocalServer(model, adapter), request)[0] for request in requests])


@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_a_step_of_the_demonstration_is_one_batch(family):
    trainer = make_trainer(family, {}, **DEMO)
    seen = []
    hook = note_forwards(trainer.model, seen)
    trainer.rollouts.collect()
    hook.remove()
    prompt, *decoded = seen[-DEMO["max_tokens"] :]  # before them the cache is tried
    assert prompt[0] == 32 and decoded == [(128, 1)] * (DEMO["max_tokens"] - 1)
    assert 128 * (prompt[1] + DEMO["max_tokens"]) < BATCH_TOKENS / 10


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 5])
def test_sampling_a_few_rows_at_a_time_changes_no_bit(rows, top_p, lively, monkeypatch):
    """Every request has a temperature, noise and a bias of its own, so that none may go to a neighbour."""
    model, adapter = lively
    own = [dict(temperature=0.5 + i % 7 / 4, seed=i, logit_bias={str(20 + i % 3): 5.0}) for i in range(12)]
    usual = dict(max_completion_tokens=6, top_p=top_p)
    requests = [dict(messages=PROMPTS[i % 4], **usual, **settings) for i, settings in enumerate(own)]
    whole = ask(LocalServer(model, adapter), *requests)
    sizes, sample = [], local_server.sample
    noted = lambda logits, *rest: sizes.append(len(logits)) or sample(logits, *rest)
    monkeypatch.setattr(local_server, "sample", noted)
    vocabulary = len(model.get_output_embeddings().weight)
    monkeypatch.setattr(local_server, "SAMPLED_LOGITS", rows * vocabulary + vocabulary // 2)
    parts = ask(LocalServer(model, adapter), *requests)
    assert set(sizes) == {rows, 12 % rows or rows}
    assert list(map(ids_of, parts)) == list(map(ids_of, whole))
    assert list(map(logprobs_of, parts)) == list(map(logprobs_of, whole))


def test_a_large_vocabulary_takes_the_memory_of_its_logits_and_little_more(runs):
    """Of the 256 rows' logits (149 MB) a decoding step made copies in float64, 8.1 times as much in all."""
    taken = in_child(
        runs,
        """
model, adapter = make_tiny("qwen")
model.resize_token_embeddings(152_064, mean_resizing=False)
server = LocalServer(model, adapter)
completions = [prepared(server, messages=PROMPTS[3], max_tokens=2) for _ in range(256)]
generate(model, adapter, completions[:1], server.stop_ids)
before = peak_rss()
generate(model, adapter, completions, server.stop_ids)
print(peak_rss() - before)
""",
    )
    # the last step's logits and the new ones exist at once, 2.1 times as much with what a few rows take
    assert taken < 3 * 256 * 152_064 * 4 / 2**20


def test_a_bias_of_271_entries_in_each_of_128_requests_takes_no_more_operations_than_one():
    """It was written entry by entry: 34,688 operations before the first token."""

    class Counted(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    model, adapter = make_tiny("qwen")
    model.resize_token_embeddings(400, mean_resizing=False)
    server = LocalServer(model, adapter)

    def operations(entries):
        bias = {str(token): -100 for token in range(100, 100 + entries)}
        completions = [prepared(server, messages=PROMPTS[3], max_tokens=2, logit_bias=bias) for _ in range(128)]
        with Counted() as counted:
            generate(model, adapter, completions, {-1})
        assert not {token for completion in completions for token in completion.ids} & set(map(int, bias))
        return counted.operations

    assert operations(271) < operations(1) + 128  # not one a request


def test_one_prompt_that_the_model_cannot_run_fails_alone():
    """A tokenizer with a token that the model has no row for: all six requests of the batch were lost."""
    model, adapter = make_tiny("qwen")
    adapter.tokenizer.add_tokens(["turquoise"])
    prompts = [PROMPTS[i % 4] if i != 3 else message("turquoise" + " red" * 30) for i in range(6)]
    requests = [dict(messages=m, max_completion_tokens=4, seed=i) for i, m in enumerate(prompts)]
    server = LocalServer(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the cache does not go on: it was tried on this prompt, the longest
        answers = ask(server, *requests, errors=True)
        failed, _ = answers.pop(3), requests.pop(3)
        assert_same(answers, [ask(server, request)[0] for request in requests])
    assert server.cache_is_exact
    said = {"message": "IndexError: index out of range in self", "type": "InternalServerError", "code": 500}
    assert failed.status_code == 500 and failed.response.json()["error"] == {**said, "param": None}


def test_an_error_outside_of_generation_leaves_no_request_waiting(monkeypatch):
    """The warning about a cache that does not go on, in a program that takes warnings for errors."""
    server = LocalServer(*make_tiny("qwen"))
    monkeypatch.setattr(local_server, "prefill", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = ask(server, *[dict(messages=PROMPTS[3], max_completion_tokens=2)] * 3, errors=True)
    assert [answer.status_code for answer in answers] == [500] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the address space cannot be capped")
def test_where_memory_ends_the_requests_run_in_halves_and_that_is_said_once(runs):
    """128 requests whose logits take 74 MB a step, with 120 MB left: two steps' are too many, of a half they fit."""
    said, batches, failed = in_child(
        runs,
        """
model, adapter = make_tiny("qwen")
model.resize_token_embeddings(152_064, mean_resizing=False)
server = LocalServer(model, adapter)
requests = [dict(messages=PROMPTS[3], max_completion_tokens=2, seed=i) for i in range(128)]
free, batches = ask(server, *requests), []
local_server.generate = lambda *args: batches.append(len(args[2])) or generate(*args)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 120 * 2**20, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rounds = [ask(server, *requests, errors=True) for _ in range(2)]
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
failed = [str(answer) for answers in rounds for answer in answers if isinstance(answer, Exception)]
if not failed:
    [assert_same(answers, free) for answers in rounds]
print(json.dumps([[str(warning.message) for warning in caught], batches, failed[:3]]))
""",
    )
    assert failed == [] and batches == [128, 64, 64] * 2
    assert said == ["memory ended: 128 completions run in halves (fewer at once: max_concurrent)"]


@pytest.mark.parametrize("broken", ["all weights", "a word"])
def test_where_logits_are_nan_the_error_says_so_and_only_there(broken):
    """The last id was drawn, and its logprob was an error of JSON: "Out of range float values"."""
    model, adapter = make_tiny("qwen")
    word = model.get_input_embeddings().weight[adapter.tokenizer.convert_tokens_to_ids("what")]
    with torch.no_grad():
        for weights in model.parameters() if broken == "all weights" else [word]:
            weights.fill_(math.nan)
    requests = [dict(messages=m, max_completion_tokens=4, temperature=t) for m in PROMPTS for t in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is no fault of the cache
        answers = ask(LocalServer(model, adapter), *requests, errors=True)
    failed = [isinstance(answer, openai.InternalServerError) for answer in answers]
    assert failed == [broken == "all weights" or messages is PROMPTS[1] for messages in PROMPTS for _ in (0, 1)]
    said = {answer.response.json()["error"]["message"] for answer, lost in zip(answers, failed) if lost}
    assert said == {local_server.NOT_FINITE} and re.search("logits are NaN.*grad_norm", *said)


@pytest.mark.parametrize("family", DEMONSTRATIONS)
def test_an_output_head_larger_than_the_tokenizer_drops_nothing_and_stays_on_policy(family):
    """As every published Qwen-VL has it: 30 of 32 rollouts were lost, with an AttributeError."""
    model, processor = tiny_vlm.make_tiny(family)
    model.resize_token_embeddings(96, mean_resizing=False)
    favour(model, 90, by=9.0)  # an id without a token, which would be sampled almost always
    adapter = ProcessorAdapter(processor, model.config)
    assert set(range(len(processor.tokenizer), 96)) < set(adapter.placeholder_ids)
    assert not set(adapter.tokenizer.convert_tokens_to_ids(["red", "star"])) & set(adapter.placeholder_ids)
    trainer = make_trainer(tiny=(model, adapter), env={}, rollouts_per_step=32, rollouts_per_example=4, max_tokens=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be trained on")
        metrics = trainer.step()
    assert metrics["rollouts_dropped"] == 0
    assert 1 - 1e-4 <= metrics["ratio_min"] <= metrics["ratio_max"] <= 1 + 1e-4  # float32 sums in another order


def test_an_id_without_a_token_that_is_sampled_all_the_same_is_an_empty_text():
    model, adapter = make_tiny("qwen")
    model.resize_token_embeddings(96, mean_resizing=False)
    request = dict(messages=PROMPTS[0], max_completion_tokens=2, logit_bias={"90": 100})
    (answer,) = ask(LocalServer(model, adapter), request)
    assert ids_of(answer) == [90, 90] and answer.choices[0].message.content == ""
    assert [token.token for token in answer.choices[0].logprobs.content] == ["", ""]


def test_a_second_stop_token_of_the_generation_config_ends_an_answer_too():
    """Qwen-VL has two."""
    model, adapter = make_tiny("qwen")
    model.generation_config.eos_token_id = [adapter.tokenizer.eos_token_id, 20]
    for stop in model.generation_config.eos_token_id:
        request = dict(messages=PROMPTS[0], max_completion_tokens=5, logit_bias={str(stop): 100})
        (answer,) = ask(LocalServer(model, adapter), request)
        assert ids_of(answer) == [stop] and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("bf16", [False, True])
def test_with_bf16_completions_are_sampled_under_bfloat16_autocast_and_else_in_float32(bf16, tiny):
    model, adapter = tiny
    server, seen = LocalServer.from_config(model, adapter, MultimodalRLConfig(bf16=bf16)), set()
    server.cache_is_exact = True  # it is tried in float32
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(lambda _, args, hidden: seen.add(hidden.dtype)) for layer in layers]
    ask(server, dict(messages=PROMPTS[0], max_completion_tokens=2))
    for hook in hooks:
        hook.remove()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


# ---------------------------------------------------------------- what is kept from one step to the next


def sampled(server, **settings):
    """The ids of an answer to each of the prompts."""
    return [ids_of(a) for a in ask(server, *(dict(messages=m, max_completion_tokens=12, **settings) for m in PROMPTS))]


def test_each_weight_update_brings_new_random_streams_and_a_run_that_goes_on_has_those_of_its_step(lively):
    server, goes_on = LocalServer(*lively), LocalServer(*lively)
    first = sampled(server)
    server.sync(server.model)
    second = sampled(server)
    assert all(one != other for one, other in zip(first, second))
    goes_on.updates = 1
    assert sampled(goes_on) == second and sampled(LocalServer(*lively)) == first


def test_after_a_step_nothing_is_left_of_what_was_asked():
    """The counts of how often a prompt was asked had one more entry for every new prompt, for ever."""
    trainer = make_trainer("qwen", {}, rollouts_per_step=8, rollouts_per_example=4, max_tokens=2)
    server, counts = trainer.server, []
    sync = server.sync
    server.sync = lambda model: counts.append(sorted(server.times_asked.values())) or sync(model)
    for _ in range(2):
        trainer.step()
        assert server.times_asked == {} and server.pending == []
    assert server.updates == 3 and counts == [[], [4, 4], [4, 4]]  # before the first rollouts, and after each step


def test_greedy_answers_and_those_with_a_seed_take_no_stream_from_others(lively):
    server = LocalServer(*lively)
    sampled(server, temperature=0)
    sampled(server, seed=3)
    assert server.times_asked == {}
    assert sampled(server) == sampled(LocalServer(*lively))


def test_a_seed_is_another_stream_for_another_prompt():
    server = LocalServer(*make_tiny("qwen"))
    noise = lambda messages, seed: tuple(prepared(server, messages=messages, max_tokens=5, seed=seed).noise.tolist())
    streams = [noise(messages, seed) for messages in PROMPTS for seed in (5, 6)]
    assert len(set(streams)) == 8 and noise(PROMPTS[0], 5) == streams[0]


def test_a_thousand_refused_prompts_leave_nothing_behind():
    server = LocalServer(*make_tiny("qwen"), max_model_len=8)
    answers = ask(server, *(dict(messages=numbered(i, 5)) for i in range(1000)), errors=True)
    assert all(isinstance(answer, openai.BadRequestError) for answer in answers)
    assert server.times_asked == {} and server.pending == []


@pytest.mark.parametrize(("size", "status"), [(MAX_BODY, 200), (MAX_BODY + 1, 413)])
def test_a_body_above_the_limit_is_refused_before_it_is_parsed(size, status, monkeypatch):
    """One of 64 MB of text took 4.7 GB and 23 s, in which nothing else ran."""
    body = json.dumps(dict(model="policy", messages=PROMPTS[3], max_tokens=1)).encode()
    parsed, parse = [], ChatCompletionRequest.parse
    monkeypatch.setattr(
        ChatCompletionRequest, "parse", lambda body, said: parsed.append(len(body)) or parse(body, said)
    )

    async def post():
        async with httpx.AsyncClient(transport=LocalServer(*make_tiny("qwen")), base_url="http://in-process") as client:
            return await client.post("/v1/chat/completions", content=body + b" " * (size - len(body)))

    response = asyncio.run(post())
    assert response.status_code == status and parsed == [size] * (status == 200)
    assert status == 200 or response.json()["error"]["message"] == f"a body of {size} bytes: at most {MAX_BODY}"


# ---------------------------------------------------------------- tools


def spelled(server, said, stop=True, **request):
    """The answer of a policy that said this text, token by token, to a prompt with a tool: (its ids, the choice)."""
    asked = dict(model="policy", messages=PROMPTS[0], tools=[LOOK], **request)
    completion = server.prepare(ChatCompletionRequest.parse(json.dumps(asked).encode()))
    tokenizer = server.adapter.tokenizer
    completion.ids = tokenizer(said, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * stop
    completion.logprobs = [0.0] * len(completion.ids)
    choice = server.reply(completion)["choices"][0]
    assert choice["token_ids"] == completion.ids
    return completion, choice


@pytest.fixture(scope="module")
def tool_server():
    return LocalServer(*make_tool_user())


CALL = '<tool_call>\n{"name": "look", "arguments": {"colour": "r\u00fcd", "deep": [1, {"a": null}]}}\n</tool_call>'


@pytest.mark.parametrize("content", ["", "Look now : "], ids=["alone", "beside a text"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_well_formed_call_is_answered_as_one_and_its_turn_goes_on_with_the_very_ids(calls, content, tool_server):
    said = "\n".join(([content.strip()] if content else []) + [CALL] * calls)
    completion, choice = spelled(tool_server, said)
    answer = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and answer["content"] == (content.strip() or None)
    expected = {"name": "look", "arguments": '{"colour": "r\u00fcd", "deep": [1, {"a": null}]}'}
    assert [call["function"] for call in answer["tool_calls"]] == [expected] * calls
    assert len({call["id"] for call in answer["tool_calls"]}) == calls
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "red"} for call in answer["tool_calls"]]
    adapter, so_far = tool_server.adapter, completion.prompt.ids + completion.ids
    assert adapter.encode_prompt([*PROMPTS[0], answer, *results], [LOOK]).ids[: len(so_far)] == so_far


MALFORMED = {
    "no JSON": "{look}",
    "JSON that ends early": '{"name": "look", "arguments": {',
    "no arguments": '{"name": "look"}',
    "no name": '{"arguments": {}}',
    "arguments that are no object": '{"name": "look", "arguments": "red"}',
    "a name that is no string": '{"name": 3, "arguments": {}}',
    "a list": "[1]",
    "no call at all": "",
    "half a surrogate pair": '{"name": "\\ud800", "arguments": {}}',
    "brackets without end": '{"name": "look", "arguments": {"colour": ' + "[" * 5000,
}


@pytest.mark.parametrize("inside", MALFORMED.values(), ids=MALFORMED)
def test_a_call_that_is_not_well_formed_is_a_text_like_any_other(inside, tool_server):
    said = f"red {CALL} <tool_call>{inside}</tool_call>"
    _, choice = spelled(tool_server, said, max_completion_tokens=9)
    assert choice["message"] == {"role": "assistant", "content": said} and choice["finish_reason"] == "stop"


def test_a_call_in_an_answer_that_was_cut_off_leaves_it_cut_off(tool_server):
    _, choice = spelled(tool_server, CALL + " red", stop=False)
    assert choice["message"]["tool_calls"] and choice["finish_reason"] == "length"


def test_with_tool_choice_none_the_tools_are_shown_and_calls_stay_text(tool_server):
    completion, choice = spelled(tool_server, CALL, tool_choice="none")
    assert choice["message"] == {"role": "assistant", "content": CALL} and choice["finish_reason"] == "stop"
    assert completion.prompt.ids == spelled(tool_server, CALL)[0].prompt.ids


def test_the_form_of_calls_is_the_familys_own():
    """Transformers knows it by the model's type. Qwen3.5 writes XML, where the tool's schema says what is a number."""
    parameters = "".join(f"<parameter={name}>\n7\n</parameter>\n" for name in ("colour", "times"))
    said = f"<tool_call>\n<function=look>\n{parameters}</function>\n</tool_call>"
    _, choice = spelled(LocalServer(*make_tool_user(family="qwen3_5")), said)
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "look", "arguments": '{"colour": "7", "times": 7}'}
    ]


def test_where_the_form_of_calls_is_not_known_the_error_says_what_to_do_and_a_response_template_is_a_way():
    model, adapter = make_tool_user(family="internvl")
    request = dict(messages=PROMPTS[3], tools=[LOOK], max_completion_tokens=2)
    with pytest.raises(
        openai.BadRequestError, match="response_template.*tool_choice='none'.*--tool-call-parser"
    ) as refused:
        ask(LocalServer(model, adapter), request)
    assert refused.value.response.json()["error"]["param"] == "tools"
    assert ask(LocalServer(model, adapter), {**request, "tool_choice": "none"})
    adapter.tokenizer.response_template = get_response_template(adapter.tokenizer, make_tool_user()[0])
    assert ask(LocalServer(model, adapter), request)


def test_the_same_messages_with_other_tools_are_another_prompt(tool_server):
    other = {"type": "function", "function": {**LOOK["function"], "name": "listen"}}
    requests = [dict(messages=PROMPTS[0], max_completion_tokens=2, tools=tools) for tools in ([LOOK], [other], [])]
    prompts = [answer.prompt_token_ids for answer in ask(tool_server, *requests)]
    texts = [tool_server.adapter.tokenizer.decode(ids) for ids in prompts]
    assert ['"look"' in t for t in texts] == [True, False, False] and ['"listen"' in t for t in texts] == [
        False,
        True,
        False,
    ]


def test_whatever_a_chat_template_raises_is_a_bad_request():
    model, adapter = make_tool_user()
    adapter.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(openai.BadRequestError, match="messages: TemplateError: roles must alternate"):
        ask(LocalServer(model, adapter), dict(messages=PROMPTS[0]))


# ---------------------------------------------------------------- and the rest


def test_the_models_route_names_the_policy(tiny):
    server = LocalServer(*tiny, model_name="mine", max_model_len=77)

    async def models():
        return [(model.id, model.max_model_len) async for model in server.client.models.list()]

    assert asyncio.run(models()) == [("mine", 77)]


def test_an_adapter_that_encodes_no_prompts_is_refused_with_a_way_out(tiny):
    with pytest.raises(TypeError, match="object has no encode_prompt.*ProcessorAdapter.*vllm_server_host"):
        LocalServer(tiny[0], object())


def test_the_chat_client_passes_empty_answers_and_drops_fields_that_are_none(lively):
    """A data set gives content parts of two types each other's fields, as None; a policy may stop at once."""
    model, adapter = lively
    client = ChatClient(LocalServer(model, adapter).client)
    shown = {"type": "image_url", "image_url": {**picture(0)["image_url"], "detail": None}, "text": None}
    parts = [shown, {"type": "text", "text": "red", "image_url": None}]
    stop = adapter.tokenizer.eos_token_id
    sampling = dict(max_tokens=3, logprobs=True, extra_body={"return_token_ids": True}, logit_bias={str(stop): 100})
    prompt = [vf.UserMessage(content=parts)]
    native, _ = asyncio.run(client.to_native_prompt(prompt))
    assert native[0]["content"] == message(picture(0), "red")[0]["content"]
    response = asyncio.run(client.get_response(prompt=prompt, model="policy", sampling_args=sampling))
    assert response.message.content == "" and response.message.tokens.completion_ids == [stop]
