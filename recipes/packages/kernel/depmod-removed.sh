# shellcheck shell=sh
# What depmod made; it is of no use without the modules. What others put there stays.
for made in alias alias.bin builtin.alias.bin builtin.bin dep dep.bin devname softdep symbols symbols.bin weakdep; do
  rm -f "/usr/lib/modules/{{ release }}/modules.$made"
done
if [ -d '/usr/lib/modules/{{ release }}' ]; then
  rmdir --ignore-fail-on-non-empty '/usr/lib/modules/{{ release }}'
fi
