"""The command of `doit` that finds which commit of a source broke something: bisect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.bisecthistory import history_between
from pipeline.bisection import Asked, Bisection, Record, at_tree
from pipeline.contract import ROLES
from pipeline.errors import UserError
from pipeline.face import Face, Option, options_first, session, typed
from pipeline.files import write_atomically
from pipeline.graph import Graph
from pipeline.inputs import source_name
from pipeline.latencytest import Bound, LatencyTest, products
from pipeline.measurerequest import seconds
from pipeline.project import Project
from pipeline.shelltest import Judge, ShellTest

#: Tests with a name of their own, and the kind of action that is each.
PROOFS = {"boots": "boot"}


def _option(name: str, default: str | None, help_text: str) -> Option:
    return {"name": name, "short": "", "long": name, "type": str, "default": default, "help": help_text}


class Bisect(Face):
    """`doit bisect`."""

    name = "bisect"
    doc_purpose = "find the commit of a source that broke something"
    doc_usage = (
        "PLATFORM --good REF --bad REF --test TEST [--role ROLE] [--of NAME] [--repository DIR] [--out DIR] "
        "[--target HOST --install COMMAND [--duration TIME]]"
    )
    cmd_options = (
        _option("of", None, "the source whose history is searched; the kernel's by default"),
        _option("good", None, "a commit, tag or branch that passes the test"),
        _option("bad", None, "one that does not"),
        _option(
            "test", None, "builds, boots, a task that proves something, p99.9<40 (us), or a command for bash"
        ),
        _option("role", "guest", "whose kernel is built: host or guest"),
        _option("repository", None, "where the commits are: a clone on this machine, or an address"),
        _option("target", None, "the machine whose latencies are the test"),
        _option("install", None, "a command that installs $ARTIFACTS there and boots that kernel"),
        _option("duration", "60s", "how long each commit is measured"),
        _option("out", None, "where the bisection is kept; below artifacts/bisect/ by default"),
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow the platform, and a test may have a `=`."""
        return super().parse_execute(options_first(typed(self.name, in_args)))

    def perform(self, params: dict[str, Any], args: list[str]) -> int:
        """Test commit after commit; status 1 when only commits are left that cannot be tested."""
        platform = self.one(args, "PLATFORM")
        for option in ("good", "bad", "test"):
            if not params[option]:
                raise UserError(f"doit bisect needs --{option}", f"doit bisect {self.doc_usage}")
        current = session()
        project = current.project
        if project.local_sources:
            raise UserError(
                f"{', '.join(project.local_sources)} is taken from a work tree, which may change meanwhile",
                "leave out --source, and what local.toml says: --source NAME= takes NAME from the lock",
            )
        if params["role"] not in ROLES:
            raise UserError(f"there is no role {params['role']}", f"write one of: {', '.join(ROLES)}")
        source = params["of"] or project.recipes.platform(platform).kernel.source_of(params["role"])
        targets, proof = what_is_tested(project, platform, source, params["test"], params["role"])
        out = Path(params["out"] or project.root / "artifacts/bisect" / f"{platform}-{source}").resolve()
        judge, targets = self._judge(project, params, platform, targets, proof, out)
        entry = project.sources_lock.get(source)
        url = entry.location if entry.origin == "git" else None
        mirror = project.cache / "git" / f"{source}.git"
        try:
            current.executor.clean_up_after_crashes()
            out.mkdir(parents=True, exist_ok=True)
            history, good, bad = history_between(
                out, params["good"], params["bad"], params["repository"], mirror, url
            )
            asked = Asked(
                platform=platform,
                source=source,
                good=good,
                bad=bad,
                test=params["test"]
                + (f" at {params['target']}, {params['duration']}" if params["target"] else ""),
                targets=targets,
                recipes=recipes_key(project, source, [*targets, *([proof] if proof else [])]),
            )
            bisection = Bisection(
                out, project.root, project.graph, project.store, current.executor.engine, current.display,
                current.display.say, history, asked, proof, judge,
            )  # fmt: skip
            record = bisection.run()
        finally:
            current.close()
        text = told(bisection, record)
        write_atomically(out / "verdict.txt", text.encode())
        print(text, end="")
        return 0 if record.first_bad is not None else 1

    def _judge(
        self, project: Project, params: dict[str, Any], platform: str, targets: tuple[str, ...],
        proof: str | None, out: Path,
    ) -> tuple[Judge | None, tuple[str, ...]]:  # fmt: skip
        """Who judges what was built, if neither a proof nor the build itself does, and what is to be built for that."""
        test, role = params["test"], params["role"]
        bound = Bound.parse(test)
        if bound is None:
            if params["target"] or params["install"]:
                raise UserError(f"--test {test} measures nothing", "leave --target and --install out")
            shell = proof is None and test != "builds"
            return (ShellTest(test, project.root) if shell else None), targets
        for option in ("target", "install"):
            if not params[option]:
                raise UserError(f"--test {test} needs --{option}", f"doit bisect {self.doc_usage}")
        seconds(params["duration"])
        judge = LatencyTest(
            project, platform, role, bound, params["target"], params["install"], params["duration"],
            out / "measurements", session().display.say,
        )  # fmt: skip
        return judge, tuple(dict.fromkeys((*targets, *products(project, platform, role))))


def what_is_tested(
    project: Project, platform: str, source: str, test: str, role: str
) -> tuple[tuple[str, ...], str | None]:
    """What is built of each commit, and the action that is the test, if one is."""
    project.recipes.platform(platform)
    brought = source_name(source)
    if brought not in project.graph:
        known = [a.name.partition(":")[2] for a in project.graph if a.kind == "source"]
        raise UserError(f"nothing is built from {source}", f"write one of: {', '.join(known)}")
    of_platform = [project.graph[name] for name in project.products(platform)]
    using = [a for a in of_platform if any(used.action == brought for used in a.inputs.values())]
    targets = tuple(a.name for a in using if a.kind != "kernel" or a.environment["ROLE"] == role)
    if not targets:
        raise UserError(f"{platform} builds nothing from {source}", "name another source")
    proof = f"{PROOFS[test]}:{platform}" if test in PROOFS else test if test in project.graph else None
    if proof is not None and brought not in project.graph.closure([proof]):
        raise UserError(f"{proof} does not depend on {source}", "name a test that does")
    return targets, proof


def recipes_key(project: Project, source: str, names: list[str]) -> str:
    """What stands for all that verdicts depend on beside the commit: keys with a tree that is nobody's."""
    brought = source_name(source)
    known = project.graph
    graph = Graph(
        at_tree(known[name], "0" * 40, project.root) if name == brought else known[name]
        for name in known.closure(names)
    )
    return " ".join(graph.keys[name] for name in names)


def told(bisection: Bisection, record: Record) -> str:
    """The verdict, and what it rests on."""
    counts = [f"{sum(t.verdict == v for t in record.tested)} {v}" for v in ("good", "bad", "skip")]
    lines = []
    if record.first_bad is not None:
        lines += ["the first bad commit is", *bisection.history.about(record.first_bad).splitlines()]
    else:
        lines.append(f"the first bad commit is one of {len(record.candidates)}; the others cannot be tested")
        lines += [f"  {c[:12]} {bisection.history.subject(c)}" for c in record.candidates]
    lines += ["", f"tested by: {record.asked.test}; {', '.join(counts)}"]
    for tested in record.tested:
        why = f" ({tested.why})" if tested.why else ""
        lines.append(f"  {tested.verdict:<4} {tested.commit[:12]} {tested.subject}{why}")
    lines.append(f"logs: {bisection.out}")
    return "".join(f"{line}\n" for line in lines)
