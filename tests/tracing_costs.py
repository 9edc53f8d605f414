"""What JAX does again for every program that it traces and lowers, done less often.

The tests run thousands of tiny programs, most of which are compiled already. Such work
is much of what these take.
"""

import threading

from jax._src import core
from jax._src.interpreters import mlir


def save() -> None:
    """Replaces two functions of JAX; what they return and raise is of the same kind.

    They are not public: where they have other names, nothing is saved.
    """
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = _keep_dialects(mlir.make_ir_context)
    if hasattr(core.Tracer, "sharding"):
        core.Tracer.sharding = property(_no_sharding)


def _keep_dialects(make_context, programs=200):
    """Has MLIR's dialects loaded once for many programs, not for each.

    That is a third of what a tiny program costs that is compiled already. A context
    holds the constants of its programs, so a new one is made from time to time.
    """
    kept = threading.local()

    def context():
        if getattr(kept, "left", 0) == 0:
            kept.context, kept.left = make_context(), programs
        kept.left -= 1
        return kept.context

    return context


def _no_sharding(self):
    """Refuses an attribute of arrays, as a tracer of JAX does, in fewer words.

    JAX looks through everything traced so far to say where the tracer is from. Flax
    asks for the attribute twice whenever it draws a key, and forgets the message.
    """
    raise AttributeError(f"{type(self).__name__} has no sharding")
