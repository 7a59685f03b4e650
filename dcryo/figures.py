"""The figures of the report: arrays in, self-contained SVG pictures out.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; text stays text, in the reader's
fonts.
"""

import base64
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Circle, Rectangle

BLUE, SKY, ORANGE, VERMILION, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
INK, FAINT = "#1f2933", "#7b8794"

FULL_IN, HALF_IN = 11.2, 5.5
"""Widths of a figure across the page and of one in a column, in inches."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dcryo",
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"

RESOLUTION_COLOURS = "viridis_r"
"""Colours of local resolution: the finer the lighter is what eyes take for good, and yellow stands for it."""

TICKS_A = (200, 100, 60, 40, 30, 25, 20, 16, 14, 12, 10, 9, 8, 7, 6, 5.5, 5, 4.5, 4, 3.6, 3.3, 3, 2.8, 2.6,
           2.4, 2.2, 2, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8)  # fmt: skip


@dataclass(frozen=True)
class Tracks:
    """A micrograph (y, x), of shape_px (x, y) pixels before it was made small, and tracks in those: of the whole frame
    (F, 2), and (n, F, 2) of patches around their centres (n, 2)."""

    title: str
    preview: np.ndarray
    shape_px: np.ndarray
    track_px: np.ndarray
    patch_centre_px: np.ndarray
    patch_track_px: np.ndarray


@dataclass(frozen=True)
class Rings:
    """A power spectrum beside its fit (n, n), and curves along the rings, (S,) each."""

    title: str
    picture: np.ndarray
    frequency_1_A: np.ndarray
    spectrum: np.ndarray
    fit: np.ndarray
    quality: np.ndarray


@dataclass(frozen=True)
class Picks:
    """A micrograph (y, x), of shape_px (x, y) pixels before it was made small, and picks (n, 2) in those; excluded:
    a small map of areas that were left out; labels_px: (m, 2) particles that a person has marked."""

    title: str
    preview: np.ndarray
    shape_px: np.ndarray
    coordinate_px: np.ndarray
    diameter_px: float
    excluded: np.ndarray | None = None
    labels_px: np.ndarray | None = None


@matplotlib.rc_context(STYLE)
def fsc(
    frequency_1_A: np.ndarray,
    curves: Mapping[str, np.ndarray],
    thresholds: Sequence[float],
    marks: Sequence[tuple[str, float, float]],
) -> str:
    """Correlation curves against resolution.

    frequency_1_A: (S,) in 1/A. curves: legend -> (S,). thresholds: levels to draw. marks: (legend of the
    curve, threshold, resolution in A) of the crossings to point out.
    """
    figure, axes = _figure(HALF_IN, 3.9)
    styles = (
        (BLUE, "-", 2.2),
        (SKY, "-", 1.6),
        (VERMILION, "--", 1.8),
        (ORANGE, ":", 1.8),
        (GREEN, "-.", 1.6),
    )
    colours = {}
    for threshold in thresholds:
        axes.axhline(threshold, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(0.01, threshold + 0.015, f"{threshold:g}", transform=axes.get_yaxis_transform(),
                  color=FAINT, fontsize=9)  # fmt: skip
    for (name, values), (colour, line, width) in zip(curves.items(), styles * 2, strict=False):
        axes.plot(frequency_1_A, values, line, color=colour, linewidth=width, label=name)
        colours[name] = colour
    for name, threshold, resolution_A in marks:
        axes.plot(1 / resolution_A, threshold, "o", color=colours[name], markersize=5, zorder=4)
        axes.annotate(f"{resolution_A:.2f} Å", (1 / resolution_A, threshold), xytext=(6, 7),
                      textcoords="offset points", color=colours[name], fontweight="bold")  # fmt: skip
    lowest = min((float(np.nanmin(values)) for values in curves.values()), default=0.0)
    axes.set_ylim(min(-0.06, lowest - 0.05), 1.04)
    axes.set_ylabel("Fourier shell correlation")
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    resolution_axis(axes, float(frequency_1_A[-1]))
    _legend(axes, len(curves))
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def half_map_fsc(
    frequency_1_A: np.ndarray,
    curves: Mapping[str, np.ndarray],
    counts: str,
    band: tuple[np.ndarray, np.ndarray],
    half_bit: np.ndarray,
    resolution_A: float | None,
) -> str:
    """The correlations of two half maps, as they are, under masks and with random phases, against resolution.

    curves: legend -> (S,), the one that counts by its legend `counts`, with its confidence band (low, high); half_bit:
    threshold, (S,); resolution_A: where it falls to 0.143, or ends, if it may be said.
    """
    figure, axes = _figure(HALF_IN, 4.3)
    styles = {
        "corrected": (BLUE, "-", 2.0), "filtered, then masked": (INK, "-", 2.2), "masked": (SKY, "-", 1.5),
        "in a sphere": (GREEN, "-.", 1.3), "unmasked": (GREEN, "-", 1.3),
        "random phases, masked": (VERMILION, "--", 1.5), "molecule alone": (ORANGE, ":", 1.8),
    }  # fmt: skip
    for threshold in (0.143, 0.5):
        axes.axhline(threshold, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(0.99, threshold + 0.015, f"{threshold:g}", transform=axes.get_yaxis_transform(), color=FAINT,
                  fontsize=9, ha="right")  # fmt: skip
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    axes.fill_between(frequency_1_A, *band, color=styles[counts][0], alpha=0.16, linewidth=0)
    axes.plot(frequency_1_A, half_bit, color=FAINT, linewidth=1.0, linestyle=":", label="half bit")
    for name, values in curves.items():
        colour, line, width = styles[name]
        axes.plot(frequency_1_A, values, line, color=colour, linewidth=width, label=name,
                  zorder=3 if name == counts else 2.5)  # fmt: skip
    if resolution_A is not None:
        colour = styles[counts][0]
        place = 1 / resolution_A, float(np.interp(1 / resolution_A, frequency_1_A, curves[counts]))
        axes.plot(*place, "o", color=colour, markersize=5, zorder=4, clip_on=False)
        right = 1 / resolution_A > 0.8 * frequency_1_A[-1]
        axes.annotate(f"{resolution_A:.2f} Å", place, xytext=(-7 if right else 6, 8),
                      textcoords="offset points", color=colour, fontweight="bold", zorder=4,
                      ha="right" if right else "left")  # fmt: skip
    axes.set_ylim(-0.12, 1.04)
    axes.set_ylabel("Fourier shell correlation")
    resolution_axis(axes, float(frequency_1_A[-1]))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=2.2, columnspacing=1.4)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def guinier(
    frequency_1_A: np.ndarray,
    curves: Mapping[str, np.ndarray],
    slope_A2: float | None,
    fitted_A: tuple[float | None, float | None],
    resolution_A: float | None,
) -> str:
    """Logarithms of amplitudes against 1/d^2: original, weighted and sharpened (S,) and the line of the fit.

    curves: also "intercept", that of the line with a slope, fitted between two resolutions.
    """
    figure, axes = _figure(HALF_IN, 4.3)
    squares = frequency_1_A**2
    end = squares[-1] if resolution_A is None else min(squares[-1], 1.25 / resolution_A**2)
    for name, (colour, line, width) in {
        "original": (FAINT, "-", 1.5), "weighted": (BLUE, "-", 2.0), "sharpened": (GREEN, "-", 1.5),
    }.items():  # fmt: skip
        values = np.where(np.isfinite(curves[name]), curves[name], np.nan)
        shown = (squares <= (end if name == "original" or resolution_A is None else 1.001 / resolution_A**2)) & (
            frequency_1_A > 0
        )
        axes.plot(squares[shown], values[shown], line, color=colour, linewidth=width, label=name)
    low, high = fitted_A
    if slope_A2 is not None and low and high:
        ends = np.array([1 / low**2, 1 / high**2])
        axes.plot(ends, curves["intercept"][0] + slope_A2 * ends, "--", color=VERMILION, linewidth=2, label="fit")
    axes.set_xlim(0, end)
    ticks: list[float] = []
    for tick in TICKS_A:
        if 1 / tick**2 <= end and 1 / tick**2 - (ticks[-1] if ticks else 0.0) >= 0.085 * end:
            ticks.append(1 / tick**2)
    axes.set_xticks(ticks, [f"{tick**-0.5:.3g}" for tick in ticks])
    axes.set_xlabel("resolution d (Å), on a scale of 1/d²")
    axes.set_ylabel("ln(mean amplitude)")
    _legend(axes, 4)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def particles_against_resolution(
    particles: np.ndarray, resolution_A: np.ndarray, used: np.ndarray, line: tuple[float, float] | None
) -> str:
    """1/d^2 against the logarithm of the number of particles, (M,) each; used: those that the line goes through, whose
    slope and intercept are given."""
    figure, axes = _figure(HALF_IN, 3.9)
    squares = 1 / resolution_A**2
    axes.plot(particles[used], squares[used], "o", color=BLUE, markersize=6, label="on the line", zorder=4)
    if not used.all():
        axes.plot(particles[~used], squares[~used], "o", markerfacecolor="white", color=FAINT, markersize=6,
                  label="left out", zorder=4)  # fmt: skip
    ends = np.array([particles.min() / 1.3, particles.max() * 2.6])
    if line is not None:
        axes.plot(ends, line[1] + line[0] * np.log(ends), "--", color=VERMILION, linewidth=1.8, label="fit")
    axes.set_xscale("log", base=2)
    axes.set_xlim(*ends)
    axes.set_xticks(particles, [f"{number:,}" for number in particles.astype(int)])
    axes.minorticks_off()
    axes.set_xlabel("particles N, on a scale of ln N")
    low, high = axes.get_ylim()
    ticks: list[float] = []
    for tick in TICKS_A:
        if low <= tick**-2 <= high and tick**-2 - (ticks[-1] if ticks else -np.inf) >= 0.07 * (high - low):
            ticks.append(tick**-2)
    axes.set_yticks(ticks, [f"{tick**-0.5:.3g}" for tick in ticks])
    axes.set_ylabel("resolution d (Å), on a scale of 1/d²")
    _legend(axes, 3)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def seen_and_unseen(
    frequency_1_A: np.ndarray,
    correlations: Mapping[str, tuple[np.ndarray, np.ndarray]],
    promised: np.ndarray,
    aligned_to_A: float,
) -> str:
    """Correlations of images with a map, legend -> mean and standard error (S,), and what the FSC promises, (S,)."""
    figure, axes = _figure(HALF_IN, 3.9)
    for (name, (mean, error)), colour in zip(correlations.items(), (BLUE, VERMILION), strict=False):
        axes.fill_between(frequency_1_A, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, linewidth=0)
        axes.plot(frequency_1_A, mean, "-", color=colour, linewidth=2, label=name)
    axes.plot(frequency_1_A, promised, "--", color=INK, linewidth=1.5, label="promised by the FSC")
    axes.axvspan(0, 1 / aligned_to_A, color=FAINT, alpha=0.12, linewidth=0)
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    axes.set_ylabel("correlation of an image with the map")
    resolution_axis(axes, float(frequency_1_A[-1]))
    _legend(axes, 3)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def spectra(frequency_1_A: np.ndarray, curves: Mapping[str, np.ndarray]) -> str:
    """Power spectra (legend -> (S,), same scale) against resolution, on a logarithmic scale."""
    figure, axes = _figure(HALF_IN, 3.9)
    styles = {"noise": (VERMILION, "-", 1.8), "signal": (BLUE, "-", 2.2)}
    for name, values in curves.items():
        colour, line, width = styles["signal" if "signal" in name else "noise"]
        line = "--" if name.endswith("2") else line
        positive = np.where(values > 0, values, np.nan)
        axes.plot(frequency_1_A[1:], positive[1:], line, color=colour, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("power per Fourier pixel")
    resolution_axis(axes, float(frequency_1_A[-1]))
    _legend(axes, len(curves))
    return _svg(figure)


def resolution_axis(axes: Axes, frequency_max_1_A: float, apart: float = 0.085) -> None:
    """Make the x axis, linear in spatial frequency, read as resolution in Angstrom.

    apart: the least distance of ticks, as a part of the axis.
    """
    axes.set_xlim(0, frequency_max_1_A)
    ticks: list[float] = []
    for resolution_A in TICKS_A:
        frequency = 1 / resolution_A
        if frequency - (ticks[-1] if ticks else 0.0) >= apart * frequency_max_1_A and frequency <= frequency_max_1_A:
            ticks.append(frequency)
    axes.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    axes.set_xlabel("resolution (Å)")


@matplotlib.rc_context(STYLE)
def convergence(iterations: Sequence[Mapping[str, float | str | None]]) -> str:
    """Resolution, changes of the poses and their certainty per iteration, from the rows of a run record."""
    panels = (
        ("resolution (Å)", (("resolution_A", "FSC 0.143", BLUE, "-"),)),
        ("rotation (°)", (("median_rotation_change_deg", "change", BLUE, "-"),
                          ("angular_sd_deg", "uncertainty", ORANGE, "--"))),
        ("shift (px)", (("median_shift_change_px", "change", BLUE, "-"),)),
        ("probability of the best pose", (("mean_max_probability", "mean", BLUE, "-"),)),
    )  # fmt: skip
    numbers = np.array([row["iteration"] for row in iterations], float)
    present = [(label, lines) for label, lines in panels if any(key in row for row in iterations for key, *_ in lines)]
    figure = Figure(figsize=(FULL_IN, 3.0), layout=ConstrainedLayoutEngine(wspace=0.06))
    local = [row["iteration"] for row in iterations if row.get("searched_everywhere", 1.0) < 0.5]  # type: ignore[operator]
    for axes, (label, lines) in zip(np.ravel(figure.subplots(1, len(present))), present, strict=True):
        if local:
            axes.axvspan(float(local[0]) - 0.5, numbers[-1] + 0.5, color="#f0f4f8", zorder=0)  # type: ignore[arg-type]
        for key, name, colour, line in lines:
            values = np.array([np.nan if row.get(key) is None else row[key] for row in iterations], float)
            axes.plot(numbers, values, line, color=colour, marker="o", markersize=3.5, label=name)
        if len(lines) > 1:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1.2)
        if "probability" in label:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.set_xlabel("iteration")
        axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def directions(rotations: np.ndarray, operators: np.ndarray) -> str:
    """How the viewing directions cover the sphere, as density relative to an even cover.

    rotations: (N, 3, 3). operators: (G, 3, 3) of the point group; a view from d is also one from d g. The
    density is a sum of von Mises-Fisher kernels that narrow as the particles grow in number; the projection
    (Mollweide) keeps areas.
    """
    views = np.einsum("nj,gjk->gnk", rotations[:, 2, :], operators).reshape(-1, 3)
    rows, columns = 60, 120  # cells of equal area
    z = (np.arange(rows) + 0.5) / rows * 2 - 1
    row = np.clip(((views[:, 2] + 1) / 2 * rows).astype(int), 0, rows - 1)
    column = ((np.arctan2(views[:, 1], views[:, 0]) + np.pi) / (2 * np.pi) * columns).astype(int) % columns
    counts = np.bincount(row * columns + column, minlength=rows * columns).reshape(rows, columns)

    # A turn about z shifts the kernel along the longitude, so there its sum is a cyclic convolution.
    shown = np.sin(np.radians(np.arange(-88.5, 90, 3)))
    turn = np.cos(2 * np.pi * np.arange(columns) / columns)
    cosine = np.outer(shown, z)[..., None] + np.sqrt(np.outer(1 - shown**2, 1 - z**2))[..., None] * turn
    width_rad = np.clip(2.0 / len(views) ** 0.3, np.radians(4), np.radians(20))
    kernel = np.exp((cosine - 1) / width_rad**2)
    density = np.fft.irfft((np.fft.rfft(kernel) * np.fft.rfft(counts)).sum(axis=1), columns)
    density /= kernel.mean(axis=(1, 2))[:, None] * len(views)

    figure = Figure(figsize=(HALF_IN, 3.6))
    axes = figure.subplots(subplot_kw={"projection": "mollweide"})
    edges = np.linspace(-np.pi, np.pi, columns + 1), np.linspace(-np.pi / 2, np.pi / 2, len(shown) + 1)
    mesh = axes.pcolormesh(*edges, density, cmap="viridis", vmin=0, rasterized=True)
    axes.grid(color="white", alpha=0.35, linewidth=0.6)
    axes.set_xticks(np.radians([-120, -60, 0, 60, 120]), [""] * 5)
    axes.set_yticks(np.radians([-60, -30, 0, 30, 60]), ["150°", "120°", "90°", "60°", "30°"])
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", shrink=0.7, pad=0.04, aspect=32)
    bar.set_label("density (1 = even cover)")
    bar.outline.set_visible(False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def map_views(volume: np.ndarray, voxel_size_A: float, mask: np.ndarray | None) -> str:
    """Central slices (above) and projections (below) of a map (D, D, D) along z, y, x; its mask as a line."""
    # An engine that finds the margins would draw all pictures twice.
    margins = {"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.96, "wspace": 0.03, "hspace": 0.1}
    figure = Figure(figsize=(FULL_IN, 7.9))
    figure.set_layout_engine("none")
    grid = figure.subplots(2, 3, gridspec_kw=margins)
    seen = slice(None) if mask is None else _extent(mask)
    slices = [volume.take(size // 2, axis)[seen, seen] for axis, size in enumerate(volume.shape)]
    projections = [volume.sum(axis)[seen, seen] for axis in range(3)]
    limits = np.percentile(np.concatenate([part.ravel() for part in slices]), [0.5, 99.8])
    for axis, (right, up) in enumerate((("x", "y"), ("x", "z"), ("y", "z"))):
        _picture(grid[0, axis], slices[axis], voxel_size_A, limits)
        if mask is not None:
            edge = mask.take(mask.shape[axis] // 2, axis)[seen, seen]
            if edge.min() < 0.5 < edge.max():
                grid[0, axis].contour(edge, levels=[0.5], colors=ORANGE, linewidths=1.1)
        _picture(grid[1, axis], projections[axis], voxel_size_A, np.percentile(projections[axis], [0.5, 99.9]))
        grid[0, axis].set_title(f"slice ({right} to the right, {up} up)")
        grid[1, axis].set_title(f"projection ({right} to the right, {up} up)")
    return _svg(figure, dpi=130)


@matplotlib.rc_context(STYLE)
def local_resolution(volume: np.ndarray, resolution_A: np.ndarray, mask: np.ndarray, voxel_size_A: float) -> str:
    """Central slices of a map (D, D, D) along z, y, x, coloured by the local resolution inside a mask, and below them
    how much of the inside has which resolution."""
    figure = Figure(figsize=(FULL_IN, 5.6))
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 1))
    seen = _extent(mask)
    inside = resolution_A[mask > 0.5] if np.any(mask > 0.5) else resolution_A.ravel()
    low, high = np.percentile(inside, [1, 97])
    colours = {"cmap": RESOLUTION_COLOURS, "vmin": low, "vmax": max(high, low * 1.01)}
    slices = [volume.take(size // 2, axis)[seen, seen] for axis, size in enumerate(volume.shape)]
    limits = np.percentile(np.concatenate([part.ravel() for part in slices]), [0.5, 99.8])
    pictures = []
    for axis, (right, up) in enumerate((("x", "y"), ("x", "z"), ("y", "z"))):
        axes = figure.add_subplot(grid[0, axis])
        pictures.append(axes)
        _picture(axes, slices[axis], voxel_size_A, limits)
        shown = resolution_A.take(len(volume) // 2, axis)[seen, seen]
        opacity = 0.6 * (mask.take(len(volume) // 2, axis)[seen, seen] > 0.5)
        coloured = axes.imshow(shown, origin="lower", alpha=opacity, interpolation="nearest", **colours)
        axes.set_title(f"slice ({right} to the right, {up} up)")
    bar = figure.colorbar(coloured, ax=pictures, shrink=0.8, pad=0.01)
    bar.set_label("local resolution (Å)")
    bar.outline.set_visible(False)
    axes = figure.add_subplot(grid[1, :])
    axes.hist(inside, bins=60, range=(low, max(high, low * 1.01)), weights=np.full(len(inside), 100 / len(inside)),
              color=BLUE, linewidth=0)  # fmt: skip
    axes.set(xlabel="local resolution (Å)", ylabel="% of the inside")
    axes.grid(axis="x", visible=False)
    return _svg(figure, dpi=130)


@matplotlib.rc_context(STYLE)
def surfaces(pictures: Sequence[np.ndarray], width_A: float, limits_A: tuple[float, float] | None) -> str:
    """Views (H, W, 3) uint8 of a surface along z, y and x, first row lowest; limits_A: ends of the bar of colours."""
    figure = Figure(figsize=(FULL_IN, 4.3))
    axes_of_views = figure.subplots(1, 3)
    for axes, picture, (right, up), towards in zip(
        axes_of_views, pictures, (("x", "y"), ("x", "z"), ("y", "z")), ("z", "-y", "x"), strict=True
    ):
        axes.imshow(picture, origin="lower", interpolation="none")
        axes.set_axis_off()
        axes.set_title(f"seen from {towards} ({right} to the right, {up} up)")
    across = pictures[0].shape[1]
    length_A = _round_length(width_A / 4)
    start = 0.03 * across
    axes_of_views[0].plot([start, start + across * length_A / width_A], [start, start], color=INK, linewidth=3,
                          solid_capstyle="butt")  # fmt: skip
    axes_of_views[0].text(start, 1.6 * start, f"{length_A:g} Å", fontsize=9.5, va="bottom")
    if limits_A is not None:
        scale = ScalarMappable(Normalize(*limits_A), RESOLUTION_COLOURS)
        bar = figure.colorbar(scale, ax=list(axes_of_views), shrink=0.8, pad=0.01)
        bar.set_label("local resolution (Å)")
        bar.outline.set_visible(False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def series(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], titles: Sequence[str]) -> str:
    """Rows of views (H, W, 3) uint8 of surfaces, first row of pixels lowest, each with a caption below and each row
    with a title."""
    across = max(len(row) for row in rows)
    side = FULL_IN / across
    figure = Figure(figsize=(FULL_IN, len(rows) * (side + 0.55)))
    grid = figure.subplots(len(rows), across, squeeze=False)
    for axes_of_row, row, words, title in zip(grid, rows, captions, titles, strict=True):
        for axes in axes_of_row:
            axes.set_axis_off()
        for axes, picture, caption in zip(axes_of_row, row, words, strict=False):
            axes.imshow(picture, origin="lower", interpolation="none")
            axes.text(0.5, -0.03, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8.5)
        axes_of_row[0].set_title(title, loc="left")
    return _jpeg(figure)


@matplotlib.rc_context(STYLE)
def coordinates(values: np.ndarray, names: Sequence[str]) -> str:
    """Coordinates (n, K) of particles: a histogram of each, and the next against it as counts over the plane."""
    count = values.shape[1]
    across = min(count, 4)
    figure = Figure(figsize=(FULL_IN, 2.7 * (1 + (count > 1))))
    grid = figure.subplots(1 + (count > 1), across, squeeze=False)
    for k in range(across):
        _histogram(grid[0, k], values[:, k], names[k])
        if count > 1:
            other = (k + 1) % count
            grid[1, k].hexbin(values[:, k], values[:, other], gridsize=int(np.clip(len(values) ** 0.4, 15, 50)),
                              mincnt=1, cmap="viridis", rasterized=True, linewidths=0)  # fmt: skip
            grid[1, k].set(xlabel=names[k], ylabel=names[other])
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def directional(
    frequency_1_A: np.ndarray,
    curves: Mapping[str, np.ndarray],
    directions: np.ndarray,
    resolution_A: np.ndarray,
    operators: np.ndarray,
) -> str:
    """Conical FSCs against resolution, and the resolution over the sphere of directions (Mollweide's projection).

    frequency_1_A: (S,); curves: "fsc", "best", "worst", "least" and "greatest" -> (S,); directions: (N, 3), one of each
    and its opposite and symmetry mates; resolution_A: (N,); operators: (G, 3, 3).
    """
    figure = Figure(figsize=(FULL_IN, 4.0))
    axes = figure.add_subplot(1, 2, 1)
    axes.fill_between(frequency_1_A, curves["least"], curves["greatest"], color=SKY, alpha=0.3, linewidth=0,
                      label="all directions")  # fmt: skip
    axes.axhline(0.143, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    named = (("fsc", "whole map", BLUE, 2.2), ("best", "best", GREEN, 1.8), ("worst", "worst", VERMILION, 1.8))
    for name, label, colour, width in named:
        axes.plot(frequency_1_A, curves[name], color=colour, linewidth=width, label=label)
    axes.set_ylim(-0.15, 1.04)
    axes.set_ylabel("Fourier shell correlation in cones")
    resolution_axis(axes, float(frequency_1_A[-1]))
    _legend(axes, 4)

    sphere = figure.add_subplot(1, 2, 2, projection="mollweide")
    longitude, latitude = np.radians(np.arange(-178.5, 180, 3)), np.radians(np.arange(-88.5, 90, 3))
    across = np.cos(latitude)[:, None]
    there = np.stack(np.broadcast_arrays(across * np.cos(longitude), across * np.sin(longitude),
                                         np.sin(latitude)[:, None]), axis=-1)  # fmt: skip
    nearness = np.stack([np.abs(there @ (directions @ g.T).T) for g in operators]).max(axis=0)
    edges = np.linspace(-np.pi, np.pi, 121), np.linspace(-np.pi / 2, np.pi / 2, 61)
    # Curves that never rise have no resolution to speak of: the colours end before.
    limits = resolution_A.min(), max(np.percentile(resolution_A, 98), 1.05 * resolution_A.min())
    mesh = sphere.pcolormesh(*edges, resolution_A[nearness.argmax(axis=-1)], cmap="viridis_r", rasterized=True,
                             vmin=limits[0], vmax=limits[1])  # fmt: skip
    sphere.grid(color="white", alpha=0.35, linewidth=0.6)
    sphere.set_xticks(np.radians([-120, -60, 0, 60, 120]), [""] * 5)
    sphere.set_yticks(np.radians([-60, -30, 0, 30, 60]), ["-60°", "-30°", "0°", "30°", "60°"])
    bar = figure.colorbar(mesh, ax=sphere, orientation="horizontal", shrink=0.7, pad=0.04, aspect=32)
    bar.set_label("resolution along the direction (Å)")
    bar.outline.set_visible(False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def q_by_residue(
    chains: Mapping[str, tuple[np.ndarray, np.ndarray]], others: Sequence[tuple[np.ndarray, np.ndarray]],
    expected: float | None,
) -> str:  # fmt: skip
    """Q-scores along the chains of a model.

    chains: name -> numbers of residues and their Q-scores, (R,) each, a line for each; others: the same of chains that
    are shown together, as the range that nine tenths of them fill at each number; expected: a level to compare with.
    """
    figure, axes = _figure(FULL_IN, 3.9)
    if others:
        numbers, q = (np.concatenate(part) for part in zip(*others, strict=True))
        shown = np.unique(numbers)
        band = np.array([np.nanpercentile(q[numbers == number], (5, 95)) if np.isfinite(q[numbers == number]).any()
                         else (np.nan, np.nan) for number in shown])  # fmt: skip
        axes.fill_between(shown, band[:, 0], band[:, 1], color=FAINT, alpha=0.3, linewidth=0,
                          label=f"{len(others)} more")  # fmt: skip
    colours = (BLUE, VERMILION, GREEN, ORANGE, SKY, "#CC79A7", INK, FAINT)
    for (name, (numbers, q)), colour in zip(chains.items(), colours, strict=False):
        # A line does not cross what the model lacks.
        gaps = np.flatnonzero(np.diff(numbers) > 1) + 1
        axes.plot(np.insert(numbers.astype(float), gaps, np.nan), np.insert(q, gaps, np.nan), color=colour,
                  linewidth=1.0, alpha=0.85, label=name)  # fmt: skip
    if expected is not None:
        axes.axhline(expected, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(0.002, expected + 0.01, "expected", transform=axes.get_yaxis_transform(), fontsize=9)
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    axes.set(xlabel="residue", ylabel="mean Q-score of its atoms")
    axes.margins(x=0.01)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=9, handlelength=1.6, columnspacing=1.4)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def images(stack: np.ndarray) -> str:
    """Images (N, D, D) side by side, up to six in a row, each on its own grey scale."""
    across = min(6, len(stack))
    down = -(-len(stack) // across)
    figure = Figure(figsize=(FULL_IN, FULL_IN / across * down), layout=ConstrainedLayoutEngine(wspace=0.02))
    for axes, image in itertools.zip_longest(np.ravel(figure.subplots(down, across)), stack):
        axes.set_axis_off()
        if image is not None:
            low, high = np.percentile(image, [1, 99])
            axes.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=high)
    return _svg(figure, dpi=110)


@matplotlib.rc_context(STYLE)
def defocus(mean_A: np.ndarray, astigmatism_A: np.ndarray) -> str:
    """Histograms of the defocus and of the astigmatism, (N,) each in A."""
    figure = Figure(figsize=(HALF_IN, 3.0))
    left, right = figure.subplots(1, 2)
    _histogram(left, mean_A / 1e4, "defocus (µm)")
    _histogram(right, astigmatism_A / 10, "astigmatism (nm)")
    right.set_ylabel("")
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def defocus_changes(change_A: np.ndarray, mean_A: np.ndarray, spread_A: np.ndarray) -> str:
    """Changes of the defocus of particles (N,), and their means and spreads in M micrographs, (M,), in A."""
    figure = Figure(figsize=(HALF_IN, 3.3))
    left, right = figure.subplots(1, 2)
    reach = max(1.0, float(np.percentile(np.abs(change_A), 99.5)))
    _histogram(left, np.clip(change_A, -reach, reach), "change of defocus (Å)")
    right.plot(mean_A, spread_A, "o", color=BLUE, markersize=3, alpha=0.6, markeredgewidth=0)
    right.set(xlabel="mean of a micrograph (Å)", ylabel="spread in it (Å)")
    right.set_ylim(bottom=0)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def over_micrographs(places: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Particles where they lie: title -> coordinates (n, 2) in pixels, and defocus less its mean (n,) in A."""
    figure, grid = _gallery(len(places), 3, 3.4)
    reach = max(1.0, float(np.percentile(np.abs(np.concatenate([values for _, values in places.values()])), 98)))
    dots = None
    for axes, (title, (place, values)) in zip(grid, places.items(), strict=False):
        axes.set_axis_on()
        axes.grid(visible=False)
        dots = axes.scatter(
            place[:, 0], place[:, 1], c=values, cmap="RdBu_r", vmin=-reach, vmax=reach, s=14, linewidths=0
        )
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.set_title(title, fontsize=9)
    if dots is not None:
        figure.colorbar(dots, ax=grid, label="defocus less the mean (Å)", shrink=0.7).outline.set_visible(False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def phases(pictures: Mapping[str, np.ndarray]) -> str:
    """Phases of optics groups over the Fourier plane: name -> (4, D, D) in rad, odd observed and fitted, even observed
    and fitted. Each pair has one scale."""
    titles = ("odd, observed", "odd, fitted", "even, observed", "even, fitted")
    figure = Figure(figsize=(FULL_IN, 3.0 * len(pictures)))
    grid = figure.subplots(len(pictures), 4, squeeze=False)
    for line, (name, stack) in zip(grid, pictures.items(), strict=True):
        seen = _disc_extent(stack)
        for first in (0, 2):
            pair = np.rad2deg(stack[first : first + 2, seen, seen])
            reach = max(1.0, float(np.percentile(np.abs(pair), 99)))
            for axes, picture, title in zip(line[first:], pair, titles[first : first + 2], strict=False):
                drawn = axes.imshow(picture, cmap="RdBu_r", origin="lower", vmin=-reach, vmax=reach)
                axes.set_axis_off()
                axes.set_title(f"{name}: {title}", fontsize=9)
            figure.colorbar(drawn, ax=line[first : first + 2], label="phase (°)", shrink=0.8).outline.set_visible(False)
    return _jpeg(figure)


def _disc_extent(stack: np.ndarray) -> slice:
    """The part of each axis where pictures (n, D, D) about their middle are not blank."""
    used = np.flatnonzero(np.any(stack != 0, axis=(0, 1)))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(None)


@matplotlib.rc_context(STYLE)
def precision_recall(curves: Mapping[str, np.ndarray], mark: tuple[float, float] | None = None) -> str:
    """Precision against recall over thresholds. curves: legend -> (n, 2) of recall and precision, from the best picks
    on; mark: recall and precision of the picks that were taken. Thin lines are of equal F1."""
    figure, axes = _figure(HALF_IN, 3.9)
    recall = np.linspace(0.01, 1, 200)
    for f1 in (0.5, 0.6, 0.7, 0.8, 0.9):
        with np.errstate(divide="ignore"):
            level = np.where(recall > f1 / 2, f1 * recall / (2 * recall - f1), np.nan)
        shown = level <= 1.0
        axes.plot(recall[shown], level[shown], color=FAINT, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.text(1.01, f1 / (2 - f1), f"F1 {f1:g}", color=FAINT, fontsize=8.5, va="center")
    for (name, values), colour in zip(curves.items(), itertools.cycle((BLUE, ORANGE, GREEN, VERMILION, SKY))):
        axes.plot(values[:, 0], values[:, 1], color=colour, linewidth=2, label=name)
    if mark is not None:
        axes.plot(*mark, "o", color=VERMILION, markersize=6, zorder=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    if len(curves) > 1:
        axes.legend(loc="lower left")
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def shifts(origin_A: np.ndarray) -> str:
    """Where the particles' origins lie, (N, 2) in A, as counts over the plane."""
    figure, axes = _figure(HALF_IN, 3.6)
    reach = max(1.0, float(np.percentile(np.abs(origin_A), 99.5)) * 1.1)
    cells = axes.hexbin(origin_A[:, 0], origin_A[:, 1], gridsize=int(np.clip(len(origin_A) ** 0.4, 15, 60)),
                        extent=(-reach, reach, -reach, reach), mincnt=1, cmap="viridis", rasterized=True,
                        linewidths=0)  # fmt: skip
    axes.set(aspect="equal", xlabel="shift along x (Å)", ylabel="shift along y (Å)")
    figure.colorbar(cells, ax=axes, label="particles", shrink=0.9).outline.set_visible(False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def certainty(max_probability: np.ndarray) -> str:
    """Histogram of the probability of each particle's best pose, (N,)."""
    figure, axes = _figure(HALF_IN, 3.0)
    _histogram(axes, max_probability, "probability of the best pose")
    axes.set_xlim(left=0)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def histograms(columns: Mapping[str, np.ndarray], across: int = 3) -> str:
    """Histograms side by side; label of the axis -> (N,). Values past the 99th percentile are in the last bar."""
    down = -(-len(columns) // across)
    figure = Figure(figsize=(FULL_IN, 2.9 * down))
    for axes, item in itertools.zip_longest(np.ravel(figure.subplots(down, across, squeeze=False)), columns.items()):
        if item is None:
            axes.set_axis_off()
            continue
        label, values = item
        values = values[np.isfinite(values)]
        _histogram(axes, np.minimum(values, np.percentile(values, 99)) if len(values) else values, label)
        axes.set_ylabel("micrographs")
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def tracks(pictures: Sequence[Tracks]) -> str:
    """Micrographs with the tracks of their frames, enlarged: of the whole frame from the centre, and of patches."""
    figure, grid = _gallery(len(pictures), 3, 3.75)
    for axes, picture in zip(grid, pictures, strict=False):
        _, to_preview = _preview(axes, picture.preview, picture.shape_px, picture.title)
        lengths = [np.ptp(track, axis=0).max(initial=0) for track in (picture.track_px, *picture.patch_track_px)]
        # The longest is drawn over a quarter of the picture.
        gain = picture.preview.shape[1] / 4 / max(max(lengths, default=0), 1e-6)
        half = np.array(picture.preview.shape[::-1]) / 2
        for centre, track in zip(picture.patch_centre_px * to_preview, picture.patch_track_px, strict=True):
            axes.plot(*(centre + gain * (track - track[0])).T, color=SKY, linewidth=1.1)
            axes.plot(*centre, "o", color=SKY, markersize=2.4)
        axes.plot(*(half + gain * (picture.track_px - picture.track_px[0])).T, color=ORANGE, linewidth=1.8)
        axes.plot(*half, "o", color=ORANGE, markersize=3.5)
    return _jpeg(figure)


@matplotlib.rc_context(STYLE)
def thon_rings(pictures: Sequence[Rings]) -> str:
    """Power spectra beside their fits, and below each the curves along the rings."""
    rows = -(-len(pictures) // 3)
    figure = Figure(figsize=(FULL_IN, 5.6 * rows))
    grid = figure.subplots(2 * rows, 3, squeeze=False, gridspec_kw={"height_ratios": [3.4, 1.5] * rows})
    for axes in grid.ravel():
        axes.set_axis_off()
    for place, picture in enumerate(pictures):
        row, column = 2 * (place // 3), place % 3
        above, below = grid[row, column], grid[row + 1, column]
        low, high = np.percentile(picture.picture, [1, 99.5])
        above.imshow(picture.picture, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-9))
        above.set_title(picture.title)
        below.set_axis_on()
        frequency = picture.frequency_1_A
        shown = frequency > 1 / 22
        # Rings of the specimen itself are far stronger at low resolution than those that the fit is about.
        size = max(float(np.abs(picture.fit[shown]).max(initial=0)), 1e-9)
        below.plot(frequency, picture.spectrum / size, color=BLUE, linewidth=1.0, label="spectrum")
        below.plot(frequency, picture.fit / size, color=ORANGE, linewidth=1.0, label="fit")
        below.plot(frequency, picture.quality, color=GREEN, linewidth=1.1, label="agreement")
        below.set_ylim(-1.25, 1.25)
        resolution_axis(below, float(frequency[-1]), apart=0.14)
        if place == 0:
            below.legend(fontsize=8, ncols=3, loc="lower right", handlelength=1.2, columnspacing=0.8)
    return _jpeg(figure)


@matplotlib.rc_context(STYLE)
def picks(pictures: Sequence[Picks]) -> str:
    """Micrographs with a circle of the particle's diameter around each pick; what is excluded is shaded, and particles
    that a person has marked are crosses."""
    figure, grid = _gallery(len(pictures), 3, 3.75)
    for axes, picture in zip(grid, pictures, strict=False):
        extent, to_preview = _preview(axes, picture.preview, picture.shape_px, picture.title)
        if picture.excluded is not None and picture.excluded.any():
            shade = np.where(picture.excluded > 0, 1.0, np.nan)
            axes.imshow(shade, cmap="autumn", origin="lower", alpha=0.35, extent=extent, vmin=0, vmax=1.5)
        radius = picture.diameter_px / 2 * to_preview[0]
        circles = [Circle(tuple(place), radius) for place in picture.coordinate_px * to_preview]
        axes.add_collection(PatchCollection(circles, facecolor="none", edgecolor=ORANGE, linewidth=0.9))
        if picture.labels_px is not None:
            axes.plot(*(picture.labels_px * to_preview).T, "+", color=SKY, markersize=4, markeredgewidth=0.9)
    return _jpeg(figure)


@matplotlib.rc_context(STYLE)
def class_convergence(iterations: Sequence[Mapping[str, float]]) -> str:
    """Resolution of classes and change of class per iteration, from the rows of a run record."""
    figure = Figure(figsize=(FULL_IN, 2.9))
    numbers = [row["iteration"] for row in iterations]
    panels = (("resolution of the classes (Å)", "resolution_A", 1), ("changed class (%)", "changed", 100),
              ("log-evidence of an image", "mean_log_evidence", 1))  # fmt: skip
    for axes, (label, name, factor) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(numbers, [factor * row[name] for row in iterations], color=BLUE, marker="o", markersize=3)
        axes.set(xlabel="iteration", ylabel=label)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def evidence(iterations: Sequence[Mapping[str, Any]], blob: float | None) -> str:
    """Log-evidence of an image in each start per iteration, from the rows of a run record, those over all images apart;
    that of a blob as a line."""
    figure, axes = _figure(FULL_IN, 3.2)
    descent = [row for row in iterations if row["phase"] == "descent"]
    everything = [row for row in iterations if row["phase"] != "descent"]
    for start in range(len(descent[0]["log_evidence"]) if descent else 0):
        numbers, values = zip(*((row["iteration"], row["log_evidence"][start]) for row in descent), strict=True)
        axes.plot(numbers, values, linewidth=1.2, label=f"start {start + 1}" if start < 6 else None)
    if everything:
        numbers, values = zip(*((row["iteration"], row["log_evidence"][0]) for row in everything), strict=True)
        axes.plot(numbers, values, color=INK, marker="o", markersize=4, label="all images")
    if blob is not None:
        axes.axhline(blob, color=INK, linestyle=":", linewidth=1, label="a blob")
    axes.set(xlabel="iteration", ylabel="log-evidence of an image")
    axes.legend(frameon=False, ncols=4)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def models(volumes: Sequence[np.ndarray], captions: Sequence[str]) -> str:
    """Maps (D, D, D), one in a row: three central slices and three projections, each on its own grey scale."""
    side = FULL_IN / 6
    height = len(volumes) * (side + 0.3)
    figure = Figure(figsize=(FULL_IN, height))
    figure.set_layout_engine("none")
    margins = {"left": 0.005, "right": 0.995, "top": 0.99, "bottom": 0.25 / height, "wspace": 0.03,
               "hspace": 0.3 / side}  # fmt: skip
    grid = figure.subplots(len(volumes), 6, squeeze=False, gridspec_kw=margins)
    for row, volume, caption in zip(grid, volumes, captions, strict=True):
        slices = [volume.take(len(volume) // 2, axis) for axis in range(3)]
        for axes, image in zip(row, [*slices, *(volume.sum(axis) for axis in range(3))], strict=True):
            low, high = np.percentile(image, [0.5, 99.8])
            axes.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-9))
            axes.set_axis_off()
        row[0].text(0, -0.04, caption, transform=row[0].transAxes, va="top", fontsize=8.5, color=INK)
    return _jpeg(figure)


@matplotlib.rc_context(STYLE)
def surface_rows(pictures: Sequence[Sequence[np.ndarray]], captions: Sequence[str], width_A: float) -> str:
    """Views (H, W, 3) uint8 of several surfaces, one in a row, along z, y and x, first row lowest."""
    side = FULL_IN / 3.6
    height = len(pictures) * (side + 0.3)
    figure = Figure(figsize=(FULL_IN, height))
    figure.set_layout_engine("none")
    margins = {"left": 0.1, "right": 0.9, "top": 0.995, "bottom": 0.28 / height, "wspace": 0.02, "hspace": 0.3 / side}
    grid = figure.subplots(len(pictures), 3, squeeze=False, gridspec_kw=margins)
    for row, views, caption in zip(grid, pictures, captions, strict=True):
        for axes, picture in zip(row, views, strict=True):
            axes.imshow(picture, origin="lower", interpolation="none")
            axes.set_axis_off()
        row[0].text(0, -0.02, caption, transform=row[0].transAxes, va="top", fontsize=8.5, color=INK)
    across, length_A = pictures[0][0].shape[1], _round_length(width_A / 4)
    start = 0.03 * across
    grid[0, 0].plot([start, start + across * length_A / width_A], [start, start], color=INK, linewidth=3,
                    solid_capstyle="butt")  # fmt: skip
    grid[0, 0].text(start, 1.6 * start, f"{length_A:g} Å", fontsize=9.5, va="bottom")
    return _jpeg(figure)


@matplotlib.rc_context(STYLE)
def differences(volumes: Sequence[np.ndarray], captions: Sequence[str], first: np.ndarray) -> str:
    """Central slices of differences (D, D, D) from a first map, one in a row, over slices of that map as lines."""
    side = FULL_IN / 3.6
    height = len(volumes) * (side + 0.3)
    figure = Figure(figsize=(FULL_IN, height))
    figure.set_layout_engine("none")
    margins = {"left": 0.1, "right": 0.9, "top": 0.995, "bottom": 0.28 / height, "wspace": 0.03, "hspace": 0.3 / side}
    grid = figure.subplots(len(volumes), 3, squeeze=False, gridspec_kw=margins)
    limit = float(np.percentile(first, 99.9))
    for row, volume, caption in zip(grid, volumes, captions, strict=True):
        for axis, axes in enumerate(row):
            axes.imshow(volume.take(len(volume) // 2, axis), cmap="RdBu_r", origin="lower", vmin=-limit, vmax=limit,
                        interpolation="bicubic")  # fmt: skip
            axes.contour(first.take(len(first) // 2, axis), levels=[0.3 * limit], colors=INK, linewidths=0.6)
            axes.set_axis_off()
        row[0].text(0, -0.02, caption, transform=row[0].transAxes, va="top", fontsize=8.5, color=INK)
    return _jpeg(figure)


@matplotlib.rc_context(STYLE)
def class_confidence(number: np.ndarray, probability: np.ndarray) -> str:
    """How many particles have which probability of their class, (n,) each; the classes one upon the other."""
    figure, axes = _figure(FULL_IN, 2.9)
    kinds = np.unique(number).tolist()
    colours = [matplotlib.colormaps["tab20"]((k - 1) % 20) for k in kinds]
    axes.hist([probability[number == k] for k in kinds], bins=50, range=(0, 1), stacked=True, color=colours,
              label=[f"class {k}" for k in kinds])  # fmt: skip
    axes.set(xlabel="probability of the class", ylabel="particles", xlim=(0, 1), yscale="symlog")
    axes.yaxis.set_major_formatter("{x:g}")
    if len(kinds) <= 12:
        figure.legend(loc="outside upper center", ncols=min(len(kinds), 6), frameon=False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def flow(iterations: Sequence[int], table: np.ndarray) -> str:
    """Particles of classes over iterations as bands; table: (I, K, K), how many went from class to class in each."""
    figure, axes = _figure(FULL_IN, 3.8)
    count, kinds = len(iterations), table.shape[1]
    colours = [matplotlib.colormaps["tab20"](k % 20) for k in range(kinds)]
    sizes = table.sum(axis=1)
    width = 0.12
    for place in range(count):
        below = np.concatenate([[0], np.cumsum(sizes[place])])
        for k in range(kinds):
            label = f"class {k + 1}" if place == 0 and kinds <= 12 else None
            axes.bar(place, sizes[place, k], 2 * width, bottom=below[k], color=colours[k], linewidth=0, label=label)
        if place == 0:
            continue
        left = np.concatenate([[0], np.cumsum(sizes[place - 1])])[:-1]
        right = below[:-1].copy()
        for source, target in np.ndindex(kinds, kinds):
            went = table[place, source, target]
            if went > 0:
                edges = [left[source], left[source] + went], [right[target], right[target] + went]
                (left_low, left_high), (right_low, right_high) = edges
                axes.fill_between([place - 1 + width, place - width], [left_low, right_low], [left_high, right_high],
                                  color=colours[source], alpha=0.35, linewidth=0)  # fmt: skip
                left[source] += went
                right[target] += went
    shown = range(0, count, max(1, count // 12))
    axes.set(xlabel="iteration", ylabel="particles", xticks=list(shown), xticklabels=[iterations[n] for n in shown])
    axes.set(xlim=(-0.4, count - 0.6), ylim=(0, float(sizes.sum(axis=1).max())))
    axes.grid(visible=False)
    if kinds <= 12:
        figure.legend(loc="outside upper center", ncols=min(kinds, 6), frameon=False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def classes(images: np.ndarray, captions: Sequence[str], good: np.ndarray) -> str:
    """Class averages (K, D, D), each on its own grey scale, with a caption below; those that are not good are
    framed."""
    across = 5 if len(images) <= 10 else 8 if len(images) <= 40 else 10
    down = -(-len(images) // across)
    side = FULL_IN / across
    figure = Figure(figsize=(FULL_IN, down * (side + 0.5)))
    figure.set_layout_engine("none")
    margins = {"left": 0.005, "right": 0.995, "top": 0.998, "bottom": 0.45 / (down * (side + 0.5)), "wspace": 0.04,
               "hspace": 0.5 / side}  # fmt: skip
    grid = np.ravel(figure.subplots(down, across, squeeze=False, gridspec_kw=margins))
    for axes in grid:
        axes.set_axis_off()
    for axes, image, caption, kept in zip(grid, images, captions, good, strict=False):
        low, high = np.percentile(image, [1, 99.7])
        axes.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-9), interpolation="bicubic")
        axes.text(0.5, -0.03, caption, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, linespacing=1.15,
                  color=INK if kept else VERMILION)  # fmt: skip
        if not kept:
            axes.add_patch(
                Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, color=VERMILION, linewidth=1.6)
            )
    return _jpeg(figure)


def _gallery(count: int, across: int, side_in: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(FULL_IN, side_in * -(-count // across)))
    grid = np.ravel(figure.subplots(-(-count // across), across, squeeze=False))
    for axes in grid:
        axes.set_axis_off()
    return figure, list(grid)


def _preview(
    axes: Axes, preview: np.ndarray, shape_px: np.ndarray, title: str
) -> tuple[tuple[float, float, float, float], np.ndarray]:
    """A small micrograph, y up. Returns its extent and the factors (x, y) from the micrograph's pixels to its own."""
    low, high = np.percentile(preview, [0.5, 99.5])
    extent = (-0.5, preview.shape[1] - 0.5, -0.5, preview.shape[0] - 0.5)
    axes.imshow(preview, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-6), extent=extent)
    axes.set(xlim=extent[:2], ylim=extent[2:])
    axes.set_title(title, fontsize=9)
    return extent, np.array(preview.shape[::-1]) / np.asarray(shape_px)


def _figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in))
    return figure, figure.subplots()


def resolution_palette(scaled: np.ndarray) -> np.ndarray:
    """Colours (..., 3), 0 to 1, of the bar of local resolution, from its one end (0) to the other (1)."""
    return np.asarray(matplotlib.colormaps[RESOLUTION_COLOURS](scaled))[..., :3]


def _legend(axes: Axes, count: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=count if count < 4 else 2, handlelength=2.4)


def _histogram(axes: Axes, values: np.ndarray, label: str) -> None:
    axes.hist(values, bins=int(np.clip(len(values) ** 0.5, 10, 50)), color=BLUE, linewidth=0)
    axes.set(xlabel=label, ylabel="particles")
    axes.grid(axis="x", visible=False)


def _extent(mask: np.ndarray) -> slice:
    """The part of each axis that shows a mask and a margin around it."""
    inside = np.flatnonzero(np.any([(mask > 0.5).any(axis) for axis in ((0, 1), (0, 2), (1, 2))], axis=0))
    if len(inside) == 0:
        return slice(None)
    margin = max(2, round(0.06 * len(mask)))
    return slice(max(0, int(inside[0]) - margin), int(inside[-1]) + 1 + margin)


def _picture(axes: Axes, image: np.ndarray, voxel_size_A: float, limits: np.ndarray) -> None:
    """A grey image, y up, with a bar for its scale."""
    low, high = limits if limits[1] > limits[0] else (limits[0], limits[0] + 1)
    axes.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=high, interpolation="bicubic")
    axes.set_axis_off()
    across = image.shape[1]
    length_A = _round_length(across * voxel_size_A / 4)
    start, height = 0.05 * across, 0.06 * image.shape[0]
    axes.plot([start, start + length_A / voxel_size_A], [height, height], color="white", linewidth=3.5,
              solid_capstyle="butt")  # fmt: skip
    axes.text(start, height * 1.35, f"{length_A:g} Å", color="white", fontsize=9.5, va="bottom")


def _round_length(length: float) -> float:
    scale = 10.0 ** np.floor(np.log10(length))
    return float(scale * max(step for step in (1, 2, 5) if step * scale <= length))


def _jpeg(figure: Figure, dpi: int = 130) -> str:
    """A figure of many noisy pictures as a data URI: as SVG it would be ten times as large."""
    made = io.BytesIO()
    figure.savefig(made, format="jpeg", dpi=dpi, pil_kwargs={"quality": 85, "optimize": True})
    return "data:image/jpeg;base64," + base64.b64encode(made.getvalue()).decode("ascii")


def _svg(figure: Figure, dpi: int = 150) -> str:
    """A figure as a data URI. Made the same twice: without dates, with ids from the content."""
    text = io.StringIO()
    figure.savefig(text, format="svg", dpi=dpi, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {FONTS}", text.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
