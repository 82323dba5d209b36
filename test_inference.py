"""Tests of the server in this process, the client that talks to it, the shapes environment and the tiny checkpoints.

    pytest test_inference.py

The server is asked through the OpenAI client that training uses. What it answers is held against Transformers' own
`generate` and against the model's plain forward on the ids that came back.
"""

import asyncio
import math
import random
from collections import Counter

import httpx
import openai
import pytest
import torch
import verifiers as vf
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from adapters import ADAPTERS, load_image
from conftest import make_tiny
from inference import ChatClient, LocalServer, sample
from shapes_env import COLOURS, draw_shape, make_rubric, png_data_uri
from tiny_vlm import FAMILIES, make_tiny_vlm


def picture(seed):
    drawn = draw_shape(list(COLOURS)[seed % 4], "circle", 56, random.Random(seed))
    return {"type": "image_url", "image_url": {"url": png_data_uri(drawn)}}


def message(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}]


PROMPTS = [
    message(picture(0), "red"), message(picture(1), "what is the second colour ?"), message(picture(2), picture(3)), message("star ?"),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def lively(request):
    """(model, adapter) whose weights are twice as large as fresh ones: it has opinions, and greedy answers differ."""
    model, adapter = make_tiny(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model, adapter


def ask(server, *requests):
    """The answers to these requests, all in flight together; placeholders are biased away, as training does it."""
    usual = {"model": "policy", "extra_body": {"return_token_ids": True}, "logprobs": True}
    bias = {str(token): -100 for token in server.adapter.placeholder_ids}

    async def run():
        biases = [bias | given if isinstance(given := r.get("logit_bias", {}), dict) else given for r in requests]
        create = server.client.chat.completions.create
        return await asyncio.gather(*(create(**usual | r | {"logit_bias": b}) for r, b in zip(requests, biases)))

    return asyncio.run(run())


def ids_of(answer):
    return answer.choices[0].token_ids


def logprobs_of(answer):
    return [token.logprob for token in answer.choices[0].logprobs.content]


def plain_logits(model, adapter, messages, answer):
    """(C, V) float64: the logits that the answer's tokens were drawn from, by one forward without any cache, bias applied."""
    prompt = adapter.encode_prompt(messages)
    assert answer.prompt_token_ids == prompt.ids
    prompt.ids = prompt.ids + ids_of(answer)
    with torch.no_grad():
        logits = model(**adapter.prompt_inputs([prompt])).logits[0]
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
    [dict(), dict(temperature=0.5), dict(temperature=1.7), dict(temperature=0.7, logit_bias={"9": -100, "10": 2.5, "11": 30.0})],
    ids=str,
)
def test_logprobs_are_those_of_the_plain_forward_with_temperature_and_bias_applied(settings, lively):
    model, adapter = lively
    answers = ask(LocalServer(model, adapter), *(dict(messages=m, max_completion_tokens=6, **settings) for m in PROMPTS * 2))
    for messages, answer in zip(PROMPTS * 2, answers):
        logits = plain_logits(model, adapter, messages, answer)
        for token, value in settings.get("logit_bias", {}).items():
            logits[:, int(token)] += value
        expected = (logits / settings.get("temperature", 1.0)).log_softmax(-1)
        expected = expected[range(len(logits)), ids_of(answer)].tolist()
        assert logprobs_of(answer) == pytest.approx(expected, abs=1e-4)  # float32 sums in another order, logits around 5


def test_top_p_draws_from_the_nucleus_only_and_its_logprobs_are_those_of_the_nucleus(lively):
    model, adapter = lively
    answers = ask(LocalServer(model, adapter), *[dict(messages=PROMPTS[0], max_completion_tokens=5, top_p=0.6)] * 12)
    for answer in answers:
        for logits, token, logprob in zip(plain_logits(model, adapter, PROMPTS[0], answer), ids_of(answer), logprobs_of(answer)):
            probabilities = logits.softmax(-1)
            likelier = probabilities[probabilities > probabilities[token]].sum()
            ordered = probabilities.sort(descending=True).values
            nucleus = ordered[: int((ordered.cumsum(0) < 0.6).sum()) + 1].sum()
            assert likelier < 0.6 + 1e-4 and logprob == pytest.approx((probabilities[token] / nucleus).log().item(), abs=1e-4)


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
        features = sum(image.num_tokens for image in adapter.encode_prompt(messages).images)
        assert answer.prompt_token_ids.count(adapter.image_token_id) == features > 1  # one placeholder a feature, not an image
        prompt, completion = len(answer.prompt_token_ids), len(ids_of(answer))
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, completion, prompt + completion)


