"""Makefile.example does what its first lines say. makefile_example_test.py BIN_DIR drawn|photos

`drawn` uses pictures of scripts/demo-pictures under odd file names. `photos` uses ../shared/photos with the real vocabularies of
../shared/tokenizers beside the checkout (or under $FLUX_SHARED), and exits with 77 where they are not there.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
ODD_NAMES = ["with space", "new\nline", "quote'\"", "-dash", "$HOME;#%"]


def main(bin_dir, which):
    bin_dir = pathlib.Path(bin_dir).resolve()
    shared = pathlib.Path(os.environ.get("FLUX_SHARED", ROOT.parent / "shared"))
    if which == "photos" and not (shared / "photos").is_dir():
        print(f"skipped: no photos in {shared}")
        return 77
    with tempfile.TemporaryDirectory(prefix="flux make ") as folder:
        folder = pathlib.Path(folder)
        images = folder / "my images"
        tiny = [bin_dir / "flux-model", "tiny", "--out", folder / "models", "--seed", "3"]
        if which == "photos":
            images.mkdir()
            for file in sorted((shared / "photos").iterdir()):
                if file.suffix in {".jpg", ".txt"}:
                    shutil.copyfile(file, images / file.name)
            tiny += ["--t5-tokenizer", shared / "tokenizers/t5/spiece.model", "--clip-tokenizer", shared / "tokenizers/clip"]
        else:
            subprocess.run([ROOT / "scripts/demo-pictures", images, "6"], check=True)
            for picture, odd in zip(sorted(images.glob("*.png")), ODD_NAMES):
                picture.rename(images / (odd + ".png"))
                picture.with_suffix(".txt").rename(images / (odd + ".txt"))
        subprocess.run(tiny, check=True)
        num_images = len(list(images.glob("*.png")) + list(images.glob("*.jpg")))
        shutil.copyfile(ROOT / "Makefile.example", folder / "Makefile.example")
        environment = os.environ | {"HOME": str(folder), "XDG_CACHE_HOME": ""}
        lora = folder / "work/run/step-000003/lora.safetensors"

        def make():
            """The programs that a `make` runs, by name, with their summaries."""
            result = subprocess.run(
                ["make", "-f", "Makefile.example", f"BIN={bin_dir}", "IMAGES=my images", "RESOLUTION=96x96", "STEPS=3",
                 "LATENTS_FLAGS=--json", "TEXT_FLAGS=--json", "TRAIN_FLAGS=--json --rank 4 --batch-size 2"],
                cwd=folder, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
            lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
            ran = [name for name in ("flux-cache-latents", "flux-cache-text", "flux-train")
                   if f"/{name} " in result.stdout]
            assert len(lines) == len(ran), result.stdout
            time.sleep(0.02)  # the next edit gets a later time stamp
            return dict(zip(ran, map(json.loads, lines)))

        def move_behind_links():
            """IMAGES becomes a link to the folder, and one caption in it a link to a file elsewhere."""
            images.rename(folder / "elsewhere")
            images.symlink_to("elsewhere")
            caption = sorted(images.glob("*.txt"))[0]
            caption.rename(folder / "caption elsewhere")
            caption.symlink_to(folder / "caption elsewhere")

        def expect(what, ran, names, **encoded):
            assert list(ran) == names, f"{what}: ran {list(ran)}, expected {names}"
            for name, count in encoded.items():
                key = "flux-cache-" + name
                assert ran[key]["encoded"] == count, f"{what}: {name} encoded {ran[key]['encoded']}, expected {count}"

        first = make()
        expect("first", first, ["flux-cache-latents", "flux-cache-text", "flux-train"], latents=num_images)
        assert first["flux-train"]["steps"] == 3 and lora.stat().st_size > 1000
        expect("again", make(), [])

        caption = sorted(images.glob("*.txt"))[1]
        caption.write_text("a caption that nothing else has\n")
        expect("edited caption", make(), ["flux-cache-text", "flux-train"], text=1)

        trained = lora.stat().st_mtime_ns
        caption.touch()
        expect("touched caption", make(), ["flux-cache-text"], text=0)
        picture = sorted([*images.glob("*.png"), *images.glob("*.jpg")])[0]
        picture.touch()
        expect("touched image", make(), ["flux-cache-latents", "flux-cache-text"], latents=0, text=0)
        assert lora.stat().st_mtime_ns == trained, "a touched file trained again"
        expect("nothing touched", make(), [])

        shutil.copyfile(sorted([*images.glob("*.png"), *images.glob("*.jpg")])[2], picture)
        ran = make()
        expect("edited image", ran, ["flux-cache-latents", "flux-cache-text", "flux-train"], text=0)
        assert ran["flux-cache-latents"]["encoded"] <= 1
        expect("nothing edited", make(), [])

        move_behind_links()
        make()
        expect("behind links", make(), [])
        (folder / "caption elsewhere").write_text("one more caption that nothing else has\n")
        expect("edited caption behind links", make(), ["flux-cache-text", "flux-train"], text=1)
        print(f"{which}: {num_images} images, first loss {first['flux-train']['loss_first']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
