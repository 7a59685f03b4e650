"""Particles on their way to cryoSPARC and back, through the store, as its own library reads them."""

from pathlib import Path

import numpy as np
import pytest
from cryosparc.dataset import Dataset
from scipy.spatial.transform import Rotation
from tiny import quiet

from dcryo.data import cs, mrc, star
from dcryo.data.particles import Particles
from dcryo.jobs.exchange import ExportOptions, ImportOptions, export_particles, import_particles
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels.rotations import angle_between_deg

# Every fixture with poses: several optics groups and pixel sizes, odd boxes, downsampled images, RELION 3.0 to 5.
WITH_POSES = [
    "bgal_empiar10204/derived_relion_poses.star",
    "cryodrgn_real/relion31.6opticsgroups.star",
    "cryodrgn_real/relion31.star",
    "cryodrgn_real/relion5.star",
    "meta/topaz_empiar10025_particles.star",
    "relion_project_70S/rln_proj_65_shifted.star",
    "relion_project_pointmass/relion_proj_batch_pfac2.star",
    "star_syntax/one_loop.star",
]
BOX_WHERE_NONE_IS_SAID = 16


def bring(source: Path, store: Path, root: Path) -> Path:
    result = import_particles(ImportOptions(source=source, out=store, root=root), progress=quiet)
    assert result.quarantined == []
    return store


def send(source: Path, out: Path, **options) -> Path:
    return export_particles(ExportOptions(source=source, out=out, **options), progress=quiet).path


def make_stacks(particles: Particles, root: Path) -> None:
    """Stacks under the names that the table has, with noise where it names an image and holes elsewhere."""
    box = int(particles.optics.get("box_px", [BOX_WHERE_NONE_IS_SAID])[0])
    noise = np.random.Generator(np.random.Philox(4)).integers(-100, 100, (box, box), dtype=np.int8)
    for name in np.unique(particles["image_path"]).tolist():
        numbers = particles["image_index"][particles["image_path"] == name]
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header_of_bytes(box, int(numbers.max()) + 1))
        with path.open("r+b") as file:
            for number in numbers.tolist():
                file.seek(mrc.HEADER_BYTES + number * box * box)
                file.write(noise.tobytes())
            file.truncate(mrc.HEADER_BYTES + (int(numbers.max()) + 1) * box * box)


def header_of_bytes(box: int, images: int) -> bytes:
    """Header of a stack of signed bytes (mode 0)."""
    header = np.zeros(256, "<i4")
    header[:4] = box, box, images, 0
    header[7:10] = box, box, images
    header[10:13] = np.array([box, box, images], "<f4").view("<i4")
    header[16:19] = 1, 2, 3
    header[52] = int.from_bytes(b"MAP ", "little")
    header[53] = 0x4444
    return header.tobytes()


@pytest.mark.parametrize("name", WITH_POSES)
def test_star_store_cs_store_star_keeps_poses_and_shifts(name: str, shared_data: Path, tmp_path: Path) -> None:
    before = star.read_particles(shared_data / name)
    make_stacks(before, tmp_path)
    first = bring(shared_data / name, tmp_path / "first.zarr", tmp_path)
    sent = send(first, tmp_path / "particles.cs")
    second = bring(sent, tmp_path / "second.zarr", tmp_path)
    after = star.read_particles(send(second, tmp_path / "after.star"))

    np.testing.assert_array_equal(after["image_path"], before["image_path"])
    np.testing.assert_array_equal(after["image_index"], before["image_index"])
    assert angle_between_deg(after["rotation"], before["rotation"]).max() < 1e-4
    if "origin_A" in before:
        assert np.abs(before["origin_A"]).max() > 0
        np.testing.assert_allclose(after["origin_A"], before["origin_A"], atol=1e-3, rtol=0)
    if "half" in before and before["half"].all():
        np.testing.assert_array_equal(after["half"], before["half"])
    for column, tolerance in {"defocus_u_A": 0.01, "defocus_v_A": 0.01, "defocus_angle_deg": 1e-4}.items():
        if column in before:
            np.testing.assert_allclose(after[column], before[column], atol=tolerance, rtol=0)
    for column in ("pixel_size_A", "voltage_kV", "spherical_aberration_mm"):
        if column in before.optics:
            np.testing.assert_allclose(after.optics_of(column), before.optics_of(column), rtol=1e-6)

    rows = Dataset.load(str(sent))
    # What tells particles apart is made of their images' names, which some tables name twice.
    images = set(zip(before["image_path"].tolist(), before["image_index"].tolist(), strict=True))
    assert len(rows) == len(before) and len(np.unique(rows["uid"])) == len(images)
    np.testing.assert_array_equal(rows["blob/idx"], before["image_index"])
    assert {"alignments3D/pose", "blob/psize_A", "ctf/exp_group_id"} <= set(rows.fields())