def test_tokens_come_as_often_as_they_are_probable(tiny):
    model, adapter = tiny
    answers = ask(LocalServer(model, adapter, seed=3), *[dict(messages=PROMPTS[0], max_completion_tokens=1)] * 700)
    counts = Counter(ids_of(answer)[0] for answer in answers)
    expected = 700 * plain_logits(model, adapter, PROMPTS[0], answers[0])[0].softmax(-1)
    likely = (expected >= 5).nonzero().flatten().tolist()  # where the statistic is close to chi-square
    statistic = sum((counts[token] - expected[token].item()) ** 2 / expected[token].item() for token in likely)
    # mean n, standard deviation sqrt(2 n); the draws are always the same, so 4 deviations leave no chance of a false alarm
    assert len(likely) > 20 and statistic < len(likely) + 4 * math.sqrt(2 * len(likely))


def test_each_distinct_prompt_runs_once_with_its_images_and_a_token_a_forward_follows(lively):
    model, adapter = lively
    seen = []
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    pixels = lambda _, args, kwargs: seen.append(len(kwargs.get("pixel_values", *args[:1])))
    tokens = lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape))
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in ((tower, pixels), (model, tokens))]
    ask(LocalServer(model, adapter), *[dict(messages=m, max_completion_tokens=4, logit_bias={"20": 100}) for m in PROMPTS] * 5)
    for hook in hooks:
        hook.remove()
    prompts = [adapter.encode_prompt(messages) for messages in PROMPTS]
    pixel_rows = sum(len(image.tensors["pixel_values"]) for prompt in prompts for image in prompt.images)
    assert seen == [(4, max(len(prompt.ids) for prompt in prompts)), pixel_rows, (20, 1), (20, 1), (20, 1)]


def test_an_answer_does_not_depend_on_what_else_is_asked(lively):
    together = ask(LocalServer(*lively), *(dict(messages=m, max_completion_tokens=n) for n, m in zip((8, 6, 9, 7), PROMPTS)))
    for answer, messages, n in zip(together, PROMPTS, (8, 6, 9, 7)):
        (alone,) = ask(LocalServer(*lively), dict(messages=messages, max_completion_tokens=n))
        assert ids_of(alone) == ids_of(answer)
        assert logprobs_of(alone) == pytest.approx(logprobs_of(answer), abs=1e-5)  # float32 sums of other shapes


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


# a PNG of a few bytes whose header promises four thousand million pixels
BOMB = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA//8AAP//CAIAAAA5Z04HAAAAAElEQVQ1rwYeAAAAAElFTkSuQmCC"
REFUSED = {  # the request; the parameter that is blamed; what the message says
    "an unknown model": (dict(model="gpt"), "model", "`gpt` does not exist"),
    "an image that cannot be read": (image("data:image/png;base64,AAAA"), "messages", "cannot be read as an image"),
    "an image of absurd size": (image(BOMB), "messages", "cannot be read as an image"),
    "an image in a file": (image("file:///etc/passwd"), "messages", "files and web addresses are not read"),
    "too many images": (dict(messages=message(*map(picture, range(3)))), "image", "At most 2 image.* got 3"),
    "audio": (dict(messages=message({"type": "input_audio", "input_audio": {}})), "messages", "input_audio"),
    "no messages": (dict(messages=[]), "messages", "at least one"),
    "too long a prompt": (dict(messages=message("red " * 99)), "input_tokens", "maximum context length is 64"),
    "too long a prompt, no limit": (dict(messages=message("red " * 99), max_completion_tokens=None), "input_tokens", "context length"),
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
    assert error == {"message": error["message"], "type": kind, "param": param, "code": code} and refused.value.status_code == code
    assert ask(server, good)  # and the server lives on


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [*(("chat/completions", body, 400) for body in (b"red {", b"[1]", b"\xff")), ("embeddings", b"{}", 404)],
)
def test_a_body_that_is_no_json_object_and_an_unknown_route_are_refused_too(path, body, status):
    async def post():
        async with httpx.AsyncClient(transport=LocalServer(*make_tiny("qwen")), base_url="http://in-process/v1") as client:
            return await client.post(path, content=body)

    response = asyncio.run(post())
    assert response.status_code == status and response.json()["error"]["code"] == status


