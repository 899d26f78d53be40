#!/usr/bin/env bash
# Builds one Linux kernel out of tree, after its configuration was proven to be the one that was asked for.
#
# In:  source/         the kernel tree
#      kernel-configs/ fragments and the contract
#      contract.py     the check of the final configuration
#      kconfig-why.c   explains a symbol that did not take
# Env: ARCH            the kernel's name of the architecture (x86_64)
#      CROSS_COMPILE   what the names of the compiler and its tools begin with; empty where the kernel is for this machine
#      ROLE            host or guest: the part of the contract that applies
#      FRAGMENTS       fragments in order, relative to kernel-configs/; later ones win
#      CONTRACT        the contract, relative to kernel-configs/
#      KERNEL_TARGETS  what make builds, the kernel image first (bzImage modules vmlinux)
#      ACTION_KEY      the step's own key: its first 12 digits end the kernel's release, so that two builds can be installed
#                      beside each other
# Out: the kernel image under its own name (bzImage), config, System.map, kernelrelease; with the target modules also
#      modules/ (lib/modules/<release>/...) and headers/ (what drivers are built against out of tree), with the target vmlinux
#      that file, in which a debugger finds names and lines
set -euo pipefail

readonly source=/build/in/source configs=/build/in/kernel-configs obj=/build/work/obj
read -ra layers <<<"$FRAGMENTS"
read -ra targets <<<"$KERNEL_TARGETS"
if ((${#layers[@]} == 0 || ${#targets[@]} == 0)); then
  echo "kernel: FRAGMENTS and KERNEL_TARGETS must each name something" >&2
  exit 2
fi

# Who built where and when comes from the recipe, so that the same inputs give the same bytes.
KBUILD_BUILD_TIMESTAMP=$(date --utc --date="@$SOURCE_DATE_EPOCH")
export KBUILD_BUILD_TIMESTAMP KBUILD_BUILD_USER=virt-rt KBUILD_BUILD_HOST=virt-rt KBUILD_BUILD_VERSION=1 KCONFIG_NOTIMESTAMP=1
export KCFLAGS="-ffile-prefix-map=$source/= -ffile-prefix-map=$obj/=" KAFLAGS="-ffile-prefix-map=$source/= -ffile-prefix-map=$obj/="
# A compiler is known to ccache by its bytes: two images with equal time stamps never share an object.
export CCACHE_COMPILERCHECK=content
cc=${CROSS_COMPILE}gcc hostcc=gcc
if [[ -n ${CCACHE_DIR:-} ]]; then
  # A file that the assembler includes (.incbin) is in no list of dependencies: of two kernels of one size, ccache would
  # give the second the compressed image, or the configuration, of the first. Such a source is always compiled.
  cached() { # COMPILER WRAPPER
    cat >"$2" <<END
#!/bin/sh
for argument; do
  case \$argument in
    *.[cS]) if grep -q '\\.incbin' "\$argument"; then exec $1 "\$@"; fi ;;
  esac
done
exec ccache $1 "\$@"
END
    chmod +x "$2"
  }
  hostcc=/build/work/cc
  cached gcc "$hostcc"
  # One name where one compiler makes both: by it the kernel's build knows that its programs run where the kernel does.
  if [[ -n $CROSS_COMPILE ]]; then
    cached "$cc" /build/work/cross-cc
    cc=/build/work/cross-cc
  else
    cc=$hostcc
  fi
fi

kmake() {
  make -C "$source" O="$obj" CC="$cc" HOSTCC="$hostcc" LOCALVERSION="-${ACTION_KEY:0:12}" -j "$JOBS" "$@"
}

# Prints, for each "SYMBOL=wanted" line of $1, why the kernel's own kconfig does not grant it. config-prog lets our
# program run in the environment that kconfig's make rules prepare, linked with the objects they have built.
explain() {
  local kconfig=$obj/scripts/kconfig
  gcc -O1 -I "$source/scripts/include" -I "$source/scripts/kconfig" -o "$kconfig/why" /build/in/kconfig-why.c \
    "$kconfig"/{confdata,expr,lexer.lex,menu,parser.tab,preprocess,symbol,util}.o
  WHY_SYMBOLS=$1 kmake -s config config-prog=why
}

mkdir -p "$obj"
cd "$obj"
: >nothing
"$source/scripts/kconfig/merge_config.sh" -m -Q -O "$obj" nothing "${layers[@]/#/$configs/}"
mv .config wanted.config
# allnoconfig: what no fragment asks for stays off, instead of coming in through some default.
kmake -s KCONFIG_ALLCONFIG="$obj/wanted.config" allnoconfig
kmake -s olddefconfig

check=(python3 -B /build/in/contract.py --config "$obj/.config" --contract "$CONTRACT" --role "$ROLE" --arch "$ARCH"
  --source "$source")
cd "$configs"
"${check[@]}" --list-broken "${layers[@]}" >"$obj/broken"
if [[ -s $obj/broken ]]; then
  explain "$obj/broken" >"$obj/why" || echo "kernel: kconfig gave no explanations" >&2
  # What was asked for cannot be had: that is for the fragments' author to mend, not a fault of the build.
  "${check[@]}" --why "$obj/why" "${layers[@]}" || exit 2
fi

cd "$obj"
kmake "${targets[@]}"

# The image that make would install may be another one, beside this.
image=$(kmake -s image_name)
cp "${image%/*}/${targets[0]}" "/build/out/${targets[0]}"
cp .config /build/out/config
cp System.map /build/out/System.map
kmake -s kernelrelease >/build/out/kernelrelease
if [[ " $KERNEL_TARGETS " == *" vmlinux "* ]]; then
  cp vmlinux /build/out/vmlinux
fi
if [[ " $KERNEL_TARGETS " == *" modules "* ]]; then
  mkdir -p /build/out/modules
  kmake -s INSTALL_MOD_PATH=/build/out/modules INSTALL_MOD_STRIP=1 modules_install
  # The link to the object directory means nothing outside this container.
  rm -f "/build/out/modules/lib/modules/$(</build/out/kernelrelease)/build"
  kmake -s run-command KBUILD_RUN_COMMAND="$source/scripts/package/install-extmod-build /build/out/headers"
  cp .config /build/out/headers/.config
fi
