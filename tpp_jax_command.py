"""The command ``tpp-jax``: prints the help at once, and leaves the rest to the package.

It is outside of the package, whose import takes as long as JAX's.
"""

import pathlib
import sys

_ASKED = {"--help", "-help", "-h", "-?", "--helpshort"}


def main() -> None:
    """Runs the command line of this process."""
    if _ASKED.intersection(sys.argv[1:]):
        package = pathlib.Path(__file__).with_name("tpp_jax")
        print((package / "commands" / "help.txt").read_text("ascii"), end="")
        return
    from tpp_jax.commands.command_line import main

    main()
