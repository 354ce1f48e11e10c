// Gives MLX functions of a .metallib under the names by which mx.fast.metal_kernel looks for them.
//
// MLX keeps a library for each custom kernel by the kernel's name, and compiles the kernel's source only if it has none.
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "mlx/backend/metal/device.h"
#include "mlx/device.h"

NB_MODULE(pippin_metal_host, m) {
  m.def(
      "preload",
      [](const std::string& path, const std::vector<std::string>& names) {
        auto& device = mlx::core::metal::device(mlx::core::Device(mlx::core::Device::gpu));
        for (const auto& name : names) {
          device.get_kernel(name, device.get_library(name, path));
        }
      },
      nanobind::arg("path"),
      nanobind::arg("names"));
}
