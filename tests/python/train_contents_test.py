"""flux-train contains what it trains and nothing else: train_contents_test.py FLUX_TRAIN ENCODER_TOOL.

Reads the symbols (nm) and the needed libraries (readelf) of flux-train and fails on an autoencoder, a text encoder, a tokenizer or an
image library. The same reading of a tool that does hold an encoder must find one, or the test would prove nothing.
"""
import re
import subprocess
import sys

SYMBOLS = re.compile(r"\bflux::(vae|t5|clip|tokenizers|latents|text)::|\bcv::|\bsentencepiece::|\bicu_\d+::|\bu_(charType|isspace)")
LIBRARIES = re.compile(r"opencv|sentencepiece|icu|webp|jpeg|gif|png|tiff|lcms|exif", re.I)


def found(program):
    symbols = subprocess.run(["nm", "-C", program], check=True, capture_output=True, text=True).stdout
    needed = subprocess.run(["readelf", "-d", program], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    if "flux::" not in symbols or not libraries:
        sys.exit(f"{program}: no symbols or libraries were read; is it stripped?")
    return ([line for line in symbols.splitlines() if SYMBOLS.search(line)],
            [name for name in libraries if LIBRARIES.search(name)])


trainer, encoder = sys.argv[1:]
symbols, libraries = found(trainer)
for what in symbols[:20] + libraries:
    print(f"flux-train holds {what}")
if symbols or libraries:
    sys.exit(1)
if not all(found(encoder)):
    sys.exit(f"{encoder} shows no encoder either: the patterns of this test are out of date")
print("flux-train holds no encoder, tokenizer or image library")
