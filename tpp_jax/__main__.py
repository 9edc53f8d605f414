"""The command line: ``python -m tpp_jax --help`` lists its flags."""

from tpp_jax_command import main

if __name__ == "__main__":
    main()
