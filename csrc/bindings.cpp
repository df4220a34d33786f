// All of pybind11, and no arithmetic: addresses, sizes and strides in, nothing but numbers out.
// The Python modules vig_kernels/*_cpu.py are the only callers and check every shape before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "buffers.h"
#include "gaussian_blur.h"
#include "isa.h"
#include "linear_cross_entropy.h"
#include "linear_nll.h"
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
  if (static_cast<int64_t>(sigma_y.size()) != shape[0] || static_cast<int64_t>(sigma_x.size()) != shape[0]) {
    throw py::value_error("expected a sigma for each of " + std::to_string(shape[0]) + " images");
  }
  py::gil_scoped_release released;
  vig::gaussian_blur(kernels, image_view(images, images_stride), image_view(out, out_stride), shape.data(), kind,
                     sigma_y.data(), sigma_x.data(), truncate, replicate, threads);
}

// (address, number of rows, bytes from row to row)
using RowsView = std::tuple<uintptr_t, int64_t, int64_t>;

struct HeadArgs {
  std::string isa, dtype;
  int64_t depth, vocab;
  uintptr_t weight;
  int64_t weight_stride;
  uintptr_t bias;
  double scale, cap;  // cap 0: none

  vig::Head head() const {
    return {vig::select_kernels(isa.c_str()), dtype_of(dtype), depth, vocab, pointer<char>(weight), weight_stride,
            pointer<float>(bias), static_cast<float>(scale), static_cast<float>(cap), false};
  }
};

void linear_nll(const HeadArgs& args, const std::vector<RowsView>& hidden, uintptr_t target, int64_t ignore_index,
                uintptr_t nll, uintptr_t lse, uintptr_t lse_rest, uintptr_t entropy, uintptr_t argmax, int threads) {
  const vig::Head head = args.head();
  py::gil_scoped_release released;
  vig::KeptRows kept;
  for (const auto& [data, rows, stride] : hidden) {
    kept.add(pointer<char>(data), stride, pointer<int64_t>(target), rows, ignore_index);
  }
  vig::linear_nll(head, kept,
                  {pointer<float>(nll), pointer<float>(lse), pointer<float>(lse_rest), pointer<float>(entropy),
                   pointer<int64_t>(argmax)},
                  threads);
}

double linear_cross_entropy(const HeadArgs& args, const RowsView& hidden, uintptr_t target, uintptr_t row_weight,
                            int64_t ignore_index, double z_loss, uintptr_t grad_hidden, uintptr_t grad_weight,
                            bool rounded, uintptr_t grad_bias, int threads) {
  const vig::Head head = args.head();
  py::gil_scoped_release released;
  const auto [data, rows, stride] = hidden;
  vig::KeptRows kept;
  kept.add(pointer<char>(data), stride, pointer<int64_t>(target), rows, ignore_index);
  std::vector<float> weights(kept.size(), 1.0f);
  for (int64_t n = 0; row_weight != 0 && n < kept.size(); ++n) weights[n] = pointer<float>(row_weight)[kept.slot(n)];
  return vig::linear_cross_entropy(head, kept, weights.data(), z_loss,
                                   {pointer<char>(grad_hidden), pointer<char>(grad_weight), rounded,
                                    pointer<float>(grad_bias)},
                                   threads);
}

// upstream: addresses of the gradients of nll, lse and entropy, then of the forward's lse and entropy (0: none).
void linear_nll_backward(const HeadArgs& args, const RowsView& hidden, uintptr_t target, int64_t ignore_index,
                         const std::array<uintptr_t, 5>& upstream, uintptr_t grad_hidden, uintptr_t grad_weight,
                         uintptr_t grad_bias, int threads) {
  const vig::Head head = args.head();
  py::gil_scoped_release released;
  const auto [data, rows, stride] = hidden;
  vig::KeptRows kept;
  kept.add(pointer<char>(data), stride, pointer<int64_t>(target), rows, ignore_index);
  vig::linear_nll_backward(head, kept,
                           {pointer<float>(upstream[0]), pointer<float>(upstream[1]), pointer<float>(upstream[2]),
                            pointer<float>(upstream[3]), pointer<float>(upstream[4])},
                           {pointer<char>(grad_hidden), pointer<char>(grad_weight), pointer<float>(grad_bias)},
                           threads);
}

// Memory of a result, seen by Python as so many writable bytes; given back with the last reference.
struct Output {
  int64_t bytes;
  vig::Buffer memory;

  explicit Output(int64_t size) : bytes(size), memory(vig::make_output((size + 3) / 4)) {}
};

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
  m.doc() = "CPU kernels of vig_kernels; reached through vig_kernels.kernels.cpu.native only.";
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
  py::class_<HeadArgs>(m, "Head", "An LM head: addresses of (V, D) weight and (V,) float32 bias (0: none).")
      .def(py::init<std::string, std::string, int64_t, int64_t, uintptr_t, int64_t, uintptr_t, double, double>(),
           py::arg("isa"), py::arg("dtype"), py::arg("depth"), py::arg("vocab"), py::arg("weight"),
           py::arg("weight_stride"), py::arg("bias"), py::arg("scale"), py::arg("cap"));
  py::class_<Output>(m, "Output", py::buffer_protocol(), "Uninitialised memory for a result.")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Output& output) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(output.memory.get()), output.bytes);
      });
  m.def("linear_nll", linear_nll, py::arg("head"), py::arg("hidden"), py::arg("target"), py::arg("ignore_index"),
        py::arg("nll"), py::arg("lse"), py::arg("lse_rest"), py::arg("entropy"), py::arg("argmax"), py::arg("threads"));
  m.def("linear_cross_entropy", linear_cross_entropy, py::arg("head"), py::arg("hidden"), py::arg("target"),
        py::arg("row_weight"), py::arg("ignore_index"), py::arg("z_loss"), py::arg("grad_hidden"),
        py::arg("grad_weight"), py::arg("rounded"), py::arg("grad_bias"), py::arg("threads"));
  m.def("linear_nll_backward", linear_nll_backward, py::arg("head"), py::arg("hidden"), py::arg("target"),
        py::arg("ignore_index"), py::arg("upstream"), py::arg("grad_hidden"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("threads"));
  m.def("gaussian_blur", gaussian_blur, py::arg("isa"), py::arg("dtype"), py::arg("shape"), py::arg("images"),
        py::arg("images_stride"), py::arg("out"), py::arg("out_stride"), py::arg("sigma_y"), py::arg("sigma_x"),
        py::arg("truncate"), py::arg("replicate"), py::arg("threads"));
}
