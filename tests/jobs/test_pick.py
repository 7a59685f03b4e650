"""Particles found in micrographs, simulated and real."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import small_micrographs as small
import tiny

from dcryo import cli
from dcryo.data import micrographs, mrc
from dcryo.data.coordinates import Coordinates, read_coordinates, write_coordinates
from dcryo.data.items import arrays_of
from dcryo.data.particles import Micrographs
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.pick import PickOptions, PickResult, pick
from dcryo.kernels.matching import matched
from dcryo.kernels.symmetry import operators
from dcryo.report import write_report
from dcryo.steps import picking

SHAPE = (300, 340)
COUNT = 3


def picked(source: Path | list[Path], out: Path, **options: object) -> PickResult:
    paths = tuple(source) if isinstance(source, list) else (source,)
    given = {"diameter_A": small.DIAMETER_A, "edge_A": 0.0} | options
    return pick(PickOptions(micrographs=paths, out=out, **given), progress=tiny.quiet)


@pytest.fixture(scope="module")
def truth() -> list[small.Simulated]:
    return [small.simulated(30, 0.3, seed, shape=SHAPE) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def source(truth: list[small.Simulated], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Micrographs with a table as `dcryo ctf` leaves one, and a fourth that is flagged there; labels beside them."""
    folder = tmp_path_factory.mktemp("micrographs")
    for number, one in enumerate([*truth, truth[0]]):
        mrc.write_map(folder / f"m{number}.mrc", one.image[None], small.PIXEL_A)
        write_coordinates(folder / f"m{number}.star", Coordinates(one.at_px))
    n = COUNT + 1
    columns = {
        "path": np.array([str(folder / f"m{number}.mrc") for number in range(n)]),
        "optics_row": np.zeros(n),
        "defocus_u_A": np.full(n, small.DEFOCUS_A),
        "defocus_v_A": np.full(n, small.DEFOCUS_A),
        "defocus_angle_deg": np.zeros(n),
        "flag": np.array([""] * COUNT + ["no rings"]),
    }
    optics = {
        "group": np.ones(1),
        "micrograph_pixel_size_A": np.array([small.PIXEL_A]),
        "voltage_kV": np.array([small.VOLTAGE_KV]),
        "spherical_aberration_mm": np.array([small.CS_MM]),
        "amplitude_contrast": np.array([small.AMPLITUDE]),
    }
    micrographs.write_micrographs(folder / "micrographs.star", Micrographs(columns, optics))
    return folder / "micrographs.star"


@pytest.fixture(scope="module")
def result(source: Path, tmp_path_factory: pytest.TempPathFactory) -> PickResult:
    return picked(source, tmp_path_factory.mktemp("pick") / "out", labels=source.parent, write_box_px=48)


def test_the_table_leads_to_micrograph_ctf_and_coordinates(result: PickResult, truth: list[small.Simulated]) -> None:
    table = result.table
    assert len(table) == result.micrographs == COUNT and table["picks"].sum() == result.picks
    assert table["defocus_u_A"].tolist() == [small.DEFOCUS_A] * COUNT
    for row, one in enumerate(truth):
        path = micrographs.find(table["coordinates_path"][row], result.out / "picks.star")
        found = read_coordinates(path)
        assert len(found) == table["picks"][row]
        right = matched(found.coordinate_px, one.at_px, 0.3 * small.DIAMETER_A / small.PIXEL_A).sum()
        assert right > 0.9 * len(one.at_px) and right > 0.9 * len(found)
        assert found.score is not None and (np.diff(found.score) <= 0).all()
        assert micrographs.find(table["path"][row], result.out / "picks.star").is_file()
        boxes = read_coordinates(result.out / f"m{row}.box").coordinate_px
        assert np.abs(boxes - found.coordinate_px).max() <= 0.5


def test_the_record_and_what_the_report_shows(result: PickResult) -> None:
    record = Run.open(result.out).record
    assert record["status"] == "done" and record["result"]["picks"] == result.picks
    item = json.loads((result.out / "items" / "m0.json").read_text())["values"]
    assert item.keys() == {"picks", "threshold", "coordinates_path", "masked_fraction"}
    arrays = arrays_of(result.out, "m0")
    assert arrays["preview"].dtype == np.float16 and max(arrays["preview"].shape) <= 400
    assert arrays["shape_px"].tolist() == [SHAPE[1], SHAPE[0]]
    assert arrays["coordinate_px"].shape == (item["picks"], 2) and arrays["coordinate_px"].dtype == np.float32
    assert arrays["score"].min() >= item["threshold"]
    assert arrays["excluded"].dtype == np.uint8 and arrays["excluded"].mean() == pytest.approx(item["masked_fraction"])


