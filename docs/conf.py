"""Sphinx configuration; ``nox -s docs`` builds the pages."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "pgstructured"
version = release = installed_version(project)
extensions = ["myst_parser"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
