#!/usr/bin/env bash
# Runs the rows of tests/cluster/FAULTS.md by their own commands and writes what came of them into the last column.
#
#   ops/faults.sh          all rows
#   ops/faults.sh TEXT     rows that hold this text
#
# A command that several rows name runs once. Exit 1: a row failed, or its command ran no test.
set -euo pipefail
cd "$(dirname "$0")/.."
table=tests/cluster/FAULTS.md
case ${1:-} in -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

log=$(mktemp) results=$(mktemp)

# Writes what is known by now into the table, also when the run is interrupted.
fill() {
    [ -s "$results" ] || { rm -f "$log" "$results"; return 0; }
    awk -F'\t' 'NR == FNR { result[$1] = $2; next }
        match($0, /`[^`]*` \|[^|]*\|$/) {
            split(substr($0, RSTART), part, "`")
            if (part[2] in result) $0 = substr($0, 1, RSTART - 1) "`" part[2] "` | " result[part[2]] " |"
        } { print }' "$results" "$table" >"$log"
    cat "$log" >"$table"
    rm -f "$log" "$results"
}
trap fill EXIT
trap 'exit 130' INT TERM

mapfile -t commands < <(grep -F -- "${1:-}" "$table" | sed -n 's/^|.*| `\(.*\)` |[^|]*|$/\1/p' | awk '!seen[$0]++')
[ ${#commands[@]} -gt 0 ] || { echo "no row holds '${1:-}'" >&2; exit 2; }

failed=0 done=0
for command in "${commands[@]}"; do
    done=$((done + 1)) begun=$SECONDS status=0
    bash -c "$command" >"$log" 2>&1 </dev/null || status=$?
    result="ok, $((SECONDS - begun)) s"
    # A filter that matches nothing is no proof.
    if [ $status = 0 ] && [[ $command == "cargo test"* ]] && ! grep -Eq '^test result: ok\. [1-9]' "$log"; then status=no; fi
    if [ "$status" != 0 ]; then
        result=FAILED failed=$((failed + 1))
        tail -40 "$log"
    fi
    printf '%3d/%d  %-12s %s\n' $done ${#commands[@]} "$result" "$command"
    printf '%s\t%s\n' "$command" "$result" >>"$results"
done

[ $failed = 0 ] || { echo "$failed of ${#commands[@]} failed"; exit 1; }
echo "all ${#commands[@]} hold"
