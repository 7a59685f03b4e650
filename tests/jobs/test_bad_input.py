"""Bad input, through the command line: done without it and named, or refused with the file, the row and a way out.

Exit status 0: done; 1: a run that failed; 2: bad input. Whatever the status, no map that is empty or half written.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo import cli, cluster
from dcryo.data import mrc, star, store_writer
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store, select
from dcryo.jobs.simulate import SimulateResult
from dcryo.steps import search

BOX, PIXEL = tiny.BOX_PX, tiny.PIXEL_SIZE_A
COUNT = 60


@dataclass(frozen=True)
class Called:
    """What a command line came to."""

    status: int
    out: str
    error: str


@pytest.fixture
def reports() -> None:
    """Asked for where the page of a run is written by its command, as it is for users; else that takes a second."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reports" not in request.fixturenames:
        monkeypatch.setattr(cli, "_write_reports", lambda *_: None)


@pytest.fixture
def dcryo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Run words as a command line."""

    def call(*words: object) -> Called:
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "fault of dcryo" not in captured.err, captured.err
        return Called(status, captured.out, captured.err)

    return call


@dataclass(frozen=True)
class Source:
    """A STAR file, its stack, and the particles and images in them: to be spoilt and written again."""

    folder: Path
    particles: Particles
    images: np.ndarray

    @property
    def star(self) -> Path:
        return self.folder / "particles.star"

    @property
    def stack(self) -> Path:
        return self.folder / "particles.mrcs"

    def write(self) -> Path:
        """Write both, whatever the images hold."""
        with mrc.StackWriter(self.stack, len(self.images), self.images.shape[1], PIXEL) as writer:
            writer.write(0, np.zeros_like(self.images))
        with self.stack.open("r+b") as file:
            file.seek(mrc.HEADER_BYTES)
            file.write(self.images.tobytes())
        star.write_particles(self.star, self.particles)
        return self.star

    def edit(self, row: int, label: str, value: str) -> Path:
        """Write both, then put a word into a column of a row of the table."""
        self.write()
        lines = self.star.read_text().splitlines()
        start = lines.index("data_particles")
        column = next(int(line.split("#")[1]) - 1 for line in lines[start:] if line.startswith(f"_{label} "))
        at = [number for number, line in enumerate(lines) if "@" in line][row]
        words = lines[at].split()
        words[column] = value
        lines[at] = " ".join(words)
        self.star.write_text("\n".join(lines) + "\n")
        return self.star


@pytest.fixture
def source(simulated: SimulateResult, tmp_path: Path) -> Source:
    """The first 60 of the shared particles, with their poses."""
    particles = star.read_particles(simulated.truth_star).take(np.arange(COUNT))
    images = mrc.open_stack(simulated.truth_star.with_name("particles.mrcs")).read(np.arange(COUNT))
    (tmp_path / "source").mkdir()
    return Source(tmp_path / "source", particles, images)


@pytest.fixture(scope="session")
def good(posed: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Sixty good particles with poses: only to be read."""
    return select(posed, np.arange(COUNT), tmp_path_factory.mktemp("good") / "good.zarr")


def imported(dcryo: Callable[..., Called], source: Path, *more: object) -> Path:
    store = source.parent.parent / "particles.zarr"
    assert dcryo("import", source, "--out", store, *more).status == 0
    return store


def refined(dcryo: Callable[..., Called], store: Path, reference: Path, *more: object) -> Called:
    out = store.parent / "refined"
    return dcryo(
        "refine", store, "--reference", reference, "--out", out, "--mask-diameter", 120, "--max-iterations", 1, *more
    )


def reconstructed(dcryo: Callable[..., Called], store: Path, *more: object) -> Called:
    return dcryo("reconstruct", store, "--out", store.parent / "reconstructed", "--mask-diameter", 120, *more)


DO: dict[str, Callable[..., tuple[Called, Path]]] = {
    "refine": lambda dcryo, store, reference: (refined(dcryo, store, reference), store.parent / "refined"),
    "reconstruct": lambda dcryo, store, _: (reconstructed(dcryo, store), store.parent / "reconstructed"),
}


