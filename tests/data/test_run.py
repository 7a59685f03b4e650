"""The run record: refusals, resumption, and what survives a process that is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dcryo.data.provenance import SAMPLES, WHOLE_BYTES, digest
from dcryo.data.run import CHECKPOINTS, Run, plain
from dcryo.errors import InputError, RunError


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "stack.mrcs"
    path.write_bytes(b"images")
    return path


def start(out: Path, stack: Path, **changes) -> Run:
    arguments = {"job": "refine", "options": {"store": stack, "cluster": "threads", "mask_diameter": 90.0},
                 "inputs": [stack], "seed": 7}  # fmt: skip
    return Run.start(out, **{**arguments, **changes})


def test_record_tells_the_whole_story(tmp_path: Path, stack: Path) -> None:
    run = start(tmp_path / "a" / "b", stack)
    run.iteration({"iteration": 1, "resolution_A": np.float32(12.5), "worst": float("inf")})
    run.quarantine([{"row": np.int64(4), "image": "000005@stack.mrcs", "reason": "constant"}])
    run.done({"resolution_A": 9.0})
    record = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert record == run.record == Run.open(run.path).record
    assert record["status"] == "done" and record["job"] == "refine" and record["seed"] == 7
    assert record["options"]["store"] == str(stack)
    assert record["iterations"] == [{"iteration": 1, "resolution_A": 12.5, "worst": None}]
    assert record["quarantined"] == [{"row": 4, "image": "000005@stack.mrcs", "reason": "constant"}]
    assert record["inputs"][0]["bytes"] == 6 and record["inputs"][0]["digest"].startswith("sha256:")
    assert {"dcryo", "python", "numpy", "numba", "dask"} <= record["versions"].keys()
    assert record["platform"]["cpu"] and record["command"]
    assert record["started_utc"] <= record["finished_utc"] and record["elapsed_s"] >= 0


def test_directory_of_another_run_is_refused(tmp_path: Path, stack: Path) -> None:
    start(tmp_path / "out", stack).done({})
    with pytest.raises(InputError, match=r"holds a run already.*--resume.*--overwrite"):
        start(tmp_path / "out", stack)


def test_directory_with_files_that_would_be_replaced_is_refused(tmp_path: Path, stack: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "slurm.log").touch()
    start(out, stack).done({})  # a log in the directory is no reason to refuse
    (out / "run.json").unlink()
    (out / "map.mrc").touch()
    with pytest.raises(InputError, match=r"map\.mrc"):
        start(out, stack)
    with pytest.raises(InputError, match="is a file"):
        start(stack, stack)


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path, stack: Path) -> None:
    out = tmp_path / "out"
    run = start(out, stack)
    run.save_checkpoint(1, {"map": np.zeros(3)}, {})
    run.iteration({"iteration": 1})
    run.done({})
    (out / "fsc_truth.csv").touch()
    (out / "notes.txt").touch()
    (out / "sub").mkdir()
    (out / "sub" / "map.mrc").touch()
    again = start(out, stack, overwrite=True)
    assert again.record["iterations"] == [] and again.latest_checkpoint() is None
    again.done({})
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {"run.json", "notes.txt", "sub/map.mrc"}


def test_overwriting_never_removes_an_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = out / "particles.mrcs"
    source.write_bytes(b"precious")
    with pytest.raises(InputError, match=r"particles\.mrcs: is an input"):
        Run.start(out, "import", {}, [source], overwrite=True)
    assert source.read_bytes() == b"precious"


def test_missing_input_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.star"):
        Run.start(tmp_path / "out", "import", {}, [tmp_path / "nothing.star"])
    assert not (tmp_path / "out").exists()


def test_resume_goes_on_with_the_same_run_only(tmp_path: Path, stack: Path) -> None:
    out = tmp_path / "out"
    run = start(out, stack, resume=True)  # nothing there yet: a beginning
    for iteration in (1, 2, 3):
        run.iteration({"iteration": iteration})
    run.fail(RuntimeError("lost"))
    options = dict(run.record["options"])
    with pytest.raises(InputError, match=r"option mask_diameter is 90\.0 there, 80\.0 now"):
        start(out, stack, resume=True, options={**options, "mask_diameter": 80.0})
    with pytest.raises(InputError, match="job refine there, class3d now"):
        start(out, stack, resume=True, job="class3d")
    with pytest.raises(InputError, match="seed 7 there, 8 now"):
        start(out, stack, resume=True, seed=8)
    with pytest.raises(InputError, match="exclude"):
        start(out, stack, resume=True, overwrite=True)
    again = start(out, stack, resume=True, options={**options, "cluster": "tcp://host:1", "workers": 9})
    assert again.record["status"] == "running" and again.record["error"] is None
    assert len(again.record["resumed"]) == 1
    again.iteration({"iteration": 2, "again": True})  # what was recorded after the checkpoint is done anew
    assert again.record["iterations"] == [{"iteration": 1}, {"iteration": 2, "again": True}]


def test_resume_compares_inputs_by_content_not_by_place(tmp_path: Path, stack: Path) -> None:
    out = tmp_path / "out"
    start(out, stack).fail("lost")
    moved = stack.rename(tmp_path / "elsewhere.mrcs")
    os.utime(moved, (1, 1))
    start(out, moved, resume=True, options={"store": moved, "mask_diameter": 90.0}).fail("lost")
    moved.write_bytes(b"others")
    with pytest.raises(InputError, match=r"elsewhere\.mrcs is not what .*stack\.mrcs was"):
        start(out, moved, resume=True, options={"store": moved, "mask_diameter": 90.0})


def test_resuming_what_is_done_changes_nothing(tmp_path: Path, stack: Path) -> None:
    start(tmp_path / "out", stack).done({"resolution_A": 3.0})
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert start(tmp_path / "out", stack, resume=True).finished
    assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_an_exception_marks_the_run_as_failed(tmp_path: Path, stack: Path) -> None:
    with pytest.raises(ValueError), start(tmp_path / "out", stack):
        raise ValueError("worker lost")
    record = Run.open(tmp_path / "out").record
    assert (record["status"], record["error"]) == ("failed", "worker lost")
    with pytest.raises(KeyboardInterrupt), start(tmp_path / "out", stack, resume=True):
        raise KeyboardInterrupt
    assert Run.open(tmp_path / "out").record["error"] == "interrupted"


def test_damaged_record_is_an_input_error(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"job": 1', "\udcff"):
        (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=r"run\.json"):
            Run.open(tmp_path)
    with pytest.raises(InputError, match="not a run directory"):
        Run.open(tmp_path / "none")


def test_quarantine_keeps_each_particle_once(tmp_path: Path, stack: Path) -> None:
    run = start(tmp_path / "out", stack)
    row = {"row": 3, "image": "000001@a.mrcs", "reason": "NaN"}
    run.quarantine([row])
    run.quarantine([row, {"row": 1, "image": "000002@a.mrcs", "reason": "constant"}])
    assert [item["row"] for item in run.record["quarantined"]] == [1, 3]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "int64", "uint64", "int8", "bool", "<U17"])
def test_checkpoint_arrays_come_back_bit_for_bit(tmp_path: Path, stack: Path, dtype: str) -> None:
    run = start(tmp_path / "out", stack)
    raw = np.random.default_rng(1).integers(0, 2, (5, 4, 3)) * 1.1
    array = np.asfortranarray(raw.astype(dtype))
    if array.dtype.kind == "f":
        array[0, 0] = np.nan, -0.0, np.finfo(dtype).smallest_subnormal
    run.save_checkpoint(3, {"array": array, "empty": array[:0], "scalar": np.array(2.5)}, {"step": (1, None)})
    iteration, arrays, meta = Run.open(run.path).latest_checkpoint()
    assert iteration == 3 and meta == {"step": [1, None]}
    assert arrays["array"].dtype == array.dtype and arrays["array"].shape == array.shape
    assert arrays["array"].tobytes() == array.tobytes()
    assert arrays["empty"].shape == (0, 4, 3) and arrays["scalar"] == 2.5


def test_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path, stack: Path) -> None:
    run = start(tmp_path / "out", stack)
    for iteration in range(9, 13):
        run.save_checkpoint(iteration, {"x": np.full(100, iteration)}, {})
    folder = run.path / CHECKPOINTS
    assert sorted(path.name for path in folder.iterdir()) == ["000011", "000012"]
    file = folder / "000012" / "x.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    iteration, arrays, _ = run.latest_checkpoint()
    assert iteration == 11 and (arrays["x"] == 11).all()
    (folder / "000011" / "meta.json").unlink()
    assert run.latest_checkpoint() is None


def test_full_disk_is_told_and_keeps_the_checkpoint_before(tmp_path, stack, monkeypatch) -> None:
    run = start(tmp_path / "out", stack)
    run.save_checkpoint(1, {"x": np.ones(3)}, {})

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        run.save_checkpoint(2, {"x": np.ones(3)}, {})
    assert run.latest_checkpoint()[0] == 1


WRITER = """
import sys
import numpy as np
from dcryo.data.run import Run
run = Run.start(sys.argv[1], "refine", {}, [], resume=True)
latest = run.latest_checkpoint()
for iteration in range(latest[0] + 1 if latest else 1, 10_000):
    run.iteration({"iteration": iteration})
    run.save_checkpoint(iteration, {str(n): np.full(200_000, iteration) for n in range(4)}, {"is": iteration})
    print(iteration, flush=True)
