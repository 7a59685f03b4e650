"""The command line: one table of commands, each made from the options record of its job.

Nothing of a job is imported before its command is named, so help is instant. Exit status: 0 done, 1 a run
that failed, 2 bad input or options, 130 interrupted.
"""

import contextlib
import dataclasses
import enum
import importlib
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from click.core import ParameterSource

from dcryo import __version__
from dcryo.errors import DcryoError, InputError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo

UNITS = ("e_A2", "A", "A2", "px", "deg", "mm", "kV", "kDa", "mrad", "gb", "s")
"""Units that end an option's name in Python; on the command line they stand for its value instead."""

STATUS_INTERVAL_S = 30.0
"""Away from a terminal, passing states are written at most this often."""

FOLLOW_INTERVAL_S = 10.0
"""The page of a job that waits for more is rewritten at most this often."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A command: its name, the module with its options record and its job, and a line of help."""

    name: str
    module: str
    options: str
    job: str
    help: str


COMMANDS = (
    Entry("demo", "jobs.demo", "DemoOptions", "demo", "Simulate a small data set and refine it."),
    Entry("simulate", "jobs.simulate", "SimulateOptions", "simulate", "Make particles with known truth."),
    Entry("motion", "jobs.motion", "MotionOptions", "motion", "Movies to micrographs, their motion corrected."),
    Entry("ctf", "jobs.ctf", "CtfOptions", "ctf", "Fit the CTF of micrographs."),
    Entry("pick", "jobs.pick", "PickOptions", "pick", "Find particles in micrographs."),
    Entry("extract", "jobs.extract", "ExtractOptions", "extract", "Cut particles out of micrographs."),
    Entry("import", "jobs.exchange", "ImportOptions", "import_particles", "Bring particles into a store."),
    Entry("export", "jobs.exchange", "ExportOptions", "export_particles", "Write particles as STAR or .cs."),
    Entry("info", "jobs.exchange", "InfoOptions", "describe", "Say what is in a store, run, map or STAR."),
    Entry("class2d", "jobs.class2d", "Class2dOptions", "class2d", "Group like views and average them."),
    Entry("select", "jobs.select", "SelectOptions", "select_particles", "Keep good classes or particles."),
    Entry("abinitio", "jobs.abinitio", "AbinitioOptions", "abinitio", "Make first models from the particles alone."),
    Entry("refine", "jobs.refine", "RefineOptions", "refine", "Refine a map and poses, gold standard."),
    Entry("class3d", "jobs.class3d", "Class3dOptions", "class3d", "Sort particles into classes with a map each."),
    Entry("ctfrefine", "jobs.ctfrefine", "CtfrefineOptions", "ctfrefine", "Refine defocus and aberrations."),
    Entry("reconstruct", "jobs.reconstruct", "ReconstructOptions", "reconstruct", "Maps from given poses."),
    Entry("expand", "jobs.expand", "ExpandOptions", "expand", "Each particle once per symmetry operator."),
    Entry("subtract", "jobs.subtract", "SubtractOptions", "subtract", "Take what is outside a mask off the images."),
    Entry("variability", "jobs.variability", "VariabilityOptions", "analyse", "Principal components of the volume."),
    Entry("align", "jobs.align", "AlignOptions", "align", "Bring a map onto another: rotation, shift, hand."),
    Entry("postprocess", "jobs.postprocess", "PostprocessOptions", "postprocess", "Mask, FSC and sharpening."),
    Entry("fsc", "jobs.fsc", "FscOptions", "fsc_of_maps", "Fourier shell correlation of two maps."),
    Entry(
        "mapmodel", "jobs.mapmodel", "MapModelOptions", "mapmodel", "A map against an atomic model: FSC and Q-scores."
    ),
    Entry("localres", "jobs.localres", "LocalResolutionOptions", "localres", "Local resolution of half maps."),
    Entry(
        "directional", "jobs.directional", "DirectionalOptions", "directional_resolution", "Resolution by direction."
    ),
    Entry("deposit", "jobs.deposit", "DepositOptions", "deposit", "A folder for the Electron Microscopy Data Bank."),
    Entry("validate", "jobs.validate", "ValidateOptions", "validate", "Test a refinement for overfitting."),
    Entry("report", "report", "ReportOptions", "report", "Write the report page of a run."),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of this process) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    trace = "--traceback" in words or os.environ.get("DCRYO_TRACEBACK") == "1"
    try:
        with _terminable():
            status = commands.main(words, prog_name="dcryo", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say(f"Interrupted. {_how_to_resume(words)}".strip())
        return 130
    except Exception as error:
        if trace:
            traceback.print_exc()
        if isinstance(error, DcryoError):
            _say(f"Error: {error}")
            return 2 if isinstance(error, InputError) else 1
        _say(f"Error: {type(error).__name__}: {error}")
        _say("This is a fault of dcryo, not of your input. Please report it with what --traceback prints.")
        return 1


class Status:
    """Progress on a stream: a passing line is rewritten on a terminal and thinned out elsewhere.

    Every line starts with the time since the start, so that a log tells where the hours went.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._began = self._told = time.monotonic()
        self._pending = False

    def __call__(self, line: str, /, *, end: str = "\n") -> None:
        now = time.monotonic()
        passing = end == "\r"
        if passing and not self._terminal and now - self._told < STATUS_INTERVAL_S:
            return
        self._told = now
        minutes, seconds = divmod(int(now - self._began), 60)
        text = f"{minutes // 60:d}:{minutes % 60:02d}:{seconds:02d}  {line}"
        if not self._terminal:
            end = "\n"
        elif passing:
            text = text[: shutil.get_terminal_size().columns - 1]
        self._stream.write(("\r\x1b[K" if self._pending else "") + text + end)
        self._stream.flush()
        self._pending = passing and self._terminal

    def close(self) -> None:
        """Leave the passing line on the screen and go to the next."""
        if self._pending:
            self._stream.write("\n")
            self._pending = False


class _Commands(click.Group):
    """The table of commands; a job's module is imported when its command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [entry.name for entry in COMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        entry = next((entry for entry in COMMANDS if entry.name == name), None)
        return None if entry is None else _JobCommand(entry)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(entry.name, entry.help) for entry in COMMANDS])


