"""`python -m mctk`: the command line, where its script is not on the path."""

from mctk.cli import main

if __name__ == "__main__":
    main()