"""


def writer(out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True)


def test_killed_at_any_moment_the_latest_checkpoint_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(8):
        process = writer(out)
        process.stdout.readline()
        threading.Event().wait(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        told = max([told, *map(int, process.communicate()[0].split())])
        assert Run.open(out).record["status"] == "running"
        iteration, arrays, meta = Run.open(out).latest_checkpoint()
        assert iteration >= told and meta == {"is": iteration}
        assert all((array == iteration).all() for array in arrays.values()) and len(arrays) == 4
    Run.start(out, "refine", {}, [], resume=True)
    assert not list((out / CHECKPOINTS).glob(".*"))


@pytest.mark.parametrize("name", ["run", "run.zarr"])
def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path, stack: Path, name: str) -> None:
    out, of_user = tmp_path / name, tmp_path / name / ".mine.tmp"
    out.mkdir()
    of_user.touch()
    for resume in (False, True):
        left = out / ".run.json.4711.tmp"
        left.write_text("{")
        start(out, stack, resume=resume).fail("killed")
        assert not left.exists() and of_user.exists()


def test_two_processes_cannot_write_to_one_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = writer(out)
    try:
        process.stdout.readline()
        with pytest.raises(InputError, match=f"process {process.pid}"):
            Run.start(out, "refine", {}, [], resume=True)
        with pytest.raises(InputError, match="another process"):
            Run.start(out, "refine", {}, [], overwrite=True)
    finally:
        process.kill()
        process.communicate()


def test_digest_sees_content_and_not_dates(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = digest(path)
    # FIPS 180-2, appendix B.1: the digest of "abc"
    assert first["digest"].endswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    os.utime(path, (1, 1))
    assert digest(path) == first
    store = tmp_path / "s.zarr"
    store.mkdir()
    (store / "zarr.json").write_text('{"attributes": {"fingerprint": "f00"}}')
    assert digest(store)["digest"] == "fingerprint:f00"
    folder = tmp_path / "folder"
    folder.mkdir()
    empty = digest(folder)
    (folder / "x").touch()
    assert digest(folder)["digest"] != empty["digest"]


def test_digest_of_a_large_file_samples_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = WHOLE_BYTES + 5_000_001
    with path.open("wb") as file:
        file.truncate(size)
    before = digest(path)
    assert before["digest"].startswith("sha256-sampled:") and "blocks" in before["digest_of"]
    for place in (0, size - 1, size * (SAMPLES // 2) // (SAMPLES - 1)):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        changed = digest(path)
        assert changed["digest"] != before["digest"]
        before = changed


def test_plain_holds_no_surprise() -> None:
    value = plain({"a": np.float64("nan"), 1: (Path("x"), np.arange(2), {3}), "t": True, "n": None})
    assert value == {"a": None, "1": ["x", [0, 1], [3]], "t": True, "n": None}
    json.dumps(value, allow_nan=False)


def test_inputs_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "stack.mrcs").write_bytes(b"images")
    monkeypatch.chdir(tmp_path / "here")
    out = Path("runs/first")
    start(out, Path("stack.mrcs"), options={"out": out}).done({})
    assert Run.open(out).inputs() == [Path("stack.mrcs")]
    monkeypatch.chdir(tmp_path)
    assert Run.open("here/runs/first").inputs() == [tmp_path / "here" / "stack.mrcs"]
    # A run that was moved knows its inputs by the names that they had.
    (tmp_path / "here/runs/first").rename(tmp_path / "moved")
    assert Run.open("moved").inputs() == [Path("stack.mrcs")]
