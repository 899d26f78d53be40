#!/bin/bash
# Bakes the root file system of a guest with diskimage-builder, offline, from locked packages.
#
# in:  /build/in/debs      the packages, flat; exactly these are installed
#      /build/in/elements  our diskimage-builder elements
# env: ARCH                 Debian architecture
#      RUNNER               the builder's program that runs programs of that architecture; empty where they run by themselves
#      SUITE                Debian suite
#      INCLUDE              packages that were asked for, separated by spaces
#      MASKED_UNITS         units that must never run, separated by spaces
#      CONSOLE_LOGIN        1: a root shell on the console; 0: no login on any console
#      SSH_AUTHORIZED_KEYS  public keys of root, one a line; may be empty
#      HOSTNAME_            host name of the guest
# out: /build/out/rootfs.tar    the same bytes for the same inputs
#      /build/out/packages.txt  name, version and architecture of every package
set -euo pipefail
umask 022

die() {
  printf 'rootfs: %s\n' "$1" >&2
  exit 1
}

# The kernel hands programs of another architecture to what is called so, in the builder and in the root file system alike.
if [[ -n $RUNNER ]]; then
  mkdir foreign
  dpkg-deb -x /build/in/debs/libc6_*.deb foreign
  loader=(foreign/usr/lib/*/ld-linux-*.so.*)
  if ! "${loader[0]}" --version >/dev/null; then
    printf 'rootfs: the kernel of this machine does not run programs of %s\nas root: scripts/run-foreign\n' "$ARCH" >&2
    exit 2
  fi
  rm -rf foreign
fi

# diskimage-builder silently skips hooks that are not executable, so their mode is not left to whoever mounted them.
cp -r /build/in/elements elements
chmod 0755 elements/*/*.d/*

export ARCH RUNNER SUITE MASKED_UNITS CONSOLE_LOGIN SSH_AUTHORIZED_KEYS HOSTNAME_
export DEBS=/build/in/debs ELEMENTS_PATH=$PWD/elements TMP_DIR=$PWD USER=root
export DIB_NO_TMPFS=1 DIB_NO_TIMESTAMP=1
disk-image-create -n -a "$ARCH" -t tar -o image debian-locked virt-rt-guest

mkdir root
tar -xf image.tar -C root --numeric-owner --xattrs --xattrs-include='*'
rm image.tar

# What the bake mounted or left behind in the directories that are mounted over at boot.
rm -rf root/{dev,run,tmp}
install -d root/{dev,run} && install -d -m 1777 root/tmp
install -d -m 0555 root/{proc,sys}

dpkg-query --admindir=root/var/lib/dpkg -W -f '${db:Status-Abbrev} ${Package} ${Version} ${Architecture}\n' | sort >packages
if broken=$(grep -v '^ii ' packages); then
  die "packages that are not fully installed: $broken"
fi
awk '{ print $2, $3, $4 }' packages >/build/out/packages.txt

# The result is inspected, not the intention.
for package in $INCLUDE; do
  awk -v package="$package" '$1 == package { found = 1 } END { exit !found }' /build/out/packages.txt ||
    die "package $package was asked for and is not installed"
done
[[ -x root/usr/bin/cyclictest ]] || die "cyclictest is missing: add rt-tests to the packages of the image"
[[ -f root/etc/machine-id && ! -s root/etc/machine-id ]] || die "/etc/machine-id must exist and be empty"
[[ $(<root/etc/hostname) == "$HOSTNAME_" ]] || die "/etc/hostname is not $HOSTNAME_"
if keys=$(compgen -G 'root/etc/ssh/ssh_host_*'); then
  die "SSH host keys in the image: $keys"
fi

for file in shadow gshadow; do
  open=$(awk -F: '$2 !~ /^[!*]+$/ { print $1 }' "root/etc/$file")
  [[ -z $open ]] || die "/etc/$file: not locked: ${open//$'\n'/ }"
done
open=$(awk -F: '$2 != "x" { print $1 }' root/etc/passwd)
[[ -z $open ]] || die "/etc/passwd: password outside /etc/shadow: ${open//$'\n'/ }"

found=$(cat root/root/.ssh/authorized_keys 2>/dev/null || true)
[[ $found == "$SSH_AUTHORIZED_KEYS" ]] || die "root's authorized_keys are not those of the recipe"
[[ -z $(find root/home root/root -name 'authorized_keys*' ! -path root/root/.ssh/authorized_keys) ]] ||
  die "authorized_keys of an account other than root"

# sshd tells its effective configuration only with a host key, its directory and /dev/null at hand: here for this question alone.
install -d root/run/sshd
mount --bind /dev root/dev
chroot root ssh-keygen -q -t ed25519 -N '' -f /tmp/key
effective=$(chroot root /usr/sbin/sshd -T -h /tmp/key)
umount root/dev
rm -r root/run/sshd root/tmp/key*
[[ -z $RUNNER ]] || rm "root/usr/bin/$RUNNER"
for setting in 'passwordauthentication no' 'kbdinteractiveauthentication no' 'permitemptypasswords no' \
  'permitrootlogin without-password' 'pubkeyauthentication yes' 'authenticationmethods publickey'; do
  grep -qxF "$setting" <<<"$effective" || die "sshd's effective configuration lacks: $setting"
done

shell=$(find root/etc/systemd -type l -name console-shell.service | wc -l)
[[ $shell == "$CONSOLE_LOGIN" ]] || die "console login is $CONSOLE_LOGIN in the recipe and $shell in the image"
for unit in $MASKED_UNITS getty@.service serial-getty@.service console-getty.service container-getty@.service; do
  [[ $(readlink "root/etc/systemd/system/$unit") == /dev/null ]] || die "unit $unit is not masked"
done

tar -cf /build/out/rootfs.tar -C root --sort=name --format=posix --numeric-owner --xattrs --xattrs-include='*' \
  --mtime="@$SOURCE_DATE_EPOCH" --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' .
