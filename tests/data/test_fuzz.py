"""Damaged files: a dcryo error or a sound read, never another exception, a hang, a huge allocation or unpickling."""

import gzip
import io
import itertools
import pickle
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator, Philox

from dcryo.data import cs, mrc, star
from dcryo.data.particles import Particles
from dcryo.errors import DcryoError, InputError

MUTATIONS = 2500
ALLOCATION_BYTES = 256 << 20
HANG_S = 30
NUMBERS = (0, 1, -1, 2, 3, 7, 80, 255, 32767, 65536, 2**24, 2**30, 2**31 - 1, -(2**31), 0x7FC00000, 0x7F800000)
WORDS = (
    b"nan -inf 1e999 0 -1 1.5 2 3 99999999999999999999 0@a 1@ @a -1@a 1@b 99999999999999999999@a "
    b"x \" ' \"\" '' # #x data_ data_optics data_particles loop_ _rlnImageName _rlnOriginX _rlnBeamTiltX \xff \0 \t "
    b"_ \xc3\xa9 1_0 0x1p3 save_ ; $a [1,2] 1e-320 None"
).split(b" ")
PIECES = (
    b"<f4 <f8 <u8 <i2 >f4 |O |V9 |S0 |S9 <U4 <M8[s] <c8 |b1 <f2 <f16 10 -1 0 9999999999999 True (2,) (0,) (-1,) "
    b"(3, (2**31,) [ ] { } ( ) , ' : uid blob/path blob/shape alignments3D/pose \n \x80 \xc3\xa9"
).split(b" ")


@contextmanager
def limits() -> Iterator[None]:
    """Address space as it is plus a quarter of a GiB, and an alarm for a case that does not end."""

    def on_alarm(*_: object) -> None:
        raise TimeoutError("a damaged file was read for too long")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, on_alarm)
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOCATION_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def survive(path: Path, mutants: Iterator[bytes], read: Callable[[Path], None]) -> tuple[int, int]:
    """How many mutants were read and how many refused; anything else fails, with the mutant left at `path`."""
    accepted = refused = 0
    with limits():
        for mutant in mutants:
            path.write_bytes(mutant)
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
            try:
                read(path)
                accepted += 1
            except DcryoError as error:
                assert str(path) in str(error)
                refused += 1
    return accepted, refused


def damaged(whole: bytes, random: Generator, splice: Callable[[bytes, Generator], bytes]) -> Iterator[bytes]:
    """Flipped bytes, truncations and spliced numbers or words, in turns."""
    for turn in range(MUTATIONS):
        mutant = bytearray(whole)
        if turn % 4 == 0:
            for position in random.integers(len(mutant), size=random.integers(1, 6)):
                mutant[position] ^= 1 << random.integers(8)
        if turn % 20 == 1:
            del mutant[random.integers(len(mutant)) :]
        yield splice(bytes(mutant), random) if turn % 4 else bytes(mutant)


