import threading
import time
from pathlib import Path

import pytest
import tiny

from dcryo.cluster import connect
from dcryo.data.items import Found, Item
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
from dcryo.jobs import micrographs


class Case:
    def __init__(self, folder: Path) -> None:
        self.sources, self.out = folder / "in", folder / "out"
        self.sources.mkdir()
        self.told: list[list[str]] = []
        self.said: list[str] = []

    def write(self, **texts: str) -> None:
        for name, text in texts.items():
            (self.sources / f"{name}.txt").write_text(text)

    def find(self) -> list[Item]:
        return micrographs.named(sorted(self.sources.glob("*.txt")))

    def go(self, kind: str = "threads", watch: bool = False, **how: bool) -> dict[str, Found]:
        with (
            Run.start(self.out, "measure", {}, growing=True, **how) as run,
            connect(kind, 2) as cluster,
        ):
            found = micrographs.work_through(
                run, self.find, tiny.measured, ("letters",), cluster, watch,
                lambda all_: self.told.append(sorted(all_)), lambda line, end="\n": self.said.append(line),
            )  # fmt: skip
            run.flag(micrographs.flagged(found))
            run.done({})
        return found


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("kind", ["threads", "synchronous", "processes"])
def test_all_are_worked_on_and_what_is_bad_is_flagged(case: Case, kind: str) -> None:
    case.write(a="abc", b="", c="refused", d="abcde")
    (case.sources / "e.txt").write_bytes(b"\xff")
    found = case.go(kind)
    assert {name: one.values.get("length") for name, one in found.items()} == {
        "a": 3,
        "b": 0,
        "c": None,
        "d": 5,
        "e": None,
    }
    assert found["a"].values["unit"] == "letters"
    rows = Run.open(case.out).record["quarantined"]
    assert [(row["row"], row["image"]) for row in rows] == [(2, "b"), (3, "c"), (5, "e")]
    assert rows[1]["reason"].endswith("c.txt: refused") and rows[2]["reason"].startswith("UnicodeDecodeError")
    assert case.told[-1] == ["a", "b", "c", "d", "e"]


def test_a_second_call_does_only_what_is_missing_or_changed(case: Case) -> None:
    case.write(a="abc", b="refused")
    case.go()
    before = {path.name: path.stat().st_mtime_ns for path in (case.out / "items").iterdir()}
    case.write(b="mended", c="new")
    found = case.go(resume=True)
    assert {name: one.values["length"] for name, one in found.items()} == {"a": 3, "b": 6, "c": 3}
    after = {path.name: path.stat().st_mtime_ns for path in (case.out / "items").iterdir()}
    assert after["a.json"] == before["a.json"] and after["b.json"] != before["b.json"]
    assert "1 were done before" in case.said
    assert Run.open(case.out).record["quarantined"] == []


def test_a_full_disk_ends_the_run(case: Case) -> None:
    case.write(a="abc", b="full")
    with pytest.raises(RunError, match="disk is full"):
        case.go()
    assert Run.open(case.out).record["status"] == "failed"
    case.write(b="room")
    assert len(case.go(resume=True)) == 2


def test_watching_takes_what_arrives_until_told_to_stop(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micrographs, "_POLL_S", 0.02)
    monkeypatch.setattr(micrographs, "_SETTLED_S", 0.1)
    case.write(a="abc")
    results: list[dict[str, Found]] = []
    thread = threading.Thread(target=lambda: results.append(case.go(watch=True)))
    thread.start()
    wait_for(lambda: case.told)
    case.write(b="abcd")
    wait_for(lambda: case.told[-1] == ["a", "b"])
    # What is there when it is told to stop is still taken.
    case.write(c="abcde")
    (case.out / micrographs.STOP).touch()
    thread.join(10)
    assert not thread.is_alive() and sorted(results[0]) == ["a", "b", "c"]
    assert not (case.out / micrographs.STOP).exists()
    assert Run.open(case.out).record["status"] == "done"


def test_a_file_that_is_being_written_is_not_yet_taken(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micrographs, "_POLL_S", 0.02)
    monkeypatch.setattr(micrographs, "_SETTLED_S", 0.5)
    case.write(a="")
    thread = threading.Thread(target=lambda: case.go(watch=True))
    thread.start()
    for length in range(1, 6):
        time.sleep(0.1)
        case.write(a="x" * length)
    (case.out / micrographs.STOP).touch()
    thread.join(10)
    assert not thread.is_alive()
    assert case.go(resume=True)["a"].values["length"] == 5


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def test_names_must_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "x.tif", tmp_path / "a" / "y.mrc.gz", tmp_path / "a" / "z.fraction.eer"]
    assert [item.name for item in micrographs.named(paths)] == ["x", "y", "z.fraction"]
    with pytest.raises(InputError, match="the same name"):
        micrographs.named([tmp_path / "a" / "x.tif", tmp_path / "b" / "x.mrc"])


def test_a_job_waits_for_the_table_that_another_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micrographs, "_POLL_S", 0.02)
    table, said = tmp_path / "motion" / "micrographs.star", []
    options = micrographs.MicrographOptions(micrographs=(table,))

    def wait() -> None:
        micrographs.await_table(options, tmp_path / "out", lambda line, end="\n": said.append(line))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: said)
    assert thread.is_alive() and said == [f"waiting for {table}"]
    table.parent.mkdir()
    table.touch()
    thread.join(10)
    assert not thread.is_alive()
    # Told to stop before there is one, it says that it did nothing.
    table.unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / micrographs.STOP).touch()
    with pytest.raises(InputError, match="was not there before"):
        wait()
