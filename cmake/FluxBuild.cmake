# How every target here is built, and the three functions that make targets: flux_library, flux_tool, flux_test.

set_property(GLOBAL PROPERTY GLOBAL_DEPENDS_NO_CYCLES ON)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
option(BUILD_TESTING "Build the tests" ON)

find_program(FLUX_CCACHE ccache)
if(FLUX_CCACHE)
  # sloppiness: without it ccache does not take files that use a precompiled header
  set(CMAKE_CXX_COMPILER_LAUNCHER
      "${CMAKE_COMMAND};-E;env;CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime;${FLUX_CCACHE}")
endif()

add_library(flux_build_flags INTERFACE)
target_include_directories(flux_build_flags INTERFACE "${CMAKE_SOURCE_DIR}")
target_compile_options(flux_build_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion>
  # a fused multiply-add would give other bits than the same source on another machine
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -fstack-protector-strong -ffile-prefix-map=${CMAKE_SOURCE_DIR}=.>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-fpch-preprocess>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${FLUX_WERROR}>>:-Werror>)
target_compile_definitions(flux_build_flags INTERFACE _GLIBCXX_ASSERTIONS)
target_link_options(flux_build_flags INTERFACE LINKER:-z,relro,-z,now)
if(FLUX_SANITIZE)
  target_compile_options(flux_build_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${FLUX_SANITIZE} -fno-omit-frame-pointer>)
  target_link_options(flux_build_flags INTERFACE -fsanitize=${FLUX_SANITIZE})
elseif(NOT CMAKE_BUILD_TYPE STREQUAL "Debug")
  target_compile_options(flux_build_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2>)
endif()

# The one precompiled torch header; every target with TORCH reuses it, so their flags must be equal.
function(flux_torch_header)
  file(WRITE "${CMAKE_BINARY_DIR}/torch_header/empty.cpp" "")
  add_library(flux_torch_header OBJECT "${CMAKE_BINARY_DIR}/torch_header/empty.cpp")
  target_link_libraries(flux_torch_header PRIVATE flux_build_flags torch::cpu)
  target_precompile_headers(flux_torch_header PRIVATE <ATen/ATen.h> <torch/csrc/autograd/custom_function.h>)
endfunction()

function(_flux_use_torch target)
  target_link_libraries(${target} PRIVATE torch::cpu)
  get_target_property(type ${target} TYPE)
  if(type STREQUAL "EXECUTABLE")
    # CMake gives programs -fPIE, with which a header precompiled for libraries (-fPIC) cannot be used
    set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
    target_compile_options(${target} PRIVATE -fPIC)
  endif()
  target_precompile_headers(${target} REUSE_FROM flux_torch_header)
endfunction()

# flux_library(NAME SRCS a.cpp... [PUBLIC libs...] [PRIVATE libs...] [TORCH])
# One static library a folder. TORCH links LibTorch and reuses the precompiled torch header.
function(flux_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "TORCH" "" "SRCS;PUBLIC;PRIVATE")
  if(arg_TORCH AND NOT FLUX_TORCH)
    return()
  endif()
  add_library(${name} STATIC ${arg_SRCS})
  target_link_libraries(${name} PRIVATE flux_build_flags PUBLIC ${arg_PUBLIC} PRIVATE ${arg_PRIVATE})
  if(arg_TORCH)
    _flux_use_torch(${name})
  endif()
endfunction()

# flux_tool(NAME pipeline-libs...)   tools/NAME/main.cpp -> bin/NAME
function(flux_tool name)
  add_executable(${name} main.cpp "${CMAKE_SOURCE_DIR}/common/core/early_signals.cpp")
  target_link_libraries(${name} PRIVATE flux_build_flags ${ARGN})
  flux_install_tool(${name})
endfunction()

# flux_test(NAME SRCS a_test.cpp... [PRIVATE libs...] [LABELS l...] [TORCH] [NO_MAIN])
# A GoogleTest program. Without TORCH its cases are discovered one by one; with it the program is one ctest entry, since
# each start loads LibTorch (0.4 s).
function(flux_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "TORCH;NO_MAIN" "TIMEOUT" "SRCS;PRIVATE;LABELS")
  if(arg_TORCH AND NOT FLUX_TORCH)
    return()
  endif()
  add_executable(${name} ${arg_SRCS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
  target_link_libraries(${name} PRIVATE flux_build_flags ${arg_PRIVATE} GTest::gtest GTest::gmock)
  if(NOT arg_NO_MAIN)
    target_link_libraries(${name} PRIVATE GTest::gtest_main)
  endif()
  target_compile_definitions(${name} PRIVATE FLUX_SOURCE_DIR="${CMAKE_SOURCE_DIR}" FLUX_BINARY_DIR="${CMAKE_BINARY_DIR}")
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 900)  # of all cases of a program, on a busy machine
  endif()
  if(arg_TORCH)
    _flux_use_torch(${name})
    add_test(NAME ${name} COMMAND ${name})
    # passive: threads that spin at OpenMP barriers make tests that share the cores ten times slower
    set_tests_properties(${name} PROPERTIES LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT} ENVIRONMENT OMP_WAIT_POLICY=passive)
  else()
    gtest_discover_tests(${name} PROPERTIES LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT} DISCOVERY_MODE PRE_TEST)
  endif()
endfunction()
