#!/bin/sh
# newer-nix-roots.sh [DIR]: makes DIR/bullseye (Nix 2.3), DIR/trixie (Nix 2.26) and DIR/sid (Nix 2.34), the root file
# systems that nix_client.py runs other Nixes from. A root that is there already is kept.
#
# Needs root, mmdebstrap and the network. The variant "extract" only unpacks packages: no maintainer script runs, so
# it is quick, and nix_client.py writes what little of /etc a Nix client reads.
set -eu
umask 022
dir=${1:-${HARMONIA_NIX_ROOTS:-${XDG_CACHE_HOME:-$HOME/.cache}/harmonia/nix-roots}}
mkdir -p "$dir"

make_root() {
  suite=$1 root=$dir/$1
  [ ! -d "$root" ] || return 0
  rm -rf --one-file-system "$root.tmp"
  # A mirror may serve a snapshot whose "valid until" has passed: what matters here is the version of Nix.
  mmdebstrap --quiet --mode=root --variant=extract --include=base-files,dash,coreutils,nix-bin \
    --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Languages "none"' "$suite" "$root.tmp"
  mv -T "$root.tmp" "$root"
}

failed=0
roots=
for suite in bullseye trixie sid; do
  make_root "$suite" &
  roots="$roots $!"
done
for root in $roots; do
  wait "$root" || failed=1
done
exit "$failed"
