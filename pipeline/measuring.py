"""A measurement of a real machine: started there, watched from here, fetched, judged and reported.

What runs on the machine runs on its own: a connection that is lost, or this program's end, changes nothing there. Run
again with the same words, the measurement that is under way is found by what was written here before it began.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import checktool
from pipeline.errors import RedError, UserError, VirtRtError
from pipeline.files import file_lock, random_word, write_atomically
from pipeline.measure import expectations, record, verdict
from pipeline.measurementreport import measurement_report
from pipeline.measurerequest import HOST, Asked, ask, seconds
from pipeline.project import Project
from pipeline.remote import LostError, Remote

#: What is asked for on the command line, as `NAME=value`.
VARIABLES = ("TARGET", "DURATION", "GUESTS", "OUT", "BASELINE")
DURATION = "60s"
#: Where measurements lie on the machine, each in a directory of its own.
THERE = "/var/lib/virt-rt/measure"
#: What is known here of a measurement, beside the records of its places; and what it is judged by.
DOCUMENT, EXPECTED = "measurement.json", "expectations.json"
SCHEMA = 1
#: Seconds between two looks: at least, and at most.
LOOK, LONG_LOOK = 2.0, 30.0
#: Without a connection for so long, seconds, this program gives up; the measurement goes on.
PATIENCE = 3600.0
#: A place's run is started again so often after it was interrupted, in one call of this program.
RESTARTS = 3
#: States of `virt-rt-measure status` by its exit status, which leaves 2 for a record that is not there.
ABSENT = 2

Tell = Callable[[str], None]


class EndedError(VirtRtError):
    """This program was told to end; the measurement goes on."""


@dataclass(slots=True)
class _Place:
    """A place that is measured; `starts` counts how often this program started it."""

    name: str
    machine: Remote
    directory: str
    starts: int = 0
    ready: bool = False
    ended: bool = False
    complete: bool = True
    told: str = ""

    @property
    def program(self) -> str:
        return f"{self.directory}/{checktool.MEASURE.program}"

    @property
    def record(self) -> str:
        return f"{self.directory}/{self.name}"


class Measurement:
    """One measurement of a platform's host and guests."""

    def __init__(
        self,
        project: Project,
        platform: str,
        variables: dict[str, str],
        tell: Tell,
        ending: threading.Event,
        products: Path | None = None,
    ) -> None:
        """`variables` are those of `VARIABLES` that were given; `ending` is set when this program is to end.

        `products` is where those of the platform lie that the machine runs; in `artifacts/`, if nothing else is said.
        """
        self._products = products or project.root / "artifacts" / platform
        self._project, self._platform, self._tell, self._ending = project, platform, tell, ending
        project.recipes.platform(platform)
        self._target = variables.get("TARGET", "")
        if not self._target:
            raise UserError("no TARGET is named", f"write: doit measure:{platform} TARGET=user@host")
        self._host = Remote.host(self._target)
        self._asked = self._ask(variables)
        self._baseline = Path(variables["BASELINE"]) if variables.get("BASELINE") else None
        if self._baseline is not None and not self._baseline.exists():
            raise UserError(f"BASELINE={self._baseline} is not there", "name a report, or a measurement")
        self._reached: set[str] = set()
        self._out = Path(variables["OUT"]).resolve() if variables.get("OUT") else None

    def _ask(self, variables: dict[str, str]) -> Asked:
        known = self._project.recipes.guests_of(self._platform)
        word = variables.get("GUESTS") or ",".join(known)
        guests = [] if word == "none" else [name for name in word.split(",") if name]
        duration = seconds(variables.get("DURATION") or DURATION)
        return ask(self._products, self._project.recipes, self._platform, guests, duration)

    def run(self) -> None:
        """Measure, judge and report; raises `RedError` unless the verdict is that it passed."""
        above = self._project.root / "artifacts" / self._platform / "measure"
        above.mkdir(parents=True, exist_ok=True)
        with file_lock(above / ".lock"):
            directory = self._find(above)
            places = self._places(directory)
            self._tell(f"measuring {self._target}: {_shown(directory, self._project.root)}")
            for place in places:  # those too whose turn is in hours
                self._patiently(place, lambda place=place: self._meet(place))  # type: ignore[misc]
            self._follow(places)
            for place in places:
                self._patiently(place, lambda place=place: self._fetch(place, directory))  # type: ignore[misc]
            self._set_state(directory, "fetched")
            self._judge(directory)

    # Which one -------------------------------------------------------------------------------

    def _find(self, above: Path) -> Path:
        """The directory of the measurement that is under way, or of a new one, with what it is judged by."""
        requests = {place: asdict(request) for place, request in self._asked.requests.items()}
        candidates = [self._out] if self._out else sorted(above.iterdir())
        for directory in candidates:
            if not (directory / DOCUMENT).is_file():
                continue
            known = _json(directory / DOCUMENT)
            same = known.get("target") == self._target and known.get("requests") == requests
            if same and known.get("state") == "running":
                return directory
        begun = int(time.time())
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(begun))}-{random_word()[:8]}"
        directory = self._out or above / name
        if directory.exists() and any(directory.iterdir()):
            raise UserError(
                f"OUT={directory} is not empty, and no such measurement", "name an empty directory"
            )
        directory.mkdir(parents=True, exist_ok=True)
        wanted = expectations.to_json(self._asked.expectations(begun))
        write_atomically(directory / EXPECTED, _bytes(wanted))
        document = {
            "schema": SCHEMA,
            "id": name,
            "platform": self._platform,
            "target": self._target,
            "requests": requests,
            "state": "running",
        }
        write_atomically(directory / DOCUMENT, _bytes(document))
        return directory

    def _places(self, directory: Path) -> list[_Place]:
        there = f"{THERE}/{_json(directory / DOCUMENT)['id']}"
        places = [_Place(HOST, self._host, there)]
        for guest, port in self._asked.ports.items():
            places.append(_Place(f"guest-{guest}", Remote.guest(self._target, guest, port), there))
        return places

    def _set_state(self, directory: Path, state: str) -> None:
        write_atomically(directory / DOCUMENT, _bytes({**_json(directory / DOCUMENT), "state": state}))

    def _meet(self, place: _Place) -> None:
        """See that a place can be measured at all."""
        place.machine.become_root()
        wanted = self._asked.requests[place.name].kernel_release
        release = place.machine.text("uname -r").strip()
        if release != wanted:
            raise UserError(
                f"{place.machine.name}: its kernel is {release}, the one that was built {wanted}",
                "install the packages that were built, and boot that kernel",
            )
        if place.machine.call("python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))'").returncode:
            raise UserError(f"{place.machine.name}: no Python 3.9 or later", "install python3 there")

    # Its course -------------------------------------------------------------------------------

    def _follow(self, places: list[_Place]) -> None:
        """Start every place when it is its turn, until all have ended: guests, when the host only makes load."""
        while True:
            left = 0
            for place in places:
                if place.ended or (place is not places[0] and not places[0].ready):
                    continue
                said = self._patiently(place, lambda place=place: self._look(place))  # type: ignore[misc]
                left = max(left, said)
            if all(place.ended for place in places):
                return
            self._pause(min(max(LOOK, left / 20), LONG_LOOK))

    def _look(self, place: _Place) -> int:
        """See how far a place is, and start it where nobody does; seconds that are left of it."""
        done = place.machine.call(
            f"test -x {place.program} || exit {ABSENT}; {place.program} status --json --record {place.record}"
        )
        try:
            said: dict[str, Any] = {} if done.returncode == ABSENT else json.loads(done.stdout)
            state, left = str(said.get("state", "absent")), int(said.get("left_s", 0))
            current = str(said.get("current", ""))
        except (ValueError, AttributeError):
            raise UserError(
                f"{place.machine.name}: virt-rt-measure status ended with {done.returncode}: {_last(done.stderr)}",
                f"look at {place.record} there",
            ) from None
        if state == "finished":
            place.ended, place.ready, place.complete = True, True, bool(said["complete"])
            for stage, why in said["refused"].items():
                self._tell(f"{place.name}: {stage} was not measured: {why}")
            self._tell(
                f"{place.name}: measured" + ("" if place.complete else ", but not all that is required")
            )
            return 0
        if state != "running":
            self._start(place, state)
            return 0
        if current.endswith("-load"):
            place.ready = True
        if current and current != place.told:
            place.told = current
            self._tell(f"{place.name}: {current}, {said['done']} of {said['runs']} done, {left} s left")
        return left

    def _start(self, place: _Place, state: str) -> None:
        if place.starts > RESTARTS:
            raise UserError(
                f"{place.machine.name}: the run was interrupted {place.starts} times",
                f"look at {place.record}/log there",
            )
        place.starts += 1
        if state == "interrupted":
            self._tell(f"{place.name}: was interrupted, goes on")
        request = f"{place.directory}/{place.name}.json"
        place.machine.put(checktool.MEASURE.bundle(self._project.root), place.program, "0755")
        place.machine.put(_bytes(asdict(self._asked.requests[place.name])), request)
        done = place.machine.call(f"{place.program} run --request {request} --record {place.record} --detach")
        if done.returncode:
            lines = [
                line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()
            ]
            said = lines[0].removeprefix("virt-rt-measure: ") if lines else f"status {done.returncode}"
            raise UserError(f"{place.machine.name}: {said}", " ".join(lines[1:]) or "look at it there")

    def _fetch(self, place: _Place, directory: Path) -> None:
        place.machine.fetch(place.record, directory / place.name, without=("lock", "state.json"))

    def _patiently(self, place: _Place, call: Callable[[], Any]) -> Any:
        """Do something at a place, over and over while there is no connection."""
        since, told = time.monotonic(), False
        while True:
            try:
                done = call()
            except LostError as error:
                if place.name not in self._reached:
                    raise UserError(error.message, error.hint) from None
                if time.monotonic() - since > PATIENCE:
                    raise UserError(
                        f"{error.message}; no connection for {PATIENCE:.0f} s",
                        "the same command goes on with it",
                    ) from None
                if not told:
                    self._tell(f"{error.message}: the measurement goes on there, trying again")
                    told = True
                self._pause(LOOK)
                continue
            if told:
                self._tell(f"{place.machine.name}: connected again")
            self._reached.add(place.name)
            return done

    def _pause(self, seconds_: float) -> None:
        if self._ending.wait(seconds_):
            raise EndedError("ended; the measurement goes on there", "the same command finds it again")

    # Its end ----------------------------------------------------------------------------------

    def _judge(self, directory: Path) -> None:
        """Write verdict and report, tell the verdict, and raise unless it is that everything passed."""
        wanted = expectations.load(directory / EXPECTED)
        found = verdict.judge(directory, wanted, int(time.time()))
        document = found.to_json(wanted)
        record.write_json(directory / verdict.FILE, document)
        made = measurement_report(self._project, directory, document, self._baseline, directory)
        self._set_state(directory, "judged")
        for line in verdict.text(found).splitlines():
            self._tell(line)
        shown = _shown(directory, self._project.root)
        if verdict.exit_status(found, allow_emulated=False) or not made.ok:
            raise RedError(f"latency: {found.latency}", f"look at {shown}/report.html")
        self._tell(f"passed: {shown}/report.html")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", "remove that directory, and measure again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no object", "remove that directory, and measure again")
    return content


def _bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _last(said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