def nothing_written(out: Path) -> bool:
    return not out.exists() or not [path for path in out.rglob("*") if path.suffix in (".mrc", ".star", ".csv", ".tmp")]


def finite_maps(out: Path) -> bool:
    arrays = [mrc.read_map(out / name).array for name in tiny.MAPS]
    return all(np.isfinite(array).all() and array.std() > 0 for array in arrays)


def left_out(out: Path) -> dict[int, str]:
    """What run.json says was left out, row -> image and reason; and the report, where there is one."""
    record = Run.open(out).record
    assert record["status"] == "done"
    page = out / "report.html"
    for row in record["quarantined"] if page.exists() else ():
        assert row["image"] in page.read_text()
    return {row["row"]: f"{row['image']}: {row['reason']}" for row in record["quarantined"]}


def spoilt(source: Source) -> dict[int, str]:
    """Spoil images in place; row (from 1) -> what has to be said."""
    images = source.images
    images[4, 7, 7] = np.nan
    images[11, 0, 0] = np.inf
    images[12, 5, 1] = -np.inf
    images[20] = 0.25
    images[33] = np.nan
    return {
        5: "000005@particles.mrcs: 1 pixels are NaN",
        12: "000012@particles.mrcs: 1 pixels are infinite",
        13: "000013@particles.mrcs: 1 pixels are infinite",
        21: "000021@particles.mrcs: constant, every pixel is 0.25",
        34: f"000034@particles.mrcs: {BOX * BOX} pixels are NaN",
    }


@pytest.mark.parametrize("job", ["reconstruct", "refine"])
def test_bad_images_are_left_out_and_named_to_the_end(
    source: Source, reference: Path, dcryo, job: str, reports: None
) -> None:
    expected = spoilt(source)
    store = imported(dcryo, source.write())
    assert left_out(store) == expected
    called, out = DO[job](dcryo, store, reference)
    assert called.status == 0
    assert (store / "report.html").is_file() and (out / "report.html").is_file()
    if job == "refine":
        particles = star.read_particles(out / "particles.star")
        assert sorted(particles["image_index"] + 1) == [row for row in range(1, COUNT + 1) if row not in expected]
    assert left_out(out) == expected
    assert Run.open(out).record["result"]["particles"] == COUNT - len(expected)
    assert finite_maps(out)


def test_bad_images_change_nothing_for_the_others(source: Source, dcryo) -> None:
    """The maps are those of the good particles alone, to the bit."""
    expected = spoilt(source)
    kept = np.setdiff1d(np.arange(COUNT), np.array(list(expected)) - 1)
    assert reconstructed(dcryo, imported(dcryo, source.write())).status == 0
    other = Source(source.folder.parent / "other" / "source", source.particles.take(kept), source.images)
    other.folder.mkdir(parents=True)
    assert reconstructed(dcryo, imported(dcryo, other.write())).status == 0
    folders = [one.folder.parent / "reconstructed" for one in (source, other)]
    assert tiny.digests(folders[0], tiny.MAPS) == tiny.digests(folders[1], tiny.MAPS)


def test_a_truncated_stack(source: Source, dcryo) -> None:
    source.write()
    whole = source.stack.read_bytes()
    source.stack.write_bytes(whole[: mrc.HEADER_BYTES + 50 * BOX * BOX * 4 + 100])
    store = imported(dcryo, source.star)
    assert reconstructed(dcryo, store).status == 0
    found = left_out(store.parent / "reconstructed")
    assert list(found) == list(range(51, 61))
    assert found[51] == "000051@particles.mrcs: stack is truncated: it has 50 of 60 images"


