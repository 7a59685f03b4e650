"""The floors of the package: what each part may import, held by reading the source.

A floor imports only from itself and the floors below it; `errors`, `euler` and the version are free to all.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dcryo"

FREE = {"dcryo", "dcryo.errors", "dcryo.euler"}

# floor -> the parts of dcryo that it may import
FLOORS = {
    "kernels": {"kernels"},
    "data": {"data"},
    "steps": {"kernels", "data", "steps"},
    "cluster": {"kernels", "data", "steps", "cluster"},
    "graph": {"kernels", "data", "steps", "cluster", "graph"},
    "jobs": {"kernels", "data", "steps", "cluster", "graph"},
    "surface": {"kernels", "data", "steps", "cluster", "graph", "jobs", "surface"},
    "free": set(),
}
SURFACE = {
    "cli",
    "report",
    "report_classes",
    "report_ctfrefine",
    "report_mapmodel",
    "report_micrographs",
    "report_models",
    "report_postprocess",
    "report_surfaces",
    "report_validate",
    "report_variability",
    "figures",
    "__main__",
    "__init__",
}

# Jobs know one another only through what they share; `demo` chains them, and `validate` repeats them.
SHARED_BY_JOBS = {
    f"dcryo.jobs.{name}"
    for name in (
        "back_projection",
        "dataset",
        "em",
        "given_maps",
        "memory",
        "micrographs",
        "options",
        "outputs",
        "refined",
    )
}
CHAINING_JOBS = {"dcryo.jobs.demo", "dcryo.jobs.validate"}
# A job that is too long for one module has parts, which it and they alone import: `simulate` and `simulate_movies`.

# library -> the only modules or floors that may import it
RESERVED = {
    "dask": {"graph"},
    "distributed": {"cluster"},
    "zarr": {"data.store", "data.store_writer", "data.columns"},  # together, the store
    "click": {"cli"},
    "matplotlib": {"figures"},
    "jinja2": {"report"},
}

# What makes numbers depend on anything but the arguments, or touches what is outside of them.
IMPURE = {"logging", "time", "datetime", "random", "os", "pathlib", "io", "shutil", "tempfile", "subprocess", "sys",
          "mrcfile", "psutil", "socket"}  # fmt: skip


def modules() -> list[str]:
    return sorted(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))


def floor_of(module: str) -> str:
    """The floor of a module or of one of its names, by the dotted name."""
    if module.removesuffix(".__init__") in FREE - {"dcryo"}:
        return "free"
    part = [*module.split("."), "__init__"][1]
    return "surface" if part in SURFACE else part


def tree_of(module: str) -> ast.Module:
    path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(module: str) -> list[tuple[str, int]]:
    """Dotted names that a module imports, wherever in it, with their lines; relative ones made absolute."""
    package = module.split(".")[:-1]
    found = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{origin}.{alias.name}", node.lineno) for alias in node.names]
    return found


def matches(name: str, origin: str) -> bool:
    return name == origin or name.startswith(origin + ".")


def job_of(module: str) -> str:
    """The job that a module of the floor is a part of: of the names that begin its own, the longest; or itself."""
    wholes = [name for name in modules() if module.startswith(f"{name}_")]
    return max(wholes, key=len, default=module)


def breaches(module: str) -> list[str]:
    """What a module imports or calls that its floor may not, in words."""
    floor, found = floor_of(module), []
    here = module.removeprefix("dcryo.")
    for name, line in imports_of(module):
        at = f"{module} (line {line}) imports {name}"
        if name.split(".")[0] == "dcryo":
            free = any(name == item or (item != "dcryo" and matches(name, item)) for item in FREE)
            free = free or name == "dcryo.__version__"
            target = floor_of(name)
            if not free and target not in FLOORS[floor] and not (floor == "jobs" and target == "jobs"):
                found.append(f"{at}: {floor} may import {', '.join(sorted(FLOORS[floor])) or 'nothing'} of dcryo")
            between_jobs = floor == "jobs" and target == "jobs" and module not in CHAINING_JOBS
            # The parts of a job, too, are one another's; the job itself is above them.
            own_part = name.startswith(f"{job_of(module)}_")
            if between_jobs and not own_part and not any(matches(name, shared) for shared in SHARED_BY_JOBS):
                found.append(f"{at}: jobs share only {', '.join(sorted(SHARED_BY_JOBS))}")
        top = name.split(".")[0]
        if top in RESERVED and here not in RESERVED[top]:
            found.append(f"{at}: only {', '.join(sorted(RESERVED[top]))} may")
        if floor in ("kernels", "steps", "free") and top in IMPURE:
            found.append(f"{at}: {floor} compute from their arguments alone")
    if floor in ("kernels", "steps", "free"):
        found += impure_calls(module)
    return found


def impure_calls(module: str) -> list[str]:
    """Calls of `open` and `print`, and of numpy's global random state."""
    found = []
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        draws = called.startswith(("np.random.", "numpy.random."))
        keyed = called.rpartition(".")[2] in ("Generator", "Philox", "SeedSequence")
        if called in ("open", "print", "input") or (draws and not keyed):
            found.append(f"{module} (line {node.lineno}) calls {called}: kernels and steps compute from their "
                         "arguments alone; randomness is keyed (Philox)")  # fmt: skip
    return found


