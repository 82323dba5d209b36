"""What a run says of itself: metrics of a step's rollouts, the folder they are logged in, a picture of the curves."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from verifiers.types import GenerateOutputs

    from mm_grpo import MultimodalBatch, MultimodalRLConfig


def reward_metrics(outputs: GenerateOutputs) -> dict[str, float]:
    """Mean and spread of the reward and mean of each metric of the rubric, over the rollouts that came back whole."""
    rollouts = [
        rollout
        for rollout in outputs["outputs"]
        if not rollout.get("error") and rollout["trajectory"] and math.isfinite(rollout["reward"] or 0.0)
    ]
    if not rollouts:
        return {"reward": math.nan, "reward_std": math.nan}
    rewards = torch.tensor([rollout["reward"] for rollout in rollouts], dtype=torch.float64)
    names = sorted({name for rollout in rollouts for name in rollout["metrics"] or {}})
    means = {name: sum(rollout["metrics"].get(name, 0.0) for rollout in rollouts) / len(rollouts) for name in names}
    return {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(), **means}


def rollout_metrics(outputs: GenerateOutputs, batch: MultimodalBatch) -> dict[str, float]:
    """What can be said of a step's rollouts before the update."""
    kept = len(batch) if batch.rollout_ids is None else len(batch.rollout_ids.unique())
    rollouts = outputs["outputs"]
    return {
        **reward_metrics(outputs),
        "completion_tokens": (batch.loss_mask != 0).sum(-1).float().mean().item(),
        "truncated_fraction": sum(bool(rollout["is_truncated"]) for rollout in rollouts) / len(rollouts),
        "rollouts_dropped": len(rollouts) - kept,
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

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"seconds_{part}": seconds for part, seconds in self.seconds.items()}


class RunLog:
    """A run on the disk and on the screen: config.json, metrics.jsonl, curves.png, a progress bar.

    Raises:
        FileExistsError: output_dir holds an earlier run.
    """

    def __init__(self, config: MultimodalRLConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.metrics, self.checkpoint = self.folder / "metrics.jsonl", self.folder / "checkpoint"
        if self.metrics.exists():
            raise FileExistsError(
                f"output_dir={config.output_dir!r}: holds an earlier run ({self.metrics.name}); name another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    def evaluation(self, when: str, metrics: dict[str, float]) -> None:
        """Print an evaluation on one line, if there was one."""
        names = [name for name in metrics if name not in ("reward_std", "num_turns")]
        if names:
            print(f"{when}: {', '.join(f'{name} {metrics[name]:.3f}' for name in names)}", flush=True)

    def __enter__(self) -> RunLog:
        from tqdm import tqdm

        self.lines = self.metrics.open("w")
        self.progress = tqdm(total=self.config.max_steps, desc="training", unit="step")
        return self

    def __exit__(self, *_) -> None:
        self.progress.close()
        self.lines.close()

    def step(self, metrics: dict[str, float]) -> None:
        """Log a step's metrics."""
        if metrics["step"] % self.config.log_every_steps == 0:
            self.lines.write(json.dumps(metrics) + "\n")
            self.lines.flush()
        said = [f"reward {metrics['reward']:.3f}", f"mismatch {metrics['mismatch_kl']:.0e}"]
        said += [f"KL {metrics['kl']:.3f}"] if "kl" in metrics else []
        seconds = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
        self.progress.set_postfix_str(", ".join([*said, f"{seconds:.2f} s/step"]))
        self.progress.update()

    def finish(self, rubric: list[str]) -> None:
        """Draw the curves, those of the reward and of the rubric's metrics; say where everything is."""
        where = f"checkpoint {self.checkpoint}, metrics {self.metrics}"
        if self.metrics.stat().st_size:
            where += f", curves {draw_curves(self.metrics, self.folder / 'curves.png', rubric)}"
        print(where)


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
        "metrics of the samples": [name for name in rubric if name in steps[0] and name != "num_turns"],
        "KL to the initial policy": ["kl"],
        "KL to the sampling policy": ["mismatch_kl"],
        "entropy (nats)": ["entropy"],
    }
    panels = {title: names for title, names in panels.items() if any(name in steps[0] for name in names)}
    figure = Figure(figsize=(3 * len(panels), 2.4), dpi=110, layout="constrained")
    for i, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name in names:
            axes.plot([step["step"] for step in steps], [step.get(name) for step in steps], linewidth=1, label=name)
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
    logging.getLogger("verifiers").setLevel(logging.ERROR)
