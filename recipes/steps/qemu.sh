#!/bin/bash
# Builds qemu for KVM and TCG with nothing that an RT host has no use for.
#
# in   /build/in/source   the qemu tree, with our patches applied
# out  /build/out         the content of $PREFIX: bin, libexec, share
# env  TARGETS            qemu's target names, e.g. "x86_64-softmmu"
#      PREFIX             where the result is meant to be installed; it also runs from anywhere else
set -euo pipefail

readonly source=/build/in/source build=/build/work/build out=/build/out

fail() {
  printf 'qemu: %s\n' "$@" >&2
  exit 1
}

compiler=gcc
if [[ -n ${CCACHE_DIR-} ]]; then
  export CCACHE_COMPILERCHECK=content
  compiler='ccache gcc'
fi

# shellcheck disable=SC2153 # TARGETS is an input, targets the list made of it
read -r -a targets <<<"$TARGETS"
systems=("${targets[@]/#/qemu-system-}")
systems=("${systems[@]/%-softmmu/}")

devices=()
for target in "${targets[@]}"; do
  [[ -e $source/configs/devices/$target/virt-rt.mak ]] ||
    fail "no device set for target $target" \
      "add configs/devices/$target/virt-rt.mak through recipes/patches/qemu-kvm-rt/, or take $target out of TARGETS"
  devices+=("--with-devices-${target%-softmmu}=virt-rt")
done

# Everything is off unless named. An enabled feature whose library is missing stops configure; left to itself, it
# would be dropped silently.
options=(
  --without-default-features --without-default-devices
  --disable-containers --disable-docs --disable-download --disable-install-blobs
  --enable-kvm --enable-tcg
  --enable-vhost-kernel --enable-vhost-net --enable-vhost-user
  --enable-linux-aio --enable-linux-io-uring --enable-zstd
  --enable-numa --enable-seccomp --enable-cap-ng
  --enable-slirp --enable-fdt=system --enable-tools
  --enable-avx2 --enable-pie --enable-stack-protector
  --disable-debug-info --disable-qom-cast-debug
)

mkdir -p "$build"
cd "$build"
# meson lists qemu's own block tests, and that script makes its scratch directory where it lies: in the read-only tree
export TEST_DIR=$build/iotests
"$source/configure" --prefix="$PREFIX" --with-pkgversion=virt-rt --target-list="${TARGETS// /,}" --cc="$compiler" \
  --extra-cflags="-ffile-prefix-map=../../in/source/=" "${options[@]}" "${devices[@]}"

# configure leaves the option ROMs out where there is no 32-bit libgcc, which they do not even link
printf '%s\n' "TOPSRC_DIR=$source" CC=gcc OBJCOPY=objcopy PYTHON=python3 >pc-bios/optionrom/config.mak
make -C pc-bios/optionrom

ninja -j "$JOBS" "${systems[@]}" qemu-img qemu-io qemu-nbd qemu-bridge-helper

install -D -s -t "$out/bin" "${systems[@]}" qemu-img qemu-io qemu-nbd
install -D -s -t "$out/libexec" qemu-bridge-helper
# SeaBIOS, OVMF, the network boot ROMs; then the ROMs of -kernel and of KVM without a TPR shadow.
install -D -m 644 -t "$out/share/qemu" /usr/share/seabios/bios-256k.bin \
  /usr/share/OVMF/OVMF_CODE_4M.fd /usr/share/OVMF/OVMF_VARS_4M.fd /usr/share/qemu/efi-{virtio,e1000e}.rom \
  pc-bios/optionrom/{kvmvapic,linuxboot,linuxboot_dma,multiboot,multiboot_dma,pvh}.bin

# What was asked for must be in what was built.
has() { # WORD TEXT WHAT
  grep -qwF -e "$1" <<<"$2" || fail "$3 is missing from the build" "look for it in the configure summary above"
}

accelerators=(kvm tcg)
backends=(user tap vhost-user)
models=(amd-iommu e1000e edu ide-hd igb intel-iommu isa-serial ivshmem-plain nvme pcie-root-port vfio-pci
  vhost-user-blk-pci vhost-vsock-pci virtio-blk-pci virtio-net-pci virtio-rng-pci virtio-scsi-pci virtio-serial-pci)
# q35 is the only board and no target's default: it has to be named.
for system in "${systems[@]}"; do
  found=$("$out/bin/$system" -machine q35 -accel help)
  for name in "${accelerators[@]}"; do has "$name" "$found" "$system: accelerator $name"; done
  found=$("$out/bin/$system" -machine q35 -netdev help)
  for name in "${backends[@]}"; do has "$name" "$found" "$system: network back end $name"; done
  found=$("$out/bin/$system" -machine q35 -device help)
  for name in "${models[@]}"; do has "\"$name\"" "$found" "$system: device $name"; done
  # Starting it reads every ROM, and from $out: the result does not depend on $PREFIX.
  "$out/bin/$system" -accel tcg -machine q35 -nodefaults -display none -S -monitor stdio -sandbox on \
    -nic user,model=virtio-net-pci -device pcie-root-port,id=rp,slot=1 -device igb,bus=rp <<<quit ||
    fail "$system does not start" "its message is above: a missing file belongs into share/qemu"
done
"$out/bin/qemu-img" --version || fail "qemu-img does not start" "its message is above"
"$out/bin/qemu-img" create -q -f qcow2 -o compression_type=zstd "$build/zstd.qcow2" 1M ||
  fail "qemu-img cannot write a zstd qcow2" "its message is above"