def test_a_stack_that_is_not_there(source: Source, dcryo) -> None:
    star_file = source.edit(41, "rlnImageName", "000003@gone.mrcs")
    out = source.folder.parent / "particles.zarr"
    called = dcryo("import", star_file, "--out", out)
    assert called.status == 2 and not out.exists()
    assert f"{star_file}: 1 of its rows" in called.error
    assert "row 42: stack 'gone.mrcs' is not there" in called.error
    assert "--skip-missing" in called.error
    store = imported(dcryo, star_file, "--skip-missing")
    assert reconstructed(dcryo, store).status == 0
    assert left_out(store.parent / "reconstructed") == {42: "000003@gone.mrcs: stack 'gone.mrcs' is not there"}


def test_a_row_past_the_end_of_its_stack(source: Source, dcryo) -> None:
    star_file = source.edit(7, "rlnImageName", "000061@particles.mrcs")
    out = source.folder.parent / "particles.zarr"
    called = dcryo("import", star_file, "--out", out)
    assert called.status == 2 and not out.exists()
    assert f"row 8: image 61 of {source.stack}, which has 60" in called.error


@pytest.mark.parametrize(
    ("label", "value", "said"),
    [
        ("rlnDefocusU", "nan", "expected a finite number"),
        ("rlnDefocusV", "inf", "expected a finite number"),
        ("rlnDefocusU", "deep", "expected a finite number"),
        ("rlnAngleTilt", "nan", "expected a finite number"),
        ("rlnOriginXAngst", "inf", "expected a finite number"),
        ("rlnRandomSubset", "3", "expected a whole number from 0 to 2"),
        ("rlnImageName", "000000@particles.mrcs", "images numbered from 1"),
        ("rlnOpticsGroup", "9", "expected a group of data_optics"),
    ],
)
def test_a_table_with_a_value_that_cannot_be(source: Source, dcryo, label: str, value: str, said: str) -> None:
    star_file = source.edit(29, label, value)
    out = source.folder.parent / "particles.zarr"
    called = dcryo("import", star_file, "--out", out)
    assert called.status == 2 and not out.exists()
    assert str(star_file) in called.error and f"row 30, _{label}: found '{value}'" in called.error
    assert said in called.error


def test_an_absurd_defocus_is_refused(source: Source, dcryo) -> None:
    """150 micrometres: an error of units, whose CTF would be noise."""
    store = imported(dcryo, source.edit(9, "rlnDefocusV", "1.5e6"))
    for called in (reconstructed(dcryo, store), refined(dcryo, store, source.folder / "none.mrc")):
        assert called.status == 2
        assert f"{store}: defocus_v_A of 000010@particles.mrcs is 1.5e+06; expected at most 1e+06" in called.error
    assert nothing_written(store.parent / "reconstructed") and nothing_written(store.parent / "refined")


@pytest.mark.parametrize("bfactor_A2", [-5e4, -1e7])
@pytest.mark.parametrize("job", ["reconstruct", "refine"])
def test_a_ctf_beyond_any_scale_costs_its_particle_only(
    source: Source, reference: Path, dcryo, job: str, bfactor_A2: float
) -> None:
    bfactor = np.zeros(COUNT)
    bfactor[17] = bfactor_A2
    source = Source(source.folder, source.particles.replace(ctf_bfactor_A2=bfactor), source.images)
    store = imported(dcryo, source.write())
    called, out = DO[job](dcryo, store, reference)
    assert called.status == 0
    found = left_out(out)
    assert list(found) == [18] and "its CTF reaches" in found[18]
    assert finite_maps(out)
    assert Run.open(out).record["result"]["particles"] == COUNT - 1


def test_repeated_rows_may_not_be_in_both_halves(source: Source, dcryo) -> None:
    rows = np.array([*range(COUNT), 10, 10])
    half = source.particles["half"][rows]
    half[-1] = 3 - half[-1]
    particles = source.particles.take(rows).replace(half=half)
    store = imported(dcryo, Source(source.folder, particles, source.images).write())
    called = reconstructed(dcryo, store)
    assert called.status == 2 and nothing_written(store.parent / "reconstructed")
    assert "000011@particles.mrcs is in both halves, as particles 11 and 62 (1 such in all)" in called.error


