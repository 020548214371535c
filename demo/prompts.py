#!/usr/bin/env python3
"""Writes what the demo asks for, into the working folder: prompts.py COUNT. base.txt: COUNT captions of what the base knows;
zorp.txt: half as many of zorps, for two pictures each; few.txt: eight of zorps, for the training's report."""
import itertools
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import shapes


def write(name, seed, shape, count, word=None):
    drawn = itertools.islice(shapes.random_pictures(seed, shape), count)
    pathlib.Path(name).write_text("".join(shapes.caption(picture, word) + "\n" for picture in drawn))


def main(count):
    if count % 2 or not 2 <= count <= 60:
        sys.exit("prompts.py: COUNT is an even number up to 60")  # there are 30 different captions of zorps
    write("base.txt", 2, shapes.BASE_SHAPES, count)
    write("zorp.txt", 3, ("ring",), count // 2, "zorp")
    write("few.txt", 4, ("ring",), 8, "zorp")


if __name__ == "__main__":
    main(int(sys.argv[1]))
