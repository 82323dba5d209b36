"""What one update costs: the plain forward, the shared prefix, and a dense pass over the distinct tokens, side by side.

The G completions of a prompt share the prompt and its images. The plain forward runs G * (P + C) tokens and G images,
the shared prefix P + G * C tokens and one image. The dense pass is the floor to compare with: one sequence of exactly
P + G * C tokens with one image.

    python benchmark.py                 # the table, the cost against G, peak memory; writes benchmark.png
    python benchmark.py --trl           # adds TRL's own GRPO loss on the same tensors (pip install trl)
    python benchmark.py --device cuda --size 2b      # a Qwen2-VL-2B shape in bf16 autocast, on a GPU
    python benchmark.py --vllm_port 8000 --model CHECKPOINT      # instead: steps with rollouts in turn and ahead
                                                                 # (async_rollouts), on the vLLM server there, which
                                                                 # serves that Qwen-VL checkpoint

Each figure is a median over runs that alternate between the ways; forward and backward, same weights, same batch. On
the CPU: float32, two threads, about 8 M parameters.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mm_grpo import MultimodalBatch, grpo_loss, score, token_weights
from shared_prefix import find_shared_prompts

CASES = [(428, 64, 8), (284, 32, 16), (172, 256, 8)]  # (P, C, G)
TEXT = 28  # prompt tokens that are not the image's
IMAGE_TOKEN, VISION_START, VISION_END = 3, 1, 2
SIZES = {
    "8m": dict(
        vocab=2048, mrope=[8, 12, 12],
        text=dict(
            hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        ),
        vision=dict(depth=4, embed_dim=256, hidden_size=256, num_heads=4, mlp_ratio=2),
    ),
    "2b": dict(
        vocab=151936, mrope=[16, 24, 24],
        text=dict(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2,
        ),
        vision=dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
    ),
}  # fmt: skip


def make_model(size: str, device: str) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL of the given size with random weights."""
    shape = SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope"]}
    text = dict(vocab_size=shape["vocab"], max_position_embeddings=8192, rope_parameters=rope, **shape["text"])
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


def make_batch(model, P: int, C: int, G: int) -> MultimodalBatch:
    """One group: a prompt of P tokens, all but 28 of them one square picture's, and G completions of C tokens."""
    side = int((P - TEXT) ** 0.5)  # the picture is side x side merged patches of 28 pixels
    if side * side != P - TEXT:
        raise ValueError(f"P={P}: must be a square plus {TEXT}")
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    text = torch.randint(5, vocab, (TEXT - 2,), generator=generator)
    picture = torch.tensor([VISION_START, *[IMAGE_TOKEN] * (side * side), VISION_END])
    prompt = torch.cat([picture, text])
    ids = torch.cat([prompt.expand(G, P), torch.randint(5, vocab, (G, C), generator=generator)], dim=1)
    sampled = torch.zeros_like(ids)
    sampled[:, P:] = 1
    return MultimodalBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        loss_mask=sampled,
        behavior_logprobs=torch.zeros(ids.shape),
        rewards=torch.randn(G, generator=generator),
        pixel_values=torch.randn(4 * side * side, 3 * 2 * 14 * 14, generator=generator),
        extra_model_kwargs={
            "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        },
        media_spans={
            "pixel_values": torch.tensor([[0, 4 * side * side]] * G),
            "image_grid_thw": torch.tensor([[0, 1]] * G),
        },
    ).to(model.device)


def dense_batch(batch: MultimodalBatch, P: int) -> MultimodalBatch:
    """One row of exactly the batch's distinct tokens: the prompt, then all completions one after the other."""
    one = batch.select([0])

    def joined(tensor):  # (G, L) -> (1, P + G * C)
        return torch.cat([tensor[:1, :P], tensor[:, P:].reshape(1, -1)], dim=1)

    by_token = ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")
    types = joined(batch.extra_model_kwargs["mm_token_type_ids"])
    return MultimodalBatch(
        **{name: joined(getattr(batch, name)) for name in by_token},
        rewards=one.rewards,
        pixel_values=one.pixel_values,
        extra_model_kwargs={**one.extra_model_kwargs, "mm_token_type_ids": types},
        media_spans=one.media_spans,
    )


