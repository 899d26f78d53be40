"""The store: whole or nothing, verified, shared, and clean after a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline import archive
from pipeline.errors import UserError
from pipeline.store import Result, Store

KEY = "ab" * 32


def put(store: Store, text: str = "content") -> Result:
    blob = store.add_bytes(text.encode())
    result = Result(outputs={"out": (blob, "file")}, spec={"kind": "test"}, lines=3, seconds=1.5)
    store.commit(KEY, result)
    return result


def test_a_committed_result_is_found_again_as_it_was(store: Store) -> None:
    assert store.lookup(KEY) is None
    result = put(store)
    assert store.lookup(KEY) == store.verified(KEY) == result
    blob, _ = result.outputs["out"]
    assert store.path(blob.digest).read_text() == "content"
    assert store.path(blob.digest).stat().st_mode & 0o222 == 0


def test_the_cache_is_marked_for_backup_programs(store: Store) -> None:
    assert (store.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone"])
def test_a_damaged_blob_is_a_miss_and_is_replaced(store: Store, damage: str) -> None:
    blob, _ = put(store).outputs["out"]
    path = store.path(blob.digest)
    path.chmod(0o644)
    if damage == "gone":
        path.unlink()
    else:
        path.write_text("CONTENT" if damage == "flipped" else "c")
    assert store.verified(KEY) is None
    put(store)
    assert store.verified(KEY) is not None
    assert path.read_text() == "content"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"outputFiles": 3}', '{"outputFiles":[{"path":"x"}]}']
)
def test_a_result_that_cannot_be_read_is_a_miss(store: Store, text: str) -> None:
    put(store)
    (store.root / "ac" / KEY[:2] / f"{KEY}.json").write_text(text)
    assert store.lookup(KEY) is None


def test_results_have_the_shape_other_tools_know(store: Store) -> None:
    put(store)
    data = json.loads((store.root / "ac" / KEY[:2] / f"{KEY}.json").read_text())
    assert data["exitCode"] == 0
    assert set(data["outputFiles"][0]) == {"path", "digest", "isExecutable"}
    assert set(data["outputFiles"][0]["digest"]) == {"hash", "sizeBytes"}


def test_content_that_is_not_what_was_promised_is_refused(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "download"
    source.write_text("something else")
    with pytest.raises(ValueError, match=r"^[0-9a-f]{64}$"):
        store.add(source, "0" * 64)
    assert not store.has("0" * 64)


def test_another_layout_is_refused_with_the_remedy(store: Store) -> None:
    (store.root / "version").write_text("99")
    with pytest.raises(UserError, match="has layout 99") as caught:
        Store(store.root)
    assert "delete" in caught.value.hint


def test_a_cache_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "file" / "cache")


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(store: Store) -> None:
    mine = store.stage("mine")
    script = """
        import os, signal, sys
        from pathlib import Path
        from pipeline.store import Store
        stage = Store(Path(sys.argv[1])).stage("dead")
        (stage / "half").write_text("written")
        print(stage, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(store.root)],
        capture_output=True, text=True, check=False, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    dead = Path(done.stdout.strip())
    assert done.returncode == -9
    assert (dead / "half").exists()

    assert store.sweep() == [dead.parent.name]
    assert not dead.parent.exists()
    assert mine.exists()
    assert Store(store.root).sweep() == []
    store.close()
    assert not mine.exists()


def test_directories_are_packed_the_same_from_anywhere(tmp_path: Path) -> None:
    archives = []
    for number, (place, order) in enumerate([("one", "abc"), ("elsewhere/two", "cba")]):
        tree = tmp_path / place
        tree.mkdir(parents=True)
        for name in order:
            (tree / name).write_text(f"file {name}")
            os.utime(tree / name, (number + 1, number + 1))
        (tree / "run").write_text("#!/bin/sh\n")
        (tree / "run").chmod(0o755 if number else 0o700)
        (tree / "sub").mkdir()
        (tree / "sub" / "link").symlink_to("../a")
        archives.append(tmp_path / f"{number}.tar")
        archive.pack(tree, archives[-1])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    back = tmp_path / "back"
    back.mkdir()
    archive.unpack(archives[0], back)
    assert (back / "run").stat().st_mode & 0o777 == 0o755
    assert (back / "sub" / "link").read_text() == "file a"


def test_an_archive_that_cannot_be_unpacked_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(OSError, match=r"could not unpack x\.tar"):
        archive.unpack(tmp_path / "x.tar", tmp_path)
