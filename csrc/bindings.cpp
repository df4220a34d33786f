// All of pybind11, and no arithmetic: addresses, sizes and strides in, nothing but numbers out.
// The Python modules vig_kernels/*_cpu.py are the only callers and check every shape before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gaussian_blur.h"
#include "isa.h"
#include "peak.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

vig::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return vig::Dtype::kFloat32;
  if (name == "bfloat16") return vig::Dtype::kBFloat16;
  if (name == "float16") return vig::Dtype::kFloat16;
  if (name == "uint8") return vig::Dtype::kUInt8;
  throw py::type_error("expected dtype float32, bfloat16, float16 or uint8, got " + name);
}

vig::ImageView image_view(uintptr_t data, const std::array<int64_t, 4>& stride) {
  return {pointer<char>(data), {stride[0], stride[1], stride[2], stride[3]}};
}

void gaussian_blur(const std::string& isa, const std::string& dtype, const std::array<int64_t, 4>& shape,
                   uintptr_t images, const std::array<int64_t, 4>& images_stride, uintptr_t out,
                   const std::array<int64_t, 4>& out_stride, const std::vector<double>& sigma_y,
                   const std::vector<double>& sigma_x, double truncate, bool replicate, int threads) {
  const vig::Kernels& kernels = vig::select_kernels(isa.c_str());
  const vig::Dtype kind = dtype_of(dtype);
  py::gil_scoped_release released;
  vig::gaussian_blur(kernels, image_view(images, images_stride), image_view(out, out_stride), shape.data(), kind,
                     sigma_y.data(), sigma_x.data(), truncate, replicate, threads);
}

py::dict isas() {
  py::dict reasons;
  for (const vig::Isa& isa : vig::isa_table()) {
    const char* reason = isa.why_not();
    reasons[isa.name] = reason == nullptr ? py::object(py::none()) : py::object(py::str(reason));
  }
  return reasons;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of vig_kernels; reached through vig_kernels.native only.";
  m.def("isas", isas, "Instruction sets, best first: name -> None, or why this machine cannot run it.");
  m.def("isa", [](const std::string& name) { return std::string(vig::select_kernels(name.c_str()).name); },
        "The instruction set that `name` selects; '' is the best one of this machine.");
  m.def("machine_note", vig::machine_note);
  m.def("peak",
        [](const std::string& isa, bool pairs, int threads, double seconds) {
          const vig::Kernels& kernels = vig::select_kernels(isa.c_str());
          py::gil_scoped_release released;
          return vig::measure_peak(kernels, pairs, threads, seconds);
        },
        py::arg("isa"), py::arg("pairs"), py::arg("threads"), py::arg("seconds"));
  m.def("gaussian_blur", gaussian_blur, py::arg("isa"), py::arg("dtype"), py::arg("shape"), py::arg("images"),
        py::arg("images_stride"), py::arg("out"), py::arg("out_stride"), py::arg("sigma_y"), py::arg("sigma_x"),
        py::arg("truncate"), py::arg("replicate"), py::arg("threads"));
}
