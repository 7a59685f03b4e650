"""The whole way on simulated particles whose truth is known: beta-galactosidase, refined without its symmetry."""

from pathlib import Path

import numpy as np
import pytest

from dcryo.data import mrc, star
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import fsc
from dcryo.kernels.rotations import angular_distance_deg
from dcryo.kernels.symmetry import operators

BOX_PX, PIXEL_SIZE_A, PARTICLES, SNR = 128, 2.5, 2000, 0.1


@pytest.mark.slow
def test_refinement_from_40_A_finds_poses_and_claims_no_more_than_is_true(shared_data: Path, tmp_path: Path) -> None:
    data = simulate(
        SimulateOptions(
            model=str(shared_data / "models" / "5a1a.pdb"), out=tmp_path / "simulated", particles=PARTICLES,
            box_px=BOX_PX, pixel_size_A=PIXEL_SIZE_A, snr=SNR,
        )
    )  # fmt: skip
    store = tmp_path / "particles.zarr"
    import_particles(ImportOptions(source=data.particles_star, out=store))
    result = refine(
        RefineOptions(
            store=store, reference=data.truth_map, out=tmp_path / "refined", initial_lowpass_A=40, mask_diameter_A=190
        )
    )

    # The molecule is D2 to the eye: a pose and its symmetry mates are one.
    truth = star.read_particles(data.truth_star)["rotation"]
    errors = angular_distance_deg(result.particles["rotation"], truth, operators("D2"))
    mask = mrc.read_map(tmp_path / "refined" / "mask.mrc").array
    curve = fsc.shell_correlation(result.map * mask, mrc.read_map(data.truth_map).array * mask)
    true_A = fsc.resolution_at(curve, fsc.HALF, BOX_PX, PIXEL_SIZE_A)
    print(
        f"claimed {result.resolution_A:.2f} A, true {true_A:.2f} A, median error {np.median(errors):.2f} degrees, "
        f"{100 * np.mean(errors > 10):.1f} % more than 10 degrees off"
    )
    assert np.median(errors) < 2
    assert np.mean(errors > 10) < 0.1
    assert true_A < 1.1 * result.resolution_A
    assert result.resolution_A < 8