def update(model, batch: MultimodalBatch, share: bool) -> None:
    """Forward and backward of one update, as the trainer does it."""
    shared = find_shared_prompts(model, batch, [IMAGE_TOKEN]) if share else None
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=batch.input_ids.is_cuda):
        logprobs, _ = score(model, batch, shared=shared, chunked=True)
    mask = batch.loss_mask[:, 1:]
    behavior = torch.where(mask != 0, logprobs.detach(), 0.0)
    loss, _ = grpo_loss(logprobs, behavior, batch.rewards, token_weights(mask, "dapo"))
    loss.backward()


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


def three_ways(model, P: int, C: int, G: int, runs: int) -> dict[str, float]:
    batch = make_batch(model, P, C, G)
    dense = dense_batch(batch, P)

    def way(batch, share):
        model.zero_grad(set_to_none=True)
        update(model, batch, share)

    ways = {"plain": lambda: way(batch, False), "shared": lambda: way(batch, True), "dense": lambda: way(dense, False)}
    return medians(ways, runs)


def peak_rss() -> float:
    """The most memory that this process has held so far, in MB. (Linux: getrusage would count the parent's too.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def peak_memory(size: str, way: str, P: int, C: int, G: int) -> float:
    """Megabytes that an update takes beyond the weights, at its peak, in a process of its own (CPU)."""
    code = (
        "import torch, benchmark as b; torch.set_num_threads(2);"
        f"model = b.make_model({size!r}, 'cpu'); batch = b.make_batch(model, {P}, {C}, {G});"
        "small = b.make_batch(model, 32, 2, 2); b.update(model, small, True); b.update(model, small, False);"
        f"before = b.peak_rss(); b.update(model, batch, {way == 'shared'}); print(b.peak_rss() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def trl_update(model, batch: MultimodalBatch, P: int) -> Callable[[], None]:
    """Forward and backward of TRL's `GRPOTrainer._compute_loss` on the same tensors: on-policy, beta 0, DAPO's mean."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tiny_vlm import make_tiny_vlm

    G = len(batch)
    _, tokenizer, _ = make_tiny_vlm("qwen")
    arguments = GRPOConfig(
        output_dir="outputs/trl",
        per_device_train_batch_size=G,
        num_generations=G,
        beta=0.0,
        loss_type="dapo",
        temperature=1.0,
        bf16=False,
        use_cpu=not batch.input_ids.is_cuda,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * G),
        processing_class=tokenizer,
    )
    ids, mask = batch.input_ids, batch.attention_mask
    media = batch.model_inputs()
    inputs = {
        "prompt_ids": ids[:, :P],
        "prompt_mask": mask[:, :P],
        "completion_ids": ids[:, P:],
        "completion_mask": mask[:, P:],
        "advantages": batch.rewards,
        "pixel_values": media["pixel_values"],
        "image_grid_thw": media["image_grid_thw"],
        "mm_token_type_ids": media["mm_token_type_ids"],
        "num_images": [1] * G,
        "num_items_in_batch": mask[:, P:].sum(),
    }
    trainer.current_gradient_accumulation_steps = 1

    def run() -> None:
        model.zero_grad(set_to_none=True)
        trainer._compute_loss(model, dict(inputs)).backward()

    return run


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def rollouts_ahead(port: int, folder: str, runs: int) -> None:
    """Whole steps with a real server: rollouts and update in turn, or the next rollouts during the update."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from adapters import QwenVLAdapter
    from mm_grpo import MultimodalGRPOTrainer, MultimodalRLConfig
    from report import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)  # the server needs a core too
    tokenizer = AutoTokenizer.from_pretrained(folder)
    steps: dict[bool, list[dict]] = {False: [], True: []}
    for _ in range(runs):
        for ahead in steps:
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            with tempfile.TemporaryDirectory() as output_dir:
                config = MultimodalRLConfig(
                    output_dir=output_dir,
                    vllm_server_host="127.0.0.1",
                    vllm_server_port=port,
                    async_rollouts=ahead,
                    max_steps=100,
                    learning_rate=1e-5,
                    rollouts_per_step=32,
                    rollouts_per_example=8,
                    max_tokens=64,
                )
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


def against_trl(model, P: int, C: int, G: int, runs: int) -> None:
    """Print the time of TRL's loss on the same tensors, and how far its gradients are from ours."""
    batch = make_batch(model, P, C, G)
    trl = trl_update(model, batch, P)
    trl()
    theirs = gradients(model)
    model.zero_grad(set_to_none=True)
    update(model, batch, share=True)
    ours = gradients(model)
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    ways = {"trl": trl, "shared": lambda: (model.zero_grad(set_to_none=True), update(model, batch, True))}
    s = medians(ways, runs)
    times = s["trl"] / s["shared"]
    print(f"\nTRL at P={P} C={C} G={G}: {s['trl']:.3f} s, {times:.2f} x the shared prefix; ", end="")
    print(f"gradients differ by {difference:.1e} (norm of the difference over the norm)")


