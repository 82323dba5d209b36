"""color-codeword-env: a verifiers environment of several turns, each of which has to be looked at and remembered.

Every turn shows squares of one colour each, and each colour stands for a letter. In the last turn the policy says the
codeword: the letters of all squares, in order. Place, size, shade and background vary from picture to picture; training
and evaluation examples come from disjoint random streams.

    env = verifiers.load_environment("color-codeword-env", num_train_examples=512, turns=2)

Written from the description of Prime Intellect's `color-codeword` and for the same purpose, with pictures, words and
rewards of its own. What the policy says before the last turn earns nothing; it stays in the conversation.

`blind=True` replaces every picture by the same grey one and leaves all else as it is: what a policy still scores then,
it scores without looking (the control of the experiment).
"""

from __future__ import annotations

import random
import re
from statistics import fmean

import verifiers as vf
from datasets import Dataset
from PIL import Image

from shapes_env import ask, png_data_uri

COLOURS = {
    **{"red": (225, 30, 30), "green": (30, 160, 50), "blue": (40, 60, 220), "yellow": (240, 215, 40)},
    **{"purple": (140, 40, 170), "orange": (245, 135, 25), "white": (230, 230, 230), "pink": (245, 150, 190)},
}
CODE = dict(zip(COLOURS, "ABCDEFGH"))
START = "Code : {code} ."
NEXT = "Look ."  # of every turn but the first
END = "Now name the code of all pictures in order ."  # of the last turn


def draw_square(colour: str, size: int, rng: random.Random) -> Image.Image:
    """One picture, RGB, `size` x `size` pixels, of one square; everything but its colour is drawn from `rng`."""
    image = Image.new("RGB", (size, size), tuple(rng.randint(0, 40) for _ in range(3)))
    edge = round(size * rng.uniform(0.6, 0.9))
    shade = tuple(min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLOURS[colour])
    x, y = (rng.randint(0, size - edge) for _ in range(2))
    image.paste(shade, (x, y, x + edge, y + edge))
    return image


def separator(code: dict[str, str]) -> str:
    """What stands between two of a codeword: nothing between letters, a blank between words."""
    return "" if all(len(word) == 1 for word in code.values()) else " "


def make_example(rng: random.Random, turns: int, images_per_turn: int, code: dict[str, str], size: int, blind: bool):
    """One row of the dataset: `prompt` (the chat messages of the first turn), `answer` (the codeword) and `info`: the
    URIs of the pictures that each later turn brings."""
    shown = [rng.choice(list(code)) for _ in range(turns * images_per_turn)]
    images = [draw_square(colour, size, rng) for colour in shown]
    if blind:
        images = [Image.new("RGB", (size, size), (128, 128, 128)) for _ in images]
    urls = [png_data_uri(image) for image in images]
    first, *later = [urls[i : i + images_per_turn] for i in range(0, len(urls), images_per_turn)]
    text = START.format(code=" , ".join(f"{colour} is {word}" for colour, word in code.items()))
    answer = separator(code).join(code[colour] for colour in shown)
    return {"prompt": ask(first, text if later else f"{text} {END}"), "answer": answer, "info": {"later": later}}


def make_rubric(code: dict[str, str], turns: int) -> vf.Rubric:
    """Partial credit: 0.4 for `letters`, the share that is right in its place; 0.2 for `form`, letters of the code and
    as many as there are; 0.4 for `exact`, the whole codeword and nothing else. All of it of the last turn's reply."""
    parser = vf.Parser(extract_fn=str.strip)
    known, split = set(code.values()), str.split if separator(code) else list

    def said(completion, answer) -> tuple[list[str], list[str]]:
        """Letters of the last turn's reply, none where that turn is missing, and of the codeword."""
        replies = parser.get_assistant_messages(completion)
        reply = parser.parse_answer(replies[-1:]) if len(replies) == turns else None
        return split(reply or ""), split(answer)

    def letters(completion, answer) -> float:
        reply, right = said(completion, answer)
        return sum(one == other for one, other in zip(reply, right)) / max(len(reply), len(right))

    def form(completion, answer) -> float:
        reply, right = said(completion, answer)
        return fmean([reply != [] and known.issuperset(reply), len(reply) == len(right)])

    def exact(completion, answer) -> float:
        reply, right = said(completion, answer)
        return float(reply == right)

    return vf.Rubric(funcs=[letters, form, exact], weights=[0.4, 0.2, 0.4], parser=parser)


class ColorCodewordEnv(vf.MultiTurnEnv):
    """Shows the next pictures after each reply, and asks for the codeword with the last ones."""

    async def env_response(self, messages, state, **kwargs) -> list[dict]:
        turn, later = len(state["trajectory"]), state["info"]["later"]
        return ask(later[turn - 1], f"{NEXT} {END}" if turn == len(later) else NEXT)


def load_environment(
    num_train_examples: int = 1000,
    num_eval_examples: int = 100,
    turns: int = 3,
    images_per_turn: int = 1,
    code: dict[str, str] | None = None,
    image_size: int = 56,
    blind: bool = False,
    seed: int = 0,
) -> vf.MultiTurnEnv:
    """The environment, as `verifiers.load_environment("color-codeword-env", ...)` makes it.

    Args:
        num_train_examples, num_eval_examples: rows of the two data sets, at least 1 each.
        turns, images_per_turn: how often squares are shown, and how many at once, at least 1 each.
        code: the letter, or the word, of each colour that comes, no two alike; None: A to H for all of COLOURS.
        image_size: edge of a picture in pixels, at least 8.
        blind: every picture is the same grey (see above).
        seed: of the data; train and eval pictures differ for every seed.
    """
    counts = dict(num_train_examples=num_train_examples, num_eval_examples=num_eval_examples, turns=turns)
    for name, value in {**counts, "images_per_turn": images_per_turn, "image_size": image_size}.items():
        if not isinstance(value, int) or value < (least := 8 if name == "image_size" else 1):
            raise ValueError(f"{name}={value!r}: must be a whole number, at least {least}")
    chosen = CODE if code is None else code
    words = [word for word in chosen.values() if isinstance(word, str) and re.fullmatch(r"\w+", word)]
    if not chosen or not chosen.keys() <= COLOURS.keys() or len(set(words)) < len(chosen):
        raise ValueError(f"code={code!r}: must give a word to some of {list(COLOURS)}, no two alike")

    def rows(split: str, count: int) -> Dataset:
        streams = [random.Random(f"codeword {seed} {split} {i}") for i in range(count)]
        arguments = turns, images_per_turn, chosen, image_size, blind
        return Dataset.from_list([make_example(rng, *arguments) for rng in streams])

    train, evaluation = rows("train", num_train_examples), rows("eval", num_eval_examples)
    rubric = make_rubric(chosen, turns)
    shared = dict(rubric=rubric, parser=rubric.parser, max_turns=turns)
    return ColorCodewordEnv(dataset=train, eval_dataset=evaluation, **shared)
