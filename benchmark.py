"""What one update costs: the plain forward, the shared prefix, and a dense pass over the distinct tokens, side by side.

The G completions of a prompt share the prompt and its images. The plain forward runs G * (P + C) tokens and G images,
the shared prefix P + G * C tokens and one image. The dense pass is the floor to compare with: one sequence of exactly
P + G * C tokens with one image, logits for the completions alone.

    python benchmark.py                 # the table, the cost against G, peak memory; writes benchmark.png
    python benchmark.py --ragged        # instead: prompts with pictures of different sizes, completions of different
                                        # lengths, micro-batches; peak memory against G; gradient checkpointing
    python benchmark.py --trl           # either of them beside TRL's own loss on the same tensors (pip install trl)
    python benchmark.py --end_to_end    # instead: the demonstration's whole step beside TRL's GRPOTrainer
    python benchmark.py --ragged --size small --runs 1           # what is printed, in a minute; the ratios say nothing
    python benchmark.py --device cuda --size 2b      # a Qwen2-VL-2B shape in bf16 autocast, on a GPU
    python benchmark.py --vllm_port 8000 --model CHECKPOINT      # instead: steps with rollouts in turn and ahead
                                                                 # (async_rollouts), on the vLLM server there, which
                                                                 # serves that Qwen-VL checkpoint

Each figure is a median over runs that alternate between the ways (`--runs` of each); whole updates with the same
optimizer step, same weights, same batch. On the CPU: float32, two threads, about 8 M parameters; small and the
demonstration: one thread, 0.3 M parameters.
"""

from __future__ import annotations

import argparse
import base64
import copy
import inspect
import io
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mm_grpo import (
    DEMO,
    MultimodalAdapter,
    MultimodalBatch,
    MultimodalGRPOTrainer,
    MultimodalRLConfig,
    row_advantages,
    token_logprobs,
)
from optimizers import clip_and_step
from output_head import in_chunks
from shared_prefix import prompt_lengths

CASES = [(428, 64, 8), (284, 32, 16), (172, 256, 8)]  # (P, C, G)
WHOLE = 8192  # tokens of a micro-batch that none of these batches is too large for, once its prompts are shared
RAGGED = (428, 128, 284, 172)  # prompts whose completions have different lengths
BUDGETS = [(8, WHOLE, 8), (8, 1400, 4), (8, 700, 2), (16, 1400, 4)]  # (G, ours in tokens, TRL's in rows)
LONG = (1052, 256, 8)  # for gradient checkpointing
WARM_UP = 3  # whole steps that do not count
WORK = ("rollouts", "tokens", "updates")  # what two trainers must do alike in a step
TEXT = 28  # prompt tokens that are not the image's
IMAGE_TOKEN, VISION_START, VISION_END = 3, 1, 2
SIZES = {
    "small": dict(  # to see it run; at this size what is measured is mostly Python
        vocab=256, mrope=[8, 12, 12], heads=(1, 1),
        text=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2),
        vision=dict(depth=1, embed_dim=64, hidden_size=64, num_heads=1, mlp_ratio=2),
    ),
    "8m": dict(
        vocab=2048, mrope=[8, 12, 12], heads=(4, 4),
        text=dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4),
        vision=dict(depth=4, embed_dim=256, hidden_size=256, num_heads=4, mlp_ratio=2),
    ),
    "2b": dict(
        vocab=151936, mrope=[16, 24, 24], heads=(12, 2),
        text=dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28),
        vision=dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
    ),
}  # fmt: skip
SIZES["deep"] = {**SIZES["8m"], "text": {**SIZES["8m"]["text"], "num_hidden_layers": 8}}


