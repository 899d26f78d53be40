"""The documents of a measurement's record: what is written is read again, anything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.measure import record

MOMENT = record.Moment(3, 2, 1)
RUN = record.Run(
    stage="cyclictest",
    tool="cyclictest",
    segment=0,
    argv=["cyclictest", "-m"],
    boot_id="b",
    began=MOMENT,
    ended=MOMENT,
    status=0,
    refused="",
    threads=[record.Thread(7, "cyclictest", 1, 80, [1])],
    loads=[record.Load("hackbench", ["hackbench"], 1.5, True, [0])],
    files={"stdout": "0" * 64},
)


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    record.write(tmp_path / record.RUN, RUN)
    assert record.read(tmp_path / record.RUN, record.Run) == RUN
    assert [path.name for path in tmp_path.iterdir()] == [record.RUN]


def broken(**changes: object) -> str:
    content = json.loads(json.dumps(RUN, default=lambda value: value.__dict__))
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("{", "cut short"),
        ("[]", "not an object"),
        (broken(status=None), "status is missing"),
        (broken(more=1), "more is not known"),
        (broken(status=True), "status: True is not int"),
        (broken(status="0"), "status: '0' is not int"),
        (broken(argv="cyclictest"), "argv is not a list"),
        (broken(argv=[1]), "argv: 1 is not str"),
        (broken(files=[]), "files is not an object"),
        (broken(threads={}), "threads is not a list"),
        (broken(threads=[{"tid": 1}]), "threads[0]: cpus is missing"),
        (broken(began={"realtime": 1, "monotonic": 1, "boottime": "1"}), "began: boottime: '1' is not int"),
        (broken(schema=2), "schema 2, this program knows 1"),
    ],
)
def test_a_document_of_another_form_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / record.RUN
    path.write_text(text)
    with pytest.raises(record.RecordError) as caught:
        record.read(path, record.Run)
    assert said in str(caught.value)


def test_a_document_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(record.RecordError, match="cannot be read"):
        record.read(tmp_path / record.RUN, record.Run)
