// tests/support/training_scene.h - caches, a model and options that fit, in a folder of their own.
#pragma once
#include <filesystem>
#include <string>

#include "common/core/error.h"
#include "pipelines/train/run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_flux.h"
#include "tests/support/training_caches.h"

namespace flux::test {

inline TrainingCaches small_caches() {
  TrainingCaches caches;
  caches.items = {{"a.png", 4, 4}, {"b.png", 4, 6}, {"c.png", 4, 4}};
  return caches;
}

/// Three items, a LoRA of rank 4, three steps in float32 on the CPU.
struct TrainingScene {
  explicit TrainingScene(const TrainingCaches& caches = small_caches(), bool guidance = true) {
    caches.write(folder.path());
    options.latents = folder / "latents";
    options.text = folder / "text";
    options.model = write_tiny_flux(folder / "flux.safetensors", guidance);
    options.out = folder / "run";
    options.rank = 4;
    options.max_steps = 3;
    options.lr.learning_rate = 1e-3;
    options.seed = 5;
    options.device = DeviceChoice::kCpu;
    options.reader_threads = 1;
    options.command_line = "flux-train --test";
  }
  TemporaryFolder folder;
  train::Options options;
};

/// What a run that ends with an error says.
inline std::string message_of(const train::Options& options) {
  try {
    train::run(options);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace flux::test
