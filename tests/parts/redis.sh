#!/usr/bin/env bash
# A real Redis on a free loopback port, for the tests: one new server per start, nothing kept on disk, no root.
#
#   tests/parts/redis.sh start --owner PID [--port N] [--password P]   starts one, prints NAME=value lines
#   tests/parts/redis.sh stop --owner PID                              stops all of that owner
#
# A server ends soon after its owner's process has ended. With --port it listens there (to come back where one was killed).
# Takes redis-server 6.2 or newer from PATH, else unpacks Debian's packages into the user's cache (apt-get, dpkg-deb).
# Messages go to stderr; stdout carries only ATP_REDIS_URL, ATP_REDIS_PID and ATP_REDIS_VERSION.
set -euo pipefail

PACKAGES=(redis-server redis-tools libjemalloc2 liblzf1 libatomic1)
READY_TENTHS=100

say() { printf 'redis: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '4,5s/^#   //p' "$0" >&2; exit 2; }

command=${1:-}
[ $# -gt 0 ] && shift
owner='' port='' password=''
while [ $# -gt 1 ]; do
    case $1 in
        --owner) owner=$2 ;;
        --port) port=$2 ;;
        --password) password=$2 ;;
        *) say "unknown argument '$1'"; usage ;;
    esac
    shift 2
done
[ $# -eq 0 ] || usage
for number in "$owner" "${port:-1}"; do
    case $number in ''|*[!0-9]*) say "'$number' is no process id or port"; usage ;; esac
done

if [ -n "${XDG_CACHE_HOME:-}" ]; then base=$XDG_CACHE_HOME
elif [ -n "${HOME:-}" ]; then base=$HOME/.cache
else die "neither XDG_CACHE_HOME nor HOME is set; set one to say where Redis may be kept"; fi
cache=$base/atp/redis
runs=${TMPDIR:-/tmp}/atp-redis-$(id -u)

# A zombie has ended; its parent just has not asked yet.
alive() { case $(ps -o stat= -p "$1" 2>/dev/null) in ''|Z*) return 1 ;; *) return 0 ;; esac; }

fits() { # prints the version if it is new enough
    local version
    version=$("$@" --version 2>/dev/null | sed -n 's/.* v=\([0-9.]*\).*/\1/p')
    case $version in [7-9].*|[1-9][0-9]*.*|6.[2-9]*) echo "$version" ;; *) return 1 ;; esac
}

find_server() { # sets `server` (a command) and `version`
    server=(redis-server)
    if version=$(fits redis-server); then return; fi
    server=(env "LD_LIBRARY_PATH=$cache/lib" "$cache/root/usr/bin/redis-server")
    if version=$(fits "${server[@]}"); then return; fi
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null \
        || die "redis-server 6.2 or newer is missing; install it (Debian, Ubuntu: apt install redis-server)"
    mkdir -p "$base/atp"
    # Only one start unpacks; made beside its place and moved there whole.
    exec 9>"$base/atp/redis.lock"
    flock 9
    if [ ! -e "$cache" ]; then
        say "downloading Redis from the system's package source into $cache; nothing is installed"
        local new
        new=$(mktemp -d "$base/atp/redis.XXXXXX")
        if ! (cd "$new" && { apt-get download -qq "${PACKAGES[@]}" \
                || { apt-get update -qq && apt-get download -qq "${PACKAGES[@]}"; }; }) >"$new/log" 2>&1; then
            tail -n 3 "$new/log" >&2
            rm -rf "$new"
            die "apt-get cannot download Redis; install redis-server 6.2 or newer"
        fi
        for package in "$new"/*.deb; do dpkg-deb -x "$package" "$new/root"; done
        mkdir "$new/lib"
        find "$new/root" -name 'lib*.so*' -exec cp -P {} "$new/lib/" \;
        rm -f "$new"/*.deb
        mv -T "$new" "$cache"
    fi
    exec 9>&-
    version=$(fits "${server[@]}") || die "the Redis in $cache doesn't run; remove it, or install redis-server"
}

answers() { # PORT: it says PONG, or wants a password
    local line
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'PING\r\n' >&3
    read -r -t 2 line <&3 || line=
    exec 3>&- 3<&-
    case $line in +PONG*|-NOAUTH*) return 0 ;; *) return 1 ;; esac
}

launch() { # PORT: sets `pid`; fails when the port is taken
    local run=$1 at=$2 log i
    log=$run/log
    {
        printf '%s\n' "bind 127.0.0.1" "port $at" "dir $run" 'save ""' "appendonly no" "daemonize no"
        [ -z "$password" ] || printf 'requirepass %s\n' "$password"
    } >"$run/conf"
    setsid "${server[@]}" "$run/conf" >"$log" 2>&1 </dev/null &
    pid=$!
    for ((i = 0; i < READY_TENTHS; i++)); do
        alive "$pid" || return 1
        if answers "$at" 2>/dev/null && grep -q 'Ready to accept connections' "$log"; then return 0; fi
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
    tail -n 3 "$log" >&2
    die "the server did not answer within $((READY_TENTHS / 10)) s"
}

# Stopped servers (SIGSTOP) hear no SIGTERM, and there is nothing to save.
watch() { # RUN PID
    while alive "$owner" && alive "$2"; do sleep 1; done
    kill -9 "$2" 2>/dev/null || true
    rm -rf "$1"
}

start() {
    alive "$owner" || die "--owner $owner: no such process"
    find_server
    mkdir -p "$runs"
    local run pid='' at try
    run=$(mktemp -d "$runs/$owner.XXXXXX")
    for try in 1 2 3 4 5 6 7 8; do
        # Below the ports that outgoing connections take.
        at=${port:-$((20000 + (RANDOM * 32768 + RANDOM) % 12000))}
        if launch "$run" "$at"; then break; fi
        if [ -n "$port" ] || [ "$try" = 8 ]; then
            tail -n 3 "$run/log" >&2
            rm -rf "$run"
            die "cannot listen on port $at"
        fi
    done
    echo "$pid" >"$run/pid"
    watch "$run" "$pid" >/dev/null 2>&1 </dev/null &
    printf 'ATP_REDIS_URL=redis://%s127.0.0.1:%s/\nATP_REDIS_PID=%s\nATP_REDIS_VERSION=%s\n' \
        "${password:+:$password@}" "$at" "$pid" "$version"
}

stop() {
    local pidfile pid
    for pidfile in "$runs/$owner".*/pid; do
        [ -e "$pidfile" ] || continue
        pid=$(cat "$pidfile")
        # Process ids are reused: what is no Redis by now is not ours to end.
        case $(ps -o args= -p "$pid" 2>/dev/null) in *redis-server*) kill -9 "$pid" 2>/dev/null || true ;; esac
        rm -rf "${pidfile%/pid}"
    done
}

case $command in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