def test_poses_found_on_downsampled_images_count_their_own_pixels(shared_data: Path, tmp_path: Path) -> None:
    rows = Dataset.load(str(shared_data / "cryodrgn_real" / "cryosparc_P12_J24_001_particles.cs")).slice(0, 40)
    shift_A = rows["alignments3D/shift"] * rows["alignments3D/psize_A"][:, None]
    for name, factor in (("own", 1.0), ("downsampled", 2.5)):
        table = rows.copy()
        table["alignments3D/psize_A"] = rows["alignments3D/psize_A"] * factor
        table["alignments3D/shift"] = rows["alignments3D/shift"] / factor
        with (tmp_path / f"{name}.cs").open("wb") as file:
            table.save(file)
        make_stacks(cs.read_particles(tmp_path / f"{name}.cs"), tmp_path)
        store = bring(tmp_path / f"{name}.cs", tmp_path / f"{name}.zarr", tmp_path)
        particles = star.read_particles(send(store, tmp_path / f"{name}.star"))
        np.testing.assert_allclose(particles["origin_A"], shift_A, atol=1e-3, rtol=0)
        again = Dataset.load(str(send(store, tmp_path / f"{name}_again.cs")))
        for field in ("uid", "alignments3D/split", "ctf/df_angle_rad", "ctf/df1_A", "blob/sign", "blob/idx"):
            np.testing.assert_array_equal(again[field], rows[field], err_msg=field)
        turn = Rotation.from_rotvec(again["alignments3D/pose"]) * Rotation.from_rotvec(rows["alignments3D/pose"]).inv()
        assert np.rad2deg(turn.magnitude()).max() < 1e-4
        np.testing.assert_allclose(
            again["alignments3D/shift"] * again["alignments3D/psize_A"][:, None], shift_A, atol=1e-3
        )


def test_a_refinements_particles_load_in_cryosparc_tools(tmp_path: Path) -> None:
    data = simulate(
        SimulateOptions(
            model="phantom", symmetry="C4", diameter_A=90.0, particles=80, box_px=32, pixel_size_A=4.0, snr=1.0,
            out=tmp_path / "simulated",
        ),
        progress=quiet,
    )  # fmt: skip
    store = bring(data.particles_star, tmp_path / "particles.zarr", data.particles_star.parent)
    refined = refine(
        RefineOptions(
            store=store, reference=data.truth_map, symmetry="C4", mask_diameter_A=110.0, max_iterations=2,
            out=tmp_path / "refined",
        ),
        progress=quiet,
    )  # fmt: skip
    path = send(refined.out, tmp_path / "sent" / "particles.cs", stack=True)
    rows = Dataset.load(str(path))
    assert len(rows) == 80
    np.testing.assert_array_equal(rows["blob/path"], str(tmp_path / "sent" / "particles.mrcs"))
    np.testing.assert_array_equal(rows["blob/idx"], np.arange(80))
    np.testing.assert_array_equal(rows["blob/shape"], 32)
    np.testing.assert_array_equal(rows["alignments3D/split"] + 1, refined.particles["half"])
    np.testing.assert_allclose(rows["alignments3D/shift"] * 4.0, refined.particles["origin_A"], atol=1e-3)
    # Other slots that cryoSPARC's jobs ask for are whole.
    assert {"ctf/type", "ctf/tilt_A", "ctf/anisomag", "alignments3D/alpha", "alignments3D/class"} <= set(rows.fields())
    # And on the way back they are the same particles at the same poses.
    again = import_particles(ImportOptions(source=path, out=tmp_path / "again.zarr"), progress=quiet).store.particles()
    assert angle_between_deg(again["rotation"], refined.particles["rotation"]).max() < 1e-4
    np.testing.assert_allclose(again["ctf_scale"], refined.particles["ctf_scale"], rtol=1e-6)
