"""The README and the pages of docs/: what they quote is what stands there, and what they tell a reader to type runs.

    pytest test_readme.py test_vllm_readme.py

Each command runs in its CPU form: as it stands, with fewer and smaller steps appended (of an option that is given
twice the last one holds), two ranks in place of eight, and a tiny checkpoint of the same architecture where a published
one is named. The commands with a vLLM server are those of `test_vllm_readme.py`.
"""

import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import make_trainer, needs
from mm_grpo import DEMO, MultimodalGRPOTrainer, MultimodalRLConfig

HERE = Path(__file__).parent
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
FEW = "--eval_examples 4 --rollouts_per_step 32 --max_tokens 3 --lr_scheduler_type constant".split()
SMALL = {"benchmark.py": "--size small --runs 1", "--end_to_end": "--end_to_end 2", "--vllm_port": "--runs 1"}
PACKAGES = {"--lora_rank": "peft", "--trl": "trl", "--end_to_end": "trl"}  # what only some commands need


def blocks(page: Path, language: str) -> list[str]:
    return [textwrap.dedent(b) for b in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, in order."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def kind(words: list[str]) -> str:
    """A command is of one of these kinds: setup, tests, server, trainer (beside a server), tool (beside a server)."""
    if words[0] in ("[", ".venv/bin/pip"):
        return "setup"
    if "serve" in words or "vllm.entrypoints.openai.api_server" in words:
        return "server"
    beside = " beside a server" if {"--vllm_server_host", "--vllm_port"} & {*words} else ""
    if "mm_grpo.py" in words:
        return "trainer" + beside
    return "tests" if "pytest" in words else "tool" + beside


def trainer_arguments(words: list[str], steps: int, folder: Path) -> list[str]:
    """What follows `mm_grpo.py`, in its CPU form.

    Args:
        steps: how many there are to be at most.
        folder: where the command runs. A checkpoint of an earlier run there is the one that this run has left.
    """
    given = words[words.index("mm_grpo.py") + 1 :]
    for i, word in enumerate(given):
        if re.fullmatch(r"runs/.*/checkpoint-\d+", word):
            given[i] = str(next(folder.joinpath(word).parent.glob("checkpoint-*")))
    if "--max_steps" in given:
        steps = min(steps, int(given[given.index("--max_steps") + 1]))
    far = "--output_dir" in given and given[given.index("--output_dir") + 1].startswith("/")
    here = ["--output_dir", str(folder / "run")] if far else []
    return [*given, *FEW, "--max_steps", str(steps), *here]


def run_trainer(runs, words: list[str], folder: Path, steps: int, *more: str) -> str:
    """Run a trainer's command; what it said on the screen."""
    said, arguments = len(runs.said()), [*trainer_arguments(words, steps, folder), *more]
    ranks = min(2, int(words[words.index("--nproc-per-node") + 1])) if "--nproc-per-node" in words else 1
    started = runs.start_ranks(ranks, *arguments, cwd=folder) if ranks > 1 else [runs.start(*arguments, cwd=folder)]
    assert [runs.end(process) for process in started] == [0] * ranks, runs.said()[said:][-3000:]
    screen = runs.said()[said:]
    assert screen.count("look at it: ") == 1 and "Traceback" not in screen
    return screen


def run_tool(words: list[str], folder: Path, *more: str) -> str:
    """Run another program of the project; what it printed."""
    assert words[0] == ".venv/bin/python"
    small = [option for name, options in SMALL.items() if name in words for option in options.split()]
    command = [sys.executable, str(HERE / words[1]), *words[2:], *small, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def needed(*commands: list[str]) -> list[pytest.MarkDecorator]:
    """Marks of a test of these commands: it is skipped where a package is missing that one of them needs."""
    packages = {PACKAGES[word] for words in commands for word in words if word in PACKAGES}
    return [needs(package) for package in sorted(packages)]


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem, marks=needed(*c)) for p in PAGES if (c := commands(p))])
def test_every_command_of_a_page_runs_in_its_order(page, runs, tmp_path):
    """But those that set an environment up or run the tests, which `.ci/run` does, and those beside a server."""
    for i, words in enumerate(commands(page)):
        if kind(words) == "trainer":
            run_trainer(runs, words, tmp_path, i + 1)
        if kind(words) == "tool":
            printed = run_tool(words, tmp_path)
            if "--trl" in words:  # TRL's own loss on the same tensors has the same gradients
                rows = [line for line in printed.splitlines() if re.match(r"\| +\d+ \|", line)]
                assert len(rows) == 3 and max(float(row.split("|")[-2]) for row in rows) < 1e-5


