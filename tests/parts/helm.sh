#!/usr/bin/env bash
# The real `helm`, and Compose's own reader of compose files, built from their Go modules into the user's cache, once per version.
# Prints HELM=path and COMPOSE=path.
#
# Needs: bash, flock (util-linux), Go 1.21 or newer (which fetches a newer toolchain where a module asks for one).
set -euo pipefail

HELM_VERSION=v3.22.0
COMPOSE_VERSION=v2.9.0
LOCK_SECONDS=600

die() { printf 'helm.sh: %s\n' "$*" >&2; exit 1; }

if [ -n "${XDG_CACHE_HOME:-}" ]; then base=$XDG_CACHE_HOME
elif [ -n "${HOME:-}" ]; then base=$HOME/.cache
else die "neither XDG_CACHE_HOME nor HOME is set; set one to say where the programs may be kept"; fi
dir=$base/atp/go
mkdir -p "$dir" || die "cannot make $dir; set XDG_CACHE_HOME to a folder that can be written"
exec 9>"$dir/lock"
flock -w "$LOCK_SECONDS" 9 || die "another build has held $dir/lock for $LOCK_SECONDS s"

# build NAME PACKAGE VERSION: the program appears whole or not at all.
build() {
    local program=$dir/$1-$3 new=$dir/new
    [ -x "$program" ] && return
    command -v go >/dev/null || die "go is missing; install Go 1.21 or newer"
    rm -rf "$new"
    GOBIN=$new GOFLAGS= go install "$2@$3" >&2 || die "cannot build $2 $3"
    mv "$new"/* "$program"
    rmdir "$new"
}

build helm helm.sh/helm/v3/cmd/helm "$HELM_VERSION"
build compose github.com/compose-spec/compose-go/v2/cmd "$COMPOSE_VERSION"
printf 'HELM=%s\nCOMPOSE=%s\n' "$dir/helm-$HELM_VERSION" "$dir/compose-$COMPOSE_VERSION"
