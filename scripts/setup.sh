#!/usr/bin/env bash
# Makes a virtual environment that can run Pippin here, and does nothing when it already can.
#
#   scripts/setup.sh serve   .venv: Pippin with MLX's build for this machine
#   scripts/setup.sh dev     .venv: the same, and what the tests and linters need
#   scripts/setup.sh parity  .venv-parity: the same, and torch, which only the parity tests use
#   scripts/setup.sh clients .venv-clients: client libraries that can't live beside the tests' own, for `make clients`
#   scripts/setup.sh agents  .venv-agents: coding agents of PyPI and, where there is Node.js, of npm, for `make agents`
#   scripts/setup.sh browser Chromium from the system's packages, for tests that look at pages; they are skipped without it
#   scripts/setup.sh extra   prints which extra of pyproject.toml brings MLX's build for this machine
#
# PYTHON=/path/to/python chooses the interpreter. Works with bash 3.2, as macOS has it.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '==> %s\n' "$*"; }
die() { printf 'pippin: %s\n' "$*" >&2; exit 1; }

# --- which of MLX's builds ---

nvidia_extra() {
  local cuda
  cuda=$(nvidia-smi 2>/dev/null | grep -oE 'CUDA[A-Za-z ]*Version *: *[0-9]+' | grep -oE '[0-9]+$' | head -n 1) || true
  case "$cuda" in
    '') echo cpu ;;
    12) echo cuda12 ;;
    [0-9] | 10 | 11)
      say "the NVIDIA driver speaks CUDA $cuda and MLX needs 12 or newer: using the CPU" >&2
      echo cpu ;;
    *) echo cuda13 ;;
  esac
}

platform_extra() {
  case "$(uname -s)/$(uname -m)" in
    Darwin/arm64) echo '' ;;
    Darwin/x86_64)
      if [ "$(sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ]; then
        die "this shell runs under Rosetta, so Python would get no MLX. Start it as: arch -arm64 ${SHELL:-zsh}"
      fi
      die "Intel Macs can't run Pippin: MLX's Metal backend needs Apple silicon (M1 or newer)." ;;
    Linux/x86_64 | Linux/aarch64) nvidia_extra ;;
    *) die "MLX has no build for $(uname -s) on $(uname -m). Apple silicon, or Linux on x86_64 or aarch64." ;;
  esac
}

# --- which Python ---

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

base() { "$1" -c 'import sys; print(sys.base_prefix)' 2>/dev/null; }

# Is this environment fit to be used as it is, and made from PYTHON if that was asked for?
sound() {
  usable "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1 || return 1
  [ -z "${PYTHON:-}" ] || [ "$(base "$PYTHON")" = "$(base "$1/bin/python")" ]
}

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer."
    echo "$PYTHON"
    return
  fi
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if usable "$name"; then
      command -v "$name"
      return
    fi
  done
  die "no Python 3.11 or newer found ($(python3 --version 2>&1 | head -n 1 || true)).
  macOS: brew install python@3.12    Debian, Ubuntu: apt-get install python3.11 python3.11-venv
  Elsewhere installed? Say so: make PYTHON=/path/to/python3.12 …"
}

# --- system packages, where that needs no questions ---

