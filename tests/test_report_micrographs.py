"""The page of runs over movies and micrographs."""

from pathlib import Path

import numpy as np
import pytest

from dcryo.data.items import Found, Item, commit
from dcryo.data.micrographs import write_micrographs
from dcryo.data.particles import Micrographs
from dcryo.data.run import Run
from dcryo.report import write_report
from dcryo.report_micrographs import FLAGGED_SHOWN, SHOWN, Items

COUNT = 40


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(seed))
    frequency = np.linspace(0, 0.25, 60)
    track = np.cumsum(rng.standard_normal((8, 2)), axis=0)
    return {
        "preview": rng.standard_normal((40, 50)).astype(np.float16),
        "shape_px": np.array([500, 400]),
        "track_px": track,
        "patch_centre_px": np.array([[100.0, 100], [400, 300]]),
        "patch_track_px": np.stack([0.1 * track, -0.2 * track]),
        "picture": rng.standard_normal((32, 32)).astype(np.float16),
        "frequency_1_A": frequency,
        "spectrum": np.cos(400 * frequency**2),
        "fit": np.cos(400 * frequency**2),
        "quality": np.exp(-5 * frequency),
        "coordinate_px": rng.uniform(0, 400, (7, 2)),
        "score": rng.standard_normal(7),
        "diameter_px": np.array(60.0),
        "excluded": (np.arange(20)[:, None] > 15).astype(np.uint8) * np.ones((20, 25), np.uint8),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run over forty micrographs, of which the last five were flagged."""
    path, rng = tmp_path / "run", np.random.Generator(np.random.Philox(99))
    with Run.start(path, "ctf", {}) as begun:
        flagged = {f"m{number:02d}": "no rings" for number in range(COUNT - 5, COUNT)}
        for number in range(COUNT):
            name = f"m{number:02d}"
            commit(path, Item(name, tmp_path / f"{name}.mrc"), Found({}, arrays(number), flagged.get(name, "")), "")
        columns = {
            "path": np.array([f"m{number:02d}.mrc" for number in range(COUNT)]),
            "optics_row": np.zeros(COUNT),
            "defocus_u_A": rng.uniform(1e4, 2e4, COUNT),
            "defocus_v_A": rng.uniform(1e4, 2e4, COUNT),
            "ctf_resolution_A": rng.uniform(3, 6, COUNT),
        }
        write_micrographs(path / "micrographs.star", Micrographs(columns, {"group": np.ones(1)}))
        begun.flag({"row": row, "image": name, "reason": why} for row, (name, why) in enumerate(flagged.items()))
        begun.done({"micrographs": COUNT})
    return path


def test_the_page_shows_each_kind_of_picture_and_stays_small(run: Path) -> None:
    page = write_report(run).read_text()
    for title in ("Tracks", "CTF", "Thon rings", "Picks", "Flagged micrographs"):
        assert f">{title}<" in page
    assert "Could not be shown" not in page
    assert "5 micrographs were left out: 5 no rings" in page
    assert len(page) < 6e6


def test_some_of_many_are_shown_spread_over_the_run_with_the_first_that_were_flagged(run: Path) -> None:
    items = Items(run, Run.open(run).record)
    names = [name for name, _ in items.shown("preview")]
    assert len(names) == SHOWN and names[-FLAGGED_SHOWN:] == ["m35", "m36", "m37"]
    assert names[0] == "m00" and names[SHOWN - FLAGGED_SHOWN - 1] == "m34"
    assert "(flagged)" in items.title("m35") and "flagged" not in items.title("m00")
    assert items.shown("something else") == []


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    with Run.start(tmp_path / "run", "motion", {}) as begun:
        page = write_report(begun.path).read_text()
        begun.done({})
    assert "Motion correction" in page and "Could not be shown" not in page


def test_arrays_that_cannot_be_read_cost_their_picture_and_no_more(run: Path) -> None:
    for name in ("m00", "m34"):
        (run / "items" / f"{name}.npz").write_bytes(b"PK damaged")
    page = write_report(run).read_text()
    assert ">Thon rings<" in page and "Could not be shown" not in page
