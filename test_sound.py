"""Tests of sound on its way from chat messages into the model's forward, and of the gradient back to the features.

    pytest test_sound.py

The model is a tiny Qwen2-Audio. A batch is held against the model's own forward of each row alone, on what the family's
feature extractor makes of each sound by itself; `load_audio` against samples that are written here byte by byte.
"""

import base64
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import verifiers as vf
from datasets import Dataset
from transformers import Phi4MultimodalFeatureExtractor

from adapters import ProcessorAdapter
from conftest import make_trainer, message, picture
from media import load_audio, pack_media, take_spans
from mm_grpo import DEMO, score
from shared_prefix import find_shared_prompts
from tiny_vlm import make_tiny
from tones_env import make_rubric, wav

SAME = dict(rtol=0, atol=1e-5)  # as in test_multimodal_inputs.py: float32 sums in another order


# ---------------------------------------------------------------- load_audio


def wav_file(samples, channels=1, rate=16000, bits=16, kind=1) -> bytes:
    """A WAV file by its specification; `samples` are whole numbers, those of the channels in turn."""
    width = bits // 8
    body = b"".join(int(sample).to_bytes(width, "little", signed=bits > 8) for sample in samples)
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width, channels * width, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def load(file: bytes | str, rate=16000):
    data = file if isinstance(file, str) else base64.b64encode(file).decode()
    return load_audio({"data": data, "format": "wav"}, rate)


EXTREMES = [0, 1, -1, 2**15 - 1, -(2**15), 12345]


def test_a_sound_is_its_samples_between_minus_one_and_one():
    loaded = load(wav_file(EXTREMES))
    assert loaded.dtype == np.float32 and loaded.tolist() == [sample / 2**15 for sample in EXTREMES]


def test_channels_are_averaged():
    left, right = EXTREMES, [100, -3, 2**15 - 1, 2**15 - 1, -(2**15), 0]
    loaded = load(wav_file([sample for both in zip(left, right) for sample in both], channels=2))
    assert loaded.tolist() == [(one + other) / 2 / 2**15 for one, other in zip(left, right)]


def test_the_rate_is_the_models():
    assert len(load(wav_file(EXTREMES, rate=24000), rate=24000)) == 6


GOOD = wav_file(EXTREMES)
NOT_READ = {  # the file, or its base64; what the message says
    "another rate": (wav_file(EXTREMES, rate=44100), "44100 Hz; .* 16 bits at 16000 Hz: convert it in the environment"),
    "8 bits": (wav_file([128, 129], bits=8), "8 bits a sample.*16 bits at 16000 Hz: convert it in the environment"),
    "24 bits": (wav_file(EXTREMES, bits=24), "24 bits a sample.*16 bits"),
    "floating point": (wav_file(EXTREMES, bits=32, kind=3), "cannot be read as WAV .unknown format: 3"),
    "mp3": (b"\xff\xfb\x90\x64" + bytes(400), "cannot be read as WAV.*other formats are not read"),
    "mp3 with a title": (b"ID3\x04" + bytes(400), "cannot be read as WAV.*other formats are not read"),
    "no bytes": (b"", "cannot be read as WAV"),
    "no samples": (wav_file([]), "0 bytes"),
    "half a sample": (GOOD[:-1], "cannot be read as WAV"),
    "a header that is cut off": (GOOD[:30], "cannot be read as WAV"),
    "bad base64": ("UklGR!!!", "cannot be read as WAV"),
    "a web address": ("https://sounds.example/one.wav", "cannot be read as WAV"),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_not_read_is_an_error_that_says_what_is(case):
    file, text = NOT_READ[case]
    with pytest.raises(ValueError, match=f"input_audio: .*{text}"):
        load(file)


def test_a_damaged_file_is_read_or_refused_and_nothing_else():
    rng = np.random.default_rng(0)
    damaged = [GOOD[:n] for n in range(len(GOOD))]
    for _ in range(2000):
        file = bytearray(GOOD)
        for place in rng.integers(0, len(file), rng.integers(1, 4)):
            file[place] = rng.integers(256)
        damaged.append(bytes(file))
    read = 0
    for file in damaged:
        try:
            loaded = load(file)
        except ValueError as error:
            assert "input_audio: " in str(error)
        else:
            read += 1
            assert loaded.ndim == 1 and len(loaded) and np.abs(loaded).max() <= 1
    assert 0 < read < len(damaged)


# ---------------------------------------------------------------- into the model


def tone(pitch: float, seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * 16000)) / 16000)


