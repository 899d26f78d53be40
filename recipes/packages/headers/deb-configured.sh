# shellcheck shell=sh
# Hooks of dkms and its like: drivers that are built on this machine are built for this kernel, too.
if [ "${1:-}" = configure ] && [ -d /etc/kernel/header_postinst.d ]; then
  DEB_MAINT_PARAMS="$*" run-parts --report --exit-on-error --arg='{{ release }}' /etc/kernel/header_postinst.d
fi
