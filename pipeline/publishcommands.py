"""The commands of `doit` that change what clients install: publish and promote."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.face import JSON_OPTION, Face, Option, session
from pipeline.project import DEFAULT_PLATFORM, Project
from pipeline.release import release_name
from pipeline.releaserecord import RECORD, remember
from pipeline.repo import repo_name

if TYPE_CHECKING:
    from pipeline.publishing import Outcome


def _option(name: str, default: str, help_text: str) -> Option:
    return {
        "name": name.replace("-", "_"),
        "short": "",
        "long": name,
        "type": str,
        "default": default,
        "help": help_text,
    }


_PLATFORM = _option("platform", DEFAULT_PLATFORM, "whose release")
_PREVIOUS = _option(
    "previous-key",
    "",
    "file with the public key that signed the repository until now, after a change of keys",
)


def say(line: str) -> None:
    """Tell what is being done."""
    print(f"  {line}", file=sys.stderr, flush=True)


class Publish(Face):
    """`doit publish`."""

    name = "publish"
    doc_purpose = "bring a platform's release to a repository"
    doc_usage = "[--channel CHANNEL] [--platform PLATFORM] [--previous-key FILE] [--json] DEST"
    cmd_options = (
        _option("channel", "", "where it enters; the first channel of recipes/release.toml by default"),
        _PLATFORM,
        _PREVIOUS,
        JSON_OPTION,
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow DEST."""
        return super().parse_execute(_options_first(in_args))

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Send what `repo:<platform>` made, once it is seen to be current and untouched."""
        from pipeline import destinations, publication, publishing, signing  # most commands do without

        project = session().project  # takes the secrets out of this process's environment
        place = destinations.destination(self.one(args, "DEST"))
        platform = params["platform"]
        project.recipes.platform(platform)
        _refuse_tainted(project, platform)
        channel = params["channel"] or project.release.repository.channels[0]
        made, record = _made(project, platform)
        with signing.Signer(_environment(project, params["previous_key"]), project.config) as signer:
            publisher = publishing.Publisher(place, project.release.repository, signer, say)
            outcome = publisher.publish(made, platform, channel)
            note = publication.note(signer)
            # a development key's repositories are for trying things out
            memory = None if note else remember(project.root, record.read_bytes())
        _tell(project, outcome, place.name, note, params["as_json"])
        if memory and outcome.changed and not params["as_json"]:
            print(
                f"commit {memory.relative_to(project.root)}: the next release tells what changed since this one"
            )


class Promote(Face):
    """`doit promote`."""

    name = "promote"
    doc_purpose = "move a tested release on to the next channel of a repository, as it is"
    doc_usage = "[--from CHANNEL] [--to CHANNEL] [--platform PLATFORM] [--previous-key FILE] [--json] DEST"
    cmd_options = (
        _option("from", "", "where it is; the last channel but one by default"),
        _option("to", "", "where it goes; the one after that by default"),
        _PLATFORM,
        _PREVIOUS,
        JSON_OPTION,
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow DEST."""
        return super().parse_execute(_options_first(in_args))

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Nothing is built or sent but indexes."""
        from pipeline import destinations, publication, publishing, signing  # most commands do without

        project = session().project  # takes the secrets out of this process's environment
        place = destinations.destination(self.one(args, "DEST"))
        platform = params["platform"]
        project.recipes.platform(platform)
        _refuse_tainted(project, platform)
        source, target = channels(project.release.repository.channels, params["from"], params["to"])
        with signing.Signer(_environment(project, params["previous_key"]), project.config) as signer:
            publisher = publishing.Publisher(place, project.release.repository, signer, say)
            outcome = publisher.promote(source, target, platform)
        _tell(project, outcome, place.name, publication.note(signer), params["as_json"])


def channels(known: tuple[str, ...], source: str, target: str) -> tuple[str, str]:
    """From which channel to which: neighbours where only one is named, the last two where none is."""
    if len(known) < 2 and not (source and target):
        raise UserError(f"{known[0]} is the only channel", "recipes/release.toml names the channels in order")
    for name in (source, target):
        if name and name not in known:
            raise UserError(f"there is no channel {name}", f"recipes/release.toml has {', '.join(known)}")
    if source and not target:
        if source == known[-1]:
            raise UserError(f"no channel comes after {source}", "name another with --from")
        return source, known[known.index(source) + 1]
    if target and not source:
        if target == known[0]:
            raise UserError(f"no channel comes before {target}", "name another with --to")
        return known[known.index(target) - 1], target
    return (source, target) if source else (known[-2], known[-1])


def _options_first(words: list[str]) -> list[str]:
    if words and not words[0].startswith("-"):
        return [*words[1:], words[0]]
    return words


def _refuse_tainted(project: Project, platform: str) -> None:
    """Give nothing out while a work tree stands for a source of it: what was tried is not what clients would get."""
    project.graph.refuse(release_name(platform))


def _made(project: Project, platform: str) -> tuple[Path, Path]:
    """The platform's repository and the description of its release, which are current and as they were made."""
    names = (repo_name(platform), release_name(platform))
    repository, release = (project.graph[name] for name in names)
    remedy = f"doit {release.name}"
    for action in (repository, release):
        if not project.artifacts.current(action, project.graph.keys[action.name]):
            raise UserError(f"{action.name} is not current", f"make it first: {remedy}")
        manifest = project.artifacts.manifest(action)
        if manifest is None or manifest["tainted"]:
            raise UserError(
                f"{action.name} was made from a work tree", f"make it from what is locked: {remedy}"
            )
    for difference in project.artifacts.verify(repository):
        where = difference.path.relative_to(project.root)
        raise UserError(f"{where}: {difference.reason}", f"make it again: {remedy}")
    return project.artifacts.directory(repository), project.artifacts.directory(release) / RECORD