def test_images_of_another_box(source: Source, dcryo) -> None:
    source.write()
    star_file = source.star
    star_file.write_text(star_file.read_text().replace(f" {BOX} ", f" {BOX * 2} "))
    out = source.folder.parent / "particles.zarr"
    called = dcryo("import", star_file, "--out", out)
    assert called.status == 2 and not out.exists()
    assert "row 1: its optics group says images of 64 pixels, but those of" in called.error


def test_a_table_without_the_ctf(source: Source, dcryo) -> None:
    columns = {name: values for name, values in source.particles.columns.items() if not name.startswith("defocus")}
    particles = Particles(columns, source.particles.optics, {}, {})
    store = imported(dcryo, Source(source.folder, particles, source.images).write())
    called = reconstructed(dcryo, store)
    assert called.status == 2 and nothing_written(store.parent / "reconstructed")
    assert f"{store}: the particles have no defocus_u_A" in called.error


def test_one_half_only(source: Source, dcryo) -> None:
    particles = source.particles.replace(half=np.full(COUNT, 2))
    store = imported(dcryo, Source(source.folder, particles, source.images).write())
    called = reconstructed(dcryo, store)
    assert called.status == 2 and nothing_written(store.parent / "reconstructed")
    assert "0 particles in half 1 and 60 in half 2" in called.error and "rlnRandomSubset" in called.error


def test_particles_without_poses_cannot_be_reconstructed(store: Store, dcryo, tmp_path: Path) -> None:
    called = dcryo("reconstruct", store.path, "--out", tmp_path / "out")
    assert called.status == 2 and not (tmp_path / "out").exists()
    assert "no poses" in called.error


@pytest.mark.parametrize("job", ["import", "reconstruct", "refine"])
def test_nothing_good_is_a_run_that_failed(source: Source, reference: Path, dcryo, job: str) -> None:
    """Not an empty map. An import finds bad images; a chunk may be damaged afterwards."""
    if job == "import":
        source.images[:] = 3.0
        out = source.folder.parent / "particles.zarr"
        called = dcryo("import", source.write(), "--out", out)
        assert called.status == 1 and "none of 60 images is good" in called.error
        with pytest.raises(Exception, match="not whole"):
            open_store(out)
        return
    store = imported(dcryo, source.write())
    shard = store / "images" / "c" / "0" / "0" / "0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    called, out = DO[job](dcryo, store, reference)
    assert called.status == 1
    record = Run.open(out).record
    assert record["status"] == "failed" and record["error"] in called.error
    assert not list(out.glob("*.mrc")) and not (out / "particles.star").exists()


@pytest.fixture
def damaged(source: Source, dcryo, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, set[int]]:
    """A store of 8 images a chunk with a flipped byte in the third; and the rows of the source that it held.

    Image 3 of the source is bad from the start, so that rows of the store are not those of the source.
    """
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 8 * BOX * BOX * 2)
    source.images[2] = 0
    store = imported(dcryo, source.write())
    shard = store / "images" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    image = open_store(store).read([20]).images[0].astype(np.float16).tobytes()
    at = content.index(image)
    content[at + 100] ^= 0x40
    shard.write_bytes(content)
    return store, set(range(18, 26))


@pytest.mark.parametrize("job", ["reconstruct", "refine"])
def test_a_damaged_chunk_costs_its_particles_only(damaged, reference: Path, dcryo, job: str) -> None:
    store, rows = damaged
    called, out = DO[job](dcryo, store, reference)
    assert called.status == 0
    found = left_out(out)
    assert set(found) == rows | {3}
    for row in rows:
        assert found[row].startswith(f"{row:06d}@particles.mrcs: chunk 2 of the store cannot be read")
    assert finite_maps(out)
    if job == "refine":
        particles = star.read_particles(out / "particles.star")
        assert set(particles["image_index"] + 1) == set(range(1, COUNT + 1)) - rows - {3}


