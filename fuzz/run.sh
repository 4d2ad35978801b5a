#!/usr/bin/env bash
# Fuzzes each target (or those that are named) for so many seconds: fuzz/run.sh SECONDS [TARGET…]
#
# With the stable compiler: coverage is counted by passes of LLVM that it has. FUZZ_SANITIZER=address adds AddressSanitizer, whose
# switch is unstable, and for which everything is compiled once more. FUZZ_SEED=N begins the same inputs
# each time. What is found lies in fuzz/artifacts/TARGET; copy it to fuzz/regressions/TARGET, where models/tests/fuzz_replay.rs
# runs it from then on.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:?how many seconds for each target}
shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(basename -s .rs -a fuzz_targets/*.rs)

host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
if [ -n "${FUZZ_SANITIZER:-}" ]; then
  export RUSTC_BOOTSTRAP=1 RUSTFLAGS="$RUSTFLAGS -Zsanitizer=$FUZZ_SANITIZER" CARGO_TARGET_DIR=target/$FUZZ_SANITIZER
fi
cargo build --release --target "$host"
# The files that a target writes are small and many.
if [ -d /dev/shm ]; then export TMPDIR=${TMPDIR:-/dev/shm}; fi
# Everything that is needed to see it again: this output may be all that is left of the machine.
found() {
  local target=$1 input
  echo "$target: something is found"
  grep -a -A2 'panicked at\|^==[0-9]*== \?ERROR\|^SUMMARY' "artifacts/$target.log" | cut -c 1-2000
  for input in "artifacts/$target"/*; do
    echo "$input, of $(wc -c <"$input") bytes, by gzip and base64:"
    gzip -c "$input" | base64 -w 0 | cut -c 1-20000
    echo
  done
}
fuzz() {
  local target=$1
  mkdir -p "corpus/$target" "artifacts/$target" "regressions/$target"
  "${CARGO_TARGET_DIR:-target}/$host/release/$target" "corpus/$target" "seeds/$target" "regressions/$target" \
    -artifact_prefix="artifacts/$target/" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
    -max_len=65536 -len_control=20 -seed="${FUZZ_SEED:-0}" >"artifacts/$target.log" 2>&1 || { found "$target"; return 1; }
  echo "$target: $(grep -h 'stat::number_of_executed_units' "artifacts/$target.log" | grep -o '[0-9]*$') inputs, nothing found"
}
export -f fuzz found
export host seconds
mkdir -p artifacts
# As many at a time as there are cores.
printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I{} bash -c 'fuzz {}'
