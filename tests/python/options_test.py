"""Every option of every --help has an effect: options_test.py BIN_DIR FIXTURES SOURCE_DIR [OPTION...]

A row a (program, option): two command lines, the second with the option, and what must differ; or a scene of option_scenes.py, which does more
to see it. An option of --help without a row fails, and so does a row without an option.
"""
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading

import option_scenes as scenes

BIN, FIXTURES, SOURCE = (pathlib.Path(argument).resolve() for argument in sys.argv[1:4])
MODELS = FIXTURES / "models"
CUDA = pathlib.Path("/proc/driver/nvidia/version").exists()


# ---- what a run is seen to have done

class Result:
    def __init__(self, folder, code, out, err):
        self.folder, self.code, self.out, self.err = folder, code, out, err


def exit_code(r):
    return r.code


def needs_success(observe):
    @functools.wraps(observe)
    def wrapped(r):
        if r.code != 0:
            raise AssertionError(f"exit {r.code}: {r.err[-600:]}")
        return observe(r)
    return wrapped


def tensors(path):
    """dtype, shape and bytes of each tensor, without the metadata, which repeats the options."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    return {name: (about["dtype"], about["shape"], hashlib.sha256(data[8 + size:][slice(*about["data_offsets"])]).hexdigest())
            for name, about in header.items() if name != "__metadata__"}


@needs_success
def weights(r):
    last = max(r.folder.glob("out/step-*"))
    return {file.name: tensors(file) for file in last.glob("*.safetensors") if file.name != "state.safetensors"}


@needs_success
def states(r):
    return tensors(max(r.folder.glob("out/step-*")) / "state.safetensors")


@needs_success
def files(r):
    return sorted(re.sub(r"\d{8,}", "N", str(path.relative_to(r.folder))) for path in r.folder.rglob("*"))


@needs_success
def types(r):
    return {name: about[0] for file in weights(r).values() for name, about in file.items()}


@needs_success
def stdout(r):
    return re.sub(r"[0-9.]+ s\b|\"seconds[a-z_]*\":[0-9.]+", "", r.out)


@needs_success
def validations(r):
    """Losses of held-out samples in metrics.jsonl, without their time."""
    lines = [json.loads(line) for line in (r.folder / "out/metrics.jsonl").read_text().splitlines()]
    return [{**line["validation"], "seconds": None} for line in lines if "validation" in line]


def logged(r):
    return bool(r.err)


def code_and_stdout(r):
    return r.code, r.out


def plan(r):
    assert r.code in (0, 5), r.err
    about = json.loads(r.out)
    return {key: about[key] for key in ("peak_bytes", "tensor_bytes", "causes", "step")}


@needs_success
def planned(r):
    """Of the tensors of a run, batches that are read ahead among them."""
    return re.search(r"memory: tensors .* at most, (.*) planned", r.err).group(1)


def host_bytes(r):
    return json.loads(r.out)["host_bytes"]


@needs_success
def contents(r):
    return {str(path.relative_to(r.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in r.folder.rglob("*.safetensors")}


@needs_success
def cached(r):
    """The samples of a cache, without what its manifest says of the command."""
    found = subprocess.run([BIN / "flux-cache", "inspect", r.folder / "out", "--samples", "--json"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    about = json.loads(found.stdout)
    return {key: about[key] for key in ("samples",)}


@needs_success
def json_out(r):
    try:
        json.loads(r.out)
        return True
    except json.JSONDecodeError:
        return False


# ---- command lines; {out} is the run's own folder

INPUT = ["--latents", FIXTURES / "latents", "--text", FIXTURES / "text", "--model", MODELS / "flux.safetensors", "--out", "out"]
RUN = [*INPUT, "--max-steps", "3", "--learning-rate", "0.001", "--seed", "3"]
LORA = [*RUN, "--lora-dtype", "f32"]
FULL = [*RUN, "--method", "full"]
PLAN = ["--plan=json", "--model", MODELS / "flux.safetensors", "--method", "lora", "--resolution", "64x64", "--device", "cpu"]


def row(base, more, observe=weights, without=()):
    """`base` and `base` with `more`; `without`: the flags of base that the second leaves out."""
    second = []
    skip = False
    for word in base:
        if skip:
            skip = False
        elif word in without:
            skip = True
        else:
            second.append(word)
    return (tuple(map(str, base)), tuple(map(str, [*second, *more])), observe)


def other(base, flag, value, observe=weights):
    return row(base, [flag, value], observe, without=(flag,))


def lora(*more, base=(), observe=weights):
    return row([*LORA, *base], more, observe)


TRAIN = {
    "latents": other(RUN, "--latents", "nowhere", exit_code),
    "text": other(RUN, "--text", "nowhere", exit_code),
    "model": other(RUN, "--model", "nowhere", exit_code),
    "out": other(RUN, "--out", "elsewhere", files),
    "import-sd-scripts": scenes.train_import,
    "resume": scenes.train_resume,
    "allow-change": scenes.train_allow_change,
    "reproduce": scenes.train_reproduce,
    "replace": scenes.train_replace,
    "no-tensorboard": row(RUN, ["--no-tensorboard"], files),
    "save-every": row(RUN, ["--save-every", "2"], files),
    "time-limit": row(RUN, ["--time-limit", "1s"], exit_code),  # no step fits
    "keep-last": row([*RUN, "--save-every", "1"], ["--keep-last", "2"], files),
    "validation-split": lora("--validation-split", "0.3", observe=validations),
    "validation-seed": lora("--validation-seed", "3", base=["--validation-split", "0.7"], observe=validations),
    "validate-every": lora("--validate-every", "1", base=["--validation-split", "0.3"], observe=validations),
    "validation-samples": lora("--validation-samples", "1", base=["--validation-split", "0.7"], observe=validations),
    "validation-sigmas": lora("--validation-sigmas", "0.5", base=["--validation-split", "0.3"], observe=validations),
    "method": row(RUN, ["--method", "full"], files),
    "rank": lora("--rank", "4"),
    "alpha": lora("--alpha", "4"),
    "network-algo": lora("--network-algo", "lokr"),
    "lokr-factor": lora("--lokr-factor", "4", base=["--network-algo", "lokr"]),
    "dora": lora("--dora"),
    "train-blocks": lora("--train-blocks", "single"),
    "train-double-blocks": lora("--train-double-blocks", "0"),
    "train-single-blocks": lora("--train-single-blocks", "none"),
    "module-ranks": lora("--module-ranks", "single=2"),
    "rank-of": lora("--rank-of", "single=2"),
    "lr-of": lora("--lr-of", "single=1e-2"),
    "loraplus-lr-ratio": lora("--loraplus-lr-ratio", "4"),
    "scale-weight-norms": lora("--scale-weight-norms", "0.001"),
    "network-dropout": lora("--network-dropout", "0.5"),
    "rank-dropout": lora("--rank-dropout", "0.5"),
    "module-dropout": lora("--module-dropout", "0.5"),
    "lora-dtype": row(RUN, ["--lora-dtype", "f16"], types),
    "lora-layout": lora("--lora-layout", "diffusers"),
    "model-layout": row(FULL, ["--model-layout", "diffusers"]),
    "optimizer": lora("--optimizer", "lion"),
    "optimizer-args": lora("--optimizer-args", "beta1=0.5"),
    "state-dtype": lora("--state-dtype", "bf16", observe=states),
    "weight-mode": row([*FULL, "--precision", "bf16"], ["--weight-mode", "nearest"]),
    "ema-decay": other([*LORA, "--ema-decay", "0.5"], "--ema-decay", "0.1"),
    "ema-dtype": lora("--ema-dtype", "bf16", base=["--ema-decay", "0.5"], observe=states),
    "max-steps": other(LORA, "--max-steps", "2"),
    "max-epochs": scenes.train_max_epochs,
    "no-tags": scenes.train_no_tags,
    "learning-rate": other(LORA, "--learning-rate", "0.002"),
    "lr-scheduler": lora("--lr-scheduler", "cosine"),
    "lr-warmup-steps": lora("--lr-warmup-steps", "2", base=["--lr-scheduler", "constant_with_warmup"]),
    "lr-decay-steps": other([*LORA, "--lr-scheduler", "warmup_stable_decay", "--lr-decay-steps", "1"], "--lr-decay-steps", "3"),
    "min-lr-ratio": lora("--min-lr-ratio", "0.5", base=["--lr-scheduler", "cosine"]),
    "lr-cycles": lora("--lr-cycles", "2", base=["--lr-scheduler", "cosine_with_restarts"]),
    "lr-power": lora("--lr-power", "2", base=["--lr-scheduler", "polynomial"]),
    "lr-timescale": lora("--lr-timescale", "2", base=["--lr-scheduler", "inverse_sqrt"]),
    "lr-step-rules": other([*LORA, "--lr-scheduler", "piecewise_constant", "--lr-step-rules", "1:1,0.1"], "--lr-step-rules", "1:2,0.1"),
    "weight-decay": lora("--weight-decay", "0.5"),
    "clip": lora("--clip", "per-parameter", base=["--optimizer", "sgd", "--max-grad-norm", "0.01"]),
    "max-grad-norm": lora("--max-grad-norm", "0.01", base=["--optimizer", "sgd"]),
    "batch-size": lora("--batch-size", "2"),
    "gradient-accumulation": lora("--gradient-accumulation", "2"),
    "seed": other(LORA, "--seed", "4"),
    "guidance": lora("--guidance", "3.5"),
    "timestep-sampling": lora("--timestep-sampling", "uniform"),
    "sigmoid-scale": lora("--sigmoid-scale", "2"),
    "discrete-flow-shift": lora("--discrete-flow-shift", "5", base=["--timestep-sampling", "shift"]),
    "weighting-scheme": lora("--weighting-scheme", "cosmap"),
    "logit-mean": lora("--logit-mean", "1", base=["--timestep-sampling", "sigma", "--weighting-scheme", "logit_normal"]),
    "logit-std": lora("--logit-std", "0.5", base=["--timestep-sampling", "sigma", "--weighting-scheme", "logit_normal"]),
    "mode-scale": lora("--mode-scale", "0.5", base=["--timestep-sampling", "sigma", "--weighting-scheme", "mode"]),
    "min-timestep": lora("--min-timestep", "700"),
    "max-timestep": lora("--max-timestep", "300"),
    "stratified-timesteps": lora("--stratified-timesteps", base=["--gradient-accumulation", "2"]),
    "model-prediction-type": lora("--model-prediction-type", "sigma_scaled"),
    "loss-type": lora("--loss-type", "l1"),
    "huber-schedule": lora("--huber-schedule", "exponential", base=["--loss-type", "huber"]),
    "huber-c": lora("--huber-c", "0.01", base=["--loss-type", "huber"]),
    "huber-scale": lora("--huber-scale", "2", base=["--loss-type", "huber", "--huber-schedule", "exponential"]),
    "posterior": lora("--posterior", "mean"),
    "masked-loss": scenes.train_masked_loss,
    "text-mask": lora("--text-mask", "on"),
    "ip-noise-gamma": lora("--ip-noise-gamma", "0.2"),
    "ip-noise-gamma-random-strength": lora("--ip-noise-gamma-random-strength", base=["--ip-noise-gamma", "0.2"]),
    "prior-loss-weight": scenes.train_prior_loss_weight,
    "device": lora("--device", "cpu" if CUDA else "cuda", observe=weights if CUDA else exit_code),
    "precision": lora("--precision", "bf16") if not CUDA else lora("--precision", "f32"),
    "base-precision": lora("--base-precision", "fp8"),
    "device-memory": other([*other(PLAN, "--device", "cuda")[1], "--device-memory", "24GiB"], "--device-memory", "1MB", exit_code),
    "host-memory": row(PLAN, ["--host-memory", "1MB"], exit_code),
    "plan": scenes.train_plan,
    "resolution": other(PLAN, "--resolution", "128x128", plan),
    "t5-length": row(PLAN, ["--t5-length", "64"], plan),
    "resident-blocks": row(PLAN, ["--resident-blocks", "1"], plan),
    "keep-graphs": row(PLAN, ["--keep-graphs", "0"], plan),
    "ring-slots": row([*PLAN, "--resident-blocks", "0"], ["--ring-slots", "4"], plan),
    "stream-adapters": row([*PLAN, "--resident-blocks", "0"], ["--stream-adapters"], plan),
    "stream-states": row(other(PLAN, "--method", "full")[1], ["--stream-states"], plan),
    "block-inputs": row([*PLAN, "--keep-graphs", "0"], ["--block-inputs", "disk"], plan),
    "stream-from": row([*PLAN, "--resident-blocks", "0"], ["--stream-from", "host"], plan),
    "dist-rank": scenes.train_dist,
    "dist-world": scenes.train_dist,
    "dist-store": scenes.train_dist_store,
    "dist-start-timeout": scenes.train_dist_start_timeout,
    "dist-timeout": scenes.train_dist_timeout,
    "dist-shard": row([*other(PLAN, "--method", "full")[1], "--dist-rank", "0", "--dist-world", "4"], ["--dist-shard", "2"], plan),
    "exact-reduction": scenes.train_exact_reduction,
    "prefetch": row(RUN, ["--prefetch", "16"], planned),
    "reader-threads": scenes.train_reader_threads,
    "rehash": scenes.train_rehash,
    "scratch": row([*RUN, "--keep-graphs", "0", "--block-inputs", "disk"], ["--scratch", "elsewhere"], files),
}

PROMPTS = FIXTURES / "prompts"
SAMPLING = [*RUN, "--sample-every", "2", "--prompts", PROMPTS, "--sample-steps", "2"]
SAMPLE = ["--text", PROMPTS, "--model", MODELS / "flux.safetensors", "--size", "64x64", "--steps", "2", "--out", "out.h5"]
SAMPLE_PLAN = ["--model", MODELS / "flux.safetensors", "--size", "64x64", "--plan=json", "--device", "cpu"]
CFG = [*SAMPLE, "--cfg-scale", "2", "--negative-prompt", "0"]
DECODE = [FIXTURES / "samples.h5", "--ae", MODELS / "ae.safetensors", "--out", "out"]


def pixels(path):
    """What is between the chunks of a PNG that hold its texts."""
    data = path.read_bytes()
    return hashlib.sha256(data[data.index(b"IDAT"):]).hexdigest()


@needs_success
def sampled(r):
    """The pictures of all latents that a run wrote."""
    out = {}
    for file in sorted(r.folder.rglob("*.h5")):
        shown = r.folder.with_name(f"{r.folder.name}-pictures-{file.stem}")
        done = subprocess.run([BIN / "flux-decode", file, "--ae", MODELS / "ae.safetensors", "--out", shown], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out.update({path.name: pixels(path) for path in shown.iterdir()})
    assert out
    return out


@needs_success
def decoded(r):
    return {str(path.relative_to(r.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in r.folder.rglob("*.*")
            if path.suffix in (".png", ".jpg", ".webp") and path.is_file()}


TRAIN |= {
    "sample-every": other(SAMPLING, "--sample-every", "1", sampled),
    "prompts": other(SAMPLING, "--prompts", "nowhere", exit_code),
    "sample-size": row(SAMPLING, ["--sample-size", "32x48"], sampled),
    "sample-steps": other(SAMPLING, "--sample-steps", "3", sampled),
    "sample-guidance": row(SAMPLING, ["--sample-guidance", "1"], sampled),
    "sample-seed": row(SAMPLING, ["--sample-seed", "9"], sampled),
    "sample-count": row(SAMPLING, ["--sample-count", "2"], sampled),
}

SAMPLES = {
    "text": other(SAMPLE, "--text", "nowhere", exit_code),
    "model": other(SAMPLE, "--model", "nowhere", exit_code),
    "lora": row(SAMPLE, ["--lora", f"{FIXTURES / 'lora.safetensors'}:3"], sampled),
    "out": other(SAMPLE, "--out", "elsewhere.h5", files),
    "size": other(SAMPLE, "--size", "48x32", sampled),
    "count": row(SAMPLE, ["--count", "2"], sampled),
    "seed": row(SAMPLE, ["--seed", "9"], sampled),
    "schedule": row(SAMPLE, ["--schedule", "schnell"], sampled),
    "steps": other(SAMPLE, "--steps", "3", sampled),
    "guidance": row(SAMPLE, ["--guidance", "1"], sampled),
    "cfg-scale": other(CFG, "--cfg-scale", "3", sampled),
    "negative-prompt": other(CFG, "--negative-prompt", "1", sampled),
    "device": row(SAMPLE, ["--device", "cuda"], exit_code if not CUDA else code_and_stdout),
    "precision": row(SAMPLE, ["--precision", "f32" if CUDA else "bf16"], sampled),
    "base-precision": row(SAMPLE, ["--base-precision", "nf4"], sampled),
    "batch-size": row(SAMPLE_PLAN, ["--batch-size", "3"], plan),
    "device-memory": other([*other(SAMPLE_PLAN, "--device", "cuda")[1], "--device-memory", "24GiB"], "--device-memory", "1MB", exit_code),
    "host-memory": row(SAMPLE, ["--host-memory", "1MB"], exit_code),
    "plan": row(SAMPLE, ["--plan"], files),
    "resident-blocks": row(SAMPLE_PLAN, ["--resident-blocks", "1"], plan),
    "ring-slots": row([*SAMPLE_PLAN, "--resident-blocks", "0"], ["--ring-slots", "4"], plan),
    "stream-from": row([*SAMPLE_PLAN, "--resident-blocks", "0"], ["--stream-from", "host"], host_bytes),
    "rehash": scenes.sample_rehash,
}

DECODES = {
    "ae": other(DECODE, "--ae", "nowhere", exit_code),
    "out": other(DECODE, "--out", "elsewhere", files),
    "limit": row(DECODE, ["--limit", "1"], files),
    "overwrite": scenes.decode_overwrite,
    "format": row(DECODE, ["--format", "webp"], files),
    "quality": row([*DECODE, "--format", "jpeg"], ["--quality", "20"], decoded),
    "sheet": row(DECODE, ["--sheet", "sheet.png"], files),
    "columns": row([*DECODE, "--sheet", "sheet.png"], ["--columns", "1"], decoded),
    "cell": row([*DECODE, "--sheet", "sheet.png"], ["--cell", "32"], decoded),
    "device": row(DECODE, ["--device", "cuda"], exit_code if not CUDA else code_and_stdout),
    "precision": row(DECODE, ["--precision", "bf16"], decoded),
    "memory": row(DECODE, ["--memory", "1MB"], exit_code),
    "scratch": scenes.decode_scratch,
}

IMAGES = ["--images", FIXTURES / "images"]
LATENTS_RUN = [*IMAGES, "--resolution", "64x64", "--ae", MODELS / "ae.safetensors", "--out", "out"]
TEXT_RUN = [*IMAGES, "--t5", MODELS / "t5.safetensors", "--clip", MODELS / "clip.safetensors", "--t5-tokenizer",
            MODELS / "tokenizers/t5/spiece.model", "--clip-tokenizer", MODELS / "tokenizers/clip", "--out", "out"]


def encoding(kind, base):
    """What the two caching tools share."""
    return {
        "dataset": row(base, ["--dataset", "nowhere.toml"], exit_code, without=("--images",)),
        "images": other(base, "--images", "nowhere", exit_code),
        "profile": getattr(scenes, f"{kind}_profile"),
        "batch-size": getattr(scenes, f"{kind}_batch_size"),
        "rehash": scenes.encode_rehash(kind),
        "dtype": row(base, ["--dtype", "f32"], cached),
        "precision": row(base, ["--precision", "bf16"], cached),
        "device": row(base, ["--device", "cpu" if CUDA else "cuda"], exit_code) if not CUDA else row(base, ["--device", "cpu"], cached),
        "out": other(base, "--out", "elsewhere", files),
        "max-failed": getattr(scenes, f"{kind}_max_failed"),
        "max-bytes": row(base, ["--max-bytes", "10kB"], exit_code),
        "shard": row(base, ["--shard", "1/2"], cached),
        "reproduce": scenes.encode_reproduce(kind),
    }


LATENTS = {
    **encoding("latents", LATENTS_RUN),
    "ae": other(LATENTS_RUN, "--ae", "nowhere", exit_code),
    "resolution": other(LATENTS_RUN, "--resolution", "96x96", cached),
    "store": row(LATENTS_RUN, ["--store", "sample"], cached),
    "seed": row([*LATENTS_RUN, "--store", "sample"], ["--seed", "5"], cached),
    "background": scenes.latents_background,
    "animated": scenes.latents_animated,
}

TEXT = {
    **encoding("text", TEXT_RUN),
    "prompts": scenes.text_prompts,
    "t5": other(TEXT_RUN, "--t5", "nowhere", exit_code),
    "clip": other(TEXT_RUN, "--clip", "nowhere", exit_code),
    "t5-tokenizer": other(TEXT_RUN, "--t5-tokenizer", "nowhere", exit_code),
    "clip-tokenizer": other(TEXT_RUN, "--clip-tokenizer", "nowhere", exit_code),
    "missing-caption": scenes.text_missing_caption,
    "text-variants": scenes.text_variants,
    "seed": scenes.text_seed,
    "t5-length": row(TEXT_RUN, ["--t5-length", "256"], cached),
    "pad-policy": row(TEXT_RUN, ["--pad-policy", "masked"], cached),
    "host-memory": row(TEXT_RUN, ["--host-memory", "1MB"], exit_code),
    "device-memory": row([*TEXT_RUN, "--device", "cuda"], ["--device-memory", "1MB"], exit_code),
}

KOHYA = SOURCE / "tests/golden/models/lora/kohya.safetensors"
BASE = SOURCE / "tests/golden/models/flux/weights_bfl.safetensors"  # what they are of
OUT = ["--out", "out.safetensors"]
CONVERT_MODEL = ["--in", MODELS / "flux.safetensors", *OUT]
CONVERT_LORA = [KOHYA, "--to", "diffusers", *OUT]
SUM = [f"{KOHYA}:0.5", KOHYA, *OUT]
SMALLER = [KOHYA, "--rank", "3", *OUT]


def extracted(flag, value):
    """What flux-lora extract makes of a base and what a LoRA made of it, with a flag and without; of --base and --tuned, exchanged."""
    def scene(lab):
        lab.run("flux-lora merge", KOHYA, "--base", BASE, "--out", "tuned.safetensors")
        made = []
        for number, more in enumerate(({}, {flag: value})):
            if flag in ("--base", "--tuned") and more:
                more = {"--base": "tuned.safetensors", "--tuned": BASE}
            given = {"--base": BASE, "--tuned": "tuned.safetensors", "--rank": 4, "--out": f"{number}.safetensors", **more}
            lab.run("flux-lora extract", *(str(word) for pair in given.items() for word in pair))
            made.append(tensors(lab.folder / given["--out"]))
        # another name holds the same, and is where it was asked for
        assert made[0] == made[1] if flag == "--out" else made[0] != made[1], flag
    return scene


def compared_on_a_base(lab):
    """DoRA does other things to other weights."""
    lab.train("--dora", "--max-steps", 1, "--out", "run")
    file = lab.folder / "run/step-000001/lora.safetensors"
    found = [lab.report("flux-lora check", file, f"{file}:0.5", "--tolerance", 1, *more)["layers"]
             for more in ([], ["--base", lab.models / "flux.safetensors"])]
    assert [layer["effect"] for layer in found[0]] != [layer["effect"] for layer in found[1]]


CACHE = FIXTURES / "latents"
VERBS = {
    "flux-cache inspect": {"samples": row([CACHE], ["--samples"], stdout),
                           "recover": scenes.inspect_recover},
    "flux-cache verify": {"deep": scenes.verify_deep},
    "flux-cache merge": {"out": scenes.merge_out, "strict": scenes.merge_strict},
    "flux-cache gc": {"dry-run": scenes.gc_dry_run},
    "flux-cache copy": {"out": row([CACHE], ["--out", "there"], exit_code), "verify": row([CACHE, "there"], ["--verify"], stdout)},
    "flux-cache export": {"out": row([CACHE], ["--out", "there"], exit_code),
                          "format": row([CACHE, "--out", "there"], ["--format", "npz"], files)},
    "flux-model info": {"rehash": scenes.model_info_rehash},
    "flux-model convert": {"quantize": scenes.quantize,
                           "in": row(["--quantize", "fp8", "--out", "out.safetensors"], ["--in", MODELS / "flux.safetensors"], exit_code),
                           "out": row(["--quantize", "fp8", "--in", MODELS / "flux.safetensors"], ["--out", "out.safetensors"], exit_code),
                           "layout": row(CONVERT_MODEL, ["--layout", "diffusers"], contents),
                           "dtype": row(CONVERT_MODEL, ["--dtype", "f32"], contents),
                           "shard-size": row(CONVERT_MODEL, ["--shard-size", "1MB"], files)},
    "flux-lora convert": {"out": row([KOHYA, "--to", "diffusers"], OUT, exit_code),
                          "to": other(CONVERT_LORA, "--to", "comfyui", contents),
                          "dtype": row(CONVERT_LORA, ["--dtype", "f32"], contents)},
    "flux-lora merge": {"out": row(SUM[:2], OUT, exit_code),
                        "base": row(SUM, ["--base", BASE], contents),
                        "dtype": row(SUM, ["--dtype", "f16"], contents),
                        "model-layout": row([*SUM, "--base", BASE], ["--model-layout", "diffusers"], contents),
                        "shard-size": row([*SUM, "--base", BASE], ["--shard-size", "1MB"], files),
                        "to": row(SUM, ["--to", "diffusers"], contents),
                        "rank": row(SUM, ["--rank", "2"], contents),
                        "sv-ratio": row(SUM, ["--sv-ratio", "1.2"], contents),
                        "sv-frobenius": row(SUM, ["--sv-frobenius", "0.8"], contents),
                        "sv-cumulative": row(SUM, ["--sv-cumulative", "0.6"], contents)},
    "flux-lora extract": {flag.lstrip("-"): extracted(flag, value) for flag, value in {
        "--base": None, "--tuned": None, "--rank": 2, "--sv-ratio": 1.2, "--sv-frobenius": 0.8, "--sv-cumulative": 0.6,
        "--out": "there.safetensors", "--to": "diffusers", "--dtype": "f32"}.items()},
    "flux-lora resize": {"out": row(SMALLER[:3], OUT, exit_code),
                         "rank": other(SMALLER, "--rank", "2", contents),
                         "sv-ratio": row(SMALLER, ["--sv-ratio", "1.2"], contents),
                         "sv-frobenius": row(SMALLER, ["--sv-frobenius", "0.5"], contents),
                         "sv-cumulative": row(SMALLER, ["--sv-cumulative", "0.4"], contents),
                         "to": row(SMALLER, ["--to", "diffusers"], contents),
                         "dtype": row(SMALLER, ["--dtype", "f32"], contents)},
    "flux-lora check": {"base": compared_on_a_base,
                        "tolerance": row([KOHYA, f"{KOHYA}:1.001"], ["--tolerance", "0.1"], exit_code),
                        "seed": row([KOHYA, f"{KOHYA}:1.5", "--tolerance", "1", "--json"], ["--seed", "5"], stdout)},
    "flux-model tiny": {"out": row([], ["--out", "there"], exit_code), "geometry": scenes.tiny_geometry,
                        "depth": scenes.tiny_depth,
                        "seed": row(["--out", "there"], ["--seed", "5"], contents),
                        "clip-tokenizer": row(["--out", "there"], ["--clip-tokenizer", "nowhere"], exit_code),
                        "t5-tokenizer": row(["--out", "there"], ["--t5-tokenizer", "nowhere"], exit_code)},
    "flux-check": {"precision": row([SOURCE / "tests/golden/models", "--json"], ["--precision", "bf16"], stdout),
                   "device": row([SOURCE / "tests/golden/models"], ["--device", "cuda"], code_and_stdout)},
}

# A command line of each program and verb that succeeds, for the options that all share; in its folder is a copy of CACHE.
PLAIN = {
    "flux-train": [*INPUT, "--max-steps", "1"], "flux-cache-latents": LATENTS_RUN, "flux-cache-text": TEXT_RUN, "flux-sample": SAMPLE,
    "flux-decode": DECODE, "flux-check": [SOURCE / "tests/golden/models/timesteps"],
    "flux-cache inspect": ["copy"], "flux-cache verify": ["copy"], "flux-cache repair": ["copy"], "flux-cache gc": ["copy"],
    "flux-cache stats": ["copy"], "flux-cache diff": ["copy", CACHE], "flux-cache merge": ["copy", "--out", "out"],
    "flux-cache copy": ["copy", "--out", "out"], "flux-cache export": ["copy", "--out", "out"],
    "flux-model info": [MODELS / "flux.safetensors"], "flux-model convert": ["--quantize", "fp8", *CONVERT_MODEL], "flux-model tiny": ["--out", "out"],
    "flux-lora info": [KOHYA], "flux-lora convert": CONVERT_LORA, "flux-lora merge": SUM, "flux-lora resize": SMALLER,
    "flux-lora check": [KOHYA, KOHYA], "flux-lora extract": ["--base", BASE, "--tuned", "tuned.safetensors", "--rank", "2", *OUT],
}
COMMON = {"config", "print-config", "json", "log-level", "version", "help"}


def common_options(tool, top):
    """--print-config makes a file from which --config does the same; --json prints one object on one line, --log-level error nothing more."""
    def lab_of(name):
        lab = scenes.Lab(BIN, FIXTURES, top / f"common-{tool}-{name}".replace(" ", "-"))
        shutil.copytree(CACHE, lab.folder / "copy", ignore=shutil.ignore_patterns(".*"))
        if "tuned.safetensors" in PLAIN[tool]:
            lab.run("flux-lora merge", KOHYA, "--base", BASE, "--out", "tuned.safetensors")
        return lab
    plain, quiet = lab_of("plain"), lab_of("quiet")
    config = plain.run(tool, *PLAIN[tool], "--print-config").stdout_text
    assert config.startswith(f"# {tool} --config"), config
    file = plain.folder / "all.toml"
    file.write_text(config)
    loud = plain.run(tool, "--config", file)
    said = quiet.run(tool, "--config", file, "--json", "--log-level", "error")
    assert said.stdout_text.count("\n") == 1 and isinstance(json.loads(said.stdout_text), dict), said.stdout_text
    assert not said.stderr_text and loud.stdout_text != said.stdout_text, said.stderr_text
    assert "info: " in loud.stderr_text or tool not in ("flux-train", "flux-cache-latents", "flux-cache-text"), loud.stderr_text
    assert tool.split()[0] in plain.run(tool, "--help").stdout_text
    if " " not in tool:
        assert plain.run(tool, "--version").stdout_text.startswith(tool)


# Whose effect a GPU is needed to see.
ON_GPU = {("flux-cache-text", "device-memory")}


def rows():
    out = {}
    for tool, table in {"flux-train": TRAIN, "flux-cache-latents": LATENTS, "flux-cache-text": TEXT, "flux-sample": SAMPLES,
                        "flux-decode": DECODES, **VERBS}.items():
        for option, what in table.items():
            out[tool, option] = what
    return out | {(tool, "all programs have"): None for tool in PLAIN}


# ---- the walk

def options_of_help():
    """(program and verb, option) of every --help; the group that all share counts as one."""
    out = set()
    for tool in sorted(path.parent.name for path in SOURCE.glob("tools/*/CMakeLists.txt")):
        said = subprocess.run([BIN / tool, "--help"], check=True, capture_output=True, text=True).stdout
        verbs = re.search(r"\nverbs:\n((?:  .*\n)+)", said)
        for verb in [line.split()[0] for line in verbs.group(1).splitlines()] if verbs else [""]:
            text = subprocess.run([BIN / tool, *([verb] if verb else []), "--help"], check=True, capture_output=True, text=True).stdout
            own, common = text.split("\ncommon:\n")
            assert set(re.findall(r"^  --([a-z0-9-]+)", common, re.M)) == COMMON, common
            out.add((f"{tool} {verb}".strip(), "all programs have"))
            out |= {(f"{tool} {verb}".strip(), name) for name in re.findall(r"^  --([a-z0-9-]+)", own, re.M)}
    return out


LOCK = threading.Lock()
RESULTS = {}


def run(tool, arguments, top):
    """Runs a command line once, in a folder of its own."""
    with LOCK:
        entry = RESULTS.setdefault((tool, arguments), {"lock": threading.Lock(), "number": len(RESULTS)})
    with entry["lock"]:
        if "result" not in entry:
            folder = top / str(entry["number"])
            folder.mkdir()
            home = folder.with_name(folder.name + "-home")
            environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
            child = subprocess.Popen([BIN / tool.split()[0], *tool.split()[1:], *arguments], cwd=folder, env=environment, text=True,
                                     stdout=open(f"{folder}-out", "w"), stderr=open(f"{folder}-err", "w"))
            child.wait()
            entry["result"] = Result(folder, child.returncode, pathlib.Path(f"{folder}-out").read_text(),
                                     pathlib.Path(f"{folder}-err").read_text())
    return entry["result"]


def failure(tool, option, what, top):
    if option == "all programs have":
        try:
            return common_options(tool, top)
        except (AssertionError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            return f"{tool}, options that all programs have: {error!r}"
    if callable(what):
        folder = top / f"scene-{tool}-{option}".replace(" ", "-")
        try:
            what(scenes.Lab(BIN, FIXTURES, folder))
        except (AssertionError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            return f"{tool} --{option}: {error!r}"
        return None
    base, more, observe = what
    try:
        results = [run(tool, base, top), run(tool, more, top)]
        if all(result.code in (2, 3, 4, 5) for result in results):
            return f"{tool} --{option}: neither command line is accepted: {results[0].err[-600:]}"
        if observe(results[0]) == observe(results[1]):
            return f"{tool} --{option} has no effect on {observe.__name__}: {' '.join(more)}"
    except (AssertionError, OSError, ValueError, KeyError) as error:
        return f"{tool} --{option}: {error!r}"
    return None


def main():
    known = rows()
    skipped = set() if CUDA else ON_GPU
    chosen = {key: what for key, what in known.items() if (len(sys.argv) < 5 or key[1] in sys.argv[4:]) and key not in skipped}
    shown = options_of_help()
    failures = [f"{tool} --{option} is in --help and has no row here" for tool, option in sorted(shown - set(known))]
    failures += [f"{tool} has no --{option}, of which there is a row here" for tool, option in sorted(set(known) - shown)]
    print("\n".join(failures), end="\n" if failures else "", flush=True)
    with tempfile.TemporaryDirectory(prefix="flux-options-") as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        for text in pool.map(lambda item: failure(*item[0], item[1], pathlib.Path(folder)), chosen.items()):
            if text:
                failures.append(text)
                print(text, flush=True)
    if not failures:
        print(f"{len(chosen)} options have an effect; not shown without a GPU: " +
              (", ".join(f"{tool} --{option}" for tool, option in skipped) or "none"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