class _JobCommand(click.Command):
    """A command whose arguments and options are the fields of its job's options record."""

    def __init__(self, entry: Entry) -> None:
        module = importlib.import_module(f"dcryo.{entry.module}")
        self.model: type[BaseModel] = getattr(module, entry.options)
        job = getattr(module, entry.job)
        own = [name for name in self.model.model_fields if name not in _shared_fields()]
        names = own + [name for name in self.model.model_fields if name not in own]
        trace = click.Option(["--traceback"], is_flag=True, expose_value=False, help="show where an error arose")
        parameters = [_parameter(name, self.model.model_fields[name]) for name in names]

        def callback(**values: Any) -> None:
            _execute(self.model, job, _given(values))

        super().__init__(
            entry.name,
            params=[*parameters, trace],
            callback=callback,
            help=self.model.__doc__ if "__doc__" in vars(self.model) and self.model.__doc__ else entry.help,
            context_settings=CONTEXT,
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Common options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                described = self.model.model_fields[str(parameter.name)].description or ""
                sections["Arguments"].append((parameter.make_metavar(ctx), described))
            elif row := parameter.get_help_record(ctx):
                own = parameter.name in self.model.model_fields and parameter.name not in _shared_fields()
                sections["Options" if own else "Common options"].append(row)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

commands = _Commands(
    help="From cryo-EM particles to a validated 3D map.",
    epilog="Every command has its own help: dcryo COMMAND --help",
    context_settings=CONTEXT,
)
click.version_option(__version__, prog_name="dcryo", message="%(prog)s %(version)s")(commands)


def option_name(field: str) -> str:
    """The command line's name of an options field: ``mask_diameter_A`` is ``--mask-diameter`` (A)."""
    unit = _unit(field)
    return "--" + (field.removesuffix(f"_{unit}") if unit else field).replace("_", "-")


def _unit(field: str) -> str:
    """The unit at the end of an options field's name, empty where it has none."""
    return next((unit for unit in UNITS if field.endswith(f"_{unit}") and len(field) > len(unit) + 1), "")


def _shared_fields() -> set[str]:
    from dcryo.jobs.options import ClusterOptions, OutOptions, SeedOptions

    return {name for record in (OutOptions, ClusterOptions, SeedOptions) for name in record.model_fields}


class _Numbers(click.ParamType):
    """Several numbers in one word, as in 1,4,7."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = f"{kind.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return tuple(self.kind(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.kind.__name__}s such as 1,4,7", param, ctx)


def _parameter(name: str, field: "FieldInfo") -> click.Parameter:
    """The click parameter of an options field."""
    annotation = _without_none(field.annotation)
    members = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    several = len(members) == 2 and members[1] is Ellipsis
    kind = _kind(members[0] if several else annotation)
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra.get("argument"):
        return click.Argument([name], type=kind, nargs=-1 if several else 1, required=field.is_required())
    described = field.description or ""
    if field.default not in (None, ()) and not field.is_required() and annotation is not bool:
        default = ",".join(map(str, field.default)) if several else field.default
        described += f" (default: {default})"
    settings: dict[str, Any] = {"help": described, "required": field.is_required()}
    flag = option_name(name)
    if annotation is bool:
        words = f"{flag}/--no-{flag[2:]}" if field.default else flag
        return click.Option([words, name], is_flag=True, default=bool(field.default), **settings)
    if unit := _unit(name):
        settings["metavar"] = unit
    if several and kind in (int, float):
        return click.Option([flag, name], type=_Numbers(kind), multiple=True, **settings)
    if members and not several:
        kind = tuple(_kind(member) for member in members)
    return click.Option([flag, name], type=kind, multiple=several, **settings)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        return members[0] if len(members) == 1 else str
    return annotation


def _kind(annotation: Any) -> Any:
    """The click type of a plain annotation; what is not plain is left to the options record."""
    if hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice([str(value) for value in typing.get_args(annotation)])
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return click.Choice([str(member.value) for member in annotation])
    if annotation is Path:
        return click.Path(path_type=Path)
    return annotation if annotation in (int, float) else str


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The values that the user gave; the rest is left to the defaults of the options record."""
    context = click.get_current_context()
    given = {name: value for name, value in values.items()
             if context.get_parameter_source(name) is not ParameterSource.DEFAULT}  # fmt: skip
    types_of = {parameter.name: parameter.type for parameter in context.command.params}
    for name, value in given.items():
        if isinstance(types_of[name], _Numbers):
            given[name] = tuple(number for numbers in value for number in numbers)
    return given


def _execute(model: "type[BaseModel]", job: Any, values: dict[str, Any]) -> None:
    """Check the options, do the job, write the report, print the result."""
    from pydantic import ValidationError

    try:
        options = model(**values)
    except ValidationError as error:
        raise InputError(_explain(model, error)) from error
    status = Status(sys.stderr)
    try:
        with _followed(options, status):
            result = job(options, progress=status)
    except InputError:
        raise
    except Exception:
        _write_reports(values.get("out"), status)
        raise
    finally:
        status.close()
    _write_reports(values.get("out"), status)
    if text := _summary(result):
        click.echo(text)


def _explain(model: "type[BaseModel]", error: "ValidationError") -> str:
    """What is wrong with the options, in the words of the command line."""
    lines = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if name in model.model_fields:
            parameter = _parameter(name, model.model_fields[name])
            shown = name.upper() if isinstance(parameter, click.Argument) else option_name(name)
            lines.append(f"{shown} {item['input']}: {message}")
        else:
            lines.append(f"{name}: {message}" if name else message)
    return "\n       ".join(lines)


@contextlib.contextmanager
def _followed(options: Any, status: Status) -> Iterator[None]:
    """While a job waits for more of its input, its page is kept up to date."""
    if not getattr(options, "watch", False):
        yield
        return
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(FOLLOW_INTERVAL_S):
            _write_reports(options.out, status)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _write_reports(out: Path | None, status: Status) -> None:
    """Write the page of the run in a directory, and of those in it, where the record is newer than the page.

    A fault here is told and no more: the result that took hours is there.
    """
    from dcryo.report import write_report

    if out is None or not out.is_dir():
        return
    # Those within come first: the page of the whole links to theirs.
    for record in [*sorted(out.glob("*/run.json")), *out.glob("run.json")]:
        page = record.with_name("report.html")
        if page.exists() and page.stat().st_mtime >= record.stat().st_mtime:
            continue
        try:
            status(f"report: {write_report(record.parent)}")
        except Exception as error:
            status(f"{record.parent}: the report could not be written ({type(error).__name__}: {error})")


def _summary(result: Any) -> str:
    """What to print of a job's result: what it says itself, or its plain figures."""
    if hasattr(result, "summary"):
        return str(result.summary())
    if not dataclasses.is_dataclass(result):
        return ""
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return "\n".join(f"{name}: {value}" for name, value in values.items()
                     if isinstance(value, str | int | float | Path))  # fmt: skip


def _how_to_resume(words: list[str]) -> str:
    command = commands.get_command(click.Context(commands), words[0]) if words else None
    if command is None or all(parameter.name != "resume" for parameter in command.params):
        return ""
    again = [word for word in words if word not in ("--overwrite", "--resume")]
    return "Continue with: " + shlex.join(["dcryo", *again, "--resume"])


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let a batch system's polite end (SIGTERM) close the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    click.echo(text, err=True)
