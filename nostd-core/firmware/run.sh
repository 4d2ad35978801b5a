#!/usr/bin/env bash
# Runs an image of `export-embedded` on this machine and on emulated microcontrollers, and compares what they print.
#   ./run.sh IMAGE [TARGET...]      (no target: all)
#   riscv32      RV32IMC, no FPU: qemu-system-riscv32 -M virt
#   thumb        Cortex-M4F: qemu-system-arm -M mps2-an386
#   xtensa       windowed ABI as on the ESP32-S3, floats in software: qemu-system-xtensa -M sim -cpu dc233c
#   xtensa-fpu   the same program, its f32 code made for the FPU: -cpu de233_fpu
# Lines that begin with # may differ. Installs what is missing (apt, rustup). Ends with 'N passed, N failed'.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
HERE=$(cd "$(dirname "$0")" && pwd)
IMAGE=$(realpath "$1"); shift
export IMAGE CARGO_INCREMENTAL=0
[ $# -gt 0 ] || set -- riscv32 thumb xtensa xtensa-fpu
cd "$HERE"
TARGET=${CARGO_TARGET_DIR:-$HERE/target}
OUT=$TARGET/runs
mkdir -p "$OUT"
unset CARGO_TARGET_DIR
LIMIT=${LIMIT:-900}         # seconds a program may run
SCREEN="-nographic -monitor none -icount shift=0"

install() { # command package...
  command -v "$1" >/dev/null && return
  local sudo; sudo=$(command -v sudo || true)
  shift
  { $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$@" >/dev/null; } ||
    { echo "run.sh: apt could not install $*" >&2; return 1; }
}

rustup_build() { # target linker-script
  rustup target list --installed | grep -qx "$1" || rustup target add "$1"
  cargo rustc -q --release --locked --target-dir "$TARGET" --target "$1" -- "-Clink-arg=-T$HERE/$2"
  ELF=$TARGET/$1/release/firmware
}

# Xtensa is made by Debian's rustc: rustup's has no LLVM for it. Espressif's own compiler is not needed.
xtensa_start() { # object fpu
  install qemu-system-xtensa qemu-system-misc
  install llvm-mc-22 llvm-22
  [ -x /usr/bin/rustc ] && [ -d /usr/lib/rustlib/src/rust/library ] || install no-such-command rustc-web cargo-web rust-web-src
  llvm-mc-22 -triple=xtensa-none-elf -filetype=obj --defsym WINDOWED=1 --defsym "FPU=$2" \
    -mattr=+fp,+windowed,+density,+exception,+coprocessor,+rvector,+interrupt,+s32c1i,+timers3 xtensa/start.S -o "$1"
}
xtensa_build() {
  xtensa_start "$OUT/start.o" 0
  rm -f "$TARGET"/xtensa-windowed-none-elf/release/deps/firmware-*.ll
  touch src/main.rs     # so that the LLVM code is written again
  PATH="$HERE/xtensa:$PATH" RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 RUSTUP_TOOLCHAIN='' RUSTFLAGS='' /usr/bin/cargo rustc -q \
    --release --locked -Zbuild-std=core -Zbuild-std-features=compiler-builtins-mem -Zjson-target-spec --target-dir "$TARGET" \
    --target "$HERE/xtensa/xtensa-windowed-none-elf.json" -- --emit=llvm-ir,link "-Clink-arg=$OUT/start.o" \
    "-Clink-arg=--map=$OUT/xtensa.map"
  ELF=$TARGET/xtensa-windowed-none-elf/release/firmware
}
# Fails where LLVM's FPU code for Xtensa cannot be made of a function of the core: Espressif's compiler has the same defect.
xtensa_fpu_build() {
  xtensa_build
  local deps=$TARGET/xtensa-windowed-none-elf/release/deps
  xtensa_start "$OUT/start-fpu.o" 1
  xtensa/fpu-variant.py --deny=candle_sparse_core "$deps"/firmware-*.ll "$OUT/fpu.o"
  ELF=$OUT/fpu.elf
  xtensa/xtld.py "$OUT/start-fpu.o" "$OUT/fpu.o" "$deps"/libcompiler_builtins-*.rlib --base=0x10000 --reset=0xfe000000 \
    --stack=65536 --ram=0x3f00000 "--map=$OUT/xtensa-fpu.map" -o "$ELF"
}

build() { # sets ELF and RUN
  case $1 in
    riscv32)
      install qemu-system-riscv32 qemu-system-misc
      rustup_build riscv32imc-unknown-none-elf riscv32-virt.ld
      RUN="qemu-system-riscv32 -M virt -cpu rv32,a=false,f=false,d=false -bios none $SCREEN -serial stdio" ;;
    thumb)
      install qemu-system-arm qemu-system-arm
      rustup_build thumbv7em-none-eabihf cortexm-mps2.ld
      RUN="qemu-system-arm -M mps2-an386 $SCREEN -serial none -semihosting-config enable=on,target=native" ;;
    xtensa)
      xtensa_build
      RUN="qemu-system-xtensa -M sim -cpu dc233c -m 64M $SCREEN -serial none -semihosting" ;;
    xtensa-fpu)
      xtensa_fpu_build
      RUN="qemu-system-xtensa -M sim -cpu de233_fpu -m 64M $SCREEN -serial none -semihosting" ;;
    *) echo "run.sh: unknown target $1" >&2; exit 2 ;;
  esac
}

cargo run -q --release --locked --target-dir "$TARGET" > "$OUT/host.txt"
cat "$OUT/host.txt"
passed=0 failed=0
for target; do
  begin=$SECONDS
  build "$target"
  built=$SECONDS
  code=0
  # shellcheck disable=SC2086
  timeout "$LIMIT" $RUN -kernel "$ELF" < /dev/null 2> "$OUT/$target.err" | tr -d '\r' > "$OUT/$target.txt" || code=$?
  if [ $code = 0 ] && grep -v '^#' "$OUT/$target.txt" | cmp -s - "$OUT/host.txt"; then
    echo "ok   $target: what the host prints; built in $((built - begin)) s, ran $((SECONDS - built)) s"
    grep '^#' "$OUT/$target.txt"
    passed=$((passed + 1))
  else
    echo "FAIL $target: exit code $code"
    grep -v '^#' "$OUT/$target.txt" | diff "$OUT/host.txt" - | cut -c1-300 | head -10 || true
    head -5 "$OUT/$target.err"
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
