"""The command line of a checkout: ``python launch.py --help`` lists its flags."""

from tpp_jax_command import main

if __name__ == "__main__":
    main()
