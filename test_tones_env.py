"""Tests of the tones environment: sounds and answers, what a deaf policy could know, the rubric.

    pytest test_tones_env.py

What a sound plays is read off its spectrum again.
"""

import asyncio
import base64
import io
import json
import wave
from collections import Counter

import numpy as np
import pytest
import verifiers as vf

from conftest import message
from tones_env import INTERVALS, PITCHES, load_environment, make_rubric, wav


def tones(**arguments):
    return vf.load_environment("tones-env", **{"num_train_examples": 24, "num_eval_examples": 24, **arguments})


def sounds(row):
    return [part["input_audio"]["data"] for part in row["prompt"][0]["content"] if part["type"] == "input_audio"]


def samples(data, rate=16000):
    """The samples of a sound in base64, float64."""
    with wave.open(io.BytesIO(base64.b64decode(data))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (rate, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15


def heard(data, rate=16000):
    """The pitch in Hz of each tone of a sound: where it is loud, and the largest peak of its spectrum there."""
    signal = samples(data, rate)
    window = rate // 200  # 5 ms
    level = np.sqrt(np.convolve(signal**2, np.ones(window) / window, "same"))
    edges = np.flatnonzero(np.diff(np.r_[0, (level > 0.06).astype(int), 0]))
    pitches = []
    for start, stop in edges.reshape(-1, 2):
        tone = signal[start:stop]
        spectrum = np.abs(np.fft.rfft(tone * np.hanning(len(tone)), 2**17))
        pitches.append(spectrum.argmax() * rate / 2**17)
    return pitches


@pytest.mark.parametrize(("sounds_per_prompt", "rate"), [(1, 16000), (2, 16000), (1, 24000)])
def test_the_answer_is_what_the_sounds_play(sounds_per_prompt, rate):
    env = tones(sounds_per_prompt=sounds_per_prompt, sampling_rate=rate)
    for row in [*env.get_dataset(), *env.get_eval_dataset()]:
        assert len(sounds(row)) == sounds_per_prompt
        first, second = (pitch for data in sounds(row) for pitch in heard(data, rate))
        assert row["answer"] == ("first" if first > second else "second")
        lower, higher = sorted((first, second))
        assert PITCHES[0] - 5 < lower < higher < PITCHES[1] + 5  # tones of 0.2 s are told apart to 5 Hz
        assert INTERVALS[0] - 0.3 < 12 * np.log2(higher / lower) < INTERVALS[1] + 0.3


def test_each_answer_is_right_in_half_of_the_examples():
    env = tones(num_train_examples=64, num_eval_examples=50)
    assert Counter(env.get_dataset()["answer"]) == {"first": 32, "second": 32}
    assert Counter(env.get_eval_dataset()["answer"]) == {"first": 25, "second": 25}


def test_one_tone_alone_does_not_tell_the_answer():
    """The best guess from the first tone's pitch, with a threshold that knows all of them, is far from right."""
    rows = list(tones(num_train_examples=512).get_dataset())
    firsts = np.array([heard(sounds(row)[0])[0] for row in rows])
    second_is_higher = np.array([row["answer"] == "second" for row in rows])
    right = max(np.mean((firsts < threshold) == second_is_higher) for threshold in firsts)
    assert 0.6 < right < 0.9


def test_no_sound_comes_twice_in_training_and_evaluation_of_any_seed():
    envs = [tones(seed=seed, sounds_per_prompt=2) for seed in (0, 1, 2)]
    played = [data for env in envs for split in (env.get_dataset(), env.get_eval_dataset()) for row in split
              for data in sounds(row)]  # fmt: skip
    assert len(set(played)) == len(played) == 3 * 48 * 2
    again = tones(seed=1, sounds_per_prompt=2)
    assert list(again.get_dataset()) == list(envs[1].get_dataset())
    assert list(again.get_eval_dataset()) == list(envs[1].get_eval_dataset())


def test_sounds_differ_in_length_loudness_and_noise():
    played = [samples(data) for row in tones().get_dataset() for data in sounds(row)]
    assert len({len(sound) for sound in played}) == 24
    assert 0.4 < min(map(len, played)) / 16000 and max(map(len, played)) / 16000 < 1
    peaks = [np.abs(sound).max() for sound in played]
    noise = [sound[:400].std() for sound in played]  # the pause in front is longer
    assert max(peaks) > 1.5 * min(peaks) and max(peaks) < 1 and max(noise) > 3 * min(noise) > 0


@pytest.mark.parametrize("sounds_per_prompt", [1, 2])
def test_a_deaf_environment_plays_one_silence_and_is_the_same_else(sounds_per_prompt):
    hearing, deaf = (tones(deaf=deaf, sounds_per_prompt=sounds_per_prompt) for deaf in (False, True))
    played = {data for row in [*deaf.get_dataset(), *deaf.get_eval_dataset()] for data in sounds(row)}
    assert len(played) == 1 and not samples(*played).any() and len(samples(*played)) == 8000
    for row, other in zip(hearing.get_dataset(), deaf.get_dataset()):
        assert row["answer"] == other["answer"] and len(sounds(row)) == len(sounds(other))
        assert row["prompt"][0]["content"][-1] == other["prompt"][0]["content"][-1]


def test_a_wav_holds_the_samples_to_half_a_step_of_16_bits():
    sound = np.random.default_rng(0).uniform(-1, 1, 999)
    np.testing.assert_allclose(samples(wav(sound, 16000)) * 2**15 / (2**15 - 1), sound, atol=0.51 / 2**15)


def test_arrow_and_verifiers_carry_the_sounds_through():
    """A dataset gives every content part the fields of all; as verifiers' types and without them they are as made."""
    row = tones().get_dataset()[0]
    (sound,) = sounds(row)
    (parsed,) = [vf.types.UserMessage.model_validate(message) for message in row["prompt"]]
    parts = json.loads(parsed.model_dump_json(exclude_none=True))["content"]
    assert parts[0] == {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
    assert parts[1] == {"type": "text", "text": "Which tone is higher , first or second ?"}


@pytest.mark.parametrize(
    ("reply", "heard", "form", "exact"),
    [
        ("first", 1, 1, 1), (" first \n", 1, 1, 1), ("second", 0, 1, 0), ("first second", 1, 1 / 2, 0),
        ("second first", 0, 1 / 2, 0), ("the first", 1, 1 / 2, 0), ("secondfirst", 0, 1 / 2, 0),
        ("First", 0, 0, 0), ("red", 0, 0, 0), ("", 0, 0, 0), (None, 0, 0, 0),
    ],
)  # fmt: skip
def test_the_rubric_gives_partial_credit_for_the_word_and_the_form(reply, heard, form, exact):
    rubric, state = make_rubric(), {"prompt": message("?"), "answer": "first", "trajectory": []}
    state["completion"] = [{"role": "assistant", "content": reply}]
    asyncio.run(rubric.score_group([state]))
    assert state["metrics"] == {"heard": heard, "form": form, "exact": exact}
    assert state["reward"] == pytest.approx(0.4 * heard + 0.2 * form + 0.4 * exact)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_examples", 0), ("num_eval_examples", -2), ("num_train_examples", 7), ("num_eval_examples", 2.0),
        ("sampling_rate", 4000), ("sampling_rate", 16000.0), ("sounds_per_prompt", 3), ("sounds_per_prompt", 0),
    ],
)  # fmt: skip
def test_an_impossible_argument_of_the_environment_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be"):
        load_environment(**{name: value})
