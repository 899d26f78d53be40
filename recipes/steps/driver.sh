#!/usr/bin/env bash
# Builds a driver out of the kernel's tree, against the headers of one kernel, and checks that this kernel will load it.
#
# In:  source/         the driver's sources
#      headers/        what the kernel's build left for drivers
#      kernelrelease   the kernel's release
#      modulecheck.py  the verdict on the modules
# Env: ARCH            the kernel's name of the architecture (x86_64)
#      DRIVER          the driver's name
#      SUBDIRECTORY    where in source/ its Makefile or Kbuild is
#      MAKE_ARGUMENTS  assignments for make
#      AUTOLOAD        modules that are loaded at boot
#      PROGRAMS        programs that come with it, as paths in source/
#      PROGRAM_TARGET  what make is to make where they are; each one's own name when it is empty
#      TEST            the command that tests it, a word on each line
#      TEST_TOOL       what runs that command: command or irqlat
#      LICENCE_FILES   files of source/ that hold its licence
# Out: root/           what is installed: the modules, the programs, and a unit that loads the modules of AUTOLOAD
#      licence         the text of its licence
#      driver.json     the modules, what the kernel's tools say of them, the programs, the test
#      kernelrelease   as it came
set -euo pipefail

readonly headers=/build/in/headers work=/build/work/driver out=/build/out
release=$(</build/in/kernelrelease)
read -ra arguments <<<"$MAKE_ARGUMENTS"
read -ra at_boot <<<"$AUTOLOAD"
read -ra licences <<<"$LICENCE_FILES"
# shellcheck disable=SC2153  # it comes with the environment, like the others
read -ra programs <<<"$PROGRAMS"

# refuse WHAT HINT: what was asked for cannot be had, which is for the driver's author to mend.
refuse() {
  printf '%s\n' "driver: $1" "$2" >&2
  exit 2
}

if [[ $(<"$headers/include/config/kernel.release") != "$release" ]]; then
  echo "driver: the headers are of $(<"$headers/include/config/kernel.release"), the kernel is $release" >&2
  exit 1
fi

# A copy, since the build writes beside the sources.
cp --recursive /build/in/source "$work"
[[ -f $work/$SUBDIRECTORY/Makefile || -f $work/$SUBDIRECTORY/Kbuild ]] ||
  refuse "there is no Makefile and no Kbuild in $SUBDIRECTORY of its sources" "write one that sets obj-m, or name another subdirectory"

# Who built where and when comes from the recipe, so that the same inputs give the same bytes.
KBUILD_BUILD_TIMESTAMP=$(date --utc --date="@$SOURCE_DATE_EPOCH")
export KBUILD_BUILD_TIMESTAMP KBUILD_BUILD_USER=virt-rt KBUILD_BUILD_HOST=virt-rt KBUILD_BUILD_VERSION=1
export KCFLAGS="-ffile-prefix-map=$work/= -ffile-prefix-map=$headers/=" KAFLAGS="-ffile-prefix-map=$work/= -ffile-prefix-map=$headers/="
module_directory=$(realpath "$work/$SUBDIRECTORY")
make -C "$headers" M="$module_directory" ARCH="$ARCH" -j "$JOBS" "${arguments[@]}" modules

modules=()
while IFS= read -r -d '' module; do
  modules+=("$module")
done < <(find "$module_directory" -name '*.ko' -print0 | sort -z)
((${#modules[@]})) || refuse "make left no module (*.ko)" "obj-m in its Makefile must name one"

updates=$out/root/usr/lib/modules/$release/updates
mkdir -p "$updates"
for module in "${modules[@]}"; do
  [[ ! -e $updates/${module##*/} ]] || refuse "two modules are named ${module##*/}" "rename one: a kernel knows modules by name"
  # debugging information is most of a module, and nothing loads it
  strip --strip-debug -o "$updates/${module##*/}" "$module"
done

# For one kernel like its modules: programs of two builds are in each other's way no more than their modules are.
readonly libexec=/usr/libexec/virt-rt/drivers/$release/$DRIVER
installed=()
for program in "${programs[@]}"; do
  [[ -d $work/${program%/*} || $program != */* ]] ||
    refuse "there is no directory ${program%/*} in its sources" "programs names paths below them"
  # in the environment, so that a Makefile may add to them; they are linked to no library of the builder's
  CC=gcc CFLAGS="-O2 -ffile-prefix-map=$work/=" LDFLAGS=-static \
    make -C "$work/$(dirname "$program")" "${arguments[@]}" "${PROGRAM_TARGET:-${program##*/}}" ||
    refuse "make did not make $program" "its Makefile must have the target ${PROGRAM_TARGET:-${program##*/}}"
  [[ -f $work/$program ]] || refuse "make left no $program" "programs names paths below its sources"
  install -D --mode=0755 "$work/$program" "$out/root$libexec/${program##*/}"
  if [[ $(head --bytes=2 "$work/$program") != '#!' ]]; then
    strip "$out/root$libexec/${program##*/}" || refuse "$program is no program" "programs names what make links"
  fi
  installed+=("$libexec/${program##*/}")
done

symbols=("$headers/Module.symvers")
[[ ! -f $module_directory/Module.symvers ]] || symbols+=("$module_directory/Module.symvers")
python3 -B /build/in/modulecheck.py --release "$release" --driver "$DRIVER" --symbols "${symbols[@]}" --autoload "${at_boot[@]}" \
  --root "$out/root" --programs "${installed[@]}" --test-tool "$TEST_TOOL" --test "$TEST" \
  --modules "$updates" --document "$out/driver.json"

for licence in "${licences[@]}"; do
  [[ -s $work/$licence ]] || refuse "its sources have no $licence, or an empty one" "name the files that hold its licence in licence_files"
  cat "$work/$licence" >>"$out/licence"
done
cp --no-preserve=all /build/in/kernelrelease "$out/kernelrelease"

if ((${#at_boot[@]})); then
  # A unit and not modules-load.d, which would fail at each boot of a kernel that has no such module.
  units=$out/root/usr/lib/systemd/system
  unit=virt-rt-driver-$DRIVER-$release.service
  mkdir -p "$units/sysinit.target.wants"
  cat >"$units/$unit" <<END
[Unit]
Description=Load the driver $DRIVER
Documentation=man:modprobe(8)
DefaultDependencies=no
Conflicts=shutdown.target
After=systemd-modules-load.service
Before=sysinit.target shutdown.target
ConditionKernelVersion=$release
ConditionCapability=CAP_SYS_MODULE

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/modprobe --all ${at_boot[*]}
END
  ln -s "../$unit" "$units/sysinit.target.wants/$unit"
fi
