# shellcheck shell=sh
# The kernel's hooks, called as Debian's own kernel packages call them: release and image as arguments, those of this
# maintainer script in DEB_MAINT_PARAMS. They make and remove the initramfs and the entries of the boot menu. Packages of
# suites after Debian 13 have theirs in /usr/share/kernel; run-parts then takes both directories at once.
hooks=
for directory in /etc/kernel /usr/share/kernel; do
  if [ -d "$directory/$DPKG_MAINTSCRIPT_NAME.d" ]; then
    hooks="$hooks $directory/$DPKG_MAINTSCRIPT_NAME.d"
  fi
done
if [ -n "$hooks" ]; then
  export DEB_MAINT_PARAMS="$*"
  # shellcheck disable=SC2086
  run-parts --report --exit-on-error --arg='{{ release }}' --arg='/boot/vmlinuz-{{ release }}' $hooks
fi
