"""report.html of a run, as a parser and as a browser see it: report_test.py BIN_DIR FIXTURES parser|browser. Exit code 77 where
there is no chromium for the browser's part (scripts/setup --browser installs it).

The parser's part: nothing is loaded from elsewhere, all tags are closed, the curves have a point a step and the numbers of
metrics.jsonl at their places, and what is said of loss by noise level, data and memory is there. The browser's: its DOM shows the
same, all curves have a length and a colour, the script for hovering finds its data, and nothing is said on the console, forbidden by the page's
policy or asked of a network.
"""
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from training_run import metrics, train

VOID = {"meta", "img", "br", "link", "input"}
PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0000003010100"
                    "18dd8db00000000049454e44ae426082")


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.texts = [], [], [], {}
        self.section = None
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        if tag == "table":
            self.tables.append((self.section, []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open:
            return
        tag, name = self.open[-1]
        if tag in ("td", "th"):
            self.tables[-1][1][-1][-1] += data
        if name:
            self.texts[name] = self.texts.get(name, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def rows(self, section):
        return [row for name, rows in self.tables if name == section for row in rows]


def check_points(points, steps, values):
    """A curve is its values on straight scales: the same a and b in y = a + b value for all points, and so for x."""
    points = [tuple(map(float, point.split(","))) for point in points.split()]
    assert len(points) == len(values) == len(steps), (len(points), len(values), len(steps))
    for places, numbers in (([x for x, _ in points], steps), ([y for _, y in points], values)):
        low, high = numbers.index(min(numbers)), numbers.index(max(numbers))
        if numbers[low] == numbers[high]:
            assert len(set(places)) == 1
            continue
        scale = (places[high] - places[low]) / (numbers[high] - numbers[low])
        for place, number in zip(places, numbers):
            assert abs(place - places[low] - scale * (number - numbers[low])) < 0.25, (place, number)


def check(text, lines):
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "xlink:href", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, name, value[:80])
    for address in re.findall(r"[a-z]+://[^\s\"'<]*|url\([^)]*\)|@import", text):
        raise AssertionError(f"an address in the report: {address}")
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'"), policy
    assert "prefers-color-scheme: dark" in text

    steps = [line["step"] for line in lines]
    data = json.loads(page.texts["curves"])
    assert data["step"] == steps == list(range(1, len(lines) + 1))
    curves = {a["data-curve"]: a["points"] for a in page.all("polyline")}
    assert set(curves) == {"loss", "loss_smoothed", "learning_rate", "grad_norm", "validation_loss"}
    validations = [line["validation"] for line in lines if "validation" in line]
    assert 1 < len(validations) < len(lines)
    for name, points in curves.items():
        apart = name == "validation_loss"
        values = [v["loss"] for v in validations] if apart else [line[name] for line in lines]
        at = [v["step"] for v in validations] if apart else steps
        assert data[name] == values and data["validation_step" if apart else "step"] == at, name
        check_points(points, at, values)
    head, *rows = page.rows("validation")
    assert head == ["step", "mean", *(f"sigma {sigma}" for sigma in validations[0]["sigmas"]), "samples", ""], head
    assert [int(row[0]) for row in rows] == [v["step"] for v in validations], rows
    for row, v in zip(rows, validations):
        for shown, number in zip(row[1:], [v["loss"], *v["losses"], v["samples"]]):
            assert abs(float(shown) - number) <= 1e-5 * number, (row, v)
    marked = [int(row[0]) for row in rows if row[-1] == "best checkpoint"]
    assert len(marked) == 1 and min(v["loss"] for v in validations if v["step"] in (3, 5)) == \
        next(v["loss"] for v in validations if v["step"] == marked[0]), (marked, validations)

    rows = page.rows("sigma")[1:]
    assert len(rows) == 10 == len(page.all("rect"))
    seen = [(sigma, loss) for line in lines for sigma, loss in zip(line["sigma"], line["sample_loss"])]
    for i, (_, samples, mean) in enumerate(rows):
        inside = [loss for sigma, loss in seen if min(int(sigma * 10), 9) == i]
        assert int(samples) == len(inside), (i, samples, inside)
        assert not inside or abs(float(mean) - sum(inside) / len(inside)) < 1e-4 * float(mean), (i, mean)
    assert sum(int(row[1]) for row in rows) == sum(line["samples"] for line in lines)

    tables = {name: [rows for section, rows in page.tables if section == name] for name, _ in page.tables}
    subsets, buckets = tables["data"]
    visits = sum(int(row[4]) for row in subsets[1:])
    assert visits == sum(int(row[2]) for row in buckets[1:]) > 0
    assert tables["truncation"][0][0] == ["limit", "captions beyond", "tokens used", "tokens cut off"]
    assert all(cell.isdigit() for row in tables["truncation"][0][1:] for cell in row[1:]), tables["truncation"]
    memory = {row[0]: row[1:] for row in page.rows("memory")}
    assert all(memory["all tensors, at their peak"]) and memory["the process"][1]
    settings = dict(page.rows("settings"))
    assert settings["learning-rate"] == "0.001" and settings["seed"] == "3", settings
    provenance = dict(page.rows("provenance"))
    assert len(provenance["model's weights_sha256"]) == 64 and "flux-train" in provenance["command"]
    pictures = page.all("img")
    assert len(pictures) == 2 and "step 4: " in text and "step 2: " in text
    return page


def main(bin_dir, fixtures, part):
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None)
    if part == "browser" and not browser:
        print("skipped: no chromium is installed")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        (out / "samples").mkdir(parents=True)
        for step in (2, 4):
            (out / f"samples/step-{step:06}-0.png").write_bytes(PNG)
        held_out = ("--validation-split", "0.25", "--validate-every", "2")
        train(bin_dir, fixtures, out, 3, "--batch-size", "2", "--lr-scheduler", "inverse_sqrt", "--lr-warmup-steps", "2", *held_out)
        train(bin_dir, fixtures, out, 5, "--resume", "--batch-size", "2", "--lr-scheduler", "inverse_sqrt", "--lr-warmup-steps", "2",
              *held_out)
        lines = metrics(out)
        report = out / "report.html"
        if part == "browser":
            # what is said before anything else runs, and what the script wrote after an event at the middle of the first chart, are
            # parts of the DOM that is printed
            first = """<script>
              const complain = (what) => { document.documentElement.dataset.error = (document.documentElement.dataset.error || "") + what + "; "; };
              window.addEventListener("error", (event) => complain(event.message || "a resource"), true);
              document.addEventListener("securitypolicyviolation", (event) => complain("policy: " + event.violatedDirective));
              for (const name of ["error", "warn"]) console[name] = (...words) => complain(words.join(" "));
            </script>"""
            probe = """<script>
              const chart = document.querySelector("svg[data-curves]"), box = chart.getBoundingClientRect();
              chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 410 / 760, clientY: box.top + 20}));
              document.body.dataset.hover = chart.parentNode.querySelector("output").textContent;
              const other = document.querySelector('svg[data-curves="validation_loss"]'), place = other.getBoundingClientRect();
              other.dispatchEvent(new PointerEvent("pointermove", {clientX: place.left + place.width * 750 / 760, clientY: place.top + 20}));
              document.body.dataset.last = other.parentNode.querySelector("output").textContent;
              document.body.dataset.decoded = [...document.images].filter(i => i.complete && i.naturalWidth == 1).length;
              document.body.dataset.curves = [...document.querySelectorAll("polyline")].filter(p => p.getTotalLength() > 100 &&
                p.getBoundingClientRect().width > 100 && getComputedStyle(p).stroke != "none").map(p => p.dataset.curve).join(" ");
              document.body.dataset.requests = performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 60)).join(" ");
            </script></body>"""
            page = pathlib.Path(folder) / "probed.html"
            text = report.read_text()
            assert text.count("<meta charset") == 1 and text.count("</body>") == 1
            page.write_text(text.replace("<meta charset", first + "<meta charset").replace("</body>", probe))
            shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom",
                                    page.as_uri()], check=True, capture_output=True, text=True, timeout=120)
            said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
            assert not said, said
            dom = Page(re.sub(r"<!DOCTYPE[^>]*>", "", shown.stdout))
            body = dom.all("body")[0]
            assert "data-error" not in dom.all("html")[0], dom.all("html")
            assert body["data-requests"] == "", body
            assert body["data-decoded"] == "2", body
            assert set(body["data-curves"].split()) == {"loss", "loss_smoothed", "learning_rate", "grad_norm", "validation_loss"}, body
            assert body["data-last"].startswith("step 5: "), body
            assert abs(float(body["data-last"].split(": ")[1]) - lines[-1]["validation"]["loss"]) < 1e-3, body
            assert body["data-hover"].startswith("step 3: "), body
            shown = [float(number) for number in body["data-hover"].split(": ")[1].split(", ")]
            assert abs(shown[0] - lines[2]["loss"]) < 1e-3 and abs(shown[1] - lines[2]["loss_smoothed"]) < 1e-3, (shown, lines[2])
            print(f"browser: {body['data-hover']}")
            return 0
        page = check(report.read_text(), lines)
        print(f"{len(lines)} steps, {len(page.tags)} tags, {report.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(*(pathlib.Path(argument).resolve() for argument in sys.argv[1:3]), sys.argv[3]))
