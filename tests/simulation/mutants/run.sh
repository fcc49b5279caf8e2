#!/usr/bin/env bash
# Mutants test the tests: each patch in this directory plants one fault in router/core, or in the simulated shell around it; the
# simulation must catch it within 2,000 schedules. One in router/server is a fault of the local log, which its test of power cuts
# must catch. Works on a copy of the project; fails if a mutant escapes, or if a patch no longer applies or builds.
#
#   run.sh            all of them
#   run.sh NAME...    only these (with or without .patch)
#
# ATP_MUTANT_SCHEDULES (2000), ATP_MUTANT_THREADS (2)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
schedules=${ATP_MUTANT_SCHEDULES:-2000}
threads=${ATP_MUTANT_THREADS:-2}
shared=${CARGO_TARGET_DIR:-$root/target}
target=$shared/mutants
copy=$target/copy

names=()
for name in "$@"; do names+=("$(basename "$name" .patch)"); done
if [ ${#names[@]} = 0 ]; then
    for patch in "$here"/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi

# The same place each time, so that Cargo finds what it has built before. Of the members that no mutant needs only the
# manifest is there, with empty targets: Cargo wants to read them, nothing compiles them.
needed=(proto canonicalizer router/core router/server tests)
rm -rf "$copy"
mkdir -p "$copy"
tar -C "$root" --exclude=target --exclude='*.patch' -cf - Cargo.toml Cargo.lock "${needed[@]}" | tar -C "$copy" -xf -
members=$(sed -n 's/^members = \[\(.*\)\]$/\1/p' "$root/Cargo.toml" | tr -d '",')
for member in $members; do
    if [ -e "$copy/$member/Cargo.toml" ]; then continue; fi
    mkdir -p "$copy/$member/src"
    cp "$root/$member/Cargo.toml" "$copy/$member/"
    : >"$copy/$member/src/lib.rs"
    echo 'fn main() {}' >"$copy/$member/src/main.rs"
done
cd "$copy"
# What was built last may be a mutant: the copied file's old time would hide that.
find router/core/src router/server tests/simulation -name '*.rs' -exec touch {} +
export CARGO_TARGET_DIR=$target

build() {
    cargo build --quiet --locked --profile sim -p atp-tests --no-default-features --bin sim >"$target/build.log" 2>&1
}
# A mutant that loops forever is caught as well.
sim() {
    timeout 90 "$target/sim/sim" --schedules "$schedules" --threads "$threads" --keep-going >"$target/sim.log" 2>&1
}
# Of a fault in the server's log: built as the workspace's tests are, next to them, so that nothing of others is built again.
power() {
    CARGO_TARGET_DIR=$shared cargo test --quiet --locked --workspace --test log_power "$@" >"$target/power.log" 2>&1
}
power_verdict() {
    if ! power --no-run; then
        verdict="NO LONGER BUILDS: $(grep -m1 '^error' "$target/power.log" || true)"
        failed+=("$name")
    elif power; then
        verdict="ESCAPED the power cuts"
        failed+=("$name")
    else
        verdict="caught $(grep -m1 'schedules failed' "$target/power.log" || tail -1 "$target/power.log")"
    fi
}
# The invariant that named it; a panic of the core only where no checker spoke.
caught_by() {
    local lines
    lines=$(grep '^FAILED .* times, first with seed' "$target/sim.log" | sed 's/^FAILED //' || true)
    grep -v ': no panic$' <<<"$lines" | sort -t' ' -k1,1nr | head -1 | grep . || head -1 <<<"$lines" | grep . ||
        echo "the run ended without a verdict: $(tail -1 "$target/sim.log")"
}

failed=()
begun=$SECONDS
build || { tail -30 "$target/build.log"; echo "the copy doesn't build"; exit 1; }
if ! sim; then
    tail -4 "$target/sim.log"
    echo "the simulation fails without any mutant: nothing can be said about them"
    exit 1
fi
printf '%-42s %4d s  %s\n' "(none)" $((SECONDS - begun)) "$(head -1 "$target/sim.log")"

for name in "${names[@]}"; do
    start=$SECONDS
    patch=$here/$name.patch
    if [ ! -f "$patch" ]; then
        verdict="no such mutant"
        failed+=("$name")
    elif ! patch --quiet -p1 --dry-run --forward --fuzz=0 -i "$patch" >/dev/null; then
        verdict="NO LONGER APPLIES"
        failed+=("$name")
    else
        patch --quiet -p1 --no-backup-if-mismatch -i "$patch"
        if grep -q '^+++ b/router/server/' "$patch"; then
            power_verdict
        elif ! build; then
            verdict="NO LONGER BUILDS: $(grep -m1 '^error' "$target/build.log" || true)"
            failed+=("$name")
        elif sim; then
            verdict="ESCAPED $schedules schedules"
            failed+=("$name")
        else
            verdict="caught $(caught_by)"
        fi
        patch --quiet -p1 -R --no-backup-if-mismatch -i "$patch"
    fi
    printf '%-42s %4d s  %s\n' "$name" $((SECONDS - start)) "$verdict"
done

echo "${#names[@]} mutants in $((SECONDS - begun)) s"
if [ ${#failed[@]} -gt 0 ]; then
    echo "not caught: ${failed[*]}"
    exit 1
fi