def make_model(size: str, device: str) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL of the given size with random weights."""
    shape = SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope"]}
    text = dict(vocab_size=shape["vocab"], max_position_embeddings=8192, rope_parameters=rope, **shape["text"])
    text |= dict(zip(("num_attention_heads", "num_key_value_heads"), shape["heads"]))
    config = Qwen2VLConfig(
        text_config=dict(bos_token_id=None, eos_token_id=0, pad_token_id=0, **text),
        vision_config=shape["vision"],
        image_token_id=IMAGE_TOKEN,
        video_token_id=4,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2VLForConditionalGeneration(config).eval()


def make_batch(model, P: int | Sequence[int], C: int | Sequence[int], G: int) -> MultimodalBatch:
    """Groups of G completions, a group for each prompt, on the CPU.

    Args:
        P: tokens of the prompt, or of each prompt: all but 28 of them one square picture's.
        C: tokens of every completion, or of each.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    text = partial(torch.randint, 5, vocab, generator=generator)
    prompts = torch.tensor(P).reshape(-1)  # (K,)
    sides = (prompts - TEXT).sqrt().long()  # the picture is side x side merged patches of 28 pixels
    if not torch.equal(sides**2, prompts - TEXT):
        raise ValueError(f"P={P}: must be a square plus {TEXT}")
    starts = prompts.repeat_interleave(G)  # (B,) B = K * G
    ends = starts + torch.tensor(C)
    rows = []
    for i, side in enumerate(sides):
        picture = torch.tensor([VISION_START, *[IMAGE_TOKEN] * int(side**2), VISION_END])
        prompt = torch.cat([picture, text((TEXT - 2,))])
        rows += [torch.cat([prompt, text((int(end) - len(prompt),))]) for end in ends[i * G : (i + 1) * G]]
    ids = pad_sequence(rows, batch_first=True)  # (B, L)
    column, stops = torch.arange(ids.shape[1]), 4 * (sides**2).cumsum(0)
    numbers = torch.arange(len(prompts))
    spans = {
        "pixel_values": torch.stack([stops - 4 * sides**2, stops], dim=-1),  # (K, 2)
        "image_grid_thw": torch.stack([numbers, numbers + 1], dim=-1),
    }
    return MultimodalBatch(
        input_ids=ids,
        attention_mask=(column < ends[:, None]).long(),
        loss_mask=((column >= starts[:, None]) & (column < ends[:, None])).long(),
        behavior_logprobs=torch.zeros(ids.shape),
        rewards=torch.randn(len(ids), generator=generator),
        pixel_values=torch.randn(int(stops[-1]), 3 * 2 * 14 * 14, generator=generator),
        extra_model_kwargs={
            "image_grid_thw": torch.stack([torch.ones_like(sides), 2 * sides, 2 * sides], dim=-1),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        },
        group_ids=numbers.repeat_interleave(G),
        media_spans={name: span.repeat_interleave(G, dim=0) for name, span in spans.items()},
    )


def lognormal_lengths(rows: int) -> list[int]:
    """Lengths of completions as they come, most of them short, a few cut off at 128; their mean is 55. Evenly spaced
    quantiles, shuffled: the same spread for any number of rows."""
    normal = torch.special.ndtri((torch.arange(rows) + 0.5) / rows)
    lengths = (47.6 * (0.6 * normal).exp()).round().clamp(1, 128).long()
    return lengths[torch.randperm(rows, generator=torch.Generator().manual_seed(0))].tolist()


def ragged(G: int) -> tuple[Sequence[int], list[int], int]:
    """(P, C, G) of the ragged batch."""
    return RAGGED, lognormal_lengths(len(RAGGED) * G), G


def dense_rows(batch: MultimodalBatch) -> list[MultimodalBatch]:
    """A row for each group, of exactly its distinct tokens: the prompt, then all completions one after the other."""
    starts, ends = prompt_lengths(batch).tolist(), batch.attention_mask.sum(-1).tolist()

    def row(members: list[int]) -> MultimodalBatch:
        first = batch.select(members[:1])

        def joined(tensor: Tensor) -> Tensor:  # (B, L) -> (1, P + the completions' tokens)
            prompt = tensor[members[0], : starts[members[0]]]
            return torch.cat([prompt, *(tensor[i, starts[i] : ends[i]] for i in members)])[None]

        by_token = ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")
        types = {"mm_token_type_ids": joined(batch.extra_model_kwargs["mm_token_type_ids"])}
        fields = {name: joined(getattr(batch, name)) for name in by_token}
        return replace(first, **fields, extra_model_kwargs={**first.extra_model_kwargs, **types})

    return [row((batch.group_ids == group).nonzero()[:, 0].tolist()) for group in batch.group_ids.unique()]