def test_a_damaged_chunk_of_a_selection(damaged, dcryo, tmp_path: Path) -> None:
    """Particles are named by their row in the source, not in the store or the selection."""
    store, rows = damaged
    chosen = np.array([58, 25, 20, 0, 1, 2, 40, 7, 41, 17, 30, 12])
    select(open_store(store), chosen, tmp_path / "some.zarr")
    assert reconstructed(dcryo, tmp_path / "some.zarr").status == 0
    found = left_out(tmp_path / "reconstructed")
    assert set(found) == {3, 19, 22}
    assert set(found) - {3} <= rows


def test_a_damaged_chunk_in_a_local_search(damaged, reference: Path, dcryo, monkeypatch) -> None:
    """Particles that the first iterations could not read have no pose to search about."""
    monkeypatch.setattr(search, "_LOCAL_RESOLUTION", 0.4)
    monkeypatch.setattr(sys.modules["dcryo.jobs.refine"], "_TRUSTED", 0.4)
    store, rows = damaged
    assert refined(dcryo, store, reference, "--max-iterations", 3).status == 0
    record = Run.open(store.parent / "refined").record
    assert record["iterations"][-1]["searched_everywhere"] < 1
    assert {row["row"] for row in record["quarantined"]} == rows | {3}


def bad_map(path: Path, array: np.ndarray, voxel_size_A: float = PIXEL) -> Path:
    """A map file of anything, also of what the writer refuses."""
    mrc.write_map(path, np.zeros(array.shape), voxel_size_A)
    with path.open("r+b") as file:
        file.seek(mrc.HEADER_BYTES)
        file.write(array.astype(np.float32).tobytes())
    return path


def cube(side: int = BOX) -> np.ndarray:
    ramp = np.linspace(0, 1, side)
    return ramp[:, None, None] * ramp[:, None] * ramp


def with_nan() -> np.ndarray:
    array = cube()
    array[1, 2, 3] = np.nan
    return array


@pytest.mark.parametrize(
    ("array", "voxel", "said"),
    [
        (with_nan(), PIXEL, "not finite, the first at (z, y, x) = (1, 2, 3)"),
        (np.full((BOX,) * 3, 0.5), PIXEL, "constant"),
        (cube(), 0.0, "no voxel size in the header"),
        (cube()[:-2], PIXEL, "expected a cube"),
    ],
)
def test_references_that_are_none(good: Store, dcryo, tmp_path: Path, array, voxel: float, said: str) -> None:
    path, out = bad_map(tmp_path / "reference.mrc", array, voxel), tmp_path / "out"
    called = dcryo("refine", good.path, "--reference", path, "--out", out)
    assert called.status == 2 and not out.exists()
    assert str(path) in called.error and said in called.error


