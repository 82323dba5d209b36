"""The report of a run: what the policy saw, said and earned, noted in rollouts.jsonl on the way; report.html of it.

    python report.py RUN        # writes RUN/report.html of a run that has ended or was killed

A line of rollouts.jsonl is a picture, a step or an evaluation; a line comes after the pictures that it names. All text
in it is somebody else's (an environment's, a policy's): it goes into the page as JSON in which no `<` is left, and from
there into text nodes alone; and the page lets no script run but its own (Content-Security-Policy, by hash).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checks import fault_of
from media import MediaRules, load_image, message_parts

if TYPE_CHECKING:
    from verifiers.types import GenerateOutputs

    from mm_grpo import MultimodalAdapter, MultimodalBatch, MultimodalRLConfig

HERE = Path(__file__).parent
NOTES_BYTES = 18_000_000  # of rollouts.jsonl; the page adds the curves and its own 80 kB, and stays below 20 MB
LINE_BYTES = 3_000_000  # of a step or an evaluation, its new pictures included: the first and last two always have room
PICTURE_BYTES = 10_000  # of a picture; a larger one is shown in fewer pixels, and the page says so
TEXT_LETTERS = 20_000  # of a text, the middle is left out
TOKENS = 1_024  # of a turn, the middle is left out
EVALUATED = 256  # examples of an evaluation
SAMPLES = 8  # rollouts in a table for a dashboard
CURVE_POINTS = 2_000
SHOWN = ("env_id", "max_steps", "rollouts_per_step", "rollouts_per_example", "loss_type", "learning_rate", "beta")
SHOWN += ("temperature", "seed", "mask_truncated_completions")  # settings; never env_args, which may hold a judge's key


class Page:
    """Notes a run's rollouts and writes its report. Until `start`, and with `report_rollouts` 0, it does nothing; what
    goes wrong in it is a warning and ends no run. With more ranks it is the first one's, of its own rollouts.

    Args:
        adapter: for its tokenizer, and for what pictures its `media_rules` let in.
        config: see MultimodalRLConfig.
    """

    def __init__(self, adapter: MultimodalAdapter, config: MultimodalRLConfig):
        self.adapter, self.config, self.started, self.stale = adapter, config, False, False
        self.file = Path(config.output_dir) / "rollouts.jsonl"
        self.advantages: Tensor | None = None  # (B,) of the batch's rows, as the trainer has them
        self.stride, self.size = 1, 0  # steps between those that are noted; bytes of the file that are whole
        self.pictures: set[str] = set()  # that the file has, or will have with `unwritten`
        self.fresh: dict[str, str] = {}  # lines of others, those of the step at hand
        self.unwritten: list[str] = []  # lines
        self.texts: dict[int, list] = {}  # what is shown of each token
        self.newest: tuple[GenerateOutputs, dict[int, int]] = ({"outputs": []}, {})  # of the last step, and its rows

    def start(self, step: int) -> None:
        """Begin after this step: what the file holds of later ones, or of half a line, is made again."""
        self.started = self.config.report_rollouts > 0
        if self.started and self.file.exists():
            lines = {line: mark(line) for line in whole_lines(self.file) if step}
            kept = [line for line, (kind, name) in lines.items() if kind == "picture" or int(name) <= step]
            noted = [int(name) for kind, name in map(mark, kept) if kind == "step"]
            gap = max((b - a for a, b in itertools.pairwise(noted[:-1])), default=1)  # the last may be any
            self.stride = 1 << (gap - 1).bit_length()
            self.rewrite(kept)

    # -- notes

    def step(self, step: int, outputs: GenerateOutputs, batch: MultimodalBatch) -> None:
        """Note the first whole groups of a trained step, at least one, about `report_rollouts` rollouts."""
        self.newest = outputs, rows_of(batch)
        if self.started and (step % self.stride == 0 or step in (1, self.config.max_steps)):
            count = max(1, self.config.report_rollouts // self.config.rollouts_per_example)
            self.note("step", step, groups_of(outputs["outputs"])[:count], batch)

    def samples(self) -> list[dict[str, Any]]:
        """The last step's first rollouts as rows of a table, for dashboards; pictures under "images"."""
        outputs, rows = self.newest
        try:
            return [self.sample(rollout, rows.get(i)) for i, rollout in enumerate(outputs["outputs"][:SAMPLES])]
        except Exception as error:  # rollouts of others may hold anything
            warnings.warn(f"no samples for the dashboards ({type(error).__name__}: {error})")
            return []

    def sample(self, rollout: dict, row: int | None) -> dict[str, Any]:
        turn, images, said = (rollout.get("trajectory") or [{}])[-1], [], []
        for role, parts in message_parts(turn.get("prompt") or []):
            said.append(f"{role}: {' '.join(part['text'] for part in parts if part['type'] == 'text')}")
            for url in (part["image_url"]["url"] for part in parts if part["type"] == "image_url"):
                images.append(load_image(url, getattr(self.adapter, "media_rules", MediaRules())))
        ids = (turn.get("tokens") or {}).get("completion_ids") or []
        texts = {"prompt": cut(" ".join(said)), "completion": cut("".join(self.text(i)[0] for i in ids))}
        advantage = None if row is None or self.advantages is None else exact(self.advantages[row])
        return {**texts, "reward": finite(rollout.get("reward")), "advantage": advantage, "images": images}

    def evaluation(self, step: int, outputs: GenerateOutputs) -> GenerateOutputs:
        """Note an evaluation after this step; gives it back."""
        if self.started:
            self.note("evaluation", step, groups_of(outputs["outputs"])[:EVALUATED])
        return outputs

    def note(self, kind: str, step: int, groups: list[dict], batch: MultimodalBatch | None = None) -> None:
        noted, self.fresh = [], {}
        try:
            rows = rows_of(batch)
            for group in groups:
                noted.append(json.dumps(self.group(group, rows, batch)))
                if sum(map(len, [*noted, *self.fresh.values()])) > LINE_BYTES:
                    noted.pop()  # its pictures may stay
                    break
        except Exception as error:  # rollouts of others may hold anything
            warnings.warn(f"step {step}: not in the report ({type(error).__name__}: {error})")
            return
        line = f'{{"{kind}": {step}, "of": {len(groups)}, "groups": [{", ".join(noted)}]}}\n'
        self.unwritten += [*self.fresh.values(), line]
        self.pictures |= self.fresh.keys()

    def group(self, group: dict[int, dict], rows: dict[int, int], batch: MultimodalBatch | None) -> dict[str, Any]:
        """What is noted of the rollouts of a prompt, by their number in the step."""
        first = next(iter(group.values()))
        number, leading = next((item for item in group.items() if item[1].get("trajectory")), (0, first))
        turns = leading.get("trajectory") or [{"prompt": leading.get("prompt")}]
        sizes = sizes_given(batch, rows[number], self.adapter) if number in rows else []
        return {
            "example": cut(first.get("example_id")),
            "answer": cut(first.get("answer")),
            "prompt": self.messages(turns[0].get("prompt") or [], sizes),
            "rollouts": [self.rollout(each, rows.get(i)) for i, each in group.items()],
        }

    def rollout(self, rollout: dict, row: int | None) -> dict[str, Any]:
        fault, turns, seen = fault_of(rollout), [], None
        for turn in rollout.get("trajectory") or []:
            prompt = turn.get("prompt") or []
            new = [] if seen is None else self.messages(prompt[seen + 1 :])  # behind the reply before
            turns.append({"messages": new, **self.tokens(turn)})
            seen = len(prompt)
        return {
            "reward": finite(rollout.get("reward")),
            "metrics": {str(name): finite(value) for name, value in (rollout.get("metrics") or {}).items()},
            "advantage": None if row is None or self.advantages is None else exact(self.advantages[row]),
            "truncated": bool(rollout.get("is_truncated")),
            "dropped": fault and [fault[0], cut(rollout.get("because") or fault[1])],
            "turns": turns,
        }

    def tokens(self, turn: dict) -> dict[str, Any]:
        """[text, whether special, id, logprob] of each sampled token, and how many are left out of the middle."""
        given = turn.get("tokens") or {}
        ids, logprobs = given.get("completion_ids") or [], given.get("completion_logprobs") or []
        tokens = [[*self.text(i), i, exact(logprob)] for i, logprob in zip(ids, logprobs)]
        half = TOKENS // 2
        return {
            "tokens": tokens if len(tokens) <= TOKENS else tokens[:half] + tokens[-half:],
            "left_out": max(len(tokens) - TOKENS, 0),
        }

    def text(self, token: int) -> list:
        if not self.texts:  # asked for once: a tokenizer makes these tables anew each time
            special = {*self.adapter.tokenizer.all_special_ids, *self.adapter.tokenizer.added_tokens_decoder}
            self.texts = {i: [self.adapter.tokenizer.decode([i]), 1] for i in special}
        if token not in self.texts:
            self.texts[token] = [self.adapter.tokenizer.decode([token]), 0]
        return self.texts[token]

    def messages(self, messages: list, sizes: Iterable = ()) -> list:
        """[role, parts] of each message; a part is a text, a picture's name and the size it was given in, or a word."""
        sizes, told = iter(sizes), message_parts(messages)
        return [[cut(role), [self.part(part, sizes) for part in parts]] for role, parts in told]

    def part(self, part: dict, sizes: Iterator) -> dict[str, Any]:
        if part["type"] == "text":
            return {"text": cut(part["text"])}
        url = part["image_url"]["url"] if part["type"] == "image_url" else ""
        if not url.startswith(("data:", "file:")):  # sound, video; a web address is not asked again for the report
            return {"other": f"{part['type']} {re.sub('//[^/]*@', '//', url)[:200]}"}
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        if name not in self.pictures | self.fresh.keys():
            try:
                image = load_image(url, getattr(self.adapter, "media_rules", MediaRules()))
            except ValueError as error:
                return {"other": cut(error)}
            source, size = encoded(image)
            self.fresh[name] = json.dumps({"picture": name, "size": image.size, "shown": size, "src": source}) + "\n"
        return {"picture": name, "given": next(sizes, None)}

    # -- the disk

    def write(self, step: int) -> None:
        """Append what was noted; write the page where `report_steps` asks for it."""
        self.append()
        self.stale = True
        if self.config.report_steps and step % self.config.report_steps == 0:
            self.build()

    def finish(self) -> Path | None:
        """The page as it is to stay, and where it is; None: there is none."""
        self.append()
        if self.stale:  # not as new as the run
            self.build()
        there = self.file.with_name("report.html")
        return there if self.started and there.exists() else None

    def append(self) -> None:
        """All of what was noted or none of it: a disk that is full ends no run."""
        if self.unwritten:
            self.stale = True
            data, self.unwritten = "".join(self.unwritten).encode(), []
            try:
                with self.file.open("ab", buffering=0) as file:
                    if file.write(data) < len(data):
                        raise OSError("no space for the whole of it")
                self.size += len(data)
                if self.size > NOTES_BYTES:
                    self.thin()
            except OSError as error:
                warnings.warn(f"{self.file}: {error}. The report lacks what was noted last")
                self.recover()

    def recover(self) -> None:
        """What was not written whole is not there, and its pictures are noted again."""
        try:
            with self.file.open("r+b") as file:
                file.truncate(self.size)
            self.pictures = {name for kind, name in map(mark, whole_lines(self.file)) if kind == "picture"}
        except OSError:
            self.started = False  # a disk that cannot even be read: no report of the rest

    def thin(self) -> None:
        """Make room: every second step is left out from here on, but for the first and the last; of the evaluations
        all between the first and the last."""
        while self.size > NOTES_BYTES:
            self.stride *= 2
            lines = {line: mark(line) for line in whole_lines(self.file)}
            steps = [each for each in lines.values() if each[0] == "step"]
            evaluations = [each for each in lines.values() if each[0] == "evaluation"]
            kept = {each for each in steps if int(each[1]) % self.stride == 0}
            kept |= {*steps[:1], *steps[-1:], *evaluations[:1], *evaluations[-1:]}
            self.rewrite([line for line, each in lines.items() if each in kept or each[0] == "picture"])
            if len(kept) <= 4:
                break

    def rewrite(self, lines: list[str]) -> None:
        """The file with these lines, without pictures that none of them shows."""
        self.pictures = {name for line in lines if mark(line)[0] != "picture" for name in NAMED.findall(line)}
        kept = (line for line in lines if mark(line)[0] != "picture" or mark(line)[1] in self.pictures)
        write_whole(self.file, "".join(kept))
        self.size = self.file.stat().st_size

    def build(self) -> None:
        """Write report.html; a report must not fail a run."""
        try:
            if self.started:
                build(self.file.parent)
                self.stale = False
        except (OSError, ValueError) as error:
            warnings.warn(f"the report could not be written: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# What is noted


def rows_of(batch: MultimodalBatch | None) -> dict[int, int]:
    """The row of each rollout that has one, the last of several."""
    ids = [] if batch is None or batch.rollout_ids is None else batch.rollout_ids.tolist()
    return {rollout: row for row, rollout in enumerate(ids)}


def groups_of(rollouts: list[dict]) -> list[dict[int, dict]]:
    """The rollouts of each prompt, by their number in the step."""
    groups: dict[Any, dict[int, dict]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(repr(rollout.get("group", rollout.get("example_id"))), {})[i] = rollout
    return list(groups.values())


def sizes_given(batch: MultimodalBatch, row: int, adapter: MultimodalAdapter) -> list[list[int]]:
    """[width, height] of each of a row's pictures as the processor gave it to the model; none where its tensors do not
    say: tiles, several frames, an adapter of another kind."""
    patch = getattr(getattr(getattr(adapter, "processor", None), "image_processor", None), "patch_size", None)
    grid, pixels = batch.extra_model_kwargs.get("image_grid_thw"), batch.pixel_values
    if grid is not None and isinstance(patch, int) and "image_grid_thw" in batch.media_spans:
        start, stop = batch.media_spans["image_grid_thw"][row].tolist()
        return [[width * patch, height * patch] for _, height, width in grid[start:stop].tolist()]
    whole = isinstance(pixels, Tensor) and pixels.ndim == 4 and set(batch.media_spans) == {"pixel_values"}
    return [[*pixels.shape[:-3:-1]]] * int(torch.diff(batch.media_spans["pixel_values"][row])) if whole else []


def encoded(image: Image.Image) -> tuple[str, tuple[int, int]]:
    """(data URI, size) of a picture in at most PICTURE_BYTES: its very pixels where they fit, else WEBP, else fewer."""

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        image.save(buffer := io.BytesIO(), kind, **options)
        return buffer.getvalue()

    kind, small = "png", image
    few = image.width * image.height <= 100 * PICTURE_BYTES  # no PNG of more is as small, but for a plain one
    if not few or len(file := saved(image, kind)) > PICTURE_BYTES:
        for shrink in range(12):
            kind, small = "webp", image.copy()
            small.thumbnail([round(1024 * 0.7**shrink)] * 2)
            if len(file := saved(small, kind, quality=75, method=1)) <= PICTURE_BYTES:
                break
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}", small.size


def cut(text: Any) -> str:
    """As text of at most TEXT_LETTERS, the middle left out."""
    text = "" if text is None else str(text)
    half, more = TEXT_LETTERS // 2, len(text) - TEXT_LETTERS
    return text if more <= 0 else f"{text[:half]} […{more} letters left out…] {text[-half:]}"


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None


def exact(value: Any) -> float | None:
    """A float32 in as few digits as say which one it is."""
    value = np.float32(value)
    return float(str(value)) if np.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------------------
# Lines, and the page

LINE = re.compile(r'\{"(picture|step|evaluation)": "?(\w+)')
NAMED = re.compile(r'\{"picture": "(\w+)", "given"')


def mark(line: str) -> tuple[str, str]:
    """Its kind, and a picture's name or the step."""
    return LINE.match(line).groups()


def whole_lines(file: Path) -> Iterator[str]:
    """Those of rollouts.jsonl; half a line, where a run was killed, is none."""
    if file.exists():
        with file.open(encoding="ascii", errors="replace") as lines:
            yield from (line for line in lines if line.endswith("}\n") and LINE.match(line))


def write_whole(file: Path, text: str) -> None:
    """The file with this text, or as it was."""
    fresh = file.with_name(f".{file.name}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def as_data(text: str, kind: str, name: str = "") -> str:
    """JSON as an element of the page. JSON has `<` in strings alone, where it may be written so."""
    text = text.strip().replace("<", "\\u003c")
    return f'<script type="application/json" data-kind="{kind}" data-name="{name}">{text}</script>\n'


@functools.cache
def shell() -> tuple[str, str]:
    """The page before and after its data."""
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name in ("uPlot.LICENSE", "uPlot.min.css", "uPlot.iife.min.js"):
        page = page.replace(f"/* {name} */", (HERE / "vendor" / name).read_text(encoding="utf-8").strip())
    scripts = re.findall("<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    page = page.replace("SCRIPTS", " ".join(f"'sha256-{each}'" for each in hashes), 1)
    before, after = page.split("<!-- data -->")
    return before, after


def curves(folder: Path) -> dict[str, list]:
    """metrics.jsonl by name: a value for each of at most CURVE_POINTS steps, evenly chosen, and the last."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [line for line in lines if line.endswith("}\n")]
    every = -(-len(lines) // CURVE_POINTS) or 1
    chosen = [json.loads(line) for line in lines[(len(lines) - 1) % every :: every]]
    return {name: [line.get(name) for line in chosen] for name in dict.fromkeys(name for x in chosen for name in x)}


def build(folder: str | Path) -> Path:
    """Write the report.html of this run, whole or not at all, from its metrics.jsonl and rollouts.jsonl.

    Raises:
        FileNotFoundError: the folder holds no run.
        OSError: it could not be written; an earlier one stays as it is.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: holds no run (no config.json)")
    config = json.loads((folder / "config.json").read_text())
    settings = {name: config[name] for name in SHOWN if name in config}
    run = {"name": folder.resolve().name, "settings": settings, "curves": curves(folder)}
    lines = [as_data(line, *mark(line)) for line in whole_lines(folder / "rollouts.jsonl")]
    before, after = shell()
    write_whole(folder / "report.html", "".join([before, as_data(json.dumps(run), "run"), *lines, after]))
    return folder / "report.html"
