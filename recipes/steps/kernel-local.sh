#!/usr/bin/env bash
# Builds a kernel from a developer's work tree, in an object directory that may have been built in before.
#
# It is kernel.sh in all that it makes. Only the configuration, which takes longer than to compile one file, is put back as
# it was where nothing that it could depend on has changed.
#
# In:  kernel.sh       the step itself, and what it needs
#      ../work/changed paths that differ from what was built before, a line each; not there when that is not known
set -euo pipefail

readonly changed=/build/work/changed last=.config.last wanted=.wanted.last

# Whether the configuration of the last build is still the one that would be made: C, assembler and nothing else was edited,
# outside the programs that kconfig asks.
is_configured() {
  [[ -f $changed && -f $last && -f include/config/auto.conf ]] && cmp -s wanted.config "$wanted" &&
    ! grep -qEv '\.[chS]$' "$changed" && ! grep -qE '^(scripts|tools)/' "$changed"
}

# What kernel.sh calls as make. The date of the configuration is kept with it: make goes by that.
make() {
  case ${!#} in
    allnoconfig)
      if is_configured; then
        echo "kernel: configured as before"
        cp --preserve=timestamps "$last" .config
        return
      fi
      rm -f "$last"
      command make "$@"
      ;;
    olddefconfig)
      if [[ -f $last ]]; then return; fi
      command make "$@"
      cp --preserve=timestamps .config "$last"
      cp wanted.config "$wanted"
      ;;
    *) command make "$@" ;;
  esac
}

# shellcheck source-path=SCRIPTDIR source=kernel.sh
source /build/in/kernel.sh
