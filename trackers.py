"""Metrics and samples for the dashboards that people watch runs in: TensorBoard, Weights & Biases, Trackio.

What TRL logs too has its name there (`train/completions/mean_length`), so that runs of both share a plot; all else has
ours. Each package is optional, and is imported where it is asked for. Where its data go is its own affair
(`tensorboard --logdir RUN/tensorboard`, `wandb login`, `trackio show`).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = {"tensorboard": "tensorboard==2.20.0", "wandb": "wandb==0.31.0", "trackio": "trackio==0.43.0"}
PROJECT = "mm_grpo"
OF_TRL = {  # names of the same quantities in TRL's GRPOTrainer
    "completion_tokens": "completions/mean_length",
    "truncated_fraction": "completions/clipped_ratio",
    "clip_fraction": "clip_ratio/region_mean",
    "zero_spread_fraction": "frac_reward_zero_std",
    "logprob_difference": "sampling/sampling_logp_difference/mean",
    "ratio_min": "sampling/importance_sampling_ratio/min",
    "ratio_max": "sampling/importance_sampling_ratio/max",
}


def chosen(report_to: str | None) -> list[str]:
    """The names in `report_to`, which are separated by commas."""
    return [name.strip() for name in (report_to or "").split(",") if name.strip()]


def named(metrics: dict[str, float | None], rubric: Sequence[str]) -> dict[str, float]:
    """The metrics of a step that are numbers, by the names that they have on a dashboard.

    Args:
        rubric: names of the environment's own metrics, `rewards/NAME/mean` there.
    """
    named = {}
    for name, value in metrics.items():
        if name == "step" or value is None or not math.isfinite(value):
            continue
        name = OF_TRL.get(name, f"rewards/{name}/mean" if name in rubric else name)
        named[name if name.startswith("eval/") else f"train/{name}"] = float(value)
    return named


class Trackers:
    """Hands a run's metrics and samples on. What fails there is a warning, once, and ends no run.

    Args:
        report_to: names of PACKAGES, separated by commas.
        folder: of the run; its name is the run's.
        settings: of the run, without secrets.

    Raises:
        ValueError: a package is not installed, or refuses to start.
    """

    def __init__(self, report_to: str | None, folder: Path, settings: dict[str, Any]):
        self.backends: dict[str, Any] = {}
        for name in chosen(report_to):
            try:
                self.backends[name] = (TensorBoard if name == "tensorboard" else Tables)(name, folder, settings)
            except ModuleNotFoundError as missing:
                needed = f"needs a package ({missing.name} is missing): pip install {PACKAGES[name]}"
                raise ValueError(f"report_to={name!r}: {needed}") from None
            except Exception as error:  # not logged in, no connection
                raise ValueError(f"report_to={name!r}: {type(error).__name__}: {error}") from error

    def each(self, work: Callable[[Any], None]) -> None:
        for name, backend in [*self.backends.items()]:
            try:
                work(backend)
            except Exception as error:
                warnings.warn(f"report_to: {name} gets no more of this run ({type(error).__name__}: {error})")
                del self.backends[name]

    def step(self, metrics: dict[str, float | None], rubric: Sequence[str] = ()) -> None:
        self.each(lambda backend: backend.log(named(metrics, rubric), int(metrics["step"])))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Hand on a table.

        Args:
            rows: one a completion, by column: texts, numbers, and under "images" a list of PIL pictures.
        """
        if rows:
            self.each(lambda backend: backend.samples(step, rows))

    def close(self) -> None:
        self.each(lambda backend: backend.close())


class TensorBoard:
    """Scalars, and samples as text with their pictures beside."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("settings", table([settings]))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        import numpy as np

        self.writer.add_text("samples", table(rows), step)
        for i, row in enumerate(rows):
            for j, image in enumerate(row.get("images") or []):
                self.writer.add_image(f"samples/{i}/{j}", np.array(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, as TensorBoard shows it; what could be markup in their texts is not."""
    names = [name for name in rows[0] if name != "images"]
    plain = lambda value: "".join(c if c.isalnum() or c in " .,-_:" else f"&#{ord(c)};" for c in str(value))
    lines = [[plain(row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *lines))


class Tables:
    """wandb and trackio, which has wandb's interface."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]):
        self.name, self.module = name, importlib.import_module(name)
        where = {"dir": str(folder)} if name == "wandb" else {}
        self.run = self.module.init(project=PROJECT, name=folder.name, config=settings, **where)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        shown = [{name: value for name, value in row.items() if name != "images"} for row in rows]
        for i in range(max(len(row.get("images") or []) for row in rows)):
            for cells, row in zip(shown, rows):  # a picture a cell: lists of them are not kept
                images = (row.get("images") or [])[i : i + 1]
                cells[f"image {i + 1}"] = self.module.Image(images[0]) if images else None
        columns = list(shown[0])
        data = [[cells[name] for name in columns] for cells in shown]
        self.run.log({"samples": self.module.Table(columns=columns, data=data)}, step=step)

    def close(self) -> None:
        self.run.finish()
