#!/usr/bin/env bash
# All tests of the project, with all their set-up. Prints each part's time; a part over its budget fails.
#
#   ops/test.sh          within 20 minutes from a warm cache
#   ops/test.sh --all    also what is long: every mutant, 100,000 schedules, every point of the crash sweep, Kafka over TLS, the chart
#   ops/test.sh PART...  only these parts: fmt build clippy local-llm kafka redis test doc-test docs simulation sweep kafka-tls
#                        helm mutants
#
# Needs: a Rust toolchain, a C compiler with make; for the local model Python 3.10 or newer with venv, for Kafka Java 17 and Maven
# (installed here when this may be done: root on a Debian-like system; else it says what to install); libfaketime and strace,
# in the same way; redis-server 6.2 or newer, or apt-get to fetch it; for the chart Go 1.21 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."

all=
only=()
for argument in "$@"; do
    case $argument in
        --all) all=yes ;;
        -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        fmt|build|clippy|local-llm|kafka|redis|test|doc-test|docs|simulation|sweep|kafka-tls|helm|mutants) only+=("$argument") ;;
        *) echo "test.sh: unknown argument '$argument'; see --help" >&2; exit 2 ;;
    esac
done

say() { printf '\n== %s\n' "$*"; }
die() { printf 'test.sh: %s\n' "$*" >&2; exit 1; }

# Compiling from nothing isn't what the parts' budgets are about: only `build` has room for it.
export CARGO_TERM_PROGRESS_WHEN=never RUST_BACKTRACE=${RUST_BACKTRACE:-1}
[ -n "$all" ] && export ATP_TEST_ALL=1

need() { command -v "$1" >/dev/null 2>&1 || die "$1 is missing; $2"; }
may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

set_up() {
    need cargo "install Rust from https://rustup.rs (stable, 1.88 or newer)"
    if ! command -v cc >/dev/null 2>&1 || ! command -v make >/dev/null 2>&1; then
        may_install || die "cc or make is missing; install a C compiler (Debian, Ubuntu: apt install build-essential)"
        apt-get update -qq && apt-get install -y -qq build-essential >/dev/null
    fi
    for component in rustfmt clippy; do
        cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1 && continue
        need rustup "install the component $component of your Rust toolchain"
        rustup component add "$component"
    done
    if ! command -v strace >/dev/null 2>&1; then
        may_install || die "strace is missing; install it (Debian, Ubuntu: apt install strace)"
        apt-get update -qq && apt-get install -y -qq strace >/dev/null
    fi
    if ! python3 -c 'import venv, ensurepip' >/dev/null 2>&1; then
        may_install || die "python3 with venv is missing; install it (Debian, Ubuntu: apt install python3 python3-venv)"
        apt-get update -qq && apt-get install -y -qq python3 python3-venv >/dev/null
    fi
    if ! command -v java >/dev/null 2>&1 || ! command -v mvn >/dev/null 2>&1; then
        may_install || die "java or mvn is missing; install them (Debian, Ubuntu: apt install openjdk-17-jre-headless maven)"
        apt-get update -qq && apt-get install -y -qq openjdk-17-jre-headless maven >/dev/null
    fi
    # OpenSSL is built with it (part kafka-tls).
    if [ -n "$all" ] && ! perl -MIPC::Cmd -e1 >/dev/null 2>&1; then
        may_install || die "perl with its modules is missing; install it (Debian, Ubuntu: apt install perl)"
        apt-get update -qq && apt-get install -y -qq perl >/dev/null
    fi
    # Tests let a router's clock jump.
    if ! compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null && [ ! -e /usr/lib/faketime/libfaketime.so.1 ]; then
        may_install || die "libfaketime is missing; install it (Debian, Ubuntu: apt install libfaketime)"
        apt-get update -qq && apt-get install -y -qq libfaketime >/dev/null
    fi
}

