"""Trains, compares and publishes the dictionaries of a recipe: python jobs/sweep.py jobs/recipes/demo.yaml"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted working folder is not installed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="YAML file, local or s3://; jobs/recipes/ holds some")
    parser.add_argument("--fresh", action="store_true", help="throw away what the run folder holds and start anew")
    parser.add_argument("--plan", action="store_true", help="print who would hold what and the memory, start nothing")
    arguments = parser.parse_args()

    from cluster import recipe_file, session
    from cluster.errors import UserError

    try:
        loaded = recipe_file.load(arguments.recipe)
        session.set_environment()
        from cluster import sweep  # imports Ray, torch and transformers: seconds that a wrong recipe need not wait

        return sweep.plan(loaded) if arguments.plan else sweep.run(loaded, fresh=arguments.fresh)
    except (UserError, KeyboardInterrupt) as error:
        reason = f"error: {error}" if isinstance(error, UserError) else "stopped before anything was started"
        print(reason, file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 130


if __name__ == "__main__":
    sys.exit(main())
