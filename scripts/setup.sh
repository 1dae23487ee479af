#!/usr/bin/env bash
# Makes .venv with the pinned packages and groupzero itself (editable). A second call finds the stamp and returns at
# once; an interrupted or failed one is repaired by the next.
#   REQUIREMENTS=cpu|cuda  the set to install; auto looks for an NVIDIA GPU; unset keeps the installed set, else is auto
#   PYTHON=/path/to/python the interpreter to build .venv from
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
readonly STAMP=.venv/.groupzero-setup CHOSEN=.venv/.groupzero-set LOG=.venv/setup.log
unset PYTHONPATH PYTHONHOME # would make pip take other folders' packages for installed ones
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

fail() {
    printf '\nmake setup: %s\n' "$1" >&2
    exit 1
}

# What the stamp stands for: this folder (a moved venv is broken), this script and all that decides what is installed.
fingerprint() {
    local inputs=("requirements/$1.txt" requirements/torch-cuda-libs.txt pyproject.toml scripts/setup.sh)
    { pwd && cat "${inputs[@]}"; } | sha256sum | cut -c1-64
}

chosen_set() { cat "$CHOSEN" 2>/dev/null || true; } # which set .venv was made for, finished or not

is_done() {
    [ -x .venv/bin/python ] && [ -x .venv/bin/groupzero ] && [ -f "$STAMP" ] &&
        [ "$(cat "$STAMP")" = "$(fingerprint "$1")" ]
}

choose_set() {
    local wanted=${REQUIREMENTS:-}
    case $wanted in
        cpu | cuda) echo "$wanted"; return ;;
        '')
            wanted=$(chosen_set)
            if [ -f "requirements/$wanted.txt" ]; then echo "$wanted" && return; fi
            ;;
        auto) ;;
        *) fail "REQUIREMENTS=$wanted is not known: use cpu, cuda or auto." ;;
    esac
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo cuda; else echo cpu; fi
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate why="" candidates=(python3 python3.12 python3.11 python3.13)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        is_supported "$candidate" || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
        why="$candidate has no venv module (on Debian and Ubuntu: apt install python3-venv)"
    done
    [ -n "$why" ] && fail "$why."
    candidate=${PYTHON:-python3}
    fail "needs Python 3.11, 3.12 or 3.13; $candidate is $("$candidate" --version 2>/dev/null || echo 'not there').
Install one of them, or name it: make setup PYTHON=/path/to/python3.11"
}

# pip can't see that a package was cut off half-way: one without RECORD never finished, a name with ~ was being replaced.
drop_half_installed() {
    local site
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    rm -rf "$site"/~* "$site"/__editable__*groupzero*
    local info
    for info in "$site"/*.dist-info; do
        [ -d "$info" ] && [ ! -f "$info/RECORD" ] && rm -rf "$info"
    done
    return 0
}

say_that_it_lives() { # a line every 30 s while pip works; arguments: lines of the log before it, packages it looks at
    local start=$SECONDS log count
    while sleep 30 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        log=$(tail -n "+$(($1 + 1))" "$LOG")
        if grep -q '^Installing collected' <<<"$log"; then
            echo "    $((SECONDS - start)) s: all fetched, unpacking"
        else
            count=$(grep -cE '^(Collecting|Requirement already)' <<<"$log" || true)
            echo "    $((SECONDS - start)) s: $count of $2 packages fetched"
        fi
    done
}

watcher=""
stop_watcher() {
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
    watcher=""
}

install() { # what it is, how many packages, then pip's arguments
    local what=$1 count=$2 start=$SECONDS status=0
    shift 2
    echo "  $what"
    say_that_it_lives "$(wc -l <"$LOG")" "$count" 9<&- &
    watcher=$!
    .venv/bin/python -m pip install --no-deps "$@" >>"$LOG" 2>&1 || status=$?
    stop_watcher
    [ "$status" -eq 0 ] || {
        echo "  failed after $((SECONDS - start)) s. The end of $LOG:" >&2
        grep -vE '^(WARNING: Location|Requirement already)' "$LOG" | tail -n 12 | cut -c1-300 | sed 's/^/    /' >&2 || true
        fail "pip could not install everything (exit $status); the whole log is $LOG.
If it was the network or the disk, mend that and run 'make setup' again: it goes on where it stopped.
If a version was not found, this machine's package index lacks it, or has it not for $(.venv/bin/python --version)."
    }
}

torch_is_cuda_build() {
    .venv/bin/python -c 'import sys, importlib.metadata as m
sys.exit(not any("nvidia" in need or "cuda" in need for need in m.requires("torch") or ()))'
}

check_torch() {
    local trouble
    trouble=$(.venv/bin/python -c 'import torch' 2>&1) && return
    fail "the packages are installed, but 'import torch' fails:
    $(tail -n 1 <<<"$trouble")
If it names a CUDA or NVIDIA library, pip served a CUDA build of torch that does not fit this machine: let pip see
an index with torch's CPU build (your PIP_EXTRA_INDEX_URL), remove .venv and run 'make setup' again."
}

set_name=$(choose_set)
if is_done "$set_name"; then
    echo "set-up: .venv is up to date (requirements/$set_name.txt)"
    exit 0
fi

exec 9<requirements # lock this folder: two set-ups at once would corrupt .venv
if command -v flock >/dev/null && ! flock -n 9; then
    echo "set-up: another set-up of this folder is running; waiting for it"
    flock 9
    if is_done "$set_name"; then
        echo "set-up: .venv is up to date (requirements/$set_name.txt)"
        exit 0
    fi
fi

trap stop_watcher EXIT
trap 'fail "interrupted. Run it again: it goes on where it stopped."' INT TERM
began=$SECONDS
count_of() { cat "${@/#/requirements/}" | grep -cE '^[A-Za-z]'; }
case $set_name in
    cpu) total=$(count_of cpu.txt) size="about 1 GB to download, 4.5 GB on disk, 1 to 5 minutes" ;;
    cuda)
        total=$(count_of cuda.txt torch-cuda-libs.txt) size="about 5 GB to download, 12 GB on disk, 5 to 15 minutes" ;;
esac

previous=$(chosen_set)
if is_supported .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 &&
    grep -qsF "$PWD/.venv/bin/python" .venv/bin/pip && { [ -z "$previous" ] || [ "$previous" = "$set_name" ]; }; then
    echo "set-up: bringing .venv up to date with requirements/$set_name.txt ($total packages; fetches only what is missing)"
else
    python=$(find_python)
    echo "set-up: making .venv from $("$python" --version) with requirements/$set_name.txt ($total packages; $size)"
    "$python" -m venv --clear .venv || fail "could not make .venv with $python (see above)."
fi
rm -f "$STAMP"
echo "$set_name" >"$CHOSEN"
: >"$LOG"
drop_half_installed
install "installing the packages (log: $LOG)" "$total" -r "requirements/$set_name.txt"
if [ "$set_name" = cpu ] && torch_is_cuda_build; then
    echo "  pip serves torch only as its CUDA build here, which needs NVIDIA's libraries even where there is no GPU
    (to avoid them, let pip see an index with torch's CPU build, by PIP_EXTRA_INDEX_URL; remove .venv; run this again)"
    install "installing them too (about 2 GB more)" "$(count_of torch-cuda-libs.txt)" -r requirements/torch-cuda-libs.txt
fi
check_torch
install "installing groupzero itself, editable" 1 --no-build-isolation -e .
fingerprint "$set_name" >"$STAMP.new" && mv "$STAMP.new" "$STAMP"
echo "set-up: done in $((SECONDS - began)) s"
