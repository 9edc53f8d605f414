"""Compiled programs kept on disk, so that the next start is faster."""

import os
import pathlib
import warnings

import jax


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder.

    It is ``$XDG_CACHE_HOME/tpp_jax`` or ``~/.cache/tpp_jax``. JAX's own settings take
    precedence: ``JAX_COMPILATION_CACHE_DIR`` names another folder, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns the cache off.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(caches / "tpp_jax"))
    # Creating a network runs dozens of tiny programs, which together take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A truncated entry, after a kill, or a folder without write permission only costs a
    # compilation.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
