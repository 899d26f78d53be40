"""The lab's report of a platform: what all proofs of it say, on one page, and red when one of them is.

A proof that is red has no result, and stops the run by itself; here it is looked at once more what the others are
worth together, and what nothing has proven.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline import keys
from pipeline.action import Action, File, Output, Step, Upstream
from pipeline.boot import boot_name
from pipeline.cpuplan import HostPlan
from pipeline.errors import RedError, UserError
from pipeline.files import digest_file
from pipeline.junit import junit
from pipeline.kernel import ROLES, kernel_name
from pipeline.labpage import STYLE, TEMPLATES, page
from pipeline.labrecord import JUNIT, PAGE, RECORD, Finding, Kernel, Limits, Package, encode
from pipeline.labreport import ATTRIBUTION, Given, red, report
from pipeline.lint import REPORT, lint_name
from pipeline.measure.verdict import FILE as VERDICT
from pipeline.planpicture import svg
from pipeline.recipes import Platform
from pipeline.repo import DOCUMENT, repo_name
from pipeline.stack import stack_name

#: What a stack proof may leave beside its verdict: a measurement of its host and guest, and what is said of it.
MEASUREMENT = "measurement"
LABHOST = "labhost.json"
FORMATS = ("deb", "rpm")
#: How many red findings an error names.
NAMED = 5


def lab_name(platform: str) -> str:
    """Name of the action that makes a platform's report."""
    return f"lab:{platform}"


def lab(root: Path, name: str, platform: Platform, plan: HostPlan, actions: Mapping[str, Action]) -> Action:
    """The report of the platform `name`; `root` is the checkout, `actions` are those before it, by name."""
    inputs = {
        "boot.json": Upstream(boot_name(name), "boot.json"),
        "lint.json": Upstream(lint_name(name), REPORT),
    }
    for output in ("key.asc", "repository.json", "state"):
        inputs[f"repo/{output}"] = Upstream(repo_name(name), output)
    for role in ROLES:
        for output in ("config", "kernelrelease"):
            inputs[f"kernel/{role}/{output}"] = Upstream(kernel_name(name, role), output)
    for action in actions.values():
        if action.kind == "package" and (action.place or "").startswith(f"{name}/packages/"):
            inputs[f"packages/{action.name.rpartition(':')[2]}.json"] = Upstream(action.name, DOCUMENT)
    for of, wanted in (
        (stack_name(name), ("stack.json", MEASUREMENT, VERDICT, ATTRIBUTION)),
        (f"labhost:{name}", (LABHOST,)),
    ):
        there = {output.name for output in actions[of].outputs} if of in actions else set()
        inputs |= {output: Upstream(of, output) for output in wanted if output in there}
    templates = [*sorted((root / TEMPLATES).glob("*.j2")), root / STYLE]

    def run(step: Step) -> None:
        make(step, plan)

    return Action(
        name=lab_name(name),
        kind="lab",
        version=1,
        arch=platform.arch,
        summary=f"the report of the lab on {name}: verdicts of all levels",
        run=run,
        files={f"templates/{path.name}": File.read(path, str(path.relative_to(root))) for path in templates},
        inputs=inputs,
        parameters={
            "platform": name,
            "limits": msgspec.to_builtins(platform.limits),
            "kernels": {role: kernel_name(name, role) for role in ROLES},
            "plan": plan.to_json(),
        },
        outputs=(Output(PAGE), Output(RECORD), Output(JUNIT)),
        remedy="look at the report",
        place=f"{name}/lab",
    )


def make(step: Step, plan: HostPlan) -> None:
    """Write the report; `RedError` when a level is red, with what was written left for a person."""
    asked = step.action.parameters
    name = asked["platform"]
    packages = {path.stem: _json(path) for path in sorted((step.inputs / "packages").glob("*.json"))}

    def bring(what: str) -> bytes | None:
        # what was declared and does not lie there is an empty document, which is red
        path = step.inputs / what
        if what not in step.action.inputs:
            return None
        return path.read_bytes() if path.is_file() else b""

    measured = step.inputs / MEASUREMENT if MEASUREMENT in step.action.inputs else None
    given = Given(
        platform=name,
        structure=list(structure(step.inputs, name, packages)),
        boot=bring("boot.json"),
        stack=bring("stack.json"),
        labhost=bring(LABHOST),
        measurement=measured,
        verdict=_verdict(step.inputs, measured),
        attribution=_beside(bring(ATTRIBUTION), measured),
        limits=msgspec.convert(asked["limits"], Limits | None),
        pins={guest: placement.pins for guest, placement in plan.guests.items()},
        kernels=[_kernel(step, role, of) for role, of in asked["kernels"].items()],
        packages=[Package(name=said["name"], version=said["version"]) for said in packages.values()],
        why={
            "stack": f"{name} has no stack proof (stack_proof in recipes/platforms/{name}.toml): its host's kernel was "
            "not booted",
            "latency": f"nothing was measured here: doit measure:{name} measures hardware",
        },
    )
    made = report(given)
    templates = {path.name: path.read_text() for path in (step.inputs / "templates").iterdir()}
    (step.out / PAGE).write_text(page(made, svg(plan, f"CPUs of {name}"), "", templates))
    (step.out / RECORD).write_bytes(encode(made))
    (step.out / JUNIT).write_bytes(junit(made))
    for level in made.levels:
        step.log(f"{level.name}: {level.verdict}: {level.reason}")
    if not made.ok:
        wrong = red(made)
        for line in wrong:
            step.log(line)
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise RedError(
            f"{step.action.name} is red: {'; '.join(wrong[:NAMED])}{more}",
            f"mend that and run doit again; its page, {PAGE}, tells all",
        )


