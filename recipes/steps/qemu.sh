#!/bin/bash
# Builds qemu for KVM and TCG, for this machine or for another architecture, with nothing that an RT host has no use for.
#
# in   /build/in/source   the qemu tree, with our patches applied
# out  /build/out         the content of $PREFIX: bin, libexec, share
# env  TARGETS            qemu's target names, e.g. "x86_64-softmmu"
#      BOARD              the board that is tried, which every target has
#      DEVICES            devices that they must have beside those that every board has
#      FIRMWARE           firmware of the builder that is shipped
#      OPTION_ROMS        ROMs of qemu's own tree that are built and shipped
#      OPTIONS            of configure, for the machine that the programs run on
#      CROSS_COMPILE      what the names of the compiler and its tools begin with; empty for programs of this machine
#      ACCELERATORS       that they have (kvm tcg)
#      RUNNER             the program that runs the programs here; empty where they run by themselves
#      PREFIX             where the result is meant to be installed; it also runs from anywhere else
set -euo pipefail

readonly source=/build/in/source build=/build/work/build out=/build/out

fail() {
  printf 'qemu: %s\n' "$@" >&2
  exit 1
}

compiler=${CROSS_COMPILE}gcc
if [[ -n ${CCACHE_DIR-} ]]; then
  export CCACHE_COMPILERCHECK=content
  compiler="ccache $compiler"
fi
read -r -a models <<<"$DEVICES"
read -r -a firmware <<<"$FIRMWARE"
read -r -a roms <<<"$OPTION_ROMS"
read -r -a more_options <<<"$OPTIONS"
read -r -a runner <<<"$RUNNER"
read -r -a accelerators <<<"$ACCELERATORS"

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
  "${accelerators[@]/#/--enable-}"
  --enable-vhost-kernel --enable-vhost-net --enable-vhost-user
  --enable-linux-aio --enable-linux-io-uring --enable-zstd
  --enable-numa --enable-seccomp --enable-cap-ng
  --enable-slirp --enable-fdt=system --enable-tools
  --enable-virtfs --enable-attr
  --enable-pie --enable-stack-protector
  --disable-debug-info --disable-qom-cast-debug
  "${more_options[@]}"
)
if [[ -n $CROSS_COMPILE ]]; then
  options+=(--cross-prefix="$CROSS_COMPILE")
fi

mkdir -p "$build"
cd "$build"
# meson lists qemu's own block tests, and that script makes its scratch directory where it lies: in the read-only tree
export TEST_DIR=$build/iotests
"$source/configure" --prefix="$PREFIX" --with-pkgversion=virt-rt --target-list="${TARGETS// /,}" --cc="$compiler" \
  --extra-cflags="-ffile-prefix-map=../../in/source/=" "${options[@]}" "${devices[@]}"

if ((${#roms[@]})); then
  # configure leaves the option ROMs out where there is no 32-bit libgcc, which they do not even link
  printf '%s\n' "TOPSRC_DIR=$source" CC=gcc OBJCOPY=objcopy PYTHON=python3 >pc-bios/optionrom/config.mak
  make -C pc-bios/optionrom
fi

ninja -j "$JOBS" "${systems[@]}" qemu-img qemu-io qemu-nbd qemu-bridge-helper

stripped=(-D -s --strip-program="${CROSS_COMPILE}strip")
install "${stripped[@]}" -t "$out/bin" "${systems[@]}" qemu-img qemu-io qemu-nbd
install "${stripped[@]}" -t "$out/libexec" qemu-bridge-helper
install -D -m 644 -t "$out/share/qemu" "${firmware[@]}" "${roms[@]/#/pc-bios/optionrom/}"

# What was asked for must be in what was built.
has() { # WORD TEXT WHAT
  grep -qwF -e "$1" <<<"$2" || fail "$3 is missing from the build" "look for it in the configure summary above"
}

backends=(user tap vhost-user)
models+=(e1000e edu igb ivshmem-plain nvme pcie-root-port vfio-pci vhost-user-blk-pci vhost-vsock-pci
  virtio-9p-pci virtio-blk-pci virtio-net-pci virtio-rng-pci virtio-scsi-pci virtio-serial-pci)
# User-mode emulation has no seccomp.
sandbox=(-sandbox on)
if ((${#runner[@]})); then
  sandbox=()
fi
# The board is no target's default: it has to be named.
for system in "${systems[@]}"; do
  found=$("${runner[@]}" "$out/bin/$system" -machine "$BOARD" -accel help)
  for name in "${accelerators[@]}"; do has "$name" "$found" "$system: accelerator $name"; done
  found=$("${runner[@]}" "$out/bin/$system" -machine "$BOARD" -netdev help)
  for name in "${backends[@]}"; do has "$name" "$found" "$system: network back end $name"; done
  found=$("${runner[@]}" "$out/bin/$system" -machine "$BOARD" -device help)
  for name in "${models[@]}"; do has "\"$name\"" "$found" "$system: device $name"; done
  # Starting it reads every ROM, and from $out: the result does not depend on $PREFIX.
  "${runner[@]}" "$out/bin/$system" -accel tcg -machine "$BOARD" -nodefaults -display none -S -monitor stdio "${sandbox[@]}" \
    -nic user,model=virtio-net-pci -device pcie-root-port,id=rp,slot=1 -device igb,bus=rp <<<quit ||
    fail "$system does not start" "its message is above: a missing file belongs into share/qemu"
done
"${runner[@]}" "$out/bin/qemu-img" --version || fail "qemu-img does not start" "its message is above"
"${runner[@]}" "$out/bin/qemu-img" create -q -f qcow2 -o compression_type=zstd "$build/zstd.qcow2" 1M ||
  fail "qemu-img cannot write a zstd qcow2" "its message is above"
