// The native module of gist_kernels. It links against neither torch nor Python's numeric packages.
// Tensors arrive as addresses and strides; the address 0 is an absent tensor. The Python modules in
// kernels/cpu check them, and each calls the functions of its own family.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "activation.h"
#include "adapter.h"
#include "attention.h"
#include "divergence.h"
#include "loss.h"
#include "peak.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using std::int64_t;
using Address = std::uintptr_t;

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

nb::list instruction_sets() {
  nb::list names;
  for (int i = 0; gist::instruction_sets(i) != nullptr; ++i)
    names.append(gist::instruction_sets(i));
  return names;
}

void use_instruction_set(const char *name) {
  if (gist::use_instruction_set(name)) return;
  std::string text =
      "'" + std::string(name) + "' is no instruction set of this build and processor";
  for (int i = 0; gist::instruction_sets(i) != nullptr; ++i)
    text += (i == 0 ? "; it has " : ", ") + std::string(gist::instruction_sets(i));
  throw nb::value_error(text.c_str());
}

// Names and codes.
template <class Code, std::size_t kCount>
nb::dict codes_of(const gist::Named<Code> (&table)[kCount]) {
  nb::dict codes;
  for (const auto &[name, code] : table) codes[name] = int(code);
  return codes;
}

template <std::size_t kCount>
nb::dict codes_of(const gist::Dtype (&dtypes)[kCount]) {
  nb::dict codes;
  for (const gist::Dtype dtype : dtypes)
    for (const auto &[name, code] : gist::kDtypes)
      if (code == dtype) codes[name] = int(code);
  return codes;
}

void *pointer(Address address) { return reinterpret_cast<void *>(address); }

// Groups of the loss's arguments.
using Logits = std::tuple<int, int64_t, int64_t, Address, int64_t, Address, int64_t>;
using Target = std::tuple<int, Address, int64_t>;
using LossOptions = std::tuple<double, double, double, double, double, double, int64_t,
                               const char *, double, const char *>;
using RowScales = std::tuple<Address, int64_t>;
using LossGradients = std::tuple<Address, Address, int64_t>;

constexpr char kLossGroups[] =
    "\n\n"
    "logits: (dtype, rows, classes, cls, stride of its rows, gist, stride of its rows)\n"
    "target: (dtype, address, stride of its rows); the dtype is that of `none` without target\n"
    "options: the fields of LossOptions, in their order\n"
    "row_scales: (address, stride) of what each row's loss is multiplied by\n"
    "stats: (rows, LOSS_STATS_PER_ROW), contiguous\n";

gist::LossCall loss_call(const Logits &logits, const Target &target, const LossOptions &options,
                         const RowScales &row_scales, Address stats) {
  gist::LossCall call = {};
  const auto [dtype, rows, classes, cls, cls_stride, gist, gist_stride] = logits;
  call.rows = rows;
  call.classes = classes;
  call.dtype = static_cast<gist::Dtype>(dtype);
  call.logits[gist::kCls] = pointer(cls);
  call.logits[gist::kGist] = pointer(gist);
  call.logit_stride[gist::kCls] = cls_stride;
  call.logit_stride[gist::kGist] = gist_stride;

  const auto [target_dtype, target_address, target_stride] = target;
  call.target_dtype = static_cast<gist::Dtype>(target_dtype);
  call.target = pointer(target_address);
  call.target_stride = target_stride;

  const char *reduction, *stop_gradient;
  std::tie(call.temperature, call.weights[0], call.weights[1], call.weights[2], call.weights[3],
           call.label_smoothing, call.ignore_index, reduction, call.gist_scale, stop_gradient) =
      options;
  call.reduction = reduction[0] == 'n'   ? gist::Reduction::none
                   : reduction[0] == 's' ? gist::Reduction::sum
                                         : gist::Reduction::mean;
  for (int s : gist::kHeads) {
    const char side = s == gist::kCls ? 'a' : 'b';
    call.from_other[s] = stop_gradient[0] != side;
    call.from_own[s] = stop_gradient[0] != side && stop_gradient[0] != 't';
  }
  call.row_scales = pointer(std::get<0>(row_scales));
  call.row_scales_stride = std::get<1>(row_scales);
  call.stats = pointer(stats);
  return call;
}

