"""The command line: options made from records, exit statuses, messages, progress."""

import io
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import pytest
from pydantic import Field, model_validator

from dcryo import __version__, cli
from dcryo.data.run import NEUTRAL_OPTIONS, Run
from dcryo.errors import InputError, RunError
from dcryo.jobs.micrographs import WatchOptions
from dcryo.jobs.options import ClusterOptions, OutOptions, SeedOptions, argument


class FilterOptions(OutOptions, ClusterOptions, SeedOptions):
    """Filter the images of a store."""

    store: Path = argument("store of particles")
    maps: tuple[Path, ...] = argument("references", default=())
    lowpass_A: float | None = Field(None, gt=0, description="resolution of the filter")
    kind: Literal["soft", "hard"] = Field("soft", description="shape of the edge")
    classes: tuple[int, ...] = Field((), description="classes to keep")
    window: tuple[float, float] = Field((1.0, 2.0), description="lower and upper end")
    labels: tuple[str, ...] = Field((), description="labels to keep")
    invert: bool = Field(False, description="invert the contrast")
    normalise: bool = Field(True, description="normalise the images")

    @model_validator(mode="after")
    def ordered(self) -> "FilterOptions":
        if self.window[0] > self.window[1]:
            raise ValueError("window: the lower end lies above the upper end")
        return self


@dataclass(frozen=True)
class Filtered:
    resolution_A: float
    map: Path
    images: object


@dataclass
class Fake:
    """A job that keeps its options and does what the test sets."""

    options: FilterOptions | None = None
    action: object = None

    def __call__(self, options, *, progress=print):
        self.options = options
        progress("at work", end="\r")
        progress("worked")
        if self.action:
            self.action(options)
        return Filtered(4.25, Path("map.mrc"), images=[1])


@pytest.fixture
def job(monkeypatch) -> Fake:
    fake = Fake()
    module = types.ModuleType("dcryo.jobs.fake")
    module.FilterOptions, module.filter = FilterOptions, fake
    monkeypatch.setitem(sys.modules, "dcryo.jobs.fake", module)
    entry = cli.Entry("filter", "jobs.fake", "FilterOptions", "filter", "Filter images.")
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, entry))
    return fake


def run(*words: object) -> int:
    return cli.main(list(map(str, words)))


def test_options_reach_the_job_as_its_record(job: Fake) -> None:
    words = "filter a.zarr r1.mrc r2.mrc --out o --lowpass 12.5 --kind hard --classes 1,4 --classes 9"
    words += " --window 0.5 3 --labels x,y --labels z --invert --no-normalise --seed 5 --cluster processes"
    assert run(*words.split(), "--workers", 3) == 0
    assert job.options == FilterOptions(
        out="o", store="a.zarr", maps=("r1.mrc", "r2.mrc"), lowpass_A=12.5, kind="hard", classes=(1, 4, 9),
        window=(0.5, 3.0), labels=("x,y", "z"), invert=True, normalise=False, seed=5, cluster="processes",
        workers=3,
    )  # fmt: skip


def test_what_is_not_given_is_left_to_the_record(job: Fake) -> None:
    assert run("filter", "a.zarr", "--out", "o") == 0
    assert job.options == FilterOptions(out="o", store="a.zarr")
    assert job.options.model_fields_set == {"out", "store"}


def test_result_is_printed_and_progress_goes_to_the_error_stream(job: Fake, capsys) -> None:
    run("filter", "a.zarr", "--out", "o")
    out, err = capsys.readouterr()
    assert out == "resolution_A: 4.25\nmap: map.mrc\n"
    assert err.split("  ")[1] == "worked\n" and "at work" not in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("filter", "Missing argument 'STORE'"),
        ("filter a.zarr", "Missing option '--out'"),
        ("filter a.zarr --out o --lowpass -3", "--lowpass -3.0: expected greater than 0"),
        ("filter a.zarr --out o --lowpass x", "'x' is not a valid float"),
        ("filter a.zarr --out o --kind other", "'other' is not one of 'soft', 'hard'"),
        ("filter a.zarr --out o --classes 1,b", "'1,b' is not a list of ints"),
        ("filter a.zarr --out o --window 3 1", "the lower end lies above the upper end"),
        ("filter a.zarr --out o --seed -1", "--seed -1: expected greater than or equal to 0"),
        ("filter a.zarr --out o --nonsense", "No such option"),
        ("filtre", "No such command 'filtre'"),
    ],
)
def test_bad_options_are_told_with_status_2(job: Fake, capsys, words: str, told: str) -> None:
    assert run(*words.split()) == 2
    assert told in capsys.readouterr().err
    assert job.options is None


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("a.star: row 7"), 2, "Error: a.star: row 7\n"),
        (RunError("no worker left"), 1, "Error: no worker left\n"),
        (ZeroDivisionError("by zero"), 1, "Error: ZeroDivisionError: by zero\nThis is a fault of dcryo"),
        (KeyboardInterrupt(), 130, "Continue with: dcryo filter a.zarr --out 'o o' --resume\n"),
    ],
)
def test_errors_have_a_status_and_no_traceback(job: Fake, capsys, monkeypatch, error, status, told) -> None:
    def fail(_) -> None:
        raise error

    job.action = fail
    assert run("filter", "a.zarr", "--out", "o o", "--overwrite") == status
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err
    if status != 130:
        run("filter", "a.zarr", "--out", "o", "--traceback")
        assert "Traceback" in capsys.readouterr().err
        monkeypatch.setenv("DCRYO_TRACEBACK", "1")
        run("filter", "a.zarr", "--out", "o")
        assert "Traceback" in capsys.readouterr().err


