#!/bin/sh
# make-roots.sh DIR NAME...: create Debian root file systems DIR/NAME with systemd and Nix, for the machines of the
# tests and for building them. NAME is a Debian release; with "+kernel", it can boot in a virtual machine. Existing root file
# systems are kept.
#
# Needs root, mmdebstrap and the network.
set -eu
umask 022
dir=$1
shift
mkdir -p "$dir"

packages=systemd-sysv,libnss-systemd,udev,dbus,iproute2,nix-bin,nix-setup-systemd
packages=$packages,ca-certificates,curl,netcat-openbsd,nginx-light,openssl,python3-venv,zstd
# Units that start slowly, need hardware, or do not run by default on NixOS.
unwanted='apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
  fstrim.timer getty.target getty@.service serial-getty@.service console-getty.service ldconfig.service nginx.service
  systemd-firstboot.service systemd-hwdb-update.service systemd-journal-catalog-update.service systemd-logind.service
  systemd-networkd.service systemd-networkd.socket systemd-pstore.service systemd-update-done.service'

# Kernel modules needed to mount the disk.
# shellcheck disable=SC2016 # the inner shell expands it
initrd_modules='mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
  echo MODULES=list >"$1/etc/initramfs-tools/conf.d/machine"
  printf "%s\n" virtio_pci virtio_blk ext4 >"$1/usr/share/initramfs-tools/modules.d/machine"'

make_root() {
  root=$dir/$1 suite=${1%+kernel}
  [ ! -d "$root" ] || return 0
  rm -rf --one-file-system "$root.tmp"
  [ "$suite" = "$1" ] || packages=$packages,linux-image-cloud-amd64,initramfs-tools
  # A mirror may serve an old snapshot whose "Valid-Until" has passed. Only the versions matter here.
  mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" --essential-hook="$initrd_modules" \
    --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Languages "none"' \
    --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' "$suite" "$root.tmp"
  for unit in $unwanted; do
    ln -sf /dev/null "$root.tmp/etc/systemd/system/$unit"
  done
  # On Debian only one group can connect to the Nix daemon, on NixOS everyone can.
  sed 's/daemon-socket 770 root nix-users/daemon-socket 755 root root/' \
    "$root.tmp/usr/lib/tmpfiles.d/nix-daemon.conf" >"$root.tmp/etc/tmpfiles.d/nix-daemon.conf"
  echo 5ea1ab1e5ea1ab1e5ea1ab1e5ea1ab1e >"$root.tmp/etc/machine-id"
  [ "$suite" = "$1" ] || add_shell "$root.tmp"
  mv -T "$root.tmp" "$root"
}

# Add a shell on the second serial port, for qemu.py. It reads a command in base64 per line, and prints the output in
# base64 and the exit status.
add_shell() {
  cat >"$1/usr/local/sbin/test-shell" <<'END'
#!/bin/bash
stty raw -echo
echo ready
cd /tmp
while read -r line; do
  output=$(base64 -d <<<"$line" | bash 2>/dev/ttyS0 | base64 --wrap=0; exit "${PIPESTATUS[1]}")
  echo "$output $?"
done
END
  chmod +x "$1/usr/local/sbin/test-shell"
  ln -s ../test-shell.service "$1/etc/systemd/system/multi-user.target.wants/"
  cat >"$1/etc/systemd/system/test-shell.service" <<'END'
[Service]
Environment=HOME=/root USER=root
ExecStart=/usr/local/sbin/test-shell
StandardInput=tty
StandardOutput=tty
TTYPath=/dev/ttyS1
END
}

makers=
for name; do
  make_root "$name" &
  makers="$makers $!"
done
failed=0
for maker in $makers; do
  wait "$maker" || failed=1
done
exit "$failed"