void set_gradients(gist::LossCall &call, const LossGradients &gradients) {
  const auto [d_cls, d_gist, stride] = gradients;
  call.d_logits[gist::kCls] = pointer(d_cls);
  call.d_logits[gist::kGist] = pointer(d_gist);
  call.d_logits_stride = stride;
}

int64_t loss_forward(const Logits &logits, const Target &target, const LossOptions &options,
                     const RowScales &row_scales, Address stats, Address loss, Address terms,
                     int threads) {
  const nb::gil_scoped_release release;
  gist::LossCall call = loss_call(logits, target, options, row_scales, stats);
  call.loss = pointer(loss);
  call.terms = pointer(terms);
  return gist::loss_forward(call, threads);
}

void loss_backward(const Logits &logits, const Target &target, const LossOptions &options,
                   const RowScales &row_scales, Address stats,
                   const std::tuple<Address, int64_t> &grad, const LossGradients &gradients,
                   int threads) {
  const nb::gil_scoped_release release;
  gist::LossCall call = loss_call(logits, target, options, row_scales, stats);
  call.grad = pointer(std::get<0>(grad));
  call.grad_stride = std::get<1>(grad);
  set_gradients(call, gradients);
  gist::loss_backward(call, threads);
}

int64_t loss_forward_backward(const Logits &logits, const Target &target,
                              const LossOptions &options, const RowScales &row_scales,
                              Address stats, Address loss, const LossGradients &gradients,
                              int threads) {
  const nb::gil_scoped_release release;
  gist::LossCall call = loss_call(logits, target, options, row_scales, stats);
  call.loss = pointer(loss);
  set_gradients(call, gradients);
  return gist::loss_forward_backward(call, threads);
}

// Groups of the divergence's arguments: of every side, address and row stride, weight, temperature.
using Side = std::tuple<Address, int64_t, double, double>;
using RowsShape = std::tuple<int64_t, int64_t>;

gist::DivergenceCall divergence_call(int dtype, const RowsShape &shape,
                                     const std::vector<Side> &sides, const RowScales &row_scales,
                                     Address stats) {
  gist::DivergenceCall call = {};
  call.dtype = static_cast<gist::Dtype>(dtype);
  std::tie(call.rows, call.classes) = shape;
  call.sides = int(sides.size());
  for (int k = 0; k < call.sides; ++k) {
    call.logits[k] = pointer(std::get<0>(sides[k]));
    call.logit_stride[k] = std::get<1>(sides[k]);
    call.weights[k] = std::get<2>(sides[k]);
    call.temperatures[k] = std::get<3>(sides[k]);
  }
  call.row_scales = pointer(std::get<0>(row_scales));
  call.row_scales_stride = std::get<1>(row_scales);
  call.stats = pointer(stats);
  return call;
}

void check_sides(std::size_t sides) {
  if (sides < 2 || sides > gist::kMostSides) throw nb::value_error("2 to 8 sides are taken");
}

void divergence_forward(int dtype, const RowsShape &shape, const std::vector<Side> &sides,
                        const RowScales &row_scales, Address stats, Address loss, int threads) {
  check_sides(sides.size());
  const nb::gil_scoped_release release;
  gist::DivergenceCall call = divergence_call(dtype, shape, sides, row_scales, stats);
  call.loss = pointer(loss);
  gist::divergence_forward(call, threads);
}

void divergence_backward(int dtype, const RowsShape &shape, const std::vector<Side> &sides,
                         const RowScales &row_scales, Address stats,
                         const std::tuple<Address, int64_t> &grad,
                         const std::vector<Address> &gradients, int threads) {
  check_sides(sides.size());
  if (gradients.size() != sides.size()) throw nb::value_error("a gradient's address for each side");
  const nb::gil_scoped_release release;
  gist::DivergenceCall call = divergence_call(dtype, shape, sides, row_scales, stats);
  call.grad = pointer(std::get<0>(grad));
  call.grad_stride = std::get<1>(grad);
  for (int k = 0; k < call.sides; ++k) call.d_logits[k] = pointer(gradients[k]);
  gist::divergence_backward(call, threads);
}

