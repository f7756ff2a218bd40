"""Answers every scene of the challenge's data into submission.json; for ``python script.py`` in this folder.

Everything it runs lies beside it: the package's Python files and the model. It needs the packages of requirements.txt,
no network and no compiler. ``--help`` lists what can be said otherwise than by params.json.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    # Before an installed wireframe, and also where Python leaves the script's folder out (-P, -I).
    sys.path.insert(0, str(HERE))
    from wireframe.errors import WireframeError, one_line
    from wireframe.submit.cli import add_arguments, run

    parser = argparse.ArgumentParser(description="a submission to the S23DR 2026 challenge")
    add_arguments(parser)
    try:
        run(parser.parse_args(), model=HERE / "model")
    except (WireframeError, OSError) as problem:
        print(f"script.py: {one_line(problem, 2000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    # A file with an answer for every scene is a success for the harness, whatever the scenes were.
    return 0


if __name__ == "__main__":
    sys.exit(main())
