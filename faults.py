"""What goes wrong in a run of days, whatever it trains: signals, steps without rollouts, memory, broken gradients."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; a scheduler, `kill`; a terminal that is closed
PAUSES = (1.0, 10.0, 60.0)  # seconds before a step that had nothing to train on is tried again
MAX_SKIPPED = 5  # updates in a row whose gradient is not finite, until the run stops
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


@contextlib.contextmanager
def deferred_signals(announce: bool = False) -> Iterator[list[int]]:
    """Signals that would end the process wait until the block ends; then they do what they always do.

    Yields:
        The signals that came, for the block to look at; emptied where it has dealt with them. Outside of the main
        thread, where Python handles no signals, it stays empty. One that is ignored (nohup) stays ignored.
    """
    came: list[int] = []

    def note(number: int, frame) -> None:
        if announce and not came:  # os.write: a handler must not print, the program may be printing
            text = f"\n{signal.Signals(number).name}: the run stops after this step, with a checkpoint\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        came.append(number)

    ours = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    before = {number: signal.signal(number, note) for number in ours}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def end_by(number: int) -> None:
    """End as a process does that this signal ends: KeyboardInterrupt, or exit code 128 + its number."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def after_pauses(
    work: Callable[[], Result], error: type[Exception], came: list[int], agree: Callable[[list], list] = list
) -> Result:
    """The work's result. Where it raises this error it is tried again after each of PAUSES; a signal ends a pause, and
    the process with those that `agree` with it on which signals came."""
    for pause in PAUSES:
        try:
            return work()
        except error as reason:
            warnings.warn(f"{reason}. Tried again in {pause:g} s")
        until = time.monotonic() + pause
        while time.monotonic() < until and not came:
            time.sleep(0.05)
        if agreed := agree(came):
            end_by(agreed[0])
    return work()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's (torch.OutOfMemoryError) or the process's own."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def halving(
    work: Callable[[int], Result], size: int, clean_up: Callable[[], None], again: bool = True
) -> tuple[Result, int]:
    """(result, size) of `work(size)`. Where memory runs out it starts again from its beginning with half the size, down
    to 1; the size that fits is said in one warning. Not where it may not start `again`: the ranks of a sharded model
    make the same passes or none."""
    reason = ""
    while True:
        try:
            result = work(size)
            break
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not again or not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0][:200]
        clean_up()  # here, where the error no longer holds on to what it had made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
    if reason:
        warnings.warn(f"out of memory ({reason}): from here on micro-batches of {size} tokens, with the same gradients")
    return result, size


class RunStopped(RuntimeError):
    """A run that cannot go on; what it has learned is saved."""


def stop_where_skipped(times: int, batch: dict, output_dir: str) -> None:
    """Raises RunStopped after MAX_SKIPPED times in a row, with the last batch, that of the first rank, in a file
    (`torch.load` reads it)."""
    if times < MAX_SKIPPED:
        return
    path = Path(output_dir) / "not_finite.pt"
    with contextlib.suppress(OSError, RuntimeError):
        batch and torch.save(batch, path)
    raise RunStopped(
        f"the gradient was not finite {times} times in a row, so the run stops; the weights are as they were before. "
        f"Usual causes: a learning_rate or beta that is too large, broken weights. The batch: {path}"
    )
