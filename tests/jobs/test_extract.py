"""Extraction, on micrographs that are tiled with the images of simulated particles, so that these have to come back."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo import cli
from dcryo.data import mrc, star
from dcryo.data.items import arrays_of
from dcryo.data.micrographs import read_micrographs, write_micrographs
from dcryo.data.particles import Micrographs, identities
from dcryo.data.run import Run
from dcryo.data.star_syntax import Block, write_blocks
from dcryo.data.store import Store, open_store
from dcryo.errors import InputError, RunError
from dcryo.jobs import extract as job
from dcryo.jobs import micrographs as watching
from dcryo.jobs.extract import ExtractOptions, ExtractResult, extract
from dcryo.jobs.simulate import SimulateResult
from dcryo.kernels import boxes

BOX, PIXEL_A, ACROSS = tiny.BOX_PX, tiny.PIXEL_SIZE_A, 6
DIAMETER_A = 24 * PIXEL_A
NAMES = ("first", "second", "third")
PER = ACROSS * ACROSS
OPTICS = {
    "group": np.ones(1), "name": np.array(["all"]), "voltage_kV": np.array([300.0]),
    "spherical_aberration_mm": np.array([2.7]), "amplitude_contrast": np.array([0.1]),
    "micrograph_pixel_size_A": np.array([PIXEL_A]),
}  # fmt: skip


class Field:
    """Micrographs in a folder: dark particles on white, side by side, each in its own tile."""

    def __init__(self, folder: Path, simulated: SimulateResult) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.truth = star.read_particles(simulated.truth_star)
        self.images = mrc.open_stack(simulated.truth_star.with_name("particles.mrcs")).read(np.arange(len(self.truth)))
        y, x = np.divmod(np.arange(PER), ACROSS)
        self.coordinate_px = BOX * np.stack([x, y], axis=1) + BOX // 2 + 0.25
        for number, name in enumerate(NAMES):
            tiles = self.images[number * PER : (number + 1) * PER].reshape(ACROSS, ACROSS, BOX, BOX)
            self.write(name, 50.0 - 3.0 * tiles.transpose(0, 2, 1, 3).reshape(ACROSS * BOX, ACROSS * BOX))
            self.write_coordinates(name, self.coordinate_px)
        self.picks = self.write_picks()

    def write(self, name: str, image: np.ndarray) -> None:
        mrc.write_map(self.folder / f"{name}.mrc", image[None], PIXEL_A)

    def write_coordinates(self, name: str, coordinate_px: np.ndarray, **columns: np.ndarray) -> None:
        x, y = np.asarray(coordinate_px, dtype=float).T
        block = Block({"rlnCoordinateX": x, "rlnCoordinateY": y} | columns)
        write_blocks(self.folder / f"{name}_picks.star", {"": block})

    def micrographs(self, names: tuple[str, ...], **columns: np.ndarray) -> Micrographs:
        n = len(names)
        given = {
            "path": np.array([str(self.folder / f"{name}.mrc") for name in names]),
            "optics_row": np.zeros(n), "coordinates_path": np.array([f"{name}_picks.star" for name in names]),
            "defocus_u_A": 1e4 + np.arange(n), "defocus_v_A": 9e3 + np.arange(n),
            "defocus_angle_deg": 10.0 + np.arange(n), "ctf_resolution_A": 4.0 + np.arange(n),
        }  # fmt: skip
        return Micrographs(given | columns, OPTICS)

    def write_picks(self, names: tuple[str, ...] = NAMES, file: str = "picks.star", **columns: np.ndarray) -> Path:
        write_micrographs(self.folder / file, self.micrographs(names, **columns))
        return self.folder / file

    def write_particles(self, **columns: np.ndarray) -> Path:
        """The tiles with their truth, as a table of particles."""
        rows = np.arange(len(NAMES) * PER)
        names = np.repeat([str(self.folder / f"{name}.mrc") for name in NAMES], PER)
        particles = self.truth.take(rows).replace(
            micrograph=names, coordinate_px=np.tile(self.coordinate_px, (len(NAMES), 1)), **columns
        )
        star.write_particles(self.folder / "refined.star", particles)
        return self.folder / "refined.star"

    def go(self, out: str, **options: object) -> ExtractResult:
        given = {"picks": self.picks, "box_px": BOX, "background_diameter_A": DIAMETER_A, "workers": 2} | options
        return extract(ExtractOptions(out=self.folder / out, **given), progress=tiny.quiet)

    def expected(self, rows: np.ndarray | slice) -> np.ndarray:
        images = self.images[rows].copy()
        boxes.normalise(images, 12.0, None, None, np.arange(len(images)).astype(np.uint64))
        return images


@pytest.fixture
def field(tmp_path: Path, simulated: SimulateResult) -> Field:
    return Field(tmp_path / "field", simulated)


def images_of(store: Store) -> np.ndarray:
    return store.read(np.arange(store.n)).images


def contents(out: Path) -> dict[str, str]:
    """What a run makes, by digest."""
    stores = {path.name: open_store(path).fingerprint for path in sorted(out.glob("*.zarr"))}
    return stores | {"star": hashlib.sha256((out / "particles.star").read_bytes()).hexdigest()}


def test_the_particles_of_micrographs_come_back_white_on_dark_in_order(field: Field) -> None:
    result = field.go("out", dtype="float32")
    assert result.left_out == result.flagged == 0 and result.small is None
    np.testing.assert_allclose(images_of(result.store), field.expected(slice(0, 3 * PER)), atol=2e-4)
    particles = result.store.particles()
    assert particles["micrograph"].tolist() == np.repeat(field.micrographs(NAMES)["path"], PER).tolist()
    np.testing.assert_array_equal(particles["coordinate_px"], np.tile(field.coordinate_px, (3, 1)))
    np.testing.assert_array_equal(particles["defocus_v_A"], np.repeat([9000.0, 9001.0, 9002.0], PER))
    assert particles.extra["rlnCtfMaxResolution"].tolist() == np.repeat(["4", "5", "6"], PER).tolist()
    assert result.store.pixel_size_A == PIXEL_A and particles.optics["box_px"] == [BOX]
    assert "half" not in particles and len(np.unique(identities(particles))) == 3 * PER
    written = star.read_particles(result.out / "particles.star")
    np.testing.assert_array_equal(identities(written), identities(particles))
    np.testing.assert_array_equal(written["defocus_u_A"], particles["defocus_u_A"])
    assert not list((result.out / "items").glob("*.boxes")), "images that are in the store are there twice"
    examples = arrays_of(result.out, "second")["examples"]
    assert examples.shape == (12, BOX, BOX) and examples.dtype == np.float16
    np.testing.assert_allclose(examples, images_of(result.store)[PER : PER + 12], atol=5e-3)


def test_a_scaled_and_a_small_store_are_made_in_one_pass(field: Field) -> None:
    result = field.go("out", scale_px=24, small_box_px=16)
    assert result.small is not None
    for store, size in ((result.store, 24), (result.small, 16)):
        assert store.box_px == size and store.pixel_size_A == PIXEL_A * BOX / size and store.n == 3 * PER
        alone = field.go(f"alone{size}", scale_px=size).store
        assert alone.fingerprint == store.fingerprint
    particles, small = result.store.particles(), result.small.particles()
    np.testing.assert_array_equal(identities(particles), identities(small))
    np.testing.assert_array_equal(identities(particles), identities(field.go("plain").store.particles()))


def test_relions_lists_and_boxes_of_eman_are_the_same_picks(field: Field) -> None:
    plain = images_of(field.go("out").store)
    table = field.folder / "micrographs.star"
    write_micrographs(table, field.micrographs(NAMES))
    corner = field.coordinate_px - BOX / 2
    lines = [f"{x:g}\t{y:g}\t{BOX}\t{BOX}\n" for x, y in corner.tolist()]
    (field.folder / "second.box").write_text("".join(lines))
    listed = {
        "rlnMicrographName": field.micrographs(NAMES)["path"],
        "rlnMicrographCoordinates": np.array(["first_picks.star", "second.box", "third_picks.star"]),
    }
    write_blocks(field.folder / "autopick.star", {"coordinate_files": Block(listed)})
    result = field.go("listed", picks=field.folder / "autopick.star", micrographs=table)
    np.testing.assert_array_equal(images_of(result.store), plain)
    np.testing.assert_array_equal(result.store.particles()["defocus_v_A"], np.repeat([9000.0, 9001.0, 9002.0], PER))
    with pytest.raises(InputError, match="--micrographs"):
        field.go("without", picks=field.folder / "autopick.star")
    write_micrographs(table, field.micrographs(NAMES[:2]))
    with pytest.raises(InputError, match=r"third.mrc is not in .*micrographs.star"):
        field.go("other", picks=field.folder / "autopick.star", micrographs=table)


def test_columns_of_the_picks_are_kept_and_their_own_defocus_counts(field: Field) -> None:
    merit = np.linspace(0, 1, PER)
    for name in NAMES:
        field.write_coordinates(
            name, field.coordinate_px, rlnDefocusU=2e4 + np.arange(PER), rlnAutopickFigureOfMerit=merit,
            rlnAnglePsi=np.zeros(PER), **({"rlnOdd": np.ones(PER)} if name == "first" else {}),
        )  # fmt: skip
    particles = field.go("out").store.particles()
    np.testing.assert_array_equal(particles["defocus_u_A"], np.tile(2e4 + np.arange(PER), 3))
    np.testing.assert_array_equal(particles["defocus_v_A"][::PER], [9000, 9001, 9002])
    np.testing.assert_allclose(particles.extra["rlnAutopickFigureOfMerit"].astype(float), np.tile(merit, 3), atol=1e-9)
    assert "rlnAnglePsi" in particles.extra and "rlnOdd" not in particles.extra


def test_extracted_again_particles_keep_what_is_known_of_them_and_refine(field: Field, reference: Path) -> None:
    source = field.write_particles(half=1 + np.arange(3 * PER) % 2)
    result = field.go("out", picks=source)
    particles, before = result.store.particles(), star.read_particles(source)
    np.testing.assert_allclose(images_of(result.store), field.expected(slice(0, 3 * PER)), atol=2e-2)
    for name in ("rotation", "origin_A", "half", "defocus_u_A", "coordinate_px"):
        np.testing.assert_array_equal(particles[name], before[name])
    np.testing.assert_array_equal(identities(particles), identities(field.go("picked").store.particles()))
    store = str(result.store.path)
    stack = field.folder / "exported.star"
    words = ["refine", store, "--reference", str(reference), "--max-iterations", "2", "--out"]
    assert cli.main(["info", store]) == 0
    assert cli.main([*words, str(field.folder / "refined")]) == 0
    assert cli.main(["export", store, "--out", str(stack), "--stack"]) == 0
    np.testing.assert_array_equal(
        mrc.open_stack(stack.with_suffix(".mrcs")).read(np.arange(108)), images_of(result.store)
    )
    again = field.go("again", picks=field.folder / "refined" / "particles.star", recenter=True)
    assert again.store.n + again.left_out == 3 * PER and "rotation" in again.store.particles()
    assert np.abs(again.store.particles()["origin_A"]).max() <= PIXEL_A / 2 + 1e-6


def test_recentred_boxes_lie_on_the_refined_centre(field: Field) -> None:
    source = field.write_particles(origin_A=np.tile([5.2 * PIXEL_A, -2.7 * PIXEL_A], (3 * PER, 1)))
    result = field.go("out", picks=source, box_px=16, recenter=True, background_diameter_A=12 * PIXEL_A)
    particles = result.store.particles()
    np.testing.assert_allclose(particles["coordinate_px"][:PER], field.coordinate_px - [5, -3], atol=1e-9)
    np.testing.assert_allclose(particles["origin_A"], np.tile([0.2 * PIXEL_A, 0.3 * PIXEL_A], (3 * PER, 1)), atol=1e-6)
    raw = -field.images[:PER, 11:27, 3:19].copy()
    boxes.normalise(raw, 6.0, None, None, np.arange(PER).astype(np.uint64))
    np.testing.assert_allclose(images_of(result.store)[:PER], -raw, atol=2e-2)
    turned = field.go("at", picks=source, box_px=16, recenter_at_A=(6.0, 0.0, 0.0), background_diameter_A=12 * PIXEL_A)
    particles = turned.store.particles()
    centre = boxes.centres(particles["coordinate_px"]) - particles["origin_A"] / PIXEL_A
    wanted = np.tile(boxes.centres(field.coordinate_px), (3, 1)) - [5.2, -2.7] + particles["rotation"][:, :2, 0]
    np.testing.assert_allclose(centre, wanted, atol=1e-6)
    with pytest.raises(InputError, match="recentring takes refined particles"):
        field.go("picked", recenter=True)


@pytest.mark.parametrize("how", [{"workers": 1}, {"cluster": "synchronous"}, {"cluster": "processes"}])
def test_the_bits_are_the_same_wherever_it_runs(field: Field, how: dict) -> None:
    picked = {"white_dust_sd": 3.0, "small_box_px": 16}
    field.go("two", **picked)
    field.go("other", **picked, **({"workers": 2} | how))
    assert contents(field.folder / "two") == contents(field.folder / "other")


def test_the_order_is_that_of_the_table_and_not_that_of_completion(field: Field, monkeypatch) -> None:
    field.go("out")
    before = job.extract_micrograph

    def delayed(item: job.Picked, *arguments: object):
        time.sleep({"first": 0.5, "second": 0.2, "third": 0.0}[item.name])
        return before(item, *arguments)

    monkeypatch.setattr(job, "extract_micrograph", delayed)
    field.go("late", workers=3)
    assert contents(field.folder / "late") == contents(field.folder / "out")
    turned = field.go("turned", picks=field.write_picks(NAMES[::-1], "turned.star")).store
    np.testing.assert_array_equal(
        images_of(turned)[:PER], images_of(open_store(field.folder / "out" / job.STORES[0]))[2 * PER :]
    )


@pytest.mark.parametrize(
    "dies_at",
    [
        ("dcryo.jobs.micrographs", "commit", 2),
        ("dcryo.data.store_writer:Writer", "write", 2),
        ("dcryo.data.store_writer:Writer", "finish", 1),
        ("dcryo.data.store_writer:Writer", "finish", 2),
        ("dcryo.data.star", "write_particles", 1),
    ],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    field: Field, dies_at: tuple[str, str, int], monkeypatch
) -> None:
    constants = {"dcryo.data.store_writer:SHARD_BYTES": 1 << 15, "dcryo.data.store_writer:CHUNK_BYTES": 1 << 13}
    for name, value in constants.items():
        monkeypatch.setattr(name.replace(":", "."), value)
    field.go("out", small_box_px=16)
    out = field.folder / "killed"
    words = ["extract", str(field.picks), "--box", str(BOX), "--background-diameter", str(DIAMETER_A)]
    words += ["--small-box", "16", "--workers", "1", "--out", str(out)]
    process = tiny.started(tiny.command, words, constants, dies_at)
    process.join(100)
    assert process.exitcode == -9
    done = {path: path.stat().st_mtime_ns for path in (out / "items").glob("*.json")}
    assert len(done) == (1 if dies_at[1] == "commit" else 3)
    assert cli.main([*words, "--resume"]) == 0
    assert contents(out) == contents(field.folder / "out")
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "a micrograph was done twice"
    assert sorted(path.name for path in (out / "items").iterdir()) == sorted(
        f"{name}{ending}" for name in NAMES for ending in (".json", ".npz")
    )


def test_more_picks_later_make_the_store_of_one_call_over_all(field: Field) -> None:
    field.go("all", small_box_px=16)
    field.write_picks(("first", "third"))
    field.go("out", small_box_px=16)
    first = {path: path.stat().st_mtime_ns for path in (field.folder / "out" / "items").glob("*.json")}
    # The defocus of the third micrograph changes too, as its row does.
    field.write_picks()
    result = field.go("out", small_box_px=16, resume=True)
    assert result.store.n == 3 * PER
    assert contents(field.folder / "out") == contents(field.folder / "all")
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())
    stored = {path: path.stat().st_mtime_ns for path in (field.folder / "out").glob("*.zarr/zarr.json")}
    field.go("out", small_box_px=16, resume=True)
    assert all(path.stat().st_mtime_ns == when for path, when in stored.items()), "made anew without need"


def test_changed_picks_and_lost_images_are_done_again(field: Field) -> None:
    field.go("out")
    field.write_coordinates("second", field.coordinate_px[3:7])
    assert field.go("out", resume=True).store.n == 2 * PER + 4
    assert contents(field.folder / "out") == contents(field.go("all").out)
    (field.folder / "out" / job.STORES[0] / "zarr.json").unlink()
    assert field.go("out", resume=True).store.n == 2 * PER + 4
    assert contents(field.folder / "out") == contents(field.folder / "all")


def test_bad_micrographs_are_flagged_and_the_rest_goes_on(field: Field) -> None:
    whole = field.go("whole").store
    names = ("zero", "first", "gone", "nan", "set_aside", "unpicked", "third", "other")
    for name in ("zero", "nan", "set_aside", "unpicked", "other"):
        field.write(name, np.zeros((64, 64)))
        field.write_coordinates(name, field.coordinate_px[:2])
    field.write("set_aside", -np.random.Generator(np.random.Philox(1)).standard_normal((96, 96)))
    blank = bytearray((field.folder / "nan.mrc").read_bytes())
    blank[1024:] = np.full(64 * 64, np.nan, np.float32).tobytes()
    (field.folder / "nan.mrc").write_bytes(blank)
    (field.folder / "unpicked_picks.star").unlink()
    (field.folder / "other_picks.star").write_text("data_\n\nloop_\n_rlnCoordinateX #1\n1.0\n\n")
    field.write_coordinates("gone", field.coordinate_px[:2])
    flag = np.array(["", "", "", "", "ice", "", "", ""])
    picks = field.write_picks(names, "bad.star", flag=flag)
    result = field.go("out", picks=picks)
    assert result.store.n == 2 * PER and result.flagged == 6
    np.testing.assert_array_equal(images_of(result.store), images_of(whole)[np.r_[0:PER, 2 * PER : 3 * PER]])
    reasons = {row["image"]: row["reason"] for row in Run.open(result.out).record["quarantined"]}
    assert "every pixel is 0" in reasons["zero"] and "finite" in reasons["nan"] and reasons["set_aside"] == "ice"
    assert "gone.mrc" in reasons["gone"] and "unpicked_picks.star" in reasons["unpicked"]
    assert "_rlnCoordinateY" in reasons["other"]
    kept = field.go("kept", picks=picks, keep_flagged=True)
    assert kept.store.n == 2 * PER + 2 and kept.flagged == 5


def test_picks_that_cannot_be_used_are_left_out_with_the_reason(field: Field) -> None:
    image = mrc.read_map(field.folder / "second.mrc").array[0].copy()
    image[0:BOX, BOX : 2 * BOX] = 7.0
    image[100, 10] = np.nan
    header = (field.folder / "second.mrc").read_bytes()[:1024]
    (field.folder / "second.mrc").write_bytes(header + image.astype(np.float32).tobytes())
    edges = np.array([[3.0, 50.0], [500.0, 50.0]])
    field.write_coordinates("second", np.concatenate([edges, field.coordinate_px]))
    result = field.go("out")
    assert result.store.n == 3 * PER - 2 and result.left_out == 4
    left = result.store.quarantined
    assert [entry["row"] for entry in left] == [PER + 1, PER + 2, PER + 4, PER + 21]
    told = ("reaches beyond the micrograph of 192 x 192", "is outside", "constant", "1 pixels are NaN")
    assert all(word in entry["reason"] for word, entry in zip(told, left, strict=True))
    assert left[0]["image"].endswith("second.mrc at 3, 50")
    replicated = field.go("replicated", edge="replicate")
    assert replicated.store.n == 3 * PER - 1 and "4 picks" in result.summary()
    with pytest.raises(RunError, match="no particle was extracted; the first of"):
        field.go("none", box_px=4 * ACROSS * BOX)


def test_of_picks_that_are_too_near_the_better_stays(field: Field) -> None:
    coordinate = np.array([[50.0, 50.0], [52.0, 50.0], [100.0, 100.0], [100.0, 103.0], [54.5, 50.0]])
    for name in NAMES:
        field.write_coordinates(name, coordinate, rlnAutopickFigureOfMerit=np.array([0.1, 0.5, 0.4, 0.3, 0.2]))
    result = field.go("out", min_distance_A=3.5 * PIXEL_A)
    np.testing.assert_array_equal(result.store.particles()["coordinate_px"], np.tile(coordinate[[1, 2]], (3, 1)))
    assert result.left_out == 9 and "nearer than 21 A" in result.store.quarantined[0]["reason"]
    field.go("out2", min_distance_A=2.0 * PIXEL_A)
    assert open_store(field.folder / "out2" / job.STORES[0]).n == 15


def test_the_store_is_made_when_a_watched_run_is_told_to_stop(field: Field, monkeypatch) -> None:
    monkeypatch.setattr(watching, "_POLL_S", 0.02)
    monkeypatch.setattr(watching, "_SETTLED_S", 0.0)
    field.go("all")
    field.picks.unlink()
    out = field.folder / "out"
    results: list[ExtractResult] = []
    thread = threading.Thread(target=lambda: results.append(field.go("out", watch=True)))
    thread.start()
    wait_for(lambda: (out / "run.json").is_file())
    # A micrograph that is not there yet is waited for.
    (field.folder / "second.mrc").rename(field.folder / "later")
    field.write_picks(("first",))
    wait_for(lambda: (out / "items" / "first.json").is_file())
    field.write_picks()
    wait_for(lambda: (out / "items" / "third.json").is_file())
    assert not (out / job.STORES[0]).exists()
    (field.folder / "later").rename(field.folder / "second.mrc")
    wait_for(lambda: (out / "items" / "second.json").is_file())
    (out / watching.STOP).touch()
    thread.join(30)
    assert results and contents(out) == contents(field.folder / "all")


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scale_px": 64}, "at most the box"),
        ({"normalise": False}, "--dtype float32"),
        ({"normalise": False, "dtype": "float32", "white_dust_sd": 5.0}, "deviation of the background"),
        ({"background_diameter_A": 1000.0}, "192 A wide"),
        ({"micrographs": Path("x.star")}, "leave it out"),
        ({"picks": Path("nothing.star")}, "cannot be read"),
    ],
)
def test_bad_options_are_refused_before_work_starts(field: Field, options: dict, told: str) -> None:
    with pytest.raises((InputError, ValueError), match=told):
        field.go("out", **options)
    assert not (field.folder / "out").exists()


def test_what_it_reads_may_not_lie_in_what_it_writes(field: Field) -> None:
    source = field.write_particles()
    with pytest.raises(InputError, match="change --out"):
        extract(ExtractOptions(picks=source, box_px=BOX, out=field.folder, overwrite=True), progress=tiny.quiet)
    assert source.is_file()


def test_a_micrograph_without_a_usable_box_is_no_obstacle(field: Field) -> None:
    spot = np.full((ACROSS * BOX, ACROSS * BOX), 5.0)
    spot[BOX // 2, BOX // 2] = 9.0
    field.write("second", spot)
    field.write_coordinates("third", np.zeros((0, 2)))
    result = field.go("out")
    assert result.store.n == PER and result.left_out == PER and result.flagged == 0
    assert {entry["reason"] for entry in result.store.quarantined} == {
        "its background is constant", "constant, every pixel is 5",
    }  # fmt: skip


def test_grey_values_are_kept_where_they_are_not_normalised(field: Field) -> None:
    result = field.go("out", normalise=False, invert=False, dtype="float32", background_diameter_A=None)
    np.testing.assert_array_equal(images_of(result.store)[:PER], np.float32(50.0) - 3.0 * field.images[:PER])


def test_the_record_and_the_table_say_what_was_done(field: Field) -> None:
    words = ["extract", str(field.picks), "--box", str(BOX), "--out", str(field.folder / "out")]
    assert cli.main(words) == 0
    record = json.loads((field.folder / "out" / "run.json").read_text())
    assert record["result"] == {
        "particles": 3 * PER, "left_out": 0, "micrographs": 3, "flagged": 0, "box_px": BOX, "pixel_size_A": PIXEL_A,
    }  # fmt: skip
    page = (field.folder / "out" / "report.html").read_text()
    assert "Extracted particles" in page and "Could not be shown" not in page
    assert "Particles of micrographs from all over the run" in page and "Defocus" in page
    assert read_micrographs(field.picks)["path"].tolist() == field.micrographs(NAMES)["path"].tolist()
