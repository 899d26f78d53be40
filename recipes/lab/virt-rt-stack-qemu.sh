#!/bin/sh
# In place of the guest's qemu: the same, with the lab's ports, disk and credentials for the guest beside what the launch
# script asks for. What only tries something out has no name, and goes through as it is.
set -eu

# shellcheck disable=SC1091  # not in the checkout
. /run/virt-rt-lab/environment
case " $* " in
  *" -name $GUEST,"*) ;;
  *) exec "$BUILT/qemu/bin/qemu-system-x86_64" "$@" ;;
esac
for credential in /run/virt-rt-lab/credentials/*; do
  set -- "$@" -smbios "type=11,path=$credential"
done
[ -p /run/virt-rt-stack/go.in ] || mkfifo /run/virt-rt-stack/go.in /run/virt-rt-stack/go.out
exec "$BUILT/qemu/bin/qemu-system-x86_64" "$@" -device virtio-serial-pci \
  -chardev file,id=told,path=/run/virt-rt-stack/told -device virtserialport,chardev=told,name=virt-rt.stack \
  -drive if=none,id=tools,format=raw,readonly=on,file=/run/virt-rt-lab/tools \
  -device virtio-blk-pci,drive=tools,serial=virt-rt-tools \
  -chardev file,id=sent,path=/run/virt-rt-stack/sent -device virtserialport,chardev=sent,name=virt-rt.records \
  -chardev pipe,id=go,path=/run/virt-rt-stack/go -device virtserialport,chardev=go,name=virt-rt.go