failed=()
times=()
# part NAME BUDGET_SECONDS COMMAND...
part() {
    local name=$1 budget=$2 start=$SECONDS status=0 took
    shift 2
    if [ ${#only[@]} -gt 0 ] && [[ " ${only[*]} " != *" $name "* ]]; then return 0; fi
    say "$name (budget $budget s)"
    "$@" </dev/null || status=$?
    took=$((SECONDS - start))
    if [ $status -ne 0 ]; then
        failed+=("$name"); times+=("FAILED  $took s  $name (exit $status)")
    elif [ $took -gt "$budget" ]; then
        failed+=("$name"); times+=("FAILED  $took s  $name: over its budget of $budget s")
    else
        times+=("ok      $took s  $name")
    fi
    printf -- '-- %s: %s s\n' "$name" "$took"
    # Nothing can be tested that doesn't build.
    if [ "$name" = build ] && [ $status -ne 0 ]; then finish; fi
}

finish() {
    say "times"
    printf '%s\n' "${times[@]}"
    if [ ${#failed[@]} -gt 0 ]; then
        printf '\nFAILED: %s\n' "${failed[*]}"
        exit 1
    fi
    printf '\nall passed in %s s\n' "$SECONDS"
    exit 0
}

sim() { cargo run --quiet --locked --profile sim -p atp-tests --no-default-features --bin sim -- "$@"; }

build() {
    cargo build --locked --workspace --all-targets
    cargo build --locked --profile sim -p atp-tests --no-default-features --bin sim
}

docs() { RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet; }

# One server for every test of this run; it ends with this process.
local_llm() {
    local line
    while read -r line; do export "${line?}"; done < <(ops/local-llm.sh start --owner $$)
    [ -n "${ATP_LOCAL_LLM_URL:-}" ] || return 1
    echo "local model at $ATP_LOCAL_LLM_URL"
}

# The tests start servers of their own by the same script; here it is fetched and tried once.
redis() {
    local lines
    lines=$(tests/parts/redis.sh start --owner $$) || return 1
    echo "Redis ${lines##*ATP_REDIS_VERSION=}"
    tests/parts/redis.sh stop --owner $$
}

# A broker for every test of this run; it ends with this process. Three are started by the tests that kill them.
kafka() { tests/parts/kafka.sh start --owner $$; }

kafka_tls() {
    cargo test --quiet --locked -p atp-router --features kafka-tls --lib kafka
    cargo test --quiet --locked -p atp-router --features kafka-tls --test config
}

# The chart, rendered by the real helm; it is built once, and kept.
helm() {
    local lines
    lines=$(tests/parts/helm.sh) || return 1
    local HELM COMPOSE
    eval "$lines"
    cargo run --quiet --locked -p atp-tests --bin chart -- --helm "$HELM" --compose "$COMPOSE"
}

simulation() {
    local schedules=20000
    [ -n "$all" ] && schedules=100000
    sim --schedules $schedules
}

# A router killed before each of its writes, syncs and sends; a sample of them unless all are asked for.
sweep() { cargo run --quiet --locked -p atp-tests --bin sweep -- ${all:+--all}; }

set_up
part fmt 60 cargo fmt --all --check
part build 2400 build
part clippy 420 cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
part local-llm 180 local_llm
part redis 60 redis
part kafka 120 kafka
part test "$([ -n "$all" ] && echo 1500 || echo 720)" cargo test --locked --no-fail-fast --workspace --lib --bins --tests
part doc-test 180 cargo test --locked --workspace --doc
part docs 240 docs
part simulation "$([ -n "$all" ] && echo 900 || echo 300)" simulation
part sweep "$([ -n "$all" ] && echo 900 || echo 180)" sweep
if [ -n "$all" ] || [[ " ${only[*]:-} " == *" kafka-tls "* ]]; then
    part kafka-tls 600 kafka_tls
fi
if [ -n "$all" ] || [[ " ${only[*]:-} " == *" helm "* ]]; then
    part helm 600 helm
fi
if [ -n "$all" ] || [[ " ${only[*]:-} " == *" mutants "* ]]; then
    part mutants 3000 tests/simulation/mutants/run.sh
fi
finish
