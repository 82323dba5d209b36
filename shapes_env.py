"""shapes-env: a verifiers environment that only a policy which sees can solve.

Each example shows one or two procedural pictures, drawn by Pillow when the environment is made, and asks for a colour
and a shape. Colour shade, size, place, rotation and background vary from picture to picture; training and evaluation
examples come from disjoint random streams. The answer has the form `red circle`: two words, then stop.

    env = verifiers.load_environment("shapes-env", num_train_examples=512, images_per_prompt=2)

`turns=2` goes on after the first reply: a second question brings another picture, and asks for its colour and shape.

`blind=True` replaces every picture by the same grey one and leaves all else as it is: what a policy still scores then,
it scores without looking (the control of the experiment).

`colour_names={"red": "blue", "blue": "red"}` calls colours otherwise: a changed task for a policy that knows the first.
"""

from __future__ import annotations

import base64
import io
import math
import random
import re
from collections.abc import Collection
from itertools import chain, repeat, zip_longest
from statistics import fmean

import verifiers as vf
from datasets import Dataset
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 200, 40)}
SHAPES = ("circle", "square", "triangle")
BOTH_PICTURES = "Name the colour of the first picture and the shape of the second picture ."
QUESTIONS = {1: "Which colour and which shape do you see ?", 2: BOTH_PICTURES}
NEXT_QUESTION = "Which colour and which shape do you see now ?"  # of the second turn, about one picture more
OVERSAMPLING = 4  # pictures are drawn larger and scaled down: smooth edges


