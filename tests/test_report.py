"""The report page: whole for a finished run, still a page for anything less."""

import base64
import csv
import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dcryo import figures
from dcryo.cli import main
from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.euler import matrix_from_euler
from dcryo.kernels.symmetry import operators
from dcryo.report import write_report

BOX, PIXEL_A, N = 64, 3.0, 800


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow(["" if not np.isfinite(value) else value for value in row])


def write_curves(path: Path) -> None:
    shell = np.arange(BOX // 2 + 1)
    frequency = shell / (BOX * PIXEL_A)
    with np.errstate(divide="ignore"):
        axis = {"shell": shell, "resolution_A": 1 / frequency, "frequency_1_A": frequency}
    ripple = 0.03 * np.sin(shell * 1.7) * (shell / shell[-1])

    def fall(at: float) -> np.ndarray:
        return 1 / (1 + np.exp((shell - at) / 1.6)) + ripple

    write_csv(path / "fsc.csv", {**axis, "fsc_unmasked": fall(20), "fsc_masked": fall(23)})
    write_csv(path / "fsc_truth.csv", {**axis, "fsc_unmasked": fall(21), "fsc_masked": fall(24)})
    noise = 900 * np.exp(-shell / 30) + 200
    signal = 3e4 * np.exp(-shell / 3.5) + 1
    write_csv(path / "spectra.csv", {"shell": shell, "frequency_1_A": frequency, "noise_half1": noise,
                                     "noise_half2": noise * (1 + ripple), "signal": signal})  # fmt: skip


def write_maps(path: Path) -> None:
    axis = np.arange(BOX, dtype=np.float32) - BOX // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    rng = np.random.default_rng(3)
    volume = 0.02 * rng.standard_normal((BOX, BOX, BOX)).astype(np.float32)
    for centre in rng.normal(0, 7, (60, 3)):
        distance = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2] * 0.6) ** 2
        volume += np.exp(-distance / 5)
    mrc.write_map(path / "map.mrc", volume, PIXEL_A)
    radius = np.sqrt(x**2 + y**2 + z**2)
    mrc.write_map(path / "mask.mrc", np.clip((26 - radius) / 3, 0, 1), PIXEL_A)


def some_particles() -> Particles:
    rng = np.random.default_rng(4)
    rot, psi = rng.uniform(-180, 180, (2, N))
    tilt = np.degrees(np.arccos(np.clip(rng.normal(0.1, 0.5, N), -1, 1)))
    defocus = np.repeat(rng.uniform(8000, 22000, 20), N // 20) + rng.normal(0, 200, N)
    columns = {
        "image_path": np.full(N, "particles.mrcs"),
        "image_index": np.arange(N),
        "optics_row": np.zeros(N, np.int32),
        "rotation": matrix_from_euler(rot, tilt, psi),
        "origin_A": rng.normal(0, 4, (N, 2)),
        "defocus_u_A": defocus + rng.gamma(4, 40, N),
        "defocus_v_A": defocus,
        "defocus_angle_deg": rng.uniform(0, 180, N),
        "half": np.arange(N) % 2 + 1,
        "max_probability": rng.beta(4, 1.4, N),
        "significant_poses": rng.integers(1, 200, N),
    }
    optics = {"name": np.array(["opticsGroup1"]), "group": np.array([1]), "voltage_kV": np.array([300.0]),
              "spherical_aberration_mm": np.array([2.7]), "amplitude_contrast": np.array([0.1]),
              "pixel_size_A": np.array([PIXEL_A]), "box_px": np.array([BOX])}  # fmt: skip
    return Particles(columns, optics)


def iterate(run: Run, number: int) -> None:
    run.iteration({
        "iteration": number, "resolution_A": 40 * 0.8**number + 8.5, "shell_max": 6 + 2 * number,
        "angular_sd_deg": 7.5 / 2 ** (number / 4), "searched_everywhere": 1.0 if number < 8 else 0.1,
        "median_rotation_change_deg": None if number == 1 else 30 * 0.55**number + 0.1,
        "median_shift_change_px": None if number == 1 else 2 * 0.6**number + 0.03,
        "mean_max_probability": min(0.9, 0.08 * number), "mean_significant_poses": 900 / number,
        "seconds": 31.2,
    })  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run directory such as `dcryo refine` leaves."""
    path = tmp_path_factory.mktemp("runs") / "refine"
    reference = path.parent / "reference.mrc"
    reference.write_bytes(bytes(2000))
    options = {"store": "particles.zarr", "reference": reference, "symmetry": "D2", "mask_diameter": 150.0,
               "initial_lowpass": 40.0, "out": path, "cluster": "threads", "workers": None}  # fmt: skip
    run = Run.start(path, "refine", options, [reference], seed=0)
    run.record["command"] = [
        "dcryo",
        "refine",
        "my particles.zarr",
        "--reference",
        "<model>.mrc",
        "--symmetry",
        "D2",
    ]
    for number in range(1, 13):
        iterate(run, number)
    write_curves(path)
    write_maps(path)
    star.write_particles(path / "particles.star", some_particles(), None)
    run.quarantine({"row": row, "image": f"{row + 1:06d}@particles.mrcs", "reason": "constant"} for row in (5, 77))
    run.done({"resolution_A": 8.31, "particles": N, "median_rotation_error_deg": 1.2345})
    write_report(path)
    return path


class Page(html.parser.HTMLParser):
    """What a reader sees of a page, and whether its elements are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.pictures: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open[-1:] != ["style"] and data.strip():
            self.words.append(data.strip())
            if self.open[-1] == "h2":
                self.headings.append(data)


def svg(picture: str) -> str:
    head, _, data = picture.partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def test_a_finished_refinement_shows_all_there_is(finished: Path) -> None:
    page = Page(finished / "report.html")
    assert page.headings == [
        "Surface", "Map", "Fourier shell correlation", "Noise and signal", "Convergence", "Orientations", "Shifts",
        "Defocus", "Certainty of poses", "Iterations", "Quarantined particles", "Command", "Result", "Options",
        "Versions and machine",
    ]  # fmt: skip
    assert len(page.pictures) == 9
    for words in ("8.31 Å", "800", "halves 400 + 400", "64 px", "Nyquist 6.00 Å", "D2", "done", "000078@particles.mrcs",
                  "dcryo refine 'my particles.zarr' --reference '<model>.mrc' --symmetry D2",
                  "median rotation error (°)", "1.234", "numpy", np.__version__):  # fmt: skip
        assert words in page.words, words


def test_the_page_loads_nothing_and_runs_nothing(finished: Path) -> None:
    page = Page(finished / "report.html")
    everything = page.text + "".join(map(svg, page.pictures))
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"' )>]+)""", everything)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in everything and "@import" not in everything


