// common/engine/block_inputs.h - what the forward keeps for the backward: the inputs of every block.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "common/core/scratch_file.h"
#include "common/engine/choices.h"

namespace flux::engine {

/// Tensors by (block, micro-batch). Each is taken once.
class BlockInputs {
 public:
  /// `scratch`: a folder for kDisk; the file there has no name, so nothing of it is left whatever happens.
  BlockInputs(InputPlace place, std::filesystem::path scratch);

  /// Throws ResourceError if the scratch disk is full, naming the folder.
  void keep(int64_t block, size_t micro, std::vector<at::Tensor> tensors);
  /// On the device they came from, with the same bits. std::out_of_range for what was not kept.
  std::vector<at::Tensor> take(int64_t block, size_t micro);
  /// Forgets all, after a step that failed.
  void clear();

 private:
  struct Stored {
    at::Tensor tensor;          // if it is in memory
    at::TensorOptions options;  // dtype and device it came with
    std::vector<int64_t> shape;
    int64_t offset = -1;  // in the file
  };
  Stored store(const at::Tensor& tensor);
  at::Tensor restore(const Stored& stored) const;

  InputPlace place_;
  std::filesystem::path scratch_;
  std::optional<ScratchFile> file_;  // made at its first use: a plan needs none
  int64_t end_ = 0;                  // of the file's part in use
  std::map<std::pair<int64_t, size_t>, std::vector<Stored>> kept_;
};

}  // namespace flux::engine