@pytest.mark.parametrize("cancelled", [0, 1, 2])
def test_a_request_that_is_called_off_takes_no_other_with_it(cancelled):
    """An environment's time limit cancels requests in flight. The one that is cancelled may be the one that the others
    wait for."""

    async def run():
        server = LocalServer(*make_tiny("qwen"))
        create = lambda: server.client.chat.completions.create(model="policy", messages=PROMPTS[0], max_completion_tokens=2)
        tasks = [asyncio.create_task(create()) for _ in range(3)]
        while len(server.pending) < 3:
            await asyncio.sleep(0)
        tasks[cancelled].cancel()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=3)
        return answers, await asyncio.wait_for(create(), timeout=3)

    answers, later = asyncio.run(run())
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [i == cancelled for i in range(3)]
    assert all(answer.choices for i, answer in enumerate(answers) if i != cancelled) and later.choices


def test_the_models_route_names_the_policy(tiny):
    server = LocalServer(*tiny, model_name="mine", max_model_len=77)

    async def models():
        return [(model.id, model.max_model_len) async for model in server.client.models.list()]

    assert asyncio.run(models()) == [("mine", 77)]


def test_an_adapter_that_encodes_no_prompts_is_refused_with_a_way_out(tiny):
    with pytest.raises(TypeError, match="object has no encode_prompt.*ImageAdapter.*vllm_server_host"):
        LocalServer(tiny[0], object())


def test_the_chat_client_passes_empty_answers_and_drops_fields_that_are_none(lively):
    """A data set gives content parts of two types each other's fields, as None; a policy may stop at once."""
    model, adapter = lively
    client = ChatClient(LocalServer(model, adapter).client)
    parts = [{**picture(0), "text": None}, {"type": "text", "text": "red", "image_url": None}]
    stop = adapter.tokenizer.eos_token_id
    sampling = dict(max_tokens=3, logprobs=True, extra_body={"return_token_ids": True}, logit_bias={str(stop): 100})
    prompt = [vf.UserMessage(content=parts)]
    native, _ = asyncio.run(client.to_native_prompt(prompt))
    assert native[0]["content"] == message(picture(0), "red")[0]["content"]
    response = asyncio.run(client.get_response(prompt=prompt, model="policy", sampling_args=sampling))
    assert response.message.content == "" and response.message.tokens.completion_ids == [stop]


# ---------------------------------------------------------------- the environment


def shapes(**arguments):
    return vf.load_environment("shapes-env", **{"num_train_examples": 24, "num_eval_examples": 24, **arguments})


def urls(row):
    return [part["image_url"]["url"] for part in row["prompt"][0]["content"] if part["type"] == "image_url"]


def look(url):
    """(colour, shape) of a picture, by its pixels alone: the nearest colour, and how much of its bounding box is filled."""
    pixels = torch.tensor(list(load_image(url).get_flattened_data()), dtype=torch.float64).view(56, 56, 3)
    inside = pixels.max(-1).values > 100
    mean = pixels[inside].mean(0)
    colour = min(COLOURS, key=lambda name: (mean - torch.tensor(COLOURS[name])).norm())
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    filled = inside.sum() / (rows * columns)  # triangle 1/2, circle pi/4, square 1 (turned by 5 degrees: 0.85)
    return colour, "triangle" if filled < 0.65 else "circle" if filled < 0.82 else "square"


def test_the_answer_is_what_the_picture_shows():
    env = shapes()
    for row in [*env.get_dataset(), *env.get_eval_dataset()]:
        assert row["answer"] == " ".join(look(*urls(row)))


def test_two_pictures_are_both_needed_for_the_answer():
    rows = list(shapes(images_per_prompt=2).get_dataset())
    seen = [[look(url) for url in urls(row)] for row in rows]
    assert [row["answer"] for row in rows] == [f"{first[0]} {second[1]}" for first, second in seen]
    assert sum(row["answer"] in (" ".join(first), " ".join(second)) for row, (first, second) in zip(rows, seen)) < len(rows)


