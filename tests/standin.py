"""A stand-in project: the real graph, commands, engine and store, with steps that take no time.

Sources are small git trees, builders are the tiny root file system, and every step script copies
instead of compiling. What a user types is run for real, in a checkout of its own with a cache of
its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline import locks
from pipeline.lab import MEASUREMENT
from pipeline.labreport import ATTRIBUTION
from pipeline.measure.verdict import FILE as VERDICT
from pipeline.project import Project
from pipeline.store import Result, Store
from tests import measuring
from tests.packaging import make_development_key

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "kernel.sh": """\
for n in {1..30}; do echo "  CC      file$n.o"; sleep "${SLEEP:-0}"; done
case $(cat /build/in/kernel-configs/*/host-config /build/in/kernel-configs/*/guest-config 2>/dev/null) in
*BROKEN*) echo "error: BROKEN does not compile"; exit 1 ;;
*REFUSED*) echo "error: REFUSED is not to be had"; exit 2 ;;
esac
if grep STARVED /build/in/source/main.c; then echo "gcc: fatal error: Killed signal terminated program cc1"; exit 1; fi
if grep SYNTAX /build/in/source/main.c; then echo "error: main.c does not compile"; exit 1; fi
{
  echo "# Linux/$ARCH 6.12.1 Kernel Configuration"
  for fragment in $FRAGMENTS; do grep -e '^CONFIG_' -e ' is not set$' "/build/in/kernel-configs/$fragment" || true; done
} >/build/out/config
for target in $KERNEL_TARGETS; do
  if [[ $target == modules ]]; then continue; fi
  cat /build/in/source/main.c /build/in/kernel-configs/*/*-config >"/build/out/$target"
done
echo 0000 >/build/out/System.map
echo 6.12.1-rt-"$ROLE-${ACTION_KEY:0:12}" >/build/out/kernelrelease
mkdir -p /build/out/modules/lib /build/out/headers
cp /build/out/config /build/out/modules/lib/one.ko
cp /build/out/config /build/out/headers/Makefile
""",
    # Takes every setting, but for one that breaks the contract; slowly, when it is told so.
    "kernel-config.sh": """\
own=/build/in/kernel-configs/${FRAGMENTS##* }
echo "merging"
cat "$own" /build/in/settings >/build/out/fragment
cp /build/out/fragment /build/out/config
if grep -q PREEMPT_RT /build/in/settings; then
  echo "CONFIG_PREEMPT_RT: wanted y, got n"
  exit 2
fi
if grep -q SLOW /build/in/settings; then sleep 3; fi
changes=$(sed 's/CONFIG_\\(.*\\)=\\(.*\\)/["\\1", "n", "\\2"],/' /build/in/settings)
echo "{\\"asked\\": [${changes%,}], \\"implied\\": []}" >/build/out/changes.json
""",
    "qemu.sh": """\
mkdir -p /build/out/{bin,libexec,share}
cp /build/in/source/main.c "/build/out/bin/qemu-system-${TARGETS%-softmmu}"
chmod 755 /build/out/bin/*
echo helper >/build/out/libexec/helper
echo firmware >/build/out/share/bios
""",
    "rootfs.sh": """\
echo "$INCLUDE $MASKED_UNITS" >/build/out/rootfs.tar
for package in $INCLUDE; do echo "$package 1 all"; done >/build/out/packages.txt
""",
    "licences.sh": """\
while IFS= read -r file; do
  file=/build/out/texts/$file
  mkdir -p "${file%/*}"
  echo "a licence" >"$file"
done <<<"$FILES"
""",
    # Real packages of one file: what is signed, indexed and released afterwards must be some.
    "package.sh": """\
said() { sed -n "s/^ *\\"$1\\": \\"\\([^\\"]*\\)\\".*/\\1/p" "$2" | head -n 1; }
top() { sed -n "s/^ \\"$1\\": \\"\\(.*\\)\\",*/\\1/p" "$description"; }
description=/build/in/description.json
name=$(said name "$description")
for variable in platform guest driver; do
  name=${name//"{{ $variable }}"/$(said $variable "$description")}
done
for file in /build/in/{kernel,driver}/kernelrelease; do
  if [[ -f $file ]]; then name=${name//"{{ release }}"/$(cat $file)}; fi
done
version=$(top release)+g${ACTION_KEY:0:12}
exact='' needs='' relations=''
for needed in $(sed -n '/^  "depends": {/,/^   "named"/s/^    "\\(.*\\)".*/\\1/p' "$description"); do
  document=/build/in/packages/$needed/package.json
  found=$(said name "$document") its=$(said version "$document")
  exact+="$needs{\\"name\\": \\"$found\\", \\"version\\": \\"$its\\"}" needs=', '
  relations+="${relations:+, }\\"$found (= $its)\\""
done
echo "$name" >/build/work/file
touch -d "@$SOURCE_DATE_EPOCH" /build/work/file
formats=''
for kind in deb rpm; do
  arch=$(top arch) release='' depends=$relations
  if [[ $(said architecture "$description") == all ]]; then arch=all; fi
  if [[ $kind == rpm ]]; then release=1 depends=${relations//[()]/}; fi
  cat >/build/work/nfpm.json <<CONFIG
{"name": "$name", "arch": "$arch", "version": "$version", "version_schema": "none", "release": "$release",
 "maintainer": "$(top maintainer)", "description": "stand-in", "license": "MIT", "section": "misc",
 "depends": [$depends], "rpm": {"buildhost": "virt-rt"},
 "contents": [{"src": "/build/work/file", "dst": "/usr/share/$name/file"}]}
CONFIG
  mkdir /build/out/$kind
  /build/in/nfpm package -f /build/work/nfpm.json -p $kind -t /build/out/$kind/ >/dev/null
  for file in /build/out/$kind/*; do
    read -r sha256 _ < <(sha256sum "$file")
    if [[ $kind.$arch == rpm.all ]]; then arch=noarch; elif [[ $kind == rpm ]]; then arch=$(top rpm_arch); fi
    formats+="${formats:+, }\\"$kind\\": {\\"file\\": \\"${file##*/}\\", \\"arch\\": \\"$arch\\","
    formats+=" \\"size\\": $(stat -c %s "$file"), \\"sha256\\": \\"$sha256\\"}"
  done
done
guest=$(said guest "$description") of_guest=null
if [[ $guest ]]; then of_guest=\\"$guest\\"; fi
cat >/build/out/package.json <<DOCUMENT
{"schema": 1,
 "name": "$name",
 "version": "$version",
 "what": "$(top what)",
 "platform": "$(said platform "$description")", "guest": $of_guest,
 "formats": {$formats}, "requires": [$exact], "variables": {}, "contract": null, "bundled": [],
 "licences": [{"what": "stand-in", "licence": "MIT", "source": null}]}
DOCUMENT
""",
    "package-lint.sh": """\
documents=(/build/in/packages/*/package.json)
cat "${documents[@]}" >/dev/null
contracts=''
for role in host guest; do
  for kind in deb rpm; do contracts+="${contracts:+, }{\\"role\\": \\"$role\\", \\"format\\": \\"$kind\\"}"; done
done
echo "{\\"packages\\": $((2 * ${#documents[@]})), \\"files\\": 1, \\"contracts\\": [$contracts], \\"accepted\\": []}" \\
  >/build/out/lint.json
""",
    "driver.sh": """\
release=$(cat /build/in/kernelrelease)
mkdir -p /build/out/root/usr/lib/modules/"$release"/updates
cat /build/in/source/* /build/in/headers/* >/build/out/root/usr/lib/modules/"$release"/updates/"$DRIVER.ko"
echo '{"modules": []}' >/build/out/driver.json
echo "a licence" >/build/out/licence
cp /build/in/kernelrelease /build/out/kernelrelease
""",
    "disk.sh": "cat /build/in/rootfs.tar /build/in/*Image >/build/out/disk.qcow2\n",
    "lab-boot.sh": """\
cat /build/in/artifacts/*/launch/*/kvmqemu.sh >/dev/null
if grep CRASH /build/in/artifacts/*/kernel/guest/bzImage; then echo "Traceback"; exit 1; fi
if grep PANIC /build/in/artifacts/*/kernel/guest/bzImage; then
  echo "error: the guest does not boot"
  echo '{"ok": false}' >/build/out/boot.json
  exit 1
fi
finding='{"findings": [{"name": "all", "wanted": "fine", "got": "fine", "ok": true}]}'
guests=''
for guest in /build/in/artifacts/*/launch/*/; do
  guest=${guest%/} guest=${guest##*/}
  guests+="${guests:+, }\\"$guest\\": {\\"boots\\": {\\"inside\\": $finding, \\"outside\\": $finding}}"
  for way in outside inside; do echo booted >"/build/out/console-$guest-$way.log"; done
done
cat >/build/out/boot.json <<VERDICT
{"schema": 1, "platform": "$PLATFORM", "ok": true, "evidence": "emulated",
 "latency_verdict": "emulated: not evidence of latency",
 "guests": {$guests}}
VERDICT
""",
    "lab-stack.sh": """\
cat /build/in/launch/kvmqemu.sh /build/in/tuning/root/usr/bin/virt-rt-check /build/in/virt-rt-measure >/dev/null
cat /build/in/{disk.qcow2,labhost.json} /build/in/artifacts/*/{image/*/disk.qcow2,kernel/guest/kernelrelease} >/dev/null
ls /build/in/tools/usr >/dev/null
cat >/build/out/stack.json <<VERDICT
{"schema": 1, "platform": "$PLATFORM", "ok": true, "evidence": "emulated",
 "latency_verdict": "emulated: not evidence of latency",
 "findings": [{"name": "all", "wanted": "fine", "got": "fine", "ok": true}]}
VERDICT
for machine in host guest; do echo booted >"/build/out/console-$machine.log"; done
mkdir -p /build/out/records/{host,guest-rt-guest}
for place in /build/out/records/*; do echo booted >"$place/messages"; done
""",
    "lab-disk.sh": "cp /build/in/rootfs.tar /build/out/disk.qcow2\n",
    "lab-host.sh": """\
cat /build/in/repo/apt/dists/*/InRelease /build/in/repo/key.asc >/build/out/install.log
cp /build/in/disk.qcow2 /build/out/disk.qcow2
cat >/build/out/labhost.json <<VERDICT
{"schema": 1, "platform": "$PLATFORM", "ok": true, "evidence": "emulated",
 "findings": [{"name": "all", "wanted": "fine", "got": "fine", "ok": true}]}
VERDICT
echo booted >/build/out/console.log
""",
}


def git(directory: Path, *arguments: str) -> str:
    """Run git there, as nobody in particular."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org",
    }  # fmt: skip
    done = subprocess.run(
        ["git", *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def make_repository(directory: Path, tag: str, **files: str) -> Path:
    """A git repository with one commit of these files (name without suffix -> content of `name.c`)."""
    directory.mkdir(parents=True)
    git(directory, "init", "-q", "-b", "main")
    for name, content in files.items():
        (directory / f"{name}.c").write_text(content)
    git(directory, "add", ".")
    git(directory, "commit", "-qm", "first")
    git(directory, "tag", tag)
    return directory


@dataclass(frozen=True, slots=True)
class Done:
    """What a command printed and its exit status."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Standin:
    """One checkout of the stand-in project and the cache it uses."""

    root: Path
    cache: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment that a user's shell would give."""
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "DOCKER_HOST", "LANG")}
        return kept | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(self.cache),
            "XDG_CONFIG_HOME": str(self.cache / "config"),  # a copy of the cache has the development key, too
            "NO_COLOR": "1",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start doit, as a user would type it."""
        return subprocess.Popen(
            [sys.executable, "-m", "doit", *arguments],
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def doit(self, *arguments: str, **environment: str) -> Done:
        """Run doit to its end."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        return Done(process.returncode, out, err)

    def store(self) -> Store:
        """The store that the commands use."""
        return Store(self.cache / "virt-rt")

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace text in a file of the checkout."""
        file = self.root / path
        text = file.read_text()
        assert old in text, f"{path} has no {old!r}"
        file.write_text(text.replace(old, new))

    def append(self, path: str, text: str) -> None:
        """Add text to a file of the checkout."""
        with (self.root / path).open("a") as file:
            file.write(text)

    def clone(self, root: Path) -> Standin:
        """Another checkout of the same state that shares the cache."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("artifacts"))
        return Standin(root, self.cache)

    def plan(self, *tasks: str) -> dict[str, str]:
        """What `doit plan --json` says, state by task."""
        done = self.doit("plan", "--json", *tasks)
        assert done.status == 0, done
        return {row["task"]: row["state"] for row in json.loads(done.out)}


