#!/usr/bin/env bash
# Builds agree.cpp for this machine and for AArch64, runs the latter under qemu with and without the dot product
# instructions, and checks that all print the same checksum: NEON gives the bits that AVX-512 gives.
#
#   qemu.sh [native] [FOLDER]    native: this machine's half alone; FOLDER: where to build, kept for the next call
#
# Needs cmake and g++; the other half needs g++-aarch64-linux-gnu and qemu-user (Debian's names) and is skipped, with a
# message, without them.
set -euo pipefail

only_native=false
if [ "${1:-}" = native ]; then
  only_native=true
  shift
fi
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ $# -gt 0 ]; then
  folder=$1
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

build() {  # NAME COMPILER [options of cmake]
  local name=$1 compiler=$2
  shift 2
  cmake -S "$source" -B "$folder/$name" "${generator[@]}" -DCMAKE_CXX_COMPILER="$compiler" "$@" >"$folder/$name.log"
  cmake --build "$folder/$name" >>"$folder/$name.log" || { cat "$folder/$name.log"; exit 1; }
  "$compiler" -std=c++17 -O1 -Wall -Wextra -ffp-contract=off -I "$source/csrc" "$source/tests/native/agree.cpp" \
    -L "$folder/$name" -llowtide -Wl,-rpath,"$folder/$name" -pthread -o "$folder/$name/agree"
}

checksum() { sed -n 's/^checksum: //p' <<<"$1"; }

mkdir -p "$folder"
build native g++
native=$("$folder/native/agree") || { echo "$native"; exit 1; }
echo "$native"
if $only_native; then exit 0; fi

cross=aarch64-linux-gnu-g++
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
if ! command -v "$cross" >/dev/null || [ -z "$qemu" ]; then
  echo "skipped: the AArch64 half needs $cross and qemu-aarch64"
  exit 0
fi
build aarch64 "$cross" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
libraries=$(dirname "$(dirname "$("$cross" -print-file-name=libc.so.6)")")
for cpu in max cortex-a53; do
  arm=$("$qemu" -L "$libraries" -cpu "$cpu" "$folder/aarch64/agree") || { echo "$arm"; exit 1; }
  echo "$arm"
  if [ "$(checksum "$arm")" != "$(checksum "$native")" ]; then
    echo "AArch64 ($cpu) gives other results than this machine"
    exit 1
  fi
done
echo "AArch64 gives the same bits"