def test_labels_give_precision_and_recall(result: PickResult, truth: list[small.Simulated]) -> None:
    labels = Run.open(result.out).record["result"]["labels"]
    assert labels["labels"] == sum(len(one.at_px) for one in truth)
    assert labels["precision"] > 0.9 and labels["recall"] > 0.9
    precision, recall = labels["precision"], labels["recall"]
    assert labels["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    curve = labels["curve"]
    assert (np.diff(curve["threshold"]) < 0).all() and (np.diff(curve["recall"]) >= 0).all()
    assert f"f1 {labels['f1']:.3f}" in result.summary()


def test_the_report_draws_precision_and_recall(result: PickResult, tmp_path: Path) -> None:
    page = write_report(result.out).read_text()
    labels = Run.open(result.out).record["result"]["labels"]
    assert "Precision and recall" in page and f"F1 {labels['f1']:.3f}" in page
    assert "Could not be shown" not in page


def test_the_same_bits_from_processes_and_after_going_on(source: Path, result: PickResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    picked(source, out, cluster="processes", workers=2)
    (out / "items" / "m1.json").unlink()
    (out / "m1_coordinates.star").write_text("spoilt")
    before = (out / "m0_coordinates.star").stat().st_mtime_ns
    picked(source, out, resume=True)
    assert (out / "m0_coordinates.star").stat().st_mtime_ns == before
    for number in range(COUNT):
        name = f"m{number}_coordinates.star"
        assert (out / name).read_bytes() == (result.out / name).read_bytes()


def test_flagged_micrographs_are_picked_on_request(source: Path, tmp_path: Path) -> None:
    table = picked(source, tmp_path / "out", keep_flagged=True).table
    assert table["flag"].tolist() == [""] * COUNT + ["no rings"]


def test_what_has_no_particles_or_cannot_be_read_is_flagged(source: Path, tmp_path: Path) -> None:
    flat, cut, good = (tmp_path / f"{name}.mrc" for name in ("flat", "cut", "good"))
    mrc.write_map(flat, np.ones((1, 200, 200), np.float32), small.PIXEL_A)
    good.write_bytes((source.parent / "m0.mrc").read_bytes())
    cut.write_bytes(good.read_bytes()[:5000])
    result = picked([flat, cut, good], tmp_path / "out")
    assert [Path(path).name for path in result.table["path"]] == ["good.mrc"]
    rows = Run.open(result.out).record["quarantined"]
    assert [row["image"] for row in rows] == ["cut", "flat"]
    assert "constant" in rows[1]["reason"]


def test_templates_of_a_map_and_of_its_views(source: Path, truth: list[small.Simulated], tmp_path: Path) -> None:
    mrc.write_map(tmp_path / "map.mrc", small.volume(), small.PIXEL_A)
    options = {"in_plane_step_deg": 30.0, "template_order": 0}
    one = [source.parent / "m0.mrc"]
    of_map = picked(one, tmp_path / "map", templates=tmp_path / "map.mrc", **options)
    search = PickOptions(micrographs=(source,), out=tmp_path, diameter_A=small.DIAMETER_A).search
    views = picking.project(small.volume(), small.PIXEL_A, operators("C1"), 0, search, 20.0)
    with mrc.StackWriter(tmp_path / "views.mrcs", len(views), views.shape[-1], search.coarse_A) as writer:
        writer.write(0, views)
    of_views = picked(one, tmp_path / "views", templates=tmp_path / "views.mrcs", **options)
    for result in (of_map, of_views):
        found = read_coordinates(result.out / "m0_coordinates.star")
        right = matched(found.coordinate_px, truth[0].at_px, 0.3 * small.DIAMETER_A / small.PIXEL_A).sum()
        assert right > 0.9 * len(truth[0].at_px) and right > 0.9 * len(found)
        assert found.class_number is not None and 1 <= found.class_number.min() <= found.class_number.max() <= len(
            views
        )
        assert found.psi_deg is not None and set(found.psi_deg % 30) == {0.0}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give --diameter, or both"),
        (["--diameter", "100", "--smallest", "90", "--largest", "110"], "give --diameter, or both"),
        (["--smallest", "90"], "give --diameter, or both"),
        (["--smallest", "90", "--largest", "80"], "--smallest 90 is larger"),
        (["--diameter", "100", "--templates", "none.mrc"], "none.mrc"),
        (["--diameter", "100", "--labels", "none.star"], "none.star: no such file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], told: str
) -> None:
    assert cli.main(["pick", str(source), "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_templates_that_cannot_be_used_are_refused(source: Path, tmp_path: Path) -> None:
    with mrc.StackWriter(tmp_path / "empty.mrcs", 2, 32, 3.0) as writer:
        writer.write(0, np.zeros((2, 32, 32), np.float32))
    with pytest.raises(InputError, match="holds no image"):
        picked(source, tmp_path / "out", templates=tmp_path / "empty.mrcs")
    mrc.write_map(tmp_path / "map.mrc", small.volume(), 0.0)
    with pytest.raises(InputError, match="give --template-pixel-size"):
        picked(source, tmp_path / "out", templates=tmp_path / "map.mrc")


def test_apoferritin(shared_data: Path, tmp_path: Path) -> None:
    """Six real micrographs, one setting for all, against labels by hand."""
    folder = shared_data / "apof_empiar10146"
    images = sorted((folder / "avg").glob("*.png"))
    options = {"pixel_size_A": 1.5, "labels": folder / "gt_xy"}
    whole = picked(images, tmp_path / "whole", diameter_A=130.0, **options).labels
    assert whole is not None and whole["f1"] > 0.93
    # Labels near the edges are of particles that are cut off: with the default they are not picked.
    inner = picked(images, tmp_path / "inner", diameter_A=130.0, edge_A=None, **options).labels
    assert inner is not None and inner["precision"] > 0.95 and inner["f1"] > 0.88


def test_beta_galactosidase(shared_data: Path, tmp_path: Path) -> None:
    """One real micrograph with carbon and a frame of repeated pixels, against curated coordinates."""
    folder = shared_data / "bgal_empiar10017"
    labels = folder / "cryoppp_14_33_35.star"
    found = picked(list((folder / "images").glob("*.jpg")), tmp_path / "out", diameter_A=180.0, pixel_size_A=1.77,
                   labels=labels).labels  # fmt: skip
    assert found is not None and found["f1"] > 0.83 and found["recall"] > 0.85


def test_a_pixel_size_is_needed(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.zeros((300, 300), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="give --pixel-size"):
        picked([tmp_path / "a.png"], tmp_path / "out")
