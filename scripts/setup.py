"""Make the environments that are missing; on too old a Python, say so: this file runs there."""

import sys

OLDEST, NEWEST = (3, 11), (3, 13)

if __name__ == "__main__":
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            f"This workbook needs Python 3.11, 3.12 or 3.13, and {sys.executable} is {found}.\n"
            "Install one of them (on Debian or Ubuntu: apt install python3 python3-venv) and run\n"
            "the same command again; make PYTHON=/path/to/python3.11 names one that was not found."
        )
    import environments

    sys.exit(environments.main())