def structure(inputs: Path, name: str, packages: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """What lint and the repository's own signed state say; `packages` are the package.json by what they pack."""
    count = len(packages) * len(FORMATS)
    try:
        lint = _json(inputs / "lint.json")
        examined, files, contracts = lint["packages"], lint["files"], lint["contracts"]
        accepted = len(lint["accepted"])
        held = {(each["role"], each["format"]) for each in contracts}
        broken = [each["broken"] for each in contracts if "broken" in each]
    except (UserError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        yield Finding(name="packages examined", wanted=f"{count}, by linters", got=got, ok=False)
    else:
        yield Finding(
            name="packages examined",
            wanted=f"{count}, by linters",
            got=f"{examined}, with {files} files; {accepted} sorts of findings are accepted, each with its reason",
            ok=count > 0 and examined == count and type(files) is int and files > 0,
        )
        wanted = {(role, form) for role in ROLES for form in FORMATS}
        missing = [f"{role} as {form}" for role, form in sorted(wanted - held)]
        yield Finding(
            name="kernel contract",
            wanted="held by the configuration in every kernel package",
            got="; ".join(broken)
            or (f"not examined: {', '.join(missing)}" if missing else f"{len(contracts)} hold it"),
            ok=not broken and not missing,
        )
    yield _repository(inputs / "repo", name, packages)


def _repository(repository: Path, name: str, packages: Mapping[str, Mapping[str, Any]]) -> Finding:
    from pipeline.repository import read_state  # a run that makes nothing does without

    def bring(path: str) -> bytes | None:
        file = repository / path
        return file.read_bytes() if file.is_file() else None

    wanted = f"signed, and with all {len(packages)} packages of {name} as deb and rpm"
    try:
        state = read_state(bring, (repository / "key.asc").read_bytes())
        releases = [each for kept in state.releases.values() for each in kept if each.platform == name]
        listed = {digest for each in releases for digest in each.packages}
        # rpms are signed when they get there, and no longer those that were made
        debs = {said["formats"]["deb"]["sha256"]: said["name"] for said in packages.values()}
        missing = sorted(debs[digest] for digest in debs.keys() - listed)
        right = len(releases) == 1 and len(listed) == len(FORMATS) * len(packages) and bool(packages)
        got = f"not there: {', '.join(missing)}" if missing else f"signed; {len(listed)} package files"
        return Finding(name="repository", wanted=wanted, got=got, ok=right and not missing)
    except UserError as error:
        return Finding(name="repository", wanted=wanted, got=error.message, ok=False)
    except (OSError, KeyError, TypeError) as error:
        return Finding(name="repository", wanted=wanted, got=f"{type(error).__name__}: {error}", ok=False)


def _kernel(step: Step, role: str, action: str) -> Kernel:
    directory = step.inputs / "kernel" / role
    held = [
        each["format"]
        for each in _json(step.inputs / "lint.json").get("contracts", ())
        if each.get("role") == role and "broken" not in each
    ]
    return Kernel(
        role=role,
        release=(directory / "kernelrelease").read_text().strip(),
        key=keys.key(step.specs()[action]),
        config_sha256=digest_file(directory / "config"),
        contract=f"held in its packages ({', '.join(sorted(set(held)))})" if held else "not examined",
    )


def _verdict(inputs: Path, measured: Path | None) -> Mapping[str, Any] | None:
    """The gate's verdict, beside the measurement or in it; an empty one when it cannot be read, which is red."""
    for path in (inputs / VERDICT, *([measured / VERDICT] if measured else ())):
        if path.is_file():
            try:
                return _json(path)
            except UserError as error:
                return {"error": error.message}
    return None


def _beside(data: bytes | None, measured: Path | None) -> bytes | None:
    if data is not None or measured is None or not (measured / ATTRIBUTION).exists():
        return data
    return (measured / ATTRIBUTION).read_bytes()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read: {error}", "make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is no object", "make it again")
    return content
