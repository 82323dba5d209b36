"""Tests of the shapes that environments come in: verifiers' own classes, rolled out and trained on for one update.

    pytest test_environments.py

Everything is the real thing: `Rollouts`, the server in this process, a tiny Qwen3-VL with the published template for
tools. In every test each token that was sampled is trained on once, with the pictures that its prompt showed, and the
first update finds the server's logprobs. A policy that calls tools has the call as one token, and a head that likes it.
"""

import base64
import io
import json
import random
from statistics import fmean

import pytest
import torch
import verifiers as vf
from datasets import Dataset
from PIL import Image

import conftest
from conftest import make_tool_user, message, picture, processed
from media import image_urls, take_spans
from mm_grpo import row_advantages
from shapes_env import COLOURS, draw_shape

pytestmark = [
    pytest.mark.filterwarnings("error:.*mismatch_threshold"),
    pytest.mark.filterwarnings("error:.*cannot be trained on"),
]
ON_POLICY = 1e-4  # server and trainer add the same float32 numbers in another order; logprobs differ by about 1e-6

LOOK = '<tool_call>\n{"name": "look", "arguments": {"colour": "red"}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "look", "arguments": {"colour": }\n</tool_call>'


def text_reward(completion):
    """Some number that differs between completions."""
    return len(str(completion)) % 7


def rows(*prompts):
    """A data set of these prompts: lists of messages. Arrow wants contents that are all texts or all lists of parts."""
    return Dataset.from_list([{"prompt": prompt, "answer": ""} for prompt in prompts])


def text(content):
    return [{"type": "text", "text": content}]


def environment(*prompts, kind=vf.SingleTurnEnv, reward=text_reward, **more):
    return kind(dataset=rows(*prompts), rubric=vf.Rubric(funcs=[reward]), **more)


def make_trainer(env, policy, **settings):
    small = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=4, learning_rate=1e-3)
    return conftest.make_trainer(tiny=policy, env=env, **{**small, **settings})


def train(env, policy=None, **settings):
    """One step: (trainer, outputs, batch, metrics of its one update), held against what was sampled and shown."""
    trainer = make_trainer(env, policy or make_tool_user(), **settings)
    outputs = trainer.rollouts.collect()
    assert [rollout["error"] for rollout in outputs["outputs"]] == [None] * trainer.config.rollouts_per_step
    batch = trainer.adapter.build_batch(outputs)
    for i, rollout in enumerate(outputs["outputs"]):
        turns = iter(rollout["trajectory"])
        for row in (batch.rollout_ids == i).nonzero().flatten().tolist():
            trained, sampled = batch.input_ids[row][batch.loss_mask[row] == 1].tolist(), []
            while len(sampled) < len(trained):
                turn = next(turns)
                sampled += turn["tokens"]["completion_ids"]
            assert trained == sampled
            shown = expected_pixels(trainer.adapter, image_urls(turn["prompt"]))  # a row's last prompt shows them all
            torch.testing.assert_close(pixels(batch, row), shown, rtol=0, atol=0)
        assert not list(turns)
    metrics = trainer.update(batch)
    assert 1 - ON_POLICY < metrics["ratio_min"] <= metrics["ratio_max"] < 1 + ON_POLICY
    assert 0 < metrics["grad_norm"] < float("inf")
    return trainer, outputs["outputs"], batch, metrics


def pixels(batch, row):
    """The row's pictures as the model gets them; empty without any."""
    if batch.pixel_values is None:
        return torch.zeros(0)
    taken = take_spans(batch.pixel_values, [batch.media_spans["pixel_values"][row].tolist()])
    return taken if len(taken) else torch.zeros(0)