def print_peak_memory(size: str, P: int, C: int, G: int) -> None:
    """Print the peak memory of an update both ways, each in a process of its own."""
    peak = {way: statistics.median(peak_memory(size, way, P, C, G) for _ in range(3)) for way in ("plain", "shared")}
    print(f"\npeak memory of an update at P={P} C={C} G={G}: ", end="")
    ratio = peak["shared"] / peak["plain"]
    print(f"plain {peak['plain']:.0f} MB, shared {peak['shared']:.0f} MB, ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--trl", action="store_true", help="time TRL's loss too, and compare its gradients")
    parser.add_argument("--picture", default="benchmark.png", help="where to draw the cost against G")
    port_help = "measure rollouts ahead instead, on the vLLM server at this port of 127.0.0.1"
    parser.add_argument("--vllm_port", type=int, help=port_help)
    parser.add_argument("--model", help="with --vllm_port: the checkpoint folder that it serves")
    arguments = parser.parse_args()
    if (arguments.vllm_port is None) != (arguments.model is None):
        parser.error("--vllm_port and --model go together")
    if arguments.vllm_port is not None:
        return rollouts_ahead(arguments.vllm_port, arguments.model, arguments.runs)
    torch.set_num_threads(2)
    model = make_model(arguments.size, arguments.device)
    cases = CASES if arguments.size == "8m" else [(1052, 256, 8)]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {arguments.device}, medians of {arguments.runs}\n")
    print("|   P |   C |  G | plain s | shared s | plain / shared | shared / dense | shared tokens / s |")
    print("|----:|----:|---:|--------:|---------:|---------------:|---------------:|------------------:|")
    for P, C, G in cases:
        s = three_ways(model, P, C, G, arguments.runs)
        case = f"{P:3} | {C:3} | {G:2} | {s['plain']:7.3f} | {s['shared']:8.3f}"
        ratios = f"{s['plain'] / s['shared']:14.2f} | {s['shared'] / s['dense']:14.2f}"
        print(f"| {case} | {ratios} | {G * (P + C) / s['shared']:17.0f} |", flush=True)

    if arguments.trl:
        against_trl(model, *cases[0], arguments.runs)
    P, C = cases[1][:2] if len(cases) > 1 else cases[0][:2]
    groups = (2, 4, 8, 16)
    costs = [(G, three_ways(model, P, C, G, arguments.runs)) for G in groups]
    print(f"\nCost against G at P={P} C={C}:")
    print("|  G | plain s | shared s | dense s |\n|---:|--------:|---------:|--------:|")
    for G, s in costs:
        print(f"| {G:2} | {s['plain']:7.3f} | {s['shared']:8.3f} | {s['dense']:7.3f} |")
    first, last = costs[0][1], costs[-1][1]
    slope = {name: (last[name] - first[name]) / (groups[-1] - groups[0]) for name in ("plain", "shared", "dense")}
    print("seconds an added completion: " + ", ".join(f"{name} {value:.4f}" for name, value in slope.items()))
    draw(costs, f"P={P}, C={C}", arguments.picture)

    if arguments.device == "cpu":
        print_peak_memory(arguments.size, *cases[0])


if __name__ == "__main__":
    main()