// Groups of the adapter's arguments.
using Shape = std::tuple<int64_t, int64_t>;
using Rows = std::tuple<Address, int64_t>;
using ForwardNorm = std::tuple<double, Address, Address, Address, Address>;
using BackwardNorm = std::tuple<Address, Address, Rows>;
using ForwardAdapter =
    std::tuple<int64_t, int, double, Address, Address, Address, Address, Address, Address>;
using BackwardAdapter = std::tuple<int64_t, int, double, Address, Address, Address>;
using WeightGradients = std::tuple<Address, Address, Address, Address>;

gist::AdapterCall adapter_call(int dtype, const Shape &shape, const Rows &x) {
  gist::AdapterCall call = {};
  call.dtype = static_cast<gist::Dtype>(dtype);
  std::tie(call.rows, call.width) = shape;
  call.x = pointer(std::get<0>(x));
  call.x_stride = std::get<1>(x);
  return call;
}

void adapter_forward(int dtype, const Shape &shape, const Rows &x, const Rows &add, Address bias,
                     const std::optional<ForwardNorm> &norm,
                     const std::optional<ForwardAdapter> &adapter, int threads) {
  const nb::gil_scoped_release release;
  gist::AdapterCall call = adapter_call(dtype, shape, x);
  call.add = pointer(std::get<0>(add));
  call.add_stride = std::get<1>(add);
  call.bias = pointer(bias);
  if (norm) {
    const auto [eps, weight, norm_bias, normed, stats] = *norm;
    call.has_norm = true;
    call.eps = eps;
    call.norm_weight = pointer(weight);
    call.norm_bias = pointer(norm_bias);
    call.normed = pointer(normed);
    call.stats = pointer(stats);
  }
  if (adapter) {
    const auto [rank, activation, scale, down_weight, down_bias, up_weight, up_bias, out, z] =
        *adapter;
    call.rank = rank;
    call.activation = static_cast<gist::Activation>(activation);
    call.scale = scale;
    call.down_weight = pointer(down_weight);
    call.down_bias = pointer(down_bias);
    call.up_weight = pointer(up_weight);
    call.up_bias = pointer(up_bias);
    call.out = pointer(out);
    call.z = pointer(z);
  }
  gist::adapter_forward(call, threads);
}

void adapter_backward(int dtype, const Shape &shape, const Rows &x, const Rows &d_out,
                      bool pass_through, const std::optional<BackwardNorm> &norm,
                      const std::optional<BackwardAdapter> &adapter,
                      const WeightGradients &gradients, Address dx, int threads) {
  const nb::gil_scoped_release release;
  gist::AdapterCall call = adapter_call(dtype, shape, x);
  call.d_out = pointer(std::get<0>(d_out));
  call.d_out_stride = std::get<1>(d_out);
  call.pass_through = pass_through;
  call.dx = pointer(dx);
  if (norm) {
    const auto [weight, stats, d_normed] = *norm;
    call.has_norm = true;
    call.norm_weight = pointer(weight);
    call.stats = pointer(stats);
    call.d_normed = pointer(std::get<0>(d_normed));
    call.d_normed_stride = std::get<1>(d_normed);
  }
  if (adapter) {
    const auto [rank, activation, scale, down_weight, up_weight, z] = *adapter;
    call.rank = rank;
    call.activation = static_cast<gist::Activation>(activation);
    call.scale = scale;
    call.down_weight = pointer(down_weight);
    call.up_weight = pointer(up_weight);
    call.z = pointer(z);
    const auto [d_down_weight, d_down_bias, d_up_weight, d_up_bias] = gradients;
    call.d_down_weight = pointer(d_down_weight);
    call.d_down_bias = pointer(d_down_bias);
    call.d_up_weight = pointer(d_up_weight);
    call.d_up_bias = pointer(d_up_bias);
  }
  gist::adapter_backward(call, threads);
}

