"""Time of the whole fit of a micrograph, in transforms of that micrograph, on one thread.

    python benchmarks/ctf.py [--side 4096] [--repeats 7]

A transform is `scipy.fft.rfft2` of the micrograph in float32. Both are timed alternately in the same run, so that other
work on the machine weighs on both; what is told is the ratio of the medians, with that of the best times.
"""

import argparse
import math
import time
from collections.abc import Callable
from statistics import median

import measured
import numpy as np
import scipy.fft
from threadpoolctl import threadpool_limits

from dcryo.kernels.ctf import ctf
from dcryo.steps.ctf import Estimate, Optics, Wanted, estimate

OPTICS = Optics(0.885, 300.0, 2.7, 0.1)
U_A, V_A, ANGLE_DEG = 15200.0, 14800.0, 30.0


def micrograph(side_px: int) -> np.ndarray:
    """Ice seen through the microscope, and as much noise again."""
    random = np.random.Generator(np.random.Philox(key=1))
    transform = scipy.fft.rfft2(random.standard_normal((side_px, side_px), dtype=np.float32))
    for row, ky in enumerate(np.rint(np.fft.fftfreq(side_px, 1.0 / side_px)).astype(np.int32)):
        kx = np.arange(side_px // 2 + 1, dtype=np.int32)
        transform[row] *= ctf(
            kx, np.full_like(kx, ky), side_px, OPTICS.pixel_size_A, U_A, V_A, ANGLE_DEG, OPTICS.voltage_kV,
            OPTICS.spherical_aberration_mm, OPTICS.amplitude_contrast, 0.0, 60.0,
        )[0]  # fmt: skip
    image = scipy.fft.irfft2(transform, s=(side_px, side_px))
    return (image + random.standard_normal(image.shape, dtype=np.float32)).astype(np.float32)


def seconds(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    image = micrograph(options.side)
    cases = {
        "fit": Wanted(),
        "with the defocus of 5 x 5 patches": Wanted(local=5),
        "with the phase shift": Wanted(phase_deg=(0.0, 180.0)),
    }
    rows = []
    with threadpool_limits(1):
        for name, wanted in cases.items():
            found = estimate(image, OPTICS, wanted)  # compiles
            assert isinstance(found, Estimate)
            fits, transforms = [], []
            for _ in range(options.repeats):
                transforms.append(seconds(lambda: scipy.fft.rfft2(image, workers=1)))
                fits.append(seconds(lambda wanted=wanted: estimate(image, OPTICS, wanted)))
            off_A = math.hypot(found.defocus_u_A - U_A, found.defocus_v_A - V_A)
            rows.append(
                [
                    name, measured.middle(fits, ".3f"), measured.middle(transforms, ".3f"),
                    f"{median(fits) / median(transforms):.1f}", f"{min(fits) / min(transforms):.1f}", f"{off_A:.0f}",
                ]
            )  # fmt: skip
    print(f"{options.side} px, {measured.described([measured.machine()])}; one thread\n")
    header = ("what", "fit, s", "transform, s", "transforms, of medians", "of the best", "U, V off, A")
    print(measured.table(header, rows))


if __name__ == "__main__":
    main()
