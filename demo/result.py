#!/usr/bin/env python3
"""Counts what demo/teach drew, in its working folder: prints it, and writes result.json and picture.png."""
import json
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import shapes


def count(prompts, folder, shape=None):
    """Of how many pictures colour, shape and ground are those asked for, and all three; `shape`: what every picture should
    show, whatever the caption calls it. Names of pictures hold the prompt's number."""
    prompts = pathlib.Path(prompts).read_text().splitlines()
    found = dict.fromkeys(("pictures", "colour", "shape", "ground", "all"), 0)
    for file in sorted(pathlib.Path(folder).glob("*.png")):
        number = int(file.stem.rsplit("-", 2)[1])
        _, colour, word, _, _, ground, _ = prompts[number].split()  # "a red circle on a white background"
        seen = shapes.recognise(shapes.read_png(file))
        right = {"colour": seen.colour == colour, "shape": seen.shape == (shape or word), "ground": seen.ground == ground}
        for name, value in {**right, "all": all(right.values()), "pictures": True}.items():
            found[name] += value
    return found


def tiled(rows, gap=4):
    """Pictures of one size, each as rows of RGB bytes, beside and below each other on white."""
    between = b"\xff" * (3 * gap)
    blank = [b"\xff" * ((len(rows[0][0][0]) + 3 * gap) * len(rows[0]) + 3 * gap)] * gap
    out = list(blank)
    for pictures in rows:
        out += [between + between.join(picture[y] for picture in pictures) + between for y in range(len(pictures[0]))] + blank
    return out


def main():
    found = {"base": count("base.txt", "base"), "before": count("zorp.txt", "before", "ring"),
             "after": count("zorp.txt", "after", "ring")}
    pathlib.Path("result.json").write_text(json.dumps(found, indent=1) + "\n")
    print("told by the pixels of each picture (demo/shapes.py):")
    for name, title in [("base", "what the base knows"), ("before", "zorps, before"), ("after", "zorps, after")]:
        of = found[name]
        print(f"  {title:20s} {of['shape']:3d} of {of['pictures']} have the shape, {of['colour']} the colour, "
              f"{of['ground']} the ground, {of['all']} all three")
    last = max(pathlib.Path("run/samples").glob("step-*.h5")).stem
    names = [[f"base/base-{i:04d}-00.png" for i in range(8)]]
    names += [[f"run/samples/{step}-{i:04d}-00.png" for i in range(8)] for step in ("step-000000", last)]
    pathlib.Path("picture.png").write_bytes(shapes.png(tiled([[shapes.read_png(name) for name in row] for row in names])))
    print(f"picture: {pathlib.Path('picture.png').resolve()}")
    print("  its rows: what the base knows; eight zorps that it was asked for before training; the same after training")


if __name__ == "__main__":
    main()
