#!/usr/bin/env python3
"""What rounding does to bfloat16 weights: rounding_study.py BIN_DIR FIXTURES [SVG [STEPS]]

Full fine-tuning of the small model (the suite's fixtures, build/ci/tests/cli-fixtures) with AdamW at a rate whose updates are mostly below half a
step of bfloat16, with equal samples, noise and seeds: float32 master weights, stochastic rounding, Kahan sums, and rounding to nearest. Compares the mean
loss of the last tenth of the steps, and draws the curves.
"""
import json
import pathlib
import sys
import tempfile

from bench_table import Run, Table, arguments

# colour and width of a line: three of the four lie on each other
MODES = {"master": ("#bbbbbb", 7), "stochastic": ("#1f77b4", 3.5), "kahan": ("#9be59b", 1), "nearest": ("#d62728", 1.5)}
WIDTH, HEIGHT, LEFT, TOP = 720, 340, 50, 20


def smoothed(losses, window):
    """Means of `window` neighbouring steps, one a window."""
    return [sum(losses[i:i + window]) / window for i in range(0, len(losses) - window + 1, window)]


def draw(path, curves, steps):
    top = max(max(curve) for curve in curves.values()) * 1.05

    def point(i, count, loss):
        return f"{LEFT + (i + 0.5) / count * (WIDTH - LEFT - 20):.1f},{TOP + (1 - loss / top) * (HEIGHT - TOP - 40):.1f}"

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for loss in range(int(top) + 1):
        y = point(0, 1, loss).split(",")[1]
        lines.append(f'<path d="M{LEFT},{y}H{WIDTH - 20}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y}" text-anchor="end">{loss}</text>')
    lines.append(f'<text x="{WIDTH - 20}" y="{HEIGHT - 16}" text-anchor="end">{steps} steps</text><text x="{LEFT}" y="{HEIGHT - 16}">loss</text>')
    for i, (mode, curve) in enumerate(curves.items()):
        points = " ".join(point(k, len(curve), loss) for k, loss in enumerate(curve))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{MODES[mode][0]}" '
                     f'stroke-width="{MODES[mode][1]}"/>')
        lines.append(f'<path d="M{WIDTH - 170},{TOP + 12 + 16 * i}h24" stroke="{MODES[mode][0]}" stroke-width="{MODES[mode][1]}"/>'
                     f'<text x="{WIDTH - 140}" y="{TOP + 16 + 16 * i}">{mode}</text>')
    path.write_text("\n".join(lines) + "\n</svg>\n")


def main():
    bin_dir, fixtures, *rest = arguments("BIN_DIR FIXTURES [SVG] [STEPS]")
    steps = int(rest[1]) if len(rest) > 1 else 2000
    fixtures = pathlib.Path(fixtures)
    table = Table(f"bfloat16 weights after {steps} steps")
    last, curves = {}, {}
    with tempfile.TemporaryDirectory(prefix="flux-bench-") as folder:
        for mode in MODES:
            out = pathlib.Path(folder) / mode
            Run([pathlib.Path(bin_dir) / "flux-train", "--latents", fixtures / "latents", "--text", fixtures / "text", "--model",
                 fixtures / "models/flux.safetensors", "--method", "full", "--optimizer", "adamw", "--precision", "bf16", "--weight-mode", mode,
                 "--learning-rate", "1e-5", "--max-steps", steps, "--seed", "3", "--out", out])
            records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            losses = [record["loss"] for record in records if "loss" in record]
            if len(losses) != steps:
                sys.exit(f"{mode}: {len(losses)} losses of {steps} steps")
            tail = losses[-max(1, steps // 10):]
            last[mode] = sum(tail) / len(tail)
            curves[mode] = smoothed(losses, max(1, steps // 100))
            table.add(f"{mode}: loss, mean of the last tenth", last[mode])
    for mode in ("stochastic", "kahan"):
        table.add(f"{mode}: from the master's loss", abs(last[mode] / last["master"] - 1) * 100, "%", at_most=2)
    table.add("nearest: from the master's loss", abs(last["nearest"] / last["master"] - 1) * 100, "%", at_least=2)
    if rest:
        draw(pathlib.Path(rest[0]), curves, steps)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())
