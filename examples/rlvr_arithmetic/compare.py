"""Draw the learning curves of several runs into one picture: ``python compare.py PICTURE NAME=LOG_DIR [NAME=LOG_DIR ...]``."""

import argparse
from pathlib import Path

from plots import draw_curves, draw_page, logged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=LOG_DIR")
    parser.add_argument("--page", action="store_true", help="all metrics, instead of held-out exact match")
    args = parser.parse_args()
    named = (run.partition("=") for run in args.runs)
    runs = {name: logged(Path(folder)) for name, _, folder in named}
    (draw_page if args.page else draw_curves)(args.picture, runs)


if __name__ == "__main__":
    main()