def _environment(project: Project, previous: str) -> Mapping[str, str]:
    """What names the keys: the one to sign with, and one whose signatures still count."""
    from pipeline.signing import OTHER_KEYS

    if not previous:
        return project.environ
    if project.environ.get(OTHER_KEYS):
        raise UserError(f"--previous-key is given and {OTHER_KEYS} is set", "use one of them")
    return {**project.environ, OTHER_KEYS: previous}


def _tell(project: Project, outcome: Outcome, where: str, note: str, as_json: bool) -> None:
    release, channel = outcome.release, outcome.channel
    if as_json:
        row = {
            "destination": where,
            "channel": channel,
            "platform": release.platform,
            "version": release.version,
            "changed": outcome.changed,
            "packages": len(release.packages),
            "sent": outcome.sent,
            "bytes": outcome.size,
            "note": note,
        }
        print(json.dumps(row, indent=1))
        return
    what = f"{release.platform} {release.version}{f' ({note})' if note else ''}"
    if not outcome.changed:
        print(f"{channel} of {where} has {what} already; nothing was written")
        return
    sent = f"{outcome.sent} sent, {outcome.size / 1e6:.1f} MB" if outcome.sent else "none sent"
    print(f"{what} is in {channel} of {where}: {len(release.packages)} packages, {sent}")
    for line in client_lines(project.release.repository.url, channel, release.platform):
        print(line)


def client_lines(url: str, channel: str, platform: str) -> list[str]:
    """What a machine does to get it."""
    if not url:
        return [
            "clients need an address: set `url` in recipes/release.toml to where they reach this; docs/publishing.md"
        ]
    host, name = f"virt-rt-host-{platform}", f"virt-rt-{channel}"
    return [
        "machines that have the repository: apt-get update && apt-get upgrade, or dnf --refresh upgrade",
        f"new ones, Debian: curl -fsSo /etc/apt/sources.list.d/{name}.sources {url}/{name}.sources "
        f"&& apt-get update && apt-get install {host}",
        f"new ones, Fedora: curl -fsSo /etc/yum.repos.d/{name}.repo {url}/{name}.repo && dnf install {host}",
    ]
