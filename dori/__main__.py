"""`python -m dori`."""

from dori.cli import main

if __name__ == "__main__":
    main()
