"""Tests of the shapes environment: pictures and answers, the second turn, the rubric.

    pytest test_shapes_env.py

What a picture shows is read off its pixels again; what a policy without eyes could know is counted.
"""

import asyncio

import pytest
import torch
import verifiers as vf

from conftest import message, picture
from media import load_image
from shapes_env import COLOURS, load_environment, make_rubric


def shapes(**arguments):
    return vf.load_environment("shapes-env", **{"num_train_examples": 24, "num_eval_examples": 24, **arguments})


def urls(row):
    return [part["image_url"]["url"] for part in row["prompt"][0]["content"] if part["type"] == "image_url"]


def look(url):
    """(colour, shape) of a picture, by its pixels alone: the nearest colour, the filled share of its bounding box."""
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
    told_by_one = [row["answer"] in (" ".join(first), " ".join(second)) for row, (first, second) in zip(rows, seen)]
    assert sum(told_by_one) < len(rows)


def test_no_picture_comes_twice_in_training_and_evaluation_of_any_seed():
    envs = [shapes(seed=seed) for seed in (0, 1, 2)]
    pictures = [urls(row)[0] for env in envs for split in (env.get_dataset(), env.get_eval_dataset()) for row in split]
    assert len(set(pictures)) == len(pictures) == 3 * 48
    assert [urls(row) for row in shapes(seed=1).get_dataset()] == [urls(row) for row in envs[1].get_dataset()]


def test_a_blind_environment_shows_one_grey_picture_and_is_the_same_else():
    seeing, blind = shapes(), shapes(blind=True)
    assert len({urls(row)[0] for row in [*blind.get_dataset(), *blind.get_eval_dataset()]}) == 1
    answers = list(blind.get_dataset()["answer"])
    assert answers == list(seeing.get_dataset()["answer"]) and len(set(answers)) > 6


def next_question(env, row):
    """(URL of the picture, text) of what the environment asks after the first reply to this row."""
    (question,) = asyncio.run(env.env_response(row["prompt"], row))
    shown, asked = question["content"]
    return shown["image_url"]["url"], asked["text"]


@pytest.mark.parametrize(("seed", "images_per_prompt"), [(0, 1), (1, 1), (2, 2)])
def test_the_second_question_brings_another_picture_and_the_answers_second_line_is_what_it_shows(
    seed, images_per_prompt
):
    arguments = dict(turns=2, seed=seed, images_per_prompt=images_per_prompt)
    arguments |= dict(num_train_examples=12, num_eval_examples=12)
    env, again = shapes(**arguments), shapes(**arguments)
    rows = [*env.get_dataset(), *env.get_eval_dataset()]
    pictures = []
    for row in rows:
        first, (url, asked) = [look(shown) for shown in urls(row)], next_question(env, row)
        assert row["answer"].splitlines() == [f"{first[0][0]} {first[-1][1]}", " ".join(look(url))]
        assert asked.endswith("see now ?")
        pictures += [*urls(row), url]
    assert len(set(pictures)) == len(pictures) == 24 * (images_per_prompt + 1)
    lines = [row["answer"].splitlines() for row in rows]
    # 2 by chance: the first answer says nothing of the second
    assert sum(first == second for first, second in lines) < 8
    assert [*again.get_dataset(), *again.get_eval_dataset()] == rows


@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_the_first_turn_is_the_same_whether_another_follows_or_not(images_per_prompt):
    """Else a run of one turn and one of two could not be compared. A row of one turn has no column that it does not
    need."""
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
    words = [
        {"role": "assistant", "content": row["answer"]},
        *message({"type": "image_url", "image_url": {"url": url}}, asked),
    ]
    parts = [{name: value for name, value in part.items() if value is not None} for part in row["prompt"][0]["content"]]
    prompt = adapter.encode_prompt([{"role": "user", "content": parts}, *words])
    assert adapter.tokenizer.unk_token_id not in prompt.ids


def turns(*is_truncated: bool) -> list[dict]:
    """The trajectory of a rollout, as far as rubrics look at it: a turn each, cut off or not."""
    return [{"is_truncated": each, "reward": None, "advantage": None} for each in is_truncated]