def test_no_picture_comes_twice_in_training_and_evaluation_of_any_seed():
    envs = [shapes(seed=seed) for seed in (0, 1, 2)]
    pictures = [urls(row)[0] for env in envs for split in (env.get_dataset(), env.get_eval_dataset()) for row in split]
    assert len(set(pictures)) == len(pictures) == 3 * 48
    assert [urls(row) for row in shapes(seed=1).get_dataset()] == [urls(row) for row in envs[1].get_dataset()]


def test_a_blind_environment_shows_one_grey_picture_and_is_the_same_else():
    seeing, blind = shapes(), shapes(blind=True)
    assert len({urls(row)[0] for row in [*blind.get_dataset(), *blind.get_eval_dataset()]}) == 1
    assert blind.get_dataset()["answer"] == seeing.get_dataset()["answer"] and len(set(blind.get_dataset()["answer"])) > 6


def next_question(env, row):
    """(URL of the picture, text) of what the environment asks after the first reply to this row."""
    (question,) = asyncio.run(env.env_response(row["prompt"], row))
    shown, asked = question["content"]
    return shown["image_url"]["url"], asked["text"]


@pytest.mark.parametrize(("seed", "images_per_prompt"), [(0, 1), (1, 1), (2, 2)])
def test_the_second_question_brings_another_picture_and_the_answers_second_line_is_what_it_shows(seed, images_per_prompt):
    arguments = dict(turns=2, seed=seed, images_per_prompt=images_per_prompt, num_train_examples=12, num_eval_examples=12)
    env, again = shapes(**arguments), shapes(**arguments)
    rows = [*env.get_dataset(), *env.get_eval_dataset()]
    pictures = []
    for row in rows:
        first, (url, asked) = [look(shown) for shown in urls(row)], next_question(env, row)
        assert row["answer"].splitlines() == [f"{first[0][0]} {first[-1][1]}", " ".join(look(url))] and asked.endswith("see now ?")
        pictures += [*urls(row), url]
    assert len(set(pictures)) == len(pictures) == 24 * (images_per_prompt + 1)
    lines = [row["answer"].splitlines() for row in rows]
    assert sum(first == second for first, second in lines) < 8  # 2 by chance: the first answer says nothing of the second
    assert [*again.get_dataset(), *again.get_eval_dataset()] == rows


@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_the_first_turn_is_the_same_whether_another_follows_or_not(images_per_prompt):
    """Else a run of one turn and one of two could not be compared. A row of one turn has no column that it does not need."""
    one, two = (shapes(turns=turns, images_per_prompt=images_per_prompt).get_dataset() for turns in (1, 2))
    assert two["prompt"] == one["prompt"] and [answer.splitlines()[0] for answer in two["answer"]] == one["answer"][:]
    assert set(one.column_names) == {"prompt", "answer", "example_id"}


def test_a_blind_environment_of_two_turns_shows_the_same_grey_in_both():
    seeing, blind = shapes(turns=2), shapes(turns=2, blind=True)
    shown = {url for row in blind.get_dataset() for url in (*urls(row), next_question(blind, row)[0])}
    assert shown == set(urls(shapes(blind=True).get_dataset()[0]))
    assert blind.get_dataset()["answer"] == seeing.get_dataset()["answer"]


@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_the_tiny_checkpoints_know_every_word_of_both_questions(tiny, images_per_prompt):
    """An unknown word comes back as `<unk>`, and what a policy cannot read it cannot be asked."""
    env = shapes(turns=2, images_per_prompt=images_per_prompt)
    row, (_, adapter) = env.get_dataset()[0], tiny
    url, asked = next_question(env, row)
    words = [{"role": "assistant", "content": row["answer"]}, *message({"type": "image_url", "image_url": {"url": url}}, asked)]
    parts = [{name: value for name, value in part.items() if value is not None} for part in row["prompt"][0]["content"]]
    prompt = adapter.encode_prompt([{"role": "user", "content": parts}, *words])
    assert adapter.tokenizer.unk_token_id not in prompt.ids and len(prompt.images) == images_per_prompt + 1


