#!/usr/bin/env bash
# The minimal run of the original work: OpenAI ViT-B/32, CC3M calibration, ImageNet zero-shot.
# usage: CC3M=/data/cc3m IMAGENET=/data/imagenet/val examples/run.sh [extra flags]
set -euo pipefail
: "${CC3M:?folder with cc3m-train-0000.tar ...}" "${IMAGENET:?validation folder, one folder a class}"

qwt-fx quantize \
  --model ViT-B/32 --pretrained openai \
  --train-data "$CC3M/cc3m-train-{0000..0575}.tar" \
  --imagenet-val "$IMAGENET" \
  --choice all_quant --recipe repq-vit --compat original \
  --wq_params 6 --aq_params 6 --qwerty --iter 4 --batch-size 128 \
  --output vit-b-32-w6a6-qwt "$@"
