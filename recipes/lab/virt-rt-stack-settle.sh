#!/bin/sh
# Usage: settle DIRECTORY. Each file in there is shown at its path from / instead of the one that is installed. Nothing
# that is installed changes, and without the lab's disk it is all there again.
set -eu

cd "$1"
find . -type f | while read -r file; do
  [ -f "/${file#./}" ] || {
    echo "not installed: /${file#./}" >&2
    exit 1
  }
  mount --bind "$file" "/${file#./}"
done
