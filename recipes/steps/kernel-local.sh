#!/usr/bin/env bash
# Builds a kernel from a developer's work tree, in an object directory that may have been built in before.
#
# It is kernel.sh in all that it makes. Only what takes longer than to compile one file is put back as it was where nothing
# that it could depend on has changed: the configuration, and what drivers are built against.
#
# In:  kernel.sh       the step itself, and what it needs
#      ../work/changed paths that differ from what was built before, a line each; not there when that is not known
set -euo pipefail

readonly changed=/build/work/changed last=.config.last wanted=.wanted.last
# Headers as they were last put out, and a file that is as old as they are; below the object directory, which is kept.
readonly headers=/build/work/obj/.headers stamp=/build/work/obj/.headers.stamp
copying=

# Whether nothing changed but files whose names match $1 and do not match $2.
changed_only() {
  ! grep -qEv "$1" "$changed" && ! grep -qE "$2" "$changed"
}

# Whether the configuration of the last build is still the one that would be made: C, assembler and nothing else was edited,
# outside the programs that kconfig asks.
is_configured() {
  [[ -f $changed && -f $last && -f include/config/auto.conf && $(<wanted.config) == "$(<"$wanted")" ]] &&
    changed_only '\.[chS]$' '^(scripts|tools)/'
}

# Puts out the headers of the last build while this one begins, which leaves a CPU free more often than not; all but those
# that may have to be others now, since a header or one of the kernel's own programs was edited. What cannot be kept goes
# before anything is built, so that a build which ends in the middle leaves none behind.
begin_headers() {
  if [[ -f $stamp ]] && changed_only '\.[cS]$' '(^|/)(include|scripts|tools)/'; then
    cp --archive "$headers" /build/out/headers &
    copying=$!
  else
    rm -rf "$stamp" "$headers"
  fi
}

# Brings what the kernel's build has made anew into the headers of the last one: its release, Module.symvers, offsets of the
# assembler.
end_headers() {
  local file
  wait "$copying"
  while read -r file; do
    if [[ $file -nt $stamp ]]; then
      cp --preserve=timestamps "$file" "$headers/$file"
      cp --preserve=timestamps "$file" "/build/out/headers/$file"
    fi
  done < <(cd "$headers" && find . -type f)
  touch "$stamp"
}

# What kernel.sh calls as make. The date of the configuration is kept with it: make goes by that.
make() {
  case ${!#} in
    allnoconfig)
      if is_configured; then
        echo "kernel: configured as before"
        begin_headers
        cp --preserve=timestamps "$last" .config
        return
      fi
      rm -rf "$last" "$stamp" "$headers"
      command make "$@"
      ;;
    olddefconfig)
      if [[ -f $last ]]; then return; fi
      command make "$@"
      cp --preserve=timestamps .config "$last"
      cp wanted.config "$wanted"
      ;;
    KBUILD_RUN_COMMAND=*/install-extmod-build\ *)
      if [[ -n $copying ]]; then
        echo "kernel: headers as before"
        end_headers
        return
      fi
      command make "$@"
      cp --archive /build/out/headers "$headers"
      touch "$stamp"
      ;;
    *) command make "$@" ;;
  esac
}

# shellcheck source-path=SCRIPTDIR source=kernel.sh
source /build/in/kernel.sh
