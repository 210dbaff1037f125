"""``python -m inception_fused [info]``: what this machine has and what the block will do on it."""

from __future__ import annotations

import argparse
import json

from inception_fused.environment import format_info, info
from inception_fused.errors import InceptionInputError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m inception_fused", description=__doc__)
    parser.add_argument("command", nargs="?", default="info", choices=["info"])
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args()
    try:
        facts = info()
    except InceptionInputError as error:
        parser.error(str(error))
    print(json.dumps(facts, indent=2) if args.json else format_info(facts))


if __name__ == "__main__":
    main()
