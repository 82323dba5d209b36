"""What a run says of itself: the metrics of a step's rollouts and updates, and a picture of their curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

PANELS = (("reward", "reward of the samples"), ("exact", "exact match of the samples"), ("mismatch_kl", "KL to the sampling policy"), ("entropy", "entropy (nats)"))


def reward_metrics(outputs) -> dict[str, float]:
    """Mean and spread of the reward and mean of each metric of the rubric, over the rollouts that came back whole."""
    rollouts = [
        rollout for rollout in outputs["outputs"]
        if not rollout.get("error") and rollout["trajectory"] and math.isfinite(rollout["reward"] or 0.0)
    ]  # fmt: skip
    if not rollouts:
        return {"reward": math.nan, "reward_std": math.nan}
    rewards = torch.tensor([rollout["reward"] for rollout in rollouts], dtype=torch.float64)
    names = sorted({name for rollout in rollouts for name in rollout["metrics"] or {}})
    means = {name: sum(rollout["metrics"].get(name, 0.0) for rollout in rollouts) / len(rollouts) for name in names}
    return {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(), **means}


def rollout_metrics(outputs, batch) -> dict[str, float]:
    """What can be said of a step's rollouts before the update."""
    ids = torch.arange(len(batch)) if batch.rollout_ids is None else batch.rollout_ids.unique()
    rollouts = outputs["outputs"]
    return {
        **reward_metrics(outputs),
        "completion_tokens": (batch.loss_mask != 0).sum(-1).float().mean().item(),
        "truncated_fraction": sum(bool(rollout["is_truncated"]) for rollout in rollouts) / len(rollouts),
        "rollouts_dropped": len(rollouts) - len(ids),
    }


def zero_spread_fraction(batch) -> float:
    """Share of the batch's groups whose rewards are all equal. Such a group teaches nothing."""
    ids = torch.zeros(len(batch)) if batch.group_ids is None else batch.group_ids
    groups = [batch.rewards[ids == group] for group in ids.unique()]
    return sum(bool((group == group[0]).all()) for group in groups) / max(len(groups), 1)


def combine_metrics(parts: list[tuple[dict[str, Tensor], int]]) -> dict[str, float]:
    """One set of metrics from the micro-batches': losses add up, extremes stay extremes, the rest is a mean over tokens."""
    parts = [part for part in parts if part[1]] or parts[:1]  # a micro-batch without trained tokens says nothing
    total = max(sum(tokens for _, tokens in parts), 1)
    combined = {}
    for name in parts[0][0]:
        values = [(float(metrics[name]), tokens) for metrics, tokens in parts]
        if name == "loss":
            combined[name] = sum(value for value, _ in values)
        elif name.endswith(("_min", "_max")):
            combined[name] = (min if name.endswith("_min") else max)(value for value, _ in values)
        else:
            combined[name] = sum(value * tokens for value, tokens in values) / total
    return combined


def describe(metrics: dict[str, float]) -> str:
    """The metrics of an evaluation on one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name not in ("reward_std", "num_turns"))


def draw_curves(log: str | Path, picture: str | Path) -> Path:
    """Draw the curves of a metrics.jsonl into a PNG; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [json.loads(line) for line in Path(log).read_text().splitlines()]
    panels = [(name, title) for name, title in PANELS if any(name in step for step in steps)]
    figure = Figure(figsize=(3 * len(panels), 2.4), dpi=110, layout="constrained")
    for i, (name, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.plot([step["step"] for step in steps], [step.get(name) for step in steps], linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if name in ("reward", "exact"):
            axes.set_ylim(0, 1.02)
        if name == "mismatch_kl":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    FigureCanvasAgg(figure).print_png(str(picture))
    return Path(picture)
