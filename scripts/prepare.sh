#!/usr/bin/env bash
# Download a model from the hub and convert it: scripts/prepare.sh REPO [flags of convert_hf_checkpoint.py]
# The checkpoint comes to lie in checkpoints/REPO (CHECKPOINTS names another place than checkpoints).
set -euo pipefail
if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: scripts/prepare.sh owner/model [--revision R] [--dtype D]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$([[ -x $root/.venv/bin/python ]] && echo "$root/.venv/bin/python" || echo python3)}
repo=$1
shift
exec "$python" "$root/convert_hf_checkpoint.py" --checkpoint_dir "$repo" --output_dir "${CHECKPOINTS:-$root/checkpoints}/$repo" "$@"
