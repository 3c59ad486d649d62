"""The command line as ``python -m perturbkit``, for where the script is not on the path."""

from perturbkit.cli import main

if __name__ == "__main__":
    main()
