"""Tests of what dashboards get of a run: the numbers of metrics.jsonl, under TRL's names where TRL has them.

    pytest test_trackers.py

TensorBoard, wandb (offline) and trackio are the real packages, and what they have written is read back.
"""

import contextlib
import json
import os
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from PIL import Image

from conftest import make_trainer, needs
from trackers import OF_TRL, PACKAGES, Trackers, named, table

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # it is read when trackio is imported
ENV = {"num_train_examples": 6, "num_eval_examples": 4}
SMALL = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3, eval_examples=2, max_steps=2, eval_steps=1)
ROWS = [{"prompt": "what <b>is</b> it?", "completion": "a | b", "reward": 0.5, "images": [Image.new("RGB", (8, 4))]}]
EACH = [pytest.param(name, marks=needs(name)) for name in PACKAGES]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Everything stays in the test's folder, nothing goes to a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))  # where pictures of tables wait to be sent
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-data"))


def leveldb_log(data: bytes):
    """The records of a LevelDB log whose first block lacks its first 7 bytes; wandb keeps an offline run in one."""
    at, record = 7, b""
    data = bytes(7) + data
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the end of a block holds no header
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_back(name: str, folder) -> dict[int, dict[str, float]]:
    """The scalars of a run by step, as the backend itself reads them."""
    steps: dict[int, dict[str, float]] = {}
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                steps.setdefault(event.step, {})[tag] = event.value
    elif name == "wandb":
        from wandb.proto.wandb_internal_pb2 import Record

        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        for data in leveldb_log(file.read_bytes()[7:]):
            items = {".".join(item.nested_key) or item.key: item for item in Record.FromString(data).history.item}
            values = {key: json.loads(item.value_json) for key, item in items.items()}
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and key[0] != "_"}
            if numbers:
                steps.setdefault(int(values["_step"]), {}).update(numbers)
    else:
        from trackio.sqlite_storage import SQLiteStorage

        for line in SQLiteStorage.get_logs("mm_grpo", folder.name):
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            steps.setdefault(line["step"], {}).update(numbers)
    return steps


@pytest.mark.parametrize("name", EACH)
def test_a_dashboard_gets_every_number_of_every_step(name, tmp_path):
    folder = tmp_path / "run-of-this-test"
    trainer = make_trainer(env=ENV, **SMALL, output_dir=str(folder), report_to=name)
    trainer.train()
    trainer.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = read_back(name, folder)
    assert len(lines) == 2
    for line in lines:
        expected = named(line, trainer.rollouts.rubric)
        assert {f"train/rewards/{one}/mean" for one in ("colour", "exact")} | {"eval/exact"} <= expected.keys()
        got = found[line["step"]]
        assert {key: got.get(key) for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_names_are_trls_where_the_quantity_is_and_what_is_no_number_is_left_out():
    metrics = {"step": 3, "reward": 0.5, "exact": 0.25, "completion_tokens": 2.0, "kl": None, "eval/reward": 1.0}
    assert named(metrics, ["exact"]) == {
        "train/reward": 0.5,
        "train/rewards/exact/mean": 0.25,
        "train/completions/mean_length": 2.0,
        "eval/reward": 1.0,
    }
    assert len(set(OF_TRL.values())) == len(OF_TRL)


@pytest.mark.parametrize("name", EACH)
def test_samples_are_a_table_with_its_pictures(name, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    trackers = Trackers(name, folder, {"seed": 1})
    trackers.step({"step": 1, "reward": 0.5})
    trackers.samples(1, ROWS)
    trackers.close()
    assert trackers.backends  # nothing went wrong
    places = tmp_path, Path(os.environ["TRACKIO_DIR"])
    pictures = []
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        with contextlib.suppress(OSError):
            pictures.append(Image.open(path).size)
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        (image,) = events.Images("samples/0/0")
        assert (image.width, image.height) == (8, 4)
        (text,) = events.Tensors("samples/text_summary")
        assert "what &#60;b&#62;is" in text.tensor_proto.string_val[0].decode()
    else:
        assert (8, 4) in pictures


def test_a_text_of_a_sample_breaks_no_table_and_is_no_markup():
    shown = table([{"completion": "a | b\n<script>x</script>", "reward": 0.5}])
    assert shown.count("\n") == 2 and "<" not in shown and shown.splitlines()[2].count("|") == 3


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named_with_its_command(name, tmp_path, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"report_to='{name}': needs a package .* pip install {PACKAGES[name]}"):
        Trackers(name, tmp_path, {})


def test_a_backend_that_fails_is_said_once_and_ends_no_run(tmp_path):
    class Broken:
        def log(self, metrics, step):
            raise OSError("no connection")

    trackers = Trackers(None, tmp_path, {})
    trackers.backends["wandb"] = Broken()
    with pytest.warns(UserWarning, match="wandb gets no more of this run .OSError: no connection"):
        trackers.step({"step": 1, "reward": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.step({"step": 2, "reward": 0.5})
