"""Parts of `ctfrefine`: aberrations as columns of the optics table and in people's units, and micrographs' changes."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data.atomic import replacing
from dcryo.data.particles import Particles
from dcryo.jobs.dataset import CtfColumns
from dcryo.kernels import aberrations
from dcryo.kernels.ctf import wavelength_A
from dcryo.steps.ctf_refinement import EVEN, ODD, OpticsGroups


def groups_of(particles: Particles, columns: CtfColumns) -> OpticsGroups:
    """Aberrations that the optics groups have already; beam tilts as coefficients like the others."""
    optics, count = particles.optics, particles.n_groups
    odd, even = (optics.get(name, np.zeros((count, 0))) for name in ("odd_zernike", "even_zernike"))
    even = np.pad(even, ((0, 0), (0, max(0, EVEN - even.shape[1]))))
    tilts = [optics.get(f"beam_tilt_{axis}_mrad", np.zeros(count)) for axis in "xy"]
    total = [
        aberrations.odd_coefficients(own, x, y, Cs, voltage)
        for own, x, y, Cs, voltage in zip(
            odd, *tilts, optics["spherical_aberration_mm"], optics["voltage_kV"], strict=True
        )
    ]
    size = np.bincount(particles["optics_row"], minlength=count)
    pixel = np.bincount(particles["optics_row"], weights=columns.pixel_size_A, minlength=count) / np.maximum(size, 1)
    pixel[size == 0] = columns.pixel_size_A[0]
    magnification = optics.get("magnification", np.tile(np.eye(2), (count, 1, 1)))
    return OpticsGroups(np.stack(total), even, magnification, pixel)


def _tilt_mrad(odd: np.ndarray, Cs_mm: float, voltage_kV: float) -> np.ndarray:
    """The beam tilt (x, y) that explains the coma in odd coefficients; 0 for a lens without spherical aberration."""
    per_mrad = aberrations.beam_tilt_coefficients(1.0, 1.0, Cs_mm, voltage_kV)
    return np.array([odd[4] / per_mrad[4], odd[3] / per_mrad[3]]) if per_mrad[3] != 0 else np.zeros(2)


def aberration_columns(
    particles: Particles, columns: CtfColumns, odd: np.ndarray, even: np.ndarray, magnification: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns of the optics table: coma as beam tilt, with what is left of the odd coefficients beside it; of the
    others those that differ from none."""
    optics, before = particles.optics, groups_of(particles, columns)
    out: dict[str, np.ndarray] = {}
    lens = list(zip(optics["spherical_aberration_mm"].tolist(), optics["voltage_kV"].tolist(), strict=True))
    if not np.array_equal(odd, before.odd):
        tilt = np.stack([_tilt_mrad(own, *of) for own, of in zip(odd, lens, strict=True)])
        rest = odd.copy()
        for own, (x, y), of in zip(rest, tilt.tolist(), lens, strict=True):
            own[:ODD] -= aberrations.beam_tilt_coefficients(x, y, *of)
        out |= {"beam_tilt_x_mrad": tilt[:, 0], "beam_tilt_y_mrad": tilt[:, 1], "odd_zernike": rest}
    if not np.array_equal(even, before.even):
        out["even_zernike"] = even
    if not np.array_equal(magnification, before.magnification):
        out["magnification"] = magnification
    return out


