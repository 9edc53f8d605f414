"""launch.py in one of several processes, each of which keeps what it compiles.

JAX lets the first process alone write to the folder of compiled programs, where the
others do not find theirs: they would compile for half a minute in every test.
"""

import runpy
import types

from jax._src import compiler

if __name__ == "__main__":
    first = types.SimpleNamespace(process_id=0, client=None)
    compiler.distributed = types.SimpleNamespace(global_state=first)
    runpy.run_path("launch.py", run_name="__main__")