def draw_shape(colour: str, shape: str, size: int, rng: random.Random) -> Image.Image:
    """One picture, RGB, `size` x `size` pixels, of one shape; everything but colour and shape is drawn from `rng`."""
    canvas = size * OVERSAMPLING
    grey = rng.randint(0, 30)
    image = Image.new("RGB", (canvas, canvas), tuple(grey + rng.randint(0, 10) for _ in range(3)))
    radius = canvas * rng.uniform(0.40, 0.47)
    x, y = (rng.uniform(radius, canvas - radius) for _ in range(2))
    fill = tuple(min(255, max(0, channel + rng.randint(-25, 25))) for channel in COLOURS[colour])
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        corners, upright = {"square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[shape]
        turn = upright + math.radians(rng.uniform(-5, 5))
        angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
        draw.polygon([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles], fill=fill)
    return image.resize((size, size), Image.Resampling.BOX)


def png_data_uri(image: Image.Image) -> str:
    """A lossless `data:image/png;base64,...` URI: JPEG would change the pixels on their way to the server."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_pictures(rng: random.Random, image_size: int, count: int, blind: bool) -> tuple[list[str], str]:
    """The URIs of this many pictures, and the answer to the question about them (`"red circle"`)."""
    things = [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(count)]
    images = [draw_shape(colour, shape, image_size, rng) for colour, shape in things]
    if blind:
        images = [Image.new("RGB", (image_size, image_size), (128, 128, 128)) for _ in images]
    # with two pictures the colour is the first one's and the shape the second one's: neither picture is enough
    return [png_data_uri(image) for image in images], f"{things[0][0]} {things[-1][1]}"


def ask(urls: list[str], question: str) -> list[dict]:
    """Chat messages: one of the user, with the pictures in front of the question."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def make_example(rng: random.Random, image_size: int, images_per_prompt: int, blind: bool, turns: int) -> dict:
    """One row of the dataset: `prompt` (the chat messages of the first turn) and `answer` (a line for each turn). With
    two turns also `info`: the URI of the picture that the second one brings."""
    urls, answer = draw_pictures(rng, image_size, images_per_prompt, blind)
    example = {"prompt": ask(urls, QUESTIONS[images_per_prompt]), "answer": answer}
    if turns == 1:
        return example
    (next_url,), next_answer = draw_pictures(rng, image_size, 1, blind)
    return {**example, "answer": f"{answer}\n{next_answer}", "info": {"next_picture": next_url}}


def make_rubric(colours: Collection[str] = COLOURS) -> vf.Rubric:
    """Partial credit: 0.4 for the colour, 0.4 for the shape, 0.2 for the form (a colour, a shape, two words, an end of
    its own: what cut a reply off may not show in its text); `exact` is a metric and has no weight. Each is the mean
    over the turns, so that chance is the same for one and for two. A turn without a reply counts 0."""
    parser = vf.Parser(extract_fn=lambda text: text.split())

    def turns(completion, answer) -> list[tuple[list[str], list[str]]]:
        """(words of the reply, words of the answer) of each turn."""
        replies = [parser.parse_answer([message]) for message in parser.get_assistant_messages(completion)]
        return list(zip_longest(replies, (line.split() for line in answer.splitlines()), fillvalue=[]))

    def colour(completion, answer) -> float:
        return fmean(words[:1] == right[:1] for words, right in turns(completion, answer))

    def shape(completion, answer) -> float:
        return fmean(words[1:2] == right[1:] for words, right in turns(completion, answer))

    def well_formed(ended: bool, first: str = "", second: str = "", *more: str) -> float:
        return fmean([first in colours, second in SHAPES, second != "" and not more, ended])

    def form(completion, answer, state) -> float:
        ended = chain((not step["is_truncated"] for step in state["trajectory"]), repeat(False))
        return fmean(well_formed(end, *words) for (words, _), end in zip(turns(completion, answer), ended))

    def exact(completion, answer) -> float:
        return fmean(words == right for words, right in turns(completion, answer))

    return vf.Rubric(funcs=[colour, shape, form, exact], weights=[0.4, 0.4, 0.2, 0.0], parser=parser)


class ShapesEnv(vf.MultiTurnEnv):
    """Asks about the pictures of the prompt; with `max_turns=2` about one more, after the first reply."""

    async def env_response(self, messages, state, **kwargs) -> list[dict]:
        return ask([state["info"]["next_picture"]], NEXT_QUESTION)


def load_environment(
    num_train_examples: int = 1024,
    num_eval_examples: int = 256,
    image_size: int = 56,
    images_per_prompt: int = 1,
    blind: bool = False,
    seed: int = 0,
    turns: int = 1,
    colour_names: dict[str, str] | None = None,
) -> vf.MultiTurnEnv:
    """The environment, as `verifiers.load_environment("shapes-env", ...)` makes it.

    Args:
        num_train_examples, num_eval_examples: rows of the two data sets, at least 1 each.
        image_size: edge of a picture in pixels, at least 8.
        images_per_prompt: 1, or 2 with a question that needs both pictures.
        blind: every picture is the same grey (see above).
        seed: of the data; train and eval pictures differ for every seed.
        turns: 1, or 2 with a new picture and a second question after the first reply. The first turn's pictures do not
            depend on it.
        colour_names: what the answers call some of the colours, a word each, no two alike.
    """
    counts = dict(num_train_examples=(num_train_examples, 1), num_eval_examples=(num_eval_examples, 1))
    for name, (value, least) in {**counts, "image_size": (image_size, 8)}.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: must be a whole number, at least {least}")
    for name, value in dict(images_per_prompt=images_per_prompt, turns=turns).items():
        if value not in (1, 2):
            raise ValueError(f"{name}={value!r}: must be 1 or 2")

    names = {**{colour: colour for colour in COLOURS}, **(colour_names or {})}
    words = [name for name in names.values() if isinstance(name, str) and re.fullmatch(r"\w+", name)]
    if names.keys() != COLOURS.keys() or len(set(words)) < len(names):
        raise ValueError(f"colour_names={colour_names!r}: must give a word to some of {list(COLOURS)}, no two alike")

    def rows(split: str, count: int) -> Dataset:
        streams = [random.Random(f"shapes {seed} {split} {i}") for i in range(count)]
        made = [make_example(rng, image_size, images_per_prompt, blind, turns) for rng in streams]
        called = [re.sub(r"\w+", lambda word: names.get(word[0], word[0]), example["answer"]) for example in made]
        return Dataset.from_list([{**example, "answer": answer} for example, answer in zip(made, called)])

    train, evaluation = rows("train", num_train_examples), rows("eval", num_eval_examples)
    rubric = make_rubric(names.values())
    return ShapesEnv(dataset=train, eval_dataset=evaluation, rubric=rubric, parser=rubric.parser, max_turns=turns)
