"""What the benchmarks share: commands with their wall time, processor time and peak memory; results kept as JSON.

    python benchmarks/measured.py OUT.json COMMAND ...

A command is started by a process of its own, so that a big benchmark does not count as memory of what it starts.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median

import psutil

_SAMPLED_EVERY_S = 0.1
MIB = 1 << 20


def run(command: Sequence[object], cwd: Path, log: str) -> dict:
    """Run a command in a directory and measure it; its output goes to the file `log` there.

    Returns command (str), wall_s, cpu_s (user and system, all processes), tree_bytes (peak of the resident memory
    summed over the processes, sampled; pages that they share count for each) and largest_bytes (peak of the largest
    process, by the system's count). SystemExit with the end of the log where the command fails.
    """
    words = [str(word) for word in command]
    out = cwd / f"{log}.measured.json"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (cwd / log).open("w") as file:
        made = subprocess.run(
            [sys.executable, __file__, out.name, *words], cwd=cwd, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": path}, check=False,
        )  # fmt: skip
    if made.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: failed; the end of its output:\n{(cwd / log).read_text()[-3000:]}")
    found = load(out)
    out.unlink()
    return {"command": " ".join(words), **found}


def _measure(words: Sequence[str]) -> tuple[int, dict]:
    """Exit status of a command that inherits this process's output, and what it took."""
    began = time.perf_counter()
    started = subprocess.Popen(words)
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _tree_bytes(started.pid))
            done.wait(_SAMPLED_EVERY_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = started.wait()
    wall_s = time.perf_counter() - began
    done.set()
    watcher.join()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return status, {
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "tree_bytes": peak[0],
        "largest_bytes": 1024 * usage.ru_maxrss,
    }


def _tree_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, 0 where it has ended."""
    total = 0
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in tree:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def save(path: Path, result: dict) -> None:
    """Leave a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def once(path: Path, measure: Callable[[], dict]) -> dict:
    """The result in a file, measured now if it is not there yet."""
    if not path.exists():
        print(f"{path.stem} ...", flush=True)
        save(path, {**measure(), "machine": machine()})
    return load(path)


def warm_up(folder: Path) -> None:
    """Let dcryo compile its kernels and keep them, on a small problem, as they are from the second run on."""
    print("compiling kernels ...", flush=True)
    work = folder / "warm-up"
    work.mkdir(parents=True, exist_ok=True)
    commands = (
        "dcryo simulate phantom --particles 128 --box 32 --pixel-size 6 --out data --overwrite",
        "dcryo import data/truth.star --out truth.zarr --overwrite",
        "dcryo refine truth.zarr --reference data/truth.mrc --symmetry D2 --max-iterations 4 --out refined --overwrite",
        "dcryo reconstruct truth.zarr --out maps --overwrite",
    )
    for command in commands:
        run(command.split(), work, "log.txt")


def machine() -> dict:
    """Processor, cores that this process may use, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {name: metadata.version(name) for name in ("dcryo", "numpy", "numba", "dask")}
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
    }


def described(machines: Iterable[dict]) -> str:
    """One line for each of the machines, versions included, that results come from."""
    lines = {
        f"{found['processor']}, {found['cores']} cores; "
        + ", ".join(f"{name} {found[name]}" for name in ("python", "dcryo", "numpy", "numba", "dask"))
        for found in machines
    }
    return "; and ".join(sorted(lines))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def middle(values: Iterable[float], form: str = ".1f") -> str:
    """Median of the values, with their range where there are several, for people."""
    found = list(values)
    text = f"{median(found):{form}}"
    return text if len(found) < 2 else f"{text} ({min(found):{form}} to {max(found):{form}})"


if __name__ == "__main__":
    exit_status, taken = _measure(sys.argv[2:])
    if exit_status == 0:
        save(Path(sys.argv[1]), taken)
    sys.exit(1 if exit_status else 0)
