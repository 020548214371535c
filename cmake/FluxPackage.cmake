# `cmake --install` and packages: programs in bin, the LibTorch libraries they load in lib/flux-stages, found relative to the
# program, man pages and what bash completes. `cpack` (in the build folder) makes a .deb and a .tar.gz of that; CUDA is not in
# them, as its libraries have 3 GB and licences of their own.
set(FLUX_PRIVATE_LIB "lib/flux-stages")

# flux_install_tool(NAME): the program, and the pages it writes about itself.
function(flux_install_tool name)
  set_target_properties(${name} PROPERTIES INSTALL_RPATH "$ORIGIN/../${FLUX_PRIVATE_LIB}")
  install(TARGETS ${name} RUNTIME DESTINATION bin)
  set(pages "${CMAKE_BINARY_DIR}/pages")
  foreach(page man bash)
    install(CODE "file(MAKE_DIRECTORY \"${pages}\")
      execute_process(COMMAND \"${CMAKE_RUNTIME_OUTPUT_DIRECTORY}/${name}\" --help=${page}
        OUTPUT_FILE \"${pages}/${name}.${page}\" COMMAND_ERROR_IS_FATAL ANY)")
  endforeach()
  install(FILES "${pages}/${name}.man" DESTINATION share/man/man1 RENAME ${name}.1)
  install(FILES "${pages}/${name}.bash" DESTINATION share/bash-completion/completions RENAME ${name})
endfunction()

# The libraries of the torch wheel that a program on the CPU loads, under the names it asks for, and their licences.
function(flux_install_libtorch)
  foreach(name libtorch_cpu.so libc10.so libgomp.so.1 libcupti.so.13 libcudart.so.13)
    file(GLOB found "${LIBTORCH_ROOT}/lib/${name}" "${LIBTORCH_ROOT}/../nvidia/*/lib/${name}")
    if(found)
      list(GET found 0 file)
      file(REAL_PATH "${file}" file)
      install(PROGRAMS "${file}" DESTINATION ${FLUX_PRIVATE_LIB} RENAME ${name})
    endif()
  endforeach()
  file(GLOB licences "${LIBTORCH_ROOT}/../*.dist-info/licenses")
  foreach(folder IN LISTS licences)
    string(REGEX REPLACE ".*/(.*)-[0-9.]+\\.dist-info/licenses" "\\1" wheel "${folder}")
    install(DIRECTORY "${folder}/" DESTINATION share/doc/flux-stages/licences/${wheel})
  endforeach()
endfunction()

function(flux_packages)
  install(FILES README.md CHANGELOG.md THIRD_PARTY.md Makefile.example DESTINATION share/doc/flux-stages)
  install(FILES LICENSE DESTINATION share/doc/flux-stages RENAME copyright)
  install(DIRECTORY docs presets DESTINATION share/doc/flux-stages)
  set(CPACK_GENERATOR "DEB;TGZ")
  set(CPACK_PACKAGE_NAME flux-stages)
  set(CPACK_PACKAGE_VENDOR "flux-stages maintainers")
  set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${PROJECT_DESCRIPTION}")
  set(CPACK_PACKAGE_DESCRIPTION "Programs that train FLUX.1 LoRAs and full models in stages that meet on disk: images and
captions are encoded once, on any machine, into caches; training reads caches alone. For the CPU; the CUDA library is built from source.")
  set(CPACK_RESOURCE_FILE_LICENSE "${CMAKE_SOURCE_DIR}/LICENSE")
  set(CPACK_PACKAGE_CONTACT "flux-stages maintainers <maintainers@flux-stages.invalid>")
  set(CPACK_DEBIAN_PACKAGE_SECTION science)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
  set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS "${LIBTORCH_ROOT}/lib" "${LIBTORCH_ROOT}/../nvidia/cu13/lib")
  set(CPACK_DEBIAN_COMPRESSION_TYPE zstd)
  set(CPACK_THREADS 0)
  set(CPACK_STRIP_FILES OFF)
  # all but the component cuda
  set(CPACK_INSTALL_CMAKE_PROJECTS "${CMAKE_BINARY_DIR};${PROJECT_NAME};Unspecified;/")
  include(CPack)
endfunction()
