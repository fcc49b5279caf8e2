#!/usr/bin/env bash
# Mutants test the tests: each patch in this directory plants one fault in router/core; the simulation must catch it within
# 2,000 schedules. Works on a copy of the project; fails if a mutant escapes, or if a patch no longer applies or builds.
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
target=${CARGO_TARGET_DIR:-$root/target}/mutants
copy=$target/copy

names=()
for name in "$@"; do names+=("${name%.patch}"); done
if [ ${#names[@]} = 0 ]; then
    for patch in "$here"/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi

# The same place each time, so that Cargo finds what it has built before.
rm -rf "$copy"
mkdir -p "$copy"
tar -C "$root" --exclude=./target --exclude=./.git --exclude='./*/target' --exclude=./ops/demo -cf - . | tar -C "$copy" -xf -
cd "$copy"
export CARGO_TARGET_DIR=$target

build() {
    cargo build --quiet --locked --profile sim -p atp-tests --no-default-features --bin sim >"$target/build.log" 2>&1
}
sim() {
    "$target/sim/sim" --schedules "$schedules" --threads "$threads" >"$target/sim.log" 2>&1
}

failed=()
begun=$SECONDS
build || { tail -30 "$target/build.log"; echo "the copy doesn't build"; exit 1; }
if ! sim; then
    tail -4 "$target/sim.log"
    echo "the simulation fails without any mutant: nothing can be said about them"
    exit 1
fi

for name in "${names[@]}"; do
    start=$SECONDS
    patch=$here/$name.patch
    if [ ! -f "$patch" ]; then
        verdict="no such mutant"
        failed+=("$name")
    elif ! patch --quiet -p1 --dry-run --forward -i "$patch" >/dev/null; then
        verdict="NO LONGER APPLIES"
        failed+=("$name")
    else
        patch --quiet -p1 -i "$patch"
        if ! build; then
            verdict="NO LONGER BUILDS: $(grep -m1 '^error' "$target/build.log" || true)"
            failed+=("$name")
        elif sim; then
            verdict="ESCAPED $schedules schedules"
            failed+=("$name")
        else
            verdict="caught: $(grep -m1 'FAILED .* first with seed' "$target/sim.log" | sed 's/^FAILED //')"
        fi
        patch --quiet -p1 -R -i "$patch"
        find . -name '*.orig' -path './router/*' -delete
    fi
    printf '%-42s %4d s  %s\n' "$name" $((SECONDS - start)) "$verdict"
done

echo "${#names[@]} mutants in $((SECONDS - begun)) s"
if [ ${#failed[@]} -gt 0 ]; then
    echo "not caught: ${failed[*]}"
    exit 1
fi
