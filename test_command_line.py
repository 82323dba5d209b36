"""Tests of the command line: which settings hold, what --help says of them, what is printed before a run begins.

pytest test_command_line.py
"""

from dataclasses import asdict, fields

import pytest

from adapters import ADAPTERS
from command_line import HEADINGS, parse_arguments
from local_server import LocalServer
from mm_grpo import DEMO, MultimodalRLConfig, main

OWN = asdict(MultimodalRLConfig())


def parse(*arguments):
    config, rest = parse_arguments(MultimodalRLConfig, DEMO, "", ADAPTERS, ["--adapter", "qwen", *arguments])
    settings = asdict(config)
    settings.pop("output_dir")  # the command line's own default has the time in it
    return settings, rest


def with_changes(**changes):
    return {name: value for name, value in (OWN | changes).items() if name != "output_dir"}


def test_with_a_model_the_methods_own_settings_hold():
    settings, rest = parse("--model", "some/checkpoint")
    assert settings == with_changes() and not rest.demo and rest.model == "some/checkpoint"


@pytest.mark.parametrize("arguments", [[], ["--demo"], ["--model", "some/checkpoint", "--demo"]])
def test_the_demonstrations_settings_hold_without_a_model_and_where_they_are_asked_for(arguments):
    settings, rest = parse(*arguments)
    assert settings == with_changes(**DEMO) and rest.demo


def test_what_is_given_goes_before_the_demonstrations_settings():
    settings, _ = parse("--beta", "0", "--max_steps", "7", "--seed", "3")
    assert settings == with_changes(**DEMO | {"beta": 0.0, "max_steps": 7, "seed": 3})


def test_help_shows_each_setting_once_under_its_heading(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    headings = [line.removesuffix(":") for line in said.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["options", "the model", *[name for name in HEADINGS.values() if name != "the model"]]
    assert all(said.count(f"  --{f.name} ") == 1 for f in fields(MultimodalRLConfig))
    of_the_method = said[said.index("the method:") : said.index("optimizer:")]
    assert "--loss_type" in of_the_method and "--beta" in of_the_method and "--optim" not in of_the_method
    assert "--max-steps" not in said and parse("--max-steps", "7")[0]["max_steps"] == 7  # both spellings are understood


def test_the_rules_hold_for_the_settings_of_the_run_and_not_for_those_that_the_demonstration_replaces():
    """A step of 12 was refused as no multiple of 8, the method's own group size, where the run's is 4."""
    settings, _ = parse("--rollouts_per_step", "12", "--max_concurrent", "4")
    assert (settings["rollouts_per_step"], settings["max_concurrent"]) == (12, 4)
    with pytest.raises(SystemExit):
        parse("--rollouts_per_step", "10")


def test_only_the_model_decides_not_a_word_that_looks_like_it():
    """The word --model was looked for in the whole line: a folder called x--model-y turned the demonstration off."""
    settings, rest = parse("--env_id", "x--model-y")
    assert rest.demo and settings["learning_rate"] == DEMO["learning_rate"]


@pytest.mark.parametrize("arguments", [["--mode", "some/checkpoint"], ["--learning", "1"]])
def test_an_abbreviation_is_refused(arguments, capsys):
    """--mode DIR was taken for --model DIR, and a real model was trained with the demonstration's settings."""
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2 and f"not used by the HfArgumentParser: {arguments}" in capsys.readouterr().err


def test_help_gives_each_field_its_line_and_its_own_default(capsys):
    """It showed the demonstration's values as the method's."""
    with pytest.raises(SystemExit) as end:
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for f in fields(MultimodalRLConfig):
        if f.name != "output_dir":
            line = f"{' '.join(f.metadata['help'].split())} (default: {f.default})"
            assert line in said, line


@pytest.mark.filterwarnings("ignore")
def test_a_run_says_first_which_settings_are_the_demonstrations_and_closes_its_server_at_the_end(
    tmp_path, capsys, monkeypatch
):
    closed = []
    monkeypatch.setattr(LocalServer, "close", lambda self: closed.append(self))
    command = ["--adapter", "llava", "--max_steps", "0", "--eval_examples", "2", "--output_dir", str(tmp_path / "out")]
    main([*command, "--env_args", '{"num_train_examples": 2, "num_eval_examples": 2}'])
    first, model, rollouts, before, *_ = capsys.readouterr().out.splitlines()
    for name, value in (DEMO | {"max_steps": 0}).items():
        assert f"{name}={value}" in first
    assert "LlavaForConditionalGeneration, 0.3" in model and rollouts == "rollouts in this process"
    assert before.startswith("before training: reward")
    assert len(closed) == 1
