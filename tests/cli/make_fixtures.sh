#!/usr/bin/env bash
# What the command-line cases share: make_fixtures.sh BIN_DIR DIR. Small models, pictures with captions, both caches.
set -euo pipefail
bin=$1 dir=$2
here=$(cd "$(dirname "$0")" && pwd)
rm -rf "$dir"
mkdir -p "$dir/home"
export HOME=$dir/home LC_ALL=C OMP_WAIT_POLICY=passive  # spinning threads starve the tests that run beside
"$bin/flux-model" tiny --out "$dir/models" --seed 7
python3 "$here/../../scripts/demo-pictures" "$dir/images" 4
"$bin/flux-cache-latents" --images "$dir/images" --resolution 64x64 --ae "$dir/models/ae.safetensors" --out "$dir/latents"
"$bin/flux-cache-text" --images "$dir/images" --t5 "$dir/models/t5.safetensors" --clip "$dir/models/clip.safetensors" \
  --t5-tokenizer "$dir/models/tokenizers/t5/spiece.model" --clip-tokenizer "$dir/models/tokenizers/clip" --out "$dir/text"
