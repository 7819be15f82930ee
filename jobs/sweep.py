"""Trains, compares and publishes the dictionaries of a recipe: python jobs/sweep.py jobs/recipes/demo.yaml"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a submitted working folder is not installed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="YAML file; jobs/recipes/ holds some")
    parser.add_argument("--fresh", action="store_true", help="throw away what the run folder holds and start anew")
    arguments = parser.parse_args()

    from cluster import recipe, session
    from cluster.errors import UserError
    from cluster.store import RunFolder

    try:
        loaded = recipe.load(arguments.recipe)
        log = RunFolder(loaded.folder()).log
        session.set_environment()
        from cluster import sweep  # imports Ray, torch and transformers: seconds that a wrong recipe need not wait

        try:
            return sweep.run(loaded, fresh=arguments.fresh, resume_command=f"python {sys.argv[0]} {arguments.recipe}")
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            print(sweep.explain_failure(error, log), file=sys.stderr, flush=True)
            return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
