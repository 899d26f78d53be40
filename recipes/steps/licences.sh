#!/usr/bin/env bash
# Takes licence texts out of a source tree, or out of this root file system.
#
# in:  /build/in/source   the tree, if it is one
# env: FILES              paths in the tree, one a line
#      TREE               where it is
# out: /build/out/texts   these files, at the same paths
set -euo pipefail

mkdir /build/out/texts
cd "$TREE"
while IFS= read -r file; do
  if [[ ! -f $file ]]; then
    printf 'licences: the tree has no file %s\n' "$file" >&2
    exit 2
  fi
  install -D -m 644 "$file" "/build/out/texts/$file"
done <<<"$FILES"
