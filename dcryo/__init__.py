"""dcryo: from cryo-EM particles to a validated 3D map.

Every command of the command line is a function here, with its options record; see `__all__`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dcryo.data.store import open_store as open
    from dcryo.jobs.abinitio import AbinitioOptions, abinitio
    from dcryo.jobs.align import AlignOptions, align
    from dcryo.jobs.class2d import Class2dOptions, class2d
    from dcryo.jobs.class3d import Class3dOptions, class3d
    from dcryo.jobs.ctf import CtfOptions, ctf
    from dcryo.jobs.ctfrefine import CtfrefineOptions, ctfrefine
    from dcryo.jobs.demo import DemoOptions, demo
    from dcryo.jobs.deposit import DepositOptions, deposit
    from dcryo.jobs.directional import DirectionalOptions, directional_resolution
    from dcryo.jobs.exchange import ExportOptions, ImportOptions, export_particles, import_particles
    from dcryo.jobs.expand import ExpandOptions, expand
    from dcryo.jobs.extract import ExtractOptions, extract
    from dcryo.jobs.fsc import FscOptions, fsc_of_maps
    from dcryo.jobs.localres import LocalResolutionOptions, localres
    from dcryo.jobs.mapmodel import MapModelOptions, mapmodel
    from dcryo.jobs.motion import MotionOptions, motion
    from dcryo.jobs.pick import PickOptions, pick
    from dcryo.jobs.postprocess import PostprocessOptions, postprocess
    from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
    from dcryo.jobs.refine import RefineOptions, refine
    from dcryo.jobs.select import SelectOptions, select_particles
    from dcryo.jobs.simulate import SimulateOptions, simulate
    from dcryo.jobs.subtract import SubtractOptions, subtract
    from dcryo.jobs.validate import ValidateOptions, validate
    from dcryo.jobs.variability import VariabilityOptions
    from dcryo.jobs.variability import analyse as variability
    from dcryo.report import write_report

__all__ = [
    "AbinitioOptions", "AlignOptions", "Class2dOptions", "Class3dOptions", "CtfOptions", "CtfrefineOptions",
    "DemoOptions", "DepositOptions", "DirectionalOptions", "ExpandOptions", "ExportOptions", "ExtractOptions",
    "FscOptions", "ImportOptions", "LocalResolutionOptions", "MapModelOptions", "MotionOptions", "PickOptions",
    "PostprocessOptions", "ReconstructOptions", "RefineOptions", "SelectOptions", "SimulateOptions", "SubtractOptions",
    "ValidateOptions", "VariabilityOptions", "abinitio", "align", "class2d", "class3d", "ctf", "ctfrefine", "demo",
    "deposit", "directional_resolution", "expand", "export_particles", "extract", "fsc_of_maps", "import_particles",
    "localres", "mapmodel", "motion", "open", "pick", "postprocess", "reconstruct", "refine", "select_particles",
    "simulate", "subtract", "validate", "variability", "write_report",
]  # fmt: skip

_HOMES = {
    "open": ("dcryo.data.store", "open_store"),
    "AbinitioOptions": ("dcryo.jobs.abinitio", "AbinitioOptions"),
    "abinitio": ("dcryo.jobs.abinitio", "abinitio"),
    "AlignOptions": ("dcryo.jobs.align", "AlignOptions"),
    "align": ("dcryo.jobs.align", "align"),
    "Class2dOptions": ("dcryo.jobs.class2d", "Class2dOptions"),
    "class2d": ("dcryo.jobs.class2d", "class2d"),
    "Class3dOptions": ("dcryo.jobs.class3d", "Class3dOptions"),
    "class3d": ("dcryo.jobs.class3d", "class3d"),
    "CtfOptions": ("dcryo.jobs.ctf", "CtfOptions"),
    "ctf": ("dcryo.jobs.ctf", "ctf"),
    "CtfrefineOptions": ("dcryo.jobs.ctfrefine", "CtfrefineOptions"),
    "ctfrefine": ("dcryo.jobs.ctfrefine", "ctfrefine"),
    "DemoOptions": ("dcryo.jobs.demo", "DemoOptions"),
    "demo": ("dcryo.jobs.demo", "demo"),
    "DepositOptions": ("dcryo.jobs.deposit", "DepositOptions"),
    "deposit": ("dcryo.jobs.deposit", "deposit"),
    "DirectionalOptions": ("dcryo.jobs.directional", "DirectionalOptions"),
    "directional_resolution": ("dcryo.jobs.directional", "directional_resolution"),
    "ExportOptions": ("dcryo.jobs.exchange", "ExportOptions"),
    "export_particles": ("dcryo.jobs.exchange", "export_particles"),
    "ImportOptions": ("dcryo.jobs.exchange", "ImportOptions"),
    "import_particles": ("dcryo.jobs.exchange", "import_particles"),
    "ExpandOptions": ("dcryo.jobs.expand", "ExpandOptions"),
    "expand": ("dcryo.jobs.expand", "expand"),
    "ExtractOptions": ("dcryo.jobs.extract", "ExtractOptions"),
    "extract": ("dcryo.jobs.extract", "extract"),
    "LocalResolutionOptions": ("dcryo.jobs.localres", "LocalResolutionOptions"),
    "localres": ("dcryo.jobs.localres", "localres"),
    "MapModelOptions": ("dcryo.jobs.mapmodel", "MapModelOptions"),
    "mapmodel": ("dcryo.jobs.mapmodel", "mapmodel"),
    "MotionOptions": ("dcryo.jobs.motion", "MotionOptions"),
    "motion": ("dcryo.jobs.motion", "motion"),
    "PickOptions": ("dcryo.jobs.pick", "PickOptions"),
    "pick": ("dcryo.jobs.pick", "pick"),
    "FscOptions": ("dcryo.jobs.fsc", "FscOptions"),
    "fsc_of_maps": ("dcryo.jobs.fsc", "fsc_of_maps"),
    "PostprocessOptions": ("dcryo.jobs.postprocess", "PostprocessOptions"),
    "postprocess": ("dcryo.jobs.postprocess", "postprocess"),
    "ReconstructOptions": ("dcryo.jobs.reconstruct", "ReconstructOptions"),
    "reconstruct": ("dcryo.jobs.reconstruct", "reconstruct"),
    "RefineOptions": ("dcryo.jobs.refine", "RefineOptions"),
    "refine": ("dcryo.jobs.refine", "refine"),
    "SelectOptions": ("dcryo.jobs.select", "SelectOptions"),
    "select_particles": ("dcryo.jobs.select", "select_particles"),
    "SimulateOptions": ("dcryo.jobs.simulate", "SimulateOptions"),
    "simulate": ("dcryo.jobs.simulate", "simulate"),
    "SubtractOptions": ("dcryo.jobs.subtract", "SubtractOptions"),
    "subtract": ("dcryo.jobs.subtract", "subtract"),
    "ValidateOptions": ("dcryo.jobs.validate", "ValidateOptions"),
    "validate": ("dcryo.jobs.validate", "validate"),
    "VariabilityOptions": ("dcryo.jobs.variability", "VariabilityOptions"),
    "variability": ("dcryo.jobs.variability", "analyse"),
    "write_report": ("dcryo.report", "write_report"),
}


def __getattr__(name: str) -> Any:
    """Names are looked up when they are used, so that `dcryo --help` does not wait for compilers and clusters."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dcryo' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
