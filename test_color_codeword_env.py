"""Tests of the colour codeword: squares and answers turn by turn, the rubric, a policy that learns it.

    pytest test_color_codeword_env.py

What a picture shows is read off its pixels again; what a policy without eyes could know is counted.
"""

import asyncio

import pytest
import torch
import verifiers as vf

from color_codeword_env import CODE, COLOURS, END, load_environment, make_rubric
from conftest import make_trainer, message, picture
from media import image_urls, load_image
from mm_grpo import DEMO

FOUR = {colour: colour for colour in ("red", "green", "blue", "yellow")}  # words that the tiny checkpoints know


def codeword(**arguments):
    return vf.load_environment("color-codeword-env", **{"num_train_examples": 16, "num_eval_examples": 16, **arguments})


def look(url):
    """The colour of a picture's square, by its pixels alone: the nearest to the mean of all that are not background."""
    image = load_image(url)
    pixels = torch.tensor(list(image.get_flattened_data()), dtype=torch.float64)
    mean = pixels[pixels.max(-1).values > 100].mean(0)
    return min(COLOURS, key=lambda name: (mean - torch.tensor(COLOURS[name])).norm())


def conversation(env, row):
    """What the user says in each turn of this row, whatever the replies are: (URLs, text)."""
    said = [row["prompt"]]
    for turn in range(1, env.max_turns):
        said.append(asyncio.run(env.env_response([], {"trajectory": [None] * turn, "info": row["info"]})))
    assert all([part["type"] for part in turn[0]["content"]][-1] == "text" for turn in said)
    return [(image_urls(turn), turn[0]["content"][-1]["text"]) for turn in said]


@pytest.mark.parametrize(("turns", "images_per_turn", "code"), [(3, 1, None), (2, 2, FOUR), (1, 3, FOUR), (4, 1, FOUR)])
def test_the_codeword_is_what_the_squares_of_all_turns_say_and_is_asked_for_in_the_last(turns, images_per_turn, code):
    env = codeword(turns=turns, images_per_turn=images_per_turn, code=code)
    rows = [*env.get_dataset(), *env.get_eval_dataset()]
    for row in rows:
        turns_of_row = conversation(env, row)
        urls = [url for urls, _ in turns_of_row for url in urls]
        assert [len(urls) for urls, _ in turns_of_row] == [images_per_turn] * turns
        letters = [(code or CODE)[look(url)] for url in urls]
        assert row["answer"] == (" ".join(letters) if code else "".join(letters))
        assert [END in text for _, text in turns_of_row] == [False] * (turns - 1) + [True]
        assert all(f"{colour} is {word}" in turns_of_row[0][1] for colour, word in (code or CODE).items())
    assert len({row["answer"] for row in rows}) > 16


def test_no_square_comes_twice_and_the_same_seed_gives_the_same():
    envs = [codeword(seed=seed) for seed in (0, 1)]
    rows = [row for env in envs for split in (env.get_dataset(), env.get_eval_dataset()) for row in split]
    urls = [url for row in rows for urls, _ in conversation(envs[0], row) for url in urls]
    assert len(set(urls)) == len(urls) == 3 * len(rows)
    assert codeword(seed=1).get_dataset().to_list() == envs[1].get_dataset().to_list()


def test_a_blind_environment_shows_one_grey_picture_and_is_the_same_else():
    seeing, blind = codeword(), codeword(blind=True)
    shown = {url for row in blind.get_dataset() for urls, _ in conversation(blind, row) for url in urls}
    assert len(shown) == 1 and blind.get_dataset()["answer"] == seeing.get_dataset()["answer"]


