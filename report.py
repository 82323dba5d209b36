"""What a run says of itself: metrics of a step's rollouts, the folder they are logged in, a picture of the curves."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from checkpoint import changed_settings, read_state, settings_of
from checks import fault_of
from command_line import Screen, say
from faults import end_by
from page import build
from parallel import exchange, rank, ranks
from trackers import Trackers

if TYPE_CHECKING:
    from verifiers.types import GenerateOutputs

    from mm_grpo import MultimodalBatch, MultimodalGRPOTrainer, MultimodalRLConfig
    from page import Page

OF_A_SERVER = ("max_concurrent", "generation_timeout", "sync_to_vllm_every", "weight_sync_dir", "vllm_api_key")
OF_A_SERVER += ("vllm_server_port", "vllm_server_timeout")  # settings without effect where there is none
HIDDEN = {"eval/reward_std", "eval/num_turns", "eval/failed"}  # from the curves
SAME_REWARD = 20  # steps without a group whose rewards differ, until it is said


def reward_metrics(outputs: GenerateOutputs) -> dict[str, float]:
    """Mean and spread of the reward and mean of each metric of the rubric, over the rollouts that came back whole and
    were not left out, on all ranks; where others were not, `failed` is their number."""
    return means(of_all_ranks(outputs)["outputs"])


def means(every: list[dict]) -> dict[str, float]:
    rollouts = [rollout for rollout in every if not fault_of(rollout)]
    counted = {"failed": failed} if (failed := len(every) - len(rollouts)) else {}
    if not rollouts:
        return {"reward": math.nan, "reward_std": math.nan, **counted}
    rewards = torch.tensor([float(rollout["reward"]) for rollout in rollouts], dtype=torch.float64)
    metrics = [rollout.get("metrics") or {} for rollout in rollouts]
    names = sorted({name for of_rollout in metrics for name in of_rollout})
    means = {name: sum(of_rollout.get(name, 0.0) for of_rollout in metrics) / len(rollouts) for name in names}
    return {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(), **means, **counted}


def of_all_ranks(outputs: GenerateOutputs) -> GenerateOutputs:
    """The rollouts of every rank, as far as metrics look at them."""
    if ranks() == 1:
        return outputs
    keys = ("error", "dropped", "reward", "metrics", "is_truncated")
    own = [{key: rollout.get(key) for key in keys} for rollout in outputs["outputs"]]
    own = [{**short, "trajectory": bool(full.get("trajectory"))} for short, full in zip(own, outputs["outputs"])]
    return {"outputs": [rollout for rollouts in exchange(own) for rollout in rollouts]}


def rollout_metrics(outputs: GenerateOutputs, batch: MultimodalBatch) -> dict[str, float]:
    """What can be said of a step's rollouts, those of all ranks, before the update."""
    kept = len(batch) if batch.rollout_ids is None else len(batch.rollout_ids.unique())
    rollouts = of_all_ranks(outputs)["outputs"]
    kept, rows, tokens = map(sum, zip(*exchange((kept, len(batch), int((batch.loss_mask != 0).sum())))))
    causes = Counter(f"dropped/{fault[0]}" for rollout in rollouts if (fault := fault_of(rollout)))
    return {
        **means([rollout for rollout in rollouts if not fault_of(rollout)]),
        "completion_tokens": tokens / rows,
        "truncated_fraction": sum(bool(rollout.get("is_truncated")) for rollout in rollouts) / len(rollouts),
        "rollouts_dropped": len(rollouts) - kept,
        **causes,
    }


def zero_spread_fraction(batch: MultimodalBatch) -> float:
    """Share of the batch's groups whose rewards are all equal. Such a group teaches nothing."""
    group_of_row = [0] * len(batch) if batch.group_ids is None else batch.group_ids.tolist()
    rewards: dict[int, set[float]] = {}
    for group, reward in zip(group_of_row, batch.rewards.tolist()):
        rewards.setdefault(group, set()).add(reward)
    return sum(len(values) == 1 for values in rewards.values()) / max(len(rewards), 1)


