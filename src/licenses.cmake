# The licences of what is compiled into the modules, into the wheel: nanobind's, and that of a header
# that nanobind brings along, which stands at its top.
if(SKBUILD)
  file(GLOB nanobind_license "${nanobind_DIR}/../../nanobind-*.dist-info/licenses/LICENSE")
  file(STRINGS "${nanobind_DIR}/../ext/robin_map/include/tsl/robin_map.h" robin_map LIMIT_COUNT 23)
  list(JOIN robin_map "\n" robin_map)
  set(robin_map_license "${CMAKE_CURRENT_BINARY_DIR}/robin_map/LICENSE")
  file(CONFIGURE OUTPUT "${robin_map_license}" CONTENT "${robin_map}\n" @ONLY)
  foreach(part nanobind robin_map)
    install(FILES ${${part}_license} DESTINATION "${SKBUILD_METADATA_DIR}/licenses/${part}")
  endforeach()
endif()
