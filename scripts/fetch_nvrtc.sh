#!/usr/bin/env bash
# Fetches NVRTC, the CUDA compiler (90 MB, no GPU or toolkit needed), into the user's cache, where spleen-hpc and its
# tests look for it; or into the folder named, for which it prints the variable that spleen-hpc wants.
#
#   scripts/fetch_nvrtc.sh [FOLDER]
set -euo pipefail

version=13.0.88
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/spleen-hpc/nvrtc}
library=$folder/nvidia/cu13/lib/libnvrtc.so.13

if [ ! -e "$library" ]; then
  # Whole or not at all, also when two fetch at once.
  mkdir -p "$folder"
  unfinished=$(mktemp -d "$folder/.fetching-XXXXXX")
  trap 'rm -rf "$unfinished"' EXIT
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target "$unfinished" \
    "nvidia-cuda-nvrtc==$version" "nvidia-cuda-cuobjdump==13.2.*" "nvidia-cuda-nvdisasm==13.2.*" >&2
  mv -T "$unfinished/nvidia" "$folder/nvidia" 2>/dev/null || [ -e "$library" ]
fi
echo "export SPLEEN_NVRTC=$folder"