def expected_pixels(adapter, urls):
    """What the image processor makes of the pictures in these URIs, as Pillow alone reads them."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return processed(adapter, pictures)["pixel_values"] if urls else torch.zeros(0)


def prompt_text(trainer, rollout, turn=0):
    return trainer.tokenizer.decode(rollout["trajectory"][turn]["tokens"]["prompt_ids"])


# ---------------------------------------------------------------- one turn


def test_system_content_may_be_a_list_of_parts():
    system = {"role": "system", "content": [{"type": "text", "text": "Name the "}, {"type": "text", "text": "colour"}]}
    trainer, rollouts, _, _ = train(environment([system, *message(picture(), "?")]))
    for rollout in rollouts:
        assert prompt_text(trainer, rollout).startswith(
            "<|im_start|>system\nName the colour<|im_end|>\n<|im_start|>user"
        )


def jpeg(seed, **more):
    drawn = draw_shape(list(COLOURS)[seed], "circle", 56, random.Random(seed))
    buffer = io.BytesIO()
    drawn.save(buffer, format="JPEG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), **more},
    }


def test_jpeg_pictures_reach_the_model_as_they_were_sent():
    _, _, batch, _ = train(environment(message(jpeg(0), "red"), message(jpeg(1), "?")))
    assert not torch.equal(pixels(batch, 0), pixels(batch, 4))  # two prompts, two pictures


def test_the_detail_of_a_picture_changes_nothing():
    """OpenAI's hint of how closely to look; open models know none, and vLLM takes it without a word."""
    _, with_it, batch, _ = train(environment(message(jpeg(0, detail="low"), "red")))
    _, without, other, _ = train(environment(message(jpeg(0), "red")))
    assert "detail" in str(with_it[0]["trajectory"][0]["prompt"]) and "detail" not in str(without)
    torch.testing.assert_close(pixels(batch, 0), pixels(other, 0), rtol=0, atol=0)
    prompts = [rollouts[0]["trajectory"][0]["tokens"]["prompt_ids"] for rollouts in (with_it, without)]
    assert prompts[0] == prompts[1]


def test_rows_from_arrow_with_fields_that_are_none_are_rows_like_any_other():
    """Arrow has one type for all parts of all rows: a text gets an image_url, a picture a text and a detail."""
    env = environment(message(jpeg(0, detail="low"), "red"), message(picture(1), "?"))
    (first, text), (second, _) = (row["prompt"][0]["content"] for row in env.get_dataset())
    assert text["image_url"] is None and first["text"] is None
    assert None in (first["image_url"]["detail"], second["image_url"]["detail"])  # the rows come shuffled
    train(env)


def test_rows_without_a_picture_train_beside_rows_with_one_or_two():
    prompts = [message("red ?"), message(picture(0), "?"), message(picture(1), "and", picture(2), "?")]
    _, rollouts, batch, _ = train(environment(*prompts), rollouts_per_step=12)
    counts = {len(image_urls(rollout["trajectory"][0]["prompt"])) for rollout in rollouts}
    assert counts == {0, 1, 2} and {len(pixels(batch, row)) > 0 for row in range(12)} == {False, True}


def look_call(name="call-1"):
    return {"id": name, "type": "function", "function": {"name": "look", "arguments": '{"colour":"red"}'}}


def test_pictures_may_stand_in_user_and_in_tool_turns_of_a_prompt():
    history = [
        *message(picture(0), "look"),
        {"role": "assistant", "content": text("look"), "tool_calls": [look_call()]},
        {"role": "tool", "tool_call_id": "call-1", "content": [picture(1)]},
        *message(picture(2), "?"),
    ]
    trainer, rollouts, _, _ = train(environment(history))
    shown = prompt_text(trainer, rollouts[0])
    turns = [turn.count("<|image_pad|>") > 0 for turn in shown.split("<|im_start|>")[1:]]
    assert turns == [True, False, True, True, False] and f"look\n{LOOK}<|im_end|>" in shown


def test_an_assistant_message_may_have_tool_calls_and_no_content():
    history = [
        *message(picture(0), "look"),
        {"role": "assistant", "content": None, "tool_calls": [look_call()]},
        {"role": "tool", "tool_call_id": "call-1", "content": text("red")},
    ]
    trainer, rollouts, _, _ = train(environment(history))
    assert f"<|im_start|>assistant\n{LOOK}<|im_end|>\n" in prompt_text(trainer, rollouts[0])


# ---------------------------------------------------------------- histories, groups of environments


class LastScreenshotOnly(vf.MultiTurnEnv):
    """Shows a screenshot a turn, in whose prompt the older ones are a text; ends early where nothing is answered."""

    async def env_response(self, messages, state, **_):
        return message(picture(len(state["trajectory"])), "now ?")

    async def get_prompt_messages(self, state):
        *older, last = await super().get_prompt_messages(state)
        gone = lambda m: m.role == "user" and isinstance(m.content, list)
        return [vf.UserMessage(content="picture") if gone(m) else m for m in older] + [last]

    @vf.stop
    async def nothing_answered(self, state):
        return bool(state["trajectory"]) and not state["trajectory"][-1]["completion"][-1].content


