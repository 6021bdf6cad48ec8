#!/usr/bin/env bash
# Everything that can be checked on a GPU, in one call, ending in one table.
#
#   scripts/gpu_check.sh                      builds with cargo, then checks the GPU of this machine
#   scripts/gpu_check.sh --pack DIR           builds, puts the binaries and goldens that a GPU machine needs into DIR
#   scripts/gpu_check.sh --bin DIR            checks with what --pack left: no cargo needed
#   scripts/gpu_check.sh --device emulated    the same on the emulator: a rehearsal
#   scripts/gpu_check.sh --only 'doctor goldens'   some of: doctor kernels goldens engine determinism sanitizer
#
# Logs go to --out (default: target/gpu_check). Exit code 1 if a check failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

device=cuda bin= pack= out=$root/target/gpu_check golden=${SPLEEN_GOLDEN:-$root/../shared/golden} steps=200 only=
while (($#)); do
  case $1 in
    --device) device=$2 ;;
    --bin) bin=$2 ;;
    --pack) pack=$2 ;;
    --out) out=$2 ;;
    --golden) golden=$2 ;;
    --steps) steps=$2 ;;
    --only) only=$2 ;;
    *) echo "gpu_check.sh: unknown option $1: see the head of the script" >&2; exit 2 ;;
  esac
  shift 2 || { echo "gpu_check.sh: an option has no value" >&2; exit 2; }
done
tests=(kernels parity device_engine)

checks=(doctor kernels goldens engine determinism sanitizer)
for name in $only; do
  [[ " ${checks[*]} " == *" $name "* ]] || { echo "gpu_check.sh: --only $name: there are ${checks[*]}" >&2; exit 2; }
done

# Copies the executable of target $1 to $2: of what cargo says on stdin, it is the last quoted path of a target's line.
executable() {
  local exe
  exe=$(grep "\"name\":\"$1\"" | grep -o '"executable":"[^"]*"' | tail -1 | cut -d'"' -f4)
  cp "$exe" "$2"
}

# The executables of tests and of the program, built with the emulator's feature, into folder $1.
build() {
  local json t
  json=$(cd "$root" && cargo test --release --no-run --message-format=json "${tests[@]/#/--test=}") || return 1
  mkdir -p "$1"
  for t in "${tests[@]}"; do
    executable "$t" "$1/$t" <<<"$json" || return 1
  done
  json=$(cd "$root" && cargo build --release --features emulator --message-format=json) || return 1
  executable spleen-hpc "$1/spleen-hpc" <<<"$json" || return 1
  strip "$1"/spleen-hpc "${tests[@]/#/$1/}" 2>/dev/null || true
}

if [[ -n $pack ]]; then
  build "$pack" || exit 1
  # All of them: a file that is in the index and not there counts as skipped. The folder may be read-only, a copy is not.
  mkdir -p "$pack/golden"
  cp -r --no-preserve=mode "$golden/." "$pack/golden/" || exit 1
  du -sh "$pack"
  exit 0
fi
if [[ -z $bin ]]; then
  bin=$root/target/gpu_check_bin
  build "$bin" || exit 1
elif [[ -d $bin/golden ]]; then
  golden=$bin/golden
fi
mkdir -p "$out"
export SPLEEN_TEST_DEVICE=$device SPLEEN_GOLDEN=$golden SPLEEN_STEPS=$steps
rows=()

# Whether --only leaves check $1 in.
wanted() {
  [[ -z $only || " $only " == *" $1 "* ]]
}

# check NAME COMMAND...: runs it, keeps its log, notes the verdict.
check() {
  local name=$1 begin=$SECONDS verdict=ok
  wanted "${name%%-*}" || return 0
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 || verdict="FAILED ($?)"
  grep -q '^skipped' "$out/$name.log" && [[ $verdict == ok ]] && verdict=skipped
  tail -n 3 "$out/$name.log"
  rows+=("$(printf '%-24s %-12s %6d s' "$name" "$verdict" $((SECONDS - begin)))")
}

# Two runs of one seed leave the same bytes.
determinism() {
  local run
  rm -rf "$out"/run_{a,b} "$out/phantoms"
  "$bin/spleen-hpc" phantom --out "$out/phantoms" --cases 6 || return 1
  for run in a b; do
    "$bin/spleen-hpc" train --device "$device" --data "$out/phantoms" --run "$out/run_$run" --epochs 2 \
      --channels 16,32,64 --patch 32 --roi 32 --val-cases 1 --lr 1e-3 || return 1
  done
  cmp "$out"/run_a/last.safetensors "$out"/run_b/last.safetensors &&
    cmp "$out"/run_a/best.safetensors "$out"/run_b/best.safetensors
}

check doctor "$bin/spleen-hpc" doctor --device "$device"
check kernels "$bin/kernels"
check goldens "$bin/parity" cuda
check engine "$bin/device_engine" --nocapture
check determinism determinism
if [[ $device == cuda ]] && wanted sanitizer; then
  for tool in memcheck racecheck synccheck initcheck; do
    if command -v compute-sanitizer >/dev/null; then
      check "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$bin/kernels" --test-threads 1
    else
      rows+=("$(printf '%-24s %-12s' "sanitizer-$tool" 'skipped: no compute-sanitizer')")
    fi
  done
fi

echo
echo "$(date -u +%F) ${device}: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo 'no GPU')"
printf '%s\n' "${rows[@]}"
! printf '%s\n' "${rows[@]}" | grep -q FAILED
