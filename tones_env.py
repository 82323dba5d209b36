"""tones-env: a verifiers environment that only a policy which hears can solve.

Each example plays two tones, one after the other, and asks which is higher. Pitch, interval, loudness, phase, length,
pauses and noise vary from sound to sound; training and evaluation examples come from disjoint random streams. The
answer is one word, `first` or `second`, each of them right in every other example.

    env = verifiers.load_environment("tones-env", num_train_examples=512, sounds_per_prompt=2)

`deaf=True` replaces every sound by the same silence and leaves all else as it is: what a policy still scores then, it
scores without listening (the control of the experiment).
"""

from __future__ import annotations

import base64
import io
import re
import wave
from statistics import fmean

import numpy as np
import verifiers as vf
from datasets import Dataset

ANSWERS = ("first", "second")
# Both tones in one sound, or a tone in each of two
QUESTIONS = {1: "Which tone is higher , first or second ?", 2: "Which sound is higher , first or second ?"}
PITCHES = (300.0, 2400.0)  # lowest and highest, in Hz
INTERVALS = (9.0, 18.0)  # between the two tones, in semitones
SILENCE = 0.5  # seconds, where a policy is deaf


def play(pitches: list[float], sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """These tones one after the other, float64 in [-1, 1]; everything but their pitch in Hz is drawn from `rng`."""
    pause = lambda: np.zeros(round(rng.uniform(0.03, 0.1) * sampling_rate))
    pieces = [pause()]
    for pitch in pitches:
        seconds = np.arange(round(rng.uniform(0.2, 0.3) * sampling_rate)) / sampling_rate
        edges = np.minimum(1, np.minimum(seconds, seconds[::-1]) / 0.01)  # 10 ms to swell and to fade: no clicks
        phase, loudness = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.8)
        pieces += [loudness * edges * np.sin(2 * np.pi * pitch * seconds + phase), pause()]
    sound = np.concatenate(pieces)
    return sound + rng.uniform(0.001, 0.01) * rng.standard_normal(len(sound))


def wav(sound: np.ndarray, sampling_rate: int) -> str:
    """A WAV file, one channel of 16 bits a sample, in base64: lossless, as any other format would not be."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, sampling_rate, 0, "NONE", ""))
        file.writeframes((sound * (2**15 - 1)).round().astype("<i2").tobytes())
    return base64.b64encode(buffer.getvalue()).decode()


def draw_pitches(answer: str, rng: np.random.Generator) -> list[float]:
    """Two pitches in Hz, of which the one that the answer names is higher. One of them alone does not tell which."""
    interval = 2 ** (rng.uniform(*INTERVALS) / 12)
    lower = PITCHES[0] * (PITCHES[1] / interval / PITCHES[0]) ** rng.uniform()
    return [lower * interval, lower] if answer == "first" else [lower, lower * interval]


def make_example(rng: np.random.Generator, answer: str, sampling_rate: int, sounds_per_prompt: int, deaf: bool) -> dict:
    """One row of the dataset: `prompt` (chat messages, the sounds in front of the question) and `answer`."""
    pitches = draw_pitches(answer, rng)
    sounds = [play(tones, sampling_rate, rng) for tones in ([pitches] if sounds_per_prompt == 1 else zip(pitches))]
    if deaf:
        sounds = [np.zeros(round(SILENCE * sampling_rate)) for _ in sounds]
    files = [{"data": wav(sound, sampling_rate), "format": "wav"} for sound in sounds]
    content = [{"type": "input_audio", "input_audio": file} for file in files]
    content += [{"type": "text", "text": QUESTIONS[sounds_per_prompt]}]
    return {"prompt": [{"role": "user", "content": content}], "answer": answer}


def make_rubric() -> vf.Rubric:
    """Partial credit: 0.4 where the first of the two words in the reply is the right one; 0.2 for the form: half of it
    where one of them is there, half where nothing else is; 0.4 for `exact`, the right word and nothing else."""
    parser = vf.Parser(extract_fn=str.strip)

    def named(reply: str | None) -> str:
        """The answer that comes first in the reply, if there is one."""
        found = re.search("|".join(ANSWERS), reply or "")
        return found[0] if found else ""

    def heard(parser, completion, answer) -> float:
        return float(named(parser.parse_answer(completion)) == answer)

    def form(parser, completion) -> float:
        reply = parser.parse_answer(completion)
        return fmean([named(reply) != "", reply in ANSWERS])

    def exact(parser, completion, answer) -> float:
        return float(parser.parse_answer(completion) == answer)

    return vf.Rubric(funcs=[heard, form, exact], weights=[0.4, 0.2, 0.4], parser=parser)


def load_environment(
    num_train_examples: int = 1024,
    num_eval_examples: int = 256,
    sampling_rate: int = 16000,
    sounds_per_prompt: int = 1,
    deaf: bool = False,
    seed: int = 0,
) -> vf.SingleTurnEnv:
    """The environment, as `verifiers.load_environment("tones-env", ...)` makes it.

    Args:
        num_train_examples, num_eval_examples: rows of the two data sets, at least 2 each, an even number: half of the
            answers are `first`.
        sampling_rate: in Hz, at least 8000; the one that the model's processor takes.
        sounds_per_prompt: 1, or 2 with one tone in each.
        deaf: every sound is the same silence (see above).
        seed: of the data; train and eval sounds differ for every seed.
    """
    for name, value in (("num_train_examples", num_train_examples), ("num_eval_examples", num_eval_examples)):
        if not isinstance(value, int) or value < 2 or value % 2:
            raise ValueError(f"{name}={value!r}: must be an even whole number, at least 2")
    if not isinstance(sampling_rate, int) or sampling_rate < 8000:
        raise ValueError(f"sampling_rate={sampling_rate!r}: must be a whole number, at least 8000")
    if sounds_per_prompt not in QUESTIONS:
        raise ValueError(f"sounds_per_prompt={sounds_per_prompt!r}: must be one of {list(QUESTIONS)}")

    def rows(split: str, count: int) -> Dataset:
        streams = [np.random.default_rng(list(f"tones {seed} {split} {i}".encode())) for i in range(count)]
        arguments = sampling_rate, sounds_per_prompt, deaf
        return Dataset.from_list([make_example(rng, ANSWERS[i % 2], *arguments) for i, rng in enumerate(streams)])

    train, evaluation, rubric = rows("train", num_train_examples), rows("eval", num_eval_examples), make_rubric()
    return vf.SingleTurnEnv(dataset=train, eval_dataset=evaluation, rubric=rubric, parser=rubric.parser)
