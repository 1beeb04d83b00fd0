#!/bin/sh
# container.sh NAME ROOT STATE GUEST CGROUP: start a machine in new namespaces, with systemd as process 1.
#
# Does not change ROOT: writes of the machine go to STATE/upper. GUEST is the directory of pack.py, and CGROUP the
# machine's directory in the cgroup tree. Needs root and a temporary mount namespace.
set -eu
name=$1 root=$2 state=$3 guest=$4

if [ $# = 5 ]; then
  mkdir -p "$5" && echo $$ >"$5/cgroup.procs"
  exec unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child sh "$0" "$name" "$root" "$state" "$guest"
fi

mount --make-rprivate /
mkdir -p "$state/upper" "$state/work" "$state/root"
mount -t overlay overlay -o "lowerdir=$root,upperdir=$state/upper,workdir=$state/work" "$state/root"
cd "$state/root"

mount -t proc -o nosuid,nodev,noexec proc proc
mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t tmpfs -o nosuid,mode=755 tmpfs dev
for device in null zero full random urandom tty; do
  touch "dev/$device" && mount --bind "/dev/$device" "dev/$device"
done
touch dev/console && mount --bind "$state/console" dev/console
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs run
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs tmp
mkdir run/guest && mount --bind -o ro "$guest" run/guest
for unit in tmp.mount systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udev-trigger.service; do
  ln -sf /dev/null "etc/systemd/system/$unit"
done
hostname "$name" && echo "$name" >etc/hostname

mkdir old && pivot_root . old && umount --lazy /old && rmdir /old
mount --make-rshared /
exec env -i container=nixos-test TERM=dumb PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  /usr/lib/systemd/systemd --log-target=console --show-status=no --log-level=notice </dev/null >/dev/console 2>&1
