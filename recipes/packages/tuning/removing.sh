# shellcheck shell=sh
# rpm removes another platform's tuning after this one's files have replaced its own: what is in force is then not its.
if [ "$(cat /usr/share/virt-rt/package)" = '{{ name }}' ]; then
  virt-rt-tuning package-remove
fi
