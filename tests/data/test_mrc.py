import itertools
from pathlib import Path
from typing import Literal

import mrcfile
import numpy as np
import pytest

import dcryo
from dcryo.data import mrc
from dcryo.errors import InputError, RunError

RANDOM = np.random.Generator(np.random.Philox(key=11))


@pytest.mark.parametrize("name", ["EMD-3001.map", "EMD-3197.map"])
def test_archive_maps_as_mrcfile_reads_them(shared_data: Path, name: str) -> None:
    folder = shared_data / "mrc_format"
    found = mrc.read_map(folder / name)
    with mrcfile.open(folder / name) as peer:
        axes = [int(peer.header[axis]) for axis in ("mapc", "mapr", "maps")]
        # mrcfile leaves sections, rows and columns where they are.
        order = [axes[::-1].index(axis) for axis in (3, 2, 1)]
        np.testing.assert_array_equal(found.array, peer.data.transpose(order))
        start = [int(peer.header[axis]) for axis in ("nxstart", "nystart", "nzstart")]
        assert found.start_px == tuple(start[axes.index(axis)] for axis in (1, 2, 3))
        np.testing.assert_allclose(found.voxel_A, [peer.voxel_size[axis] for axis in "xyz"], rtol=1e-6)
    for packed in (folder / f"{name}.bz2", folder / f"{name.lower().replace('-', '_')}.gz"):
        np.testing.assert_array_equal(mrc.read_map(packed).array, found.array)


def test_voxels_that_are_no_cubes_are_refused_when_asked_for(shared_data: Path) -> None:
    crystal = mrc.read_map(shared_data / "mrc_format" / "EMD-3001.map")
    with pytest.raises(InputError, match=r"EMD-3001.*94\.3.*not cubes"):
        _ = crystal.voxel_size_A
    assert mrc.read_map(shared_data / "mrc_format" / "EMD-3197.map").voxel_size_A == 11.4
    assert mrc.read_map(shared_data / "maps" / "emd_1832.map").voxel_size_A == 5.7
    # The cell of this one is 0 x 0 x 0.
    assert mrc.read_map(shared_data / "relion_project_pointmass" / "pointmass.mrc").voxel_size_A == 0


def test_stack_of_relion_in_float16(shared_data: Path) -> None:
    path = next((shared_data / "bgal_empiar10204" / "Extract" / "job009" / "Movies").glob("*24*.mrcs"))
    stack = mrc.open_stack(path)
    assert (stack.n, stack.readable, stack.shape, stack.voxel_size_A) == (221, 221, (64, 64), 3.54)
    images = stack.read([220, 0, 0])
    assert images.dtype == np.float32
    with mrcfile.open(path) as peer:
        np.testing.assert_array_equal(images, peer.data[[220, 0, 0]].astype(np.float32))


@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_modes_and_byte_orders(tmp_path: Path, mode: int, dtype: str, order: str) -> None:
    values = RANDOM.normal(size=(2, 3, 4)) * 50
    values = (np.abs(values) if dtype == "u2" else values).astype(dtype)
    path = tmp_path / "map.mrc"
    with mrcfile.new(path) as file:
        file.set_data(values.astype(values.dtype.newbyteorder(order)))
        file.voxel_size = 1.25
        assert file.header.mode == mode
    found = mrc.read_map(path)
    np.testing.assert_array_equal(found.array, values.astype(np.float32))
    assert found.voxel_size_A == 1.25
    np.testing.assert_array_equal(mrc.open_stack(path).read([1])[0], values[1].astype(np.float32))


def test_bytes_of_imod_without_their_sign(tmp_path: Path) -> None:
    path = tmp_path / "bytes.mrc"
    with mrcfile.new(path) as file:
        file.set_data(np.array([[[-1, 5]]], dtype=np.int8))
    raw = bytearray(path.read_bytes())
    assert mrc.read_map(path).array.tolist() == [[[-1, 5]]]
    raw[152:160] = (1146047817).to_bytes(4, "little") + (0).to_bytes(4, "little")
    path.write_bytes(raw)
    assert mrc.read_map(path).array.tolist() == [[[255, 5]]]
    raw[156] = 1
    path.write_bytes(raw)
    assert mrc.read_map(path).array.tolist() == [[[-1, 5]]]