@pytest.mark.parametrize("module", modules())
def test_floors(module: str) -> None:
    assert floor_of(module) in FLOORS, f"{module} is on no floor: give it one in {Path(__file__).name}"
    found = breaches(module)
    assert not found, "\n" + "\n".join(found)


def test_free_modules_import_nothing_of_the_package() -> None:
    for module in FREE - {"dcryo"}:
        assert not [name for name, _ in imports_of(module) if name.split(".")[0] == "dcryo"], module


@pytest.mark.parametrize(
    ("source", "place", "told"),
    [
        ("import dask.array", "kernels/fft.py", "only graph may"),
        ("def f():\n    from dask import delayed", "jobs/refine.py", "only graph may"),
        ("import distributed", "graph.py", "only cluster may"),
        ("import zarr", "data/mrc.py", "only data.columns, data.store, data.store_writer may"),
        ("from dcryo.kernels import fft", "data/mrc.py", "data may import data"),
        ("from ..data import mrc", "kernels/fft.py", "kernels may import kernels"),
        ("from dcryo.graph import run", "steps/expectation.py", "steps may import"),
        ("from dcryo.jobs.em import loop", "graph.py", "graph may import"),
        ("from dcryo import cli", "jobs/refine.py", "jobs may import"),
        ("from dcryo.jobs.simulate import simulate", "jobs/refine.py", "jobs share only"),
        ("from dcryo.jobs.refine import refine", "jobs/refine_parts.py", "jobs share only"),
        ("import time", "kernels/fft.py", "from their arguments alone"),
        ("from os import path", "steps/expectation.py", "from their arguments alone"),
        ("x = open('f')", "kernels/fft.py", "calls open"),
        ("import numpy as np\nx = np.random.normal()", "kernels/fft.py", "calls np.random.normal"),
        ("import numpy as np\nx = np.random.default_rng()", "steps/a.py", "calls np.random.default_rng"),
        ("x = 1", "utils/misc.py", ""),
    ],
)
def test_the_test_sees_a_breach(tmp_path: Path, monkeypatch, source: str, place: str, told: str) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "dcryo")
    path = tmp_path / "dcryo" / place
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (module,) = modules()
    if told:
        assert any(told in line for line in breaches(module)), breaches(module)
    else:
        assert floor_of(module) not in FLOORS


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("from dcryo.errors import InputError\nfrom dcryo import euler\nfrom dcryo import __version__", "data/a.py"),
        ("from dcryo.kernels import fft\nfrom dcryo.data.particles import Particles", "steps/a.py"),
        ("from dcryo.jobs.simulate import simulate", "jobs/demo.py"),
        ("from dcryo.jobs import refine_parts\nfrom dcryo.jobs.refine_parts import parts", "jobs/refine.py"),
        ("from dcryo.jobs import em, options\nfrom dcryo.graph import run", "jobs/a.py"),
        ("import numpy as np\nx = np.random.Generator(np.random.Philox(key=1))", "kernels/a.py"),
    ],
)
def test_the_test_lets_pass_what_is_right(tmp_path: Path, monkeypatch, source: str, place: str) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "dcryo")
    path = tmp_path / "dcryo" / place
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert breaches(modules()[0]) == []
