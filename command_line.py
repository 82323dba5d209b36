"""The command line: what is asked for, one line where it cannot be done, a screen that may be gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Headings of --help, each above the settings from this one on, in the order of the config
HEADINGS = {
    "output_dir": "the run: where, how long, what is kept",
    "env_id": "environment and media",
    "rollouts_per_step": "rollouts",
    "vllm_server_host": "a vLLM server for them",
    "loss_type": "the method",
    "learning_rate": "optimizer",
    "lora_rank": "what is trained",
    "param_dtype": "precision, memory, more GPUs",
    "adapter": "the model",
}


def parse_arguments(
    kind: type, demo: dict[str, Any], doc: str, families: Iterable[str], argv: Sequence[str] | None
) -> tuple[Any, Any]:
    """(config of this kind, --adapter, --model and --demo). --help and what cannot be understood end the program.

    Args:
        demo: the settings of --demo, which hold where no --model is given.
        doc: its first paragraph opens --help.
        families: names of adapters.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--adapter", choices=sorted(families), default="auto", help="auto: by the model's processor")
    parser.add_argument("--model", help="checkpoint, a name or a folder; unset: a tiny one of the --adapter's family")
    parser.add_argument("--demo", action="store_true", help="settings for the tiny model, implied without --model")
    parser.set_defaults(output_dir=time.strftime("runs/%Y%m%d-%H%M%S-") + str(os.getpid()))  # no other run's
    under_headings(parser)
    known, _ = parser.parse_known_args(argv)  # no config yet: the rules hold for the settings of the run
    if known.demo or known.model is None:
        parser.set_defaults(**demo, demo=True)
    if known.resume_from_checkpoint not in (None, "true"):  # a checkpoint lies in the folder of its run
        parser.set_defaults(output_dir=str(Path(known.resume_from_checkpoint).parent))
    try:
        config, arguments = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    return config, arguments


def under_headings(parser: ArgumentParser) -> None:
    """Give --help the HEADINGS."""
    (options,) = (group for group in parser._action_groups if group.title == "options")
    group, own = options, []
    for action in options._group_actions:
        group = parser.add_argument_group(HEADINGS[action.dest]) if action.dest in HEADINGS else group
        action.option_strings = [name for name in action.option_strings if "-" not in name[2:]]  # --a-b is --a_b too
        (own if group is options else group._group_actions).append(action)
    options._group_actions[:] = own
    parser._action_groups.insert(2, parser._action_groups.pop())  # the model first
    parser.usage = "%(prog)s [--adapter FAMILY] [--model CHECKPOINT] [--SETTING VALUE ...]"


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], code: int) -> Iterator[None]:
    """Errors of these kinds are the user's to mend, and one line says what to do; the program ends with this code. The
    traceback is shown where MM_GRPO_TRACEBACK is set."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except kinds as error:
        if os.environ.get("MM_GRPO_TRACEBACK"):
            raise
        said = " ".join(str(error).split())[:1000]
        plain = said and isinstance(error, ValueError | RuntimeError | OSError)
        Screen("stderr").write(f"mm_grpo.py: error: {'' if plain else type(error).__name__ + ': '}{said}\n")
        raise SystemExit(code) from None


class Screen:
    """stdout or stderr as a file that never fails: a screen that is gone (a full disk, a closed pipe) ends no run."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self.name), name)

    def write(self, text: str) -> None:
        stream = getattr(sys, self.name)
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # from here on it goes nowhere
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def flush(self) -> None:
        """Done with each write."""


def say(text: str) -> None:
    Screen("stdout").write(text + "\n")
