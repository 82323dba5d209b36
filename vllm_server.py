"""Rollouts on a vLLM server: what to start it with, whether a policy can be trained on what it says, weight updates.

Every word of vLLM's own (routes, options, versions) stands in this file.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import ipaddress
import json
import os
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.utils import is_torchvision_available

from checkpoint import published_weights, shape_of, whole_folder
from lora import adapter_weights, lora_layers, save_adapter
from parallel import gathered, of_first, rank, together

if TYPE_CHECKING:
    from mm_grpo import MultimodalAdapter, MultimodalRLConfig

VLLM_COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm"
PROBE_SIZES = ((32, 32), (448, 336), (1344, 1008))  # (width, height) of pictures that both sides must expand alike
FOLDER_ROUTES = ("/collective_rpc", "/v1/load_lora_adapter")
UPDATE_ATTEMPTS = 3  # a weight update that kills the server so often is not a passing fault


class VLLMServer:
    """A running vLLM server, a `rollouts.Server`: completions over HTTP, weights through a shared folder or over NCCL.

    Start it with VLLM_COMMAND: dev mode has the routes for weight updates, processed logprobs are those of the
    distribution that was sampled, and without `--generation-config vllm` the checkpoint's sampling settings sneak in.

    Weights go over NCCL where the server was started with `--weight-transfer-config '{"backend": "nccl"}'`, the model
    is on a GPU and vllm is installed beside the trainer; else through the folder. The first update is of all weights,
    later ones of the blocks in which something is trained. Where the server was started with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, `--enable-lora` and a `--max-lora-rank` that is large enough, and the model has
    LoRA adapters on its language model, later updates are the adapter alone, through the folder.

    Args:
        model: in training; `sync` sends its weights, and the server must have its vocabulary.
        adapter: of its family: knows how many placeholders a picture fills (`encode_prompt`, where it has that).
        host, port: of the server.
        weights_dir: folder for weight updates, seen by both sides under this path. A new subfolder of it is ours, and
            is deleted at the end.
        timeout: seconds to wait for the server to come up, and for each part of a weight update.
        generation_timeout: seconds until a request for a completion fails.
        api_key: the server's, where it was started with one.

    Raises:
        TimeoutError, RuntimeError: what is wrong, and which option of the server fixes it.
    """

    shares_weights = False

    def __init__(
        self,
        model: torch.nn.Module,
        adapter: MultimodalAdapter,
        host: str,
        port: int,
        weights_dir: str | Path,
        timeout: float = 240.0,
        generation_timeout: float = 600.0,
        api_key: str | None = None,
    ):
        self.model, self.adapter, self.host, self.port = model, adapter, host, port
        self.url, self.timeout = f"http://{host}:{port}", timeout
        # of this run alone: a second one may use the same folder
        self.weights_dir = Path(weights_dir).resolve() / f"mm_grpo-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # no proxy knows the way to this machine
        direct = dict(trust_env=not is_local(host), headers={"Authorization": f"Bearer {api_key}"} if api_key else None)
        # A connection for each call: a server that fails inside one closes it, and /resume must come through even so.
        once = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=self.url, timeout=timeout, limits=once, **direct)
        # No request is sent twice: a server that was restarted in between would answer the second one with old weights.
        options = dict(api_key=api_key or "EMPTY", timeout=generation_timeout, max_retries=0)
        # Nor is a connection used twice: vLLM closes one that idles for 5 s, perhaps under a request.
        http = openai.DefaultAsyncHttpxClient(timeout=generation_timeout, limits=once, **direct)
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", http_client=http, **options)
        self.connect()

    @classmethod
    def from_config(cls, model, adapter, config: MultimodalRLConfig) -> VLLMServer:
        """The server that the config names."""
        weights_dir = config.weight_sync_dir or Path(config.output_dir) / "weights"
        options = dict(timeout=config.vllm_server_timeout, generation_timeout=config.generation_timeout)
        options |= dict(weights_dir=weights_dir, api_key=config.vllm_api_key)
        return cls(model, adapter, config.vllm_server_host, config.vllm_server_port, **options)

    def connect(self) -> None:
        """Wait until the server answers, and check that a policy can be trained on what it says."""
        deadline = time.monotonic() + self.timeout
        if not self._healthy():
            print(f"waiting up to {self.timeout:g} s for a vLLM server at {self.url}", flush=True)
        while not self._healthy():
            if time.monotonic() > deadline:
                within = f"within vllm_server_timeout={self.timeout:g} s"
                raise TimeoutError(f"no vLLM server answered at {self.url} {within}. Start one: {VLLM_COMMAND}")
            time.sleep(0.5)
        self.version = self._call("GET", "/weight_info").json()["weight_version"]
        served = self._call("GET", "/v1/models").json()["data"][0]
        self.model_name, self.max_model_len = served["id"], served["max_model_len"]
        settings = self._call("GET", "/server_info?config_format=json").json()["vllm_config"]
        self.dtype = getattr(torch, settings["model_config"]["dtype"].removeprefix("torch."))
        can_nccl = next(self.model.parameters()).is_cuda and importlib.util.find_spec("vllm") is not None
        backend = (settings["weight_transfer_config"] or {}).get("backend")
        self.transport = "nccl" if can_nccl and backend == "nccl" else "disk"
        self.nccl = None  # connected at the first update
        self.whole = True  # whether the next update is of all weights: the server may have started from others
        self.takes_adapters = self._takes_adapters(settings["lora_config"])
        self._check_logprobs()
        self._check_vocabulary()
        self._check_placeholders()
        self._check_image_backend()

    def up_to_date(self) -> bool:
        """Whether the server still has the weights of the last sync; one that was restarted has not."""
        try:
            return self._call("GET", "/weight_info").json()["weight_version"] == self.version
        except RuntimeError:
            return False

    def sync(self, model) -> None:
        """Bring the server's weights up to date. Every rank gathers what it has a shard of; the first one sends. A
        server that dies meanwhile is waited for, and then gets all of them."""
        for attempt in range(1, UPDATE_ATTEMPTS + 1):
            self.whole = of_first(self.whole or not self.up_to_date())  # one that was restarted behind our back
            wanted = self.transport if self.whole or not self.takes_adapters else None
            weights = adapter = None
            if wanted == "disk":
                weights = {name: tensor.cpu().contiguous() for name, tensor in self._weights(model) if not rank()}
            if self.takes_adapters:
                adapter = gathered(adapter_weights(model))
            send = partial(self._send, model, weights, adapter, wanted == "nccl", attempt == UPDATE_ATTEMPTS)
            if of_first(together(send)):
                break
        self.version, self.model_name = of_first((self.version, self.model_name))
        self.whole = False

    def _send(self, model, weights: dict | None, adapter: dict | None, over_nccl: bool, last: bool) -> bool:
        """Whether the server has got them; False where it died, and answers again. Other ranks only gather."""
        if rank():
            for _ in self._weights(model) if over_nccl else ():
                pass
            return True
        try:
            self._push(model, weights and self._write(weights), adapter and self._write_adapter(adapter), over_nccl)
            return True
        except RuntimeError as error:
            if last or self._healthy():
                raise
            warnings.warn(f"{error}. Waiting for the server; the weight update starts over")
            self.connect()
            return False

    def _push(self, model, folder: Path | None, adapter: Path | None, over_nccl: bool) -> None:
        """Pause, load, drop every cache of the old policy, name the new one, resume (whatever happens in between)."""
        try:
            self._call("POST", "/pause?mode=wait")
            if folder is not None:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                self._call("POST", "/collective_rpc", json=reload)
            elif over_nccl:
                self.nccl = self.nccl or nccl_sender(self, model)
                self.nccl.send_weights()
            if adapter is not None:
                self._load_adapter(adapter)
            if not self._call("POST", "/reset_prefix_cache").json()["success"]:
                raise RuntimeError(f"{self.url}/reset_prefix_cache: requests of the old policy still hold blocks")
            self._call("POST", "/reset_mm_cache")
            self._call("POST", "/reset_encoder_cache")
            self.version = f"mm_grpo-{uuid.uuid4().hex}"
            self._call("POST", "/update_weight_version", json={"new_version": self.version})
        finally:
            self._call("POST", "/resume")

    def _weights(self, model, **options) -> Iterator[tuple[str, Tensor]]:
        """Each parameter by the name that the server knows it by, in the type that it computes in; of those alone that
        the server does not have."""
        weights = published_weights(model, merge=not self.takes_adapters, trained=not self.whole, **options)
        return ((name, tensor.to(self.dtype)) for name, tensor in weights)

    def _write(self, weights: dict[str, Tensor]) -> Path:
        """The weights, as a folder."""
        folder = self.weights_dir / "policy"
        with whole_folder(folder, replace=True) as fresh:
            save_file(weights, fresh / "model.safetensors")
        return folder

    def _write_adapter(self, weights: dict[str, Tensor]) -> Path:
        """The adapter, as a folder of a name that no other has: what vLLM has cached it knows by the adapter's name."""
        folder = self.weights_dir / f"{self.weights_dir.name}-{uuid.uuid4().hex[:8]}"
        with whole_folder(folder) as fresh:
            save_adapter(fresh, self.model, weights)
        return folder

    def _load_adapter(self, folder: Path) -> None:
        """Load it and let go of older ones. The folder stays: vLLM may read it again."""
        self._call("POST", "/v1/load_lora_adapter", json={"lora_name": folder.name, "lora_path": str(folder)})
        self.model_name = folder.name
        served = [entry["id"] for entry in self._call("GET", "/v1/models").json()["data"]]
        for name in served:
            if name.startswith(self.weights_dir.name) and name != folder.name:
                self._call("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
        for other in self.weights_dir.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _takes_adapters(self, server: dict | None) -> bool:
        """Whether the model has LoRA adapters that the server, by its lora_config, is to add to its own weights.

        Raises:
            RuntimeError: it would, but for one of its options.
        """
        layers = lora_layers(self.model)
        if not layers or server is None:
            return False
        inside = set(self.model.get_decoder().modules())
        if outside := [name for name, layer in layers.items() if layer not in inside]:
            why = f"vLLM adds adapters to the language model alone, and {outside[0]} has one"
            warnings.warn(f"{self.url}: {why}: updates are of whole weights, adapters merged into them")
            return False
        rank = max(rank for layer in layers.values() for rank in layer.r.values())
        if server["max_lora_rank"] < rank:
            fix = f"start it with --max-lora-rank {rank} or more"
            raise RuntimeError(f"{self.url}: its max_lora_rank is {server['max_lora_rank']}, lora_rank={rank}: {fix}")
        if self._request("POST", "/v1/load_lora_adapter", json={}).status_code == 404:
            fix = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (without --enable-lora it gets merged weights)"
            raise RuntimeError(f"{self.url}/v1/load_lora_adapter does not exist: {fix}")
        return True

    def close(self) -> None:
        self.http.close()
        shutil.rmtree(self.weights_dir, ignore_errors=True)

    def __str__(self) -> str:
        weights = "over NCCL" if self.transport == "nccl" else f"through {self.weights_dir}"
        weights += ", then the adapter alone" if self.takes_adapters else ""
        flag = f"; start it with {flag}" if (flag := processor_flag(self.adapter)) else ""
        return f"by the vLLM server at {self.url}, weights {weights}{flag}"

    def _healthy(self) -> bool:
        try:
            return self.http.get("/health", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def _request(self, method: str, route: str, **arguments) -> httpx.Response:
        try:
            return self.http.request(method, route, **arguments)
        except httpx.TimeoutException:
            raise RuntimeError(f"{self.url}{route}: no answer within vllm_server_timeout={self.timeout:g} s") from None
        except httpx.TransportError as error:
            raise RuntimeError(f"{self.url}{route}: {type(error).__name__}: {error}") from None

    def _call(self, method: str, route: str, **arguments) -> httpx.Response:
        response = self._request(method, route, **arguments)
        if response.status_code == 404 and route != "/v1/load_lora_adapter":  # there: no such folder
            start = "start the server (vLLM 0.32 or later) with VLLM_SERVER_DEV_MODE=1"
            raise RuntimeError(f"{self.url}{route} does not exist: {start}")
        if response.status_code != 200:
            hint = f". Can the server read {self.weights_dir}? (weight_sync_dir)" if route in FOLDER_ROUTES else ""
            hint = ". Is that the server's --api-key? (vllm_api_key)" if response.status_code == 401 else hint
            raise RuntimeError(f"{self.url}{route}: {response.status_code} {response.text[:500]}{hint}")
        return response

    def _complete(self, **request) -> httpx.Response:
        """One token, straight from token ids."""
        ask = {"model": self.model_name, "prompt": [1, 2, 3], "max_tokens": 1, "return_token_ids": True}
        return self._request("POST", "/v1/completions", json={**ask, **request})

    def _check_logprobs(self) -> None:
        """The likeliest token's logprob must change with the temperature; where it does not, they are raw logprobs."""
        best = []
        for temperature in (1.0, 0.5):
            answer = self._complete(temperature=temperature, logprobs=1).raise_for_status().json()["choices"][0]
            if not answer.get("token_ids"):
                raise RuntimeError(f"{self.url}: return_token_ids gave no token ids; vLLM 0.10.2 or later is needed")
            best.append(max(answer["logprobs"]["top_logprobs"][0].values()))
        if best[0] < -1e-3 and abs(best[0] - best[1]) < 1e-6:
            fix = "start it with --logprobs-mode processed_logprobs"
            raise RuntimeError(f"{self.url} reports logprobs before the temperature: {fix}")

    def _check_vocabulary(self) -> None:
        """The server must know the trainer's last token id, and none after it."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        if head is None:
            return
        size = len(head.weight)
        answers = [self._complete(logit_bias={str(token): 0}) for token in (size - 1, size)]
        if [answer.status_code for answer in answers] != [200, 400]:
            refused = [answer.text[:300] for answer in answers if answer.status_code != 200]
            said = refused[0] if refused else f"token id {size} is known"
            other = f"its model has another vocabulary than the trainer's, which has {size} token ids"
            fix = "Serve the checkpoint that is trained (vllm serve MODEL)"
            raise RuntimeError(f"{self.url}: {other}. {fix}. The server said: {said}")

    def _check_placeholders(self) -> None:
        """The server must expand a picture to as many placeholder tokens as the adapter does, whatever its size."""
        if not hasattr(self.adapter, "encode_prompt"):
            return

        placeholders = lambda ids: sum(token in self.adapter.placeholder_ids for token in ids)
        for size in PROBE_SIZES:
            png = io.BytesIO()
            Image.new("RGB", size, "grey").save(png, format="PNG")
            url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
            messages = [{"role": "user", "content": content}]
            try:
                expected = self.adapter.encode_prompt(messages).ids
            except ValueError:  # it takes no pictures
                return
            if len(expected) >= self.max_model_len:
                continue  # such a picture cannot be asked about at all
            ask = {"model": self.model_name, "messages": messages, "max_tokens": 1, "return_token_ids": True}
            answer = self._request("POST", "/v1/chat/completions", json=ask)
            shape, wanted = f"a picture of {size[0]} x {size[1]} pixels", placeholders(expected)
            fix = f"vLLM: {processor_flag(self.adapter) or '--mm-processor-kwargs'}, trainer: --processor_kwargs"
            if answer.status_code != 200:
                said = f"{answer.text[:300]} (--limit-mm-per-prompt, --max-model-len, or image size limits; {fix})"
                raise RuntimeError(f"{self.url} refuses {shape}, {wanted} placeholders for the adapter: {said}")
            got = placeholders(answer.json()["prompt_token_ids"])
            if got != wanted:
                sizes = f"{shape} to {got} placeholders, the adapter to {wanted}"
                raise RuntimeError(f"{self.url} expands {sizes}: give both the same image size limits ({fix})")

    def _check_image_backend(self) -> None:
        """Images are resized by torchvision in vLLM, and to other pixels by Pillow."""
        images = getattr(getattr(self.adapter, "processor", None), "image_processor", None)
        if isinstance(images, PilBackend) and not is_torchvision_available():
            warnings.warn(
                "images are resized by Pillow here and by torchvision in vLLM, to other pixels: tiny models' logprobs "
                "differ by 1e-3 to 2e-2. Install torchvision beside the trainer; images that need no resizing are safe"
            )


def is_local(host: str) -> bool:
    """Whether it is a name or address of this machine or of its own network."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def processor_flag(adapter) -> str:
    """The flag that has a vLLM server process media as this adapter does; empty where nothing was asked for."""
    options = getattr(adapter, "processor_kwargs", None)
    return f"--mm-processor-kwargs '{json.dumps(options)}'" if options else ""


def nccl_sender(server: VLLMServer, model: torch.nn.Module):
    """vLLM's own sender, connected to the server's workers: `send_weights()` broadcasts the model's."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Weights(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            named = server._weights(model, read=shape_of)
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return server._weights(model)

    with socket.create_connection((server.host, server.port)) as connection:
        address = connection.getsockname()[0]  # of ours, the one that the server can reach
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    workers = server._call("GET", "/get_world_size").json()["world_size"]
    group = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + workers)
    client = HTTPVLLMWeightSyncClient(server.url, timeout=server.timeout)
    return WeightTransferTrainerFactory.trainer_init(group, client=client, source=Weights())
