#!/usr/bin/env bash
# A Cloud TPU slice: installs on every host of it and starts the run there. JAX finds its peers by itself.
#   launch/tpu_vm.sh my-tpu us-east5-a configs/vit_l14.py /mnt/shared/l14 --config.data.dataset=my_pairs
# The workdir is a folder that every host sees.
set -euo pipefail

name=${1:?TPU name} zone=${2:?zone} config=${3:?config file} workdir=${4:?workdir}
shift 4
archive=$(mktemp -d)/clip_jax.tar.gz
changed=$(git stash create) # changes that are not committed go with it; of files that git does not know yet, none
git archive --format=tar.gz --output="$archive" "${changed:-HEAD}"

everywhere() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

gcloud compute tpus tpu-vm scp "$archive" "$name":clip_jax.tar.gz --zone="$zone" --worker=all
# Google's images for TPUs have Python 3.10; uv brings one that is new enough.
everywhere 'mkdir -p clip_jax && tar -C clip_jax -xf clip_jax.tar.gz && cd clip_jax &&
  python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv &&
  python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt "jax[tpu]" gcsfs s3fs'
everywhere "cd clip_jax && .venv/bin/python -m clip_jax.cli doctor"
# Every host starts its process again where that ends with 75, or by a signal (docs/operations.md).
arguments=(--config="$config" --workdir="$workdir" --config.compilation_cache="$workdir/programs" "$@")
everywhere "cd clip_jax && while .venv/bin/python train.py $(printf '%q ' "${arguments[@]}")
  code=\$?; [ \$code = 75 ] || [ \$code -ge 128 ]; do sleep 10; done; exit \$code"