def test_a_history_that_the_environment_rewrites_makes_new_rows_that_share_one_reward():
    env = environment(message(picture(0), "?"), kind=LastScreenshotOnly, max_turns=3)
    _, rollouts, batch, _ = train(env, make_tool_user("red"), rollouts_per_step=32, rollouts_per_example=32)
    turns = [len(rollout["trajectory"]) for rollout in rollouts]
    assert batch.rollout_ids.tolist() == [i for i, n in enumerate(turns) for _ in range(n)]
    assert set(turns) == {1, 2, 3}  # so that a mean over rows is another than the mean over rollouts
    assert all(len(image_urls(step["prompt"])) == 1 for rollout in rollouts for step in rollout["trajectory"])
    rewards = [rollout["reward"] for rollout in rollouts]
    of_rows = torch.tensor([rewards[i] - fmean(rewards) for i in batch.rollout_ids.tolist()])
    torch.testing.assert_close(row_advantages(batch, "none"), of_rows, rtol=0, atol=1e-6)  # float32, numbers up to 7


def test_a_group_of_environments_with_and_without_pictures_trains_together():
    shapes = vf.load_environment("shapes-env", num_train_examples=2, num_eval_examples=1)
    words = rows(message("red ?"), message("star ?")).cast(
        shapes.get_dataset().select_columns(["prompt", "answer"]).features
    )
    words = vf.SingleTurnEnv(dataset=words, rubric=vf.Rubric(funcs=[text_reward]))
    group = vf.EnvGroup([shapes, words], env_names=["shapes", "words"])
    _, rollouts, batch, _ = train(group, rollouts_per_step=16)
    assert [rollout["info"]["env_id"] for rollout in rollouts].count("shapes") == 8
    for row, i in enumerate(batch.rollout_ids.tolist()):
        assert (len(pixels(batch, row)) > 0) == (rollouts[i]["info"]["env_id"] == "shapes")


# ---------------------------------------------------------------- tools


def look(colour: str) -> str:
    """Look for a colour.

    Args:
        colour: its name.
    """
    return f"no {colour} circle"


def snapshot(colour: str) -> list:
    """Take a picture."""
    return [{"type": "text", "text": "Look :"}, picture(len(colour))]


snapshot.__name__ = "look"  # what the policy calls


class Counting(vf.StatefulToolEnv):
    """Its tool takes an argument that the policy never sees: how many calls there were before in this rollout."""

    def __init__(self, **more):
        super().__init__(**more)
        self.add_tool(self.look, args_to_skip=["earlier"])

    async def look(self, colour: str, earlier: int) -> str:
        """Look for a colour."""
        return f"{colour} {'again' if earlier else 'first'}"

    def update_tool_args(self, tool_name, tool_args, messages, state, **_):
        state["calls"] = state.get("calls", 0) + 1
        return {**tool_args, "earlier": state["calls"] - 1}


def tool_results(rollout):
    """(content of the calling message, its calls, the tool's messages) of each turn that called a tool and went on."""
    found = []
    for step, after in zip(rollout["trajectory"], rollout["trajectory"][1:]):
        said = step["completion"][0]
        results = after["prompt"][len(step["prompt"]) + 1 :]
        found.append((said.content, said.tool_calls, results))
    return found


def called(rollouts):
    """All calls of these rollouts with their results, as (call, tool message)."""
    return [pair for rollout in rollouts for _, calls, results in tool_results(rollout) for pair in zip(calls, results)]


SEVERAL = dict(rollouts_per_step=16, rollouts_per_example=16, max_tokens=3)


