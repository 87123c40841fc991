# The licences of what is compiled into the modules, into the wheel: nanobind's, and that of a header
# that nanobind's own package brings along, which stands at its top.
set(robin_map "${nanobind_DIR}/../ext/robin_map/include/tsl/robin_map.h")
if(SKBUILD AND EXISTS "${robin_map}")
  file(GLOB nanobind_license "${nanobind_DIR}/../../nanobind-*.dist-info/licenses/LICENSE")
  file(STRINGS "${robin_map}" lines LIMIT_COUNT 23)
  list(JOIN lines "\n" text)
  set(robin_map_license "${CMAKE_CURRENT_BINARY_DIR}/robin_map/LICENSE")
  file(CONFIGURE OUTPUT "${robin_map_license}" CONTENT "${text}\n" @ONLY)
  foreach(part nanobind robin_map)
    install(FILES ${${part}_license} DESTINATION "${SKBUILD_METADATA_DIR}/licenses/${part}")
  endforeach()
endif()