def test_what_is_shown_to_a_reader_is_what_ci_runs():
    """`.ci/run` takes the commands that are marked in the README from there; packages have the versions it installs."""
    ci, listed = ((HERE / name).read_text() for name in (".ci/run", "requirements.txt"))
    assert all(mark in ci for mark in ("block test", "block run", "$test_command", "$run_command"))
    (tests,) = [words for page in PAGES for words in commands(page) if kind(words) == "tests"]
    assert tests in commands(HERE / "README.md")
    text = "\n".join(page.read_text() for page in PAGES)
    pinned = set(re.findall(r"pip install (?:-q )?((?:[a-z]+==[\d.]+ ?)+)", text))
    versions = {package for packages in pinned for package in packages.split()}
    assert len(versions) > 3 and [version for version in versions if version not in ci + listed] == []


def test_every_option_that_a_page_names_is_there():
    """In its text: `--like this`. Those of commands are tried by running them."""
    benchmark = re.findall(r'add_argument\("(--\w+)"', (HERE / "benchmark.py").read_text())
    known = {f"--{name}" for name in (*MultimodalRLConfig.__dataclass_fields__, "adapter", "model", "demo", "help")}
    servers = [words for page in PAGES for words in commands(page) if kind(words) == "server"]
    known |= {*benchmark, *(word for words in servers for word in words if word.startswith("--"))}
    # of vLLM, where no command uses them: named as possibilities
    known |= {"--allowed-local-media-path", "--allowed-media-domains", "--data-parallel-size", "--tensor-parallel-size"}
    known |= {"--weight-transfer-config", "--api-key", "--mm-processor-kwargs", "--enable-auto-tool-choice"}
    known |= {"--tool-call-parser", "--mode"}  # and what is no option and is refused
    found = {word for page in PAGES for code in re.findall(r"`([^`\n]+)`", page.read_text()) for word in code.split()}
    named = {word for word in found if word.startswith("--") and len(word) > 2}
    assert len(named) > 30 and named - known == set()


# ---------------------------------------------------------------- code


def test_the_equations_and_the_step_in_the_readme_are_those_in_the_file():
    step = textwrap.dedent(inspect.getsource(MultimodalGRPOTrainer.step.__wrapped__))
    assert step in blocks(HERE / "README.md", "python")
    method = (HERE / "README.md").read_text().partition("## The method")[2]
    equations = re.findall(r"^    (\S.*)$", method.partition("```")[0], flags=re.M)
    file = [line.strip() for line in (HERE / "mm_grpo.py").read_text().splitlines()]
    assert len(equations) == 4 and [line for line in equations if line not in file] == []


def test_the_pages_that_the_readme_names_are_there_and_their_pictures_too():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 10 and [link for page, link in links if not (page.parent / link).exists()] == []


def test_the_usage_example_of_the_readme_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = [block for block in blocks(HERE / "README.md", "python") if "trainer.train()" in block]
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert list(tmp_path.glob("*/checkpoint-3/config.json"))


def test_the_adapter_of_docs_trains(tmp_path, monkeypatch):
    """The adapter of docs/fork.md, on a model that is no Transformers class, through the trainer's update."""
    (example,) = [block for block in blocks(HERE / "docs/fork.md", "python") if "def build_batch" in block]
    names: dict = {"__name__": "readme"}
    exec(compile(example, "fork.md", "exec"), names)
    code = [line for line in example.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 30
    source = make_trainer(
        "llava", {"num_train_examples": 16, "num_eval_examples": 1}, **DEMO | {"rollouts_per_step": 16}
    )
    outputs = source.rollouts.collect()

    class MeanColour(torch.nn.Module):
        """Predicts every token from the mean colour of the picture and the token before."""

        def __init__(self):
            super().__init__()
            self.embed, self.look = torch.nn.Embedding(100, 16), torch.nn.Linear(3, 16)
            self.head = torch.nn.Linear(16, 100)

        def forward(self, input_ids, attention_mask, pixel_values):
            return self.head(torch.tanh(self.embed(input_ids) + self.look(pixel_values.mean((-1, -2)))[:, None]))

    adapter = names["ThumbnailAdapter"](source.tokenizer)
    trainer = MultimodalGRPOTrainer(MeanColour(), source.tokenizer, adapter, source.config, server=source.server)
    batch = adapter.build_batch(outputs)
    assert batch.pixel_values.shape[1:] == (3, 32, 32) and len(batch) == 16
    batch = replace(batch, rewards=torch.arange(4.0).repeat(4))  # of each group of four
    before = trainer.model.look.weight.clone()
    with pytest.warns(UserWarning, match="disagree"):  # another model sampled these completions
        metrics = trainer.update(batch)
    assert metrics["zero_spread_fraction"] == 0 and not torch.equal(before, trainer.model.look.weight)
