"""A report's findings as junit.xml, which every CI reads: a test suite for each level, a test case for each finding."""

from __future__ import annotations

import re
from xml.etree import ElementTree as xml

from pipeline.labrecord import Finding, Report

#: What XML cannot hold (https://www.w3.org/TR/xml/#charsets), whatever a machine printed.
_UNFIT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> bytes:
    """The document; a level that is not proven is a skipped test case with the reason, beside what it found."""
    suites = xml.Element("testsuites", name=f"virt-rt {report.platform}")
    totals = {"tests": 0, "failures": 0, "skipped": 0}
    for level in report.levels:
        suite = xml.SubElement(suites, "testsuite", name=level.name)
        for number, finding in enumerate(level.findings):
            case = _case(suite, level.name, finding, number)
            if not finding.ok:
                message = _fit(f"wanted {finding.wanted}; got {finding.got}")
                xml.SubElement(case, "failure", message=message, type="finding").text = message
        if level.verdict == "not proven":
            case = xml.SubElement(suite, "testcase", name="not proven", classname=level.name)
            xml.SubElement(case, "skipped", message=_fit(level.reason))
        counts = {
            "tests": len(suite.findall("testcase")),
            "failures": len(suite.findall("testcase/failure")),
            "skipped": len(suite.findall("testcase/skipped")),
        }
        for name, count in counts.items():
            suite.set(name, str(count))
            totals[name] += count
        suite.set("errors", "0")
    for name, count in totals.items():
        suites.set(name, str(count))
    suites.set("errors", "0")
    xml.indent(suites)
    return b"%b\n" % xml.tostring(suites, encoding="utf-8", xml_declaration=True)


def _case(suite: xml.Element, level: str, finding: Finding, number: int) -> xml.Element:
    where = ".".join(filter(None, (level, finding.place, finding.stage)))
    # two findings may have one name, and a CI keeps the history of a name
    earlier = [case.get("name") for case in suite.findall("testcase") if case.get("classname") == _fit(where)]
    name = _fit(finding.name)
    if name in earlier:
        name = f"{name} ({number})"
    return xml.SubElement(suite, "testcase", name=name, classname=_fit(where))


def _fit(text: str) -> str:
    return _UNFIT.sub("?", text)
