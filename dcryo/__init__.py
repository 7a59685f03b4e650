"""dcryo: from cryo-EM particles to a validated 3D map."""

__version__ = "0.1.0"