class BatchAtHand(MultimodalAdapter):
    """Of a trainer that has no rollouts."""

    build_batch = None


def make_trainer(model, **settings) -> MultimodalGRPOTrainer:
    """A trainer for updates alone, with steps so small that the weights stay as they are."""
    steps = dict(learning_rate=1e-12, max_grad_norm=1e9, mismatch_threshold=0.1)
    config = MultimodalRLConfig(**steps, bf16=model.device.type == "cuda", **settings)
    return MultimodalGRPOTrainer(model, None, BatchAtHand(None), config, server=object())


@torch.no_grad()
def sampled_by(trainer: MultimodalGRPOTrainer, batch: MultimodalBatch) -> MultimodalBatch:
    """The batch as if this policy had sampled it: every ratio is 1, nothing is clipped or dropped."""
    behavior = torch.zeros_like(batch.behavior_logprobs)
    for row in range(len(batch)):
        behavior[row, 1:] = trainer.policy(batch.select([row]).to(trainer.device))[0][0].cpu()
    return replace(batch, behavior_logprobs=behavior * batch.loss_mask)


def update(trainer: MultimodalGRPOTrainer, batch: MultimodalBatch, tokens: int = WHOLE, share: bool = True) -> None:
    """One update as a step has it, in micro-batches of this many tokens."""
    trainer.micro_batch_tokens, trainer.config.share_prefix = tokens, share
    trainer.update(batch)


def dense_update(trainer: MultimodalGRPOTrainer, rows: list[MultimodalBatch]) -> None:
    """Forward and backward of these rows, one after the other, logits for trained tokens; then the optimizer's step."""
    head = trainer.model.get_output_embeddings()
    tokens = sum(int(row.loss_mask.sum()) for row in rows)
    for row in rows:
        row = row.to(trainer.device)
        trained = row.loss_mask[:, 1:] != 0
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.config.bf16):
            hidden = trainer.model.base_model(**row.model_inputs())[0][:, :-1]
            logprobs_of = lambda hidden, targets: token_logprobs(head(hidden), targets)
            logprobs, _ = in_chunks(logprobs_of, hidden[trained], row.input_ids[:, 1:][trained])
        (-logprobs.sum() / tokens).backward()
    clip_and_step(trainer.optimizer, trainer.config.max_grad_norm)


def trl_settings(folder: str, device: torch.device, **settings):
    """TRL's own defaults but for these, and for what it would write and recompute."""
    from trl import GRPOConfig

    quiet = dict(output_dir=folder, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=10**9)
    precision = dict(bf16=False, gradient_checkpointing=False, use_cpu=device.type == "cpu")
    return GRPOConfig(**quiet, **precision, **settings)


def trl_micro_batches(batch: MultimodalBatch, rows: int) -> list[dict]:
    """The batch as TRL's loss takes it: prompts padded on the left and completions on the right to the longest of the
    whole batch, in its order, so many rows at a time, each with its own copy of the picture."""
    starts, ends = prompt_lengths(batch)[:, None], batch.attention_mask.sum(-1, keepdim=True)  # (B, 1)
    P, C = int(starts.max()), int((ends - starts).max())
    source = torch.arange(P + C, device=starts.device) - (P - starts)  # (B, P + C) the column that comes here
    inside = (source >= 0) & (source < ends)

    def padded(tensor: Tensor) -> Tensor:  # (B, L) -> (B, P + C)
        return tensor.gather(1, source.clamp(0, tensor.shape[1] - 1)) * inside

    ids, mask = padded(batch.input_ids), padded(batch.attention_mask)
    sides = {"prompt": slice(P), "completion": slice(P, None)}
    by_row = {f"{side}_ids": ids[:, part] for side, part in sides.items()}
    by_row |= {f"{side}_mask": mask[:, part] for side, part in sides.items()}
    by_row["mm_token_type_ids"] = padded(batch.extra_model_kwargs["mm_token_type_ids"])
    by_row["advantages"] = row_advantages(batch, "group").to(ids.device)
    parts = []
    for part in torch.arange(len(batch)).split(rows):
        media = batch.select(part).model_inputs()
        inputs = {**{name: media[name] for name in batch.media_spans}, "num_items_in_batch": batch.loss_mask.sum()}
        parts.append({**inputs, **{name: t[part] for name, t in by_row.items()}, "num_images": [1] * len(part)})
    return parts


