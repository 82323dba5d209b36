"""What a policy said of the same unseen pictures before and after a run: python pictures/before_after.py RUN PNG"""

import base64
import io
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

COUNT = 8


def main(run: str, picture: str) -> None:
    lines = [json.loads(line) for line in (Path(run) / "rollouts.jsonl").read_text().splitlines()]
    sources = {line["picture"]: line["src"] for line in lines if "picture" in line}
    first, *_, last = (line["groups"] for line in lines if "evaluation" in line)
    figure = Figure(figsize=(1.5 * COUNT, 1.95), dpi=100, layout="constrained")
    for i, (before, after) in enumerate(zip(first[:COUNT], last[:COUNT])):
        name = next(part["picture"] for _, parts in before["prompt"] for part in parts if "picture" in part)
        axes = figure.add_subplot(1, COUNT, i + 1)
        axes.imshow(Image.open(io.BytesIO(base64.b64decode(sources[name].partition(",")[2]))))
        axes.set_axis_off()
        said = [
            " ".join(text for text, special, *_ in group["rollouts"][0]["turns"][-1]["tokens"] if not special)
            for group in (before, after)
        ]
        right = after["rollouts"][0]["metrics"]["exact"] == 1
        axes.set_title(f"{said[0]}\n$\\downarrow$\n{said[1]}", fontsize=10, color="black" if right else "firebrick")
    figure.savefig(picture, bbox_inches="tight")


if __name__ == "__main__":
    main(*sys.argv[1:])