gist::ActivationCall activation_call(int dtype, int activation, int64_t size, Address u,
                                     Address result) {
  gist::ActivationCall call = {};
  call.dtype = static_cast<gist::Dtype>(dtype);
  call.activation = static_cast<gist::Activation>(activation);
  call.size = size;
  call.u = pointer(u);
  call.result = pointer(result);
  return call;
}

void activation_forward(int dtype, int activation, int64_t size, Address u, Address result,
                        int threads) {
  const nb::gil_scoped_release release;
  gist::activation_forward(activation_call(dtype, activation, size, u, result), threads);
}

void activation_backward(int dtype, int activation, int64_t size, Address u, Address d_a,
                         Address result, int threads) {
  const nb::gil_scoped_release release;
  gist::ActivationCall call = activation_call(dtype, activation, size, u, result);
  call.d_a = pointer(d_a);
  gist::activation_backward(call, threads);
}

gist::GatedCall gated_call(int dtype, int activation, const Shape &shape, Address u,
                           Address result) {
  const auto [rows, width] = shape;
  return {activation_call(dtype, activation, rows * width, u, result), width};
}

void gated_activation_forward(int dtype, int activation, const Shape &shape, Address u,
                              Address result, int threads) {
  const nb::gil_scoped_release release;
  gist::gated_forward(gated_call(dtype, activation, shape, u, result), threads);
}

void gated_activation_backward(int dtype, int activation, const Shape &shape, Address u,
                               Address d_a, Address result, int threads) {
  const nb::gil_scoped_release release;
  gist::GatedCall call = gated_call(dtype, activation, shape, u, result);
  call.d_a = pointer(d_a);
  gist::gated_backward(call, threads);
}

// Groups of attention's arguments.
using AttentionSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using AttentionTensor = std::tuple<Address, int64_t, int64_t>;
using AttentionRotation = std::tuple<Address, Address, int64_t, int64_t, bool, bool>;

constexpr char kAttentionGroups[] =
    "\n\n"
    "sizes: (batch, heads, queries, keys, columns of a head)\n"
    "tensors: (address, stride of the batch, stride of the rows)\n"
    "lse: (batch, heads, queries) floats, contiguous\n"
    "rotation: None, or (sin, cos, first token, rows of a table, whether each head has one, "
    "whether "
    "the pairs are feature j and j + columns / 2); contiguous floats\n"
    "lengths: (batch,) int64, contiguous, 1 to keys; 0 for none\n";

gist::AttentionTensor attention_tensor(const AttentionTensor &tensor) {
  const auto [address, batch_stride, row_stride] = tensor;
  return {pointer(address), batch_stride, row_stride};
}

gist::AttentionCall attention_call(int dtype, const AttentionSizes &sizes, double scale,
                                   const AttentionTensor &q, const AttentionTensor &k,
                                   const AttentionTensor &v, Address lse,
                                   const std::optional<AttentionRotation> &rotation,
                                   Address lengths) {
  gist::AttentionCall call = {};
  call.dtype = static_cast<gist::Dtype>(dtype);
  std::tie(call.batch, call.heads, call.queries, call.keys, call.head_dim) = sizes;
  call.scale = scale;
  call.q = attention_tensor(q);
  call.k = attention_tensor(k);
  call.v = attention_tensor(v);
  call.lse = static_cast<float *>(pointer(lse));
  call.lengths = static_cast<const int64_t *>(pointer(lengths));
  if (rotation) {
    const auto [sin, cos, start, rows, per_head, half] = *rotation;
    call.rotation = {static_cast<const float *>(pointer(sin)),
                     static_cast<const float *>(pointer(cos)),
                     start,
                     rows,
                     per_head,
                     half};
  }
  return call;
}

void attention_forward(int dtype, const AttentionSizes &sizes, double scale,
                       const AttentionTensor &q, const AttentionTensor &k, const AttentionTensor &v,
                       Address lse, const std::optional<AttentionRotation> &rotation,
                       Address lengths, const AttentionTensor &out, int threads) {
  const nb::gil_scoped_release release;
  gist::AttentionCall call = attention_call(dtype, sizes, scale, q, k, v, lse, rotation, lengths);
  call.out = attention_tensor(out);
  gist::attention_forward(call, threads);
}

