#!/usr/bin/env bash
# Builds the menus in which a kernel's configuration is edited: its own, linked statically, so that they run in the
# container in which the kernel is built, which has no library for terminals.
#
# In:  source/  the kernel tree
# Out: mconf (menuconfig), nconf (nconfig)
set -euo pipefail

readonly obj=/build/work/obj
mkdir -p "$obj"
make -C /build/in/source O="$obj" HOSTLDFLAGS=-static HOSTPKG_CONFIG="pkg-config --static" -j "$JOBS" \
  build_menuconfig build_nconfig
cp "$obj"/scripts/kconfig/{mconf,nconf} /build/out/
