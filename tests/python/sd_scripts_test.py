"""flux-train --import-sd-scripts ARGS... : sd_scripts_test.py BIN_DIR SOURCE_DIR

What it prints is TOML that flux-train --config takes, with every flag of the command line in it; and docs/from-sd-scripts.md names each flag of
its table (pipelines/train/sd_scripts_flags.cpp) with what becomes of it, and no other.
"""
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib
import unittest

BIN, SOURCE = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
LORA = ["accelerate", "launch", "--mixed_precision", "bf16", "--num_cpu_threads_per_process", "1", "flux_train_network.py",
        "--pretrained_model_name_or_path", "flux1-dev.safetensors", "--network_module", "networks.lora_flux"]
FULL = ["flux_train.py", "--pretrained_model_name_or_path", "flux1-dev.safetensors"]


def table():
    text = (SOURCE / "pipelines/train/sd_scripts_flags.cpp").read_text()
    text = re.sub(r'"\s*\n\s*"', "", text)  # strings in several pieces
    found = re.findall(r'\{"([a-z0-9_:]+)",\s*\'([01*])\',\s*(k\w+),\s*"([^"]*)",\s*"([^"]*)"\}', text)
    assert len(found) == text.count("'0'") + text.count("'1'") + text.count("'*'"), len(found)
    return [dict(zip(("name", "values", "fate", "ours", "why"), row)) for row in found]


def train(*arguments):
    return subprocess.run([BIN / "flux-train", *arguments], capture_output=True, text=True)


def plain(values):
    """As options read them: 1, 1.0 and "1" are the same."""
    def one(value):
        try:
            return value if isinstance(value, bool) else float(value)
        except ValueError:
            return value
    return {key: one(value) for key, value in values.items()}


