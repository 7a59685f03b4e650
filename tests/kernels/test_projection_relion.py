"""Projections by RELION's own projector: volumes, angles, shifts, CTF and the images it made of them."""

import mrcfile
import naive
import numpy as np
import pytest
import starfile

from dcryo.euler import matrix_from_euler
from dcryo.kernels import fft, slices
from dcryo.kernels.ctf import ctf
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.shells import half_plane, unpack


def read(folder, volume, stem):
    if not (folder / volume).is_file():
        pytest.skip(f"{folder / volume} is not there")
    data = [mrcfile.read(folder / name).astype(np.float32) for name in (volume, f"{stem}.mrcs")]
    tables = starfile.read(folder / f"{stem}.star")
    return *data, tables["optics"].iloc[0], tables["particles"]


def interpolated(volume, rotations, pixels):
    return slices.extract(slices.prepare(volume, pixels.shell_max), rotations, pixels, len(volume))


def exact(volume, rotations, pixels):
    return np.array([naive.slice_of(volume, rotation, pixels) for rotation in rotations], dtype=np.complex64)


def project(volume, table, origin_px, transfer=None, slices_of=interpolated):
    box = len(volume)
    pixels = half_plane(box // 2)
    rotations = matrix_from_euler(table.rlnAngleRot, table.rlnAngleTilt, table.rlnAnglePsi)
    transforms = slices_of(volume, rotations, pixels)
    transforms *= shift_phases(pixels, -origin_px, box, len(pixels.kx))
    if transfer is not None:
        transforms *= transfer(pixels)
    # RELION's projector stops at the Nyquist circle, not at the end of its shell.
    transforms[:, np.hypot(pixels.kx, pixels.ky) > box / 2] = 0
    return fft.irfft2(unpack(pixels, transforms, box), box)


def correlations(ours, theirs):
    return np.array([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours, theirs, strict=True)])


def test_point_masses_with_angles_shifts_and_ctf(shared_data):
    volume, images, optics, table = read(
        shared_data / "relion_project_pointmass", "pointmass.mrc", "relion_proj_batch_pfac2"
    )
    pixel = float(optics.rlnImagePixelSize)

    def transfer(pixels):
        return ctf(
            pixels.kx, pixels.ky, len(volume), pixel,
            table.rlnDefocusU, table.rlnDefocusV, table.rlnDefocusAngle,
            optics.rlnVoltage, optics.rlnSphericalAberration, optics.rlnAmplitudeContrast, table.rlnPhaseShift,
        )  # fmt: skip

    origin_px = table[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy() / pixel
    ours = project(volume, table, origin_px, transfer)
    found = correlations(ours, images)
    assert found.mean() > 0.998 and found.min() > 0.997
    # What is left is RELION's: it reads a doubled box trilinearly.
    truth = project(volume, table, origin_px, transfer, exact)
    assert correlations(ours, truth).min() > 0.99999
    assert correlations(images, truth).max() < correlations(ours, truth).min()
    assert np.sum(ours * truth) / np.sum(truth**2) == pytest.approx(1.0, abs=1e-4)
    assert np.sum(ours * images) / np.sum(images**2) == pytest.approx(1.0, abs=0.01)
    assert correlations(project(volume, table, -origin_px, transfer), images).mean() < 0.5
    assert correlations(project(volume[::-1], table, origin_px, transfer), images).mean() < 0.5


def test_odd_box_with_shifts(shared_data):
    volume, images, _, table = read(
        shared_data / "relion_project_70S", "clean70SRibosome_vol_65p.mrc", "rln_proj_65_shifted"
    )
    origin_px = table[["rlnOriginX", "rlnOriginY"]].to_numpy()
    # RELION moves an odd box by (D - 1) / 2 both into and out of Fourier space, so that the particle it projects
    # lies about pixel (D + 1) / 2, one further than the centre of its volume, which is ours, D // 2.
    ours = project(volume, table, origin_px - 1.0)
    assert correlations(ours, images).min() > 0.9995
    assert correlations(ours, project(volume, table, origin_px - 1.0, slices_of=exact)).min() > 0.99999
    # Half a pixel further on, or no step at all, is told apart.
    assert correlations(project(volume, table, origin_px - 0.5), images).max() < 0.9995