def make(directory: Path, rootfs: Path) -> Standin:
    """Make the checkout, its sources and locks, and put the builders into the store."""
    root = directory / "checkout"
    root.mkdir(parents=True)
    for name in ("pipeline", "recipes", "kernel-configs"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.lock", "patches")
        )
    for name in ("dodo.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name, script in STEPS.items():
        (root / "recipes" / "steps" / name).write_text(script)
    with (root / "recipes" / "steps" / "lab-stack.sh").open("a") as step:
        step.write(_measure(directory / MEASUREMENT))
    linux = make_repository(directory / "linux", "v6.12.1-rt1", main="int linux;\n")
    qemu = make_repository(directory / "qemu", "v10.0.1", main="int qemu;\n")
    (root / "recipes" / "sources.toml").write_text(
        "".join(
            f'[{name}]\ndescription = "stand-in"\n'
            f'[[{name}.origins]]\nkind = "git"\nurl = "{path}"\nref = "v*"\n'
            for name, path in (("linux-rt", linux), ("qemu-kvm-rt", qemu))
        )
    )
    standin = Standin(root, directory / "cache")
    make_development_key(Project(root, standin.environment).config)
    _lock_packages(standin)
    done = standin.doit("lock", "-u", "linux-rt", "-u", "qemu-kvm-rt")
    assert done.status == 0, done
    seed_builders(standin, rootfs)
    return standin


def _measure(directory: Path) -> str:
    """Lines of a step that leave the measurement of an emulated host and its guest; it is made in `directory`."""
    place = "guest-rt-guest"
    measuring.Made(
        kind="emulated", platform="qemu-q35", guest_name=place, host=(1, 2, 3), guest=(1,),
        segments=1, samples=1000, irqlat=False, loads=("hackbench",),
    ).write(directory)  # fmt: skip
    events = json.dumps(measuring.ATTRIBUTION).replace(measuring.GUEST, place)
    (directory / VERDICT).write_text(json.dumps(measuring.verdict(emulated=True)))
    (directory / ATTRIBUTION).write_text(events)
    lines = []
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        target = f"/build/out/{MEASUREMENT}/{file.relative_to(directory)}"
        lines.append(f"mkdir -p {target.rpartition('/')[0]}\n")
        lines.append(f"printf %s {shlex.quote(file.read_text())} >{target}\n")  # digests hold for every byte
    return "".join(lines)


def _lock_packages(standin: Standin) -> None:
    """A packages.lock of one made-up package per request, whose content is already in the store."""
    store, recipes = standin.store(), Project(standin.root, standin.environment).recipes
    requests = {f"builder/{name}": builder.packages for name, builder in recipes.builders.items()}
    requests |= {
        f"guest/{name}": guest.image.packages
        for name, guest in recipes.guests.items()
        if recipes.package_owner(name) == name
    }
    arches = {
        f"guest/{name}": recipes.platforms[guest.platform].arch for name, guest in recipes.guests.items()
    }
    sets = []
    for set_name, request in requests.items():
        packages = []
        for package in request:
            blob = store.add_bytes(f"{set_name} {package}".encode())
            packages.append(
                locks.LockedPackage(
                    name=package, version="1", arch=package.partition(":")[2] or "all", archive="debian",
                    sha256=blob.digest, size=blob.size, path=f"pool/main/{package.replace(':', '_')}_1.deb",
                )
            )  # fmt: skip
        sets.append(
            locks.PackageSet(
                name=set_name,
                arch=arches.get(set_name, "amd64"),
                suite="trixie",
                request=tuple(request),
                packages=tuple(packages),
            )
        )
    store.close()
    locks.dump_packages(locks.PackagesLock().replace(sets), standin.root / locks.PACKAGES_LOCK)


def seed_builders(standin: Standin, rootfs: Path) -> None:
    """Commit the tiny root file system as the result of every builder of the stand-in's graph."""
    store, graph = standin.store(), Project(standin.root, standin.environment).graph
    blob = store.add_bytes(rootfs.read_bytes())
    for action in graph:
        if action.kind == "builder":
            result = Result(outputs={"rootfs.tar": (blob, "file")}, spec=graph.specs[action.name])
            store.commit(graph.keys[action.name], result)
    store.close()
