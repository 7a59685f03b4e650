"""What the options of every job share, and what a job is.

A job's options are one frozen record, declared once: the command line is made from it (`dcryo.cli`), a run's
record holds it, and in Python it is the job's argument. A job is a function
``job(options, *, progress=print) -> result``, and its result a frozen record. Example of a job's options::

    class FilterOptions(OutOptions, ClusterOptions, SeedOptions):
        \"""Filter the images of a store.\"""

        store: Path = argument("store of particles")
        lowpass_A: float | None = Field(None, gt=0, description="resolution of the filter")

which is ``dcryo filter STORE --out OUT [--lowpass A]``: the unit at the end of a name is what the help shows in
place of the value. Tuples are options given several times, or, as arguments, several words. The options that do
not change the result are listed in `dcryo.data.run.NEUTRAL_OPTIONS`.
"""

from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field


class Progress(Protocol):
    """Where a job tells how it goes; `print` is one.

    A line with ``end="\\r"`` is a passing state (how far an iteration is), which the next line replaces.
    """

    def __call__(self, line: str, /, *, end: str = "\n") -> None: ...


class Summarised(Protocol):
    """A job's result that says what to print of itself; of any other result the plain figures are printed."""

    def summary(self) -> str:
        """Lines of text for the reader at the terminal."""
        ...


def argument(description: str, **constraints: Any) -> Any:
    """A field given by its place on the command line, not by its name; required unless it has a default."""
    return Field(description=description, json_schema_extra={"argument": True}, **constraints)


class JobOptions(BaseModel):
    """Base of every job's options: cannot be changed, and refuses names that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OutOptions(JobOptions):
    """Where a job writes."""

    out: Path = Field(description="directory to write to; new or empty, unless one of the next two is given")
    resume: bool = Field(False, description="continue the run in the directory from its last checkpoint")
    overwrite: bool = Field(False, description="replace the run in the directory")


class ClusterOptions(JobOptions):
    """Where a job computes; the result is the same to the bit whatever is chosen."""

    cluster: str = Field(
        "threads",
        description="where the work runs: threads, processes, tcp://HOST:PORT or FILE.json (a scheduler file)",
    )
    workers: int | None = Field(None, gt=0, description="number of workers (default: one per core)")


class SeedOptions(JobOptions):
    """The one number that decides every random choice."""

    seed: int = Field(0, ge=0, lt=2**64, description="seed of every random choice")