@pytest.mark.parametrize(
    ("content", "colour", "shape", "form", "exact"),
    [
        ("red circle", 1, 1, 1, 1), ("red square", 1, 0, 1, 0), ("blue circle", 0, 1, 1, 0), ("blue square", 0, 0, 1, 0),
        ("red", 1, 0, 1 / 3, 0), ("circle", 0, 0, 0, 0), ("circle red", 0, 0, 1 / 3, 0), ("red circle red", 1, 1, 2 / 3, 0),
        ("a red circle", 0, 0, 0, 0), ("  red \n circle ", 1, 1, 1, 1), ("", 0, 0, 0, 0), (None, 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_the_rubric_gives_partial_credit_for_colour_shape_and_form(content, colour, shape, form, exact):
    rubric, state = make_rubric(), {"prompt": message("?"), "answer": "red circle", "trajectory": []}
    state["completion"] = [{"role": "assistant", "content": content}]
    asyncio.run(rubric.score_group([state]))
    assert state["metrics"] == pytest.approx({"colour": colour, "shape": shape, "form": form, "exact": exact})
    *partial, whole = rubric.weights
    assert sum(partial) == pytest.approx(1) and min(partial) > 0 == whole
    assert state["reward"] == pytest.approx(sum(weight * value for weight, value in zip(partial, (colour, shape, form))))


@pytest.mark.parametrize(
    ("replies", "colour", "shape", "form", "exact"),
    [
        (["red circle", "blue square"], 1, 1, 1, 1), (["red circle", "blue circle"], 1, 1 / 2, 1, 1 / 2),
        (["red circle", "red circle"], 1 / 2, 1 / 2, 1, 1 / 2),  # the second picture not looked at
        (["blue square", "red circle"], 0, 0, 1, 0),  # each the answer to the other question
        (["red", "blue square"], 1, 1 / 2, 2 / 3, 1 / 2), (["red square", "blue circle"], 1, 0, 1, 0),
        (["red circle"], 1 / 2, 1 / 2, 1 / 2, 1 / 2), (["blue square"], 0, 0, 1 / 2, 0),  # no second reply
        (["red circle", ""], 1 / 2, 1 / 2, 1 / 2, 1 / 2), (["", "blue square"], 1 / 2, 1 / 2, 1 / 2, 1 / 2),
        ([None, "a"], 0, 0, 0, 0), (["red circle blue square", ""], 1 / 2, 1 / 2, 1 / 3, 0), ([], 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_the_rubric_of_two_turns_is_the_mean_of_both_and_a_missing_reply_earns_nothing(replies, colour, shape, form, exact):
    """What the user says in between, here the second answer itself, is nobody's reply."""
    rubric, state = make_rubric(), {"prompt": message("?"), "answer": "red circle\nblue square", "trajectory": []}
    said = [{"role": "assistant", "content": reply} for reply in replies]
    state["completion"] = said[:1] + message(picture(2), "blue square") + said[1:]
    asyncio.run(rubric.score_group([state]))
    assert state["metrics"] == pytest.approx({"colour": colour, "shape": shape, "form": form, "exact": exact})
    assert state["reward"] == pytest.approx(0.4 * colour + 0.4 * shape + 0.2 * form)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_examples", 0), ("num_eval_examples", -1), ("image_size", 7), ("image_size", 56.0), ("images_per_prompt", 3),
        ("turns", 0), ("turns", 3), ("turns", "2"),
    ],
)  # fmt: skip
def test_an_impossible_argument_of_the_environment_is_refused_by_name(name, value):
    with pytest.raises(Exception, match=f"{name}={value!r}: must be"):
        shapes(**{name: value})


# ---------------------------------------------------------------- the tiny checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_checkpoint_comes_back_from_its_folder_through_the_auto_classes(family, tmp_path):
    model, adapter = make_tiny(family, seed=4)
    model.save_pretrained(tmp_path)
    adapter.save_pretrained(tmp_path)
    loaded, tokenizer = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    again = ADAPTERS[family](tokenizer)  # image processor and config come from where the tokenizer came from
    assert type(loaded) is type(model) and type(AutoImageProcessor.from_pretrained(tmp_path)) is type(again.image_processor)
    inputs, reloaded = (a.prompt_inputs([a.encode_prompt(messages) for messages in PROMPTS[:3]]) for a in (adapter, again))
    torch.testing.assert_close(reloaded, inputs, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**reloaded).logits, model(**inputs).logits, rtol=0, atol=0)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id and again.placeholder_ids == adapter.placeholder_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_tiny_its_seed_fixes_it_and_nobody_elses_random_numbers_change(family):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, other = (make_tiny_vlm(family, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert 200_000 <= sum(p.numel() for p in one.parameters()) <= 400_000
    assert torch.equal(one.lm_head.weight, same.lm_head.weight) and not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.data_ptr() != one.get_input_embeddings().weight.data_ptr()