def described(
    particles: Particles,
    columns: CtfColumns,
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    errors: tuple[np.ndarray, np.ndarray, np.ndarray],
    finest_A: float,
) -> list[dict[str, Any]]:
    """Of each optics group its name, number of particles, and aberrations in people's units, with standard errors.

    found, errors: odd and even coefficients and magnification. The wave aberration of trefoil is
    2 pi / lambda A2 (lambda k)^3 / 3 cos 3 (phi - angle), that of tetrafoil 2 pi / lambda A3 (lambda k)^4 / 4
    cos 4 (phi - angle) (Krivanek, Dellby & Lupini, Ultramicroscopy 78, 1999); the spherical aberration is the change of
    Cs by Z(4, 0), whose k^4 has the factor 6. anisotropy: largest over least magnification; angle: of the axis along
    which things look largest. odd_deg: root mean square of the odd phases at the finest resolution, without shift.
    """
    optics, rows = particles.optics, []
    counts = np.bincount(particles["optics_row"], minlength=particles.n_groups)
    phi = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    circle = np.cos(phi) / finest_A, np.sin(phi) / finest_A
    for index in range(particles.n_groups):
        (odd, even, stretch), error = (tuple(of[index] for of in both) for both in (found, errors))
        Cs, voltage = float(optics["spherical_aberration_mm"][index]), float(optics["voltage_kV"][index])
        wave = float(wavelength_A(voltage))
        tilt, per_mrad = _tilt_mrad(odd, Cs, voltage), aberrations.beam_tilt_coefficients(1.0, 1.0, Cs, voltage)
        tilt_error = np.abs(error[0][[4, 3]] / per_mrad[4]) if per_mrad[4] != 0 else np.zeros(2)
        to_A2, to_A3 = 3 / (2 * np.pi * wave**2), 4 / (2 * np.pi * wave**3)
        values, vectors = np.linalg.eigh((stretch + stretch.T) / 2)
        # The image's frequency k is the specimen's M k: where M is largest, things look largest.
        axis = vectors[:, 1]
        rows.append(
            {
                "name": str(optics["name"][index]) if "name" in optics else f"group {index + 1}",
                "particles": int(counts[index]),
                "beam_tilt_x_mrad": float(tilt[0]),
                "beam_tilt_y_mrad": float(tilt[1]),
                "beam_tilt_error_mrad": float(tilt_error.mean()),
                "trefoil_A": float(np.hypot(odd[2], odd[5]) * to_A2),
                "trefoil_angle_deg": float(np.rad2deg(np.arctan2(odd[2], odd[5])) / 3 % 120),
                "trefoil_error_A": float(error[0][[2, 5]].mean() * to_A2),
                "tetrafoil_A": float(np.hypot(even[4], even[8]) * to_A3),
                "tetrafoil_angle_deg": float(np.rad2deg(np.arctan2(even[4], even[8])) / 4 % 90),
                "tetrafoil_error_A": float(error[1][[4, 8]].mean() * to_A3),
                "spherical_aberration_change_mm": float(even[6] * 12e-7 / (np.pi * wave**3)),
                "spherical_aberration_error_mm": float(error[1][6] * 12e-7 / (np.pi * wave**3)),
                "anisotropy_percent": float(100 * (values[1] / values[0] - 1)),
                "anisotropy_angle_deg": float(np.rad2deg(np.arctan2(axis[1], axis[0])) % 180),
                "magnification_percent": float(50 * (values.sum() - 2)),
                "magnification_error_percent": float(100 * np.hypot(error[2][0, 0], error[2][1, 1])),
                "odd_deg": float(np.rad2deg(np.std(aberrations.odd_phase(np.r_[0, 0, odd[2:]], *circle)))),
            }
        )
    return rows


def write_micrographs(
    path: Path, particles: Particles, micrograph: np.ndarray, change_A: np.ndarray, astigmatism_A: np.ndarray
) -> None:
    """Write of each micrograph its particles, the mean and spread of the changes of their defocus, and the length of
    the change of its astigmatism."""
    first = np.unique(micrograph, return_index=True)[1]
    count = np.bincount(micrograph)
    mean = np.bincount(micrograph, weights=change_A) / count
    spread = np.sqrt(np.bincount(micrograph, weights=(change_A - mean[micrograph]) ** 2) / count)
    names = particles["micrograph"] if "micrograph" in particles else np.array([f"CTF {one + 1}" for one in micrograph])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["micrograph", "particles", "mean_change_A", "spread_of_change_A", "astigmatism_change_A"])
    for index, row in enumerate(first):
        figures = [f"{one:.1f}" for one in (mean[index], spread[index], astigmatism_A[row])]
        writer.writerow([names[row], count[index], *figures])
    with replacing(path) as file:
        file.write(text.getvalue().encode())