class Clock:
    """How long each part of a step takes: `with clock("update"): ...`, then `clock.metrics()`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def restart(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "update", "sync"), 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"seconds_{part}": seconds for part, seconds in self.seconds.items()}


class RunLog:
    """A run on the disk and on the screen: its folder, config.json, metrics.jsonl, curves.png, a progress bar.

    When it is made, before anything is loaded, the folder is made, tried and locked: no other run can write there, and
    what lies in it already stays. A disk that fills up later does not end the run: what could not be written is kept,
    and tried again with the next step.

    Raises:
        FileExistsError: output_dir holds an earlier run that is not resumed.
        OSError: it cannot be written to, or another run is writing there.
    """

    def __init__(self, config: MultimodalRLConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.metrics = self.folder / "metrics.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.folder)
            earlier = self.metrics.exists() and self.metrics.stat().st_size or any(self.folder.glob("checkpoint-*"))
            if config.resume_from_checkpoint and not (self.folder / "config.json").exists():
                raise FileExistsError(f"output_dir={config.output_dir!r}: holds no run that could be resumed")
            if earlier and not config.resume_from_checkpoint:
                ways = "name another folder, or go on with --resume_from_checkpoint true"
                raise FileExistsError(f"output_dir={config.output_dir!r}: holds an earlier run; {ways}")
            (self.folder / "config.json").write_text(json.dumps(settings_of(config), indent=2) + "\n")
        except OSError as error:
            if error.errno is None:  # our own
                raise
            raise OSError(f"output_dir={config.output_dir!r}: cannot be written to ({error}); name another") from None
        self.trackers = Trackers(config.report_to, self.folder, settings_of(config))
        self.unwritten: list[str] = []  # lines of metrics.jsonl
        self.page: Page | None = None
        self.same_reward = 0  # steps in a row in which no group's rewards differed

    def describe(self, trainer: MultimodalGRPOTrainer, demo: Iterable[str]) -> None:
        """Print what is about to run: these settings of the demonstration, the model, the server."""
        if demo:
            settings = ", ".join(f"{name}={getattr(self.config, name)}" for name in demo)
            say(f"settings of the demonstration (--help has the method's own): {settings}")
        sizes = [(each.numel() / 1e6, each.requires_grad) for each in trainer.model.parameters()]
        whole, trained = sum(size for size, _ in sizes), sum(size for size, needed in sizes if needed)
        part = f" ({trained:.2f} M of them trained)" if trained < whole else ""
        where = f"{trainer.device}" + (f", the first of {ranks()} ranks" if ranks() > 1 else "")
        say(f"{type(trainer.model).__name__}, {whole:.2f} M parameters{part}, on {where}")
        source = read_state(Path(getattr(trainer.model, "name_or_path", ""))) or {}
        if changed := changed_settings(source.get("settings", {}), settings_of(self.config), ("output_dir",)):
            say(f"settings that differ from the run that wrote {trainer.model.name_or_path}: {'; '.join(changed)}")
        say(f"rollouts {trainer.server}")
        defaults = {f.name: f.default for f in fields(self.config)}
        idle = [name for name in OF_A_SERVER if getattr(self.config, name) != defaults[name]]
        if idle and trainer.server.shares_weights:
            say(f"without vllm_server_host there is nothing that {', '.join(idle)} would change")

    def evaluation(self, when: str, metrics: dict[str, float]) -> None:
        """Print an evaluation on one line, if there was one."""
        names = [name for name in metrics if name not in ("reward_std", "num_turns", "failed")]
        if names:
            failed = f" ({metrics['failed']} of its examples failed)" if metrics.get("failed") else ""
            say(f"{when}: {', '.join(f'{name} {metrics[name]:.3f}' for name in names)}{failed}")

    def start(self, trainer: MultimodalGRPOTrainer) -> None:
        """Begin after the trainer's step: what metrics.jsonl holds of later ones, or of half a line, is made again."""
        from tqdm import tqdm

        self.rollouts, self.page, step = trainer.rollouts, trainer.page, trainer.policy.version
        self.page.start(step)
        kept = [line for line in self.lines() if line["step"] <= step]
        fresh = self.folder / ".metrics.jsonl"
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        fresh.replace(self.metrics)
        self.size = self.metrics.stat().st_size  # of what is whole
        bar = dict(desc="training", unit="step", file=Screen("stderr"))
        self.progress = tqdm(total=self.config.max_steps, initial=step, **bar)

    def lines(self) -> list[dict[str, Any]]:
        """The steps of metrics.jsonl; half a line, where a run was killed, is none."""
        found = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.report()
        if hasattr(self, "progress"):
            self.progress.close()
        self.trackers.close()
        self.lock.close()

    def step(self, metrics: dict[str, float]) -> None:
        """Log a step's metrics. JSON has no NaN: what is not finite is null."""
        if metrics["step"] % self.config.log_every_steps == 0 or any(name.startswith("eval/") for name in metrics):
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self.unwritten.append(json.dumps(finite) + "\n")
            self.write()
            self.trackers.step(finite, self.rollouts.rubric)
        if self.page is not None:
            self.page.write(metrics["step"])
        if self.trackers.backends and metrics["step"] % (self.config.report_steps or self.config.max_steps) == 0:
            self.trackers.samples(metrics["step"], self.page.samples())
        said = [f"reward {metrics['reward']:.3f}", f"mismatch {metrics['mismatch_kl']:.0e}"]
        said += [f"KL {metrics['kl']:.3f}"] if "kl" in metrics else []
        seconds = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
        self.progress.set_postfix_str(", ".join([*said, f"{seconds:.2f} s/step"]))
        self.progress.update()
        self.same_reward = self.same_reward + 1 if metrics["zero_spread_fraction"] == 1 else 0
        if self.same_reward == SAME_REWARD:
            warnings.warn(
                f"{SAME_REWARD} steps in which no group's rewards differed: they teach nothing; see the rubric"
            )

    def write(self) -> None:
        """Append the lines that are not yet on the disk, all or none of them."""
        data = "".join(self.unwritten).encode()
        try:
            with self.metrics.open("r+b", buffering=0) as file:
                file.seek(self.size)
                if file.write(data) < len(data):
                    file.truncate(self.size)
                    raise OSError("no space for the whole of it")
            self.size, self.unwritten = self.size + len(data), []
        except OSError as error:
            warnings.warn(
                f"{self.metrics}: {error}. {len(self.unwritten)} steps are kept and written when there is room"
            )

    def end_where_interrupted(self, came: list[int], checkpoint: Path | None) -> None:
        """Where signals came: end the run as the first of them does, after one line."""
        if not came:
            return
        self.report()
        number = came[0]
        came.clear()  # it has been dealt with
        where = f"; --resume_from_checkpoint {checkpoint} goes on" if checkpoint else ", without a checkpoint"
        say(f"{signal.Signals(number).name}: stopped{where}")
        end_by(number)

    def report(self) -> Path | None:
        """Bring the report up to date; where it is, if there is one."""
        return None if self.page is None else self.page.finish()

    def finish(self, checkpoint: Path | None) -> None:
        """Draw the curves, those of the reward and of the rubric's metrics; say what can be done now."""
        if self.unwritten:
            self.write()
        page, shown = self.report(), f"numbers {self.metrics}"
        try:
            if self.metrics.stat().st_size:
                shown = f"curves {draw_curves(self.metrics, self.folder / 'curves.png', self.rollouts.rubric)}, {shown}"
        except (OSError, ValueError) as error:  # a picture must not fail a run
            warnings.warn(f"the curves could not be drawn: {error}")
        say(f"look at it: {f'{page} ({shown})' if page else shown}")
        if checkpoint is not None:
            theirs = any(checkpoint.glob("*config.json"))  # a model of Transformers, or an adapter of peft
            load = f"transformers.AutoModelForMultimodalLM.from_pretrained({str(checkpoint)!r})"
            say(f"load it: {load if theirs else checkpoint}")
        say(f"train your own: python mm_grpo.py --model {checkpoint or 'NAME'} --env_id YOURS (or any other model)")


