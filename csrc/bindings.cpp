// All of pybind11, and no arithmetic: addresses, sizes and strides in, nothing but numbers out.
// The Python modules vig_kernels/kernels/cpu/*.py are the only callers and check every shape before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "buffers.h"
#include "gaussian_blur.h"
#include "interrupt.h"
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

// Runs Python's signal handlers: true where one of them raised, Ctrl-C's KeyboardInterrupt above all.
bool signal_raised() {
  py::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

// Python runs signal handlers in its main thread alone: nobody else need ask.
bool in_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#else
  return true;
#endif
}

// Native work without Python's lock, which Ctrl-C ends.
struct LongCall {
  py::gil_scoped_release released;
  vig::Interruptible interruptible{in_main_thread() ? signal_raised : nullptr};
};

using Shape = std::array<int64_t, 4>;
using Images = std::tuple<uintptr_t, Shape>;  // (address, byte strides)

vig::ImageView image_view(const Images& images) {
  const auto& [data, stride] = images;
  return {.data = pointer<char>(data), .stride = {stride[0], stride[1], stride[2], stride[3]}};
}

// sigmas: (vertical, horizontal), each a number for each image.
void gaussian_blur(const std::string& isa, const std::string& dtype, const Shape& shape, const Images& images,
                   const Images& out, const std::array<std::vector<double>, 2>& sigmas, double truncate, bool replicate,
                   int threads) {
  const auto& [sigma_y, sigma_x] = sigmas;
  const vig::Kernels& kernels = vig::select_kernels(isa.c_str());
  const vig::Dtype kind = dtype_of(dtype);
  if (static_cast<int64_t>(sigma_y.size()) != shape[0] || static_cast<int64_t>(sigma_x.size()) != shape[0]) {
    throw py::value_error("expected a sigma for each of " + std::to_string(shape[0]) + " images");
  }
  LongCall call;
  vig::gaussian_blur(
      kernels,
      {.images = image_view(images), .out = image_view(out), .shape = shape.data(), .dtype = kind},
      {.sigma_y = sigma_y.data(), .sigma_x = sigma_x.data(), .truncate = truncate, .replicate = replicate}, threads);
}

// Of hidden rows and their targets: (address, number of rows, bytes from row to row, address of the targets).
using Rows = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t>;

void add_rows(vig::KeptRows& kept, const Rows& rows, int64_t ignore_index) {
  const auto& [hidden, count, stride, target] = rows;
  kept.add(pointer<char>(hidden), stride, pointer<int64_t>(target), count, ignore_index);
}

struct HeadArgs {
  std::string isa, dtype;
  int64_t depth, vocab;
  uintptr_t weight;
  int64_t weight_stride;
  uintptr_t bias;
  double scale, cap;  // cap 0: none

  vig::Head head() const {
    return {vig::select_kernels(isa.c_str()),
            {.dtype = dtype_of(dtype),
             .depth = depth,
             .vocab = vocab,
             .weight = pointer<char>(weight),
             .weight_stride = weight_stride,
             .bias = pointer<float>(bias),
             .scale = static_cast<float>(scale),
             .cap = static_cast<float>(cap)}};
  }
};

// Addresses of nll, lse, lse_lo, entropy, argmax and, of two passes, kl (0: not wanted).
vig::NllOutputs nll_outputs(const std::array<uintptr_t, 6>& out) {
  const auto [nll, lse, lse_lo, entropy, argmax, kl] = out;
  return {.nll = pointer<float>(nll),
          .lse = pointer<float>(lse),
          .lse_lo = pointer<float>(lse_lo),
          .entropy = pointer<float>(entropy),
          .argmax = pointer<int64_t>(argmax),
          .kl = pointer<float>(kl)};
}

void linear_nll(const HeadArgs& args, const std::vector<Rows>& passes, int64_t ignore_index,
                const std::array<uintptr_t, 6>& out, int threads) {
  const vig::Head head = args.head();
  LongCall call;
  vig::KeptRows kept;
  for (const Rows& rows : passes) add_rows(kept, rows, ignore_index);
  vig::linear_nll(head, kept, nll_outputs(out), threads);
}

// terms: address of the row weights (0: all are 1) and z_loss. gradients: addresses of those of hidden, weight and bias
// (0: not needed), here and below. out: as linear_nll's.
double linear_cross_entropy(const HeadArgs& args, const Rows& rows, int64_t ignore_index,
                            const std::tuple<uintptr_t, double>& terms, const std::array<uintptr_t, 3>& gradients,
                            bool rounded, const std::array<uintptr_t, 6>& out, int threads) {
  const vig::Head head = args.head();
  LongCall call;
  vig::KeptRows kept;
  add_rows(kept, rows, ignore_index);
  const auto [row_weight, z_loss] = terms;
  std::vector<float> weights(kept.size(), 1.0f);
  for (int64_t n = 0; row_weight != 0 && n < kept.size(); ++n) weights[n] = pointer<float>(row_weight)[kept.slot(n)];
  const auto [hidden, weight, bias] = gradients;
  return vig::linear_cross_entropy(head, kept, {.row_weight = weights.data(), .z_loss = z_loss},
                                   {.hidden = pointer<char>(hidden),
                                    .weight = pointer<char>(weight),
                                    .rounded = rounded,
                                    .bias = pointer<float>(bias)},
                                   nll_outputs(out), threads);
}

// upstream: addresses of the gradients of nll, lse and entropy (0: none); saved: of the forward's lse and entropy.
void linear_nll_backward(const HeadArgs& args, const Rows& rows, int64_t ignore_index,
                         const std::array<uintptr_t, 3>& upstream, const std::array<uintptr_t, 2>& saved,
                         const std::array<uintptr_t, 3>& gradients, int threads) {
  const vig::Head head = args.head();
  LongCall call;
  vig::KeptRows kept;
  add_rows(kept, rows, ignore_index);
  const auto [nll, lse, entropy] = upstream;
  const auto [saved_lse, saved_entropy] = saved;
  const auto [hidden, weight, bias] = gradients;
  vig::linear_nll_backward(
      head, kept,
      {.nll = pointer<float>(nll),
       .lse = pointer<float>(lse),
       .entropy = pointer<float>(entropy),
       .saved_lse = pointer<float>(saved_lse),
       .saved_entropy = pointer<float>(saved_entropy)},
      {.hidden = pointer<char>(hidden), .weight = pointer<char>(weight), .bias = pointer<float>(bias)}, threads);
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
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const vig::Interrupted&) {  // signal_raised() has set the Python error
    }
  });
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
  m.def("linear_nll", linear_nll, py::arg("head"), py::arg("passes"), py::arg("ignore_index"), py::arg("out"),
        py::arg("threads"));
  m.def("linear_cross_entropy", linear_cross_entropy, py::arg("head"), py::arg("rows"), py::arg("ignore_index"),
        py::arg("terms"), py::arg("gradients"), py::arg("rounded"), py::arg("out"), py::arg("threads"));
  m.def("linear_nll_backward", linear_nll_backward, py::arg("head"), py::arg("rows"), py::arg("ignore_index"),
        py::arg("upstream"), py::arg("saved"), py::arg("gradients"), py::arg("threads"));
  m.def("gaussian_blur", gaussian_blur, py::arg("isa"), py::arg("dtype"), py::arg("shape"), py::arg("images"),
        py::arg("out"), py::arg("sigmas"), py::arg("truncate"), py::arg("replicate"), py::arg("threads"));
}
