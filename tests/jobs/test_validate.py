"""Tests of refinements for overfitting: of one that is honest, and of some that are not."""

import csv
import dataclasses
import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tiny

from dcryo import cli, graph
from dcryo.cluster import connect
from dcryo.data import mrc, star, store_writer
from dcryo.data.curves import read_curves, write_curves
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs import em
from dcryo.jobs.back_projection import maps_of
from dcryo.jobs.dataset import load_dataset
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateOptions, SimulateResult, simulate
from dcryo.jobs.validate import ValidateOptions, ValidateResult, validate
from dcryo.kernels import fft, fsc
from dcryo.kernels.filters import radius_px
from dcryo.kernels.likeness import mirrored
from dcryo.kernels.masks import sphere
from dcryo.kernels.overfitting import ResolutionLine, resolution_line
from dcryo.kernels.symmetry import operators
from dcryo.report import write_report

PIXEL = 4.0
REFINED, OTHERS = 400, 150
module = importlib.import_module("dcryo.jobs.validate")
refine_module = importlib.import_module("dcryo.jobs.refine")


@dataclass(frozen=True)
class Given:
    """A refinement, and particles of the same molecule that had no part in it."""

    simulated: SimulateResult
    run: Path
    others: Path

    def validated(self, out: Path, tests: str, **options: object) -> ValidateResult:
        given = {"run": self.run, "workers": 2} | options
        return validate(ValidateOptions(out=out, tests=tests, **given), progress=tiny.quiet)


def refined(store: Path, reference: Path, out: Path, iterations: int = 4) -> Path:
    options = RefineOptions(store=store, reference=reference, out=out, max_iterations=iterations, workers=2)
    return refine(options, progress=tiny.quiet).out


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("honest")
    made = tiny.simulated(
        folder / "simulated", REFINED + OTHERS, pixel_size_A=PIXEL, snr=0.2, noise_bfactor_A2=0, seed=0
    )
    every = tiny.imported(made.particles_star, folder / "all.zarr")
    own = select(every, np.arange(REFINED), folder / "own.zarr")
    others = select(every, np.arange(REFINED, REFINED + OTHERS), folder / "others.zarr")
    return Given(made, refined(own.path, made.truth_map, folder / "run"), others.path)