def part(sound: np.ndarray) -> dict:
    return {"type": "input_audio", "input_audio": {"data": wav(sound, 16000), "format": "wav"}}


SHORT, LONG, FULL = tone(440, 0.3), tone(1500, 1.1), tone(700, 2.0)
PROMPTS = [[SHORT, LONG], [], [FULL], [LONG]]  # two sounds of different lengths, none, as long as the model hears


@pytest.fixture(scope="module")
def audio():
    """(model, adapter); tests must leave the weights as they are."""
    model, processor = make_tiny("qwen2_audio")
    return model, ProcessorAdapter(processor, model.config)


@pytest.fixture(scope="module")
def rolled_out(audio):
    """(trainer, outputs, batch): two rollouts of each prompt, through verifiers and the server in this process."""
    rows = [{"prompt": message(*map(part, sounds), "Which one ?"), "answer": "first"} for sounds in PROMPTS]
    env = vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=make_rubric())
    trainer = make_trainer(env=env, tiny=audio, max_tokens=4, rollouts_per_step=8, rollouts_per_example=2)
    outputs = trainer.rollouts.collect()
    return trainer, outputs, trainer.adapter.build_batch(outputs)


def sounds_of(outputs, batch, row):
    return PROMPTS[outputs["outputs"][int(batch.rollout_ids[row])]["example_id"]]


def features(adapter, sounds) -> dict[str, torch.Tensor]:
    """What the family's feature extractor makes of each sound by itself, under the forward's names."""
    extract = dict(sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="pt")
    each = [adapter.processor.feature_extractor((s * (1 - 2**-15) * 2**15).round() / 2**15, **extract) for s in sounds]
    names = {"input_features": "input_features", "attention_mask": "feature_attention_mask"}
    return {names[name]: torch.cat([one[name] for one in each]) for name in names} if each else {}


def test_placeholders_are_as_many_as_the_models_tower_has_features(audio, rolled_out):
    (model, adapter), (_, outputs, batch) = audio, rolled_out
    assert len(batch) == 8
    for row, ids in enumerate(batch.input_ids):
        media, expected = features(adapter, sounds_of(outputs, batch, row)), 0
        if media:
            lengths = media["feature_attention_mask"].sum(-1)
            expected = int(model.model.audio_tower._get_feat_extract_output_lengths(lengths)[1].sum())
        assert (ids == adapter.processor.audio_token_id).sum() == expected
    assert adapter.placeholder_ids == [adapter.processor.audio_token_id]


@torch.no_grad()
def test_a_batch_gives_each_row_the_logprobs_of_the_row_alone(audio, rolled_out):
    """Sounds of different lengths, two in a row, one and none: with the mask of its own frames each."""
    (model, adapter), (_, outputs, batch) = audio, rolled_out
    in_batch, _ = score(model, batch)
    spans = batch.media_spans["input_features"]
    assert sorted(spans.diff(dim=-1).flatten().tolist()) == [0, 0, 1, 1, 1, 1, 2, 2]
    assert len(batch.extra_model_kwargs["input_features"]) == 4  # a group's sounds once
    for row in range(len(batch)):
        media = features(adapter, sounds_of(outputs, batch, row))
        ids = batch.input_ids[row, : int(batch.attention_mask[row].sum())]
        logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **media).logits
        plain = logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(in_batch[row, : len(ids) - 1], plain, **SAME)
        alone, _ = score(model, batch.select([row]))
        torch.testing.assert_close(alone[0, : len(ids) - 1], plain, **SAME)
        for name, tensor in media.items():
            assert torch.equal(
                take_spans(batch.extra_model_kwargs[name], [batch.media_spans[name][row].tolist()]), tensor
            )


