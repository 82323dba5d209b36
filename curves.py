"""A picture of a run: reward, entropy, KL and gradient norm over its steps."""

from __future__ import annotations

import json
from pathlib import Path

PANELS = (("reward", "reward"), ("exact", "exact match"), ("mismatch_kl", "KL to the sampling policy"), ("entropy", "entropy (nats)"))


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