@pytest.fixture(scope="module")
def judged(honest: Given, tmp_path_factory: pytest.TempPathFactory) -> ValidateResult:
    """Its noise, B factor down to few particles, unseen particles of the other half, and hand."""
    out = tmp_path_factory.mktemp("honest") / "judged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEWEST", 24)
        return honest.validated(out, "all", model=honest.simulated.truth_map)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A refinement of halves that have the same images, under other names: what they share is noise."""
    folder, count = tmp_path_factory.mktemp("twice"), 100
    made = tiny.simulated(folder, count + OTHERS, pixel_size_A=PIXEL, snr=0.05, noise_bfactor_A2=0)
    others = select(tiny.imported(made.particles_star, folder / "all.zarr"), np.arange(count, count + OTHERS),
                    folder / "others.zarr")  # fmt: skip
    images = mrc.open_stack(folder / "particles.mrcs").read(np.arange(count))
    with mrcfile.new(folder / "again.mrcs") as file:
        file.set_data(np.concatenate([images, images]))
        file.voxel_size = PIXEL
    table = star.read_particles(made.particles_star).take(np.tile(np.arange(count), 2))
    half = np.repeat([1, 2], count).astype(np.int8)
    named = table.replace(image_path=np.full(2 * count, "again.mrcs"), image_index=np.arange(2 * count), half=half)
    star.write_particles(folder / "again.star", named, None)
    store = tiny.imported(folder / "again.star", folder / "again.zarr")
    return Given(made, refined(store.path, made.truth_map, folder / "run", iterations=3), others.path)


def test_an_honest_refinement_passes(honest: Given, judged: ValidateResult) -> None:
    assert judged.passed == {"noise": True, "bfactor": None, "unseen": True, "hand": True}
    assert "No overfitting" in judged.verdicts["noise"]
    noise, unseen = judged.figures["noise"], judged.figures["unseen"]
    assert abs(noise["fsc_of_noise"]) < 0.1
    assert noise["resolution_true_A"] == pytest.approx(noise["resolution_A"], rel=0.1)
    assert unseen["unseen_are"] == "other half"
    assert unseen["unseen_correlation"] > 5 * unseen["unseen_correlation_error"]
    assert unseen["unseen_correlation"] == pytest.approx(unseen["promised_correlation"], rel=0.5)


def test_particles_that_had_no_part_agree_with_an_honest_map(honest: Given, tmp_path: Path) -> None:
    found = honest.validated(tmp_path / "out", "unseen", others=honest.others)
    figures = found.figures["unseen"]
    assert found.passed == {"unseen": True}
    assert figures["unseen_are"] == "other particles"
    assert (figures["seen_particles"], figures["unseen_particles"]) == (REFINED, 2 * OTHERS)
    # What made a map correlates with it by its noise too.
    assert figures["seen_correlation"] > 1.3 * figures["unseen_correlation"]


def test_particles_left_out_agree_with_an_honest_map(honest: Given, tmp_path: Path) -> None:
    found = honest.validated(tmp_path / "out", "unseen", leave_out=0.3)
    assert found.passed == {"unseen": True}
    assert found.figures["unseen"]["unseen_are"] == "left out"
    assert found.figures["unseen"]["seen_particles"] == 0.7 * REFINED
    # Particles stay in their halves.
    every = star.read_particles(honest.run / "particles.star")
    half_of = dict(zip(every["image_index"].tolist(), every["half"].tolist(), strict=True))
    without = star.read_particles(tmp_path / "out" / "without" / "particles.star")
    assert len(without) == 0.7 * REFINED
    assert [half_of[index] for index in without["image_index"].tolist()] == without["half"].tolist()
    left_out = open_store(tmp_path / "out" / "left_out.zarr").particles()["image_index"]
    assert len(left_out) == 0.3 * REFINED and not np.isin(left_out, without["image_index"]).any()


def test_halves_that_share_images_fail(twice: Given, tmp_path: Path) -> None:
    """The FSC says Nyquist. The noise that replaces an image is the same in both halves, and correlates; particles that
    had no part do not agree with the map."""
    assert Run.open(twice.run).record["result"]["resolution_A"] < 2.01 * PIXEL
    found = twice.validated(tmp_path / "out", "noise,unseen", others=twice.others)
    assert found.passed == {"noise": False, "unseen": False}
    assert found.figures["noise"]["fsc_of_noise"] > 0.9
    assert found.verdicts["noise"].startswith("Overfitted") and "FSC_true says nothing" in found.verdicts["noise"]
    assert "in its own particles alone" in found.verdicts["unseen"]


@pytest.mark.slow
def test_one_reference_for_both_halves_fails(honest: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As refinements were before halves were kept apart, with all shells of an unfiltered reference."""
    update = refine_module._update

    def shared(job, state, made, shell_max):  # type: ignore[no-untyped-def]
        both = np.mean(made.classes[0].plain, axis=0)
        after = update(job, state, made, shell_max)
        return dataclasses.replace(after, references=np.stack([both, both]), shell=job.box_px // 2 - 1)

    made = tiny.simulated(tmp_path / "simulated", 300, pixel_size_A=PIXEL, snr=0.03, noise_bfactor_A2=0)
    store = tiny.imported(made.particles_star, tmp_path / "particles.zarr")
    monkeypatch.setattr(refine_module, "_update", shared)
    run = refined(store.path, made.truth_map, tmp_path / "run", iterations=10)
    found = Given(made, run, honest.others).validated(tmp_path / "out", "noise")
    figures = found.figures["noise"]
    assert found.passed == {"noise": False}
    assert figures["fsc_of_noise"] > 0.2
    assert figures["resolution_true_A"] > 1.3 * figures["resolution_A"]


def flat(folder: Path, bfactor_A2: float, particles: int, seed: int) -> tuple[Store, np.ndarray]:
    """Particles at their true poses of a density whose spectrum is flat but for a B factor; and a mask around it."""
    box, pixel = 48, 2.0
    white = np.random.default_rng(seed).standard_normal((box,) * 3) * sphere(box, 0.55 * box, 4)
    falling = np.exp(-bfactor_A2 * (radius_px(box, 3) / (box * pixel)) ** 2 / 4)
    folder.mkdir()
    mrc.write_map(folder / "flat.mrc", fft.irfftn(fft.rfftn(white.astype(np.float32)) * falling, box), pixel)
    options = SimulateOptions(
        model=str(folder / "flat.mrc"), out=folder / "simulated", particles=particles, snr=0.05, noise_bfactor_A2=0,
        seed=seed,
    )  # fmt: skip
    made = simulate(options, progress=tiny.quiet)
    return tiny.imported(made.truth_star, folder / "flat.zarr"), sphere(box, 0.6 * box, 4)


def curves_of_subsets(store: Store, mask: np.ndarray, scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    data = load_dataset(store.path, 0)
    sizes = module._subsets([data.rows_of(half) for half in (1, 2)], 0, 4)
    curves = []
    with em.scratch(scratch) as shared, connect("threads", 2) as cluster:
        for subsets in sizes:
            tasks = []
            for draw, which in enumerate(subsets):
                halves = np.where(np.isin(np.arange(store.n), which), data.halves, 0)
                some = dataclasses.replace(data, halves=halves)
                tasks.append(maps_of(some, operators("C1"), mask, shared, f"{draw}-")[0].fsc)
            curves.append(np.mean([found.masked for found in graph.compute(tasks, cluster)], axis=0))
    return np.array([len(subsets[0]) for subsets in sizes]), np.stack(curves)


@pytest.mark.parametrize("bfactor_A2", [200.0, pytest.param(300.0, marks=pytest.mark.slow)])
def test_a_known_bfactor_is_found(bfactor_A2: float, tmp_path: Path) -> None:
    """And half of the particles foretell the resolution of all."""
    found: list[ResolutionLine] = []
    for seed in (1, 2, 3):
        store, mask = flat(tmp_path / str(seed), bfactor_A2, 1600, seed)
        numbers, curves = curves_of_subsets(store, mask, tmp_path / str(seed))
        found.append(resolution_line(numbers, curves, fsc.GOLD_STANDARD, 96.0))
        assert abs(found[-1].bfactor_A2 - bfactor_A2) < 4 * found[-1].error_A2
        fewer = resolution_line(numbers[1:], curves[1:], fsc.GOLD_STANDARD, 96.0)
        all_A, half_A = (96.0 / fsc.crossing(curve, fsc.GOLD_STANDARD) for curve in curves[:2])
        assert (1 / half_A**2 + fewer.slope * np.log(2)) ** -0.5 == pytest.approx(all_A, rel=0.04)
        assert half_A > 1.03 * all_A
    assert np.mean([line.bfactor_A2 for line in found]) == pytest.approx(bfactor_A2, rel=0.1)


def test_subsets_are_nested_and_of_one_size_apart() -> None:
    halves = [np.arange(0, 400, 2), np.arange(1, 301, 2)]
    sizes = module._subsets(halves, 0, 4)
    assert [(len(subsets), len(subsets[0])) for subsets in sizes] == [(1, 300), (2, 150), (4, 74)]
    for subsets in sizes:
        together = np.concatenate(subsets)
        assert len(np.unique(together)) == len(together)
        for which in subsets:
            assert np.count_nonzero(which % 2 == 0) == len(which) / 2
    assert set(sizes[2][0]) < set(sizes[1][0]) < set(sizes[0][0])


def test_the_line_of_a_run(judged: ValidateResult) -> None:
    with (judged.out / "bfactor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["particles"]) for row in rows] == [400, 200, 100, 50]
    assert [int(row["draws"]) for row in rows] == [1, 2, 4, 4]
    resolutions = [float(row["resolution_A"]) for row in rows]
    assert resolutions == sorted(resolutions)
    curves = read_curves(judged.out / "bfactor_fsc.csv")
    of_half = fsc.resolution_at(curves["particles200"], fsc.GOLD_STANDARD, tiny.BOX_PX, PIXEL)
    assert of_half == pytest.approx(resolutions[1], rel=1e-3)
    figures, used = judged.figures["bfactor"], [row for row in rows if row["used"] == "1"]
    assert figures["subsets_on_the_line"] == len(used) >= 2
    slope, _ = np.polyfit(*(np.array([float(row[name]) for row in used]) for name in
                            ("ln_particles", "inverse_square_1_A2")), 1)  # fmt: skip
    assert figures["bfactor_A2"] == pytest.approx(2 / slope, rel=1e-3)
    assert f"B factor {figures['bfactor_A2']:.0f}" in judged.verdicts["bfactor"]


def test_subsets_can_be_refined_anew(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEWEST", 40)
    options = ValidateOptions(run=small, out=tmp_path / "out", tests="bfactor", refine_subsets=True, workers=2)
    found = validate(options, progress=tiny.quiet)
    assert found.figures["bfactor"]["refined_anew"] and found.figures["bfactor"]["subsets"] == 2
    assert "--refine-subsets" not in found.verdicts["bfactor"]
    fewer = Run.open(tmp_path / "out" / "subset80").record
    assert fewer["result"]["particles"] == 80 and fewer["options"]["max_iterations"] == 2
    curves = read_curves(tmp_path / "out" / "bfactor_fsc.csv")
    np.testing.assert_allclose(
        curves["particles80"], read_curves(tmp_path / "out" / "subset80" / "fsc.csv")["fsc_masked"], atol=1e-6
    )
    # All of them anew are the run itself.
    np.testing.assert_allclose(curves["particles160"], read_curves(small / "fsc.csv")["fsc_masked"], atol=1e-6)


def test_hands_are_told_by_a_model(honest: Given, tmp_path: Path) -> None:
    truth = mrc.read_map(honest.simulated.truth_map)
    other = tmp_path / "other.mrc"
    mrc.write_map(other, mirrored(truth.array, 1), PIXEL)
    assert honest.validated(tmp_path / "1", "hand", model=other).passed == {"hand": False}
    unknown = honest.validated(tmp_path / "2", "hand")
    assert unknown.passed == {"hand": None} and "cannot tell" in unknown.verdicts["hand"]
    # Where the halves agree to three shells, both hands look alike.
    coarse = tmp_path / "coarse"
    shutil.copytree(honest.run, coarse)
    curve = np.where(np.arange(tiny.BOX_PX // 2 + 1) <= 3, 1.0, 0.0)
    write_curves(coarse / "fsc.csv", tiny.BOX_PX, PIXEL, {"fsc_unmasked": curve, "fsc_masked": curve})
    found = honest.validated(tmp_path / "3", "hand", run=coarse, model=other)
    assert found.passed == {"hand": None} and "cannot be told" in found.verdicts["hand"]


def test_the_report_shows_every_test(judged: ValidateResult) -> None:
    page = write_report(judged.out).read_text()
    titles = (
        "Verdicts",
        "Refinement of noise",
        "Particles against resolution",
        "Particles that the map has never seen",
    )
    for title in titles:
        assert f"<h2>{title}</h2>" in page
    assert "Could not be shown" not in page
    assert judged.verdicts["noise"] in page.replace("&#43;", "+")
    # The maps of the runs within are not the page's.
    assert "<h2>Map</h2>" not in page and "What follows is of" not in page


PRODUCTS = ("noise.csv", "bfactor.csv", "bfactor_fsc.csv", "unseen.csv")


@pytest.fixture(scope="module")
def small(store: Store, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refinement of 160 particles of which two iterations are made."""
    return refined(store.path, reference, tmp_path_factory.mktemp("small") / "run", iterations=2)


@pytest.fixture(scope="module")
def expected(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "synchronous"
    validate(ValidateOptions(run=small, out=out, tests="all", cluster="synchronous"), progress=tiny.quiet)
    return out


@pytest.mark.parametrize("where", [{"workers": 3}, {"cluster": "processes", "workers": 2}])
def test_the_same_bits_anywhere(small: Path, expected: Path, tmp_path: Path, where: dict) -> None:
    found = validate(ValidateOptions(run=small, out=tmp_path / "out", tests="all", **where), progress=tiny.quiet)
    assert tiny.digests(tmp_path / "out", PRODUCTS) == tiny.digests(expected, PRODUCTS)
    assert found.figures == {
        name: {key: value for key, value in own.items() if key not in ("passed", "verdict")}
        for name, own in Run.open(expected).record["result"].items()
        if name in found.figures
    }


def test_a_killed_run_goes_on_where_it_was(
    small: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the second number of particles is done and not yet kept."""
    out = tmp_path / "out"
    words = ["validate", str(small), "--out", str(out), "--tests", "all", "--workers", "2"]
    # The first checkpoint is of the refinement of noise.
    process = tiny.started(tiny.command, words, {}, ("dcryo.data.run:Run", "save_checkpoint", 3))
    process.join()
    assert process.exitcode == -9
    noise = (out / "noise" / "run.json").read_bytes()
    assert json.loads(noise)["status"] == "done"
    made = []

    def counted(*given, **named):  # type: ignore[no-untyped-def]
        made.append(given[0])
        return maps_of(*given, **named)

    monkeypatch.setattr(module, "maps_of", counted)
    options = ValidateOptions(run=small, out=out, tests="all", workers=2, resume=True)
    first = validate(options, progress=tiny.quiet)
    assert tiny.digests(out, PRODUCTS) == tiny.digests(expected, PRODUCTS)
    assert (out / "noise" / "run.json").read_bytes() == noise
    assert len(made) == 2  # of the second number; the first was kept, and there is no third
    again = validate(options, progress=tiny.quiet)
    assert again.verdicts == first.verdicts and len(made) == 2


def test_a_damaged_chunk_costs_its_particles_only(
    simulated: SimulateResult, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was whole when the run was made."""
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 8 * tiny.BOX_PX**2 * 2)
    store = tiny.imported(simulated.particles_star, tmp_path / "particles.zarr")
    run = refined(store.path, reference, tmp_path / "run", iterations=2)
    shard = store.path / "images" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[content.index(store.read([20]).images[0].astype(np.float16).tobytes()) + 100] ^= 0x40
    shard.write_bytes(content)
    out = tmp_path / "out"
    found = validate(ValidateOptions(run=run, out=out, tests="all", workers=2), progress=tiny.quiet)
    assert (found.figures["unseen"]["seen_particles"], found.figures["unseen"]["unseen_particles"]) == (152, 152)
    assert {row["row"] for row in Run.open(out).record["quarantined"]} == set(range(17, 25))
    noise = Run.open(out / "noise").record
    assert noise["result"]["particles"] == 152
    assert {row["row"] for row in noise["quarantined"]} == set(range(17, 25))


def refused(given: Given, tmp_path: Path, tests: str = "unseen", **options: object) -> str:
    with pytest.raises(InputError) as caught:
        given.validated(tmp_path / "refused", tests, **options)
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


def test_runs_that_cannot_be_tested_are_refused(honest: Given, tmp_path: Path) -> None:
    assert "not a run directory" in refused(honest, tmp_path, run=honest.others.parent)
    assert "a run of simulate" in refused(honest, tmp_path, run=honest.simulated.truth_map.parent)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(honest.run, unfinished)
    record = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert "whose status is running" in refused(honest, tmp_path, run=unfinished)
    lacking = tmp_path / "lacking"
    shutil.copytree(honest.run, lacking)
    (lacking / "half2.mrc").unlink()
    assert "has no half2.mrc" in refused(honest, tmp_path, run=lacking)
    changed = tmp_path / "changed"
    shutil.copytree(honest.run, changed)
    record["inputs"][1]["digest"] = "sha256:0"
    (changed / "run.json").write_text(json.dumps(record))
    assert "its digest differs" in refused(honest, tmp_path, run=changed)


def test_other_particles_have_to_be_others_and_alike(honest: Given, posed: Store, tmp_path: Path) -> None:
    assert "images of 32 px of 6 A; expected 32 px of 4 A" in refused(honest, tmp_path, others=posed.path)
    smaller = tiny.simulated(tmp_path / "smaller", 4, box_px=24, pixel_size_A=PIXEL)
    store = tiny.imported(smaller.particles_star, tmp_path / "smaller.zarr")
    assert "images of 24 px" in refused(honest, tmp_path, others=store.path)
    own = Path(Run.open(honest.run).record["inputs"][0]["path"])
    assert f"{REFINED} of its particles had a part" in refused(honest, tmp_path, others=own)
    assert "exclude each other" in refused(honest, tmp_path, others=honest.others, leave_out=0.2)


def test_models_of_other_units_are_refused(honest: Given, shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "models" / "2dhb.pdb").read_text().splitlines()

    def scaled(factor: float) -> Path:
        path = tmp_path / f"{factor}.pdb"
        with path.open("w") as file:
            for line in lines:
                if line.startswith("ATOM"):
                    place = [factor * float(line[start : start + 8]) for start in (30, 38, 46)]
                    line = line[:30] + "".join(f"{value:8.3f}" for value in place) + line[54:]
                    print(line, file=file)
        return path

    assert "in Angstrom" in refused(honest, tmp_path, "hand", model=scaled(0.1))
    assert "A wide, the box" in refused(honest, tmp_path, "hand", model=scaled(3.0))
    truth = mrc.read_map(honest.simulated.truth_map).array
    mrc.write_map(tmp_path / "nm.mrc", truth, PIXEL / 10)
    assert "in Angstrom" in refused(honest, tmp_path, "hand", model=tmp_path / "nm.mrc")


def test_resolutions_outside_the_box_are_refused(honest: Given, tmp_path: Path) -> None:
    assert "--noise-beyond 5 A" in refused(honest, tmp_path, "noise", noise_beyond_A=5.0)
    assert "--align-to 400 A" in refused(honest, tmp_path, align_to_A=400.0)


def test_unknown_tests_are_refused(honest: Given, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["validate", str(honest.run), "--out", str(tmp_path / "out"), "--tests", "noise,tilt"]
    assert cli.main(words) == 2
    assert "'tilt' is no test" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
