#!/usr/bin/env bash
# Makes the pocket machine's initramfs in the kernel builder.
#
# In:  source/  the kernel tree (nolibc, gen_init_cpio)
#      init.c   its only program
# Out: initramfs.cpio
set -euo pipefail

gcc -O2 -o gen_init_cpio /build/in/source/usr/gen_init_cpio.c
gcc -Os -static -nostdlib -include /build/in/source/tools/include/nolibc/nolibc.h \
  -I /build/in/source/tools/include/nolibc -o init /build/in/init.c -lgcc
strip init
./gen_init_cpio -t "$SOURCE_DATE_EPOCH" - >/build/out/initramfs.cpio <<'END'
dir /dev 755 0 0
nod /dev/console 600 0 0 c 5 1
dir /proc 755 0 0
file /init init 755 0 0
END
