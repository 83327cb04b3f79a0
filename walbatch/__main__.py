"""`python -m walbatch`: the same program as `walbatch`."""

from walbatch.cli import main

if __name__ == "__main__":
    main()
