#!/usr/bin/env bash
# Everything that only a GPU can tell, in one run of about twelve minutes on an H200:
#
#   benchmarks/gpu.sh --data=cifar10_1.npz,cifar10_2.npz
#
#   a  training steps of ResNet-56 next to PyTorch's, eager and compiled
#   b  the whole recipe of ResNet-56/CIFAR-10 at 0.9 and 0.95: TPP, L1, L1 with equal
#      epochs, from scratch; all runs of a ratio in one program
#   c  ResNet-50 in bfloat16: throughput next to PyTorch's
#   d  pruned networks: how much of the saved FLOPs is saved time
#   e  SmolLM2-135M, dense and pruned, next to transformers
#
# Each stage writes its JSON at once, to $OUT or to benchmarks/results. A stage whose
# JSON for this device is there is not run again; stage b continues from recipe.tar in
# that folder until it is finished. Needs Python with jax, flax, optax, orbax, torch,
# torchvision, and for stage e transformers. What else stage b needs (ml_collections,
# tensorboardX, matplotlib, jinja2) may come as wheels in a folder.
#
#   --data=FILES     CIFAR-10 from `python -m benchmarks.packed_images cifar10`;
#                    without it noise is trained on, and the record says so
#   --stages=abcde   stages to run
#   --seeds=N        seeds of stage b (1)
#   --minutes=N      time of all (12); the stages before b take about half of it, and b
#                    takes what is left
#   --wheels=FOLDER  wheels to install first, into a temporary folder
#   --tiny           the same in small, to see that it runs: also on a CPU
set -uo pipefail
cd "$(dirname "$0")/.."
data="" stages=abcde seeds=1 minutes=12 wheels="" tiny=""
for word in "$@"; do
  case "$word" in
    --data=*) data=${word#*=} ;;
    --stages=*) stages=${word#*=} ;;
    --seeds=*) seeds=${word#*=} ;;
    --minutes=*) minutes=${word#*=} ;;
    --wheels=*) wheels=${word#*=} ;;
    --tiny) tiny=yes ;;
    *) echo "error: unknown argument $word; see the head of $0" >&2; exit 1 ;;
  esac
done
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "$tiny" ]; then
  results=${OUT:-$(mktemp -d)}
else
  results=${OUT:-$PWD/benchmarks/results}
fi
mkdir -p "$results"
export BENCHMARK_RESULTS=$results PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # PyTorch needs memory in the same process
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/site" \
    "$wheels"/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$scratch/site
fi
device=$("$python" -c 'import jax; print(jax.default_backend())') || exit 1
[ "$device" = gpu ] || [ -n "$tiny" ] || {
  echo "error: jax sees no GPU; --tiny runs without one" >&2; exit 1; }
failed=0

# stage NAME SECONDS JSON COMMAND...: a module of benchmarks, unless its JSON is there.
stage() {
  local name=$1 seconds=$2 json=$3_$device.json start=$SECONDS
  shift 3
  [[ $stages == *$name* ]] || return 0
  if [ -e "$results/$json" ]; then
    echo "[$name] $json is there"
    return 0
  fi
  echo "[$name] $*"
  timeout --signal=TERM --kill-after=60 "$seconds" "$python" -m "$@"
  local code=$?
  if [ -e "$results/$json" ]; then
    echo "[$name] $json after $((SECONDS - start)) s"
  else
    echo "[$name] failed with exit code $code after $((SECONDS - start)) s" >&2
    failed=1
  fi
}

recipe() {
  [[ $stages == *b* ]] || return 0
  local missing json=$results/recipe_$device.json
  missing=$("$python" -c 'import tpp_jax.experiment, matplotlib, jinja2' 2>&1 | tail -1)
  if [ -n "$missing" ]; then
    echo "[b] left out: $missing" >&2
    failed=1
    return 0
  fi
  if grep -q '"state": "done"' "$json" 2>/dev/null; then
    echo "[b] is finished"
    return 0
  fi
  rm -f "$json"  # it is only what was reached so far
  # A relative path, since the configs of the runs name it: equal on every machine.
  local runs=runs/gpu_recipe${tiny:+_tiny}
  if [ ! -d "$runs" ]; then
    mkdir -p "$runs"
    cat "$results"/recipe.tar.* 2>/dev/null | tar -x -C "$runs" 2>/dev/null
  fi
  local left=$((60 * minutes - SECONDS - 45))  # the last checkpoints take a while
  stage b $((left + 90)) recipe benchmarks.gpu_recipe --workdir="$runs" \
    --data="$data" --seconds=$((left > 60 ? left : 60)) --seeds="$seeds" \
    ${tiny:+--tiny}
  rm -f "$results"/recipe.tar.*  # in parts, so that no file is larger than 15 MiB
  tar -c -C "$runs" --exclude=images.npz --exclude='*.png' --exclude='*.svg' \
    --exclude=tensorboard --exclude=report.html . |
    split --bytes=15M --numeric-suffixes --suffix-length=1 - "$results/recipe.tar."
}

if [ -n "$tiny" ]; then
  stage a 900 step_cifar_resnet8 benchmarks.step --model=cifar_resnet8 \
    --batch_size=8 --rounds=1
  recipe
  stage c 900 step_resnet18_bfloat16 benchmarks.step --half --model=resnet18 \
    --batch_size=2 --rounds=1
  stage d 900 pruned_speed_bfloat16 benchmarks.pruned_speed --dtype=bfloat16 \
    --batch_size=8 --networks=cifar_resnet56
  stage e 900 language_speed benchmarks.language_speed --tiny --half --rounds=1 \
    --batch_size=2 --length=32
else
  stage a 150 step_cifar_resnet56 benchmarks.step --compiled
  stage a 120 step_cifar_resnet56_bfloat16 benchmarks.step --compiled --half
  stage c 150 step_resnet50_bfloat16 benchmarks.step --compiled --half \
    --model=resnet50 --batch_size=256 \
    --ratios='*layer[123]*.conv[12]:0.6,*layer4*.conv[12]:0.21'
  stage d 120 pruned_speed_bfloat16 benchmarks.pruned_speed --dtype=bfloat16 \
    --imagenet_batch_size=256
  stage e 150 language_speed benchmarks.language_speed --half --compiled
  recipe  # last, since it takes all the time that it gets
fi
echo "The results are in $results."
exit $failed