class NoLog:
    """Of a rank that is not the first: it says and writes nothing; a signal ends it all the same."""

    def end_where_interrupted(self, came: list[int], checkpoint: Path | None) -> None:
        if came:
            end_by(came[0])

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_) -> None:
        pass


def run_log(config: MultimodalRLConfig) -> RunLog | NoLog:
    """The log of a run, kept by its first rank."""
    return NoLog() if rank() else RunLog(config)


def lock_folder(folder: Path) -> IO[str]:
    """Lock it for this process; the file holds its number, and is let go of when it is closed or the process ends.

    Raises:
        BlockingIOError: another process has it.
    """
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise BlockingIOError(f"output_dir={str(folder)!r}: process {file.read()} writes there; name another") from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def draw_curves(log: str | Path, picture: str | Path, rubric: list[str]) -> Path:
    """Draw the curves of a metrics.jsonl into a PNG, the reward's beside those of these metrics of the rubric.

    Returns:
        The picture's path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [json.loads(line) for line in Path(log).read_text().splitlines()]
    panels = {
        "reward of the samples": ["reward"],
        "greedy evaluation": sorted({name for step in steps for name in step if name.startswith("eval/")} - HIDDEN),
        "metrics of the samples": [name for name in rubric if name in steps[0] and name != "num_turns"],
        "KL to the initial policy": ["kl"],
        "KL to the sampling policy": ["mismatch_kl"],
        "entropy (nats)": ["entropy"],
    }
    panels = {title: names for title, names in panels.items() if any(name in step for name in names for step in steps)}
    figure = Figure(figsize=(3 * len(panels), 2.4), dpi=110, layout="constrained")
    for i, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name in names:
            points = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
            axes.plot(*zip(*points), linewidth=1, marker="." if len(points) < 20 else "", label=name)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=7)
        if names == ["mismatch_kl"]:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    FigureCanvasAgg(figure).print_png(str(picture))
    return Path(picture)


def quiet_libraries() -> None:
    """Keep library output off the screen that a user can do nothing about; our own warnings stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("verifiers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the report.html of a run that has ended or was killed.")
    parser.add_argument("run", help="its output_dir")
    try:
        say(str(build(parser.parse_args(argv).run)))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