def test_a_tool_env_offers_its_tools_and_runs_what_the_policy_calls():
    env = environment(message(picture(), "?"), kind=vf.ToolEnv, tools=[look], max_turns=2)
    trainer, rollouts, _, _ = train(env, make_tool_user(LOOK), **SEVERAL)
    assert '"function": {"name": "look", "description": "Look for a colour."' in prompt_text(trainer, rollouts[0])
    assert {len(rollout["trajectory"]) for rollout in rollouts} == {1, 2}  # some call, some do not
    token = trainer.tokenizer.convert_tokens_to_ids(LOOK)
    for rollout in rollouts:
        for step in rollout["trajectory"]:
            calls = step["completion"][0].tool_calls or []
            assert len(calls) == step["tokens"]["completion_ids"].count(token)
            assert all((call.name, json.loads(call.arguments)) == ("look", {"colour": "red"}) for call in calls)
    results = [result for _, result in called(rollouts)]
    assert results and all(result.content == "no red circle" for result in results)


def test_a_turn_after_a_tool_goes_on_in_the_same_row_where_the_template_writes_the_call_as_it_was_said():
    """An answer that was cut off has no stop token, and two calls have no line between them: the template adds both."""
    env = environment(message(picture(), "?"), kind=vf.ToolEnv, tools=[look], max_turns=2)
    trainer, rollouts, batch, _ = train(env, make_tool_user(LOOK), **SEVERAL)
    as_written = [trainer.tokenizer.convert_tokens_to_ids(LOOK), trainer.tokenizer.eos_token_id]
    rows_of = {True: set(), False: set()}
    for i, rollout in enumerate(rollouts):
        if len(rollout["trajectory"]) == 2:
            assert "<tool_response>\nno red circle\n</tool_response>" in prompt_text(trainer, rollout, turn=1)
            same = rollout["trajectory"][0]["tokens"]["completion_ids"] == as_written
            rows_of[same].add(batch.rollout_ids.tolist().count(i))
    assert rows_of == {True: {1}, False: {2}}


def test_parallel_calls_are_answered_each_by_its_own_result():
    env = environment(message(picture(), "?"), kind=vf.ToolEnv, tools=[look], max_turns=2)
    _, rollouts, _, _ = train(env, make_tool_user(LOOK), **SEVERAL)
    several = [
        (calls, results) for rollout in rollouts for _, calls, results in tool_results(rollout) if len(calls) > 1
    ]
    assert several
    for calls, results in several:
        assert len({call.id for call in calls}) == len(calls)
        assert [result.tool_call_id for result in results] == [call.id for call in calls]


def test_a_stateful_tool_env_adds_what_the_policy_does_not_see():
    env = environment(message(picture(), "?"), kind=Counting, max_turns=3)
    trainer, rollouts, _, _ = train(env, make_tool_user(LOOK), **SEVERAL)
    assert "earlier" not in prompt_text(trainer, rollouts[0]) and '"colour"' in prompt_text(trainer, rollouts[0])
    said = [[result.content for _, result in called([rollout])] for rollout in rollouts]
    assert max(map(len, said)) > 1
    for of_rollout in said:
        assert of_rollout == [f"red {'again' if n else 'first'}" for n in range(len(of_rollout))]


def test_a_tools_picture_reaches_the_model_in_the_next_turn():
    env = environment(message(picture(0), "?"), kind=vf.ToolEnv, tools=[snapshot], max_turns=2)
    trainer, rollouts, batch, _ = train(env, make_tool_user(LOOK), **SEVERAL)
    once = [r for r in rollouts if len(called([r])) == 1]
    assert once
    for rollout in once:
        assert image_urls(rollout["trajectory"][1]["prompt"]) == image_urls(message(picture(0), picture(3)))
        assert "<tool_response>\nLook :<|vision_start|><|image_pad|>" in prompt_text(trainer, rollout, turn=1)


def test_a_call_that_is_not_well_formed_stays_text_and_is_trained_on():
    env = environment(message(picture(), "?"), kind=vf.ToolEnv, tools=[look], max_turns=2)
    trainer, rollouts, _, _ = train(env, make_tool_user(BROKEN), **SEVERAL)
    token = trainer.tokenizer.convert_tokens_to_ids(BROKEN)
    said = [
        rollout["trajectory"][0]
        for rollout in rollouts
        if token in rollout["trajectory"][0]["tokens"]["completion_ids"]
    ]
    assert said and all(BROKEN in step["completion"][0].content for step in said)
    assert all(len(rollout["trajectory"]) == 1 and rollout["metrics"]["look_calls"] == 0 for rollout in rollouts)