@pytest.mark.parametrize(
    ("code", "replies", "letters", "form", "exact"),
    [
        (CODE, ["A", "AB", "ABC"], 1, 1, 1), (CODE, ["", None, " ABC\n"], 1, 1, 1),
        (CODE, ["", "", "ABD"], 2 / 3, 1, 0),
        (CODE, ["", "", "CBA"], 1 / 3, 1, 0), (CODE, ["", "", "AB"], 2 / 3, 1 / 2, 0),
        (CODE, ["", "", "ABCD"], 3 / 4, 1 / 2, 0), (CODE, ["", "", "A B C"], 1 / 5, 0, 0),
        (CODE, ["", "", "ABCABCABCABC"], 1 / 4, 1 / 2, 0),  # to say everything is not to know it
        (CODE, ["", "", "abc"], 0, 1 / 2, 0), (CODE, ["", "", "I see ABC"], 0, 0, 0), (CODE, ["", "", ""], 0, 0, 0),
        (CODE, ["ABC", "ABC", ""], 0, 0, 0),  # what is said too early earns nothing
        (CODE, ["ABC"], 0, 0, 0), (CODE, ["", "ABC"], 0, 0, 0), (CODE, [], 0, 0, 0),  # a turn is missing
        (FOUR, ["", "", "red green blue"], 1, 1, 1), (FOUR, ["", "", "red blue green"], 1 / 3, 1, 0),
        (FOUR, ["", "", "redgreenblue"], 0, 0, 0), (FOUR, ["", "", None], 0, 0, 0),
    ],
)  # fmt: skip
def test_the_rubric_counts_letters_in_their_place_in_the_last_reply_alone(code, replies, letters, form, exact):
    """What the user says in between, here the codeword itself, is nobody's reply."""
    answer = "ABC" if code is CODE else "red green blue"
    rubric, state = make_rubric(code, turns=3), {"prompt": message("?"), "answer": answer, "trajectory": []}
    said = [[{"role": "assistant", "content": reply}] for reply in replies]
    state["completion"] = [m for reply in said for m in [*reply, *message(picture(2), answer)]]
    asyncio.run(rubric.score_group([state]))
    assert state["metrics"] == pytest.approx({"letters": letters, "form": form, "exact": exact})
    assert state["reward"] == pytest.approx(0.4 * letters + 0.2 * form + 0.4 * exact)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_train_examples", 0), ("num_eval_examples", -1), ("turns", 0), ("turns", 2.0), ("images_per_turn", 0)]
    + [("image_size", 7), ("image_size", "56")],
)
def test_an_impossible_argument_is_refused_by_name(name, value):
    with pytest.raises(Exception, match=f"{name}={value!r}: must be a whole number, at least"):
        codeword(**{name: value})


@pytest.mark.parametrize("code", [{}, {"beige": "A"}, {"red": "A", "blue": "A"}, {"red": "A B"}, {"red": 3}], ids=str)
def test_a_code_that_cannot_be_told_apart_is_refused(code):
    with pytest.raises(ValueError, match="code=.*must give a word to some of"):
        load_environment(2, 2, code=code)


def test_a_tiny_model_learns_the_codeword_over_two_turns_and_only_by_looking():
    """80 steps of 64 rollouts (the README has the full runs' numbers). Before each update it is on-policy, and what a
    group shares before its first sampled token has run once, whatever pictures come later."""
    two = dict(turns=2, code=FOUR, num_train_examples=1024, num_eval_examples=128)
    trainer = make_trainer(env=codeword(**two), **{**DEMO, "rollouts_per_step": 64})
    for _ in range(80):
        metrics = trainer.step()
        assert abs(metrics["ratio_min"] - 1) <= 1e-4 and abs(metrics["ratio_max"] - 1) <= 1e-4
        assert metrics["shared_prefix_fraction"] > 0.9 and metrics["rollouts_dropped"] == 0
    seen = trainer.evaluate()
    trainer.set_environment(codeword(**two, blind=True))
    blind = trainer.evaluate()
    # chance is 1/4 for a letter and 1/16 for both; blind, 128 draws: standard deviations of 0.03 and 0.02
    assert seen["letters"] >= 0.6 and seen["exact"] >= 0.4 and seen["num_turns"] == 2
    assert blind["letters"] <= 0.4 and blind["exact"] <= 0.16
