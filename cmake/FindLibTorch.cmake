# FindLibTorch - LibTorch as the torch wheel ships it, without TorchConfig.cmake (which demands a CUDA toolkit, clears
# CMAKE_CUDA_ARCHITECTURES and edits global flags).
#
#   LIBTORCH_ROOT   folder that holds include/ and lib/ (of the wheel: .../torch); default: where scripts/setup puts it
#
# Targets:  torch::cpu    libtorch_cpu and libc10; what every program here links
#           torch::cuda   libtorch_cuda and libc10_cuda; only libflux_cuda.so links it
# Sets LibTorch_FOUND, LibTorch_VERSION and LibTorch_ROOT.

set(_flux_cache "$ENV{FLUX_STAGES_CACHE}")
if(NOT _flux_cache)
  set(_flux_cache "$ENV{HOME}/.cache/flux-stages")
endif()
set(LIBTORCH_ROOT "${_flux_cache}/libtorch-2.14.1/torch" CACHE PATH "LibTorch: the folder with include/ and lib/")

find_path(LibTorch_INCLUDE_DIR ATen/ATen.h PATHS "${LIBTORCH_ROOT}/include" NO_DEFAULT_PATH)
find_library(LibTorch_CPU_LIBRARY torch_cpu PATHS "${LIBTORCH_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_C10_LIBRARY c10 PATHS "${LIBTORCH_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_CUDA_LIBRARY torch_cuda PATHS "${LIBTORCH_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_C10_CUDA_LIBRARY c10_cuda PATHS "${LIBTORCH_ROOT}/lib" NO_DEFAULT_PATH)
mark_as_advanced(LibTorch_INCLUDE_DIR LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_CUDA_LIBRARY
                 LibTorch_C10_CUDA_LIBRARY)

if(LibTorch_INCLUDE_DIR AND EXISTS "${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h")
  file(STRINGS "${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h" _flux_version_lines
       REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX MATCHALL "[0-9]+" _flux_version_parts "${_flux_version_lines}")
  list(JOIN _flux_version_parts "." LibTorch_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch
  REQUIRED_VARS LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "run scripts/setup, or give -DLIBTORCH_ROOT=/path/to/torch")

if(LibTorch_FOUND AND NOT TARGET torch::cpu)
  set(LibTorch_ROOT "${LIBTORCH_ROOT}")
  find_package(Threads REQUIRED)

  # What LibTorch needs from beside it (CUPTI, cudart, libgomp), for the linker to resolve. At run time the RPATH inside
  # the wheel's libraries finds them.
  file(GLOB _flux_nvidia_dirs "${LIBTORCH_ROOT}/../nvidia/*/lib")
  set(_flux_link_options "")
  foreach(_dir IN LISTS _flux_nvidia_dirs ITEMS "${LIBTORCH_ROOT}/lib")
    list(APPEND _flux_link_options "LINKER:-rpath-link,${_dir}")
  endforeach()

  # The wheel carries headers of another fmt, whose symbols no library here has: the system's must be found first.
  find_path(FLUX_FMT_INCLUDE_DIR fmt/format.h)
  mark_as_advanced(FLUX_FMT_INCLUDE_DIR)
  set(_flux_first "${CMAKE_BINARY_DIR}/before_libtorch")
  file(MAKE_DIRECTORY "${_flux_first}")
  file(CREATE_LINK "${FLUX_FMT_INCLUDE_DIR}/fmt" "${_flux_first}/fmt" SYMBOLIC)

  add_library(torch::cpu INTERFACE IMPORTED)
  set_target_properties(torch::cpu PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${_flux_first};${LibTorch_INCLUDE_DIR};${LibTorch_INCLUDE_DIR}/torch/csrc/api/include"
    INTERFACE_COMPILE_DEFINITIONS "AT_PER_OPERATOR_HEADERS;USE_DISTRIBUTED;USE_C10D_GLOO"
    # without -fopenmp at::parallel_for in our own code is silently serial
    INTERFACE_COMPILE_OPTIONS "$<$<COMPILE_LANGUAGE:CXX>:-fopenmp>"
    INTERFACE_LINK_OPTIONS "${_flux_link_options}"
    INTERFACE_LINK_LIBRARIES "${LibTorch_CPU_LIBRARY};${LibTorch_C10_LIBRARY};Threads::Threads;gomp")

  if(LibTorch_CUDA_LIBRARY AND LibTorch_C10_CUDA_LIBRARY)
    add_library(torch::cuda INTERFACE IMPORTED)
    set_target_properties(torch::cuda PROPERTIES
      INTERFACE_COMPILE_DEFINITIONS "USE_C10D_NCCL"
      # --no-as-needed: nothing names a symbol of libtorch_cuda, but loading it registers the CUDA kernels;
      # --allow-shlib-undefined: cuDNN, NCCL and friends need not be there to link
      INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed;LINKER:--allow-shlib-undefined"
      INTERFACE_LINK_LIBRARIES "torch::cpu;${LibTorch_CUDA_LIBRARY};${LibTorch_C10_CUDA_LIBRARY}")
  endif()
endif()
