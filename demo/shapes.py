"""Pictures of one coloured shape on a plain ground: drawing them, and telling what is in one by its pixels. Standard
library only; scripts/demo-pictures draws with it, the demo and its tests count with it."""
import collections
import functools
import math
import pathlib
import random
import statistics
import struct
import zlib

COLOURS = {"red": (214, 48, 49), "green": (0, 148, 90), "blue": (41, 98, 214), "yellow": (247, 202, 24),
           "purple": (123, 63, 160), "orange": (240, 130, 40)}
GROUNDS = {"white": (245, 245, 245), "black": (20, 20, 24), "grey": (128, 132, 138), "pink": (250, 175, 200),
           "brown": (96, 62, 38)}


def _triangle(x, y):
    return max(y - 0.6, -y * 0.4472 + abs(x) * 0.8944 - 0.36)


def _star(x, y):
    # five points: folded onto one wedge, whose edge goes from an outer to an inner corner
    angle = (math.atan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
    radius = math.hypot(x, y)
    px, py = radius * math.cos(angle), radius * abs(math.sin(angle))
    ax, ay = 0.8, 0.0
    bx, by = 0.36 * math.cos(math.pi / 5), 0.36 * math.sin(math.pi / 5)
    length = math.hypot(bx - ax, by - ay)
    return ((bx - ax) * (ay - py) - (ax - px) * (by - ay)) / length


# Signed distances: below 0 inside. x to the right and y down, the shape is about 1.3 wide around 0, 0.
SHAPES = {
    "circle": lambda x, y: math.hypot(x, y) - 0.65,
    "square": lambda x, y: max(abs(x), abs(y)) - 0.58,
    "triangle": _triangle,
    "ring": lambda x, y: abs(math.hypot(x, y) - 0.48) - 0.17,
    "star": _star,
    "cross": lambda x, y: max(min(abs(x), abs(y)) - 0.2, max(abs(x), abs(y)) - 0.65),
}
# What the base model of the demo is taught; the rest is left to learn.
BASE_SHAPES = ("circle", "square", "triangle")

Picture = collections.namedtuple("Picture", "colour shape ground centre size")  # centre and size: shares of half a side


def made_up_word(draws):
    """Of a language that nobody speaks: "blat", "kimo"."""
    while True:
        length = draws.randrange(3, 7)
        word = "".join(draws.choice("aeiou" if i % 2 == draws.randrange(4) // 3 else "bcdfghjklmnprstvwxyz") for i in range(length))
        if word not in ("zorp", *SHAPES):  # what the demo teaches
            return word


def caption(picture, word=None):
    article = "an" if picture.colour[0] in "aeiou" else "a"
    return f"{article} {picture.colour} {word or picture.shape} on a {picture.ground} background"


def draw(picture, width, height):
    """Rows of RGB bytes."""
    side, inside = min(width, height) / 2, SHAPES[picture.shape]
    unit = side * picture.size  # pixels
    left, top = width / 2 + picture.centre[0] * side, height / 2 + picture.centre[1] * side
    colour = COLOURS.get(picture.colour, picture.colour)
    ground = GROUNDS.get(picture.ground, picture.ground)
    rows = []
    for row in range(height):
        out = bytearray()
        y = (row + 0.5 - top) / unit
        for column in range(width):
            cover = min(1, max(0, 0.5 - inside((column + 0.5 - left) / unit, y) * unit))  # of the pixel
            out += bytes(round(cover * a + (1 - cover) * b) for a, b in zip(colour, ground))
        rows.append(bytes(out))
    return rows


def png(rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    filtered, above = [], bytes(len(rows[0]))
    for row in rows:  # each as the difference from the one above
        filtered.append(b"\2" + bytes((a - b) & 255 for a, b in zip(row, above)))
        above = row
    data = zlib.compress(b"".join(filtered), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def random_pictures(seed, shapes=BASE_SHAPES):
    """Without end; every combination of shape, colour and ground equally often, in an order of the seed."""
    draws = random.Random(seed)
    everything = [(c, s, g) for s in shapes for c in COLOURS for g in GROUNDS]
    while True:
        draws.shuffle(everything)
        for colour, shape, ground in everything:
            centre = draws.uniform(-0.12, 0.12), draws.uniform(-0.12, 0.12)
            yield Picture(colour, shape, ground, centre, draws.uniform(0.9, 1.1))


def read_png(path):
    """Rows of RGB bytes of a file of 8-bit RGB or RGBA without interlacing."""
    data = pathlib.Path(path).read_bytes()
    at, header, packed = 8, None, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        content = data[at + 8:at + 8 + size]
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", content)
        elif kind == b"IDAT":
            packed += content
        at += size + 12
    width, height, bits, colour_type, _, _, interlaced = header
    if bits != 8 or colour_type not in (2, 6) or interlaced:
        raise ValueError(f"{path}: not a plain RGB picture")
    step = 3 if colour_type == 2 else 4
    raw, rows, before = zlib.decompress(packed), [], bytearray(width * step)
    for row in range(height):
        start = row * (width * step + 1)
        kind, line = raw[start], bytearray(raw[start + 1:start + 1 + width * step])
        for i in range(len(line)):
            left, up = line[i - step] if i >= step else 0, before[i]
            corner = before[i - step] if i >= step else 0
            if kind == 4:
                guess = left + up - corner
                add = min((left, up, corner), key=lambda value: abs(guess - value))
            else:
                add = (0, left, up, (left + up) // 2)[kind]
            line[i] = (line[i] + add) & 255
        before = line
        rows.append(bytes(line if step == 3 else (b for i, b in enumerate(line) if i % 4 < 3)))
    return rows


def _nearest(pixel, palette):
    name = min(palette, key=lambda name: math.dist(pixel, palette[name]))
    return name if math.dist(pixel, palette[name]) < 75 else None


def _median(pixels):
    return tuple(statistics.median(channel) for channel in zip(*pixels))


def _largest_blob(inside):
    """Of a set of (x, y): the largest part whose points touch."""
    best, left = set(), set(inside)
    while left:
        blob, edge = set(), [left.pop()]
        while edge:
            x, y = edge.pop()
            blob.add((x, y))
            for near in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        best = max(best, blob, key=len)
    return best


@functools.cache
def _extent(shape):
    """Its box: left, top, right, bottom."""
    grid = [i / 100 for i in range(-100, 101)]
    inside = [(x, y) for x in grid for y in grid if SHAPES[shape](x, y) < 0]
    xs, ys = zip(*inside)
    return min(xs), min(ys), max(xs), max(ys)


def _overlap(blob, shape):
    """What the blob and the shape, drawn into the blob's box, have in common: intersection over union."""
    xs, ys = zip(*blob)
    left, top, right, bottom = min(xs), min(ys), max(xs) + 1, max(ys) + 1
    x0, y0, x1, y1 = _extent(shape)
    common = either = 0
    for y in range(top, bottom):
        for x in range(left, right):
            there = (x, y) in blob
            wanted = SHAPES[shape](x0 + (x + 0.5 - left) / (right - left) * (x1 - x0),
                                   y0 + (y + 0.5 - top) / (bottom - top) * (y1 - y0)) < 0
            common += there and wanted
            either += there or wanted
    return common / either


Seen = collections.namedtuple("Seen", "colour shape ground overlap")  # None for what is not clear


def recognise(rows):
    """What a picture shows. The ground is the colour along the edges; the shape is what differs from it, in one piece, and
    called after the drawn shape that it covers best, if that is well enough."""
    height, width = len(rows), len(rows[0]) // 3
    pixels = {(x, y): tuple(rows[y][3 * x:3 * x + 3]) for y in range(height) for x in range(width)}
    margin = max(1, width // 32)
    ground = _median([p for (x, y), p in pixels.items()
                      if not (margin <= x < width - margin and margin <= y < height - margin)])
    blob = _largest_blob({at for at, p in pixels.items() if math.dist(p, ground) > 60})
    if len(blob) < 0.02 * width * height:
        return Seen(None, None, _nearest(ground, GROUNDS), 0)
    colour = _median([pixels[at] for at in blob])
    blob = _largest_blob({at for at, p in pixels.items() if math.dist(p, colour) < math.dist(p, ground)})
    xs, ys = zip(*blob)
    sides = (max(xs) - min(xs) + 1) / (max(ys) - min(ys) + 1)
    best = max(SHAPES, key=lambda shape: _overlap(blob, shape))
    overlap = _overlap(blob, best)
    clear = overlap > 0.7 and 0.65 < sides < 1.55
    return Seen(_nearest(colour, COLOURS), best if clear else None, _nearest(ground, GROUNDS), overlap)
