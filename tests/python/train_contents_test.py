"""flux-train and flux-sample contain the transformer and no encoder, flux-decode the autoencoder and neither the transformer nor a text encoder:
train_contents_test.py TOOL OTHER_TOOL.

Reads the symbols (nm) and the needed libraries (readelf) of TOOL and fails on an autoencoder, a text encoder, a tokenizer or an
image library; of flux-decode on a transformer, a text encoder or a tokenizer. The same reading of OTHER_TOOL, which does hold some, must find
them, or the test would prove nothing.
"""
import pathlib
import re
import subprocess
import sys

DECODES = pathlib.Path(sys.argv[1]).name == "flux-decode"
SYMBOLS = re.compile(r"\bflux::(dit|lora|t5|clip|tokenizers|text|train)::|\bsentencepiece::|\bicu_\d+::|\bu_(charType|isspace)" if DECODES else
                     r"\bflux::(vae|t5|clip|tokenizers|latents|text)::|\bcv::|\bsentencepiece::|\bicu_\d+::|\bu_(charType|isspace)")
LIBRARIES = re.compile(r"sentencepiece|icu" if DECODES else r"opencv|sentencepiece|icu|webp|jpeg|gif|png|tiff|lcms|exif", re.I)


def found(program):
    symbols = subprocess.run(["nm", "-C", program], check=True, capture_output=True, text=True).stdout
    needed = subprocess.run(["readelf", "-d", program], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    if "flux::" not in symbols or not libraries:
        sys.exit(f"{program}: no symbols or libraries were read; is it stripped?")
    return ([line for line in symbols.splitlines() if SYMBOLS.search(line)],
            [name for name in libraries if LIBRARIES.search(name)])


tool, other = sys.argv[1:]
symbols, libraries = found(tool)
for what in symbols[:20] + libraries:
    print(f"{tool} holds {what}")
if symbols or libraries:
    sys.exit(1)
if not found(other)[0] or (not DECODES and not all(found(other))):
    sys.exit(f"{other} shows nothing either: the patterns of this test are out of date")
print(f"{tool} holds nothing of them")