def trl_way(trainer: MultimodalGRPOTrainer, batch: MultimodalBatch, rows: int) -> Callable[[], None]:
    """An update by TRL's `GRPOTrainer._compute_loss` on the same tensors: on-policy, beta 0, DAPO's mean over all
    micro-batches; then the same optimizer step."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from tiny_vlm import make_tiny_vlm

    each = dict(per_device_train_batch_size=rows, num_generations=rows)
    with tempfile.TemporaryDirectory() as folder:
        theirs = GRPOTrainer(
            model=trainer.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl_settings(folder, trainer.device, beta=0.0, loss_type="dapo", temperature=1.0, **each),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * rows),
            processing_class=make_tiny_vlm("qwen")[1],
        )
    parts = trl_micro_batches(batch.to(trainer.device), rows)

    def run() -> None:
        for part in parts:
            theirs._compute_loss(trainer.model, dict(part)).backward()
        clip_and_step(trainer.optimizer, trainer.config.max_grad_norm)

    return run


def make_way(name: str, trainer: MultimodalGRPOTrainer, batch: MultimodalBatch, tokens: int, rows: int):
    """A way to update on this batch: in micro-batches of so many tokens, or so many rows where it is TRL's."""
    if name == "trl":
        return trl_way(trainer, batch, rows)
    if name == "dense":
        return partial(dense_update, trainer, dense_rows(batch))
    return partial(update, trainer, batch, tokens, name == "shared")


