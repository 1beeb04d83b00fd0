#!/bin/sh
# build.sh ROOT PROJECT OUT [TEST...]: build the machines of the tests with ROOT's Nix, into OUT/guests. OUT/wheels has
# the wheels of the package. If $NIXPKGS is set, the modules of that nixpkgs evaluate the machines. Needs temporary
# namespaces. Does not change ROOT.
set -eu
root=$1 project=$2 out=$3
shift 3

scratch=$(mktemp -d)
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay overlay -o "lowerdir=$root,upperdir=$scratch/upper,workdir=$scratch/work" "$scratch/root"
mount -t proc proc "$scratch/root/proc"
mount --rbind /dev "$scratch/root/dev"
mkdir "$scratch/root/project" "$scratch/root/out"
mount --bind "$project" "$scratch/root/project"
mount --bind "$out" "$scratch/root/out"
if [ -n "${NIXPKGS:-}" ]; then
  mkdir "$scratch/root/nixpkgs"
  mount --bind "$NIXPKGS" "$scratch/root/nixpkgs"
  NIXPKGS=/nixpkgs
fi

# shellcheck disable=SC2016 # the inner shell expands it
exec env -i NIXPKGS="${NIXPKGS:-}" HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin NIX_CONFIG='sandbox = false
substituters =
build-users-group =' chroot "$scratch/root" sh -euc '
  cd /project/nixos-tests
  wanted=$(for test; do echo "-A tests.$test"; done)
  # shellcheck disable=SC2086
  nix-build --quiet --no-build-output --no-out-link eval --arg wheels /out/wheels $wanted >/out/bundles
  python3 lab/pack.py /out/guests $(cat /out/bundles)' build "$@"