void attention_backward(int dtype, const AttentionSizes &sizes, double scale,
                        const AttentionTensor &q, const AttentionTensor &k,
                        const AttentionTensor &v, Address lse,
                        const std::optional<AttentionRotation> &rotation, Address lengths,
                        const AttentionTensor &d_out, const AttentionTensor &d_q,
                        const AttentionTensor &d_k, const AttentionTensor &d_v, int threads) {
  const nb::gil_scoped_release release;
  gist::AttentionCall call = attention_call(dtype, sizes, scale, q, k, v, lse, rotation, lengths);
  call.d_out = attention_tensor(d_out);
  call.d_q = attention_tensor(d_q);
  call.d_k = attention_tensor(d_k);
  call.d_v = attention_tensor(d_v);
  gist::attention_backward(call, threads);
}

std::string doc(const char *summary, const char *groups) { return std::string(summary) + groups; }

void define_loss(nb::module_ &m) {
  const std::string gradients =
      std::string(kLossGroups) +
      "gradients: (of cls, of gist, stride of the rows); 0 for one that is not wanted\n";
  m.attr("LOSS_STATS_PER_ROW") = gist::kRowStats;
  m.attr("LOSS_DTYPES") = codes_of(gist::kLossDtypes);
  m.def("loss_forward", &loss_forward, "logits"_a, "target"_a, "options"_a, "row_scales"_a,
        "stats"_a, "loss"_a, "terms"_a, "threads"_a,
        doc("Writes stats, loss, and terms unless 0. Returns the first row whose class index is "
            "outside the classes, or -1.",
            kLossGroups)
            .c_str());
  m.def("loss_backward", &loss_backward, "logits"_a, "target"_a, "options"_a, "row_scales"_a,
        "stats"_a, "grad"_a, "gradients"_a, "threads"_a,
        (doc("Writes the gradients from loss_forward's stats.", gradients.c_str()) +
         "grad: (address, stride) of the loss's gradient\n")
            .c_str());
  m.def("loss_forward_backward", &loss_forward_backward, "logits"_a, "target"_a, "options"_a,
        "row_scales"_a, "stats"_a, "loss"_a, "gradients"_a, "threads"_a,
        doc("Writes stats unless 0, loss and the gradients of the loss's sum. Returns what "
            "loss_forward returns.",
            gradients.c_str())
            .c_str());
}

void define_divergence(nb::module_ &m) {
  m.attr("DIVERGENCE_DTYPES") = codes_of(gist::kDivergenceDtypes);
  m.attr("DIVERGENCE_STATS_PER_SIDE") = gist::kSideStats;
  m.attr("DIVERGENCE_MOST_SIDES") = gist::kMostSides;
  m.def("divergence_forward", &divergence_forward, "dtype"_a, "shape"_a, "sides"_a, "row_scales"_a,
        "stats"_a, "loss"_a, "threads"_a,
        "Writes stats and each row's Jensen-Shannon divergence.\n\n"
        "shape: (rows, classes)\n"
        "sides: of each, (address, stride of the rows, weight, temperature)\n"
        "row_scales: (address, stride) of what each row's divergence is multiplied by\n"
        "stats: (rows, sides, DIVERGENCE_STATS_PER_SIDE), contiguous\n");
  m.def("divergence_backward", &divergence_backward, "dtype"_a, "shape"_a, "sides"_a,
        "row_scales"_a, "stats"_a, "grad"_a, "gradients"_a, "threads"_a,
        "Writes the gradients from divergence_forward's stats.\n\n"
        "grad: (address, stride) of the rows' upstream gradients\n"
        "gradients: of each side, the address of (rows, classes), or 0\n");
}

