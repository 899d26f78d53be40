#!/bin/bash
# Lays out the disk of a guest: GPT, EFI system partition with a unified kernel image, ext4 root. No loop devices, no privileges.
#
# in:  /build/in/rootfs.tar  the root file system
#      /build/in/$KERNEL     the guest kernel; finds its root without an initramfs
#      /build/in/modules     what `make modules_install` installed (lib/modules/...); may be empty
# env: KERNEL    name of the kernel's boot image
#      EFI       the architecture in names of EFI programs: x64, aa64
#      ROOT_TYPE type of a root partition of the architecture (Discoverable Partitions Specification)
#      CMDLINE   command line of the kernel inside; must contain root=PARTLABEL=virt-rt-root
#      DISK_MIB  size of the disk, MiB
#      GUEST     name of the guest; its disk's UUIDs follow from it
# out: /build/out/disk.qcow2  the same bytes for the same inputs
set -euo pipefail

die() {
  printf 'disk: %s\n' "$1" >&2
  exit 1
}

linux=/build/in/$KERNEL
[[ " $CMDLINE " == *' root=PARTLABEL=virt-rt-root '* ]] || die "CMDLINE must contain root=PARTLABEL=virt-rt-root: $CMDLINE"

uuid() { uuidgen --sha1 --namespace @dns --name "$1.$GUEST.virt-rt"; }

# MiB. FAT32 needs 33 at least; the last MiB belongs to the second partition table.
esp_start=1 esp_size=64
root_start=$((esp_start + esp_size))
root_size=$((DISK_MIB - root_start - 1))

tar -xf /build/in/rootfs.tar ./usr/lib/os-release ./etc/fstab
grep -q '^PARTLABEL=virt-rt-root / ext4 ' etc/fstab || die "the root file system does not mount PARTLABEL=virt-rt-root as /"
ukify build --linux="$linux" --efi-arch="$EFI" --cmdline="$CMDLINE" --os-release=@usr/lib/os-release \
  --stub="/usr/lib/systemd/boot/efi/linux$EFI.efi.stub" --output=uki.efi

cp /build/in/rootfs.tar root.tar
if [[ -d /build/in/modules/lib/modules ]]; then
  tar -rf root.tar -C /build/in/modules --sort=name --format=posix --numeric-owner --owner=0 --group=0 --mode=go-w \
    --mtime="@$SOURCE_DATE_EPOCH" --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' \
    --transform='flags=r;s,^lib/,./usr/lib/,' --exclude='lib/modules/*/build' --exclude='lib/modules/*/source' lib/modules
fi

truncate -s "${DISK_MIB}M" disk.raw
sfdisk --quiet disk.raw <<TABLE
label: gpt
label-id: $(uuid disk)
start=${esp_start}MiB, size=${esp_size}MiB, type=uefi, name=virt-rt-esp, uuid=$(uuid esp)
start=${root_start}MiB, size=${root_size}MiB, type=$ROOT_TYPE, name=virt-rt-root, uuid=$(uuid root)
TABLE

volume=$(uuid fat)
truncate -s "${esp_size}M" esp.raw
mkfs.fat -F 32 -s 1 --invariant -i "${volume:0:8}" -n ESP esp.raw >/dev/null
mmd -i esp.raw ::EFI ::EFI/BOOT
mcopy -i esp.raw uki.efi "::EFI/BOOT/BOOT${EFI^^}.EFI"
dd if=esp.raw of=disk.raw bs=1M seek=$esp_start conv=notrunc,sparse status=none

mke2fs -q -t ext4 -b 4096 -m 0 -L root -U "$(uuid ext4)" -d root.tar \
  -E "offset=$((root_start << 20)),hash_seed=$(uuid hash),root_owner=0:0,nodiscard" disk.raw $((root_size * 256)) ||
  die "the root file system does not fit into $root_size MiB: raise disk_mib in the guest's recipe"

# The result is inspected, not the intention.
want="virt-rt-esp $((esp_start * 2048)) $((esp_size * 2048))
virt-rt-root $((root_start * 2048)) $((root_size * 2048))"
got=$(sfdisk --json disk.raw | jq -r '.partitiontable.partitions[] | "\(.name) \(.start) \(.size)"')
[[ $got == "$want" ]] || die "partitions are not where they should be: $got"
e2fsck -fn "disk.raw?offset=$((root_start << 20))" || die "the root file system is not clean"
mcopy -i "disk.raw@@${esp_start}M" "::EFI/BOOT/BOOT${EFI^^}.EFI" found.efi
section() {
  python3 -c 'import sys, pefile
for section in pefile.PE(sys.argv[1]).sections:
    if section.Name.rstrip(b"\0").decode() == sys.argv[2]:
        sys.stdout.buffer.write(section.get_data()[: section.Misc_VirtualSize])' found.efi "$1"
}
section .linux | cmp - "$linux" || die "the kernel in the EFI system partition is not the one given"
[[ $(section .cmdline | tr -d '\0') == "$CMDLINE" ]] || die "the command line in the EFI system partition is not the one given"

qemu-img convert -c -O qcow2 -o compression_type=zstd disk.raw /build/out/disk.qcow2
qemu-img compare -q disk.raw /build/out/disk.qcow2 || die "the compressed disk differs from the one laid out"
size=$(stat -c %s /build/out/disk.qcow2)
((size <= 100 << 20)) || die "the disk takes $((size >> 20)) MiB, more than 100: remove packages from the image's recipe"
