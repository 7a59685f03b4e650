"""Where aberrations are honoured, and where they cannot be, jobs say so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data import cs, star
from dcryo.data.particles import Particles
from dcryo.data.store import Store
from dcryo.errors import InputError
from dcryo.jobs.dataset import Shard, cut_shards, load_dataset
from dcryo.jobs.exchange import ExportOptions, ImportOptions, InfoOptions, describe, export_particles, import_particles
from dcryo.kernels import rings
from dcryo.kernels.ctf import ctf
from dcryo.kernels.shells import half_plane

TILT = {"beam_tilt_x_mrad": np.array([0.0, 8.0]), "beam_tilt_y_mrad": np.array([0.0, -5.0])}
EVEN = {"even_zernike": np.array([[0.0, 0.0, 0.0], [0.3, 90.0, -60.0]])}
MAGNIFICATION = {"magnification": np.array([np.eye(2), [[0.96, 0.0], [0.0, 1.04]]])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("aberrations")
    tiny.simulated(made / "simulated", 40)
    return made


def in_two_groups(folder: Path, **optics: np.ndarray) -> Particles:
    """The simulated particles, the second half of them in a group of other optics."""
    known = star.read_particles(folder / "simulated" / "truth.star")
    twice = {name: np.repeat(column, 2) for name, column in known.optics.items() if name not in ("group", "name")}
    rows = (np.arange(len(known)) >= 20).astype(np.int32)
    return Particles(known.columns | {"optics_row": rows}, twice | optics, known.extra)


def stored(folder: Path, out: Path, **optics: np.ndarray) -> Store:
    table = folder / "simulated" / f"{out.stem}.star"
    star.write_particles(table, in_two_groups(folder, **optics), None)
    return tiny.imported(table, out)


def shard_of(store: Store) -> Shard:
    data = load_dataset(store.path, 0)
    ones = np.ones(len(data.particles))
    return cut_shards(data, 1, ones, ones, data.rotation, data.origin_px, ones > 0)[0]


def test_groups_without_aberrations_keep_their_bits(folder: Path, tmp_path: Path) -> None:
    plain = shard_of(stored(folder, tmp_path / "plain.zarr"))
    other = shard_of(stored(folder, tmp_path / "other.zarr", **TILT, **EVEN, **MAGNIFICATION))
    every = slice(None)
    (before, _), (after, _) = plain.read(every), other.read(every)
    changed = other.group == 1
    assert changed.any() and not changed.all()
    for one, two in ((before.images, after.images), (before.ctf, after.ctf), (before.origin_px, after.origin_px)):
        np.testing.assert_array_equal(one[~changed], two[~changed])
        assert all((a != b).any() for a, b in zip(one[changed], two[changed], strict=True))
    np.testing.assert_array_equal(before.images, plain.store.read(plain.rows).images)


def test_even_phases_are_in_the_ctf_of_pixels_and_of_rings(folder: Path, tmp_path: Path) -> None:
    shard = shard_of(stored(folder, tmp_path / "a.zarr", **EVEN))
    pixels, width_A = half_plane(tiny.BOX_PX // 2), tiny.WIDTH_A
    x, y = pixels.kx / width_A, pixels.ky / width_A
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    phase = 0.3 + 90 * radius**2 * np.sin(2 * angle) - 60 * (2 * radius**2 - 1)
    last = len(shard.rows) - 1
    assert shard.group[last] == 1
    columns = [column[last] for column in shard.ctf]
    expected = ctf(pixels.kx, pixels.ky, tiny.BOX_PX, *columns, even_phase_rad=phase)[0]
    np.testing.assert_allclose(shard.transfer(slice(None))[last], expected, atol=1e-6)
    of = rings.rings(tiny.BOX_PX, 10, 20.0)
    on_rings = shard.transfer_on_rings(slice(None), of)[:, last]
    x, y = of.kx / width_A, of.ky / width_A
    phase = 0.3 + 90 * 2 * x * y - 60 * (2 * (x**2 + y**2) - 1)
    expected = ctf(of.kx.ravel(), of.ky.ravel(), tiny.BOX_PX, *columns, even_phase_rad=phase.ravel())
    np.testing.assert_allclose(on_rings, expected.reshape(of.kx.shape), atol=1e-6)


def test_a_magnification_that_no_microscope_has_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, matrix in (
        ("mirror", np.diag([1.0, -1.0])),
        ("percent", np.diag([101.0, 99.0])),
        ("none", np.zeros((2, 2))),
    ):
        store = stored(folder, tmp_path / f"{name}.zarr", magnification=np.array([np.eye(2), matrix]))
        with pytest.raises(InputError, match=r"magnification \(rlnMagMat00, ...\) of optics group 2"):
            load_dataset(store.path, 0)


def test_a_store_that_only_carries_aberrations_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(folder, tmp_path / "old.zarr")
    old = replace(store.particles(), optics_extra={"rlnOddZernike": np.array(["[0,0]", "[1,2]"])})
    monkeypatch.setattr(Store, "particles", lambda self: old)
    with pytest.raises(InputError, match="earlier version, which did not honour its rlnOddZernike; import its source"):
        load_dataset(store.path, 0)


def test_what_a_cs_file_does_not_hold_is_said(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def say(line: str, /, *, end: str = "\n") -> None:
        said.append(line)

    for name, optics in (("plain", {}), ("tilted", TILT)):
        store = stored(folder, tmp_path / f"{name}.zarr", **optics)
        out = folder / "simulated" / f"{name}.cs"
        export_particles(ExportOptions(source=store.path, out=out), progress=say)
        assert any("aberrations" in line for line in said) == (name == "tilted")
        import_particles(ImportOptions(source=out, out=tmp_path / f"{name}_again.zarr"), progress=say)
        assert not any("carried along" in line for line in said)
    rows = np.load(folder / "simulated" / "plain.cs")
    rows["ctf/tilt_A"] = 100.0
    with (folder / "simulated" / "moved.cs").open("wb") as file:
        np.lib.format.write_array(file, rows)
    assert cs.read_particles(folder / "simulated" / "moved.cs")
    out = tmp_path / "moved.zarr"
    import_particles(ImportOptions(source=folder / "simulated" / "moved.cs", out=out), progress=say)
    assert any("ctf/tilt_A are not zero: they are carried along, but not applied" in line for line in said)
    assert "ctf/tilt_A" in dict(describe(InfoOptions(path=out)).lines)["  not applied"]
