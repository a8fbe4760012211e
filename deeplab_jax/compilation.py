"""Where compiled programs are kept."""

from __future__ import annotations

import os

import jax


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start of the same program is quick."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "deeplab_jax", "xla"))