def test_the_server_heard_what_the_trainer_hears_and_each_prompt_once_is_the_same(rolled_out):
    """Logprobs behind the server's cache, of the plain forward, and of prompts that are run once; gradients too."""
    trainer, _, batch = rolled_out
    model, banned = trainer.model, trainer.adapter.placeholder_ids
    trained = batch.loss_mask[:, 1:] == 1
    shared = find_shared_prompts(model, batch, banned)
    assert len(shared.lengths) == 4
    results = []
    for prompts in (None, shared):
        heard = batch.extra_model_kwargs["input_features"].clone().requires_grad_()
        with_gradient = replace(batch, extra_model_kwargs={**batch.extra_model_kwargs, "input_features": heard})
        if prompts:
            prompts = find_shared_prompts(model, with_gradient, banned)
        logprobs = score(model, with_gradient, 1.0, banned, prompts)[0][trained]
        logprobs.sum().backward()
        torch.testing.assert_close(logprobs.detach(), batch.behavior_logprobs[:, 1:][trained], **SAME)
        results.append(heard.grad)
        model.zero_grad(set_to_none=True)
    assert (results[0].flatten(1).norm(dim=1) > 1e-6).all()  # every sound
    torch.testing.assert_close(*results, rtol=0, atol=1e-4 * results[0].abs().max().item())


@torch.no_grad()
def test_other_sounds_move_the_logprobs_by_far_more_than_the_tolerance(audio, rolled_out):
    """Else the comparisons of this file would pass with sounds lost or exchanged, or the mask of their frames."""
    (model, _), (_, _, batch) = audio, rolled_out
    trained = batch.loss_mask[:, 1:] == 1
    logprobs = score(model, batch)[0]
    media = batch.extra_model_kwargs
    has_sound = batch.media_spans["input_features"].diff(dim=-1) > 0  # (B, 1)
    for name, change in (("input_features", lambda t: t.roll(1, 0)), ("input_features", lambda t: t.roll(1, 2))):
        moved = (
            score(model, replace(batch, extra_model_kwargs={**media, name: change(media[name])}))[0] - logprobs
        ).abs()
        assert moved[trained & has_sound].max() > 100 * SAME["atol"]
        assert moved[trained & ~has_sound].max() == 0


def test_sounds_of_different_lengths_are_refused_where_the_processor_left_out_what_tells_them_from_padding():
    """Phi 4's makes a mask for several sounds only: of prompts with one each, the shorter one's padding was heard."""
    extract = Phi4MultimodalFeatureExtractor()
    processor = SimpleNamespace(get_attributes=lambda: ["audio_processor", "tokenizer"], audio_processor=extract)
    short, long, both, more = (
        dict(extract(sounds, sampling_rate=16000)) for sounds in ([SHORT], [LONG], [SHORT, LONG], [FULL, SHORT])
    )
    for media in ([short, long], [short, both], [None, short, long]):
        with pytest.raises(ValueError, match="audio_input_features: .* different sizes .* audio_attention_mask"):
            pack_media(media, processor)
    packed, _ = pack_media([both, None, more], processor)
    frames = [len(one["audio_input_features"][0]) for one in (short, long, more, short)]
    assert packed["audio_attention_mask"].sum(-1).tolist() == frames
    assert len(pack_media([long, dict(long)], processor)[0]["audio_input_features"]) == 2


@pytest.mark.parametrize("sounds_per_prompt", [1, 2])
def test_every_first_update_is_on_policy(sounds_per_prompt):
    model, processor = make_tiny("qwen2_audio")
    tiny = model, ProcessorAdapter(processor, model.config)
    env = vf.load_environment(
        "tones-env", num_train_examples=16, num_eval_examples=2, sounds_per_prompt=sounds_per_prompt
    )
    tower = [parameter for parameter in model.model.audio_tower.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in tower]
    trainer = make_trainer(env=env, tiny=tiny, **{**DEMO, "rollouts_per_step": 32, "max_tokens": 4})
    for _ in range(6):  # until some rewards differ
        metrics = trainer.step()
        assert abs(metrics["ratio_min"] - 1) <= 1e-4 and abs(metrics["ratio_max"] - 1) <= 1e-4
        assert metrics["rollouts_dropped"] == 0 and metrics["shared_prefix_fraction"] > 0.9
    moved = [not torch.equal(*pair) for pair in zip(before, tower)]
    assert all(moved)


def test_sound_for_a_model_that_sees_and_a_picture_for_one_that_hears_are_refused(audio, tiny):
    for adapter, shown in ((audio[1], picture()), (tiny[1], part(SHORT))):
        with pytest.raises(ValueError, match=f"{shown['type']}(' is not supported|, but 0 in the prompt)"):
            adapter.encode_prompt(message(shown, "Which one ?"))
