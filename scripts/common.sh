# Sourced by setup and doctor: how each thing that the host must have is recognised, in one place.
# shellcheck shell=bash disable=SC2034

# An ordinary user's PATH lacks the directories of dockerd; apt-helper is in none.
PATH=$PATH:/usr/sbin:/sbin:/usr/lib/apt

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=${XDG_STATE_HOME:-~/.local/state}/virt-rt
dockerd_log=$state/dockerd.log
dockerd_pid=$state/dockerd.pid

# die WHAT REMEDY: one line of what is wrong, one of what to do.
die() {
  printf 'set-up: %s\n        %s\n' "$1" "$2" >&2
  exit 2
}

# Whether anything matches PROBE, a command or a pattern of absolute paths.
present() {
  if [[ $1 == /* ]]; then
    compgen -G "$1" >/dev/null
  else
    type -P "$1" >/dev/null
  fi
}

# missing_packages SECTION...: the Debian packages to install, by the names of this release, one a line.
missing_packages() {
  local codename section='' probe package why name
  # shellcheck disable=SC1091
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
  while read -r probe package why; do
    case $probe in
      '' | '#'*) continue ;;
      '['*']')
        section=${probe:1:-1}
        continue
        ;;
    esac
    [[ -n $why ]] || die "scripts/apt-packages: '$probe $package' gives no reason" "write: probe package why"
    [[ " $* " == *" $section "* ]] || continue
    present "$probe" && continue
    name=${package%%,*}
    if [[ ",$package," == *",$codename:"* ]]; then
      name=${package#*,"$codename":}
      name=${name%%,*}
    fi
    echo "$name"
  done <"$root/scripts/apt-packages" | sort -u
}

# Whether commands can be run as root: as we are, with a sudo that asks nothing, or with one that can ask.
can_root() {
  [[ $(id -u) == 0 ]] || { present sudo && { sudo -n true 2>/dev/null || [[ -t 0 ]]; }; }
}

as_root() {
  if [[ $(id -u) == 0 ]]; then "$@"; else sudo "$@"; fi
}

# Whether systemd is the init system; not so in most containers, whatever is installed there.
systemd_runs() {
  case $(systemctl is-system-running 2>/dev/null) in
    '' | offline | unknown) return 1 ;;
  esac
}

# The Python for .venv: $PYTHON if set, else Debian's, else the one in PATH; status 1 when none will do.
find_python() {
  local python
  for python in ${PYTHON:-/usr/bin/python3 python3}; do
    if "$python" -ISc 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      type -P "$python"
      return
    fi
  done
  return 1
}

# venv_identity LOCK: what .venv depends on. Its commands carry the checkout's path, its packages the version of Python.
venv_identity() {
  echo "$root"
  "$root/.venv/bin/python" -ISc 'import sys; print(sys.version)' 2>/dev/null
  sha256sum <"$root/$1"
}

# venv_current LOCK: whether .venv holds what LOCK says.
venv_current() {
  local stamp=$root/.venv/$1.installed
  [[ -f $stamp && $(<"$stamp") == "$(venv_identity "$1")" ]]
}

# engine ARGUMENT...: docker on the engine that the build will use; a context of the docker command is not looked at.
engine() {
  timeout 20 docker --host "${DOCKER_HOST:-unix:///var/run/docker.sock}" "$@"
}

# Whether the dockerd that set-up started is alive.
own_dockerd_runs() {
  [[ -f $dockerd_pid && $(cat "/proc/$(<"$dockerd_pid")/comm" 2>/dev/null) == dockerd ]]
}

# A number where the user has no name, as in some containers.
user=$(id -un 2>/dev/null) || true
rights_remedy="sudo usermod -aG docker $user, then log in again (or, in this shell: newgrp docker)"