def splice_numbers(header_bytes: int) -> Callable[[bytes, Generator], bytes]:
    """Up to three 32-bit numbers of the header replaced."""

    def splice(data: bytes, random: Generator) -> bytes:
        mutant = bytearray(data)
        for _ in range(random.integers(1, 4)):
            start = 4 * int(random.integers(header_bytes // 4))
            number = int(random.choice(NUMBERS)) & 0xFFFFFFFF
            mutant[start : start + 4] = number.to_bytes(4, ["little", "big"][random.integers(2)])
        return bytes(mutant[: len(data)])

    return splice


def splice_words(data: bytes, random: Generator) -> bytes:
    """A word replaced, or a line dropped, repeated or emptied."""
    lines = data.split(b"\n")
    at = int(random.integers(len(lines)))
    how = random.integers(6)
    if how == 0:
        del lines[at]
    elif how == 1:
        lines.insert(at, lines[int(random.integers(len(lines)))])
    elif how == 2:
        lines.insert(at, WORDS[int(random.integers(len(WORDS)))])
    else:
        words = lines[at].split(b" ")
        words[int(random.integers(len(words)))] = WORDS[int(random.integers(len(WORDS)))]
        lines[at] = b" ".join(words)
    return b"\n".join(lines)


def splice_npy(data: bytes, random: Generator) -> bytes:
    """A token of the header's Python literal replaced, its length kept true in two cases of three."""
    start = 10
    end = start + int.from_bytes(data[8:10], "little")
    header = data[start:end]
    tokens = list(re.finditer(rb"[\w<>|/]+|[^\w\s]", header))
    if not tokens:
        return data
    token = tokens[int(random.integers(len(tokens)))]
    piece = PIECES[int(random.integers(len(PIECES)))]
    header = header[: token.start()] + piece + header[token.end() :]
    length = len(header) if random.integers(3) else int(random.integers(1 << 16))
    return data[:8] + length.to_bytes(2, "little") + header + data[end:]


def check(particles: Particles) -> None:
    """A sound set of particles: the record's own checks passed, poses are rotations, numbers are finite."""
    if "rotation" in particles:
        a = particles["rotation"]
        np.testing.assert_allclose(a @ a.transpose(0, 2, 1), np.broadcast_to(np.eye(3), a.shape), atol=1e-6)
    for name in ("defocus_u_A", "defocus_angle_deg", "origin_A", "coordinate_px"):
        assert np.isfinite(particles.columns.get(name, 0.0)).all()
    assert (particles["image_index"] >= 0).all()
    assert (particles.optics.get("pixel_size_A", np.ones(1)) > 0).all()


@pytest.fixture
def particles() -> Particles:
    random = Generator(Philox(key=7))
    n = 4
    optics = {"group": [1, 2], "voltage_kV": [300, 200], "spherical_aberration_mm": [2.7, 0.01]}
    optics |= {"amplitude_contrast": [0.1, 0.07], "pixel_size_A": [1.5, 1.25], "box_px": [8, 9]}
    rotation = np.linalg.qr(random.normal(size=(n, 3, 3)))[0]
    rotation *= np.linalg.det(rotation)[:, None, None]
    columns = {
        "image_path": np.array(["a/1.mrcs", "a/1.mrcs", "b 2.mrcs", "c.mrcs"]),
        "image_index": np.array([0, 4, 1, 99]),
        "optics_row": np.array([0, 0, 1, 1]),
        "micrograph": np.array(["m1.mrc", "m1.mrc", "m2.mrc", "m2.mrc"]),
        "coordinate_px": random.uniform(0, 4000, (n, 2)),
        "defocus_u_A": random.uniform(8000, 20000, n),
        "defocus_angle_deg": random.uniform(-90, 90, n),
        "rotation": rotation,
        "origin_A": random.normal(size=(n, 2)),
        "half": np.array([1, 2, 1, 2]),
    }
    extra = {"rlnFoo": np.array(["", "a b", "1.50", "x"]), "ctf/tilt_A <f4 2": np.array(["0.5 nan"] * n)}
    return Particles(columns, {name: np.array(values) for name, values in optics.items()}, extra)


def test_damaged_maps(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mrc"
    mrc.write_map(whole, Generator(Philox(key=1)).normal(size=(4, 5, 6)), 1.5)

    def read(path: Path) -> None:
        found = mrc.read_map(path)
        assert found.array.size == 120 or found.array.nbytes <= 4 * path.stat().st_size
        assert found.array.dtype == np.float32 and np.isfinite(found.array).all()

    random = Generator(Philox(key=2))
    accepted, refused = survive(tmp_path / "bad.mrc", damaged(whole.read_bytes(), random, splice_numbers(256)), read)
    assert accepted > MUTATIONS // 10 and refused > MUTATIONS // 10


def test_damaged_compressed_maps(tmp_path: Path) -> None:
    plain = tmp_path / "whole.mrc"
    mrc.write_map(plain, np.ones((2, 3, 4)), 1.5)
    whole = gzip.compress(plain.read_bytes(), mtime=0)
    header = plain.read_bytes()

    def mutants() -> Iterator[bytes]:
        random = Generator(Philox(key=3))
        yield from damaged(whole, random, lambda data, _: data)
        for mutant in damaged(header, random, splice_numbers(256)):
            yield gzip.compress(mutant, 1)

    accepted, refused = survive(tmp_path / "bad.mrc.gz", mutants(), lambda path: mrc.read_map(path) and None)
    assert accepted and refused


def test_damaged_stacks(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mrcs"
    with mrc.StackWriter(whole, 5, 6, 1.5, "float16") as writer:
        writer.write(0, Generator(Philox(key=4)).normal(size=(5, 6, 6)))

    def read(path: Path) -> None:
        stack = mrc.open_stack(path)
        assert 0 <= stack.readable <= stack.n
        if stack.readable:
            last = min(stack.readable, 1000) - 1
            assert stack.read([0, last]).shape == (2, *stack.shape)
        with pytest.raises(InputError, match="bad"):
            stack.read([stack.readable])

    random = Generator(Philox(key=5))
    accepted, refused = survive(tmp_path / "bad.mrcs", damaged(whole.read_bytes(), random, splice_numbers(256)), read)
    assert accepted > MUTATIONS // 10 and refused > MUTATIONS // 10


OLD_STAR = b"""
data_

loop_
_rlnImageName #1
_rlnDefocusU #2
_rlnVoltage #3
_rlnMagnification #4
_rlnDetectorPixelSize #5
_rlnAngleRot #6
_rlnAngleTilt #7
_rlnAnglePsi #8
_rlnOriginX #9
_rlnOriginY #10
000001@a.mrcs 12000.5 300 50000 14 10 20 30 1.5 -2
000002@a.mrcs 12001.5 300 50000 14 -10 90 30 1.5 -2 # a remark
"b c.mrc" 9000 200 40000 14 10 0 30 1.5 0
"""


@pytest.mark.parametrize("version", ["3.0", "3.1"])
def test_damaged_star(tmp_path: Path, particles: Particles, version: str) -> None:
    whole = tmp_path / "whole.star"
    star.write_particles(whole, particles)
    again = tmp_path / "again.star"
    turn = itertools.count()

    def read(path: Path) -> None:
        found = star.read_particles(path)
        check(found)
        if next(turn) % 10:  # flushing to the disk takes its time
            return
        try:
            star.write_particles(again, found)
        except InputError:
            return
        back = star.read_particles(again)
        for name in ("image_path", "image_index", "optics_row", "half", "micrograph"):
            assert (name in back) == (name in found)
            if name in found and len(found):
                np.testing.assert_array_equal(found[name], back[name])
        assert found.extra.keys() == back.extra.keys()
        for label, values in found.extra.items():
            np.testing.assert_array_equal(values, back.extra[label])

    data = whole.read_bytes() if version == "3.1" else OLD_STAR
    random = Generator(Philox(key=6))
    accepted, refused = survive(tmp_path / "bad.star", damaged(data, random, splice_words), read)
    assert accepted > MUTATIONS // 10 and refused > MUTATIONS // 10


def test_damaged_cs(tmp_path: Path, particles: Particles) -> None:
    whole = tmp_path / "whole.cs"
    turn = itertools.count()
    cs.write_particles(whole, particles)

    def read(path: Path) -> None:
        found = cs.read_particles(path)
        check(found)
        if next(turn) % 10:
            return
        with suppress(InputError):
            cs.write_particles(tmp_path / "again.cs", found)

    random = Generator(Philox(key=8))
    accepted, refused = survive(tmp_path / "bad.cs", damaged(whole.read_bytes(), random, splice_npy), read)
    assert accepted > MUTATIONS // 20 and refused > MUTATIONS // 10


class _Payload:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (_explode, ("unpickled",))


def _explode(word: str) -> None:
    raise AssertionError(word)


def test_pickles_stay_closed(tmp_path: Path) -> None:
    array = np.empty(3, [("uid", "<u8"), ("blob/path", object)])
    array["blob/path"] = _Payload()
    np.save(tmp_path / "object.npy", array, allow_pickle=True)
    (tmp_path / "plain.cs").write_bytes(pickle.dumps(_Payload()))
    npz = io.BytesIO()
    np.savez(npz, uid=np.zeros(3))
    (tmp_path / "zip.cs").write_bytes(npz.getvalue())
    for name in ("object.npy", "plain.cs", "zip.cs"):
        with pytest.raises(InputError, match=name):
            cs.read_particles(tmp_path / name)


def test_lengths_that_lie_allocate_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge.cs"
    with limits():
        path.write_bytes(b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little") + b"{}")
        with pytest.raises(InputError, match="header"):
            cs.read_particles(path)
        text = b"{'descr': [('uid', '<u8')], 'fortran_order': False, 'shape': (1000000000000,), }\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        with pytest.raises(InputError, match="1000000000000"):
            cs.read_particles(path)
        path.write_bytes(b"\x93NUMPY\x01\x00" + (2000).to_bytes(2, "little") + b"(" * 2000)
        with pytest.raises(InputError, match="header"):
            cs.read_particles(path)


def test_one_long_line_of_quotes_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "long.star"
    path.write_bytes(b"data_\nloop_\n_a #1\n" + b"'a " * 300_000 + b"\n")
    with limits():
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        with pytest.raises(InputError, match="quote"):
            star.read_blocks(path)