class Import(unittest.TestCase):
    def imported(self, *arguments):
        """The TOML, which --config must take as it is."""
        result = train("--import-sd-scripts", *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(result.stdout)
            file.flush()
            again = train("--config", file.name, "--print-config")
            self.assertEqual(again.returncode, 0, again.stderr + result.stdout)
            file.seek(0)
            file.truncate()
            file.write(again.stdout)
            file.flush()
            self.assertEqual(plain(tomllib.loads(train("--config", file.name, "--print-config").stdout)), plain(tomllib.loads(again.stdout)))
        toml = tomllib.loads(result.stdout)
        resolved = tomllib.loads(again.stdout)
        self.assertEqual(plain(toml), plain({key: resolved[key] for key in toml}))
        return toml, result

    def refused(self, *arguments):
        result = train("--import-sd-scripts", *arguments)
        self.assertEqual(result.returncode, 2, result.stdout)
        self.assertEqual(result.stdout, "")
        return result.stderr

    def test_defaults_are_those_of_sd_scripts(self):
        toml, _ = self.imported(*LORA)
        self.assertEqual(toml, {"method": "lora", "latents": "cache/latents", "text": "cache/text", "model": "flux1-dev.safetensors",
                                "out": "run", "max-steps": 1600, "batch-size": 1, "rank": 4, "alpha": 1, "lora-dtype": "f32",
                                "optimizer": "adamw", "clip": "global", "learning-rate": 2e-6, "timestep-sampling": "sigma",
                                "model-prediction-type": "sigma_scaled", "guidance": 3.5, "precision": "f32"})

    def test_the_line_of_its_guide(self):
        toml, result = self.imported(
            *LORA, "--clip_l", "c.safetensors", "--t5xxl", "t.safetensors", "--ae", "ae.safetensors", "--cache_latents_to_disk",
            "--save_model_as", "safetensors", "--sdpa", "--max_data_loader_n_workers", "2", "--seed", "42", "--gradient_checkpointing",
            "--mixed_precision", "bf16", "--save_precision", "bf16", "--network_dim", "8", "--optimizer_type", "adamw8bit",
            "--learning_rate", "1e-4", "--cache_text_encoder_outputs", "--fp8_base", "--highvram", "--max_train_steps", "40",
            "--save_every_n_steps", "10", "--dataset_config", "my data.toml", "--output_dir", 'a "b" c', "--timestep_sampling", "shift",
            "--discrete_flow_shift", "3.1582", "--model_prediction_type", "raw", "--guidance_scale", "1.0", "--t5xxl_max_token_length=256",
            "--apply_t5_attn_mask", "--huber_c", "0.2", "--lr_warmup_steps", "5")
        self.assertEqual({key: toml[key] for key in ("seed", "precision", "lora-dtype", "rank", "optimizer", "learning-rate", "base-precision",
                                                     "max-steps", "out", "timestep-sampling", "discrete-flow-shift", "guidance")},
                         {"seed": 42, "precision": "bf16", "lora-dtype": "bf16", "rank": 8, "optimizer": "adamw8bit", "learning-rate": 1e-4,
                          "base-precision": "fp8", "max-steps": 40, "out": 'a "b" c', "timestep-sampling": "shift",
                          "discrete-flow-shift": 3.1582, "guidance": 1.0})
        for absent in ("batch-size", "huber-c", "lr-warmup-steps"):
            self.assertNotIn(absent, toml)
        self.assertIn("#   flux-cache-latents --dataset my data.toml --profile kohya --ae ae.safetensors --out cache/latents\n", result.stdout)
        self.assertIn("--t5-length 256 --pad-policy masked --t5-tokenizer", result.stdout)
        self.assertIn("--huber_c 0.2: no effect there either", result.stdout)
        self.assertEqual(result.stderr, "")

    def test_arguments_of_the_network(self):
        toml, result = self.imported(*LORA, "--network_args", "train_blocks=all", "train_double_block_indices=0,2-3", "img_attn_dim=8",
                                     "single_dim=2", "in_dims=[1,2,3,4,5]", "network_reg_dims=lora_unet_single_blocks_1_=4",
                                     "loraplus_unet_lr_ratio=4", "rank_dropout=0.1", "module_dropout=0.2", "split_qkv=True")
        self.assertEqual(toml["module-ranks"], "img_attn=8,single=2,img_in=1,time_in=2,vector_in=3,guidance_in=4,txt_in=5")
        self.assertEqual(toml["rank-of"], "single[._]blocks[._]1[._]=4")
        self.assertEqual((toml["train-double-blocks"], toml["loraplus-lr-ratio"], toml["rank-dropout"], toml["module-dropout"]),
                         ("0,2-3", 4, 0.1, 0.2))
        self.assertIn("split_qkv", result.stderr)

    def test_full_fine_tuning(self):
        toml, _ = self.imported(*FULL, "--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False",
                                "warmup_init=False", "--fused_backward_pass", "--full_bf16", "--mixed_precision", "bf16", "--lr_scheduler",
                                "constant_with_warmup", "--lr_warmup_steps", "0.1", "--max_grad_norm", "0.5", "--blocks_to_swap", "8")
        self.assertEqual((toml["method"], toml["optimizer"], toml["optimizer-args"], toml["clip"], toml["max-grad-norm"], toml["lr-warmup-steps"]),
                         ("full", "adafactor", "relative_step=false,scale_parameter=false,warmup_init=false", "per-parameter", 0.5, 0.1))
        self.assertNotIn("rank", toml)
        toml, _ = self.imported(*FULL, "--optimizer_type", "AdamW", "--optimizer_args", "betas=(0.8, 0.95)", "eps=1e-6", "weight_decay=0.1")
        self.assertEqual((toml["optimizer-args"], toml["weight-decay"]), ("beta1=0.8,beta2=0.95,eps=1e-6", 0.1))

    def test_a_config_file_below_the_command_line(self):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "run.toml")
            file.write_text('learning_rate = 1e-3\n[a]\nsdpa = true\nfp8_base = false\nnetwork_dim = 32\nnetwork_args = ["train_blocks=single"]\n')
            toml, _ = self.imported(*LORA, "--network_dim", "16", "--config_file", str(file.with_suffix("")))
            self.assertEqual((toml["rank"], toml["learning-rate"], toml["train-blocks"]), (16, 1e-3, "single"))
            self.assertNotIn("base-precision", toml)
            file.write_text("learning_rat = 1\n")
            self.assertIn("did you mean learning_rate?", self.refused(*LORA, "--config_file", str(file)))

    def test_checkpoints(self):
        toml, _ = self.imported(*LORA, "--save_every_n_epochs", "2", "--save_last_n_epochs", "3")
        self.assertEqual((toml["save-every"], toml["keep-last"]), ("2ep", 3))
        # those that sd-scripts keeps at step 400: 200, 300, 400
        toml, _ = self.imported(*LORA, "--save_every_n_steps", "100", "--save_last_n_steps", "200")
        self.assertEqual((int(toml["save-every"]), toml["keep-last"]), (100, 3))
        self.assertIn("is no whole number", self.refused(*LORA, "--save_every_n_steps", "x", "--save_last_n_steps", "200"))

    def test_what_is_wrong_is_refused(self):
        self.assertIn("did you mean learning_rate?", self.refused(*LORA, "--learning_rat", "1"))
        self.assertIn("did you mean train_blocks?", self.refused(*LORA, "--network_args", "train_block=single"))
        self.assertIn("--learning_rate needs a value", self.refused(*LORA, "--learning_rate", "--sdpa"))
        self.assertIn("--learning_rate: 'x' is not a number", self.refused(*LORA, "--learning_rate", "x"))
        self.assertIn("no FLUX trainer", self.refused("accelerate", "launch", "sdxl_train.py", "--seed", "1"))
        self.assertIn("stray", self.refused(*LORA, "stray"))

    def test_validation_comes_by_steps_or_epochs_where_samples_are_held_out(self):
        toml, _ = self.imported(*LORA, "--validation_split", "0.1", "--validate_every_n_steps", "50", "--max_validation_steps", "3",
                                "--train_batch_size", "2")
        self.assertEqual((toml["validate-every"], toml["validation-samples"], toml["validation-sigmas"]), (50, 6, "0.2,0.4,0.6,0.8"))
        toml, _ = self.imported(*LORA, "--dataset_config", "data.toml", "--validate_every_n_epochs", "2")
        self.assertEqual(toml["validate-every"], "2ep")
        toml, _ = self.imported(*LORA, "--validation_split", "0.1")
        self.assertEqual(toml["validate-every"], "1ep")
        for more in ((), ("--validation_split", "0.0")):
            toml, result = self.imported(*LORA, "--validate_every_n_steps", "50", *more)
            self.assertNotIn("validate-every", toml)
            self.assertIn("--validate_every_n_steps 50: nothing is held out", result.stdout)
        toml, result = self.imported(*FULL, "--validation_split", "0.1", "--validate_every_n_steps", "50")
        self.assertNotIn("validate-every", toml)

    def test_epochs_count_where_both_are_given_and_metadata_can_be_left_out(self):
        toml, result = self.imported(*LORA, "--max_train_epochs", "3", "--max_train_steps", "100", "--no_metadata")
        self.assertEqual((toml["max-epochs"], toml["no-tags"]), (3, True))
        self.assertNotIn("max-steps", toml)
        self.assertIn("--max_train_steps: --max_train_epochs counts", result.stdout)
        toml, _ = self.imported(*LORA)
        self.assertEqual(toml["max-steps"], 1600)
        self.assertNotIn("max-epochs", toml)

    def test_every_flag_is_said_something_of(self):
        """Each flag of the table given by itself is in what is printed, under its own name or that of what it becomes."""
        values = {"optimizer_type": "lion", "network_args": "train_blocks=all", "lr_scheduler": "constant",
                  "lr_scheduler_args": "step_rules=1", "optimizer_args": "weight_decay=0.1", "timestep_sampling": "shift",
                  "weighting_scheme": "none", "model_prediction_type": "raw", "loss_type": "l1", "huber_schedule": "constant",
                  "mixed_precision": "bf16", "save_precision": "bf16", "model_type": "chroma", "resolution": "512", "network_dropout": "0.5",
                  "max_timestep": "900"}
        apart = ("config_file", "dataset_config", "network_module", "pretrained_model_name_or_path", "lr_scheduler_args", "unet_lr",
                 "use_lion_optimizer", "use_8bit_adam", "fused_backward_pass", "blockwise_fused_optimizers", "fp8_base_unet", "in_json",
                 "reg_data_dir")
        given = [row for row in table() if ":" not in row["name"] and row["name"] not in apart]
        words = [word for row in given
                 for word in [f"--{row['name']}", *([values.get(row["name"], "1")] if row["values"] != "0" else [])]]
        result = train("--import-sd-scripts", *LORA, *words)
        self.assertEqual(result.returncode, 0, result.stderr)
        for row in given:
            with self.subTest(row["name"]):
                if row["fate"] in ("kLatents", "kText"):
                    self.assertRegex(result.stdout, rf"#   flux-cache-\w+ .*--{row['ours']} ")
                elif row["fate"] == "kDataset":
                    key = {"train_data_dir": "image_dir", "dataset_repeats": "num_repeats"}.get(row["name"], row["name"])
                    self.assertIn(f"#     {key} = ", result.stdout)
                elif row["name"] in ("network_args", "optimizer_args"):
                    self.assertIn(f"# --{row['name']} ", result.stdout)
                else:
                    self.assertRegex(result.stdout, rf"--{row['name']}\b")
                if row["fate"] == "kRefused":
                    self.assertIn(f"warn: --{row['name']}", result.stderr)


class Page(unittest.TestCase):
    def test_the_page_names_every_flag_with_what_becomes_of_it(self):
        rows = {}
        for line in (SOURCE / "docs/from-sd-scripts.md").read_text().splitlines():
            cells = line.split("|")
            if len(cells) < 4:
                continue
            for name in re.findall(r"`(?:--)?([a-z0-9_]+)(?:=[^`]*)?(?: [^`]*)?`", cells[1]):
                rows.setdefault(name, " ".join(cells[2:]))
        for row in table():
            name = row["name"].removeprefix("network_args:")
            with self.subTest(row["name"]):
                self.assertIn(name, rows)
                if row["ours"]:
                    self.assertIn("--" + row["ours"], rows[name])
                elif row["fate"] == "kRefused":
                    self.assertIn("none", rows[name])
        known = {row["name"].removeprefix("network_args:") for row in table()}
        self.assertEqual(set(rows) - known, set())


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