@pytest.mark.parametrize(
    ("array", "voxel", "said"),
    [
        (cube(BOX + 2), PIXEL, "mask of (34, 34, 34) voxels"),
        (cube(), 2 * PIXEL, "of 12 A; expected (32, 32, 32) of 6 A"),
        (cube(), 0.0, "of 0 A; expected"),
        (2 * cube(), PIXEL, "run from 0 to 2; expected 0 (solvent) to 1 (particle)"),
        (cube() - 0.5, PIXEL, "expected 0 (solvent) to 1"),
        (np.zeros((BOX,) * 3), PIXEL, "run from 0 to 0"),
        (with_nan(), PIXEL, "not finite"),
    ],
)
@pytest.mark.parametrize("job", ["reconstruct", "refine"])
def test_masks_that_are_none(
    good: Store, reference: Path, dcryo, tmp_path: Path, job: str, array, voxel: float, said: str
) -> None:
    path, out = bad_map(tmp_path / "mask.mrc", array, voxel), tmp_path / "out"
    more = ["--reference", reference] if job == "refine" else []
    called = dcryo(job, good.path, *more, "--mask", path, "--out", out)
    assert called.status == 2 and not out.exists()
    assert str(path) in called.error and said in called.error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--symmetry", "X7"], "X7"),
        (["--symmetry", "C0"], "C0"),
        (["--symmetry", ""], "symmetry"),
        (["--mask-diameter", 193], "--mask-diameter 193 A: expected"),
        (["--mask-diameter", 20], "--mask-diameter 20 A"),
        (["--mask-diameter", "inf"], "--mask-diameter inf"),
        (["--mask-diameter", "nan"], "--mask-diameter nan"),
        (["--mask-diameter", -5], "--mask-diameter -5"),
        (["--cluster", "cloud"], "--cluster 'cloud' is not known"),
        (["--cluster", "gone.json"], "there is no such scheduler file"),
        (["--workers", 0], "--workers 0"),
        (["--seed", -1], "--seed -1"),
    ],
)
@pytest.mark.parametrize("job", ["reconstruct", "refine"])
def test_options_that_cannot_be(good: Store, reference: Path, dcryo, tmp_path: Path, job: str, words, said) -> None:
    more = ["--reference", reference] if job == "refine" else []
    called = dcryo(job, good.path, *more, "--out", tmp_path / "out", *words)
    assert called.status == 2 and not (tmp_path / "out").exists()
    assert said in called.error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--initial-lowpass", "inf"], "--initial-lowpass inf"),
        (["--initial-lowpass", 0], "--initial-lowpass 0"),
        (["--shift-range", "inf"], "--shift-range inf"),
        (["--shift-range", 97], "--shift-range 97 A: expected at most half the box, 96 A"),
        (["--max-iterations", 0], "--max-iterations 0"),
        (["--reference", "gone.mrc"], "gone.mrc"),
    ],
)
def test_options_of_refine_that_cannot_be(good: Store, reference: Path, dcryo, tmp_path: Path, words, said) -> None:
    called = dcryo("refine", good.path, "--reference", reference, "--out", tmp_path / "out", *words)
    assert called.status == 2 and not (tmp_path / "out").exists()
    assert said in called.error


@pytest.mark.parametrize("path", ["gone.zarr", "folder", "file.txt"])
def test_stores_that_are_none(reference: Path, dcryo, tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("particles")
    for words in (["reconstruct"], ["refine", "--reference", reference]):
        called = dcryo(*words, tmp_path / path, "--out", tmp_path / "out")
        assert called.status == 2 and not (tmp_path / "out").exists()
        assert f"{tmp_path / path}: not a particle store" in called.error


def test_nobody_answers(good: Store, dcryo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_TIMEOUT_S", 0.2)
    called = dcryo("reconstruct", good.path, "--out", tmp_path / "out", "--cluster", "tcp://127.0.0.1:9")
    assert called.status == 1 and "no scheduler answers" in called.error
    assert nothing_written(tmp_path / "out")
    # Where it runs is nothing of the result: the run goes on elsewhere.
    assert dcryo("reconstruct", good.path, "--out", tmp_path / "out", "--resume").status == 0


@pytest.mark.parametrize("job", ["reconstruct", "refine"])
def test_a_directory_with_another_run(good: Store, reference: Path, dcryo, tmp_path: Path, job: str) -> None:
    out = tmp_path / "out"
    assert dcryo("fsc", reference, reference, "--out", out).status == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    more = ["--reference", reference] if job == "refine" else []
    called = dcryo(job, good.path, *more, "--out", out)
    assert called.status == 2 and f"{out}: holds a run already" in called.error
    called = dcryo(job, good.path, *more, "--out", out, "--resume")
    assert called.status == 2 and f"job fsc there, {job} now" in called.error
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_record_that_is_damaged(good: Store, dcryo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert dcryo("reconstruct", good.path, "--out", out).status == 0
    for text in ("{", json.dumps([1]), json.dumps({"job": "reconstruct"})):
        (out / "run.json").write_text(text)
        called = dcryo("reconstruct", good.path, "--out", out, "--resume")
        assert called.status == 2 and "run.json" in called.error
