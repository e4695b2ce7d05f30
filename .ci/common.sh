# Shared by .ci/run, .ci/nightly and .ci/release; sourced, not run. Needs python3 (3.11 or later) and a C++20 compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$(mktemp -d "${TMPDIR:-/tmp}/haomiao-ci.XXXXXX")
trap 'rm -rf "$work"' EXIT
jobs=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export CMAKE_BUILD_PARALLEL_LEVEL=$jobs PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
# tests must not depend on what this machine has been told or has downloaded before
for variable in "${!HAOMIAO_@}"; do
  [[ $variable == HAOMIAO_SHARED ]] || unset "$variable"
done
export HAOMIAO_CACHE=$work/cache HAOMIAO_OFFLINE=1

step() { printf '\n== %s [%d s]\n' "$1" "$SECONDS"; }
skip() { printf 'SKIP: %s\n' "$1"; }
fail() {
  printf 'FAIL: %s\n' "$1" >&2
  exit 1
}

# fresh_venv NAME: an empty environment of its own, activated
fresh_venv() {
  python3 -m venv "$work/$1" || fail "python3 -m venv does not work here (on Debian: apt-get install python3-venv)"
  # shellcheck disable=SC1090,SC1091
  source "$work/$1/bin/activate"
}

# native_tests NAME [cmake flags]: build the native tests in a folder of their own and run every one
run_under=() # a command that the tests are run by
ctest_flags=()
native_tests() {
  local name=$1
  shift
  cmake -S "$root" -B "$work/$name" -G Ninja -DHAOMIAO_BINDINGS=OFF -DHAOMIAO_NATIVE_TESTS=ON "$@" >"$work/$name.log" ||
    { cat "$work/$name.log"; return 1; }
  cmake --build "$work/$name" >"$work/$name.log" 2>&1 || { cat "$work/$name.log"; return 1; }
  ${run_under[@]+"${run_under[@]}"} ctest --test-dir "$work/$name" --output-on-failure --no-tests=error \
    ${ctest_flags[@]+"${ctest_flags[@]}"}
}

# fuzz SECONDS: every libFuzzer target for that long
fuzz() {
  if ! command -v clang++ >/dev/null; then
    skip "fuzzing: clang++ is not installed"
    return
  fi
  if ! cmake -S "$root" -B "$work/fuzz" -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DHAOMIAO_BINDINGS=OFF -DHAOMIAO_FUZZ=ON \
    -DHAOMIAO_SANITIZE=address,undefined >"$work/fuzz.log" 2>&1; then
    cat "$work/fuzz.log"
    return 1
  fi
  if ! echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++ -x c++ -fsanitize=fuzzer - -o "$work/fuzzer-probe" 2>/dev/null; then
    skip "fuzzing: clang++ has no libFuzzer runtime"
    return
  fi
  cmake --build "$work/fuzz" >"$work/fuzz.log" 2>&1 || { cat "$work/fuzz.log"; return 1; }
  local target
  for target in "$work"/fuzz/fuzz_*; do
    [[ -f $target && -x $target ]] || continue
    printf -- '-- %s\n' "${target##*/}"
    mkdir -p "$work/corpus/${target##*/}"
    "$target" -max_total_time="$1" -print_final_stats=0 -verbosity=0 -timeout=10 -rss_limit_mb=2048 \
      "$work/corpus/${target##*/}" || return 1
  done
}