@pytest.mark.parametrize("axes", list(itertools.permutations((1, 2, 3))))
def test_every_axis_order(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    """A map of known f(x, y, z) comes out the same however its axes lie in the file."""
    size = {1: 2, 2: 3, 3: 4}  # along x, y, z
    z, y, x = np.meshgrid(*(np.arange(size[axis]) for axis in (3, 2, 1)), indexing="ij")
    truth = (x + 10 * y + 100 * z).astype(np.float32)
    path = tmp_path / "map.mrc"
    with mrcfile.new(path) as file:
        # Columns lie along axes[0] and are the last axis of the array; truth's axes are z, y, x.
        file.set_data(np.ascontiguousarray(truth.transpose([3 - axis for axis in axes[::-1]])))
        file.header.mapc, file.header.mapr, file.header.maps = axes
        file.header.nxstart, file.header.nystart, file.header.nzstart = (10 * axis for axis in axes)
        file.header.mx, file.header.my, file.header.mz = (size[axis] for axis in (1, 2, 3))
        file.header.cella.x, file.header.cella.y, file.header.cella.z = (2 * size[axis] for axis in (1, 2, 3))
    found = mrc.read_map(path)
    np.testing.assert_array_equal(found.array, truth)
    assert found.start_px == (10, 20, 30)
    assert found.voxel_size_A == 2


def test_written_map_is_valid_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = RANDOM.normal(size=(5, 6, 7)).astype(np.float32) + 3
    path = tmp_path / "map.mrc"
    mrc.write_map(path, array, 1.5, origin_A=(1.0, 2.0, 3.0), start_px=(-1, 0, 4))
    assert mrcfile.validate(path), capsys.readouterr().out
    with mrcfile.open(path) as peer:
        np.testing.assert_array_equal(peer.data, array)
        assert peer.is_volume() and peer.header.ispg == 1 and peer.header.mode == 2
        assert peer.voxel_size.tolist() == (1.5, 1.5, 1.5)
        np.testing.assert_allclose(
            [peer.header.dmin, peer.header.dmax, peer.header.dmean, peer.header.rms],
            [array.min(), array.max(), array.mean(dtype=float), array.std(dtype=float)],
            rtol=1e-6,
        )
        assert [label.strip() for label in peer.get_labels()] == [f"dcryo {dcryo.__version__}"]
    found = mrc.read_map(path)
    assert (found.voxel_size_A, found.origin_A, found.start_px) == (1.5, (1, 2, 3), (-1, 0, 4))
    mrc.write_map(tmp_path / "again.mrc", array, 1.5, origin_A=(1.0, 2.0, 3.0), start_px=(-1, 0, 4))
    assert (tmp_path / "again.mrc").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.mrc", "map.mrc"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_written_stack_does_not_depend_on_the_pieces(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = RANDOM.normal(size=(7, 9, 9)).astype(np.float32)
    one, many = tmp_path / "one.mrcs", tmp_path / "many.mrcs"
    with mrc.StackWriter(one, 7, 9, 1.25, dtype) as writer:
        writer.write(0, images)
    with mrc.StackWriter(many, 7, 9, 1.25, dtype) as writer:
        for start, end in ((5, 7), (0, 1), (1, 5)):
            writer.write(start, images[start:end])
        assert not many.exists()
    assert one.read_bytes() == many.read_bytes()
    assert mrcfile.validate(one), capsys.readouterr().out
    stored = images.astype(dtype)
    with mrcfile.open(one) as peer:
        np.testing.assert_array_equal(peer.data, stored)
        assert peer.is_image_stack() and peer.header.mode == {"float32": 2, "float16": 12}[dtype]
        values = stored.astype(np.float64)
        np.testing.assert_allclose(
            [peer.header.dmin, peer.header.dmax, peer.header.dmean, peer.header.rms],
            [values.min(), values.max(), values.mean(), values.std()],
            rtol=1e-5,
        )
    stack = mrc.open_stack(one)
    assert (stack.n, stack.readable, stack.voxel_size_A) == (7, 7, 1.25)
    np.testing.assert_array_equal(stack.read([3, 3, 0]), stored[[3, 3, 0]].astype(np.float32))


def test_a_stack_that_is_not_completed_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "stack.mrcs"
    path.write_bytes(b"before")
    images = np.zeros((2, 4, 4), np.float32)
    with pytest.raises(RunError, match=r"image 3 is missing \(1 in all\)"), mrc.StackWriter(path, 3, 4, 1) as writer:
        writer.write(0, images)
    with pytest.raises(KeyError), mrc.StackWriter(path, 2, 4, 1) as writer:
        writer.write(0, images)
        raise KeyError
    with pytest.raises(RunError, match=r"image 2 .*float32"), mrc.StackWriter(path, 2, 4, 1, "float16") as writer:
        writer.write(0, images)
        writer.write(1, images[:1] + 1e6)
    with pytest.raises(ValueError, match="do not fit"), mrc.StackWriter(path, 2, 4, 1) as writer:
        writer.write(1, images)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["stack.mrcs"]


def test_what_is_not_a_map_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "map.mrc"
    array = np.zeros((2, 2, 2))
    array[1, 0, 1] = np.nan
    for bad in (array, np.zeros((0, 2, 2))):
        with pytest.raises(RunError, match=r"map\.mrc.*not written"):
            mrc.write_map(path, bad, 1.0)
    with pytest.raises(RunError, match="nowhere"):
        mrc.write_map(tmp_path / "nowhere" / "map.mrc", np.ones((2, 2, 2)), 1.0)
    with pytest.raises(RunError, match="empty"):
        mrc.StackWriter(path, 0, 4, 1.0)
    assert not path.exists()


def test_truncated_stack_keeps_its_whole_images(tmp_path: Path) -> None:
    path = tmp_path / "stack.mrcs"
    with mrc.StackWriter(path, 5, 4, 1.0) as writer:
        writer.write(0, np.arange(80, dtype=np.float32).reshape(5, 4, 4))
    path.write_bytes(path.read_bytes()[: 1024 + 3 * 64 + 10])
    stack = mrc.open_stack(path)
    assert (stack.n, stack.readable) == (5, 3)
    assert stack.read([2])[0, 0, 0] == 32
    with pytest.raises(InputError, match=r"image 4 .*header says 5 images, but the file ends after 3"):
        stack.read([0, 3])
    with pytest.raises(InputError, match="ends after 3"):
        stack.read(-1)


def test_refusals_name_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mrc"
    mrc.write_map(whole, np.ones((3, 4, 5)), 1.0)
    data = whole.read_bytes()

    def refused(content: bytes, message: str) -> None:
        path = tmp_path / "bad.mrc"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"bad\.mrc.*{message}"):
            mrc.read_map(path)

    refused(data[:-1], r"holds 239 bytes of data; expected 240")
    refused(data[:900], "900 bytes long")
    refused(b"\x1f\x8b" + data, "undamaged")
    refused(b"data_particles\n" * 100, "mode|size")
    refused(data[:12] + (4).to_bytes(4, "little") + data[16:], "mode 4")
    refused(data[:64] + (1).to_bytes(4, "little") * 3 + data[76:], r"axis order \(1, 1, 1\)")
    refused(data[:-4] + np.float32(np.nan).tobytes(), r"1 voxels are not finite.*\(2, 3, 4\)")
    with pytest.raises(InputError, match=r"missing\.mrc"):
        mrc.read_map(tmp_path / "missing.mrc")
    with pytest.raises(InputError, match="cannot be read"):
        mrc.open_stack(tmp_path)


@pytest.mark.parametrize(("dtype", "mode"), [("float32", 2), ("float16", 12)])
def test_an_image_is_a_stack_of_one(tmp_path: Path, dtype: Literal["float32", "float16"], mode: int) -> None:
    image = np.random.default_rng(1).normal(size=(30, 41)).astype(dtype).astype(np.float32)
    mrc.write_image(tmp_path / "a.mrc", image, 1.3, dtype)
    assert mrcfile.validate(tmp_path / "a.mrc")
    with mrcfile.open(tmp_path / "a.mrc") as file:
        assert (int(file.header.mode), int(file.header.ispg), int(file.header.nz)) == (mode, 0, 1)
        assert np.array_equal(np.squeeze(file.data), image.astype(dtype))
        assert float(file.voxel_size.x) == pytest.approx(1.3)
    with pytest.raises(RunError, match=r"a\.mrc: not written"):
        mrc.write_image(tmp_path / "a.mrc", np.full((2, 2), np.nan), 1.3)
    with pytest.raises(RunError, match="as float16"):
        mrc.write_image(tmp_path / "b.mrc", np.full((2, 2), 1e6), 1.3, "float16")