# 0 where apt-get can install without asking anybody.
can_apt() {
  command -v apt-get >/dev/null 2>&1 || return 1
  [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null
}

apt_install() {
  local sudo=''
  [ "$(id -u)" = 0 ] || sudo='sudo -n'
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1 ||
    { $sudo apt-get update -qq >/dev/null 2>&1 &&
      $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1; }
}

# MLX's CPU build brings a reference BLAS; OpenBLAS in front of it is 10 to 20 times faster in float32.
openblas() {
  local found
  found=$("$1" -c 'import ctypes
try: ctypes.CDLL("libopenblas.so.0"); print("yes")
except OSError: print("no")')
  [ "$found" = no ] || return 0
  if can_apt; then
    say "installing libopenblas0-pthread (float32 on the CPU is 10 to 20 times faster with it)"
    apt_install libopenblas0-pthread && return 0
  fi
  say "without OpenBLAS float32 on the CPU is 10 to 20 times slower; all works. To mend: apt-get install libopenblas0-pthread"
}

browser() {
  local name
  for name in chromium chromium-browser google-chrome; do
    ! command -v "$name" >/dev/null 2>&1 || return 0
  done
  if can_apt; then
    say "installing chromium (tests look at pages with it)"
    apt_install chromium && return 0
  fi
  say "without Chromium the tests that look at pages are skipped. To mend: apt-get install chromium"
}

# listed VENV LIST [PACKAGE…]: an environment with the packages of a list, and more without what these need.
listed() {
  local venv=$1 list=$2 package want
  shift 2
  want="$(cksum <"$list") $*"
  sound "$venv" || make_venv "$(find_python)" "$venv"
  [ "$(cat "$venv/.pippin-list" 2>/dev/null)" != "$want" ] || return 0
  say "installing what $list names into $venv"
  "$venv/bin/python" -m pip install --disable-pip-version-check -q -r "$list"
  for package; do "$venv/bin/python" -m pip install --disable-pip-version-check -q --no-deps "$package"; done
  printf '%s\n' "$want" >"$venv/.pippin-list"
}

# Of SGLang the frontend language alone: what its server needs (torch) stays out.
clients() { listed .venv-clients tests/clients/requirements.txt sglang==0.4.6; }

# What npm installs is a gigabyte, most of it the agents' own programs.
agents() {
  local venv=.venv-agents list=tests/agents/package.json
  listed "$venv" tests/agents/requirements.txt
  if ! command -v npm >/dev/null 2>&1; then
    say "without Node.js the agents and clients of npm are skipped. To mend: install Node.js 20 or newer"
    return 0
  fi
  ! cmp -s "$list" "$venv/package.json" || [ ! -d "$venv/node_modules" ] || return 0
  say "installing what $list names into $venv"
  cp "$list" "$venv/package.json"
  npm install --prefix "$venv" --no-audit --no-fund --no-package-lock --loglevel=error ||
    { rm -f "$venv/package.json"; die "npm could not install the agents; its message is above."; }
}

# --- the environment ---

make_venv() {
  local python=$1 venv=$2 version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  say "making $venv with Python $version ($python)"
  rm -rf "$venv"
  "$python" -m venv "$venv" >/dev/null 2>&1 && return 0
  if can_apt; then
    say "this Python lacks venv: installing python$version-venv"
    rm -rf "$venv"
    apt_install "python$version-venv" && "$python" -m venv "$venv" >/dev/null && return 0
  fi
  rm -rf "$venv"
  die "this Python can't make virtual environments. Debian, Ubuntu: apt-get install python$version-venv
  Or choose another Python: make PYTHON=/path/to/python …"
}

install() {
  local venv=$1 extras=$2
  local quiet=()
  [ -t 1 ] || quiet=(-q)
  say "installing pippin${extras:+[$extras]} into $venv (the first time takes a few minutes)"
  "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} --no-compile \
    -e ".${extras:+[$extras]}" ||
    die "pip could not install Pippin's dependencies; its message is above. A proxy or mirror is set with PIP_INDEX_URL."
  # pip compiles file by file: nearly half of its time. Templates among the packages are no Python, which is no matter.
  "$venv/bin/python" -m compileall -q -j 0 "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    >/dev/null 2>&1 || true
}

main() {
  local mode=${1:-serve} venv=.venv extra extras python='' stamp want
  extra=$(platform_extra)
  case "$mode" in
    serve) extras=$extra ;;
    dev) extras=${extra:+$extra,}dev ;;
    parity) extras=${extra:+$extra,}dev,torch venv=.venv-parity ;;
    clients | agents | browser) "$mode"; return ;;  # behind && a failure inside would be overlooked
    extra) echo "$extra" && return 0 ;;
    *) die "usage: scripts/setup.sh serve|dev|parity|clients|agents|browser|extra" ;;
  esac
  stamp=$venv/.pippin-$mode
  # What the environment was made from: when any of it changes, pip looks again.
  want="$(cksum <pyproject.toml) $extras $PWD"
  if sound "$venv"; then
    [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
  else
    python=$(find_python)
    make_venv "$python" "$venv"
  fi
  install "$venv" "$extras"
  [ "$extra" = cpu ] && openblas "$venv/bin/python"
  printf '%s\n' "$want" >"$stamp"
  say "ready"
}

main "$@"
