#!/bin/bash
# Lays out the disk of the lab's emulated host as Debian's installer would leave it: GPT, EFI system partition with GRUB,
# ext4 root with Debian's kernel. No loop devices, no privileges.
#
# in:  /build/in/rootfs.tar  the root file system; has one kernel, its initramfs and update-grub
# env: ARCH          Debian architecture
#      DISK_MIB      size of the disk, MiB
#      HOSTNAME_     host name; the disk's UUIDs follow from it
#      MASKED_UNITS  units that must never run, separated by spaces
# out: /build/out/disk.qcow2  the same bytes for the same inputs
set -euo pipefail
umask 022

die() {
  printf 'lab disk: %s\n' "$1" >&2
  exit 1
}

case $ARCH in
  amd64) target=x86_64-efi removable=BOOTX64.EFI root_type=4f68bce3-e8cd-4db1-96e7-fbcaf984b709 ;;
  *) die "architecture $ARCH has no GRUB here" ;;
esac

uuid() { uuidgen --sha1 --namespace @dns --name "$1.$HOSTNAME_.virt-rt"; }
ext4=$(uuid ext4) fat=$(uuid fat)

# MiB. FAT32 needs 33 at least; the last MiB belongs to the second partition table.
esp_start=1 esp_size=64
root_start=$((esp_start + esp_size))
root_size=$((DISK_MIB - root_start - 1))

cp /build/in/rootfs.tar root.tar
tar -tf root.tar >names
kernel=$(sed -n 's,^\./boot/vmlinuz-,,p' names)
[[ -n $kernel && $kernel != *$'\n'* ]] || die "the root file system must have one kernel in /boot: ${kernel//$'\n'/, }"
grep -qxF "./boot/initrd.img-$kernel" names || die "/boot/initrd.img-$kernel is missing: add initramfs-tools"
grep -qxF ./usr/sbin/update-grub names || die "update-grub is missing: add grub-efi-amd64"
! grep -qx ./var/log/apt/ names || die "the root file system has the directory of apt's logs: leave it out here"
! grep -q '^\./etc/apt/sources\.list' <(grep -v '/$' names) || die "the root file system has a package source of its own"

# What an installer writes, and the directory of apt's logs, which went with them.
mkdir -p new/var/log/apt new/etc/default/grub.d new/etc/systemd/system "new/boot/grub/$target"
printf '%s\n' "$HOSTNAME_" >new/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost ip6-loopback\n' "$HOSTNAME_" >new/etc/hosts
printf 'UUID=%s / ext4 errors=remount-ro 0 1\n' "$ext4" >new/etc/fstab
# Without one systemd would take each boot for the first, and ask.
uuid machine | tr -d - >new/etc/machine-id
# no_timer_check: at boot the kernel wants several timer interrupts within some 20 ms, or panics; emulated on a busy machine
# they may be later.
cat >new/etc/default/grub.d/10-lab.cfg <<'SETTINGS'
# A machine without a screen; emulated, its timers may be late when the kernel looks for them.
GRUB_TERMINAL=console
GRUB_TIMEOUT=2
GRUB_CMDLINE_LINUX="console=ttyS0 no_timer_check"
GRUB_CMDLINE_LINUX_DEFAULT=""
SETTINGS
for unit in $MASKED_UNITS; do
  ln -s /dev/null "new/etc/systemd/system/$unit"
done

# What grub-install writes, but for the menu: that is update-grub's, which has to see the machine. Until it runs there this
# starts the only kernel.
cp /usr/lib/grub/$target/*.{mod,lst} "new/boot/grub/$target/"
grub-editenv new/boot/grub/grubenv create
cat >new/boot/grub/grub.cfg <<MENU
set timeout=0
menuentry 'Debian GNU/Linux' {
  search --no-floppy --fs-uuid --set=root $ext4
  linux /boot/vmlinuz-$kernel root=UUID=$ext4 ro console=ttyS0 no_timer_check
  initrd /boot/initrd.img-$kernel
}
MENU
# shellcheck disable=SC2016  # GRUB's variable
printf 'search.fs_uuid %s root\nset prefix=($root)/boot/grub\n' "$ext4" >early.cfg
grub-mkimage --format=$target --directory=/usr/lib/grub/$target --config=early.cfg --prefix=/boot/grub --output=grub.efi \
  part_gpt ext2 search_fs_uuid normal configfile linux echo test

# The archive may have a file of the same name; directories are there, but for two.
(cd new && find . ! -type d) | sort >made
tar -tf root.tar | grep -xFf made >replaced || true
if [[ -s replaced ]]; then
  tar --delete -f root.tar -T replaced
fi
tar -rf root.tar -C new --no-recursion --format=posix --numeric-owner --owner=0 --group=0 --mode=go-w \
  --mtime="@$SOURCE_DATE_EPOCH" --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' \
  "./boot/grub/$target" ./var/log/apt -T made

truncate -s "${DISK_MIB}M" disk.raw
sfdisk --quiet disk.raw <<TABLE
label: gpt
label-id: $(uuid disk)
start=${esp_start}MiB, size=${esp_size}MiB, type=uefi, name=lab-esp, uuid=$(uuid esp)
start=${root_start}MiB, size=${root_size}MiB, type=$root_type, name=lab-root, uuid=$(uuid root)
TABLE

truncate -s "${esp_size}M" esp.raw
mkfs.fat -F 32 -s 1 --invariant -i "${fat:0:8}" -n ESP esp.raw >/dev/null
mmd -i esp.raw ::EFI ::EFI/BOOT
mcopy -i esp.raw grub.efi "::EFI/BOOT/$removable"
dd if=esp.raw of=disk.raw bs=1M seek=$esp_start conv=notrunc,sparse status=none

mke2fs -q -t ext4 -b 4096 -m 0 -L lab -U "$ext4" -d root.tar \
  -E "offset=$((root_start << 20)),hash_seed=$(uuid hash),root_owner=0:0,nodiscard" disk.raw $((root_size * 256)) ||
  die "the root file system does not fit into $root_size MiB"

# The result is inspected, not the intention.
want="lab-esp $((esp_start * 2048)) $((esp_size * 2048))
lab-root $((root_start * 2048)) $((root_size * 2048))"
got=$(sfdisk --json disk.raw | jq -r '.partitiontable.partitions[] | "\(.name) \(.start) \(.size)"')
[[ $got == "$want" ]] || die "partitions are not where they should be: $got"
e2fsck -fn "disk.raw?offset=$((root_start << 20))" || die "the root file system is not clean"
mcopy -i "disk.raw@@${esp_start}M" "::EFI/BOOT/$removable" - | cmp - grub.efi || die "GRUB is not in the EFI system partition"
while read -r file; do
  [[ -L new/$file ]] || debugfs -R "cat $file" "disk.raw?offset=$((root_start << 20))" 2>/dev/null | cmp - "new/$file" ||
    die "$file is not as it was laid out"
done < <(grep -v '\.mod$' made)

qemu-img convert -c -O qcow2 -o compression_type=zstd disk.raw /build/out/disk.qcow2
qemu-img compare -q disk.raw /build/out/disk.qcow2 || die "the compressed disk differs from the one laid out"