def medians(ways: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median seconds of each way, the ways taking turns; one turn before that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(runs + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gradient(trainer: MultimodalGRPOTrainer, way: Callable[[], None]) -> Tensor:
    """The gradient that this update steps with, all parameters in one."""
    kept = []
    parameters = list(trainer.model.parameters())
    keep = lambda *_: kept.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    hook = trainer.optimizer.register_step_pre_hook(keep)
    way()
    hook.remove()
    return kept[0]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def measure(trainer, case: tuple, runs: int, trl: bool = False, tokens: int = WHOLE, rows: int | None = None):
    """(median seconds of each way, how far TRL's gradient is from ours or None) at one (P, C, G)."""
    batch = sampled_by(trainer, make_batch(trainer.model, *case))
    names = ("plain", "shared", "dense", *["trl"] * trl)
    ways = {name: make_way(name, trainer, batch, tokens, rows or len(batch)) for name in names}
    off = difference(*(gradient(trainer, ways[name]) for name in ("shared", "trl"))) if trl else None
    return medians(ways, runs), off


def peak_rss() -> float:
    """The most memory that this process has held so far, in MB. (Linux: getrusage would count the parent's too.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def print_peak(size: str, way: str, case: tuple, tokens: int, rows: int, **settings) -> None:
    """Print what an update takes at its peak beyond the weights and the optimizer's state, in MB."""
    torch.set_num_threads(2)
    trainer = make_trainer(make_model(size, "cpu"), **settings)
    batch, small = (make_batch(trainer.model, *each) for each in (case, (32, 2, 2)))
    make_way(way, trainer, small, tokens, rows=2)()
    run = make_way(way, trainer, batch, tokens, rows)
    before = peak_rss()
    run()
    print(peak_rss() - before)


def peak_memory(size: str, way: str, case: tuple, tokens: int = WHOLE, rows: int = 0, **settings) -> float:
    """Median of three of `print_peak`, each in a process of its own (CPU)."""
    arguments = (size, way, case, tokens, rows)
    command = [sys.executable, "-c", f"import benchmark; benchmark.print_peak(*{arguments!r}, **{settings!r})"]
    run = partial(subprocess.run, command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return statistics.median(float(run().stdout.split()[-1]) for _ in range(3))


def rollouts_ahead(port: int, folder: str, runs: int) -> None:
    """Whole steps with a real server: rollouts and update in turn, or the next rollouts during the update."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from adapters import QwenVLAdapter
    from report import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)  # the server needs a core too
    tokenizer = AutoTokenizer.from_pretrained(folder)
    steps: dict[bool, list[dict]] = {False: [], True: []}
    for _ in range(runs):
        for ahead in steps:
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            with tempfile.TemporaryDirectory() as output_dir:
                server = dict(vllm_server_host="127.0.0.1", vllm_server_port=port, async_rollouts=ahead, max_steps=100)
                rows = dict(rollouts_per_step=32, rollouts_per_example=8, max_tokens=64)
                config = MultimodalRLConfig(output_dir=output_dir, learning_rate=1e-5, **server, **rows)
                trainer = MultimodalGRPOTrainer(model, tokenizer, QwenVLAdapter(tokenizer), config)
                trainer.set_environment("shapes-env", num_train_examples=64, num_eval_examples=1)
                block = [trainer.step() for _ in range(9)]
            steps[ahead] += block[3:]  # the first ones are in turn either way
    print("| rollouts | steps | lag | s a step | waiting for rollouts | update | weight update |")
    print("|---|---|---|---|---|---|---|")
    parts = ("rollout", "update", "sync")
    seconds = {}
    for ahead, measured in steps.items():
        whole = seconds[ahead] = statistics.median(sum(step[f"seconds_{part}"] for part in parts) for step in measured)
        each = " | ".join(f"{statistics.median(step[f'seconds_{part}'] for step in measured):.3f}" for part in parts)
        name, lags = "ahead" if ahead else "in turn", sorted({step["lag"] for step in measured})
        print(f"| {name} | {len(measured)} | {', '.join(map(str, lags))} | {whole:.3f} | {each} |")
    gain = seconds[False] / seconds[True]
    print(f"\nin turn / ahead: {gain:.2f} (medians of steps, {runs} blocks of 6 of each way, alternating)")


def trl_dataset(trainer: MultimodalGRPOTrainer, steps: int):
    """The pictures, questions and answers of our trainer's next steps, in their order, as TRL takes them."""
    from datasets import Dataset
    from PIL import Image

    rows = []
    for step in range(steps):
        for example in trainer.rollouts.examples(step)[:: trainer.config.rollouts_per_example]:
            picture, question = example["prompt"][0]["content"]
            data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
            prompt = [{"role": "user", "content": question["text"]}]
            rows.append({"prompt": prompt, "image": Image.open(io.BytesIO(data)), "answer": example["answer"]})
    return Dataset.from_list(rows)


def trl_trainer(trainer: MultimodalGRPOTrainer, folder: str, steps: int, now: dict, callback):
    """TRL's trainer with the weights and the settings of ours; adds to `now` what its rollouts and rewards were."""
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    from shapes_env import make_rubric

    config, rubric = trainer.config, make_rubric()
    weighted = [(f, weight, list(inspect.signature(f).parameters)) for f, weight in zip(rubric.funcs, rubric.weights)]

    def reward(completions, completion_ids, answer, **_) -> list[float]:
        values = []
        for completion, ids, right in zip(completions, completion_ids, answer):
            cut_off = ids[-1] != trainer.tokenizer.eos_token_id
            given = dict(completion=completion, answer=right, state={"trajectory": [{"is_truncated": cut_off}]})
            values.append(sum(weight * f(*(given[name] for name in names)) for f, weight, names in weighted))
        now["rollouts"] += len(values)
        now["tokens"] += sum(map(len, completion_ids))
        now["reward"] = statistics.fmean(values)
        return values

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            started = time.perf_counter()
            completions = super()._generate(prompts)
            now["rollout"] += time.perf_counter() - started
            return completions

    names = ("learning_rate", "max_grad_norm", "weight_decay", "temperature", "beta", "scale_rewards", "loss_type")
    settings = {name: getattr(config, name) for name in (*names, "seed")}
    settings |= dict(num_generations=config.rollouts_per_example, per_device_train_batch_size=config.rollouts_per_step)
    settings |= dict(num_iterations=config.updates_per_batch, max_steps=steps * config.updates_per_batch)
    settings |= dict(max_completion_length=config.max_tokens, epsilon=config.clip_low, epsilon_high=config.clip_high)
    never = {"suppress_tokens": list(trainer.adapter.placeholder_ids)}  # one of them would end the run
    settings |= dict(lr_scheduler_type="constant", shuffle_dataset=False, generation_kwargs=never)
    trainer.save_checkpoint(folder)  # TRL's reference policy comes from a folder
    theirs = Timed(
        model=folder,
        reward_funcs=reward,
        args=trl_settings(folder, trainer.device, model_init_kwargs={"dtype": "float32"}, **settings),
        train_dataset=trl_dataset(trainer, steps),
        processing_class=copy.deepcopy(trainer.adapter.processor),
        callbacks=[callback],
    )
    theirs.remove_callback(PrinterCallback)
    return theirs


def in_turns(steps: int, folder: str) -> dict[str, list[dict]]:
    """Steps of the demonstration by TRL and by this trainer, in turns: what each of them was."""
    from transformers import TrainerCallback

    from adapters import load_model

    config = MultimodalRLConfig(output_dir=folder, **DEMO)
    model, tokenizer, adapter = load_model("qwen", None, config)  # takes one thread
    trainer = MultimodalGRPOTrainer(model, tokenizer, adapter, config)
    trainer.set_environment(config.env_id)
    done, now, updates = {"TRL": [], "ours": []}, {}, []
    trainer.optimizer.register_step_post_hook(lambda *_: updates.append(1))

    def our_step() -> None:
        updates.clear()
        started = time.perf_counter()
        step = trainer.step()
        seconds = {"whole": time.perf_counter() - started, "rollout": step["seconds_rollout"]}
        rollouts = config.rollouts_per_step - step["rollouts_dropped"]
        what = dict(rollouts=rollouts, tokens=step["trained_tokens"], updates=len(updates), reward=step["reward"])
        done["ours"].append({**seconds, **what})

    class Turns(TrainerCallback):
        def start(self) -> None:
            now.update(started=time.perf_counter(), rollout=0.0, rollouts=0, tokens=0, updates=0)

        def on_train_begin(self, *_, **__) -> None:
            self.start()

        def on_step_end(self, *_, **__) -> None:  # an optimizer step
            now["updates"] += 1
            if now["updates"] == config.updates_per_batch:
                done["TRL"].append({**now, "whole": time.perf_counter() - now["started"]})
                our_step()
                self.start()

    trl_trainer(trainer, str(Path(folder) / "initial"), steps, now, Turns()).train()
    trainer.close()
    return done


def end_to_end(steps: int) -> None:
    """Print the seconds of whole steps of the demonstration, by TRL's trainer and by this one, and what they did."""
    from report import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        done = in_turns(steps, folder)
    skipped = min(WARM_UP, steps - 1)
    counted = {name: measured[skipped:] for name, measured in done.items()}
    print(f"the demonstration's step, one thread: medians of {steps - skipped} of each, in turns, after {skipped}\n")
    print("| trainer | s a step | of them rollouts | rollouts | tokens | updates | mean reward of the first steps |")
    print("|---|---|---|---|---|---|---|")
    for name, measured in counted.items():
        whole, rollout = (statistics.median(step[key] for step in measured) for key in ("whole", "rollout"))
        each = [" to ".join(map(str, sorted({f(step[key] for step in measured) for f in (min, max)}))) for key in WORK]
        first = statistics.fmean(step["reward"] for step in done[name][:WARM_UP])
        print(f"| {name} | {whole:.3f} | {rollout:.3f} | {' | '.join(each)} | {first:.3f} |")
    ratio = {name: statistics.median(step["whole"] for step in measured) for name, measured in counted.items()}
    print(f"\nTRL / ours: {ratio['TRL'] / ratio['ours']:.2f}")


def draw(costs: list[tuple[int, dict[str, float]]], title: str, picture: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("plain", "o-"), ("shared", "o-"), ("dense", "x:")):
        axes.plot([G for G, _ in costs], [seconds[name] for _, seconds in costs], style, label=name)
    axes.set(xlabel="G, completions of one prompt", ylabel="seconds an update", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(picture)


def print_table(trainer, cases: list[tuple], runs: int, trl: bool) -> None:
    """Print the time of each way at each (P, C, G); TRL's at the first."""
    print("|   P |   C |  G | plain s | shared s | plain / shared | shared / dense | shared tokens / s |")
    print("|----:|----:|---:|--------:|---------:|---------------:|---------------:|------------------:|")
    against = ""
    for P, C, G in cases:
        s, off = measure(trainer, (P, C, G), runs, trl=trl and (P, C, G) == cases[0])
        case = f"{P:3} | {C:3} | {G:2} | {s['plain']:7.3f} | {s['shared']:8.3f}"
        ratios = f"{s['plain'] / s['shared']:14.2f} | {s['shared'] / s['dense']:14.2f}"
        print(f"| {case} | {ratios} | {G * (P + C) / s['shared']:17.0f} |", flush=True)
        if off is not None:
            against = (
                f"\nTRL at P={P} C={C} G={G}: {s['trl']:.3f} s, {s['trl'] / s['shared']:.2f} x the shared prefix; "
            )
            against += f"gradients differ by {off:.1e} (norm of the difference over the norm)"
    if against:
        print(against)


def print_against_group_size(trainer, P: int, C: int, runs: int, picture: str) -> None:
    """Print and draw the time of each way for 2 to 16 completions of one prompt."""
    groups = (2, 4, 8, 16)
    costs = [(G, measure(trainer, (P, C, G), runs)[0]) for G in groups]
    print(f"\nCost against G at P={P} C={C}:")
    print("|  G | plain s | shared s | dense s |\n|---:|--------:|---------:|--------:|")
    for G, s in costs:
        print(f"| {G:2} | {s['plain']:7.3f} | {s['shared']:8.3f} | {s['dense']:7.3f} |")
    first, last = costs[0][1], costs[-1][1]
    slope = {name: (last[name] - first[name]) / (groups[-1] - groups[0]) for name in ("plain", "shared", "dense")}
    print("seconds an added completion: " + ", ".join(f"{name} {value:.4f}" for name, value in slope.items()))
    draw(costs, f"P={P}, C={C}", picture)


def print_ragged(trainer, runs: int, trl: bool, budgets: list[tuple]) -> None:
    """Print the time of each way on ragged batches, by group size and micro-batch."""
    lengths = lognormal_lengths(len(RAGGED) * 8)
    print(f"prompts of {', '.join(map(str, RAGGED))} tokens, G completions of each, ", end="")
    print(f"{min(lengths)} to {max(lengths)} tokens, mean {statistics.fmean(lengths):.0f}\n")
    print("|  G | tokens | shared s | plain s | dense s | shared / dense | TRL s (rows) | TRL / shared | gradients |")
    print("|---:|-------:|---------:|--------:|--------:|---------------:|-------------:|-------------:|----------:|")
    seconds = {}
    for G, tokens, rows in budgets:
        s, off = measure(trainer, ragged(G), runs, trl, tokens, rows)
        seconds[G, tokens] = s["shared"]
        each = " | ".join(f"{s[name]:{width}.3f}" for name, width in (("shared", 8), ("plain", 7), ("dense", 7)))
        theirs = (f"{s['trl']:.3f} ({rows})", f"{s['trl'] / s['shared']:.2f}", f"{off:.1e}") if trl else ("", "", "")
        against = "{:>12} | {:>12} | {:>9}".format(*theirs)
        print(f"| {G:2} | {tokens:6} | {each} | {s['shared'] / s['dense']:14.2f} | {against} |", flush=True)
    small, whole = BUDGETS[2][1], BUDGETS[0][1]
    print(f"\nmicro-batches of {small} tokens / whole groups: {seconds[8, small] / seconds[8, whole]:.2f}")


def print_ragged_peaks(size: str, trl: bool) -> None:
    """Print the peak memory of updates on ragged batches, against the group size."""
    _, tokens, rows = BUDGETS[1]
    print(f"\npeak memory beyond the weights, MB, micro-batches of {tokens} tokens (TRL: {rows} rows):")
    print("| way | G = 8 | G = 32 | ratio |\n|---|---:|---:|---:|")
    for way in ("shared", "plain", *["trl"] * trl):
        few, many = (peak_memory(size, way, ragged(G), tokens, rows) for G in (8, 32))
        print(f"| {way} | {few:.0f} | {many:.0f} | {many / few:.2f} |", flush=True)


def print_checkpointing(runs: int) -> None:
    """Print what gradient checkpointing saves, and what it costs."""
    trainers = {}
    for on in (False, True):
        trainers[on] = make_trainer(make_model("deep", "cpu"), gradient_checkpointing=on)
    batch = sampled_by(trainers[False], make_batch(trainers[False].model, *LONG))
    ways = {on: partial(update, trainer, batch) for on, trainer in trainers.items()}
    off = difference(*(gradient(trainers[on], ways[on]) for on in (True, False)))
    s = medians(ways, runs)
    peaks = {on: peak_memory("deep", "shared", LONG, gradient_checkpointing=on) for on in (False, True)}
    print("\ngradient checkpointing at P={} C={} G={}, 8 layers: ".format(*LONG), end="")
    print(f"peak {peaks[False]:.0f} -> {peaks[True]:.0f} MB, ratio {peaks[True] / peaks[False]:.2f}; ", end="")
    print(f"{s[False]:.3f} -> {s[True]:.3f} s, ratio {s[True] / s[False]:.2f}; gradients differ by {off:.1e}")


def print_peak_memory(size: str, case: tuple) -> None:
    """Print the peak memory of an update both ways."""
    peak = {way: peak_memory(size, way, case) for way in ("plain", "shared")}
    print("\npeak memory of an update at P={} C={} G={}: ".format(*case), end="")
    ratio = peak["shared"] / peak["plain"]
    print(f"plain {peak['plain']:.0f} MB, shared {peak['shared']:.0f} MB, ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--ragged", action="store_true", help="measure ragged batches in micro-batches instead")
    parser.add_argument("--trl", action="store_true", help="time TRL's loss too, and compare its gradients")
    end_help = "measure so many whole steps of the demonstration and of TRL instead"
    parser.add_argument("--end_to_end", type=int, nargs="?", const=11, metavar="STEPS", help=end_help)
    parser.add_argument("--picture", default="benchmark.png", help="where to draw the cost against G")
    port_help = "measure rollouts ahead instead, on the vLLM server at this port of 127.0.0.1"
    parser.add_argument("--vllm_port", type=int, help=port_help)
    parser.add_argument("--model", help="with --vllm_port: the checkpoint folder that it serves")
    arguments = parser.parse_args()
    if (arguments.vllm_port is None) != (arguments.model is None):
        parser.error("--vllm_port and --model go together")
    if arguments.vllm_port is not None:
        return rollouts_ahead(arguments.vllm_port, arguments.model, arguments.runs)
    if arguments.end_to_end is not None:
        return end_to_end(arguments.end_to_end)
    size, runs = arguments.size, arguments.runs
    torch.set_num_threads(1 if size == "small" else 2)  # where tests run beside it, two would wait for each other
    weighed = arguments.device == "cpu" and size != "small"  # memory too
    trainer = make_trainer(make_model(size, arguments.device))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {arguments.device}, medians of {runs}\n")
    if arguments.ragged:
        print_ragged(trainer, runs, arguments.trl, BUDGETS[:3] if size == "small" else BUDGETS)
        if weighed:
            print_ragged_peaks(size, arguments.trl)
            print_checkpointing(runs)
        return
    cases = [LONG] if size == "2b" else CASES
    print_table(trainer, cases, runs, arguments.trl)
    print_against_group_size(trainer, *cases[1 % len(cases)][:2], runs, arguments.picture)
    if weighed:
        print_peak_memory(size, cases[0])


if __name__ == "__main__":
    main()