def test_a_batch_systems_end_closes_the_run(job: Fake, tmp_path: Path, capsys) -> None:
    def ended(options) -> None:
        with Run.start(options.out, "filter", {}):
            os.kill(os.getpid(), signal.SIGTERM)

    job.action = ended
    before = signal.getsignal(signal.SIGTERM)
    assert run("filter", "a.zarr", "--out", tmp_path / "o") == 130
    assert Run.open(tmp_path / "o").record["error"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_run_gets_its_page_also_a_failed_one(job: Fake, tmp_path: Path, capsys) -> None:
    def chain(options) -> None:
        for folder in (options.out / "a", options.out / "b"):
            with Run.start(folder, "simulate", {}) as record:
                record.done({})

    def fail(options) -> None:
        with Run.start(options.out, "filter", {}):
            raise RunError("no worker left")

    job.action = chain
    assert run("filter", "s", "--out", tmp_path / "chain") == 0
    pages = list((tmp_path / "chain").glob("*/report.html"))
    assert len(pages) == 2 and str(pages[0]) in capsys.readouterr().err
    job.action = fail
    assert run("filter", "s", "--out", tmp_path / "failed") == 1
    assert "no worker left" in (tmp_path / "failed" / "report.html").read_text()


def test_a_page_that_cannot_be_written_does_not_fail_the_run(job, tmp_path, capsys) -> None:
    def odd(options) -> None:
        Run.start(options.out, "filter", {}).done({})
        (options.out / "report.html").mkdir()
        os.utime(options.out / "report.html", (1, 1))

    job.action = odd
    assert run("filter", "s", "--out", tmp_path / "o") == 0
    assert "the report could not be written" in capsys.readouterr().err


def test_help_tells_arguments_units_choices_and_defaults(job: Fake, capsys) -> None:
    assert run("filter", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "dcryo filter [OPTIONS] STORE [MAPS]..." in text and "Filter the images of a store." in text
    assert "--lowpass A resolution of the filter" in text and "[soft|hard]" in text and "(default: soft)" in text
    assert "--normalise / --no-normalise" in text
    assert text.index("Arguments:") < text.index("Options:") < text.index("Common options:")
    assert text.index("Common options:") < text.index("--cluster") < text.index("threads, processes, tcp")


def test_help_of_all_is_quick_and_imports_no_job() -> None:
    code = "import sys; from dcryo.cli import main; main(['--help']); print(set(sys.modules) & set(sys.argv))"
    heavy = ["numpy", "pydantic", "dask", "numba", "dcryo.jobs.refine"]
    result = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
    assert all(entry.name in result.stdout for entry in cli.COMMANDS)


def test_version(capsys) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"dcryo {__version__}\n"


@pytest.mark.parametrize("entry", cli.COMMANDS, ids=lambda entry: entry.name)
def test_every_command_of_the_contract_is_there(entry: cli.Entry, capsys) -> None:
    assert run(entry.name, "--help") == 0
    assert "--traceback" in capsys.readouterr().out
    command = cli.commands.get_command(None, entry.name)
    assert all(field.description for field in command.model.model_fields.values())
    names = [cli.option_name(name) for name in command.model.model_fields]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("entry", cli.COMMANDS, ids=lambda entry: entry.name)
def test_no_two_options_have_the_same_name(entry: cli.Entry) -> None:
    """Fields that differ by their unit alone would have."""
    command = cli.commands.get_command(click.Context(cli.commands), entry.name)
    assert command is not None
    names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    assert len(names) == len(set(names))


def test_neutral_options_exist() -> None:
    shared = {*OutOptions.model_fields, *ClusterOptions.model_fields, *WatchOptions.model_fields}
    assert shared == NEUTRAL_OPTIONS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_passing_state_in_one_line() -> None:
    stream = Terminal()
    status = cli.Status(stream)
    status("1 of 3", end="\r")
    status("2 of 3" * 100, end="\r")
    status("done")
    status("3 of 3", end="\r")
    status.close()
    shown = stream.getvalue()
    assert shown.startswith("0:00:00  1 of 3\r\r\x1b[K0:00:00  2 of 3")
    assert shown.endswith("\r\r\x1b[K0:00:00  done\n0:00:00  3 of 3\r\n")
    assert max(map(len, shown.split("\r"))) < 100


def test_a_log_gets_passing_states_now_and_then(monkeypatch) -> None:
    clock = iter([0.0, 1.0, 31.0, 32.0, 33.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    status = cli.Status(stream)
    for shard in range(3):
        status(f"shard {shard}", end="\r")
    status("done")
    assert stream.getvalue() == "0:00:31  shard 1\n0:00:33  done\n"


def test_records_survive_the_way_into_the_run(tmp_path: Path) -> None:
    options = FilterOptions(out=tmp_path, store="a", window=(1, 2))
    run_record = Run.start(tmp_path, "filter", options.model_dump())
    assert json.loads((run_record.path / "run.json").read_text())["options"]["window"] == [1.0, 2.0]
