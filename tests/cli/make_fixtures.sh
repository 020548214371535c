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
printf 'a red circle\na blue square\n' >"$dir/prompts.txt"
"$bin/flux-cache-text" --prompts "$dir/prompts.txt" --t5 "$dir/models/t5.safetensors" --clip "$dir/models/clip.safetensors" --out "$dir/prompts"
"$bin/flux-train" --latents "$dir/latents" --text "$dir/text" --model "$dir/models/flux.safetensors" --max-steps 2 --learning-rate 0.1 \
  --rank 4 --save-every 0 --out "$dir/run"
cp "$dir"/run/step-000002/lora.safetensors "$dir/lora.safetensors"
"$bin/flux-sample" --text "$dir/prompts" --model "$dir/models/flux.safetensors" --size 64x64 --steps 2 --out "$dir/samples.h5"