@pytest.mark.parametrize(
    ("content", "colour", "shape", "form", "exact"),
    [
        ("red circle", 1, 1, 1, 1), ("red square", 1, 0, 1, 0),
        ("blue circle", 0, 1, 1, 0), ("blue square", 0, 0, 1, 0),
        ("red", 1, 0, 1 / 2, 0), ("circle", 0, 0, 1 / 4, 0),
        ("circle red", 0, 0, 1 / 2, 0), ("red circle red", 1, 1, 3 / 4, 0),
        ("a red circle", 0, 0, 1 / 4, 0), ("  red \n circle ", 1, 1, 1, 1),
        ("", 0, 0, 1 / 4, 0), (None, 0, 0, 1 / 4, 0),
    ],
)  # fmt: skip
def test_the_rubric_gives_partial_credit_for_colour_shape_and_form(content, colour, shape, form, exact):
    rubric, state = make_rubric(), {"prompt": message("?"), "answer": "red circle"}
    state |= {"completion": [{"role": "assistant", "content": content}], "trajectory": turns(False)}
    asyncio.run(rubric.score_group([state]))
    assert state["metrics"] == pytest.approx({"colour": colour, "shape": shape, "form": form, "exact": exact})
    *partial, whole = rubric.weights
    assert sum(partial) == pytest.approx(1) and min(partial) > 0 == whole
    expected = sum(weight * value for weight, value in zip(partial, (colour, shape, form)))
    assert state["reward"] == pytest.approx(expected)
    state["trajectory"] = turns(True)  # the same text, cut off: what follows it may not be seen in it
    asyncio.run(rubric.score_group([state]))
    assert state["metrics"] == pytest.approx({"colour": colour, "shape": shape, "form": form - 1 / 4, "exact": exact})


@pytest.mark.parametrize(
    ("replies", "colour", "shape", "form", "exact"),
    [
        (["red circle", "blue square"], 1, 1, 1, 1), (["red circle", "blue circle"], 1, 1 / 2, 1, 1 / 2),
        (["red circle", "red circle"], 1 / 2, 1 / 2, 1, 1 / 2),  # the second picture not looked at
        (["blue square", "red circle"], 0, 0, 1, 0),  # each the answer to the other question
        (["red", "blue square"], 1, 1 / 2, 3 / 4, 1 / 2), (["red square", "blue circle"], 1, 0, 1, 0),
        (["red circle"], 1 / 2, 1 / 2, 1 / 2, 1 / 2), (["blue square"], 0, 0, 1 / 2, 0),  # no second reply
        (["red circle", ""], 1 / 2, 1 / 2, 5 / 8, 1 / 2), (["", "blue square"], 1 / 2, 1 / 2, 5 / 8, 1 / 2),
        ([None, "a"], 0, 0, 1 / 4, 0), (["red circle blue square", ""], 1 / 2, 1 / 2, 1 / 2, 0), ([], 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_the_rubric_of_two_turns_is_the_mean_of_both_and_a_missing_reply_earns_nothing(
    replies, colour, shape, form, exact
):
    """What the user says in between, here the second answer itself, is nobody's reply."""
    rubric, state = make_rubric(), {"prompt": message("?"), "answer": "red circle\nblue square"}
    state["trajectory"] = turns(*[False for _ in replies])
    said = [{"role": "assistant", "content": reply} for reply in replies]
    state["completion"] = said[:1] + message(picture(2), "blue square") + said[1:]
    asyncio.run(rubric.score_group([state]))
    assert state["metrics"] == pytest.approx({"colour": colour, "shape": shape, "form": form, "exact": exact})
    assert state["reward"] == pytest.approx(0.4 * colour + 0.4 * shape + 0.2 * form)
    if replies:  # an end is each reply's own
        state["trajectory"] = turns(*[False for _ in replies[1:]], True)
        asyncio.run(rubric.score_group([state]))
        assert state["metrics"]["form"] == pytest.approx(form - 1 / 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_examples", 0),
        ("num_eval_examples", -1),
        ("image_size", 7),
        ("image_size", 56.0),
        ("images_per_prompt", 3),
        ("turns", 0),
        ("turns", 3),
        ("turns", "2"),
    ],
)
def test_an_impossible_argument_of_the_environment_is_refused_by_name(name, value):
    with pytest.raises(Exception, match=f"{name}={value!r}: must be"):
        shapes(**{name: value})


def test_colours_may_be_called_otherwise_and_nothing_else_changes():
    names = {"red": "green", "green": "red", "blue": "purple"}
    plain, other = (load_environment(8, 2, turns=2, colour_names=given) for given in (None, names))
    rows, changed = plain.get_dataset().to_list(), other.get_dataset().to_list()
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in changed]
    called = lambda line: " ".join(names.get(word, word) for word in line.split())
    assert ["\n".join(map(called, row["answer"].splitlines())) for row in rows] == [row["answer"] for row in changed]


@pytest.mark.parametrize("names", [{"pink": "red"}, {"red": "green"}, {"red": "dark red"}, {"red": 3}], ids=str)
def test_colour_names_that_answers_could_not_be_told_by_are_refused(names):
    with pytest.raises(ValueError, match="colour_names=.*must give a word to some of"):
        load_environment(2, 2, colour_names=names)