void define_adapter(nb::module_ &m) {
  m.attr("ADAPTER_DTYPES") = codes_of(gist::kAdapterDtypes);
  m.def("adapter_forward", &adapter_forward, "dtype"_a, "shape"_a, "x"_a, "add"_a, "bias"_a,
        "norm"_a.none(), "adapter"_a.none(), "threads"_a,
        "Writes LayerNorm(x) and the adapter's output.\n\n"
        "shape: (rows, width)\n"
        "x, add: (address, stride of the rows)\n"
        "norm: None, or (eps, weight, bias, normed, stats); it writes the last two\n"
        "adapter: None, or (rank, activation, scale, down weight, down bias, up weight, up bias, "
        "out, z); it writes the last two\n");
  m.def("adapter_backward", &adapter_backward, "dtype"_a, "shape"_a, "x"_a, "d_out"_a,
        "pass_through"_a, "norm"_a.none(), "adapter"_a.none(), "gradients"_a, "dx"_a, "threads"_a,
        "Writes dx unless 0, and the adapter's weights' gradients.\n\n"
        "shape: (rows, width)\n"
        "x, d_out: (address, stride of the rows)\n"
        "norm: None, or (weight, stats, (d_normed, stride of its rows))\n"
        "adapter: None, or (rank, activation, scale, down weight, up weight, z)\n"
        "gradients: (of down weight, of down bias, of up weight, of up bias)\n");
}

void define_activation(nb::module_ &m) {
  m.attr("ACTIVATIONS") = codes_of(gist::kActivations);
  m.attr("ACTIVATION_DTYPES") = codes_of(gist::kActivationDtypes);
  m.def("activation_forward", &activation_forward, "dtype"_a, "activation"_a, "size"_a, "u"_a,
        "result"_a, "threads"_a, "Writes act(u) of `size` contiguous numbers.");
  m.def("activation_backward", &activation_backward, "dtype"_a, "activation"_a, "size"_a, "u"_a,
        "d_a"_a, "result"_a, "threads"_a,
        "Writes d_a * act'(u) of `size` contiguous numbers; the result may be d_a.");
  m.def("gated_activation_forward", &gated_activation_forward, "dtype"_a, "activation"_a, "shape"_a,
        "u"_a, "result"_a, "threads"_a,
        "Writes act(gate) * value, of `shape` (rows, width), for rows of u with the gates before "
        "the values.");
  m.def("gated_activation_backward", &gated_activation_backward, "dtype"_a, "activation"_a,
        "shape"_a, "u"_a, "d_a"_a, "result"_a, "threads"_a,
        "Writes the gradient of u, shaped as u, from that of act(gate) * value.");
}

void define_attention(nb::module_ &m) {
  m.attr("ATTENTION_DTYPES") = codes_of(gist::kAttentionDtypes);
  m.def("attention_forward", &attention_forward, "dtype"_a, "sizes"_a, "scale"_a, "q"_a, "k"_a,
        "v"_a, "lse"_a, "rotation"_a.none(), "lengths"_a, "out"_a, "threads"_a,
        doc("Writes out and lse.", kAttentionGroups).c_str());
  m.def("attention_backward", &attention_backward, "dtype"_a, "sizes"_a, "scale"_a, "q"_a, "k"_a,
        "v"_a, "lse"_a, "rotation"_a.none(), "lengths"_a, "d_out"_a, "d_q"_a, "d_k"_a, "d_v"_a,
        "threads"_a,
        doc("Writes d_q, d_k and d_v from attention_forward's lse.", kAttentionGroups).c_str());
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU side of gist_kernels, independent of torch.";
  m.def("instruction_set", &gist::instruction_set,
        "The vector instruction set kernels use here: 'avx512', 'avx2' or 'portable'.");
  m.def("instruction_sets", &instruction_sets, "Those that can run here, widest first.");
  m.def("use_instruction_set", &use_instruction_set,
        "Choose one of them for the whole process; ValueError names them where there is none "
        "such.");
  m.def("processor_vendor", &gist::processor_vendor, "'amd', 'intel' or 'other'.");
  m.def("processor_has_avx512", &gist::processor_has_avx512, "Whatever instruction set is in use.");
  m.def("max_threads", &max_threads,
        "Threads an OpenMP region would use: torch.get_num_threads() once torch is loaded.");
  m.def("multiply_adds", &gist::multiply_adds, "count"_a, "threads"_a,
        "At least `count` multiply-adds of floats in registers, for benchmarks.");
  m.attr("DTYPES") = codes_of(gist::kDtypes);
  define_loss(m);
  define_divergence(m);
  define_adapter(m);
  define_activation(m);
  define_attention(m);
}
