"""Maps from images that feel the curvature of the Ewald sphere: 20 kV, where a small particle is thick enough."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from pydantic import ValidationError

from dcryo.data import mrc
from dcryo.data.run import Run
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import fsc

# Towards Nyquist, where the edge of the particle is up to 1.9 rad from where its centre is.
HIGH = slice(24, 31)


@pytest.fixture(scope="module", params=[1, -1])
def curved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, np.ndarray]:
    """The hand of the curvature, a folder with the store and what it was imported from, and the true map."""
    folder = tmp_path_factory.mktemp("curved")
    made = simulate(
        SimulateOptions(
            model="phantom", symmetry="O", box_px=64, pixel_size_A=1.0, diameter_A=58.0, particles=200, snr=1.0,
            voltage_kV=20.0, spherical_aberration_mm=0.01, defocus_min_A=300.0, defocus_max_A=1500.0,
            astigmatism_A=30.0, defocus_scatter_A=0.0, noise_bfactor_A2=0.0, seed=2, ewald=True,
            ewald_hand=request.param, out=folder / "simulated",
        ),
        progress=tiny.quiet,
    )  # fmt: skip
    tiny.imported(made.truth_star, folder / "particles.zarr")
    return request.param, folder, mrc.read_map(made.truth_map).array


def test_the_right_curvature_gains_and_the_wrong_one_loses(curved: tuple[int, Path, np.ndarray]) -> None:
    hand, folder, truth = curved
    agreement = {}
    for name, words in (("flat", {}), ("right", {"ewald_hand": hand}), ("wrong", {"ewald_hand": -hand})):
        options = ReconstructOptions(
            store=folder / "particles.zarr", symmetry="O", mask_diameter_A=64.0, ewald=bool(words), out=folder / name,
            **words,
        )  # fmt: skip
        made = reconstruct(options, progress=tiny.quiet)
        agreement[name] = fsc.shell_correlation(made.half_maps[0] + made.half_maps[1], truth)[HIGH].mean()
        assert Run.open(options.out).record["result"].get("ewald_hand") == words.get("ewald_hand")
    assert agreement["right"] > agreement["flat"] + 0.015
    assert agreement["wrong"] < agreement["flat"] - 0.1


@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed")
def test_relion_has_the_same_hands(curved: tuple[int, Path, np.ndarray]) -> None:
    hand, folder, truth = curved
    agreement = {}
    for name, words in ((1, []), (-1, ["--reverse_curvature"])):
        subprocess.run(
            ["relion_reconstruct", "--i", "truth.star", "--o", f"relion{name}.mrc", "--ctf", "--sym", "O", "--ewald",
             "--mask_diameter", "64", *words],
            cwd=folder / "simulated", capture_output=True, check=True, timeout=300,
        )  # fmt: skip
        found = mrc.read_map(folder / "simulated" / f"relion{name}.mrc").array
        agreement[name] = fsc.shell_correlation(found, truth)[HIGH].mean()
    assert agreement[hand] > agreement[-hand] + 0.1


def test_a_hand_is_1_or_minus_1_and_of_a_curvature(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="ewald_hand is 1 or -1"):
        ReconstructOptions(store=tmp_path, out=tmp_path, ewald=True, ewald_hand=0)
    with pytest.raises(ValidationError, match="give --ewald too"):
        ReconstructOptions(store=tmp_path, out=tmp_path, ewald_hand=-1)
