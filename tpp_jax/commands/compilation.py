"""Compiled programs are kept on disk, so that the next start is a quick one."""

import os
import pathlib
import warnings

import jax


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder.

    That is ``$XDG_CACHE_HOME/tpp_jax`` or ``~/.cache/tpp_jax``. JAX's own settings go
    first: ``JAX_COMPILATION_CACHE_DIR`` names another folder, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` does without.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(caches / "tpp_jax"))
    # Making a network runs some dozens of tiny programs: together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # An entry that a kill cut short, or a folder that cannot be written to, costs a
    # compilation and nothing else.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