def test_the_same_run_gives_the_same_page(finished: Path) -> None:
    before = (finished / "report.html").read_bytes()
    assert write_report(finished) == finished / "report.html"
    assert (finished / "report.html").read_bytes() == before


def test_correlation_is_drawn_over_resolution_with_its_crossings(finished: Path) -> None:
    text = svg(Page(finished / "report.html").pictures[2])
    words = re.findall(r">([^<>]+)</text>", text)
    assert {"resolution (Å)", "0.143", "0.5", "masked", "unmasked", "masked, to the truth"} <= set(words)
    crossings = [float(word.split()[0]) for word in words if re.fullmatch(r"[0-9.]+ Å", word)]
    # The curves fall to 0.143 at 1.6 log(1/0.143 - 1) = 2.86 shells beyond 23, and to 0.5 at shell 24.
    expected = [BOX * PIXEL_A / 25.86, BOX * PIXEL_A / 24]
    assert np.allclose(crossings, expected, rtol=0.01)
    assert "DejaVu" not in text and "system-ui" in text


def axis_of(frequency_max: float) -> tuple[list[float], list[str]]:
    figure = figures.Figure()
    axes = figure.subplots()
    figures.resolution_axis(axes, frequency_max)
    return list(axes.get_xticks()), [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize("nyquist_A", [0.9, 2.0, 3.3, 7.08, 20.0, 38.0])
def test_ticks_of_the_resolution_axis_are_where_they_say_and_apart(nyquist_A: float) -> None:
    places, labels = axis_of(1 / nyquist_A)
    assert np.allclose(1 / np.array(places), np.array(labels, float))
    assert 3 <= len(places) <= 12
    assert (np.diff([0, *places]) > 0.08 / nyquist_A).all() and places[-1] <= 1 / nyquist_A


def test_cover_is_one_everywhere_for_even_views_and_peaks_where_they_crowd(monkeypatch) -> None:
    drawn = {}
    monkeypatch.setattr(figures.Axes, "pcolormesh", lambda self, x, y, density, **_: drawn.update(d=density) or Mesh())
    monkeypatch.setattr(figures.Figure, "colorbar", lambda *_, **__: Mesh())
    monkeypatch.setattr(figures, "_svg", lambda figure: "")

    class Mesh:
        outline = property(lambda self: self)

        def set_visible(self, *_) -> None: ...

        def set_label(self, *_) -> None: ...

    rng = np.random.default_rng(0)
    count = 40_000
    even = matrix_from_euler(rng.uniform(-180, 180, count), np.degrees(np.arccos(rng.uniform(-1, 1, count))), 0.0)
    figures.directions(even, operators("C1"))
    assert np.abs(drawn["d"] - 1).max() < 0.35 and abs(drawn["d"].mean() - 1) < 0.05
    figures.directions(matrix_from_euler(np.full(500, 90.0), np.full(500, 60.0), 0.0), operators("C2"))
    row, column = np.unravel_index(drawn["d"].argmax(), drawn["d"].shape)
    rows, columns = drawn["d"].shape
    latitude, longitude = (row + 0.5) / rows * 180 - 90, (column + 0.5) / columns * 360 - 180
    assert abs(latitude - 30) < 4 and abs(abs(longitude) - 90) < 4
    assert np.isclose(drawn["d"][row, (column + columns // 2) % columns], drawn["d"].max(), rtol=0.05)


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    Run.start(tmp_path, "refine", {"symmetry": "C1"})
    page = Page(write_report(tmp_path))
    assert page.headings == ["Command", "Options", "Versions and machine"]
    assert "running" in page.words and any("not finished" in words for words in page.words)


def test_a_run_on_its_way_shows_how_far_it_is(tmp_path: Path) -> None:
    run = Run.start(tmp_path, "refine", {})
    iterate(run, 1)
    page = Page(write_report(tmp_path))
    assert "Convergence" in page.headings and "Resolution so far" in page.words and "40.50 Å" in page.words


def test_a_failed_run_says_why_in_plain_text(tmp_path: Path) -> None:
    Run.start(tmp_path, "refine", {}).fail("worker <b>lost</b>")
    page = Page(write_report(tmp_path))
    assert "Why it ended" in page.headings and "worker <b>lost</b>" in page.words


def test_damaged_files_cost_their_section_and_no_more(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    (out / "map.mrc").write_bytes(b"not a map")
    (out / "fsc.csv").write_text("shell,frequency_1_A,fsc_masked\n1,x,2\n")
    (out / "particles.star").write_text("no STAR file")
    page = Page(write_report(out))
    gaps = [words for words in page.words if words.startswith("Could not be shown")]
    assert len(gaps) == 7 and any("map.mrc" in words for words in gaps)
    assert "Noise and signal" in page.headings and "Convergence" in page.headings


def test_other_jobs_show_what_they_have(finished: Path, tmp_path: Path) -> None:
    run = Run.start(tmp_path, "simulate", {"model": "model.pdb"})
    shutil.copy(finished / "particles.star", tmp_path)
    shutil.copy(finished / "map.mrc", tmp_path / "truth.mrc")
    images = np.random.default_rng(0).standard_normal((7, 32, 32)).astype(np.float32)
    with mrc.StackWriter(tmp_path / "particles.mrcs", 7, 32, PIXEL_A, "float32") as stack:
        stack.write(0, images)
    run.done({})
    page = Page(write_report(tmp_path))
    assert page.headings[:5] == ["Map", "Images", "Orientations", "Shifts", "Defocus"]
    assert "The first 7 of particles.mrcs, as they are." in page.words


def test_jobs_yet_to_come_have_a_page_too(tmp_path: Path) -> None:
    run = Run.start(tmp_path, "fold", {})
    (tmp_path / "fsc.csv").write_text("shell,frequency_1_A,fsc\n0,0,1\n1,0.1,0.9\n2,0.2,0.05\n")
    run.done({})
    page = Page(write_report(tmp_path))
    assert page.headings[0] == "Fourier shell correlation" and "fold" in page.words


def test_a_chain_of_jobs_links_their_pages(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "refined").mkdir()
    for name in ("run.json", "report.html", "map.mrc"):
        shutil.copy(finished / name, tmp_path / "refined")
    Run.start(tmp_path / "simulated", "simulate", {}).done({})
    Run.start(tmp_path, "demo", {}).done({"resolution_A": 7.5})
    page = Page(write_report(tmp_path))
    assert '<a href="refined/report.html">refined</a>' in page.text and "<td>simulated</td>" in page.text
    assert page.headings[:3] == ["Runs in this directory", "Map", "Convergence"]
    assert "What follows is of refined." in page.words


def test_command_line(tmp_path: Path, capsys) -> None:
    Run.start(tmp_path / "run", "refine", {})
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'run' / 'report.html'}\n"
    assert main(["report", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    with pytest.raises(InputError):
        write_report(tmp_path)


@pytest.mark.slow
def test_a_browser_draws_the_page(finished: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no browser (chromium) on this machine")
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--hide-scrollbars", "--window-size=1280,4000", f"--screenshot={picture}",
         (finished / "report.html").resolve().as_uri()], check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    from matplotlib.image import imread

    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[:2] == (4000, 1280)
    dark = (pixels.max(axis=2) < 0.2).mean(axis=1)
    assert dark[200:1200].max() > 0.5, "the map is drawn"
    blue = np.abs(pixels - np.array([0, 0x72, 0xB2]) / 255).max(axis=2) < 0.02
    assert blue[1200:].sum() > 5000, "the curves are drawn"
