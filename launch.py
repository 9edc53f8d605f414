"""The command line of a checkout: ``python launch.py --help`` lists its flags."""

from tpp_jax.commands.command_line import main

if __name__ == "__main__":
    main()
